"""Light, or a particle? Light comes through the PSF; a cosmic ray or a hot pixel fills pixels one by one.

Both hypotheses are fitted to D around a detection, where the noise is white, and the one that explains more of it
(in chi-square, less what each of its freedoms may gain by chance) holds. A hot pixel's shape in D is E129 and E133 of
ZOGY (Zackay, Ofek & Gal-Yam 2016, doi:10.3847/0004-637X/830/1/27); a track is a chain of such pixels.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["MARGIN", "delta_test", "track_test"]

#: How far from its peak a track is followed, pixels.
MARGIN = 6
_MISFIT = 0.2  # of the PSF, in the root mean square: what a source is allowed to differ from P_D
_MOST = 14  # pixels of a track, at most: longer ones are streaks


def delta_test(
    data: NDArray, height: NDArray, noise: NDArray, kernel: NDArray[np.float64], psf: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Is it one hot pixel, rather than a point source?

    The score of the best hot pixel is ``max Σ D(x) δ(x − p)`` over places p within a pixel and a half, with δ the shape
    that one hot pixel leaves in D (E129 for new, E133 for ref). A resampled image shows its pixels between those of the
    grid, so the maximum is that of the parabola through the best of nine and its neighbours. Over the score of the PSF
    it exceeds 1 for a hot pixel. How far
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
    reach = data.shape[1] // 2 - 2
    hot, point = centre(kernel, reach), centre(psf, reach)
    correlation = np.clip(np.sum(hot * point), 0.0, 1.0)
    score = _best_pixel(np.ascontiguousarray(data), hot)
    from_source = correlation * height + 3 * np.sqrt(1 - correlation**2) * noise
    return score / height, (score > height) & (score > from_source)


def track_test(data: NDArray, height: NDArray, noise: NDArray, kernel: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Is it a chain of pixels, each with a charge of its own, rather than a point source?

    The chain starts at the best hot pixel and takes, one by one, the neighbour with most left to explain, by 4 sigma at
    least. It stays thin: four pixels in a square are not taken, for four and more could pass for any PSF. With the
    charges a that fit best, it explains ``m · a`` of chi-square (m: the pixels' scores); each pixel after the first may
    have gained 6 by chance, being the best of several. More than what a point source explains, by 9, and by what a PSF
    that is wrong by a fifth leaves, is a track.

    Parameters
    ----------
    data : ndarray (n, s, s)
        Windows of D times the sign of the detection, finite; at least 2 `MARGIN` + 3 pixels wide.
    height, noise
        As in `delta_test`.
    kernel : ndarray (k, k)
        δ of new or of ref.
    """
    reach = data.shape[1] // 2 - MARGIN
    hot = centre(kernel, reach)
    return _tracks(np.ascontiguousarray(data), height, noise, hot, _overlap(hot, 2 * MARGIN))


