"""One picture of an evaluation: each promise, what was measured, and what theory says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from batchproc.completeness.sample import Sample
from batchproc.completeness.verdicts import Summary
from batchproc.drawing import COLOURS, GREY, png

__all__ = ["draw"]

_BLUE, _ORANGE = COLOURS[:2]


def draw(summary: Summary, samples: Sequence[Sample]) -> bytes:
    """A PNG of six panels; the same bytes for the same numbers."""

    def panels(figure: Figure) -> None:
        axes = figure.subplots(2, 3).ravel()
        _completeness(axes[0], summary)
        _alarms(axes[1], summary)
        _noise(axes[2], summary)
        _pulls(axes[3], samples)
        _fluxes(axes[4], summary)
        _positions(axes[5], summary)

    return png(panels, (12.0, 6.8), dpi=110)


def _completeness(axis: Axes, summary: Summary) -> None:
    bins = summary.bins
    if bins:
        middle = np.array([(b.low + b.high) / 2 for b in bins])
        low, high = np.array([b.band for b in bins]).T
        axis.fill_between(middle, low, high, step="mid", color=_ORANGE, alpha=0.25, lw=0, label="95 % band")
        axis.plot(
            middle, [b.expected / b.n for b in bins], drawstyle="steps-mid", color=_ORANGE, label="Gaussian noise"
        )
        axis.plot(middle, [b.found / b.n for b in bins], "o", ms=4, color=_BLUE, label="found")
        axis.legend(loc="lower right")
    axis.set(title="sources found", xlabel="expected S/N", ylabel="fraction", ylim=(-0.03, 1.05))


def _alarms(axis: Axes, summary: Summary) -> None:
    for sign, marker, label in ((1, "^", "positive"), (-1, "v", "negative")):
        rates = [r for r in summary.rates if r.sign == sign and np.isfinite(r.ratio)]
        x = np.array([r.threshold for r in rates]) + 0.03 * sign
        ratio = np.array([r.ratio for r in rates])
        low, high = np.array([r.interval for r in rates]).reshape(-1, 2).T
        high = np.maximum(np.minimum(high, 10.0), ratio)
        colour = _BLUE if sign > 0 else _ORANGE
        axis.errorbar(x, ratio, [ratio - low, high - ratio], fmt=marker, ms=5, color=colour, lw=1, label=label)
    axis.axhspan(1 / 1.5, 1.5, color=GREY, alpha=0.15, lw=0)
    axis.axhline(1, color=GREY, lw=0.8)
    top = max([3.0, *(1.2 * r.ratio for r in summary.rates if np.isfinite(r.ratio))])
    axis.set(title="false alarms over those of Gaussian fields", xlabel="threshold (σ)", ylim=(0, top), ylabel="ratio")
    axis.legend(loc="upper left")


def _noise(axis: Axes, summary: Summary) -> None:
    values = list(summary.skies.values())
    axis.axhspan(0.99, 1.01, color=GREY, alpha=0.15, lw=0)
    rms, error = np.array([v["rms"] for v in values]), np.array([v["error"] for v in values])
    axis.errorbar(np.arange(len(values)), rms, error, fmt="o", ms=4, color=_BLUE, lw=1)
    axis.set_xticks(np.arange(len(values)), list(summary.skies))
    axis.set(title="S_corr on blank sky before renormalisation", xlabel="sky, a pixel", ylabel="rms (σ)")
    if values:
        reach = 1.3 * max(0.015, float(np.nanmax(np.abs(rms - 1))))
        axis.set_ylim(1 - reach, 1 + reach)


def _pulls(axis: Axes, samples: Sequence[Sample]) -> None:
    pulls = np.concatenate([s.sources["pull"][s.sources["usable"]] for s in samples])
    edges = np.arange(-4.25, 4.3, 0.5)
    counts = np.histogram(pulls, edges)[0]
    axis.stairs(counts, edges, fill=True, color=_BLUE, alpha=0.35)
    axis.stairs(len(pulls) * np.diff(stats.norm.cdf(edges)), edges, color=_ORANGE, label="unit normal")
    axis.set(title="flux pulls at the injected places", xlabel="(α − T) / σ_α", ylabel="sources")
    axis.legend(loc="upper left")


def _fluxes(axis: Axes, summary: Summary) -> None:
    bins = [b for b in summary.bins if np.isfinite(b.pull_width)]
    middle = np.array([(b.low + b.high) / 2 for b in bins])
    n = np.array([b.n for b in bins])
    width, mean = np.array([b.pull_width for b in bins]), np.array([b.pull_mean for b in bins])
    axis.axhspan(0.95, 1.05, color=GREY, alpha=0.15, lw=0)
    axis.errorbar(middle, width, width / np.sqrt(1.4 * n), fmt="o", ms=4, color=_BLUE, lw=1, label="width")
    axis.errorbar(middle + 0.1, mean, width / np.sqrt(n), fmt="s", ms=3.5, color=_ORANGE, lw=1, label="mean")
    axis.axhline(0, color=GREY, lw=0.8)
    axis.set(title="the same by S/N", xlabel="expected S/N", ylabel="of the pulls", ylim=(-0.8, 1.8))
    axis.legend(loc="lower left", ncols=2)


def _positions(axis: Axes, summary: Summary) -> None:
    bins = [b for b in summary.bins if b.found >= 5]
    middle = np.array([(b.low + b.high) / 2 for b in bins])
    for name, colour, shift in (("x", _BLUE, -0.05), ("y", _ORANGE, 0.05)):
        ratio = np.array([getattr(b, f"position_{name}") for b in bins])
        error = ratio / np.sqrt(1.2 * np.array([b.found for b in bins]))
        axis.errorbar(middle + shift, ratio, error, fmt="o", ms=4, color=colour, lw=1, label=name)
    axis.axhline(1, color=GREY, lw=0.8)
    axis.set(title="position errors of those found", xlabel="expected S/N", ylabel="scatter / bound", ylim=(0, 2))
    axis.legend(loc="upper right", ncols=2)
