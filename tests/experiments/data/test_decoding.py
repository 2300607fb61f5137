"""Decoding: samples of every width come out on one scale, named formats only are read, and memory stays bounded."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL.Image
import pytest
import soundfile
import soxr

from diffstride.experiments.data import DataError
from diffstride.experiments.data.audio import SoundDecoder
from diffstride.experiments.data.images import ImageDecoder

GREY16 = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
GREY12 = np.arange(2**12, dtype=np.uint16).reshape(64, 64)
GREY8 = np.arange(2**8, dtype=np.uint8).reshape(16, 16)
BLACK_TO_WHITE = GREY16 / 65535 * 255
RATE = 16000


def saved(image, kind, **options):
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels, colour=0):
    """A PNG file with 16 bits for each sample, which Pillow does not write for several channels."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(pixels, order="<", *, bits=None, photometric=1, sample_format=1, data=None, **more):
    """A TIFF file of grey samples; photometric 0 is white at zero; sample formats are unsigned, signed, float."""
    height, width = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes() if data is None else data
    tags = {256: width, 257: height, 258: bits or 8 * pixels.itemsize, 259: 1, 262: photometric, 273: 0, 277: 1}
    tags |= {278: height, 279: len(data), 339: sample_format} | {int(tag): value for tag, value in more.items()}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    start = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    return start + entries + bytes(4) + data


def packed(samples):
    """Two 12-bit samples in three bytes."""
    first, second = samples.reshape(len(samples), -1, 2).transpose(2, 0, 1)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()


def planes(pixels, order="<", *, compressed=False, fill=1, photometric=2, extra=()):
    """A TIFF file of pixels `[H, W, C]` in which every channel is a plane of its own."""
    height, width, count = pixels.shape
    strips = [pixels[..., i].astype(pixels.dtype.newbyteorder(order)).tobytes() for i in range(count)]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    sizes = [len(strip) for strip in strips]
    tags = {256: [width], 257: [height], 258: [8 * pixels.itemsize] * count, 259: [8 if compressed else 1]}
    tags |= {262: [photometric], 266: [fill], 273: sizes, 277: [count], 278: [height], 279: sizes, 284: [2]}
    tags |= {338: list(extra)} if extra else {}
    end = 8 + 2 + 12 * len(tags) + 4  # of the directory; the values that do not fit into it follow, then the strips
    first = end + 4 * sum(len(values) for values in tags.values() if len(values) > 1)
    tags[273] = [first + sum(sizes[:i]) for i in range(count)]
    entries, more = b"", b""
    for tag in sorted(tags):
        values = struct.pack(f"{order}{len(tags[tag])}I", *tags[tag])
        if len(values) > 4:
            values, more = struct.pack(order + "I", end + len(more)), more + values
        entries += struct.pack(order + "HHI", tag, 4, len(tags[tag])) + values
    start = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    return start + entries + bytes(4) + more + b"".join(strips)


def channels(*samples):
    return np.stack(samples, -1)


