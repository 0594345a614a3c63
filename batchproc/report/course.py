"""The section of the course of a campaign: images over time, failures by cause, workers."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from batchproc.display import duration
from batchproc.report.figures import BLUE, GREEN, INK, MUTED, ORANGE, to_svg
from batchproc.report.times import Course

__all__ = ["course_section", "draw_course"]

_MOST_POINTS = 400  # of a curve: SVG grows with each
_MOST_CAUSES = 3
_CAUSE_COLOURS = (ORANGE, GREEN, INK)
_UNITS = (
    (2 * 86400.0, 86400.0, "days"),
    (2 * 3600.0, 3600.0, "hours"),
    (120.0, 60.0, "minutes"),
    (0.0, 1.0, "seconds"),
)
_TROUBLE = {
    "image_retried": "tried again",
    "image_lost": "lost with their worker",
    "image_overdue": "over their time",
}


def course_section(course: Course) -> dict[str, Any]:
    """What the page shows of it."""
    return {
        "begun": f"{course.begun[:16].replace('T', ' ')} UTC",
        "drivers": len(course.drivers),
        "at_work": duration(course.at_work),
        "in_all": duration(float(course.drivers[:, 1].max())),
        "trouble": [f"{n} {_TROUBLE[kind]}" for kind, n in sorted(course.trouble.items())],
        "fell": bool((course.done[:, 1] < 0).any()),
        "svg": draw_course(course),
    }


def draw_course(course: Course) -> str:
    """Images done, images failed by cause, and workers, over the time since the run began; grey where no driver was."""
    end = max(float(course.drivers[:, 1].max()), 1e-3)
    unit, name = next((unit, name) for least, unit, name in _UNITS if end >= least)
    causes = sorted(course.failed, key=lambda cause: -np.cumsum(course.failed[cause][:, 1]).max())
    panels = ["images done"] + ["images failed"] * bool(causes) + ["workers"] * bool(len(course.workers))

    def draw(figure: Figure) -> None:
        heights = [2.0] + [1.0] * (len(panels) - 1)
        axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axis, title in zip(axes, panels, strict=True):
            axis.set(ylabel=title, xlim=(0, end / unit))
            axis.yaxis.get_major_locator().set_params(integer=True)
            for before, after in zip(course.drivers[:-1, 1], course.drivers[1:, 0], strict=True):
                axis.axvspan(before / unit, after / unit, color=MUTED, alpha=0.25, linewidth=0)
        _count(axes[0], course.done, unit, end, color=BLUE)
        if causes:
            for cause, colour in zip(causes[:_MOST_CAUSES], _CAUSE_COLOURS, strict=False):
                _count(axes[1], course.failed[cause], unit, end, color=colour, label=cause)
            others = [course.failed[cause] for cause in causes[_MOST_CAUSES:]]
            if others:
                changes = np.concatenate(others)
                changes = changes[np.argsort(changes[:, 0], kind="stable")]
                _count(axes[1], changes, unit, end, color=MUTED, label=f"{len(others)} other causes")
            axes[1].legend(loc="best", fontsize=8)
        if len(course.workers):
            _steps(axes[-1], course.workers[:, 0] / unit, course.workers[:, 1], end / unit)
        for axis in axes:
            axis.set_ylim(bottom=0)
        axes[-1].set_xlabel(f"{name} since the run began")

    return to_svg("course", "Images finished over time", draw, width=12.4, height=2.3 + 1.0 * (len(panels) - 1))


def _count(axis: Axes, changes: NDArray[np.float64], unit: float, end: float, **how: Any) -> None:
    """How many there are, at each moment."""
    chosen, counts = _some(len(changes)), np.cumsum(changes[:, 1])
    x = np.concatenate([[0.0], changes[chosen, 0], [end]]) / unit
    y = np.concatenate([[0.0], counts[chosen], counts[-1:] if len(counts) else [0.0]])
    axis.plot(x, y, drawstyle="steps-post", **how)


def _steps(axis: Axes, times: NDArray, values: NDArray, end: float) -> None:
    chosen = _some(len(times))
    axis.plot([*times[chosen], end], [*values[chosen], values[-1]], drawstyle="steps-post", color=INK)


def _some(n: int) -> NDArray[np.int64]:
    """Of n points as many as are drawn, evenly; the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, _MOST_POINTS)).astype(np.int64))
