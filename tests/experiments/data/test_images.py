"""Images: pixels are those that PIL reads, upright, in 8-bit RGB on one scale, and decoding takes little memory."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import torch

from tests.helpers.datasets import encoded, epoch, image_set, picture, pixels_of, ready, write

pytest.importorskip("datasets")

from diffstride.experiments.data import Augment, DataError, ImageData
from diffstride.experiments.data.images import ImageDecoder

pytestmark = pytest.mark.usefixtures("cache")
GREY16 = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
GREY12 = np.arange(2**12, dtype=np.uint16).reshape(64, 64)
GREY8 = np.arange(2**8, dtype=np.uint8).reshape(16, 16)
BLACK_TO_WHITE = GREY16 / 65535 * 255
OPAQUE = np.full_like(GREY16, 65535)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    contents = [encoded(picture(i, mode=mode), kind) for i in range(4)]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", contents, [0, 1, 2, 0])
    assert torch.equal(ready(tmp_path).train_set[0], torch.stack([pixels_of(content) for content in contents]))


def test_resized_crop_sets_the_sample_shape(tmp_path):
    data = ready(image_set(tmp_path).path, augment=Augment(resized_crop=6))
    batch = epoch(data)[0]
    assert data.sample_shape == (3, 6, 6)
    assert data.prepare_batch(batch, step=0)[0].shape == data.prepare_batch(batch)[0].shape == (4, 3, 6, 6)


def test_evaluation_normalises_by_the_statistics_of_the_train_split(tmp_path):
    folder = image_set(tmp_path)
    data = ready(folder.path)
    raw = torch.stack([pixels_of(content) for content in folder.train]).double() / 255
    inputs, labels = data.prepare_batch(data.test_set)
    mean, std = raw.mean((0, 2, 3), keepdim=True), raw.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(inputs.double(), (data.test_set[0].double() / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    assert inputs.dtype == torch.float32
    assert labels is data.test_set[1]
    given = ready(folder.path, std=(0.2, 0.5, 1.0))
    inputs, _ = given.prepare_batch(given.test_set)
    std = torch.tensor([0.2, 0.5, 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(inputs.double(), (given.test_set[0].double() / 255 - mean) / std, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 9])
def test_statistics_are_those_of_numpy(size):
    decoded = torch.randint(256, (300, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    decoded[:, 1] = 200
    decoded[0, 1, 0, 0] = 201
    decoded[:, 2] //= 100
    mean, std = ImageData("none").statistics(None, decoded)
    pixels = decoded.double().numpy() / 255
    np.testing.assert_array_equal(mean, pixels.mean((0, 2, 3)).astype(np.float32))
    expected = np.maximum(pixels.std((0, 2, 3), ddof=1), 1 / 255)  # constant channels are not divided by zero
    np.testing.assert_allclose(std, expected.astype(np.float32), rtol=2e-7)


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


def tiff(pixels, order="<", *, bits=None, photometric=1, sample_format=1, planes=1, data=None):
    """A TIFF file of grey samples; photometric 0 is white at zero; sample formats are unsigned, signed, float."""
    height, width = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes() if data is None else data
    tags = {256: width, 257: height, 258: bits or 8 * pixels.itemsize, 259: 1, 262: photometric, 273: 0, 277: 1}
    tags |= {278: height, 279: len(data), 284: planes, 339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    start = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    return start + entries + bytes(4) + data


def channels(*samples):
    return np.stack(samples, -1)


SCALED = {
    "png": (png(GREY16), BLACK_TO_WHITE),
    "png, alpha": (png(channels(GREY16, OPAQUE), 4), BLACK_TO_WHITE),
    "png, rgb": (png(channels(GREY16, GREY16, GREY16), 2), BLACK_TO_WHITE),
    "png, 1 bit": (saved(GREY8 > 99, "PNG"), (GREY8 > 99) * 255),
    "tiff": (tiff(GREY16), BLACK_TO_WHITE),
    "tiff, big-endian": (tiff(GREY16, ">"), BLACK_TO_WHITE),
    "tiff, lzw": (saved(GREY16, "TIFF", compression="tiff_lzw"), BLACK_TO_WHITE),
    "tiff, 8 bits": (tiff(GREY8), GREY8),
    "tiff, 8 bits, white is zero": (tiff(GREY8, photometric=0), 255 - GREY8.astype(int)),
    "pgm": (b"P5 256 256 65535\n" + GREY16.astype(">u2").tobytes(), BLACK_TO_WHITE),
    "pgm, 4095": (b"P5 64 64 4095\n" + GREY12.astype(">u2").tobytes(), GREY12 / 4095 * 255),
    "jpeg 2000": (saved(GREY16, "JPEG2000"), BLACK_TO_WHITE),
}
REFUSED = {
    "tiff, float": tiff((GREY16 / 65535).astype(np.float32), sample_format=3),
    "tiff, 32 bits": tiff(GREY16.astype(np.uint32) * 65537),
    "tiff, 16 bits, signed": tiff(GREY16, sample_format=2),
    "tiff, 16 bits, white is zero": tiff(GREY16, photometric=0),
    "tiff, 12 bits": tiff(GREY12, bits=12, data=bytes(64 * 96)),
    "tiff, separate planes": tiff(GREY8, planes=2),
    "pfm": b"Pf\n256 256\n-1.0\n" + (GREY16 / 65535).astype("<f4").tobytes(),
    "icon": saved(GREY8, "ICO"),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "text": b"not an image",
    "truncated": saved(GREY16, "PNG")[:300],
    "bomb": saved(np.zeros((11_000, 11_000), bool), "PNG"),
}


@pytest.mark.parametrize("kind", SCALED)
def test_images_of_all_widths_have_one_scale(kind):
    content, expected = SCALED[kind]
    for channel in ImageDecoder()(content).astype(float):
        assert np.abs(channel - expected).max() < 1  # Pillow itself drops the lower byte of coloured samples


@pytest.mark.parametrize("kind", REFUSED)
def test_images_that_would_be_decoded_wrongly_are_refused(kind):
    with pytest.raises(DataError) as error:
        ImageDecoder()(REFUSED[kind])
    assert "\n" not in str(error.value)


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


def test_a_strip_is_never_resized_as_a_whole():
    """It would have nine gigabytes."""
    assert ImageDecoder(224)(saved(np.zeros((60_000, 1), np.uint8), "PNG")).shape == (3, 224, 224)
