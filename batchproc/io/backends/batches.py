"""Tensors held against what a file takes, and cut into the batches that it was made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError

__all__ = ["Slot", "check_tensors", "in_batches"]

Tensors = Sequence[NDArray[np.float32]]


@dataclass(frozen=True)
class Slot:
    """An input of a file."""

    name: str
    shape: tuple[int | None, ...]
    """None: of any length. The first axis counts stamps."""

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape fits, however many stamps it has."""
        same = all(mine in (None, its) for mine, its in zip(self.shape[1:], shape[1:], strict=False))
        return same and len(self.shape) == len(shape)


def check_tensors(file: str, slots: Sequence[Slot], tensors: Tensors) -> None:
    """Raise `ModelError` where a file takes other inputs than its card says."""
    if len(slots) != len(tensors):
        names = ", ".join(slot.name for slot in slots)
        raise ModelError(f"{file}: takes {len(slots)} inputs ({names}), its card has {len(tensors)}")
    for slot, tensor in zip(slots, tensors, strict=True):
        if not slot.takes(tensor.shape):
            wanted = ", ".join("n" if k == 0 or length is None else str(length) for k, length in enumerate(slot.shape))
            given = ", ".join(["n", *map(str, tensor.shape[1:])])
            raise ModelError(
                f"{file}: input {slot.name} takes ({wanted}), its card leads to ({given}). Correct size, channels or "
                f"features under [input], or the layout (NCHW, NHWC) there or under [files.VARIANT]"
            )


def in_batches(
    call: Callable[[Tensors], NDArray[np.float32]], tensors: Tensors, batch: int | None
) -> NDArray[np.float32]:
    """The rows that `call` answers, where it only takes `batch` rows at a time; the last batch is filled with zeros.

    Parameters
    ----------
    call : callable
        Takes tensors of `batch` rows, answers as many rows.
    tensors : sequence of ndarray (n, …) float32
    batch : int, optional
        None: any number.

    Returns
    -------
    ndarray (n, …) float32
        ``(n, k)`` where there was a batch to keep to.

    Raises
    ------
    ModelError
        An answer that is not `batch` rows.
    """
    if batch is None:
        return call(tensors)
    n = len(tensors[0])
    rows = [
        _answer(call, [_filled(t[start : start + batch], batch) for t in tensors], batch)
        for start in range(0, n, batch)
    ]
    return np.concatenate(rows)[:n]


def _filled(tensor: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
    short = batch - len(tensor)
    return np.pad(tensor, [(0, short), *[(0, 0)] * (tensor.ndim - 1)]) if short else tensor


def _answer(call: Callable[[Tensors], NDArray[np.float32]], tensors: Tensors, batch: int) -> NDArray[np.float32]:
    out = call(tensors)
    if out.size == 0 or out.size % batch:
        raise ModelError(f"a model with a fixed batch of {batch} stamps answered {out.shape}; expected {batch} rows")
    return out.reshape(batch, -1)