OPAQUE = np.full_like(GREY16, 65535)
SCALED = {
    "png": (png(GREY16), BLACK_TO_WHITE),
    "png, alpha": (png(channels(GREY16, OPAQUE), 4), BLACK_TO_WHITE),
    "png, rgb": (png(channels(GREY16, GREY16, GREY16), 2), BLACK_TO_WHITE),
    "png, rgba": (png(channels(GREY16, GREY16, GREY16, OPAQUE), 6), BLACK_TO_WHITE),
    "tiff": (tiff(GREY16), BLACK_TO_WHITE),
    "tiff, big-endian": (tiff(GREY16, ">"), BLACK_TO_WHITE),
    "tiff, lzw": (saved(GREY16, "TIFF", compression="tiff_lzw"), BLACK_TO_WHITE),
    "tiff, white is zero": (tiff(GREY16, photometric=0), 255 - BLACK_TO_WHITE),
    "tiff, 12 bits": (tiff(GREY12, bits=12, data=packed(GREY12)), GREY12 / 4095 * 255),
    "tiff, 8 bits": (tiff(GREY8), GREY8),
    "tiff, 8 bits, white is zero": (tiff(GREY8, photometric=0), 255 - GREY8.astype(int)),
    "pgm": (b"P5 256 256 65535\n" + GREY16.astype(">u2").tobytes(), BLACK_TO_WHITE),
    "pgm, 4095": (b"P5 64 64 4095\n" + GREY12.astype(">u2").tobytes(), GREY12 / 4095 * 255),
    "pgm, 15": (b"P5 4 4 15\n" + bytes(range(16)), np.arange(16).reshape(4, 4) * 17),
    "pgm, plain": (b"P2 64 64 4095\n" + b" ".join(b"%d" % grey for grey in GREY12.ravel()), GREY12 / 4095 * 255),
    "ppm": (b"P6 256 256 65535\n" + channels(GREY16, GREY16, GREY16).astype(">u2").tobytes(), BLACK_TO_WHITE),
    "jpeg 2000": (saved(GREY16, "JPEG2000"), BLACK_TO_WHITE),
    "png, 1 bit": (saved(GREY8 > 99, "PNG"), (GREY8 > 99) * 255),
}
REFUSED = {
    "tiff, float": tiff((GREY16 / 65535).astype(np.float32), sample_format=3),
    "tiff, float, white is zero": tiff((GREY16 / 65535).astype(np.float32), sample_format=3, photometric=0),
    "tiff, 32 bits": tiff(GREY16.astype(np.uint32) * 65537),
    "tiff, 32 bits, signed": tiff(GREY16.astype(np.int32), sample_format=2),
    "tiff, 16 bits, signed": tiff(GREY16, sample_format=2),
    "tiff, 8 bits, signed": tiff(GREY8, sample_format=2),
    "pfm": b"Pf\n256 256\n-1.0\n" + (GREY16 / 65535).astype("<f4").tobytes(),
}


@pytest.mark.parametrize("kind", SCALED)
def test_images_of_all_widths_come_out_on_one_scale(kind):
    content, expected = SCALED[kind]
    for channel in ImageDecoder()(content).astype(float):
        assert np.abs(channel - expected).max() < 1  # Pillow itself drops the lower byte of coloured samples


@pytest.mark.parametrize("kind", REFUSED)
def test_images_without_a_defined_range_are_refused(kind):
    with pytest.raises(DataError, match=r"no defined range: convert it to 8 or 16 bits|its format is none of"):
        ImageDecoder()(REFUSED[kind])


WIDE = np.random.default_rng(0).integers(0, 2**16, (8, 8, 5), np.uint16)
NARROW = (WIDE >> 8).astype(np.uint8)
PLANES = {
    "8 bits": (NARROW[..., :3], {}),
    "8 bits, compressed": (NARROW[..., :3], {"compressed": True}),
    "8 bits, alpha": (NARROW[..., :4], {"extra": [2]}),
    "8 bits, alpha, compressed": (NARROW[..., :4], {"extra": [2], "compressed": True}),
}
MISREAD_PLANES = {
    "16 bits": (WIDE[..., :3], {}),
    "16 bits, big-endian": (WIDE[..., :3], {"order": ">"}),
    "16 bits, alpha": (WIDE[..., :4], {"extra": [2]}),
    "16 bits, CMYK": (WIDE[..., :4], {"photometric": 5}),
    "16 bits, undeclared channel, compressed": (WIDE[..., :4], {"compressed": True}),
    "8 bits, undeclared channel, compressed": (NARROW[..., :4], {"compressed": True}),
    "8 bits, white is zero": (NARROW[..., :1], {"photometric": 0}),
    "8 bits, L*a*b*": (NARROW[..., :3], {"photometric": 8}),
    "8 bits, reversed": (NARROW[..., :3], {"fill": 2}),
}


@pytest.mark.parametrize("kind", PLANES)
def test_separate_planes_are_the_channels_of_an_image(kind):
    pixels, options = PLANES[kind]
    assert np.array_equal(ImageDecoder()(planes(pixels, **options)), pixels[..., :3].transpose(2, 0, 1))


