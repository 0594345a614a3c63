"""Peaks of an image binned 2×2: all that choosing stars needs to know of the sources of an image, in one look at it.

Deep enough to see what blends with a star of S/N 20, and nothing more: no shapes, no segments, no deblending. What a
peak is, is decided in `stars`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["PEAK", "find_peaks", "plain"]

#: Columns of `find_peaks`.
PEAK = np.dtype([("x", "i4"), ("y", "i4"), ("peak", "f4"), ("light", "f4"), ("snr", "f4")])

#: Height of a peak in sigma of a binned pixel.
_THRESHOLD = 5.0
#: And above the mean of the 16 binned pixels two away, in sigma with the light's own photons: the wings of bright stars
#: are bumpy, too.
_CONTRAST = 3.0


def find_peaks(
    data: NDArray[np.floating], rms: NDArray[np.floating], bad: NDArray[np.bool_] | None
) -> NDArray[np.void]:
    """Local maxima of the image binned 2×2.

    Parameters
    ----------
    data : ndarray (ny, nx) float32
        Background-subtracted image in electrons; what is not finite counts as bad.
    rms : ndarray (ny, nx) float32
        Sky noise of a pixel.
    bad : ndarray (ny, nx) bool or None
        Pixels to leave out; a binned pixel with one of them counts as sky.

    Returns
    -------
    structured ndarray (n,) of dtype `PEAK`
        ``x, y``: the brightest pixel; ``peak``, its height; ``light``, the sum of the 6×6 pixels about it; ``snr``, of
        the binned pixel against the sky. By rows, from left to right.
    """
    if min(data.shape) < 12:
        return np.zeros(0, dtype=PEAK)
    binned = np.empty((data.shape[0] // 2, data.shape[1] // 2), dtype=np.float32)
    _bin(data, np.zeros((1, 1), dtype=np.bool_) if bad is None else bad, bad is not None, binned)
    found = np.empty((1 + binned.size // 4, 5), dtype=np.float32)
    n = _maxima(binned, data, rms, found)
    table = np.zeros(n, dtype=PEAK)
    for k, name in enumerate(PEAK.names or ()):
        table[name] = found[:n, k]
    return table


def plain(array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """The array as compiled loops know it (C order, writeable): itself where it can be, else a copy."""
    out = np.ascontiguousarray(array, dtype=dtype)
    return out if out.flags.writeable else out.copy()


@njit(cache=True)
def _bin(data, bad, masked, binned):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    ny, nx = binned.shape
    for j in range(ny):
        a, b, out = data[2 * j], data[2 * j + 1], binned[j]
        for i in range(nx):
            value = (a[2 * i] + a[2 * i + 1]) + (b[2 * i] + b[2 * i + 1])
            out[i] = value if abs(value) < np.inf else np.float32(0.0)
        if masked:
            c, d = bad[2 * j], bad[2 * j + 1]
            for i in range(nx):
                if c[2 * i] | c[2 * i + 1] | d[2 * i] | d[2 * i + 1]:
                    out[i] = np.float32(0.0)


@njit(cache=True)
def _maxima(binned, data, rms, found):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    ny, nx = binned.shape
    n = 0
    for j in range(2, ny - 2):
        for i in range(2, nx - 2):
            value = binned[j, i]
            sigma = 2.0 * rms[2 * j, 2 * i]
            if not value > _THRESHOLD * sigma:
                continue
            # Of equal neighbours the last one wins.
            highest = True
            for b in range(-1, 2):
                for a in range(-1, 2):
                    after = b > 0 or (b == 0 and a > 0)
                    other = binned[j + b, i + a]
                    if other > value or (after and other == value):
                        highest = False
            if not highest:
                continue
            box = around = 0.0
            for b in range(-2, 3):
                for a in range(-2, 3):
                    if abs(a) == 2 or abs(b) == 2:
                        around += binned[j + b, i + a]
                    else:
                        box += binned[j + b, i + a]
            if value - around / 16.0 < _CONTRAST * np.sqrt(sigma * sigma + value):
                continue
            x, y, peak = 2 * i, 2 * j, -np.inf
            for v in range(2 * j - 1, 2 * j + 3):
                for u in range(2 * i - 1, 2 * i + 3):
                    if data[v, u] > peak and binned[v // 2, u // 2] != 0.0:
                        x, y, peak = u, v, data[v, u]
            if n < found.shape[0]:
                found[n, 0], found[n, 1], found[n, 2] = x, y, peak
                found[n, 3], found[n, 4] = box, value / sigma
                n += 1
    return n
