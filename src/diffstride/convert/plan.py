"""The plan of a conversion: which downsamplings, which of them share a stride, and what was left alone and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from diffstride._files import atomic_write_text, read_text
from diffstride._text import one_line
from diffstride.convert import apply
from diffstride.convert.lengths import LengthMethod
from diffstride.convert.records import Edits, Resize, Site
from diffstride.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Plan(Edits):
    """The plan of a conversion. Printing shows it as a table; `save` and `load` keep it as JSON."""

    left_alone: Mapping[str, str]
    """Why other modules stay as they are, by name."""
    macs_before: int
    macs_after: int
    resampling_macs: int

    def apply(self, model: nn.Module) -> None:
        """Carry it out on a model of the same structure, in place; nothing is changed if that fails.

        Raises:
            UsageError: a model that has not the modules of the plan.
        """
        apply.apply(model, self)

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Raises:
            UsageError: a path that cannot be written.
        """
        try:
            atomic_write_text(Path(path), json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"path must be a file that can be written, got {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UsageError: a file that is not there, or is something else.
        """
        try:
            values = json.loads(read_text(Path(path), most=2**26))
            values["sites"] = tuple(Site(**{k: _tuple(v) for k, v in site.items()}) for site in values["sites"])
            values["resizes"] = tuple(Resize(**resize) for resize in values["resizes"])
            values["lengths"] = tuple(
                LengthMethod(**{k: _tuple(v) for k, v in method.items()}) for method in values.get("lengths", ())
            )
            values["options"] = {k: _tuple(v) for k, v in values["options"].items()}
            plan = cls(**{k: _tuple(v) for k, v in values.items()})
            str(plan)  # a damaged one has what cannot be shown
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UsageError(f"path must be a plan that Plan.save wrote, got {path}: {one_line(error)}") from error
        return plan

    @property
    def groups(self) -> list[list[str]]:
        """The names of the sites that share a stride, by group; those alone are groups of one."""
        groups: dict[int, list[str]] = {}
        for site in self.sites:
            groups.setdefault(site.group, []).append(site.name)
        return list(groups.values())

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _lines(plan: Plan) -> Iterator[str]:
    head = ("site", "was", "becomes", "stride", "group", "input", "before", "after", "MACs before", "after")
    rows = [head]
    several = [g for g in plan.groups if len(g) > 1]
    for site in plan.sites:
        group = next((str(i + 1) for i, g in enumerate(several) if site.name in g), "")
        rows.append(
            (
                site.name or "(the model)",
                site.kind,
                "DiffStrideConv" if site.fused else f"stride 1, DiffStride{len(site.stride)}d",
                _by(site.stride) + (" shared" if site.shared else ""),
                group,
                _by(site.input_size),
                _by(site.size_before),
                _by(site.size_after),
                f"{site.macs_before / 1e6:.2f} M",
                f"{site.macs_after / 1e6:.2f} M",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    factor = f", {plan.macs_after / plan.macs_before:.3f} of the original" if plan.macs_before else ""
    yield (
        f"{plan.model}: {plan.macs_before / 1e6:.2f} M MACs before, {plan.macs_after / 1e6:.2f} M after{factor}, on "
        f"the example inputs; resampling takes {plan.resampling_macs / 1e6:.2f} M more"
    )
    for resize in plan.resizes:
        what = "resized" if "Transpose" in resize.kind else "spectral_resize"
        yield f"{resize.name} ({resize.kind}): {what} to the size of what {resize.source} returns, which it meets"
    for name in plan.global_poolings:
        yield f"{name}: global, no stride; it follows the map's size from now on, adaptively"
    for method in plan.lengths:
        name = f"{method.module or plan.model}.{method.method}"
        if method.layers:
            yield f"{name}: gives the frames behind {method.layers[-1]} by its learned strides"
        else:
            yield (
                f"warning: {name} computes lengths by fixed strides: masks of padded batches may not fit learned ones"
            )
    by_reason: dict[str, list[str]] = {}
    for name, reason in plan.left_alone.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        yield f"left alone: {', '.join(names)}: {reason}"


def _by(sizes: Iterable[float]) -> str:
    return "x".join(f"{n:g}" for n in sizes)


def patterns(name: str, value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """One pattern or several, as given to `include` and `exclude`."""
    if value is None or isinstance(value, str):
        return None if value is None else (value,)
    if not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"{name} must be a pattern or a list of patterns on module names, got {value!r}")
    return tuple(value)
