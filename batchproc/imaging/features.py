"""What the pixels around a detection say of its nature: dipole, particle hit, trail, and what lies near.

Numbers only, from arrays; the rules that turn them into flags are in `detect`. Windows are cut around the whole pixel
nearest to the source and multiplied by the sign of the detection, so that a source always is a hill.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import label
from scipy.signal import fftconvolve
from scipy.spatial import cKDTree

__all__ = ["delta_test", "dipole", "distance_to_pixels", "on_streak", "score_response", "without_holes"]


def score_response(psf: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """S around a point source, relative to its peak: the autocorrelation of P_D (E16), (2 half + 1)² pixels."""
    full = fftconvolve(psf, psf[::-1, ::-1])
    centre = full.shape[0] // 2
    padded = np.pad(full, max(half - centre, 0))
    centre = padded.shape[0] // 2
    return np.asarray(padded[centre - half : centre + half + 1, centre - half : centre + half + 1] / full.max())


def dipole(score: NDArray, noise: NDArray, response: NDArray, radius: float) -> NDArray[np.float64]:
    """Strength of the opposite lobe over that of the detection.

    S of a misplaced star is a hill beside a hole. A clean source has its hill, P_D's own shallow ring around it, and
    noise. So: the deepest hole within `radius`, less the ring, less (in quadrature) the 2.5 sigma that the noise alone
    digs there, over the height of the hill.

    Parameters
    ----------
    score : ndarray (n, s, s)
        Windows of S times the sign of the detection, centred on its peak.
    noise : ndarray (n,)
        Standard deviation of S there, in the same units.
    response : ndarray (s, s)
        `score_response` of the same size.
    radius : float
        Pixels.

    Returns
    -------
    ndarray (n,)
        0 for a clean, lone source to 1 for two equal lobes (or a stronger opposite one).
    """
    half = score.shape[1] // 2
    offsets = np.arange(-half, half + 1)
    disc = np.hypot(offsets[:, None], offsets[None, :]) <= radius
    height = np.maximum(score[:, half, half], 1e-30)
    ring = height[:, None] * np.minimum(response[disc], 0.0)
    depth = np.maximum((ring - score[:, disc]).max(axis=1), 0.0)
    return np.minimum(np.sqrt(np.maximum(depth**2 - (2.5 * noise) ** 2, 0.0)) / height, 1.0)


def delta_test(
    data: NDArray, height: NDArray, noise: NDArray, kernel: NDArray[np.float64], psf: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Is it one hot pixel, rather than a point source?

    The score of the best hot pixel is ``max Σ D(x) δ(x − p)`` over the nine central pixels p, with δ the shape that one
    hot pixel leaves in D (E129 for new, E133 for ref). Over the score of the PSF it exceeds 1 for a hot pixel. How far
    it stays below 1 for a point source depends on the two PSFs: δ and P_D correlate by c, and a source of score s gives
    ``c s ± √(1 − c²)``. (c comes close to 1 for hot pixels of the much sharper image: those look like sources.)

    Parameters
    ----------
    data : ndarray (n, s, s)
        Windows of D times the sign of the detection, finite.
    height : ndarray (n,)
        Score of the point source, ``S / √F_S``.
    noise : ndarray (n,)
        Local noise over that of blank sky.
    kernel, psf : ndarray (k, k)
        δ and P_D, odd-sized.

    Returns
    -------
    ratio : ndarray (n,)
        Score of the hot pixel over that of the source.
    hit : ndarray (n,) of bool
        The ratio exceeds 1, and a point source is excluded by 3 sigma.
    """
    reach = data.shape[1] // 2 - 1
    hot, point = _centre(kernel, reach), _centre(psf, reach)
    correlation = np.clip(np.sum(hot * point), 0.0, 1.0)
    shifted = np.stack([np.pad(hot, ((1 + j, 1 - j), (1 + i, 1 - i))) for j in (-1, 0, 1) for i in (-1, 0, 1)])
    score = np.tensordot(data, shifted, ([1, 2], [1, 2])).max(axis=1, initial=0.0)
    from_source = correlation * height + 3 * np.sqrt(1 - correlation**2) * noise
    return score / height, (score > height) & (score > from_source)


