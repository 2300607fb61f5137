"""A picture of measured changes of strides: the loss that each costs against what it saves."""

from matplotlib.figure import Figure

from diffstride.cost.sensitivity import Sensitivity
from diffstride.experiments.figures import style


def tradeoffs(found: Sensitivity, *, title: str) -> Figure:
    """Draw the change of the loss against the part of the cost that is saved, a line for each stride.

    The second panel has the changes that gradients predict against the measured ones, with the diagonal.
    """
    figure, (measured, predicted) = style.panels(2, 2, title=title)
    strides = list(dict.fromkeys((change.layer, change.axis) for change in found.changes))
    for i, (layer, axis) in enumerate(strides):
        own = [change for change in found.changes if (change.layer, change.axis) == (layer, axis)]
        points = sorted([(-100 * change.cost / found.cost, change.loss) for change in own] + [(0.0, 0.0)])
        label = layer if axis == "all" else f"{layer}, {axis}"
        measured.plot(*zip(*points, strict=True), lw=1.2, label=label, **style.look(i))
        predicted.plot([c.loss for c in own], [c.predicted for c in own], ls="", **style.look(i))
    measured.axhline(0, color=style.FAINT, lw=0.8)
    measured.set(xlabel="cost saved, %", ylabel="change of the loss")
    predicted.axline((0, 0), slope=1, color=style.FAINT, lw=0.8)
    predicted.set(xlabel="measured change of the loss", ylabel="predicted by the gradient")
    style.legend(figure, [measured])
    return figure
