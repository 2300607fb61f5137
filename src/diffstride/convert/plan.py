"""The plan of a conversion: the downsamplings, the groups that share a stride, and what was left alone and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from diffstride._files import atomic_write_text, read_text
from diffstride._text import one_line
from diffstride.convert import apply
from diffstride.convert.records import LengthMethod, Resize, Site
from diffstride.errors import UsageError


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """The plan of a conversion. It is shown as a table; `save` and `load` keep it as JSON."""

    model: str
    """The model's class."""
    sites: tuple[Site, ...]
    resizes: tuple[Resize, ...]
    global_poolings: tuple[str, ...]
    """Poolings of whole maps by a kernel of fixed size. They become adaptive, so that they follow the map's size."""
    options: Mapping[str, Any]
    """The options of the layers."""
    lengths: tuple[LengthMethod, ...] = ()
    """Methods of the model that compute output lengths."""
    left_alone: Mapping[str, str]
    """Reasons why other modules stay as they are, by name."""
    macs_before: int
    macs_after: int
    """With the resampling."""
    resampling_macs: int
    """The resampling alone."""
    macs_least: int
    """The multiply-accumulates at the largest strides."""
    examples: int = 1
    """The examples in a call of the model. The table shows the multiply-accumulates of one, the fields those of all."""

    def apply(self, model: nn.Module) -> None:
        """Convert a model of the same structure, in place. A failure changes nothing.

        Raises:
            UsageError: the model does not have the modules of the plan.
        """
        apply.apply(model, self)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            UsageError: the path cannot be written.
        """
        try:
            atomic_write_text(Path(path), json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"path must be a file that can be written, got {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan that `save` wrote.

        Raises:
            UsageError: the file does not exist or is not a plan.
        """
        try:
            values = json.loads(read_text(Path(path), most=2**26), object_hook=_with_tuples)
            values["sites"] = tuple(Site(**site) for site in values["sites"])
            values["resizes"] = tuple(Resize(**resize) for resize in values["resizes"])
            values["lengths"] = tuple(LengthMethod(**method) for method in values.get("lengths", ()))
            values["options"] = dict(values["options"])
            plan = cls(**values)
            repr(plan)  # fails for damaged values
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UsageError(f"path must be a plan that Plan.save wrote, got {path}: {one_line(error)}") from error
        return plan

    @property
    def groups(self) -> list[list[str]]:
        """The names of the sites that share a stride, group by group. A site may be a group of one."""
        groups: dict[int, list[str]] = {}
        for site in self.sites:
            groups.setdefault(site.group, []).append(site.key)
        return list(groups.values())

    def __repr__(self) -> str:
        return "\n".join(_lines(self))


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _tuple(value) for name, value in values.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _lines(plan: Plan) -> Iterator[str]:
    def million(macs: int) -> str:
        return f"{macs / plan.examples / 1e6:.2f} M"

    rows = [("site", "was", "becomes", "stride", "group", "input", "before", "after", "MACs before", "after")]
    several = [group for group in plan.groups if len(group) > 1]
    for site in plan.sites:
        rows.append(
            (
                site.key or "(the model)",
                site.kind,
                _new_kind(site),
                _by(site.stride) + (" shared" if site.shared else ""),
                next((str(i + 1) for i, group in enumerate(several) if site.key in group), ""),
                _by(site.input_size),
                _by(site.size_before),
                _by(site.size_after),
                million(site.macs_before),
                million(site.macs_after),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    factor = f", {plan.macs_after / plan.macs_before:.3f} of the original" if plan.macs_before else ""
    yield (
        f"{plan.model}: {million(plan.macs_before)} MACs per example before, {million(plan.macs_after)} after{factor}; "
        f"{million(plan.resampling_macs)} of them resample"
    )
    if plan.macs_before:
        yield f"the largest strides leave {plan.macs_least / plan.macs_before:.3f} of the original MACs"
    if not all(site.kept for site in plan.sites):
        yield "a trained model does not keep its function: ds.insert keeps it"
    for resize in plan.resizes:
        if resize.size:
            size = " x ".join("any" if n is None else str(n) for n in resize.size)
            yield f"{resize.name} ({resize.kind}): resized to {size}, which later modules need"
            continue
        change = "resized" if resize.kept or "Transpose" in resize.kind else "spectral_resize"
        yield f"{resize.name} ({resize.kind}): {change} to the output size of {resize.source}, which it meets"
    for name in plan.global_poolings:
        yield f"{name}: global, no stride; it becomes adaptive and follows the map's size"
    for method in plan.lengths:
        name = f"{method.module or plan.model}.{method.method}"
        if method.layers:
            yield f"{name}: returns the frames behind {method.layers[-1]} by its learned strides"
        else:
            yield (
                f"warning: {name} computes lengths by fixed strides: masks of padded batches may not fit learned ones"
            )
    by_reason: dict[str, list[str]] = {}
    for name, reason in plan.left_alone.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        yield f"left alone: {', '.join(names)}: {reason}"


def _new_kind(site: Site) -> str:
    if site.kept:
        return f"{'followed' if site.placement == 'after' else 'preceded'} by DiffStride{len(site.stride)}d"
    parts = "stride 1", f"DiffStride{len(site.stride)}d"
    return "DiffStrideConv" if site.fused else ", ".join(parts if site.placement == "after" else reversed(parts))


def _by(sizes: Iterable[float]) -> str:
    return "x".join(f"{n:g}" for n in sizes)
