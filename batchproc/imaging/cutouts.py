"""Cutting windows out of images, and rounding stamps to what their noise deserves.

What the planes are, and in which units, is the caller's affair; Zarr is `batchproc.io.stamps`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["cut", "round_to_noise", "windows"]


def windows(image: NDArray, x: ArrayLike, y: ArrayLike, half: int, fill: float = 0.0) -> NDArray:
    """Square windows around whole pixels.

    Equivalent to::

        padded = np.pad(image, half, constant_values=fill)
        np.stack([padded[j : j + 2 * half + 1, i : i + 2 * half + 1] for i, j in zip(x, y)])

    Parameters
    ----------
    image : ndarray (ny, nx)
    x, y : array_like (n,) of int
        Central pixels, 0-based; they may lie outside the image.
    half : int
        The side is ``2 half + 1``.
    fill : float
        Value of pixels outside the image.

    Returns
    -------
    ndarray (n, 2 half + 1, 2 half + 1)
        New array of the image's dtype.
    """
    offsets = np.arange(-half, half + 1)
    rows = np.asarray(y, dtype=np.int64)[:, None, None] + offsets[None, :, None]  # (n, s, 1)
    columns = np.asarray(x, dtype=np.int64)[:, None, None] + offsets[None, None, :]  # (n, 1, s)
    ny, nx = image.shape
    inside = (rows >= 0) & (rows < ny) & (columns >= 0) & (columns < nx)
    cut_out = image[np.clip(rows, 0, ny - 1), np.clip(columns, 0, nx - 1)]
    cut_out[~inside] = fill
    return cut_out


def cut(
    new: NDArray,
    ref: NDArray,
    difference: NDArray,
    x: ArrayLike,
    y: ArrayLike,
    size: int,
    *,
    no_data: NDArray[np.bool_] | NDArray[np.uint8] | None = None,
) -> NDArray[np.float32]:
    """Triplets of stamps, centred on the pixel nearest to each position (halves go to the even one).

    Parameters
    ----------
    new, ref, difference : ndarray (ny, nx)
        Three planes on one grid, in the units that the stamps shall have.
    x, y : array_like (n,)
        Positions in pixels, 0-based, finite.
    size : int
        Side of a stamp in pixels, odd.
    no_data : ndarray (ny, nx) of bool or uint8, optional
        True, or not 0, where the planes hold nothing.

    Returns
    -------
    ndarray (n, 3, size, size) float32
        In the order new, ref, difference; NaN outside the image, where `no_data`, and where a plane itself is NaN.

    Raises
    ------
    ValueError
        When `size` is even or the shapes differ.
    """
    if size % 2 == 0:
        raise ValueError(f"size = {size}: a stamp has an odd side, so that it has a centre")
    planes = (new, ref, difference)
    shapes = {p.shape for p in planes} | (set() if no_data is None else {no_data.shape})
    if len(shapes) != 1:
        raise ValueError(f"the planes must lie on one grid, found shapes {sorted(shapes)}")
    column, row = np.rint(np.asarray(x)).astype(np.int64), np.rint(np.asarray(y)).astype(np.int64)
    stamps = np.empty((len(column), 3, size, size), np.float32)
    for channel, plane in enumerate(planes):
        stamps[:, channel] = windows(plane.astype(np.float32, copy=False), column, row, size // 2, np.nan)
    if no_data is not None:
        empty = windows(no_data, column, row, size // 2, True) != 0
        stamps[np.broadcast_to(empty[:, None], stamps.shape)] = np.nan
    return stamps


def round_to_noise(stamps: NDArray[np.float32], sigma: ArrayLike, fraction: float) -> NDArray[np.float32]:
    """Round stamps to a multiple of a power of two, so that the bits that hold only noise compress away.

    The step is the largest power of two not above ``fraction · sigma``; the error is at most half a step. Rounding adds
    ``step² / 12`` to the variance: with a fraction of 1/16, 0.03 % of it.

    Parameters
    ----------
    stamps : ndarray (n, c, h, w) float32
        Not modified. NaN and infinities stay what they are, and so do values of 2²³ steps and more: their last bit is
        coarser than the step already.
    sigma : array_like, broadcast to (n, c)
        Noise of each stamp and channel, in its units. A channel whose sigma is not positive and finite stays exact.
    fraction : float
        0: everything stays exact.

    Returns
    -------
    ndarray (n, c, h, w) float32
        New array.
    """
    limit = np.broadcast_to(np.asarray(sigma, dtype=np.float64), stamps.shape[:2]) * fraction
    usable = np.isfinite(limit) & (limit > 0)
    exponent = np.frexp(np.where(usable, limit, 1.0))[1] - 1  # 2^exponent <= limit < 2^(exponent + 1), exactly
    usable &= (exponent >= -126) & (exponent <= 103)  # normal float32 steps whose 2^24-fold is still finite
    step = np.ldexp(np.float32(1), np.where(usable, exponent, 0)).astype(np.float32)[:, :, None, None]
    coarse = usable[:, :, None, None] & (np.abs(stamps) < step * np.float32(2**23))  # False for NaN and infinities
    return np.where(coarse, np.round(np.where(coarse, stamps, 0) / step) * step, stamps)
