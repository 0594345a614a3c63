"""Image planes as compiled code takes them: one type, one layout, copied only where they must be."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["as_bytes", "native"]


def native(plane: NDArray[Any]) -> NDArray[np.floating]:
    """The plane, C-contiguous and in native byte order: float32 and float64 as they are, anything else as float64."""
    kind = np.float32 if plane.dtype.type is np.float32 else np.float64
    return np.ascontiguousarray(plane, dtype=kind)


def as_bytes(mask: NDArray[Any] | None, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The mask as bytes, non-zero where bad (zeros without one); not copied where it is of bytes already."""
    if mask is None:
        return np.zeros(shape, np.uint8)
    mask = np.ascontiguousarray(mask)
    return mask.view(np.uint8) if mask.dtype.itemsize == 1 else (mask != 0).view(np.uint8)
