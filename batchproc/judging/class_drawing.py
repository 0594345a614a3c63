"""One picture of an evaluation of classifiers of several classes; the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchproc.drawing import GREY, colour, png
from batchproc.judging.classes import ClassJudgement
from batchproc.judging.measures import MIXTURES
from batchproc.learning.evaluate import rates

__all__ = ["draw_classes"]


def draw_classes(found: Sequence[ClassJudgement]) -> bytes:
    """A PNG, a row a model: who is taken for whom, precision and recall of each class, and recall with precision."""

    def panels(figure: Figure) -> None:
        axes = figure.subplots(len(found), 3, squeeze=False)
        for row, one in zip(axes, found, strict=True):
            _matrix(row[0], one)
            _precision(row[1], one)
            _rates(row[2], one)

    side = 3.2 + 0.25 * max(len(one.classes) for one in found)
    return png(panels, (3.4 * side, side * len(found)))


def _matrix(axis: Axes, one: ClassJudgement) -> None:
    there = np.flatnonzero(one.n)
    counts = one.matrix[there]
    shares = counts / counts.sum(axis=1, keepdims=True)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in np.ndindex(*counts.shape):
        text = f"{shares[i, j]:.2f}\n{int(counts[i, j])}" if counts[i, j] else "0"
        axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if shares[i, j] > 0.6 else "black")
    axis.set_xticks(np.arange(len(one.classes)), one.classes, rotation=25, ha="right", rotation_mode="anchor")
    axis.set_yticks(np.arange(len(there)), [one.classes[k] for k in there])
    axis.grid(False)
    axis.set(title=f"{one.name}: who is taken for whom (share of the row; number)", xlabel="taken for", ylabel="is")


def _precision(axis: Axes, one: ClassJudgement) -> None:
    for k, name in enumerate(one.classes):
        if not np.isnan(one.by_class[name]["auc_pr 1:1"].value):
            curve = rates(one.truth == k, one.scores[:, k])
            for line, mix in (("-", "1:1"), ("--", "1:100")):
                label = name if mix == "1:1" else None
                axis.plot(curve.real, curve.precision(MIXTURES[mix]), line, color=colour(k), lw=1.2, label=label)
    axis.set(xlim=(0, 1.02), ylim=(0, 1.03), xlabel="recall", ylabel="precision")
    axis.set_title("each class against all others: 1:1, dashed 1:100")
    axis.legend(loc="lower left")


def _rates(axis: Axes, one: ClassJudgement) -> None:
    there = [k for k in range(len(one.classes)) if one.n[k]]
    for shift, (key, marker, label) in zip(
        (-0.12, 0.0, 0.12),
        (
            ("recall", "o", "recall"),
            ("precision even", "s", "precision, classes 1:1"),
            ("precision sample", "D", "precision, this sample"),
        ),
        strict=True,
    ):
        values = np.array([[v.value, v.low, v.high] for v in (one.by_class[one.classes[k]][key] for k in there)]).T
        spread = np.nan_to_num(np.abs(values[1:] - values[0]))
        shade = GREY if key == "precision sample" else colour(0 if key == "recall" else 1)
        axis.errorbar(
            np.arange(len(there)) + shift, values[0], spread, fmt=marker, ms=4, lw=1, color=shade, label=label
        )
    names = [one.classes[k] for k in there]
    axis.set_xticks(np.arange(len(there)), names, rotation=25, ha="right", rotation_mode="anchor")
    axis.set(title="of the most likely class, with intervals", ylim=(-0.03, 1.05))
    axis.legend(loc="lower left")
