"""One picture of an evaluation of classifiers; the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchproc.drawing import COLOURS, GREY, colour, png
from batchproc.judging.measures import MIXTURES, Judgement
from batchproc.learning.evaluate import rates

__all__ = ["draw"]

_LINES = ("-", "--", ":")
#: Names that there is room for below an axis.
_NAMED = 13
#: Candidates in a bin of scores that tell what it means.
_CALIBRATED = 10


def draw(found: Sequence[Judgement]) -> bytes:
    """A PNG: precision and recall for each mixture, ROC, calibration, scores, and where real ones are lost."""
    columns = list(dict.fromkeys(part.column for part in found[0].parts))
    rows = 1 + -(-len(columns) // 4)

    def panels(figure: Figure) -> None:
        axes = figure.subplots(rows, 4, squeeze=False).ravel()
        _precision(axes[0], found)
        _roc(axes[1], found)
        _calibration(axes[2], found)
        _scores(axes[3], found[0])
        for axis, column in zip(axes[4:], columns, strict=False):
            _parts(axis, found, column)
        if columns:
            axes[4].legend(loc="center left", bbox_to_anchor=(0.0, 0.32))
        for axis in axes[4 + len(columns) :]:
            axis.set_visible(False)

    return png(panels, (14.0, 3.5 * rows))


def _precision(axis: Axes, found: Sequence[Judgement]) -> None:
    falls = 1.0  # recall from which on some precision is no longer near 1
    for number, one in enumerate(found):
        curve = rates(one.real, one.scores)
        for line, (mixture, share) in zip(_LINES, MIXTURES.items(), strict=True):
            label = f"{one.name}, {mixture}" if number == 0 else one.name if mixture == "1:1" else None
            precision = curve.precision(share)
            axis.plot(curve.real, precision, line, color=colour(number), lw=1.2, label=label)
            falls = min(falls, float(curve.real[precision < 0.97].min(initial=1.0)))
    left = max(0.0, np.floor(10 * falls - 1) / 10)  # nothing happens before
    axis.set(title="precision for real : bogus", xlabel="recall", ylabel="precision", ylim=(0, 1.03))
    axis.set_xlim(left, 1 + 0.02 * (1 - left))
    axis.legend(loc="lower left")


def _roc(axis: Axes, found: Sequence[Judgement]) -> None:
    for number, one in enumerate(found):
        curve = rates(one.real, one.scores)
        least = 0.5 / one.n_bogus
        axis.step(
            np.maximum(curve.bogus, least), curve.real, where="post", color=colour(number), lw=1.2, label=one.name
        )
        at = int(np.searchsorted(-curve.thresholds, -one.threshold))
        axis.plot(max(curve.bogus[at], least), curve.real[at], "o", ms=5, color=colour(number))
    axis.set_xscale("log")
    axis.set(title="ROC; dot: the threshold", xlabel="bogus selected", ylabel="real selected", ylim=(0, 1.03))
    axis.legend(loc="lower right")


def _calibration(axis: Axes, found: Sequence[Judgement]) -> None:
    axis.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    for number, one in enumerate(found):
        if one.calibration:
            sample, even = one.calibration["sample"], one.calibration["1:1"]
            enough = sample.n >= _CALIBRATED
            x, y = even.score[enough], even.real[enough]
            axis.plot(x, y, "o-", ms=4, lw=1, color=colour(number), label=f"{one.name}, 1:1")
            label = "this sample" if number == 0 else None
            x, y = sample.score[enough], sample.real[enough]
            axis.plot(x, y, "s:", ms=3, lw=1, color=colour(number), alpha=0.6, label=label)
    title = f"calibration, of bins with {_CALIBRATED} or more"
    axis.set(title=title, xlabel="mean score", ylabel="fraction that is real", ylim=(-0.03, 1.03))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower right")


def _scores(axis: Axes, one: Judgement) -> None:
    shown = one.scores[np.isfinite(one.scores)]
    edges = np.linspace(0, 1, 41) if one.calibration else np.linspace(shown.min(), shown.max(), 41)
    for real, shade, label in ((False, GREY, "bogus"), (True, COLOURS[0], "real")):
        counts = np.histogram(one.scores[one.real == real], edges)[0]
        axis.stairs(counts, edges, fill=True, color=shade, alpha=0.45, label=label)
    axis.axvline(one.threshold, color=COLOURS[1], lw=1)
    axis.set_yscale("symlog", linthresh=1)
    axis.set(title=f"scores of {one.name}; line: the threshold", xlabel="score", ylabel="candidates")
    axis.legend(loc="upper center")


def _parts(axis: Axes, found: Sequence[Judgement], column: str) -> None:
    names: list[str] = []
    for number, one in enumerate(found):
        parts = [part for part in one.parts if part.column == column]
        names = names or [part.name for part in parts]
        x = np.arange(len(parts)) + 0.12 * number
        for key, marker in (("false_negative_rate", "v"), ("bogus_removed", "o")):
            values = np.array([[p.values[key].value, p.values[key].low, p.values[key].high] for p in parts]).T
            spread = np.nan_to_num(np.maximum(np.abs(values[1:] - values[0]), 0))
            label = key.replace("_", " ") if number == 0 else None
            axis.errorbar(x, values[0], spread, fmt=marker, ms=4, lw=1, color=colour(number), label=label)
    every = -(-len(names) // _NAMED)
    axis.set_xticks(np.arange(len(names))[::every], names[::every], rotation=25, ha="right")
    axis.set(title=f"by {column}, at the threshold", ylim=(-0.05, 1.05))
