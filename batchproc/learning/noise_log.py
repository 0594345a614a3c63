"""The recipe "noise-log": stamps scaled by their noise and compressed, in one pass over their pixels.

Nothing of the survey's units, gain or depth is left. Each channel loses its sky and is divided by the noise of the
stamp (both from pixels within 3 sigma, iterated): the difference by its own, new and reference by one and the same, the
quadratic sum of theirs, so that a star that did not change looks alike in both. Then the range is compressed as asinh
would do it, see `compress`.

`noise_log` is the recipe on pixels that are cropped and blanked already, as every recipe of
`batchproc.learning.inputs` takes them. `crop_and_scale` does the same from the stamps as they are cut to the tensor as
it is laid out: a stamp stays in the processor's cache from its first pixel to its last.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["NO_DATA_LIMIT", "compress", "crop_and_scale", "noise_log"]

#: A pixel of this size or larger is no measurement: some surveys fill blank pixels with −3.4e38, whose square
#: overflows float32.
NO_DATA_LIMIT = 1e30
#: A mean of nine pixels one of which is no measurement is this or more, or NaN.
_NO_MEAN = NO_DATA_LIMIT / 100


def noise_log(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The recipe on new, ref, difference ``(n, 3, size, size)``, NaN where there is no data; see the module."""
    n, c, size, _ = pixels.shape
    return _noise_scaled(pixels.reshape(n, c, size * size)).reshape(pixels.shape)