def centre(kernel: NDArray, half: int) -> NDArray[np.float64]:
    """The central (2 half + 1)² pixels of a kernel, zero-padded where it is smaller, of unit sum of squares."""
    padded = np.pad(kernel, max(half - kernel.shape[0] // 2, 0))
    middle = padded.shape[0] // 2
    core = padded[middle - half : middle + half + 1, middle - half : middle + half + 1]
    return np.asarray(core / np.sqrt(np.sum(core**2)))


@njit(cache=True)
def _scores(window, hot):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Score of a hot pixel at every place of the window that δ fits around."""
    size = hot.shape[0]
    side = window.shape[0] - size + 1
    out = np.zeros((side, side))
    for j in range(side):
        for i in range(side):
            total = 0.0
            for y in range(size):
                for x in range(size):
                    total += window[j + y, i + x] * hot[y, x]
            out[j, i] = total
    return out


@njit(cache=True)
def _best_pixel(data, hot):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Score of the best hot pixel of each window, between the pixels."""
    best = np.zeros(data.shape[0])
    for k in range(data.shape[0]):
        score = _scores(data[k], hot)  # (5, 5)
        y = x = 2
        for j in range(1, 4):
            for i in range(1, 4):
                if score[j, i] > score[y, x]:
                    y, x = j, i
        top = score[y, x]
        best[k] = top
        for before, after in ((score[y, x - 1], score[y, x + 1]), (score[y - 1, x], score[y + 1, x])):
            bend = 2 * top - before - after
            if bend > 0 and abs(after - before) <= bend:  # the parabola's top lies within half a pixel
                best[k] += (after - before) ** 2 / (8 * bend)
    return np.maximum(best, 0.0)


@njit(cache=True)
def _overlap(hot, span):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Autocorrelation of δ up to so many pixels: how far the scores of two pixels are one and the same."""
    out = np.empty((2 * span + 1, 2 * span + 1))
    side = hot.shape[0]
    for j in range(span + 1):
        for i in range(-span, span + 1):
            total = 0.0
            for y in range(max(side - j, 0)):
                for x in range(max(-i, 0), min(side - i, side)):
                    total += hot[y, x] * hot[y + j, x + i]
            out[span + j, span + i] = out[span - j, span - i] = total
    return out


@njit(cache=True)
def _tracks(data, height, noise, hot, overlap):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    n = data.shape[0]
    hit = np.zeros(n, np.bool_)
    for k in range(n):
        explained, pixels = _chain(_scores(data[k], hot), noise[k], overlap)
        by_chance = (9 + 6 * (pixels - 1)) * noise[k] ** 2
        hit[k] = pixels > 1 and explained > (1 + _MISFIT**2) * height[k] ** 2 + by_chance
    return hit


@njit(cache=True)
def _chain(score, noise, overlap):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """What the best thin chain of pixels explains of chi-square, and how many pixels it has."""
    side = score.shape[0]
    middle, span = side // 2, side - 1
    x, y = np.empty(_MOST, np.int64), np.empty(_MOST, np.int64)
    taken = np.zeros((side + 2, side + 2), np.bool_)  # with a rim
    tried = np.zeros((side, side), np.bool_)
    left = score.copy()
    explained, n = 0.0, 0
    while n < _MOST:
        best, at_x, at_y = 4 * noise, -1, -1
        for j in range(side):
            for i in range(side):
                if left[j, i] <= best or tried[j, i]:
                    continue
                if n == 0:
                    allowed = abs(j - middle) <= 1 and abs(i - middle) <= 1
                else:
                    allowed = np.any(taken[j : j + 3, i : i + 3]) and not _squares(taken, j + 1, i + 1)
                if allowed:
                    best, at_x, at_y = left[j, i], i, j
        if at_x < 0:
            break
        x[n], y[n] = at_x, at_y
        tried[at_y, at_x] = taken[at_y + 1, at_x + 1] = True
        n += 1
        charge = _charges(score, x, y, n, overlap)
        while charge.min() < 0:  # one that was taken for its neighbours' charge
            worst = charge.argmin()
            taken[y[worst] + 1, x[worst] + 1] = False
            n -= 1
            x[worst], y[worst] = x[n], y[n]
            charge = _charges(score, x, y, n, overlap)
        explained = 0.0
        for m in range(n):
            explained += charge[m] * score[y[m], x[m]]
        for j in range(side):
            for i in range(side):
                model = 0.0
                for m in range(n):
                    model += charge[m] * overlap[span + j - y[m], span + i - x[m]]
                left[j, i] = score[j, i] - model
    return explained, n


@njit(cache=True)
def _charges(score, x, y, n, overlap):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Charges of the first n pixels that together explain most."""
    span = score.shape[0] - 1
    gram, scores = np.empty((n, n)), np.empty(n)
    for m in range(n):
        scores[m] = score[y[m], x[m]]
        for k in range(n):
            gram[m, k] = overlap[span + y[m] - y[k], span + x[m] - x[k]]
    return np.linalg.solve(gram, scores)


@njit(cache=True)
def _squares(taken, j, i):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Whether pixel (j, i) would be the fourth of a square."""
    for v in (-1, 1):
        for u in (-1, 1):
            if taken[j + v, i] and taken[j, i + u] and taken[j + v, i + u]:
                return True
    return False
