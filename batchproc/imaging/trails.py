"""Trails across an image: satellites, bad columns, diffraction spikes. One object with two ends, not many candidates.

A trail too faint to be elongated in any one detection still lines up many weak peaks of S_corr. They are found as a
Hough transform does: all peaks above 3 sigma vote for the lines through them, a line with far more votes than chance
gives is followed to its ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import maximum_filter

__all__ = ["Trail", "find_trails", "on_trails"]

_PEAK = 3.0  # sigma: what may vote
_EXCESS = 9.0  # votes of a line above chance, in units of the square root of what chance gives (plus one)
_GAP = 12.0  # FWHM: a trail goes on over a gap not longer than this
_LENGTH = 25.0  # FWHM: shorter is no trail
_DENSITY = 0.12  # votes per FWHM of length, at least (a solid trail has about 0.5)
_AT_MOST = 8  # trails an image and sign


@dataclass(frozen=True)
class Trail:
    """A straight trail from (x0, y0) to (x1, y1), reaching `width` to either side; pixels."""

    x0: float
    y0: float
    x1: float
    y1: float
    width: float
    n_peaks: int

    def distance(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Distance in pixels of positions from the trail (from its nearer end where they lie beyond it)."""
        start, way = np.array([self.x0, self.y0]), np.array([self.x1 - self.x0, self.y1 - self.y0])
        points = np.column_stack([x, y]) - start
        along = np.clip(points @ way / max(float(way @ way), 1e-12), 0, 1)
        off = points - along[:, None] * way
        return np.hypot(off[:, 0], off[:, 1])


def find_trails(score_corr: NDArray[np.floating], fwhm: float) -> list[Trail]:
    """Trails of positive S_corr (pass −S_corr for the others), the most conspicuous first.

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
    peaks = (score_corr == maximum_filter(score_corr, 3)) & (score_corr > _PEAK)
    y, x = np.nonzero(peaks)
    points = _spread_out(np.column_stack([x, y]).astype(np.float64), 8 * fwhm, score_corr.shape)
    trails: list[Trail] = []
    for width in (fwhm, 3 * fwhm):  # sharp lines first; then broad trails, out of focus or bent by distortion
        # Angles as fine as the image's diagonal asks: a long trail must not leave its line.
        n_angles = int(np.ceil(np.pi * math.hypot(*score_corr.shape) / (2 * width)))
        angles = np.arange(n_angles) * np.pi / n_angles
        for _ in range(_AT_MOST):
            line = _best_line(points, angles, width, score_corr.shape)
            if line is None:
                break
            near = _offset(points, *line) < width
            trails += _stretches(points[near], fwhm, width)
            points = points[~near]
    return trails


def on_trails(trails: Sequence[Trail], x: ArrayLike, y: ArrayLike, fwhm: float) -> NDArray[np.bool_]:
    """Whether positions lie on one of the trails, or within half a FWHM of its side."""
    hit = np.zeros(np.size(x), bool)
    for trail in trails:
        hit |= trail.distance(x, y) < trail.width + 0.5 * fwhm
    return hit


def _spread_out(points: NDArray, cell: float, shape: tuple[int, ...]) -> NDArray:
    """Without the peaks of crowded cells: a badly subtracted galaxy has hundreds, and would vote for every line."""
    if len(points) == 0:
        return points
    columns = int(shape[1] // cell) + 1
    index = (points[:, 1] // cell).astype(int) * columns + (points[:, 0] // cell).astype(int)
    counts = np.bincount(index)
    # A line crosses a cell of 8 FWHM with some ten peaks, a broad one with twenty at most.
    return points[counts[index] <= 20]


def _best_line(points: NDArray, angles: NDArray, width: float, shape: tuple[int, ...]) -> tuple[float, float] | None:
    """(angle of the normal, distance from the origin) of the line with the most votes above chance, if significant."""
    if len(points) < 10:
        return None
    reach = math.hypot(*shape)
    n_bins = int(2 * reach / width) + 2
    by_chance = len(points) / (shape[0] * shape[1]) * width
    best, excess = None, _EXCESS
    for angle in angles:
        normal = np.array([np.cos(angle), np.sin(angle)])
        votes = np.bincount(((points @ normal + reach) / width).astype(int), minlength=n_bins)
        votes = votes[:-1] + votes[1:]  # two bins a line, so that none falls between
        top = int(votes.argmax())
        expected = 2 * by_chance * _chord(normal, (top + 1) * width - reach, shape)
        significance = (votes[top] - expected) / np.sqrt(expected + 1)
        if significance > excess:
            best, excess = (float(angle), (top + 1) * width - reach), significance
    return best


def _chord(normal: NDArray, distance: float, shape: tuple[int, ...]) -> float:
    """Length of a line inside the image."""
    direction = np.array([-normal[1], normal[0]])
    foot = distance * normal
    low, high = -np.inf, np.inf
    for start, way, side in zip(foot, direction, (shape[1], shape[0]), strict=True):
        if abs(way) < 1e-9:
            continue
        ends = sorted((-start / way, (side - start) / way))
        low, high = max(low, ends[0]), min(high, ends[1])
    return max(high - low, 0.0)


def _offset(points: NDArray, angle: float, distance: float) -> NDArray[np.float64]:
    return np.abs(points @ np.array([np.cos(angle), np.sin(angle)]) - distance)


def _stretches(points: NDArray, fwhm: float, width: float) -> list[Trail]:
    """The unbroken stretches of points along their line, if one of them is long and dense enough for a trail.

    Others on the same line then need less: a trail comes in dashes where exposures were combined.
    """
    centre = points.mean(axis=0)
    direction = np.linalg.svd(points - centre, full_matrices=False)[2][0]
    along = np.sort((points - centre) @ direction)
    groups = np.split(along, np.flatnonzero(np.diff(along) > _GAP * fwhm) + 1)
    groups = [g for g in groups if len(g) >= _DENSITY * (g[-1] - g[0]) / fwhm]
    if not any(g[-1] - g[0] >= _LENGTH * fwhm for g in groups):
        return []
    dashes = [g for g in groups if g[-1] - g[0] >= _LENGTH / 3 * fwhm and len(g) >= 6]
    ends = [(centre + g[0] * direction, centre + g[-1] * direction, len(g)) for g in dashes]
    return [Trail(float(a[0]), float(a[1]), float(b[0]), float(b[1]), width, n) for a, b, n in ends]
