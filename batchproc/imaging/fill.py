"""Bad pixels replaced by their surroundings, so that an interpolation neither rings nor spreads them."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["dilate", "fill_bad"]


def fill_bad(data: NDArray[np.float32], bad: NDArray[np.bool_], rings: int) -> NDArray[np.float32]:
    """A copy with bad pixels filled from outside in, ring by ring, each by the mean of its known neighbours.

    What lies deeper than so many rings gets the median of the good pixels: no kernel that reaches the good ones touches
    it.
    """
    filled = data.copy()
    ys, xs = np.nonzero(bad)
    filled[ys, xs] = 0.0
    every = max(1, data.size // 100_000)
    good_values = data.ravel()[::every][~bad.ravel()[::every]]
    if good_values.size == 0:
        good_values = data[~bad]
    level = np.median(good_values) if good_values.size else np.float32(0.0)
    _fill_rings(filled, bad.copy(), ys, xs, rings, np.float32(level))
    return filled


@njit(cache=True, nogil=True)
def _fill_rings(filled, bad, ys, xs, rings, level):  # type: ignore[no-untyped-def]
    ny, nx = filled.shape
    values = np.empty(ys.size, np.float32)
    n = ys.size
    for _ in range(rings):
        if n == 0:
            return
        # First the means of all, then all at once, so that the order of pixels does not matter.
        known = 0
        for k in range(n):
            y, x = ys[k], xs[k]
            total, count = 0.0, 0
            for v in range(max(y - 1, 0), min(y + 2, ny)):
                for u in range(max(x - 1, 0), min(x + 2, nx)):
                    if not bad[v, u]:
                        total += filled[v, u]
                        count += 1
            values[k] = total / count if count else np.nan
        left = 0
        for k in range(n):
            y, x = ys[k], xs[k]
            if np.isnan(values[k]):
                ys[left], xs[left] = y, x
                left += 1
            else:
                filled[y, x] = values[k]
                bad[y, x] = False
                known += 1
        n = left
        if known == 0:
            break
    for k in range(n):
        filled[ys[k], xs[k]] = level


@njit(cache=True, nogil=True)
def dilate(bad, reach):  # type: ignore[no-untyped-def]
    """True within `reach` pixels along x and y of a bad pixel."""
    ny, nx = bad.shape
    grown = np.zeros_like(bad)
    row = np.empty(nx, np.bool_)
    for y in range(ny):
        if not bad[y].any():
            continue
        row[:] = False
        for x in range(nx):
            if bad[y, x]:
                row[max(x - reach, 0) : min(x + reach + 1, nx)] = True
        for v in range(max(y - reach, 0), min(y + reach + 1, ny)):
            for x in range(nx):
                grown[v, x] |= row[x]
    return grown
