"""First phase of a plan: the modules that could become learnable, and the reasons why others are left alone.

A module's type and options decide first (`handlers`), then the patterns `include` and `exclude`, then one run of the
model at its own sizes (`Candidates.keep_usable`). In a block with two branches,

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, stride=2, padding=1)  # candidate
            self.pool = nn.AvgPool1d(2)                          # candidate
            self.mix = nn.Conv1d(4, 4, 1)                        # stride 1: does not downsample
            self.down = nn.Conv1d(4, 8, 3, stride=2, padding=1)  # candidate
            self.spare = nn.MaxPool1d(2)                         # never called: left alone

        def forward(self, x):
            y = self.mix(self.conv(x) + self.pool(x))
            return self.down(y).mean(-1)

`conv`, `pool` and `down` remain. Which of them must agree is the question of `grouping`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn

from diffstride.convert import handlers
from diffstride.convert.handlers import Downsampling
from diffstride.convert.records import INPUT
from diffstride.errors import UsageError
from diffstride.geometry import AXIS_NAMES
from diffstride.nn.attach import Placement
from diffstride.tracing import Session

Patterns = str | Sequence[str] | None


@dataclass(kw_only=True)
class Candidates:
    """The modules that could become learnable. The later phases leave alone what turns out to be impossible."""

    modules: dict[str, nn.Module]
    """All modules of the model by name."""
    sites: dict[str, Downsampling] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    """Reasons by name."""
    global_poolings: list[str] = field(default_factory=list)
    """Poolings of whole maps by a kernel of fixed size."""
    upsamplings: set[str] = field(default_factory=set)
    """Modules that upsample by a fixed factor."""
    included: set[str] = field(default_factory=set)
    """Modules that do not downsample, whose output may shrink."""
    first_convolution: str = ""
    """The convolution that has the site `INPUT` before it."""

    def leave(self, name: str, reason: str) -> None:
        """Leave a site alone."""
        for label in AXIS_NAMES.get(self.sites.pop(name).ndim, ()):
            self.left_alone.pop(f"{name} ({label})", None)
        self.left_alone[name] = reason

    def fix(self, name: str, axes: Collection[int], reason: str) -> None:
        """Leave a site alone along some axes."""
        site = self.sites[name]
        fixed = tuple(sorted({*site.fixed_axes, *axes}))
        if len(fixed) == site.ndim:
            self.leave(name, reason)
            return
        self.sites[name] = replace(site, fixed_axes=fixed)
        for axis in set(axes) - set(site.fixed_axes):
            self.left_alone[f"{name} ({AXIS_NAMES[site.ndim][axis]})"] = reason

    def is_free(self, name: str, axis: int) -> bool:
        """Return whether the size of a module's map along an axis can change."""
        site = self.sites.get(name)
        return axis not in site.fixed_axes if site else name in self.upsamplings

    def module_name(self, key: str) -> str:
        """Return the name of a site's module."""
        return self.first_convolution if key == INPUT else key

    def ndim(self, name: str) -> int:
        """Return the number of spatial axes of a module; 0 where it is not known."""
        found = self.sites.get(name) or handlers.downsampling(self.modules[name])
        return found.ndim if found else 0

    def find_first_convolution(self, session: Session) -> None:
        """Find the convolution before which the site `INPUT` is.

        Args:
            session: a run of the model at its own sizes.
        """
        for call in session.calls:
            if isinstance(self.modules[call.module], nn.Conv1d | nn.Conv2d | nn.Conv3d):
                ndim = handlers.ndim_of(self.modules[call.module])
                self.first_convolution = call.module
                self.sites[INPUT] = replace(self.sites[INPUT], stride=(1,) * ndim)
                return
        self.leave(INPUT, "the model has no convolution")

    def keep_usable(self, session: Session) -> None:
        """Keep the sites that run and whose outputs have more than one sample.

        Poolings of whole maps become `global_poolings`. Sites of stride 1 are dropped. The others are left alone with a
        reason. So is each operation by which a module downsamples in its own code.

        Args:
            session: a run of the model at its own sizes.
        """
        shapes = {call.module: call.output for call in reversed(session.calls) if call.output is not None}
        for name, site in list(self.sites.items()):
            if name == INPUT:
                continue
            if name not in shapes:
                self.leave(name, "it does not run on the example inputs, or returns no tensor")
                continue
            if not site.stride:
                site = self.sites[name] = replace(site, stride=(1,) * (len(shapes[name]) - 2))
                if site.ndim not in handlers.LAYERS:
                    self.leave(name, "its output is not [batch, channels, ...] with 1 to 3 axes more")
                    continue
            single = all(session.value(n) == 1 for n in shapes[name][-site.ndim :])
            if single and site.is_pooling:
                del self.sites[name]
                self.global_poolings.append(name)
            elif max(site.stride) == 1 and name not in self.included:
                del self.sites[name]
            elif single:
                self.leave(name, "its output is a single sample")
        known = {*self.sites, *self.left_alone, *self.global_poolings}
        for name, operation in session.strided:
            if name not in known:
                self.left_alone[name or "(the model)"] = (
                    f"{type(self.modules[name]).__name__} downsamples in its own code ({operation}), not by a module "
                    "such as nn.MaxPool2d or nn.Conv2d"
                )

    def check_not_empty(self) -> None:
        """Raise an error that lists the reasons if no site remains."""
        if not self.sites:
            if reasons := "; ".join(f"{name}: {reason}" for name, reason in self.left_alone.items()):
                raise UsageError(f"{reasons}; the model has no other downsampling that can be converted")
            raise UsageError(
                "model must have a downsampling that can be converted (a strided convolution, a max or average "
                "pooling), got none"
            )


