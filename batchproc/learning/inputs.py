"""From stamps to the tensor a model takes: the only place where that happens.

Training, calibration of quantised models and inference all call `to_tensor`, so a model never sees pixels prepared in
another way than those it learnt from. Which recipe a model wants is named in its card. What to do with a stamp that
has too little to judge is decided here too: it is *not scored*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["CHANNELS", "LAYOUTS", "NORMALISATIONS", "NO_DATA_LIMIT", "crop_or_pad", "to_tensor"]

#: The channels of a stamp, in the order in which the pipeline cuts them.
CHANNELS = ("new", "ref", "difference")
#: Orders of the axes of a tensor: n stamps, c channels, h rows, w columns.
LAYOUTS = ("NCHW", "NHWC")
#: A pixel of this size or larger is no measurement: some surveys fill blank pixels with −3.4e38, whose square
#: overflows float32.
NO_DATA_LIMIT = 1e30

Normalisation = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def to_tensor(
    stamps: NDArray[np.floating],
    *,
    size: int,
    normalisation: str,
    channels: Sequence[str] = CHANNELS,
    layout: str = "NCHW",
    min_finite: float = 0.5,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Prepare a chunk of stamps for a model.

    Parameters
    ----------
    stamps : ndarray (n, 3, h, w)
        New, reference, difference, un-normalised; NaN, infinite or beyond `NO_DATA_LIMIT` where there is no data.
        Not modified.
    size : int
        Side of the model's input in pixels. The candidate is taken to sit at ``(h // 2, w // 2)``; what is larger is
        cropped around it, what is smaller padded with "no data".
    normalisation : str
        A name in `NORMALISATIONS`.
    channels : sequence of str
        Channels that the model takes, in its order, out of `CHANNELS`.
    layout : {"NCHW", "NHWC"}
    min_finite : float
        A stamp is scored only if in *each* channel at least this fraction of the pixels that the model looks at hold
        data, and at least one of them.

    Returns
    -------
    tensor : ndarray (n, c, size, size) or (n, size, size, c) float32
        Always finite; pixels without data hold 0, which every recipe here makes "empty sky". Zeros throughout for
        stamps that are not scored.
    scored : ndarray (n,) bool
        False: too little data; whatever a model makes of it is not a score.

    Raises
    ------
    ValueError
        An unknown normalisation, channel or layout, or stamps that are not ``(n, 3, h, w)``.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"unknown normalisation {normalisation!r}; known: {', '.join(NORMALISATIONS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if stamps.ndim != 4 or stamps.shape[1] != len(CHANNELS):
        raise ValueError(f"stamps of shape {stamps.shape}; expected (n, {len(CHANNELS)}, h, w): {', '.join(CHANNELS)}")
    pixels = crop_or_pad(stamps, size)  # a copy: (n, 3, size, size)
    if tuple(channels) != CHANNELS:
        pixels = np.ascontiguousarray(pixels[:, [_channel_index(name) for name in channels]])
    scored = _blank_the_unusable(pixels, max(1.0, min_finite * size * size))
    tensor = NORMALISATIONS[normalisation](pixels)
    return (np.ascontiguousarray(tensor.transpose(0, 2, 3, 1)) if layout == "NHWC" else tensor), scored


def crop_or_pad(stamps: NDArray[np.floating], size: int) -> NDArray[np.float32]:
    """Copy of stamps ``(n, c, h, w)`` as ``(n, c, size, size)`` float32 with pixel ``(h // 2, w // 2)`` at the middle.

    Equivalent to padding with NaN without end and cutting ``size`` pixels around the centre: the same candidate gives
    the same input whatever the size of the stamp it came in. Values beyond float32 become infinite.
    """
    n, c, h, w = stamps.shape
    rows, rows_in = _overlap(h, size)
    columns, columns_in = _overlap(w, size)
    whole = (rows.stop - rows.start, columns.stop - columns.start) == (size, size)
    out = np.empty((n, c, size, size), np.float32) if whole else np.full((n, c, size, size), np.nan, np.float32)
    with np.errstate(over="ignore"):
        out[:, :, rows, columns] = stamps[:, :, rows_in, columns_in]
    return out


def _overlap(length: int, size: int) -> tuple[slice, slice]:
    """Where a stretch of `length` pixels lands in one of `size`, and which of its pixels do."""
    shift = length // 2 - size // 2  # pixel k of the output is pixel k + shift of the input
    start, stop = max(0, -shift), min(size, length - shift)
    return slice(start, stop), slice(start + shift, stop + shift)


def _channel_index(name: str) -> int:
    if name not in CHANNELS:
        raise ValueError(f"unknown channel {name!r}; known: {', '.join(CHANNELS)}")
    return CHANNELS.index(name)


@njit(cache=True, nogil=True)
def _blank_the_unusable(pixels: NDArray[np.float32], needed: float) -> NDArray[np.bool_]:
    """Make NaN of every pixel without data, and 0 of whole stamps with fewer than `needed` good ones in a channel."""
    n, c = pixels.shape[:2]
    flat = pixels.reshape(n, c, -1)
    scored = np.ones(n, np.bool_)
    for i in range(n):
        for j in range(c):
            good = 0
            for k in range(flat.shape[2]):
                is_good = abs(flat[i, j, k]) < NO_DATA_LIMIT  # False for NaN
                good += is_good
                flat[i, j, k] = flat[i, j, k] if is_good else np.float32(np.nan)
            if good < needed:
                scored[i] = False
        if not scored[i]:
            flat[i] = np.float32(0.0)
    return scored


# --- The recipes: (n, c, size, size) float32 with NaN where there is no data → the same shape, finite -----------------


def _plain(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pixels as they are, 0 for no data."""
    return np.where(np.isnan(pixels), np.float32(0.0), pixels)


def _l2(pixels: NDArray[np.float32], axes: tuple[int, ...]) -> NDArray[np.float32]:
    values = _plain(pixels)
    # In float64: the square of a large pixel overflows float32.
    norm = np.sqrt(np.sum(np.square(values, dtype=np.float64), axis=axes, keepdims=True))
    return (values / np.where(norm > 0, norm, 1.0)).astype(np.float32)


def _row_l2(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row of each channel over its own Euclidean norm (braai d6_m7, the ``drb`` of ZTF's alert packets)."""
    return _l2(pixels, (3,))


def _image_l2(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each channel over its own Euclidean norm (braai d6_m9, ACAI, BTSbot)."""
    return _l2(pixels, (2, 3))


def _noise_log(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Noise-scaled and compressed: nothing of the survey's units, gain or depth is left.

    Each channel loses its sky and is divided by the noise of the stamp (both from pixels within 3 sigma, iterated):
    the difference by its own, new and reference by one and the same, the quadratic sum of theirs, so that a star that
    did not change looks alike in both. Then the range is compressed as asinh would do it, see `_compress`.
    """
    n, c, size, _ = pixels.shape
    return _noise_scaled(pixels.reshape(n, c, size * size)).reshape(pixels.shape)


@njit(cache=True, nogil=True)
def _noise_scaled(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    out = np.empty_like(pixels)
    for i in range(pixels.shape[0]):
        sky_new, noise_new = _sky_and_noise(pixels[i, 0])
        sky_ref, noise_ref = _sky_and_noise(pixels[i, 1])
        sky_difference, noise_difference = _sky_and_noise(pixels[i, 2])
        noise = np.sqrt(noise_new * noise_new + noise_ref * noise_ref)
        _compress(pixels[i, 0], sky_new, noise, out[i, 0])
        _compress(pixels[i, 1], sky_ref, noise, out[i, 1])
        _compress(pixels[i, 2], sky_difference, noise_difference, out[i, 2])
    return out


# The sums below may be reordered by the compiler (that makes them fast), but NaN must keep its meaning.
@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _sky_and_noise(values: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and standard deviation of the pixels within 3 sigma of the mean, iterated until none is dropped; no NaN."""
    low, high = -NO_DATA_LIMIT, NO_DATA_LIMIT
    previous = values.size + 1
    mean, sigma = 0.0, 0.0
    for _ in range(30):
        count, total, squares = 0, 0.0, 0.0
        for value in values:
            inside = (value > low) & (value < high)  # False for NaN
            v = np.float64(value) if inside else 0.0
            count += inside
            total += v
            squares += v * v
        if count == 0 or count == previous:
            break
        previous = count
        mean = total / count
        sigma = np.sqrt(max(squares / count - mean * mean, 0.0))
        low, high = mean - 3.0 * sigma, mean + 3.0 * sigma
    return mean, sigma


@njit(cache=True, nogil=True)
def _compress(values: NDArray[np.float32], sky: float, noise: float, out: NDArray[np.float32]) -> None:
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


#: Recipes by name. A card names one of these; to add one is to add a function here.
NORMALISATIONS: dict[str, Normalisation] = {
    "none": _plain,
    "row-l2": _row_l2,
    "image-l2": _image_l2,
    "noise-log": _noise_log,
}
