"""Trails across an image: satellites, bad columns, diffraction spikes. One object with two ends, not many candidates.

A trail too faint to be elongated in any one detection still lines up many weak peaks of S_corr. They are found as a
Hough transform does: all peaks above 3 sigma vote for the lines through them, a line with far more votes than chance
gives is followed to its ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import map_coordinates

from batchproc.imaging.measure import GAUSSIAN_FWHM
from batchproc.imaging.peaks import local_extrema, pixels_above
from batchproc.records import Difference

__all__ = ["Trail", "across", "find_trails", "on_trails", "table"]

_PEAK = 3.0  # sigma: what may vote
_EXCESS = 9.0  # votes of a line above chance, in units of the square root of what chance gives (plus one)
_GAP = 12.0  # FWHM: a trail goes on over a gap not longer than this
_LENGTH = 25.0  # FWHM: shorter is no trail
_DENSITY = 0.12  # votes per FWHM of length, at least (a solid trail has about 0.5)
_AT_MOST = 8  # trails an image and sign


@dataclass(frozen=True)
class Trail:
    """A straight trail from (x0, y0) to (x1, y1); pixels.

    Attributes
    ----------
    x0, y0, x1, y1 : float
        Its ends.
    reach : float
        What it spoils to either side of the line.
    n_peaks : int
        Peaks of S_corr above 3 sigma on it.
    sign : {1, -1}
        Brighter in new, or in ref.
    dashes : tuple of (float, float)
        Where it shines, from and to, measured along it from (x0, y0): more than one where exposures were combined.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    reach: float
    n_peaks: int
    sign: int
    dashes: tuple[tuple[float, float], ...]

    @property
    def length(self) -> float:
        """From end to end, pixels."""
        return math.hypot(self.x1 - self.x0, self.y1 - self.y0)

    def distance(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Distance in pixels of positions from its nearest dash."""
        along, off = self._coordinates(x, y)
        beyond = np.min([np.maximum(np.maximum(a - along, along - b), 0.0) for a, b in self.dashes], axis=0)
        return np.hypot(beyond, off)

    def _coordinates(self, x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Along it from its first end, and off it to either side."""
        ux, uy = (self.x1 - self.x0) / self.length, (self.y1 - self.y0) / self.length
        u, v = np.asarray(x, dtype=np.float64) - self.x0, np.asarray(y, dtype=np.float64) - self.y0
        return u * ux + v * uy, v * ux - u * uy


def find_trails(score_corr: NDArray[np.floating], fwhm: float) -> list[Trail]:
    """Trails of either sign of S_corr, positive ones first, the most conspicuous first.

    Parameters
    ----------
    score_corr : ndarray (ny, nx)
        In sigma, of unit width on blank sky.
    fwhm : float
        Of the PSF of D, pixels: the width of a line and the unit of lengths.

    Returns
    -------
    list of Trail
    """
    pixels = pixels_above(score_corr, _PEAK)
    pixels = pixels[local_extrema(score_corr, pixels)]
    y, x = np.divmod(pixels, score_corr.shape[1])
    positive = score_corr[y, x] > 0
    trails: list[Trail] = []
    for sign, rows in ((1, positive), (-1, ~positive)):
        points = np.column_stack([x[rows], y[rows]]).astype(np.float64)
        trails += _of_one_sign(points, sign, fwhm, (score_corr.shape[0], score_corr.shape[1]))
    return trails


def on_trails(
    trails: Sequence[Trail], x: ArrayLike, y: ArrayLike, fwhm: float, sign: ArrayLike = 1
) -> NDArray[np.bool_]:
    """Whether positions lie on one of the trails of their sign, or within half a FWHM of its side."""
    hit = np.zeros(np.size(x), bool)
    for trail in trails:
        hit |= (trail.distance(x, y) < trail.reach + 0.5 * fwhm) & (np.asarray(sign) == trail.sign)
    return hit


def across(trail: Trail, image: NDArray[np.floating], fwhm: float) -> tuple[float, float]:
    """Width of a trail, and its light per pixel of length, from the mean profile of its dashes.

    Parameters
    ----------
    trail : Trail
    image : ndarray (ny, nx)
        D, or the difference in units of new; what is not finite counts as 0.
    fwhm : float
        Of the PSF of D, pixels.

    Returns
    -------
    width : float
        FWHM, pixels: from the second moment within 2.5 FWHM (of the PSF, or 1.5 times the reach) under a Gaussian
        weight whose own narrowing is undone.
    brightness : float
        Sum of the profile over that range, in units of `image` times pixels.
    """
    half = max(2.5 * fwhm, 1.5 * trail.reach)
    off = np.arange(-2.0 * half, 2.0 * half + 0.25, 0.5)
    along = np.concatenate([np.arange(a, b + 1.0) for a, b in trail.dashes])
    ux, uy = (trail.x1 - trail.x0) / trail.length, (trail.y1 - trail.y0) / trail.length
    x = trail.x0 + along[None] * ux - off[:, None] * uy
    y = trail.y0 + along[None] * uy + off[:, None] * ux
    values = map_coordinates(image, [y, x], order=1, cval=np.nan, prefilter=False)
    values[~np.isfinite(values)] = 0.0
    # The mean, with the brightest and faintest tenth of its pixels (stars, gaps) left out.
    values.sort(axis=1)
    cut = values.shape[1] // 10
    profile = values[:, cut : values.shape[1] - cut].mean(axis=1)
    inside = np.abs(off) <= half
    profile = trail.sign * (profile - np.median(profile[~inside]))
    brightness = 0.5 * float(profile[inside].sum())
    centre = float(off[inside][profile[inside].argmax()])
    variance = (half / GAUSSIAN_FWHM) ** 2
    weighted = np.where(inside, profile * np.exp(-0.5 * (off - centre) ** 2 / variance), 0.0)
    total = max(float(weighted.sum()), 1e-30)
    centre = float((weighted * off).sum()) / total
    measured = min(max(float((weighted * (off - centre) ** 2).sum()) / total, 0.1), 0.9 * variance)
    return GAUSSIAN_FWHM * math.sqrt(measured * variance / (variance - measured)), trail.sign * brightness


def table(trails: Sequence[Trail], difference: Difference, fwhm: float) -> list[dict[str, Any]]:
    """A row for each trail, of plain numbers.

    ``x0, y0, x1, y1`` (its ends, pixels), ``length`` and ``width`` (FWHM, pixels), ``brightness`` (electrons of new per
    pixel of length, negative where ref is the brighter), ``dashes`` (from and to, pixels from the first end),
    ``n_peaks``.
    """
    rows = []
    for trail in trails:
        width, light = across(trail, difference.difference, fwhm)
        f_d = difference.kernels_at(0.5 * (trail.x0 + trail.x1), 0.5 * (trail.y0 + trail.y1)).f_d
        row = {"x0": trail.x0, "y0": trail.y0, "x1": trail.x1, "y1": trail.y1, "length": trail.length, "width": width}
        row = {name: round(float(value), 2) for name, value in row.items()} | {
            "brightness": float(f"{light / f_d:.4g}")
        }
        dashes = [[round(start, 1), round(stop, 1)] for start, stop in trail.dashes]
        rows.append(row | {"dashes": dashes, "n_peaks": trail.n_peaks})
    return rows


def _of_one_sign(points: NDArray[np.float64], sign: int, fwhm: float, shape: tuple[int, int]) -> list[Trail]:
    points = everything = _spread_out(points, 8 * fwhm, shape)
    trails: list[Trail] = []
    # A look with broad lines costs little. Of a sharp line that is significant it sees at least 1 / √3: three times as
    # wide, it meets three times as many points by chance.
    if len(points) < 10 or _best_line(points, 3 * fwhm, *shape)[2] < _EXCESS / math.sqrt(3):
        return trails
    for width in (fwhm, 3 * fwhm):  # sharp lines first; then broad trails, out of focus or bent by distortion
        for _ in range(_AT_MOST):
            if len(points) < 10:
                break
            angle, distance, significance = _best_line(points, width, *shape)
            if significance <= _EXCESS:
                break
            normal = np.array([np.cos(angle), np.sin(angle)])
            near = np.abs(points @ normal - distance) < width
            off = np.abs(everything @ normal - distance)
            beside = everything[(off > 1.25 * width) & (off < 2.25 * width)]
            trails += _stretches(points[near], beside, fwhm, width, sign)
            points = points[~near]
    return trails


def _spread_out(points: NDArray, cell: float, shape: tuple[int, ...]) -> NDArray:
    """Without the peaks of crowded cells: a badly subtracted galaxy has hundreds, and would vote for every line."""
    if len(points) == 0:
        return points
    columns = int(shape[1] // cell) + 1
    index = (points[:, 1] // cell).astype(int) * columns + (points[:, 0] // cell).astype(int)
    counts = np.bincount(index)
    # A line crosses a cell of 8 FWHM with some ten peaks, a broad one with twenty at most.
    return points[counts[index] <= 20]


@njit(cache=True)
def _best_line(points, width, ny, nx):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Angle of the normal, distance from the origin, and significance of the line with the most votes above chance."""
    reach = math.hypot(ny, nx)
    # Angles as fine as the image's diagonal asks: a long trail must not leave its line.
    n_angles = int(math.ceil(np.pi * reach / (2 * width)))
    n_bins = int(2 * reach / width) + 2
    by_chance = len(points) / (ny * nx) * width
    votes = np.zeros(n_bins, np.int32)
    best_angle = best_distance = best = 0.0
    for k in range(n_angles):
        angle = k * np.pi / n_angles
        cos, sin = math.cos(angle), math.sin(angle)
        votes[:] = 0
        for i in range(len(points)):
            votes[int((points[i, 0] * cos + points[i, 1] * sin + reach) / width)] += 1
        for i in range(n_bins - 1):  # two bins a line, so that none falls between
            count = votes[i] + votes[i + 1]
            if count <= best:  # no line of so few votes can be more significant
                continue
            # What chance gives: the density of the image, or that beside the line where there is more (a galaxy).
            beside = 0
            for k_bin in range(3, 8):
                beside += votes[max(i - k_bin, 0)] + votes[min(i + 1 + k_bin, n_bins - 1)]
            distance = (i + 1) * width - reach
            expected = max(2 * by_chance * _chord(cos, sin, distance, ny, nx), beside / 5)
            significance = (count - expected) / math.sqrt(expected + 1)
            if significance > best:
                best_angle, best_distance, best = angle, distance, significance
    return best_angle, best_distance, best


@njit(cache=True)
def _chord(cos, sin, distance, ny, nx):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Length of a line inside the image."""
    low, high = -np.inf, np.inf
    for start, way, side in ((distance * cos, -sin, nx), (distance * sin, cos, ny)):
        if abs(way) < 1e-9:
            continue
        one, two = -start / way, (side - start) / way
        low, high = max(low, min(one, two)), min(high, max(one, two))
    return max(high - low, 0.0)


def _stretches(points: NDArray, beside: NDArray, fwhm: float, width: float, sign: int) -> list[Trail]:
    """A trail of the unbroken stretches of points along their line, if one of them is long and dense enough.

    Others on the same line then need less: a trail comes in dashes where exposures were combined. Where there are as
    many points beside the line as on it, there is a patch (a galaxy) and no trail.
    """
    centre = points.mean(axis=0)
    direction = np.linalg.svd(points - centre, full_matrices=False)[2][0]
    along = np.sort((points - centre) @ direction)
    beside_along = np.sort((beside - centre) @ direction)
    groups = np.split(along, np.flatnonzero(np.diff(along) > _GAP * fwhm) + 1)
    groups = [g for g in groups if len(g) >= _DENSITY * (g[-1] - g[0]) / fwhm and _stands_out(g, beside_along)]
    groups = [g for g in groups if g[-1] - g[0] >= _LENGTH / 3 * fwhm and len(g) >= 6]
    if not any(g[-1] - g[0] >= _LENGTH * fwhm for g in groups):
        return []
    first, last = groups[0][0], groups[-1][-1]
    (x0, y0), (x1, y1) = centre + first * direction, centre + last * direction
    return [
        Trail(
            x0=float(x0),
            y0=float(y0),
            x1=float(x1),
            y1=float(y1),
            reach=width,
            n_peaks=sum(len(g) for g in groups),
            sign=sign,
            dashes=tuple((float(g[0] - first), float(g[-1] - first)) for g in groups),
        )
    ]


def _stands_out(group: NDArray, beside: NDArray) -> bool:
    """More points than beside it, in an equal area, by 4 sigma and three times over: a line has sides."""
    expected = float(np.diff(np.searchsorted(beside, [group[0], group[-1]]))[0])
    return len(group) > max(expected + 4 * math.sqrt(expected + 1), 3 * expected)
