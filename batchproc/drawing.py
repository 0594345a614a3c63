"""What pictures of results have in common: one style, one set of colours, the same bytes for the same numbers.

The report's drawings have a style of their own, since its page decides the colours (`batchproc.report.figures`).
"""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["COLOURS", "GREY", "colour", "png"]

GREY = "#8a8a8a"
#: To tell things apart; the first two as well for those who see no red or no green.
COLOURS = ("#2f6db3", "#c8641e", "#3b8a4e", "#8a4ea3", "#b0304c", "#5b6b73")
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
}


def colour(number: int) -> str:
    """The colour of the thing of this number, from 0; they come again after the last."""
    return COLOURS[number % len(COLOURS)]


def png(draw: Callable[[Figure], None], size: tuple[float, float], dpi: int = 100) -> bytes:
    """A picture as the bytes of a PNG; the same for the same numbers.

    Parameters
    ----------
    draw : callable
        Puts axes and what is in them on the figure that it is given.
    size : (width, height)
        Inches.
    dpi : int
        Pixels an inch.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained", dpi=dpi)
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
