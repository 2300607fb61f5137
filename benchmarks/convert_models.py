"""Plan the conversion of well-known networks at their full size, and write the plans with their provenance.

python benchmarks/convert_models.py --out results/convert.json
"""

import json
import time
from importlib.metadata import version

import torch
import transformers
from command_line import Parser, output

import diffstride as ds
from diffstride.experiments.provenance import provenance

IMAGES = {
    "ResNet-50": (transformers.ResNetConfig(), transformers.ResNetForImageClassification),
    "ConvNeXt-T": (transformers.ConvNextConfig(), transformers.ConvNextForImageClassification),
    "ConvNeXtV2-T": (transformers.ConvNextV2Config(), transformers.ConvNextV2ForImageClassification),
    "RegNetY-4GF": (transformers.RegNetConfig(), transformers.RegNetForImageClassification),
    "MobileNetV1": (transformers.MobileNetV1Config(), transformers.MobileNetV1ForImageClassification),
    "MobileNetV2": (transformers.MobileNetV2Config(), transformers.MobileNetV2ForImageClassification),
    "EfficientNet-B0": (
        transformers.EfficientNetConfig(
            image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, dropout_rate=0.2
        ),
        transformers.EfficientNetForImageClassification,
    ),
    "Swin-T": (transformers.SwinConfig(), transformers.SwinForImageClassification),
}
SOUNDS = {"wav2vec 2.0 base": (transformers.Wav2Vec2Config(), transformers.Wav2Vec2Model)}


def build(config, model_class):
    with torch.device("meta"):
        model = model_class(config)
    return model.to_empty(device="cpu")  # weights do not matter


def table(report) -> str:
    """Return the table of docs/guides/your-own-model.md."""
    lines = [
        "| model | sites (groups that share) | left alone | million MACs before | after | ratio | of them resampling |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        groups = f" ({len(row['shared'])})" if row["shared"] else ""
        before, after, more = (row[key] / 1e6 for key in ("macs_before", "macs_after", "resampling_macs"))
        lines.append(
            f"| {row['model']} | {row['sites']}{groups} | {len(row['left_alone'])} | {before:,.0f} | {after:,.0f} "
            f"| {after / before:.3f} | {more:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=output, required=True, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(name, given, {"pixel_values": torch.zeros(1, 3, 224, 224)}) for name, given in IMAGES.items()]
    cases += [(name, given, torch.zeros(1, 16000)) for name, given in SOUNDS.items()]
    rows = []
    for name, given, inputs in cases:
        model = build(*given)
        start = time.perf_counter()
        plan = ds.plan(model, inputs)
        rows.append(
            {
                "model": name,
                "sites": len(plan.sites),
                "shared": [group for group in plan.groups if len(group) > 1],
                "left_alone": dict(plan.left_alone),
                "macs_before": plan.macs_before,
                "macs_after": plan.macs_after,
                "resampling_macs": plan.resampling_macs,
                "sizes_kept": all(site.size_before == site.size_after for site in plan.sites),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        print(rows[-1]["model"], rows[-1]["sites"], rows[-1]["macs_after"] / rows[-1]["macs_before"], flush=True)
        print(plan, flush=True)
    report = provenance(torch.device("cpu")) | {"transformers": version("transformers"), "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