def find(model: nn.Module, include: Patterns, exclude: Patterns, placement: Placement) -> Candidates:
    """Return the downsamplings that could become learnable, by type and name.

    Raises:
        UsageError: a pattern matches nothing.
    """
    found = _of_types(model)
    for name, site in found.sites.items():
        if placement == "before" and handlers.takes_layer_before(found.modules[name]):
            found.sites[name] = replace(site, placement="before")
    included, excluded = _matches("include", include, found.sites), _matches("exclude", exclude, found.sites)
    for name in list(found.sites):
        if include is not None and name not in included:
            found.leave(name, "not among those to include")
        elif name in excluded:
            found.leave(name, "excluded")
    return found


def find_places(model: nn.Module, include: Patterns, exclude: Patterns) -> Candidates:
    """Return the places where layers can be inserted into a model that stays as it is.

    These are the input of the first convolution (`INPUT`), behind each downsampling, and behind the modules to include.

    Raises:
        UsageError: a pattern matches nothing.
    """
    found = _of_types(model)
    kept = {name: replace(site, kept=True) for name, site in found.sites.items()}
    found.sites = {INPUT: Downsampling(stride=(), kept=True, placement="before"), **kept}
    found.included = _matches("include", include, found.modules)
    for name in found.included:
        module = found.modules[name]
        own_loop = isinstance(module, nn.Sequential) and type(module).forward is not nn.Sequential.forward
        found.left_alone.pop(name, None)
        if own_loop:
            found.left_alone[name] = "it is an nn.Sequential with a forward of its own, which may call all its children"
        else:
            found.sites.setdefault(name, Downsampling(stride=(), kept=True))
    for name in _matches("exclude", exclude, found.sites):
        found.leave(name, "excluded")
    return found


def _of_types(model: nn.Module) -> Candidates:
    found = Candidates(modules=dict(model.named_modules()))
    for name, module in found.modules.items():
        site = handlers.downsampling(module)
        if site is not None and site.reason:
            found.left_alone[name] = site.reason
        elif site is not None:
            found.sites[name] = site
        if handlers.is_upsampling(module):
            found.upsamplings.add(name)
    return found


def _matches(argument: str, given: Patterns, names: Collection[str]) -> set[str]:
    """Return the names that match a pattern."""
    matches: set[str] = set()
    for pattern in [given] if isinstance(given, str) else given or ():
        new = {name for name in names if fnmatchcase(name, pattern)}
        if not new:
            known = ", ".join(names) or "none"
            raise UsageError(f"{argument} must match a downsampling (there are: {known}), got {pattern!r}")
        matches |= new
    return matches