@pytest.mark.parametrize("kind", MISREAD_PLANES)
def test_separate_planes_that_pillow_misreads_are_refused(kind):
    pixels, options = MISREAD_PLANES[kind]
    with pytest.raises(DataError, match="separate planes that are not plain 8-bit ones: save it with interleaved"):
        ImageDecoder()(planes(pixels, **options))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_images_of_16_bits_are_turned_upright_as_those_of_8_are(kind, orientation):
    exif = PIL.Image.Exif()
    exif[0x112] = orientation
    wide = GREY16[100:102, :3]
    coarse = np.rint(wide / 257).astype(np.uint8)
    decoded = [ImageDecoder()(saved(pixels, kind, exif=exif)) for pixels in (wide, coarse)]
    assert np.array_equal(*decoded)


@pytest.mark.parametrize("size", [(7, 31), (31, 7), (64, 48), (33, 100), (1, 9), (20, 20)])
@pytest.mark.parametrize("image_size", [1, 7, 20, 50])
def test_the_middle_square_is_that_of_the_whole_image_resized(size, image_size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    scale = image_size / min(size)
    height, width = (max(image_size, round(n * scale)) for n in size)
    whole = PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BILINEAR)
    top, left = (height - image_size) // 2, (width - image_size) // 2
    expected = np.asarray(whole)[top : top + image_size, left : left + image_size].astype(int)
    found = ImageDecoder(image_size)(saved(pixels, "PNG")).transpose(1, 2, 0)
    np.testing.assert_allclose(found, expected, atol=1)


