"""Try `ds.convert` and `ds.insert` on architectures of timm, torchvision and segmentation_models_pytorch.

These packages are no requirements of the project: install those to be tried beside it. Each architecture has a process
of its own, random weights and images of 128 pixels, or the size that a model asks for.

    python tools/architectures.py results/architectures.json [NAME ...]
    python tools/architectures.py results/architectures.json --page docs/results/architectures.md
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import diffstride as ds

Built = tuple[nn.Module, Any]

TIMM = {
    "classifier": """
        resnet18 resnet26d resnet50_gn seresnet18 resnext26ts ecaresnet26t resnetaa50 resnetblur18 res2net50_14w_8s
        skresnet18 cspresnet50 cspdarknet53 darknet17 densenet121 dla34 dla60_res2net dpn48b regnetx_002 regnety_002
        rexnet_100 efficientnet_b0 efficientnet_lite0 tf_efficientnetv2_b0 mixnet_s mobilenetv2_050
        mobilenetv3_small_050 mobilenetv3_large_100 mobilenetv4_conv_small tf_mobilenetv3_small_minimal_100
        mnasnet_small fbnetc_100 spnasnet_100 ghostnet_100 ghostnetv2_100 hardcorenas_a hgnetv2_b0 lcnet_050
        tinynet_e vgg11 xception41 inception_v3 inception_v4 nf_resnet26 repvgg_a0 repghostnet_050 selecsls42
        tresnet_m vovnet39a ese_vovnet19b_dw gernet_s halonet26t botnet26t_256 hrnet_w18_small convnext_atto
        convnextv2_atto fasternet_t0 edgenext_xx_small starnet_s1 inception_next_atto resnetv2_50
    """,
    "hybrid": """
        coatnet_nano_rw_224 maxvit_tiny_tf_224 mobilevit_xxs mobilevitv2_050 efficientformer_l1 efficientvit_b0
        efficientvit_m0 fastvit_t8 levit_128s poolformer_s12 poolformerv2_s12 pvt_v2_b0 repvit_m0_9
        swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 twins_svt_small visformer_tiny xcit_nano_12_p16_224
        crossvit_tiny_240 convit_tiny convmixer_768_32 nest_tiny sequencer2d_s davit_tiny focalnet_tiny_srf
        hiera_tiny_224 mambaout_femto caformer_s18 coat_lite_tiny vit_tiny_patch16_224 mixer_s32_224
    """,
}
TORCHVISION = {
    "classifier": """
        alexnet vgg16 resnet34 densenet169 googlenet inception_v3 mobilenet_v2 mobilenet_v3_large mnasnet1_0
        efficientnet_b1 efficientnet_v2_s regnet_y_400mf regnet_x_800mf shufflenet_v2_x1_0 squeezenet1_1
        convnext_tiny resnext50_32x4d
    """,
    "hybrid": "swin_t swin_v2_t maxvit_t vit_b_16",
    "dense": """
        segmentation.fcn_resnet50 segmentation.deeplabv3_mobilenet_v3_large segmentation.lraspp_mobilenet_v3_large
        video.r3d_18 video.mc3_18 video.r2plus1d_18 optical_flow.raft_small
    """,
}
SMP = "Unet UnetPlusPlus FPN PSPNet Linknet MAnet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer"
SMP_ENCODERS = ("resnet18", "mobilenet_v2", "efficientnet-b0")


def names() -> Iterator[tuple[str, str]]:
    """Yield the names of all architectures and their kinds."""
    for package, kinds in (("timm", TIMM), ("torchvision", TORCHVISION)):
        for kind, listed in kinds.items():
            yield from ((f"{package}/{name}", kind) for name in listed.split())
    for decoder in SMP.split():
        encoders = SMP_ENCODERS if decoder in ("Unet", "FPN") else SMP_ENCODERS[:1]
        yield from ((f"smp/{decoder}-{encoder}", "dense") for encoder in encoders)


def build(name: str) -> Built:
    """Return the model with random weights, and an example input."""
    package, _, rest = name.partition("/")
    if package == "timm":
        import timm

        fixed = timm.get_pretrained_cfg(rest)
        smallest = ((fixed and fixed.min_input_size) or [0])[-1]
        size = fixed.input_size[-1] if fixed and fixed.fixed_input_size else max(128, smallest)
        return timm.create_model(rest, num_classes=10), torch.randn(1, 3, size, size)
    if package == "torchvision":
        import torchvision

        *path, function = rest.split(".")
        options: dict[str, Any] = {"weights": None}
        module: Any = torchvision.models
        for part in path:
            module = getattr(module, part)
            options |= {"weights_backbone": None} if part == "segmentation" else {}
        if rest in ("googlenet", "inception_v3"):
            options |= {"init_weights": False, "aux_logits": False}
        model = getattr(module, function)(**options)
        if path == ["video"]:
            return model, torch.randn(1, 3, 8, 64, 64)
        if path == ["optical_flow"]:
            return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
        return model, torch.randn(1, 3, *(2 * [224 if rest in ("maxvit_t", "vit_b_16") else 128]))
    import segmentation_models_pytorch as smp

    decoder, _, encoder = rest.partition("-")
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=3), torch.randn(1, 3, 128, 128)


def trial(name: str) -> dict[str, Any]:
    """Convert an architecture and insert layers into it, and check both."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, example = build(name)
    model.eval()
    for weight in model.parameters():  # some heads start at 0, and pass no gradient
        if weight.ndim > 1 and not weight.any():
            nn.init.normal_(weight, std=0.02)
    inputs = example if isinstance(example, tuple) else (example,)
    found: dict[str, Any] = {"input": [list(x.shape) for x in inputs]}
    found["convert"] = _attempt(lambda: _convert(model, inputs))
    found["insert"] = _attempt(lambda: _insert(model, inputs))
    return found


