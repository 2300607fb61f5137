"""Measure the parts of a training step (data, forward, backward, update) and the share of learned strides.

python benchmarks/time_steps.py --out results/steps-cpu.json
python benchmarks/time_steps.py --device cuda --out results/steps-cuda.json

Networks that differ in their downsampling alone take turns, step by step. Each part ends when the device is idle, so
that the parts sum to more than a whole step, in which the host works ahead of the device.
"""

import copy
import io
import json
import random
import statistics
import time
from collections import defaultdict
from contextlib import nullcontext

import numpy as np
import torch
from command_line import Parser, at_least, output
from PIL import Image
from torch import nn
from torch.nn import functional as F

import diffstride as ds
from diffstride.experiments.benchmark.measure import WARMUP, Candidate, alternate, peak_bytes, ratios, synchronise
from diffstride.experiments.benchmark.suites import layer_step
from diffstride.experiments.data.augment import Augment
from diffstride.experiments.data.base import ClassificationData
from diffstride.experiments.data.images import ImageDecoder
from diffstride.experiments.models import ResNet
from diffstride.experiments.provenance import provenance
from diffstride.nn.strides import all_layers

# The networks, images and precisions of configs/, at the strides that they start from.
CASES = {
    "cifar10-small": {
        "network": {"depth": 18, "width": 0.25, "preactivation": True, "strides": [2, 2, 2], "num_classes": 10},
        "smoothness": 1, "batch": 128, "size": 32, "augment": {"pad_crop": 4, "flip": True}, "dtype": "float32",
    },
    "cifar10": {
        "network": {"depth": 18, "preactivation": True, "strides": [1, 1, 2, 2, 2], "num_classes": 10},
        "smoothness": 4, "batch": 128, "size": 32, "augment": {"pad_crop": 4, "flip": True, "mixup": 0.2},
        "dtype": "float32",
    },
    "imagenet": {
        "network": {"depth": 50, "stem": "imagenet", "strides": [2, 2, 2], "num_classes": 1000},
        "smoothness": 4, "batch": 256, "size": 256, "augment": {"resized_crop": 224, "flip": True},
        "dtype": "bfloat16",
    },
}  # fmt: skip
WAYS = {
    "strided convolutions": ("conv", {}),
    "DiffStride": ("diffstride", {}),
    "DiffStride, inner window": ("diffstride", {"window": "inner"}),
    "DiffStride, strides held": ("diffstride", {}),
}


