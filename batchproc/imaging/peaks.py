"""Peaks, and the pixels that belong to each: what hangs together above a threshold, told apart where it has two tops.

An image is read once, for the pixels above the threshold. All else looks at those alone, highest first: a pixel without
higher neighbours begins a basin, any other joins the basin of its highest neighbour. Where two basins meet, the lower
peak's *prominence* is its height above that saddle; a peak of too little prominence is a bump of the higher one
(Edelsbrunner, Letscher & Zomorodian 2002, doi:10.1007/s00454-002-2885-2: persistence).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["Basins", "find_basins", "local_extrema", "pixels_above", "smooth_above"]

_BLOCK = 64  #: pixels looked at together; most blocks of blank sky hold nothing


@dataclass(frozen=True)
class Basins:
    """Peaks of an image and the pixels that belong to them.

    Attributes
    ----------
    peak : ndarray (n,) int64
        Flat index of each peak, the highest first.
    prominence : ndarray (n,)
        Height of each above the saddle to a higher one; inf where none hangs together with it.
    pixels : ndarray (m,) int64
        Flat indices of the pixels above the threshold, as they were handed in.
    owner : ndarray (m,) int64
        Row in `peak` of the one that each pixel belongs to.
    """

    peak: NDArray[np.int64]
    prominence: NDArray[np.float64]
    pixels: NDArray[np.int64]
    owner: NDArray[np.int64]


def pixels_above(image: NDArray[np.floating], level: float) -> NDArray[np.int64]:
    """Flat indices of the finite pixels whose absolute value exceeds `level`, in the order of the image.

    Equivalent to ``np.flatnonzero((np.abs(image) > level) & np.isfinite(image))``.
    """
    return _above(np.ascontiguousarray(image).ravel(), level)


def smooth_above(
    data: NDArray[np.floating], rms: NDArray[np.floating], mask: NDArray, level: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Pixels above `level` of an image smoothed by ((1, 2, 1), (2, 4, 2), (1, 2, 1)) / 16, in its own noise.

    Equivalent to ``scipy.ndimage.convolve(np.where(mask, 0, data), kernel, mode="constant") / (0.375 * rms) > level``
    where `mask` is zero: 0.375 is the root of the sum of the kernel's squares.

    Returns
    -------
    pixels : ndarray (m,) int64
        Flat indices, in the order of the image.
    significance : ndarray (m,) float32
        Of the smoothed pixel, in sigma of white noise.
    """
    return _smooth_above(
        np.ascontiguousarray(data), np.ascontiguousarray(rms), np.ascontiguousarray(mask), np.float32(level)
    )


