"""From stamps to the tensor a model takes: the only place where that happens.

Training, calibration of quantised models and inference all call `to_tensor`, so a model never sees pixels prepared in
another way than those it learnt from. Which recipe a model wants is named in its card. What to do with a stamp that
has too little to judge is decided here too: it is *not scored*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from batchproc.learning.conventions import SIGNS, to_convention
from batchproc.learning.noise_log import NO_DATA_LIMIT, crop_and_scale, noise_log

__all__ = [
    "CHANNELS",
    "LAYOUTS",
    "NORMALISATIONS",
    "NO_DATA_LIMIT",
    "SCALES",
    "SIGNS",
    "TRUNCATED",
    "crop_or_pad",
    "overlap",
    "to_tensor",
]

#: The channels of a stamp, in the order in which the pipeline cuts them.
CHANNELS = ("new", "ref", "difference")
#: Orders of the axes of a tensor: n stamps, c channels, h rows, w columns.
LAYOUTS = ("NCHW", "NHWC")
#: Sizes of a tensor's pixels in those of the stamp.
SCALES = ((1,), (1, 2))
#: Where a stamp goes that the edge of an image has cut off (one that is not square): with its middle on the tensor's,
#: or with its first pixel on the tensor's first, so that rows are missing at the bottom and columns at the right, which
#: is how those who score ZTF's alerts pad them.
TRUNCATED = ("centre", "corner")

Normalisation = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def to_tensor(
    stamps: NDArray[np.floating],
    *,
    size: int,
    normalisation: str,
    channels: Sequence[str] = CHANNELS,
    layout: str = "NCHW",
    min_finite: float = 0.5,
    truncated: str = "centre",
    padding: float = 0.0,
    sky: float = 0.0,
    sign: str = "new-ref",
    scales: Sequence[int] = (1,),
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Prepare a chunk of stamps for a model.

    Parameters
    ----------
    stamps : ndarray (n, 3, h, w)
        New, reference, difference, un-normalised; NaN, infinite or beyond `NO_DATA_LIMIT` where there is no data.
        Not modified. Any type of number, in any order of bytes.
    size : int
        Side of the model's input in pixels. The candidate is taken to sit at ``(h // 2, w // 2)``; what is larger is
        cropped around it, what is smaller padded with "no data".
    normalisation : str
        A name in `NORMALISATIONS`.
    channels : sequence of str
        Channels that the model takes, in its order, out of `CHANNELS`.
    layout : {"NCHW", "NHWC"}
    min_finite : float
        A stamp is scored only if in *each* channel (that the model takes, or its normalisation needs: "noise-log" all
        three) at least this fraction of the pixels that the model looks at hold data, and at least one of them.
    truncated : {"centre", "corner"}
        Where stamps with ``h != w`` go, see `TRUNCATED`. Square ones are centred always.
    padding : float
        What stands, *after* normalising, where the tensor reaches beyond the stamp.
    sky : float
        In units of new's noise, what stamps without a sky are given, see `batchproc.learning.conventions`.
    sign : {"new-ref", "positive"}
        Of the difference, see there.
    scales : (1,) or (1, 2)
        With "noise-log": the channels in pixels of so many of the stamp's, one scale after the other, around the same
        middle. The second shows what is around, twice as far.

    Returns
    -------
    tensor : ndarray (n, c, size, size) or (n, size, size, c) float32
        Always finite; pixels of the stamp without data hold 0, which every recipe here makes "empty sky". Zeros
        throughout for stamps that are not scored.
    scored : ndarray (n,) bool
        False: too little data; whatever a model makes of it is not a score.

    Raises
    ------
    ValueError
        An unknown normalisation, channel, layout, sign, set of scales or place of truncated stamps, one that does not
        go with another, or stamps that are not ``(n, 3, h, w)`` or no real numbers.
    """
    _check_name("normalisation", normalisation, NORMALISATIONS)
    _check_name("layout", layout, LAYOUTS)
    _check_name("sign", sign, SIGNS)
    scales = tuple(scales)
    if scales not in SCALES or (scales != SCALES[0] and (normalisation != "noise-log" or padding)):
        raise ValueError(f"scales {scales}: known are {SCALES}, the latter with noise-log and without padding")
    if stamps.ndim != 4 or stamps.shape[1] != len(CHANNELS):
        raise ValueError(f"stamps of shape {stamps.shape}; expected (n, {len(CHANNELS)}, h, w): {', '.join(CHANNELS)}")
    if stamps.dtype.kind not in "fiub":
        raise ValueError(f"stamps of type {stamps.dtype}; expected real numbers")
    if stamps.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):  # such as the big-endian ones of FITS
        stamps = stamps.astype(np.float32)
    order = tuple(_channel_index(name) for name in channels)
    needed, places = max(1.0, min_finite * size * size), _places(stamps.shape, size, truncated)
    if sky or sign != SIGNS[0]:
        stamps = to_convention(stamps, sky=sky, sign=sign)
    if normalisation == "noise-log":
        wide = _places(stamps.shape, 2 * size + 1, truncated) if scales != SCALES[0] else None
        tensor, scored = crop_and_scale(
            stamps, *places, size=size, order=order, needed=needed, last=layout == "NHWC", wide=wide
        )
    else:
        pixels = crop_or_pad(stamps, size, truncated=truncated)  # a copy: (n, 3, size, size)
        if tuple(channels) != CHANNELS:
            pixels = np.ascontiguousarray(pixels[:, order])
        filler = np.float32(np.inf if normalisation in _TOLD_OF_FILLERS else np.nan)
        scored = _blank_the_unusable(pixels, needed, filler)
        tensor = NORMALISATIONS[normalisation](pixels)
        tensor = np.ascontiguousarray(tensor.transpose(0, 2, 3, 1)) if layout == "NHWC" else tensor
    if padding:
        _fill_around(tensor, scored, *places, padding, last=layout == "NHWC")
    return tensor, scored