def _centre(kernel: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """The central (2 half + 1)² pixels of a kernel, zero-padded where it is smaller, of unit sum of squares."""
    padded = np.pad(kernel, max(half - kernel.shape[0] // 2, 0))
    middle = padded.shape[0] // 2
    core = padded[middle - half : middle + half + 1, middle - half : middle + half + 1]
    return np.asarray(core / np.sqrt(np.sum(core**2)))


def on_streak(
    score_corr: NDArray, x: NDArray[np.int64], y: NDArray[np.int64], fwhm: ArrayLike, elongation: ArrayLike
) -> NDArray[np.bool_]:
    """Detections that are part of a trail: of a long, straight, narrow island of significance.

    An island is what hangs together above 2 sigma around a detection (diagonal neighbours count), so a trail that the
    threshold cuts to pieces is seen whole. It is a trail when it is longer than 6 FWHM, and as much as 3 times longer
    than wide, beyond the PSF's own elongation (a bright star's island is round, or as elongated as the PSF).

    Parameters
    ----------
    score_corr : ndarray (ny, nx)
        S_corr times the sign of the detections.
    x, y : ndarray (n,) of int
        Peaks.
    fwhm, elongation : array_like, broadcast to (n,)
        Of P_D: pixels, and major over minor axis.

    Returns
    -------
    ndarray (n,) bool
    """
    if len(x) == 0:
        return np.zeros(0, bool)
    significant = score_corr > 2.0
    labels, n_islands = label(significant, structure=np.ones((3, 3), int))
    island = labels[y, x]
    rows, columns = np.nonzero(significant)
    member = labels[rows, columns]
    area = np.maximum(np.bincount(member, minlength=n_islands + 1), 1)

    def mean(values: NDArray) -> NDArray[np.float64]:
        return np.bincount(member, values, n_islands + 1) / area

    dx, dy = columns - mean(columns)[member], rows - mean(rows)[member]
    xx, yy, xy = mean(dx * dx) + 1 / 12, mean(dy * dy) + 1 / 12, mean(dx * dy)
    middle, spread = 0.5 * (xx + yy), np.hypot(0.5 * (xx - yy), xy)
    # A uniform bar of length L has a variance of L² / 12 along itself.
    length, width = (np.sqrt(12 * np.maximum(v, 1 / 12))[island] for v in (middle + spread, middle - spread))
    return (length > 6 * np.asarray(fwhm)) & (length > 3 * np.asarray(elongation) * width)


def distance_to_pixels(bad: NDArray[np.bool_], x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
    """Distance from positions to the centre of the nearest True pixel, pixels.

    Equal to the distance transform of ``~bad`` at whole positions, at a fraction of its cost: only the rims of bad
    areas are looked at.

    Returns
    -------
    ndarray (n,)
        0 on a bad pixel; inf where there is none in the image.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    rim = bad.copy()
    rim[1:-1, 1:-1] &= ~(bad[:-2, 1:-1] & bad[2:, 1:-1] & bad[1:-1, :-2] & bad[1:-1, 2:])
    rows, columns = np.nonzero(rim)
    if len(rows) == 0 or len(x) == 0:
        return np.full(len(x), np.inf)
    distance, _ = cKDTree(np.column_stack([columns, rows])).query(np.column_stack([x, y]))
    ny, nx = bad.shape
    inside = bad[np.clip(np.rint(y).astype(int), 0, ny - 1), np.clip(np.rint(x).astype(int), 0, nx - 1)]
    return np.where(inside, 0.0, distance)


def without_holes(no_data: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Areas without data that are an edge of the image and not a hole in it: those that hold a square of 9 pixels.

    Outside the image there is no data either, so a strip along its border counts, however narrow.
    Equivalent to ``scipy.ndimage.binary_opening(padded, np.ones((9, 9)))``, a dozen times faster.
    """
    if not no_data.any():
        return no_data
    area = np.pad(no_data, 8, constant_values=True)
    for combine in (np.logical_and, np.logical_or):  # erosion, dilation
        for axis in (0, 1):
            area = _over_nine(combine, area, axis)
    return area


def _over_nine(combine: np.ufunc, area: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    """Combine nine neighbours along an axis; the result is eight pixels shorter."""
    one = np.moveaxis(area, axis, 0)
    two = combine(one[:-1], one[1:])
    four = combine(two[:-2], two[2:])
    eight = combine(four[:-4], four[4:])
    return np.moveaxis(combine(eight[:-1], one[8:]), 0, axis)
