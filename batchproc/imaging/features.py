"""What the pixels around a detection say of its nature: dipole, smooth patch, trail, and what lies near.

Numbers only, from arrays; the rules that turn them into flags are in `detect`. Windows are cut around the whole pixel
nearest to the source and multiplied by the sign of the detection, so that a source always is a hill.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve
from scipy.spatial import cKDTree

from batchproc.imaging.measure import GAUSSIAN_FWHM
from batchproc.imaging.particles import centre

__all__ = [
    "broad_test",
    "dipole",
    "distance_to_pixels",
    "on_streak",
    "score_response",
    "shift_test",
    "without_holes",
]

_LEVEL = 2.0  #: sigma: what hangs together above it is an island


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


def broad_test(
    data: NDArray, height: NDArray, noise: NDArray, psf: NDArray[np.float64], fwhm: float
) -> NDArray[np.bool_]:
    """Is it a smooth patch of light, rather than a point source?

    Where a galaxy or the sky is not subtracted to the last, what is left is smooth, and a filter much wider than the
    PSF finds more in it: P_D smoothed by a Gaussian of twice its FWHM. As in `particles.delta_test`, a source of score
    s gives that filter ``c s ± √(1 − c²)``; more than that by 3 sigma, and more than s, is no point source.

    Parameters
    ----------
    data : ndarray (n, s, s)
        Windows of D times the sign of the detection, finite, of some 6 FWHM.
    height, noise : ndarray (n,)
        Score of the point source, and its noise.
    psf : ndarray (k, k)
        P_D.
    fwhm : float
        Of P_D, pixels.
    """
    half = data.shape[1] // 2
    point = centre(psf, half)
    broad = centre(gaussian_filter(point, 2 * fwhm / GAUSSIAN_FWHM, mode="constant"), half)
    correlation = np.clip(np.sum(point * broad), 0.0, 1.0)
    score = np.tensordot(data, broad, ([1, 2], [0, 1]))
    return np.asarray((score > height) & (score > correlation * height + 3 * np.sqrt(1 - correlation**2) * noise))


def shift_test(data: NDArray, height: NDArray, slope_x: NDArray, slope_y: NDArray) -> NDArray[np.bool_]:
    """Is it a static star in another place, by a fraction of a pixel, rather than a point source?

    To first order such a star leaves ``δx ∂P_D/∂x + δy ∂P_D/∂y`` at its own place. With the best (δx, δy) that explains
    more of chi-square than a point source anywhere, where it is the cause; of a real source it explains 0.37 at most
    (of a Gaussian, √2 sigma from the star).

    Parameters
    ----------
    data : ndarray (n, s, s)
        Windows of D times the sign of the detection, finite.
    height : ndarray (n,)
        Score of the point source.
    slope_x, slope_y : ndarray (n, s, s)
        Derivatives of P_D at the place of the star.
    """
    xx, yy, xy = (
        np.einsum("nij,nij->n", a, b) for a, b in ((slope_x, slope_x), (slope_y, slope_y), (slope_x, slope_y))
    )
    gx, gy = (np.einsum("nij,nij->n", slope, data) for slope in (slope_x, slope_y))
    determinant = np.maximum(xx * yy - xy**2, 1e-30)
    explained = (gx * gx * yy + gy * gy * xx - 2 * gx * gy * xy) / determinant
    return np.asarray(explained > height**2)


def on_streak(
    score_corr: NDArray, x: NDArray[np.int64], y: NDArray[np.int64], fwhm: ArrayLike, elongation: ArrayLike
) -> NDArray[np.bool_]:
    """Detections that are part of a trail: of a long, straight, narrow island of significance.

    An island is what hangs together above 2 sigma around a detection (diagonal neighbours count), so a trail that the
    threshold cuts to pieces is seen whole. It is a trail when it is longer than 6 FWHM, and as much as 3 times longer
    than wide, beyond the PSF's own elongation (a bright star's island is round, or as elongated as the PSF). Stars in a
    row make long islands too, but hills and no ridge: of a Gaussian of height L, the mean above the level l, over L, is
    ``2 / u²`` for a hill and ``√(2 π) / (2 u)`` for a ridge, with ``u² = 2 ln(L / l)``; a trail has more than their
    geometric mean.

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
    label = np.zeros(score_corr.shape, np.int32)
    mean, top, xx, yy, xy = _islands(np.ascontiguousarray(score_corr), label, x, y, _LEVEL)
    middle, spread = 0.5 * (xx + yy), np.hypot(0.5 * (xx - yy), xy)
    # A uniform bar of length L has a variance of L² / 12 along itself.
    length, width = (np.sqrt(12 * np.maximum(v, 1 / 12)) for v in (middle + spread, middle - spread))
    u2 = 2 * np.log(np.maximum(top / _LEVEL, 1.1))
    ridge = mean / top > np.sqrt(2 / u2 * np.sqrt(2 * np.pi / u2) / 2)
    return (length > 6 * np.asarray(fwhm)) & (length > 3 * np.asarray(elongation) * width) & ridge


@njit(cache=True)
def _islands(score, label, x, y, level):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Mean, top and second moments of the island of one sign around each position; `label` is 0 and is written to."""
    ny, nx = score.shape
    n = x.size
    area, mean, top, xx, yy, xy = np.zeros((6, n))
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
            height = sign * score[j, i]
            mean[k] += height
            top[k] = max(top[k], height)
            sx, sy = sx + u, sy + v
            xx[k], yy[k], xy[k] = xx[k] + u * u, yy[k] + v * v, xy[k] + u * v
            for row in range(max(j - 1, 0), min(j + 2, ny)):
                for column in range(max(i - 1, 0), min(i + 2, nx)):
                    if label[row, column] == 0 and sign * score[row, column] > level:
                        label[row, column] = k + 1
                        stack_x.append(column)
                        stack_y.append(row)
        mean[k] /= area[k]
        sx, sy = sx / area[k], sy / area[k]
        xx[k] = xx[k] / area[k] - sx * sx + 1 / 12
        yy[k] = yy[k] / area[k] - sy * sy + 1 / 12
        xy[k] = xy[k] / area[k] - sx * sy
    return mean[island], top[island], xx[island], yy[island], xy[island]


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
        for start in range(0, nx, 64):
            some = 0
            for x in range(start, min(start + 64, nx)):  # a count without a branch goes many pixels at a time
                some += bad[y, x]
            if some == 0:
                continue
            for x in range(start, min(start + 64, nx)):
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