def crop_and_scale(
    stamps: NDArray[np.floating],
    rows: tuple[slice, slice],
    columns: tuple[slice, slice],
    *,
    size: int,
    order: tuple[int, ...],
    needed: float,
    last: bool,
    wide: tuple[tuple[slice, slice], tuple[slice, slice]] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Crop, blank, `noise_log` and layout in one pass.

    Equivalent to copying the stamps into ``(n, 3, size, size)``, making NaN of what is no measurement, 0 of stamps with
    too few good pixels, `noise_log` of that, and choosing and ordering channels and axes.

    Parameters
    ----------
    stamps : ndarray (n, 3, h, w)
        New, reference, difference. Not modified.
    rows, columns : tuple of slice
        Where the stamps' land in the tensor, and which of them do.
    size : int
    order : tuple of int
        Channels of the tensor, as numbers in those of the stamps.
    needed : float
        Good pixels that each channel must have.
    last : bool
        Channels last: NHWC.
    wide : (rows, columns), optional
        Where the stamps' pixels land in a square of ``2 size + 1`` around the same middle, each as `rows` and
        `columns`. That square follows as further channels, in pixels of twice the size: the mean over 3 × 3 of its
        pixels, of those with data, around every second one. Sky and noise are those of the channel; such means of white
        noise have a third of it, and are therefore taken three times.

    Returns
    -------
    tensor : ndarray (n, c, size, size) or (n, size, size, c) float32
    scored : ndarray (n,) bool
    """
    n, c = len(stamps), len(order) * (1 if wide is None else 2)
    shape = (n, size, size, c) if last else (n, c, size, size)
    tensor, scored = np.empty(shape, np.float32), np.empty(n, np.bool_)
    places = np.array([_corners(rows, columns), _corners(*(wide or (rows, columns)))])
    numbers = np.array(order, np.int64)
    _fused(stamps, places, size, numbers, needed, last, wide is not None, tensor.reshape(n, c * size**2), scored)
    return tensor, scored


def _corners(rows: tuple[slice, slice], columns: tuple[slice, slice]) -> tuple[int, ...]:
    """Top, bottom, left and right in a square; top and left in the stamps."""
    (to_y, from_y), (to_x, from_x) = rows, columns
    return to_y.start, to_y.stop, to_x.start, to_x.stop, from_y.start, from_x.start


@njit(cache=True, nogil=True)
def _fused(
    stamps: NDArray[np.floating],
    places: NDArray[np.int64],
    size: int,
    order: NDArray[np.int64],
    needed: float,
    last: bool,
    wide: bool,
    out: NDArray[np.float32],
    scored: NDArray[np.bool_],
) -> None:
    n_pixels, side = size * size, 2 * size + 1
    c_out = order.size * (2 if wide else 1)
    pixels = np.full((3, n_pixels), np.float32(np.nan))  # around the stamps it stays so
    square = np.full((side, side) if wide else (0, 0), np.float32(np.nan))
    whole = places[1, 1] - places[1, 0] == side and places[1, 3] - places[1, 2] == side
    from_top, from_left = places[1, 4:]
    sums, means, row = np.empty(side, np.float32), np.empty(n_pixels, np.float32), np.empty(n_pixels, np.float32)
    sky, noise = np.empty(3), np.empty(3)
    for i in range(stamps.shape[0]):
        scored[i] = True
        for c in range(3):
            _place(stamps[i, c], places[0], size, pixels[c])
            if _blank(pixels[c]) < needed:
                scored[i] = False
        if not scored[i]:
            out[i] = np.float32(0.0)
            continue
        for c in range(3):
            sky[c], noise[c] = sky_and_noise(pixels[c])
        noise[0] = noise[1] = np.sqrt(noise[0] * noise[0] + noise[1] * noise[1])
        for k in range(c_out):
            c, scale = order[k % order.size], 1.0
            values = pixels[c]
            if k >= order.size:
                values, scale = means, 3.0
                if whole:
                    _means(stamps[i, c], from_top, from_left, size, sums, means)
                else:
                    _place(stamps[i, c], places[1], side, square.reshape(-1))
                    _means(square, 0, 0, size, sums, means)
            if last:
                compress(values, sky[c], noise[c] / scale, row)
                for j in range(n_pixels):
                    out[i, j * c_out + k] = row[j]
            else:
                compress(values, sky[c], noise[c] / scale, out[i, k * n_pixels : (k + 1) * n_pixels])


@njit(cache=True, nogil=True)
def _place(stamp: NDArray[np.floating], places: NDArray[np.int64], side: int, out: NDArray[np.float32]) -> None:
    """Write the pixels of a stamp to where they lie in a square around its middle."""
    top, bottom, left, right, from_top, from_left = places
    for y in range(top, bottom):
        values = stamp[from_top + y - top, from_left : from_left + right - left]
        _copy(values, out[y * side + left : y * side + right])


@njit(cache=True, nogil=True)
def _means(
    plane: NDArray[np.floating], top: int, left: int, size: int, sums: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """Means over 3 × 3 pixels around every second one of a square of ``2 size + 1``; NaN where none has data."""
    right = left + 2 * size + 1
    for j in range(size):
        # Rows first, then parts of them: these are contiguous, which of a slice along both axes is not known.
        above, middle = plane[top + 2 * j][left:right], plane[top + 2 * j + 1][left:right]
        below = plane[top + 2 * j + 2][left:right]
        for x in range(sums.size):
            sums[x] = np.float32(above[x]) + np.float32(middle[x]) + np.float32(below[x])
        row = out[j * size : (j + 1) * size]
        for i in range(size):
            k = np.uint64(2 * i)  # of an index without sign the compiler knows that it does not count from the end
            row[i] = (sums[k] + sums[k + np.uint64(1)] + sums[k + np.uint64(2)]) * np.float32(1 / 9)
    bad = 0
    for n in range(out.size):
        bad += not abs(out[n]) < np.float32(_NO_MEAN)
    if bad:
        for n in range(out.size):
            if not abs(out[n]) < np.float32(_NO_MEAN):
                y, x = top + 2 * (n // size), left + 2 * (n % size)
                out[n] = _mean_of_the_good(plane[y : y + 3, x : x + 3])


@njit(cache=True, nogil=True)
def _mean_of_the_good(nine: NDArray[np.floating]) -> float:
    count, total = 0, 0.0
    for y in range(3):
        for x in range(3):
            value = nine[y, x]
            good = abs(value) < NO_DATA_LIMIT  # False for NaN
            count += good
            total += value if good else 0.0
    return total / count if count else np.nan


@njit(cache=True, nogil=True)
def _copy(values: NDArray[np.floating], out: NDArray[np.float32]) -> None:
    for k in range(values.size):
        out[k] = values[k]


@njit(cache=True, nogil=True)
def _blank(values: NDArray[np.float32]) -> int:
    """Make NaN of what is no measurement; returns how many are left."""
    good = 0
    for k in range(values.size):
        value = values[k]
        is_good = abs(value) < np.float32(NO_DATA_LIMIT)  # False for NaN
        good += is_good
        values[k] = value if is_good else np.float32(np.nan)
    return good


@njit(cache=True, nogil=True)
def _noise_scaled(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    out = np.empty_like(pixels)
    for i in range(pixels.shape[0]):
        sky_new, noise_new = sky_and_noise(pixels[i, 0])
        sky_ref, noise_ref = sky_and_noise(pixels[i, 1])
        sky_difference, noise_difference = sky_and_noise(pixels[i, 2])
        noise = np.sqrt(noise_new * noise_new + noise_ref * noise_ref)
        compress(pixels[i, 0], sky_new, noise, out[i, 0])
        compress(pixels[i, 1], sky_ref, noise, out[i, 1])
        compress(pixels[i, 2], sky_difference, noise_difference, out[i, 2])
    return out


@njit(cache=True, nogil=True)
def sky_and_noise(values: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and standard deviation of the pixels within 3 sigma of the mean, iterated until none is dropped; no NaN."""
    low, high = -NO_DATA_LIMIT, NO_DATA_LIMIT
    previous = values.size + 1
    mean, sigma = 0.0, 0.0
    for _ in range(30):
        count, total, squares = _sums(values, low, high)
        if count == 0 or count == previous:
            break
        previous = count
        mean = total / count
        sigma = np.sqrt(max(squares / count - mean * mean, 0.0))
        low, high = mean - 3.0 * sigma, mean + 3.0 * sigma
    return mean, sigma


# The sums may be reordered by the compiler, but NaN must keep its meaning. Counted with an index: of ``for value in
# values`` the compiler does not see that it could take several pixels at a time, and is six times slower.
@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _sums(values: NDArray[np.float32], low: float, high: float) -> tuple[int, float, float]:
    """How many pixels lie between the bounds; their sum, and that of their squares."""
    count, total, squares = 0, 0.0, 0.0
    for k in range(values.size):
        value = values[k]
        inside = (value > low) & (value < high)  # False for NaN
        v = np.float64(value) if inside else 0.0
        count += inside
        total += v
        squares += v * v
    return count, total, squares


@njit(cache=True, nogil=True)
def compress(values: NDArray[np.float32], sky: float, noise: float, out: NDArray[np.float32]) -> None:
    """Write ``±(e + m)`` with ``1 + |v| = 2**e (1 + m)``, 0 ≤ m < 1, and ``v = (values − sky) / noise``; 0 for NaN.

    That is log2(1 + |v|) joined by straight lines at the powers of two: v itself up to one sigma, never further than
    0.09 from the logarithm, rising throughout. It is read off the bits of the float32, and so costs no logarithm.
    Clipped at ``|v| = 1e6``.
    """
    scale = np.float32(1.0 / noise) if noise > 0 else np.float32(0.0)
    offset = np.float32(sky)
    for k in range(values.size):
        v = (values[k] - offset) * scale
        size = min(abs(v), np.float32(1e6))
        out[k] = np.float32(1.0) + size if size >= 0 else np.float32(1.0)  # NaN compares false
    bits = out.view(np.int32)
    for k in range(values.size):
        magnitude = np.float32(bits[k] - np.int32(0x3F800000)) * np.float32(2.0**-23)
        out[k] = magnitude if values[k] >= offset else -magnitude