class Images(ClassificationData):
    """Random pixels with the augmentation of a data set."""

    def __init__(self, case: dict) -> None:
        super().__init__(batch_size=case["batch"])
        self.num_classes, self.settings = case["network"]["num_classes"], Augment(**case["augment"])
        self.mean, self.std = torch.full((3,), 0.45), torch.full((3,), 0.25)
        shape = (case["batch"], 3, case["size"], case["size"])
        pin = torch.cuda.is_available()
        self.pixels = torch.randint(256, shape, dtype=torch.uint8, pin_memory=pin)
        self.labels = torch.randint(self.num_classes, (case["batch"],), pin_memory=pin)

    def augment(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.settings(inputs, labels, self.num_classes)


class Training:
    """A network and its training steps."""

    def __init__(self, way: str, case: dict, data: Images, device: torch.device) -> None:
        downsample, options = WAYS[way]
        options = {"smoothness": case["smoothness"], **options}
        network = ResNet(**case["network"], downsample=downsample, downsample_options=options)
        self.network = network.to(device, memory_format=torch.channels_last)
        self.held = way.endswith("held")
        if self.held:
            for _, layer in all_layers(network):
                layer.stride.requires_grad_(False)
        groups = ds.param_groups(network, lr=1e-3, weight_decay=5e-4)
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        self.data, self.device, self.dtype = data, device, getattr(torch, case["dtype"])
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def step(self, done=lambda part: None) -> None:
        batch = [t.to(self.device, non_blocking=True) for t in (self.data.pixels, self.data.labels)]
        done("transfer")
        images, targets = self.data.prepare_batch(batch, step=1)
        images = images.contiguous(memory_format=torch.channels_last)
        done("augmentation")
        with self.autocast():
            loss = F.cross_entropy(self.network(images), targets)
        done("forward")
        loss.backward()
        done("backward")
        self.optimizer.step()
        ds.clamp_strides_(self.network)
        self.optimizer.zero_grad()
        done("update")

    def autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def step_by_parts(self) -> None:
        synchronise(self.device)
        last = time.perf_counter()

        def done(part: str) -> None:
            nonlocal last
            synchronise(self.device)
            now = time.perf_counter()
            self.seconds[part].append(now - last)
            last = now

        self.step(done)

    def candidate(self, step) -> Candidate:
        """Return a candidate whose strides move before each step and keep their first sizes."""
        return Candidate(step, None if self.held else self.network)

    def layers(self) -> dict[str, Candidate]:
        """Return each layer alone, on an input of the size that it has in the network."""
        found: dict[str, Candidate] = {}
        handles = []
        for name, layer in all_layers(self.network):

            def keep(module, inputs, name=name):
                layer = InAutocast(copy.deepcopy(module), self.autocast)
                found[name] = layer_step(layer, torch.randn_like(inputs[0]).requires_grad_())

            handles.append(layer.register_forward_pre_hook(keep))
        images, _ = self.data.prepare_batch(
            (self.data.pixels.to(self.device), self.data.labels.to(self.device)), step=1
        )
        with torch.no_grad(), self.autocast():
            self.network(images.contiguous(memory_format=torch.channels_last))
        for handle in handles:
            handle.remove()
        return {} if self.held else found


class InAutocast(nn.Module):
    """A layer under the autocast of its network."""

    def __init__(self, layer, autocast) -> None:
        super().__init__()
        self.layer, self.autocast = layer, autocast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.layer(x)


def decoding(seconds: float) -> dict:
    """Return the rate at which one core decodes JPEG files of ImageNet's usual size and spectrum."""
    generator = np.random.default_rng(0)
    height, width = 375, 500
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    files = []
    for _ in range(8):
        spectrum = np.fft.rfft2(generator.standard_normal((3, height, width))) / np.maximum(frequencies, 1 / width)
        photo = np.fft.irfft2(spectrum, s=(height, width))
        photo = (128 + 50 * photo / photo.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(photo).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    decode = ImageDecoder(256)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        decode(files[count % len(files)])
        count += 1
    rate = count / (time.perf_counter() - start)
    size = statistics.mean(map(len, files)) / 1e3
    return {"images_per_second_and_core": rate, "file_kb": size, "pixels": [height, width], "to": 256}


def measure(name: str, case: dict, device: torch.device, repeats: int) -> list[dict]:
    torch.manual_seed(0)
    data = Images(case)
    trainings = {way: Training(way, case, data, device) for way in WAYS}
    rng = random.Random(0)
    alone = {way: training.layers() for way, training in trainings.items()}
    whole = alternate({way: t.candidate(t.step) for way, t in trainings.items()}, repeats, rng, device=device)
    alternate({way: t.candidate(t.step_by_parts) for way, t in trainings.items()}, repeats, rng)
    rows = []
    for way, training in trainings.items():
        layers = alternate(alone[way], repeats, rng, device=device)
        row = ratios(whole[way], whole["strided convolutions"])
        step_ms = row.pop("ms")
        rows.append({
            "case": name, "network": way, "step_ms": step_ms, "images_per_second": 1e3 * case["batch"] / step_ms, **row,
            "parts_ms": {part: 1e3 * statistics.median(s[WARMUP:]) for part, s in training.seconds.items()},
            "layers_ms": {layer: 1e3 * statistics.median(s) for layer, s in layers.items()},
            "strides": ds.strides(training.network), "peak_mb": peak_bytes(training.step, device) / 2**20,
            "parameters": sum(p.numel() for p in training.network.parameters()),
        })  # fmt: skip
        print(f"{name}, {way}: {step_ms:.1f} ms, {row['ratio']:.2f}", flush=True)
    return rows


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=output, required=True, help="JSON file to write")
    parser.add_argument("--device", type=torch.device, default="cpu", help="default: cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: cifar10-small on a CPU, all on a GPU")
    parser.add_argument("--repeats", type=at_least(2), default=20, help="rounds (default: 20)")
    options = parser.parse_args()
    chosen = options.cases or (["cifar10-small"] if options.device.type == "cpu" else list(CASES))
    rows = [row for name in chosen for row in measure(name, CASES[name], options.device, options.repeats)]
    facts = {
        "command": f"python benchmarks/time_steps.py --device {options.device}", "repeats": options.repeats,
        "threads": torch.get_num_threads(), "cases": {name: CASES[name] for name in chosen},
    }  # fmt: skip
    options.out.write_text(
        json.dumps({**provenance(options.device), **facts, "decoding": decoding(5), "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
