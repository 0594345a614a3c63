"""A batch of stamps that several models look at: what they want to see is made once for all that want the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.io.cards import InputCard

__all__ = ["Prepared"]


class Prepared:
    """Stamps in memory, and the tensors that were made of them.

    Stands where the stamps themselves would: `batchproc.io.models.Model.predict` takes it whole.

    Parameters
    ----------
    stamps : ndarray (n, 3, h, w)
        Not to be changed any more.
    """

    def __init__(self, stamps: NDArray[np.floating]) -> None:
        self.stamps = stamps
        self._made: dict[InputCard, tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}

    def __len__(self) -> int:
        return len(self.stamps)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, 3, h, w)``."""
        return self.stamps.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.stamps, dtype=dtype)

    def tensor(self, wanted: InputCard) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """What `InputCard.prepare` gives, made once; whoever gets it leaves it as it is."""
        recipe = replace(wanted, features=())
        if recipe not in self._made:
            self._made[recipe] = recipe.prepare(self.stamps)
        return self._made[recipe]
