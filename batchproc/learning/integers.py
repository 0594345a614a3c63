"""Between numbers and the 8-bit integers of quantised models: value = scale × (integer − zero point).

The scale and the zero point belong to a tensor of a model's file; who reads them from there is `batchproc.io.backends`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import DTypeLike, NDArray

__all__ = ["dequantise", "quantise"]


def quantise(
    values: NDArray[np.float32], scale: float, zero_point: int, dtype: DTypeLike = np.int8
) -> NDArray[np.integer]:
    """The nearest integers, halves to the even one; what lies beyond the type's range takes its end.

    Equivalent to ``clip(rint(values / scale) + zero_point, smallest, largest)``, in one pass.

    Parameters
    ----------
    values : ndarray, float32
        Of any shape, finite. Not modified.
    scale : float
        Of one step; positive.
    zero_point : int
        The integer that stands for 0.
    dtype : {int8, uint8}

    Returns
    -------
    ndarray of `dtype`
        The shape of `values`.

    Raises
    ------
    ValueError
        A scale that is not positive.
    """
    _check(scale)
    limits = np.iinfo(np.dtype(dtype))
    out = np.empty(values.shape, dtype)
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    low, high = np.float32(limits.min - zero_point), np.float32(limits.max - zero_point)
    _round(flat, np.float32(scale), low, high, np.float32(zero_point), out.reshape(-1))
    return out


def dequantise(integers: NDArray[np.integer], scale: float, zero_point: int) -> NDArray[np.float32]:
    """The numbers that 8-bit integers stand for: ``scale * (integers − zero_point)``, float32, of the same shape.

    Raises
    ------
    ValueError
        A scale that is not positive.
    """
    _check(scale)
    return (integers.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)


def _check(scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"scale = {scale}: must be positive")


@njit(cache=True, nogil=True)
def _round(
    values: NDArray[np.float32],
    scale: np.float32,
    low: np.float32,
    high: np.float32,
    zero: np.float32,
    out: NDArray[np.integer],
) -> None:
    for k in range(values.size):
        out[k] = np.int32(min(max(np.rint(values[k] / scale), low), high) + zero)
