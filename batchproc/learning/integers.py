"""Between numbers and the 8-bit integers of quantised models: value = scale × (integer − zero point).

The scale and the zero point belong to a tensor of a model's file; who reads them from there is `batchproc.io.backends`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import DTypeLike, NDArray

__all__ = ["activation_steps", "dequantise", "quantise", "weight_scales"]


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


def activation_steps(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of int8 that reach from `low` to `high`, and hold 0 exactly.

    Nothing between is clipped by more than half a step. Where both are 0, the scale is 1.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    # The smallest normal float32 and upwards: runtimes divide by it.
    scale = max((high - low) / 255, float(np.finfo(np.float32).tiny)) if high > low else 1.0
    scale = float(np.float32(scale))
    return scale, int(np.clip(np.rint(-128 - low / scale), -128, 127))


def weight_scales(
    weights: NDArray[np.float32], bias: NDArray[np.float32], scale_in: float, axis: int | None
) -> NDArray[np.float32]:
    """Scales of int8 weights in −127 … 127, without a zero point.

    Parameters
    ----------
    weights : ndarray
    bias : ndarray (channels,)
        Is held in int32 and steps of ``scale_in`` × scale: where weights are so small that it would not fit, the scale
        is larger than they need.
    scale_in : float
        Of what they are multiplied with.
    axis : int, optional
        That counts channels: a scale for each; None: one for all.

    Returns
    -------
    ndarray (channels,) or (1,) float32
        Positive; 1 for channels whose weights are all 0.
    """
    others = tuple(k for k in range(weights.ndim) if k != axis) if axis is not None else None
    largest = np.abs(weights.astype(np.float64)).max(axis=others).reshape(-1) / 127
    offsets = (
        np.abs(bias.astype(np.float64)) if axis is not None else np.abs(bias.astype(np.float64)).max(keepdims=True)
    )
    needed = np.maximum(largest, offsets / (scale_in * 2.0**30))
    return np.where(needed > 0, np.maximum(needed, np.finfo(np.float32).tiny), 1.0).astype(np.float32)


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
