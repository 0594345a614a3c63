"""What the pixels around a detection say of its nature: dipole, particle hit, trail, and what lies near.

Numbers only, from arrays; the rules that turn them into flags are in `detect`. Windows are cut around the whole pixel
nearest to the source and multiplied by the sign of the detection, so that a source always is a hill.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
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
        Islands are of the sign that it has at a peak.
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
    # Only the pages that hold significant pixels are ever touched.
    xx, yy, xy = _islands(np.ascontiguousarray(score_corr), np.zeros(score_corr.shape, np.int32), x, y, 2.0)
    middle, spread = 0.5 * (xx + yy), np.hypot(0.5 * (xx - yy), xy)
    # A uniform bar of length L has a variance of L² / 12 along itself.
    length, width = (np.sqrt(12 * np.maximum(v, 1 / 12)) for v in (middle + spread, middle - spread))
    return (length > 6 * np.asarray(fwhm)) & (length > 3 * np.asarray(elongation) * width)


@njit(cache=True)
def _islands(score, label, x, y, level):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Second moments of the island of one sign around each position; `label` is 0 and is written to."""
    ny, nx = score.shape
    n = x.size
    area, xx, yy, xy = np.zeros((4, n))
    island = np.empty(n, np.int64)
    stack_x, stack_y = [0], [0]
    for k in range(n):
        island[k] = k if label[y[k], x[k]] == 0 else label[y[k], x[k]] - 1
        if island[k] != k:
            continue
        sign = np.sign(score[y[k], x[k]])
        label[y[k], x[k]] = k + 1
        stack_x.append(x[k])
        stack_y.append(y[k])
        sx = sy = 0.0
        while len(stack_x) > 1:
            i, j = stack_x.pop(), stack_y.pop()
            # relative to the start, so that sums of squares keep their digits
            u, v = float(i - x[k]), float(j - y[k])
            area[k] += 1
            sx, sy = sx + u, sy + v
            xx[k], yy[k], xy[k] = xx[k] + u * u, yy[k] + v * v, xy[k] + u * v
            for row in range(max(j - 1, 0), min(j + 2, ny)):
                for column in range(max(i - 1, 0), min(i + 2, nx)):
                    if label[row, column] == 0 and sign * score[row, column] > level:
                        label[row, column] = k + 1
                        stack_x.append(column)
                        stack_y.append(row)
        sx, sy = sx / area[k], sy / area[k]
        xx[k] = xx[k] / area[k] - sx * sx + 1 / 12
        yy[k] = yy[k] / area[k] - sy * sy + 1 / 12
        xy[k] = xy[k] / area[k] - sx * sy
    return xx[island], yy[island], xy[island]


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
    if len(x) == 0 or not bad.any():
        return np.full(len(x), np.inf)
    rows, columns = _rim(bad)
    distance, _ = cKDTree(np.column_stack([columns, rows])).query(np.column_stack([x, y]))
    ny, nx = bad.shape
    inside = bad[np.clip(np.rint(y).astype(int), 0, ny - 1), np.clip(np.rint(x).astype(int), 0, nx - 1)]
    return np.where(inside, 0.0, distance)


@njit(cache=True)
def _rim(bad):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Rows and columns of the True pixels with a neighbour (of four) that is not, or that lie on the border."""
    ny, nx = bad.shape
    rows, columns = [0], [0]
    for y in range(ny):
        some = 0
        for x in range(nx):  # a count without a branch goes many pixels at a time
            some += bad[y, x]
        if some == 0:
            continue
        for x in range(nx):
            if bad[y, x] and (
                y == 0
                or x == 0
                or y == ny - 1
                or x == nx - 1
                or not (bad[y - 1, x] and bad[y + 1, x] and bad[y, x - 1] and bad[y, x + 1])
            ):
                rows.append(y)
                columns.append(x)
    return np.array(rows)[1:], np.array(columns)[1:]


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