def _attempt(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        result = check()
    except Exception as error:  # an architecture that fails must not end the others
        result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:1500]}
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def _convert(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    plan = ds.plan(model, inputs, upsample=True)
    before = ds.plan(model, inputs, upsample=True, placement="before")
    result = _described(plan)
    result |= {f"{key}_before": value for key, value in _described(before).items() if key in ("macs", "resampling")}
    model = copy.deepcopy(model)
    expected = [output.shape for output in _outputs(model, inputs)]
    plan.apply(model)
    assert [output.shape for output in _outputs(model, inputs)] == expected, "outputs have other shapes"
    return result | _checked(model, inputs)


def _insert(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    model = copy.deepcopy(model)
    expected = _outputs(model, inputs)
    plan = ds.insert(model, inputs)
    error = max(_error(y, z) for y, z in zip(_outputs(model, inputs), expected, strict=True))
    assert error < 1e-2, f"outputs differ by {error:.1e}"
    return _described(plan) | {"difference": error} | _checked(model, inputs)


def _described(plan: ds.Plan) -> dict[str, Any]:
    return {
        "sites": len(plan.sites),
        "groups": len(plan.groups),
        "macs": (plan.macs_after - plan.resampling_macs) / plan.macs_before,
        "resampling": plan.resampling_macs / plan.macs_before,
        "left_alone": dict(plan.left_alone),
        "multiples": sorted({site.size_multiple for site in plan.sites}),
    }


def _checked(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Check that every stride has a gradient, that the model runs at others, and that its frozen copy agrees."""
    strides = {name: stride for name, stride in model.named_parameters() if name.endswith("stride")}
    with torch.no_grad():
        for stride in strides.values():
            stride.mul_(1.1)
    model.train()
    for module in model.modules():  # with 1 sample per channel and random weights
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    sum(
        output.square().mean() for output in _outputs(model, inputs, grad=True) if output.is_floating_point()
    ).backward()
    dead = [name for name, stride in strides.items() if stride.grad is None or not stride.grad.abs().sum() > 0]
    assert len(dead) < len(strides), "no stride has a gradient"
    model.eval()
    frozen = ds.freeze(model, inputs)
    error = max(_error(y, z) for y, z in zip(_outputs(frozen, inputs), _outputs(model, inputs), strict=True))
    assert error < 1e-3, f"the frozen model differs by {error:.1e}"
    return {"passed": True, "without_gradient": dead, "frozen_error": error}


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...], grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        return [leaf for leaf in pytree.tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


PAGE = """# Architectures

`ds.convert` and `ds.insert` were tried once on {count} architectures of timm {timm}, torchvision {torchvision} and
segmentation_models_pytorch {segmentation_models_pytorch}, with random weights and images of 128 pixels (or the size
that a model asks for). None of them is part of the tests. A model passes if its outputs keep their shapes, a stride
has a gradient, it runs at strides 1.1 times as large, and its frozen copy gives the same outputs there to 1e-3. An
inserted model must also give the original's outputs to 1e-2. The largest difference was {error}.

|  | architectures | converted | inserted |
|---|---|---|---|
{summary}

MACs are those of the converted model at its initial strides over the original's, resampling included; *after* and
*before* are the options of `placement`. The part of the resampling is shown beside: on thin networks, such as the
MobileNets, it takes more than the convolutions. *Left alone* are modules that keep their strides, with the first
reason. Not all strides have a gradient in every model with random weights; those models are marked with *.

{table}

Made at {commits}, with torch {torch}, {hardware}.
`{command}` wrote `results/architectures.json` and, with `--page`, this page.
"""
KINDS = {
    "classifier": "convolutional classifiers",
    "hybrid": "with attention, or other mixing of tokens",
    "dense": "segmentation, video, flow",
}


def page(results: dict[str, Any]) -> str:
    """Return the results as a page."""
    found = results["architectures"]
    head = (
        "architecture",
        "convert: sites (strides)",
        "MACs after",
        "before",
        "of them resampling, after",
        "before",
        "left alone",
    )
    rows = [f"| {' | '.join((*head, 'insert: strides'))} |", "|---|---|---|---|---|---|---|---|"]
    for name, trials in found.items():
        convert, insert = trials["convert"], trials["insert"]
        if not convert["passed"]:
            cells = ["no: " + _short(convert["error"]), "", "", "", "", ""]
        else:
            star = "*" if convert["without_gradient"] else ""
            left = convert["left_alone"]
            cells = [f"{convert['sites']} ({convert['groups']}){star}"]
            own, resampling = ([convert[key + way] for way in ("", "_before")] for key in ("macs", "resampling"))
            cells += [f"{a + b:.2f}" for a, b in zip(own, resampling, strict=True)]
            cells += [f"{b:.2f}" for b in resampling]
            cells.append(f"{len(left)}: {_short(next(iter(left.values())))}" if left else "")
        inserted = str(insert["groups"]) if insert["passed"] else "no: " + _short(insert["error"])
        rows.append("| " + " | ".join([name, *cells, inserted]) + " |")
    summary = []
    for kind, label in [*KINDS.items(), ("", "all")]:
        chosen = [trials for trials in found.values() if kind in ("", trials["kind"])]
        passed = (sum(trials[way]["passed"] for trials in chosen) for way in ("convert", "insert"))
        shares = " | ".join(f"{count} ({count / len(chosen):.0%})" for count in passed)
        summary.append(f"| {label} | {len(chosen)} | {shares} |")
    commits = {trials["commit"] for trials in found.values()}
    errors = [trials["insert"]["difference"] for trials in found.values() if trials["insert"]["passed"]]
    return PAGE.format(
        count=len(found), error=f"{max(errors):.0e}", summary="\n".join(summary), table="\n".join(rows),
        commits=", ".join(sorted(commits)), torch=results["versions"]["torch"], hardware=results["hardware"],
        command=results["command"], **results["packages"],
    )  # fmt: skip


def _short(text: str) -> str:
    text = text.replace("|", "/").removeprefix("UsageError: ")
    return text if len(text) <= 90 else text[:87] + "..."


def _in_process(name: str, path: Path) -> None:
    torch.set_num_threads(1)
    path.write_text(json.dumps(trial(name)))


def main() -> None:
    """Try what the results file does not have yet, and write it after each architecture."""
    from diffstride.experiments.provenance import provenance

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("names", nargs="*", help="architectures to try again; none: those that are missing")
    parser.add_argument("--seconds", type=float, default=600, help="limit for each")
    parser.add_argument("--page", type=Path, help="write the results as a page and try nothing")
    options = parser.parse_args()
    if options.page:
        options.page.write_text(page(json.loads(options.results.read_text())))
        return
    results = json.loads(options.results.read_text()) if options.results.exists() else {"architectures": {}}
    packages = {p: importlib.metadata.version(p) for p in ("timm", "torchvision", "segmentation_models_pytorch")}
    results = {**provenance(torch.device("cpu")), "command": "python tools/architectures.py results/architectures.json",
               "packages": packages, "architectures": results["architectures"]}  # fmt: skip
    part = options.results.with_suffix(".part")
    for name, kind in names():
        if name not in options.names if options.names else name in results["architectures"]:
            continue
        process = multiprocessing.get_context("spawn").Process(target=_in_process, args=(name, part))
        part.unlink(missing_ok=True)
        process.start()
        process.join(options.seconds)
        process.kill()
        process.join()
        lost = {"passed": False, "error": "the process ended, or ran out of time"}
        found = json.loads(part.read_text()) if part.exists() else {"convert": lost, "insert": lost}
        results["architectures"][name] = {"kind": kind, "commit": results["commit"], **found}
        options.results.write_text(json.dumps(results, indent=1) + "\n")
        words = [f"{way} {'passed' if found[way]['passed'] else found[way]['error']}" for way in ("convert", "insert")]
        print(name, *words, sep="\n  ", flush=True)
    part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
