"""The section of the focal planes: pictures with a column an exposure and a row a CCD."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from batchproc.report import figures

__all__ = ["FocalPlanes", "focal_section"]

_MOST_EXPOSURES = 800  # columns of a picture; of more exposures some are left out, evenly
_MOST_CROSSES = 500

#: Column of the table, and what the picture is called.
_PANELS = (
    ("n_candidates", "candidates"),
    ("seeing", "seeing (arcsec)"),
    ("fwhm_new", "seeing (pix)"),
    ("depth", "5 σ depth (mag)"),
)


@dataclass(frozen=True)
class FocalPlanes:
    """What the report says of exposures and CCDs.

    Attributes
    ----------
    exposures, ccds, done, images : int
        Distinct ones; images that were done, and all of the manifest, when the table was made.
    unplaced : int
        Of these, how many belong to no known exposure: they are not in the picture.
    shown : int
        Exposures in the picture.
    svg : str
        The picture.
    """

    exposures: int
    ccds: int
    done: int
    images: int
    unplaced: int
    shown: int
    svg: str


def focal_section(table: pd.DataFrame) -> FocalPlanes | None:
    """The section, of `Facts.focal_planes`; None where these are not several images of known exposures."""
    total, done = len(table), int((table["status"] == "done").sum())
    table = table[table["exposure_id"] != ""]
    everything = table["exposure_id"].unique()
    ccds = sorted(table["ccd"].unique(), key=_natural)
    if len(everything) * len(ccds) < 2:
        return None
    shown = everything[np.unique(np.linspace(0, len(everything) - 1, _MOST_EXPOSURES).astype(int))]
    return FocalPlanes(
        exposures=len(everything),
        ccds=len(ccds),
        done=done,
        images=total,
        unplaced=total - len(table),
        shown=len(shown),
        svg=_draw(table[table["exposure_id"].isin(shown)], list(shown), ccds),
    )


def _draw(table: pd.DataFrame, exposures: list[str], ccds: list[str]) -> str:
    columns = pd.Index(exposures).get_indexer(pd.Index(table["exposure_id"]))
    rows = pd.Index(ccds).get_indexer(pd.Index(table["ccd"]))
    done = (table["status"] == "done").to_numpy()
    failed = table["status"].isin(["failed", "bug"]).to_numpy()
    panels = [(name, title) for name, title in _PANELS if np.isfinite(table[name][done]).any()]
    if any(name == "seeing" for name, _ in panels):
        panels = [panel for panel in panels if panel[0] != "fwhm_new"]
    if not panels:
        return ""

    size = 7 if len(exposures) <= 60 else 4

    def plane(name: str) -> NDArray[np.float64]:
        values = np.full((len(ccds), len(exposures)), np.nan)
        values[rows[done], columns[done]] = table[name][done]
        return values

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (name, title) in zip(axes, panels, strict=True):
            _matrix(figure, axis, plane(name), title, ccds)
            for colour, width in (("white", 3.6), (figures.ORANGE, 1.6)):  # to be seen on whatever it lies
                crosses = columns[failed][:_MOST_CROSSES], rows[failed][:_MOST_CROSSES]
                axis.plot(*crosses, "x", ms=size, mew=width * size / 7, color=colour)
        axes[-1].set_xlabel("exposure, in the order of time")

    height = 0.6 + len(panels) * (0.9 + 0.12 * min(len(ccds), 16))
    return figures.to_svg(
        "focal", "Candidates, seeing and depth of each CCD and exposure", draw, width=12.4, height=height
    )


def _matrix(figure: Figure, axis: Axes, values: NDArray[np.float64], title: str, ccds: list[str]) -> None:
    low, high = np.nanpercentile(values, [1, 99])
    image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=max(high, low))
    axis.set_title(title, fontsize=9, loc="left")
    axis.grid(visible=False)
    ticks = range(0, len(ccds), -(-len(ccds) // 8))
    axis.set_yticks(list(ticks), [ccds[i] for i in ticks])
    axis.set_ylabel("CCD")
    axis.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    figure.colorbar(image, ax=axis, pad=0.01, fraction=0.03)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """CCD 2 before CCD 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