def _check_name(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def crop_or_pad(stamps: NDArray[np.floating], size: int, *, truncated: str = "centre") -> NDArray[np.float32]:
    """Copy of stamps ``(n, c, h, w)`` as ``(n, c, size, size)`` float32 with pixel ``(h // 2, w // 2)`` at the middle.

    Equivalent to padding with NaN without end and cutting ``size`` pixels around the centre: the same candidate gives
    the same input whatever the size of the stamp it came in. Values beyond float32 become infinite. With `truncated`
    "corner", stamps with ``h != w`` lose nothing and are padded at the bottom and right only, where they are smaller.
    """
    n, c = stamps.shape[:2]
    (rows, rows_in), (columns, columns_in) = _places(stamps.shape, size, truncated)
    whole = (rows.stop - rows.start, columns.stop - columns.start) == (size, size)
    out = np.empty((n, c, size, size), np.float32) if whole else np.full((n, c, size, size), np.nan, np.float32)
    with np.errstate(over="ignore"):
        out[:, :, rows, columns] = stamps[:, :, rows_in, columns_in]
    return out


def _places(shape: tuple[int, ...], size: int, truncated: str) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Of rows and of columns: where those of stamps ``(n, c, h, w)`` land in a tensor, and which of them do."""
    _check_name("place of truncated stamps", truncated, TRUNCATED)
    h, w = shape[2:]
    at_the_corner = truncated == "corner" and h != w
    return _overlap(h, size, at_the_corner), _overlap(w, size, at_the_corner)


def _overlap(length: int, size: int, at_the_corner: bool) -> tuple[slice, slice]:
    """Where a stretch of `length` pixels lands in one of `size`, and which of its pixels do."""
    shift = length // 2 - size // 2
    return overlap(max(0, shift) if at_the_corner else shift, length, size)


def overlap(shift: int, length: int, size: int) -> tuple[slice, slice]:
    """Where `length` pixels land in `size` if pixel k there is pixel k + `shift` here, and which of them do."""
    start, stop = max(0, -shift), min(size, length - shift)
    return slice(start, stop), slice(start + shift, stop + shift)


def _fill_around(
    tensor: NDArray[np.float32],
    scored: NDArray[np.bool_],
    rows: tuple[slice, slice],
    columns: tuple[slice, slice],
    padding: float,
    *,
    last: bool,
) -> None:
    """Write `padding` wherever the tensor of a scored stamp reaches beyond the stamp."""
    size = tensor.shape[2]
    around = np.ones((size, size), np.bool_)
    around[rows[0], columns[0]] = False
    if around.any():
        where = around[..., None] if last else around
        np.copyto(tensor, np.float32(padding), where=scored[:, None, None, None] & where)


def _channel_index(name: str) -> int:
    _check_name("channel", name, CHANNELS)
    return CHANNELS.index(name)


@njit(cache=True, nogil=True)
def _blank_the_unusable(pixels: NDArray[np.float32], needed: float, filler: np.float32) -> NDArray[np.bool_]:
    """Make NaN of every pixel without data, and 0 of whole stamps with fewer than `needed` good ones in a channel.

    What is infinite or beyond `NO_DATA_LIMIT` becomes `filler`.
    """
    n, c = pixels.shape[:2]
    flat = pixels.reshape(n, c, -1)
    scored = np.ones(n, np.bool_)
    for i in range(n):
        for j in range(c):
            good = 0
            for k in range(flat.shape[2]):
                value = flat[i, j, k]
                is_good = abs(value) < NO_DATA_LIMIT  # False for NaN
                good += is_good
                flat[i, j, k] = filler if abs(value) >= NO_DATA_LIMIT else value
            if good < needed:
                scored[i] = False
        if not scored[i]:
            flat[i] = np.float32(0.0)
    return scored


# --- The recipes: (n, c, size, size) float32 with NaN where there is no data → the same shape, finite -----------------

#: Recipes for which it matters how a survey marks blank pixels: to these, infinite is what was infinite or beyond
#: `NO_DATA_LIMIT`.
_TOLD_OF_FILLERS = frozenset({"ztf-row-l2"})


def _plain(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pixels as they are, 0 for no data (LSST's meas_transiNet: with the channels difference, new, ref)."""
    return np.where(np.isnan(pixels), np.float32(0.0), pixels)


def _row_l2(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row of each channel over its own Euclidean norm."""
    return _over_norm(pixels.reshape(-1, pixels.shape[3]), np.inf).reshape(pixels.shape)


def _ztf_row_l2(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Like `_row_l2`, but 0 for rows with a norm that overflows float32 (braai d6_m7: the ``drb`` of ZTF's packets).

    ZTF fills blank pixels of templates with −3.4e38. Its norms are made in float32, so that one such pixel makes the
    norm of its row infinite and the row 0; NaN counts as 0. On this ``drb`` was trained, and depends.
    """
    return _over_norm(pixels.reshape(-1, pixels.shape[3]), float(np.finfo(np.float32).max)).reshape(pixels.shape)


def _image_l2(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each channel over its own Euclidean norm (braai d6_m9, ACAI, BTSbot)."""
    n, c, size, _ = pixels.shape
    return _over_norm(pixels.reshape(n * c, size * size), np.inf).reshape(pixels.shape)


@njit(cache=True, nogil=True)
def _over_norm(vectors: NDArray[np.float32], limit: float) -> NDArray[np.float32]:
    """Vectors ``(m, k)`` over their Euclidean norms, 0 for NaN; all 0 where the norm is, or its square beyond `limit`.

    Summed in float64: the square of a large pixel overflows float32.
    """
    out = np.zeros_like(vectors)
    for i in range(vectors.shape[0]):
        total = _sum_of_squares(vectors[i])
        if 0.0 < total <= limit:
            norm = np.sqrt(total)
            for k in range(vectors.shape[1]):
                value = vectors[i, k]
                out[i, k] = np.float64(value) / norm if value == value else 0.0
    return out


# May be reordered by the compiler, but NaN must keep its meaning; with an index, see `batchproc.learning.noise_log`.
@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _sum_of_squares(values: NDArray[np.float32]) -> float:
    total = 0.0
    for k in range(values.size):
        value = values[k]
        v = np.float64(value) if value == value else 0.0  # NaN differs from itself
        total += v * v
    return total


def _min_max(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each channel less its least pixel, then over its largest: 0 to 1 (ALeRCE's stamp classifier)."""
    n, c, size, _ = pixels.shape
    return _zero_to_one(pixels.reshape(n * c, size * size)).reshape(pixels.shape)


@njit(cache=True, nogil=True)
def _zero_to_one(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """``(x − min) / (max − min)`` of each row of ``(m, k)``, in float64; 0 for NaN and for constant rows."""
    out = np.zeros_like(images)
    for i in range(images.shape[0]):
        low, high = np.inf, -np.inf
        for value in images[i]:
            low = min(low, value) if value == value else low  # NaN differs from itself
            high = max(high, value) if value == value else high
        if high > low:
            for k in range(images.shape[1]):
                value = images[i, k]
                out[i, k] = (np.float64(value) - low) / (high - low) if value == value else 0.0
    return out


#: Recipes by name. A card names one of these; to add one is to add a function here.
NORMALISATIONS: dict[str, Normalisation] = {
    "none": _plain,
    "row-l2": _row_l2,
    "ztf-row-l2": _ztf_row_l2,
    "image-l2": _image_l2,
    "min-max": _min_max,
    "noise-log": noise_log,
}