def local_extrema(image: NDArray[np.floating], pixels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of these pixels (flat indices) are larger in absolute value than their neighbours of the same sign.

    Of two equal neighbours the first counts.
    """
    return _extrema(np.ascontiguousarray(image), pixels)


def find_basins(
    pixels: NDArray[np.int64],
    value: NDArray[np.floating],
    shape: tuple[int, int],
    *,
    prominence: float,
    fraction: float = 0.0,
) -> Basins:
    """Peaks among pixels above a threshold.

    Parameters
    ----------
    pixels : ndarray (m,) int64
        Flat indices, in the order of the image.
    value : ndarray (m,)
        Their values; where signs differ, pixels are no neighbours, and hills count like hollows.
    shape : (ny, nx)
        Of the image.
    prominence : float
        Least height of a peak above the saddle to a higher one, in the units of `value`.
    fraction : float
        The same, relative to the height of the peak. The highest peak of an island is always kept.
    """
    height = np.abs(value).astype(np.float32)
    order = np.argsort(-height, kind="stable")
    # Only the pages that hold such pixels are ever touched.
    number = np.zeros(shape[0] * shape[1], np.int32)
    peak, found, owner = _flood(pixels, height, value > 0, order, number, shape[0], shape[1], prominence, fraction)
    return Basins(peak, found, pixels, owner)


@njit(cache=True)
def _above(flat, level):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    found = np.empty(1024, np.int64)
    n = 0
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        some = 0
        for i in range(block.size):  # a count without a branch goes many pixels at a time
            some += abs(block[i]) > level
        if some == 0:
            continue
        if n + _BLOCK > found.size:
            found = np.concatenate((found, np.empty(found.size, np.int64)))
        for i in range(block.size):
            if level < abs(block[i]) < np.inf:
                found[n] = start + i
                n += 1
    return found[:n].copy()


@njit(cache=True)
def _smooth_above(data, rms, mask, level):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    ny, nx = data.shape
    found, significance = np.empty(1024, np.int64), np.empty(1024, np.float32)
    n = 0
    zero, two, norm = np.float32(0), np.float32(2), np.float32(1 / 6)  # 16 × 0.375
    rows = np.zeros((3, nx), np.float32)  # above, at, and below the pixel; bad pixels are 0
    column = np.zeros(nx + 2, np.float32)
    ratio = np.zeros(nx, np.float32)
    for y in range(-1, ny):
        above, here, below = rows[(y + 2) % 3], rows[y % 3], rows[(y + 1) % 3]
        if y + 1 < ny:
            for x in range(nx):
                below[x] = data[y + 1, x] if mask[y + 1, x] == 0 else zero
        else:
            below[:] = zero
        if y < 0:
            continue
        for x in range(nx):
            column[x + 1] = above[x] + two * here[x] + below[x]
        for x in range(nx):
            ratio[x] = norm * (column[x] + two * column[x + 1] + column[x + 2]) / rms[y, x]
        for start in range(0, nx, _BLOCK):
            block = ratio[start : start + _BLOCK]
            some = 0
            for i in range(block.size):
                some += block[i] > level
            if some == 0:
                continue
            if n + _BLOCK > found.size:
                found = np.concatenate((found, np.empty(found.size, np.int64)))
                significance = np.concatenate((significance, np.empty(significance.size, np.float32)))
            for i in range(block.size):
                if block[i] > level and mask[y, start + i] == 0:
                    found[n] = y * nx + start + i
                    significance[n] = block[i]
                    n += 1
    return found[:n].copy(), significance[:n].copy()


@njit(cache=True)
def _extrema(image, pixels):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    ny, nx = image.shape
    found = np.zeros(pixels.size, np.bool_)
    for k in range(pixels.size):
        y, x = pixels[k] // nx, pixels[k] % nx
        sign = np.sign(image[y, x])
        top = True
        for j in range(max(y - 1, 0), min(y + 2, ny)):
            for i in range(max(x - 1, 0), min(x + 2, nx)):
                before = j < y or (j == y and i < x)
                other, own = sign * image[j, i], sign * image[y, x]
                if other > own or (before and other == own):
                    top = False
        found[k] = top
    return found


@njit(cache=True)
def _root(parent, k):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    while parent[k] != k:
        parent[k] = parent[parent[k]]
        k = parent[k]
    return k


@njit(cache=True)
def _flood(pixels, height, rising, order, number, ny, nx, least, fraction):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Basins are numbered as they begin, so the lower number has the higher peak. `number`: pixel → its row + 1."""
    m = pixels.size
    basin = np.empty(m, np.int64)
    top = np.empty(m, np.int64)  # basin → row of its peak
    meets = np.empty(m, np.int64)  # union-find: basins that have met, under the highest
    bump_of = np.empty(m, np.int64)  # union-find: bumps, under the peak that they belong to
    prominence = np.full(m, np.inf)
    n = 0
    for row in order:
        y, x = pixels[row] // nx, pixels[row] % nx
        highest = -1
        for j in range(max(y - 1, 0), min(y + 2, ny)):
            for i in range(max(x - 1, 0), min(x + 2, nx)):
                other = number[j * nx + i] - 1
                if other >= 0 and rising[other] == rising[row] and (highest < 0 or height[other] > height[highest]):
                    highest = other
        number[pixels[row]] = row + 1
        if highest < 0:
            basin[row], top[n], meets[n], bump_of[n] = n, row, n, n
            n += 1
            continue
        basin[row] = basin[highest]
        for j in range(max(y - 1, 0), min(y + 2, ny)):
            for i in range(max(x - 1, 0), min(x + 2, nx)):
                other = number[j * nx + i] - 1
                if other < 0 or rising[other] != rising[row]:
                    continue
                one, two = _root(meets, basin[row]), _root(meets, basin[other])
                if one == two:
                    continue
                lower, higher = max(one, two), min(one, two)
                meets[lower] = higher
                peak = height[top[lower]]
                prominence[lower] = peak - height[row]
                if prominence[lower] < max(least, fraction * peak):
                    beside = basin[other] if lower == one else basin[row]
                    bump_of[lower] = _root(bump_of, beside)
    kept = np.full(n, -1, np.int64)
    peaks, heights = np.empty(n, np.int64), np.empty(n)
    n_kept = 0
    for b in range(n):
        if bump_of[b] == b:
            kept[b] = n_kept
            peaks[n_kept], heights[n_kept] = pixels[top[b]], prominence[b]
            n_kept += 1
    owner = np.empty(m, np.int64)
    for row in range(m):
        owner[row] = kept[_root(bump_of, basin[row])]
    return peaks[:n_kept].copy(), heights[:n_kept].copy(), owner