OTHER_FORMATS = {
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "Photoshop": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(14) + bytes(48),
    "icon": saved(GREY8, "ICO"),
    "TGA": saved(GREY8, "TGA"),
    "FITS": b"SIMPLE  =                    T".ljust(80)
    + b"BITPIX  =                    8".ljust(80)
    + b"END".ljust(2720),
    "text": b"not an image",
}


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_other_image_formats_are_refused_and_start_no_program(kind, tmp_path, monkeypatch):
    for program in ("gs", "gswin64c", "gswin32c"):
        (tmp_path / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\necho 10.0\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(DataError, match="its format is none of PNG, JPEG, "):
        ImageDecoder()(OTHER_FORMATS[kind])
    assert not (tmp_path / "started").exists()


def recording(kind, subtype=None, *, samples=None, rate=RATE):
    buffer = io.BytesIO()
    soundfile.write(buffer, NOISE if samples is None else samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


NOISE = (0.1 * np.random.default_rng(0).standard_normal(4 * RATE)).astype(np.float32).clip(-0.9, 0.9)
TONES = np.sin(np.arange(4 * RATE) * np.array([[0.05], [0.13]])).sum(0).astype(np.float32) / 4
EXACT = [
    ("WAV", "PCM_U8", 2**-7), ("WAV", "PCM_16", 2**-14), ("WAV", "PCM_24", 2**-14), ("WAV", "PCM_32", 2**-14),
    ("WAV", "FLOAT", 2**-14), ("WAV", "DOUBLE", 2**-14), ("WAV", "ALAW", 0.02), ("WAV", "ULAW", 0.02),
    ("FLAC", "PCM_S8", 2**-7), ("FLAC", "PCM_16", 2**-14), ("FLAC", "PCM_24", 2**-14), ("AIFF", "PCM_S8", 2**-7),
    ("AIFF", "FLOAT", 2**-14), ("AU", "PCM_32", 2**-14), ("CAF", "ALAC_16", 2**-14), ("RF64", "PCM_16", 2**-14),
    ("W64", "PCM_24", 2**-14), ("NIST", "PCM_16", 2**-14),
]  # fmt: skip
LOSSY = [("WAV", "IMA_ADPCM"), ("WAV", "GSM610"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]


@pytest.mark.parametrize(("kind", "subtype", "tolerance"), [*EXACT, *((*lossy, np.inf) for lossy in LOSSY)])
def test_sounds_of_all_widths_come_out_on_one_scale(kind, subtype, tolerance):
    found = SoundDecoder(None, 4.0)(recording(kind, subtype, samples=TONES)) / 32768
    assert np.abs(found - TONES).max() < tolerance
    assert found.std() == pytest.approx(TONES.std(), rel=0.1)


@pytest.mark.parametrize(("kind", "subtype"), [*((kind, subtype) for kind, subtype, _ in EXACT), *LOSSY])
@pytest.mark.parametrize("rate", [None, 8000, 44100, 15999])
@pytest.mark.parametrize("seconds", [0.1, 3.3])
def test_a_part_of_a_sound_is_that_of_the_whole(kind, subtype, rate, seconds):
    """Compressed formats need context where they are entered, and so does resampling."""
    content = recording(kind, subtype)
    whole, own = soundfile.read(io.BytesIO(content), dtype="float32")
    whole = whole if rate is None else soxr.resample(whole, own, rate)
    length = round(seconds * (rate or own))
    expected = whole[(len(whole) - length) // 2 :][:length].astype(np.float64) * 32768
    found = SoundDecoder(rate, seconds)(content)
    assert len(found) == length
    assert np.abs(found - expected).max() < 0.6  # of a 16-bit step: 0.5 is the rounding


@pytest.mark.parametrize(("kind", "subtype"), LOSSY)
@pytest.mark.parametrize("block", [1 << 20, 1000])
def test_a_part_of_a_compressed_tone_is_that_of_the_whole(kind, subtype, block, monkeypatch):
    """In a tone, unlike in noise, the first samples after a seek depend on frames long before it."""
    monkeypatch.setattr("diffstride.experiments.data.audio._BLOCK", block)
    content = recording(kind, subtype, samples=TONES[:40000], rate=8000)
    whole = soundfile.read(io.BytesIO(content), dtype="float32")[0].astype(np.float64) * 32768
    found = SoundDecoder(None, 1.0)(content)
    assert np.abs(found - whole[(len(whole) - 8000) // 2 :][:8000]).max() < 0.6


def wave(data, *, rate=RATE, count=1, bits=16, kind=1, declared=None):
    """A WAV file with any header."""
    width = count * bits // 8
    form = struct.pack("<HHIIHH", kind, count, rate, (rate * width) % 2**32, width, bits)
    size = len(data) if declared is None else declared
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(data))
        + b"WAVEfmt \x10\0\0\0"
        + form
        + b"data"
        + struct.pack("<I", size)
        + data
    )


def flac(frames):
    """A FLAC file of 4 seconds whose header declares another number of frames."""
    content = recording("FLAC")
    return content[:21] + bytes([content[21] & 0xF0 | frames >> 32]) + struct.pack(">I", frames % 2**32) + content[26:]


CUT_OFF = [
    ("WAV", "PCM_16", "LITTLE"), ("WAV", "PCM_16", "BIG"), ("WAV", "IMA_ADPCM", "LITTLE"), ("WAVEX", "FLOAT", "LITTLE"),
    ("RF64", "PCM_16", "FILE"), ("W64", "PCM_16", "FILE"), ("AIFF", "PCM_16", "FILE"), ("AU", "PCM_16", "BIG"),
    ("AU", "PCM_16", "LITTLE"), ("CAF", "ULAW", "FILE"), ("NIST", "PCM_16", "FILE"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "subtype", "endian"), CUT_OFF)
@pytest.mark.parametrize("missing", [40, 20000])
def test_a_sound_that_was_cut_off_is_refused(kind, subtype, endian, missing):
    buffer = io.BytesIO()
    soundfile.write(buffer, NOISE, RATE, format=kind, subtype=subtype, endian=endian)
    content = buffer.getvalue()
    assert len(SoundDecoder(None, 4.0)(content)) == 4 * RATE
    with pytest.raises(DataError, match=r"it ends before the length that its header declares|file is malformed"):
        SoundDecoder(None, 4.0)(content[:-missing])


@pytest.mark.parametrize("declared", [0x7FFFF000, 0x7FFFFFFF, 2**32 - 1])
def test_a_sound_that_was_written_to_a_pipe_has_the_length_of_the_file(declared):
    samples = np.arange(RATE, dtype="<i2")
    assert np.array_equal(SoundDecoder(None, 1.0)(wave(samples.tobytes(), declared=declared)), samples)


WRONG_SOUNDS = {
    "Matlab": (recording("MAT5", "DOUBLE"), "its format is none of WAV, "),
    "header-less": (NOISE.tobytes(), "its format is none of WAV, "),
    "HTK": (recording("HTK", "PCM_16"), "its format is none of WAV, "),
    "SVX in an IFF file": (recording("SVX", "PCM_16"), "its format is none of WAV, "),
    "absurd rate": (wave(bytes(400), rate=2**31 - 1), "sample rate is 2147483647 Hz, not between 1 and 10000000"),
    "no length": (flac(0), "its header declares no length: save it anew"),
    "too long": (flac(2**36 - 1), "it ends before the length that its header declares"),
    "mono, on the scale of integers": (recording("WAV", "FLOAT", samples=32768 * NOISE), "above full scale"),
}


@pytest.mark.parametrize("kind", WRONG_SOUNDS)
@pytest.mark.parametrize("rate", [None, 8000])
def test_other_sounds_are_refused(kind, rate):
    content, message = WRONG_SOUNDS[kind]
    with pytest.raises(DataError, match=message) as error:
        SoundDecoder(rate, 1.0)(content)
    assert "\n" not in str(error.value)


def test_a_sound_is_never_completed_from_another_file(tmp_path, monkeypatch):
    """For a file without a known beginning, libsndfile looks for a resource fork in the working directory."""
    monkeypatch.chdir(tmp_path)
    soundfile.write(io.BytesIO(), NOISE, RATE, format="SD2", subtype="PCM_16")
    with pytest.raises(DataError, match="its format is none of"):
        SoundDecoder(None, 1.0)(b"hello, this is a text")


def frames():
    more = [PIL.Image.new("L", (500, 500), i) for i in range(200)]
    return saved(np.zeros((500, 500), np.uint8), "GIF", save_all=True, append_images=more)


def large_tile():
    tags = {"259": 8, "322": 40_000, "323": 40_000, "324": 194, "325": 90}
    return tiff(GREY8, data=zlib.compress(bytes(10**5)), **tags)


def texts():
    content = saved(GREY8, "PNG")
    return content[:33] + 999 * chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6))) + content[33:]


def silence():
    return recording("FLAC", samples=np.zeros(10 * 3600 * 8000, np.int16), rate=8000)


SMALL = [
    ("ImageDecoder(224)", lambda: saved(np.zeros((60_000, 1), np.uint8), "PNG")),
    ("ImageDecoder(224)", lambda: saved(np.zeros((1, 60_000), np.uint8), "PNG")),
    ("ImageDecoder(224)", lambda: saved(np.zeros((13_000, 13_000), bool), "PNG")),
    ("ImageDecoder()", frames),
    ("ImageDecoder()", large_tile),
    ("ImageDecoder()", texts),
    ("SoundDecoder(None, 1.0)", silence),
    ("SoundDecoder(44100, 1.0)", silence),
    ("SoundDecoder(None, 0.1)", lambda: wave(bytes(10**6), count=1024, bits=8, kind=6, rate=8000)),
    ("SoundDecoder(None, 1.0)", lambda: wave(bytes(400), rate=2**31 - 1)),
    ("SoundDecoder(None, 1.0)", lambda: wave(bytes(400), declared=2**32 - 1)),
]
MEASURE = """
import resource, sys
from pathlib import Path
import PIL.Image, soundfile, soxr
from diffstride.experiments.data import DataError
from diffstride.experiments.data.audio import SoundDecoder
from diffstride.experiments.data.images import ImageDecoder
PIL.Image.init()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for file, decoder in zip(sys.argv[1::2], sys.argv[2::2]):
    content, before = Path(file).read_bytes(), peak()
    try:
        eval(decoder)(content)
    except DataError:
        pass
    if peak() - before > 100:
        print(f"{file} took {peak() - before:.0f} MB")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is Linux's")
def test_small_files_take_little_memory(tmp_path):
    arguments = []
    for i, (decoder, content) in enumerate(SMALL):
        file = tmp_path / f"{i}: {decoder}"
        file.write_bytes(content())
        assert file.stat().st_size < 2e6
        arguments += [str(file), decoder]
    command = [sys.executable, "-c", MEASURE, *arguments]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout == ""
