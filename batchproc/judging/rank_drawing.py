"""One picture of retrospective searches: what is recovered by looking at candidates from the best one down."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from batchproc.drawing import GREY, colour, png
from batchproc.judging.ranking import ODDS, Ranking
from batchproc.learning.ranks import ahead

__all__ = ["draw_searches"]

_COLUMNS = 3


def draw_searches(found: Sequence[tuple[str, Ranking, Ranking | None]]) -> bytes:
    """A PNG, a panel a search; the same bytes for the same numbers."""
    columns = min(_COLUMNS, len(found))
    rows = -(-len(found) // columns)

    def panels(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for axis, (name, ranking, known) in zip(axes, found, strict=False):
            _panel(axis, name, ranking, known)
        for axis in axes[len(found) :]:
            axis.set_visible(False)
        for axis in axes[: len(found) : columns]:
            axis.set_ylabel("recovered")
        axes[0].legend(loc="lower right")

    return png(panels, (max(4.4 * columns, 6.0), 3.8 * rows), dpi=110)


def _panel(axis: Axes, name: str, ranking: Ranking, known: Ranking | None) -> None:
    scored = ranking.scored
    curves = [(scored.left_out, scored.bogus, "never seen", colour(0), "-")]
    if known is not None:
        curves.append((known.scored.left_out, known.scored.bogus, "others of it known", colour(1), "--"))
    if len(scored.ordinary):
        curves.append((scored.ordinary, scored.bogus, "ordinary real ones", GREY, ":"))
    most = max(ODDS)
    least = most / (2 * max(len(scored.bogus), 1))
    for values, bogus, label, shade, line in curves:
        looked_at, recovered = _curve(values, bogus)
        x = np.concatenate([[least], np.maximum(looked_at * most, least), [most]])
        y = np.concatenate([[0.0], recovered, recovered[-1:]])
        axis.step(x, y, line, where="post", color=shade, lw=1.5, label=label)
    if np.isfinite(ranking.threshold):
        beyond = most * float(np.mean(scored.bogus >= ranking.threshold))
        axis.plot(max(beyond, least), ranking.values["above_threshold"].value, "o", ms=5, color=colour(0))
    axis.set_xscale("log")
    axis.set(
        title=f"{name} ({len(scored.left_out)}); dot: the threshold",
        xlabel=f"bogus looked at before, of {most:,}",
        ylim=(0, 1.03),
    )


def _curve(values: NDArray[np.float64], bogus: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fraction of the bogus ones looked at before each, rising, and that recovered by then; what has no score."""
    looked_at = np.sort(ahead(values[~np.isnan(values)], bogus))
    if not len(looked_at):
        return np.ones(1), np.zeros(1)
    return looked_at, np.arange(1, len(looked_at) + 1) / len(values)
