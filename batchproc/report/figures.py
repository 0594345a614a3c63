"""The report's drawings: numbers in, inline SVG out, in colours that the page's style sheet decides (light or dark)."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from scipy.special import ndtr

from batchproc.report.facts import HISTOGRAM_EDGES, Facts, Truth

__all__ = ["completeness", "positions", "quality", "scores", "significance", "sky_noise", "steps", "to_svg"]

#: Stand-ins that Matplotlib draws with, and the variables of the style sheet that take their place.
INK, MUTED, GRID, BLUE, ORANGE, GREEN, PAPER = (f"#01010{i}" for i in range(1, 8))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    PAPER: "--paper",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "batchproc",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.transparent": True,
}
_MOST_POINTS = 800  # of a small multiple: SVG grows with each


def sky_noise(facts: Facts) -> str:
    """Blank-sky S_corr of all images against the unit normal, logarithmic."""
    counts = facts.histogram
    if counts is None or counts.sum() == 0:
        return ""
    expected = counts.sum() * np.diff(ndtr(HISTOGRAM_EDGES))

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.stairs(np.maximum(counts, 0.3), HISTOGRAM_EDGES, fill=True, color=BLUE, alpha=0.30, baseline=0.3)
        axis.stairs(np.maximum(counts, 0.3), HISTOGRAM_EDGES, color=BLUE, baseline=0.3, label="measured")
        middle = (HISTOGRAM_EDGES[1:] + HISTOGRAM_EDGES[:-1]) / 2
        visible = expected > 0.3
        axis.plot(middle[visible], expected[visible], color=ORANGE, label="unit normal")
        axis.set(yscale="log", xlabel="S_corr on blank sky (σ)", ylabel="pixels", xlim=(-8, 8), ylim=(0.3, None))
        for sign in (-1, 1):
            axis.axvline(sign * facts.threshold, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.legend(loc="upper right")

    return to_svg("sky", "Histogram of blank-sky S_corr against a unit normal", draw)


def completeness(truth: Truth, threshold: float, *, with_scores: bool) -> str:
    """Fraction of the known transients that were found, against their expected S/N."""
    table = truth.table
    if table.empty:
        return ""
    edges = np.geomspace(max(table["snr"].min(), 1.5), max(table["snr"].max(), 20.0) * 1.001, 9)
    bins = np.digitize(table["snr"], edges) - 1
    kinds = [("found", "found", BLUE), ("clean", "found, unflagged", GREEN)]
    if with_scores:
        kinds.append(("real", "found, scored real", ORANGE))

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        snr = np.geomspace(edges[0], edges[-1], 200)
        axis.plot(snr, ndtr(snr - threshold), color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="noise alone")
        for offset, (column, label, colour) in enumerate(kinds):
            x, fraction, low, high = _fractions(table[column].to_numpy(), table["snr"].to_numpy(), bins, len(edges) - 1)
            x = x * 1.018 ** (offset - 1)  # side by side where they agree
            axis.errorbar(
                x, fraction, [fraction - low, high - fraction], fmt="o-", ms=4, color=colour, elinewidth=1, label=label
            )
        axis.set(
            xscale="log",
            xlabel="expected S/N",
            ylabel="fraction",
            ylim=(-0.03, 1.06),
            xlim=(edges[0], edges[-1] * 1.05),
        )
        ticks = [t for t in (2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200) if edges[0] <= t <= edges[-1]]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend(loc="best")

    return to_svg("complete", "Fraction of known transients found against expected S/N", draw)


def positions(truth: Truth) -> str:
    """Measured minus true position, and measured over true flux, of the transients found."""
    table = truth.table[truth.table["found"]]
    if table.empty:
        return ""
    table = table.iloc[:: max(1, len(table) // _MOST_POINTS)]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
        reach = max(0.3, float(np.nanpercentile(np.abs(table[["dx", "dy"]]), 97)) * 1.3)
        left.plot(table["dx"], table["dy"], "o", ms=2.6, color=BLUE, alpha=0.6, markeredgewidth=0)
        left.set(xlabel="Δx (pix)", ylabel="Δy (pix)", xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        right.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        right.plot(
            table["snr"], np.clip(table["flux_ratio"], 0, 2), "o", ms=2.6, color=BLUE, alpha=0.6, markeredgewidth=0
        )
        right.set(xscale="log", xlabel="expected S/N", ylabel="flux, found / true", ylim=(0.4, 1.6))
        right.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:g}"))
        right.xaxis.set_minor_formatter(NullFormatter())

    return to_svg("positions", "Position and flux errors of the known transients that were found", draw)


def scores(facts: Facts) -> str:
    """Distribution of scores; of known transients and of the rest where truth is known."""
    values = facts.scores
    good = np.isfinite(values)
    if not good.any():
        return ""
    edges = np.linspace(min(0.0, float(values[good].min())), max(1.0, float(values[good].max())), 41)
    known = None if facts.truth is None else facts.truth.matched

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        groups = [(good, BLUE, "")]
        if known is not None:
            groups = [(good & ~known, MUTED, "other candidates"), (good & known, ORANGE, "known transients")]
        for chosen, colour, label in groups:
            counts = np.histogram(values[chosen], edges)[0]
            axis.stairs(np.maximum(counts, 0.4), edges, fill=True, color=colour, alpha=0.3, baseline=0.4)
            axis.stairs(np.maximum(counts, 0.4), edges, color=colour, baseline=0.4, label=label)
        axis.set(yscale="log", xlabel="score", ylabel="candidates", ylim=(0.4, None), xlim=(edges[0], edges[-1]))
        if known is not None:
            axis.legend(loc="upper center")

    return to_svg("scores", "Distribution of the scores of all candidates", draw)


def significance(facts: Facts) -> str:
    """Number of candidates against |S_corr|, positive and negative, unflagged ones filled."""
    if facts.catalogue.empty:
        return ""
    strength = np.abs(facts.catalogue["scorr"].to_numpy(dtype=np.float64))
    positive = facts.catalogue["scorr"].to_numpy() > 0
    clean = facts.catalogue["flags"].to_numpy() == 0
    low = min(facts.threshold, float(strength.min()))
    edges = np.geomspace(low * 0.98, max(float(strength.max()) * 1.02, low * 4), 31)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, chosen, title in zip(axes, (positive, ~positive), ("brightened", "faded"), strict=True):
            every, unflagged = (np.histogram(strength[c], edges)[0] for c in (chosen, chosen & clean))
            axis.stairs(np.maximum(every, 0.4), edges, color=MUTED, baseline=0.4, label="all")
            axis.stairs(np.maximum(unflagged, 0.4), edges, color=BLUE, baseline=0.4, fill=True, alpha=0.35)
            axis.stairs(np.maximum(unflagged, 0.4), edges, color=BLUE, baseline=0.4, label="unflagged")
            axis.set(xscale="log", yscale="log", xlabel="|S_corr| (σ)", ylim=(0.4, None), xlim=(edges[0], edges[-1]))
            axis.set_title(title, fontsize=9, loc="left")
            ticks = [t for t in (5, 10, 20, 50, 100, 200, 500, 1000) if edges[0] <= t <= edges[-1]]
            axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axis.xaxis.set_minor_formatter(NullFormatter())
        axes[0].set_ylabel("candidates")
        axes[1].legend(loc="upper right")

    return to_svg("significance", "Candidates against their significance, for both signs", draw)


def steps(images: pd.DataFrame) -> str:
    """Seconds of each step: the mean, and what nine images of ten stay below; both as numbers at the side."""
    names = [c for c in images if str(c).startswith("step:")]
    if not names or images.empty:
        return ""
    seconds = images[names].fillna(0.0)
    mean, slow = seconds.mean(), seconds.quantile(0.9)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        y = np.arange(len(names))[::-1]
        axis.barh(y, mean, height=0.62, color=BLUE, alpha=0.75, label="mean")
        axis.plot(slow, y, "|", ms=11, mew=1.6, color=ORANGE, label="90 % of the images are below")
        axis.set_yticks(y, [str(n).removeprefix("step:") for n in names])
        axis.set(xlabel="seconds per image")
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.set_xlim(0, float(max(mean.max(), slow.max())) * 1.04)
        for x, heading, values, colour in ((1.11, "mean", mean, BLUE), (1.24, "90 %", slow, ORANGE)):
            side: dict[str, Any] = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "center", "size": 8}
            axis.text(x, len(names) - 0.35, heading, color=colour, **side)
            for place, value in zip(y, values, strict=True):
                axis.text(x, place, f"{value:.2f}", **side)
        axis.set_ylim(-0.6, len(names) - 0.2)
        axis.legend(loc="lower right")

    return to_svg("steps", "Mean seconds of each step per image", draw, height=1.1 + 0.27 * len(names))


#: Small multiples: title, and (column, label, colour) of each series; several candidates for a column's name.
_PANELS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    ("seeing, FWHM (pix)", (("fwhm_new", "new", BLUE), ("fwhm_ref", "ref", ORANGE))),
    ("stars in the PSF", (("n_psf_stars_new", "new", BLUE), ("n_psf_stars_ref", "ref", ORANGE))),
    ("registration scatter (pix)", (("registration_rms_x", "x", BLUE), ("registration_rms_y", "y", ORANGE))),
    ("flux ratio, new / ref", (("flux_ratio", "", BLUE),)),
    ("width of S_corr before renormalisation", (("renormalisation", "", BLUE),)),
    ("candidates", (("n_candidates", "", BLUE),)),
)


def quality(images: pd.DataFrame) -> str:
    """What was measured on each image, in the manifest's order."""
    panels = [
        (title, [s for s in series if s[0] in images and images[s[0]].notna().any()]) for title, series in _PANELS
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels or images.empty:
        return ""
    shown = images.iloc[:: -(-len(images) // _MOST_POINTS)]

    def draw(figure: Figure) -> None:
        rows = -(-len(panels) // 3)
        axes = np.atleast_1d(figure.subplots(rows, min(3, len(panels)), squeeze=False)).ravel()
        for axis, (title, series) in zip(axes, panels, strict=False):
            for column, label, colour in series:
                values = pd.to_numeric(shown[column], errors="coerce")
                axis.plot(
                    shown.index + 1, values, "o", ms=3.4 if len(shown) < 200 else 1.8, color=colour, mew=0, label=label
                )
            axis.set_title(title, fontsize=9, loc="left")
            _breathe(axis)
            if len(series) > 1:
                axis.legend(loc="best", fontsize=8, handletextpad=0.1, borderpad=0.1)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis in axes[max(0, len(panels) - 3) : len(panels)]:
            axis.set_xlabel("image")

    return to_svg("quality", "Measured quality of each image", draw, width=12.4, height=2.3 * -(-len(panels) // 3))


def _breathe(axis: Axes) -> None:
    """Limits that do not blow a thousandth up to the height of the panel."""
    low, high = axis.get_ylim()
    middle, spread = (low + high) / 2, max(high - low, 0.1 * abs(low + high) / 2, 1e-6)
    axis.set_ylim(middle - 0.6 * spread, middle + 0.6 * spread)
    left, right = axis.get_xlim()
    axis.set_xlim(left - 0.5, right + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(4))


def _fractions(hits: NDArray, values: NDArray, bins: NDArray, n: int) -> Sequence[NDArray]:
    """Per filled bin: median value, fraction, and its Wilson interval (68 %)."""
    rows = []
    for b in range(n):
        inside = bins == b
        total, k = int(inside.sum()), float(hits[inside].sum())
        if total:
            p, centre = k / total, (k + 0.5) / (total + 1)
            half = np.sqrt(k * (1 - p) + 0.25) / (total + 1)
            rows.append((np.median(values[inside]), p, min(p, centre - half), max(p, centre + half)))
    return [np.array(column) for column in zip(*rows, strict=True)]


def to_svg(name: str, label: str, draw: Callable[[Figure], None], *, width: float = 5.6, height: float = 3.1) -> str:
    """Draw, and turn the drawing into SVG that takes its colours and letters from the page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Several drawings live in one page: their inner names must differ.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return _without_size(text)


def _without_size(text: str) -> str:
    """Width and height are the style sheet's; the view box stays."""
    head, rest = text.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def colours() -> dict[str, Any]:
    """Stand-ins and their variables, for tests."""
    return dict(_VARIABLES)
