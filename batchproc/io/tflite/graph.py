"""A network as TFLite sees it: tensors, and operators in the order in which they run; no file, no runtime.

Images are channels-last ``(n, rows, columns, channels)``, weights ``(out, rows, columns, in)``, dense ones
``(out, in)``. The first axis of everything that is not constant counts stamps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Graph", "Operator", "Steps", "Tensor"]


@dataclass(frozen=True)
class Steps:
    """How the integers of a tensor stand for numbers: value = scale × (integer − zero point)."""

    scale: NDArray[np.float32]
    """One, or one for each index along `axis`."""
    zero_point: int = 0
    axis: int = 0


@dataclass(frozen=True)
class Tensor:
    """What an operator takes or gives."""

    name: str
    shape: tuple[int, ...]
    """Without the first axis, that of the stamps, where there are no `data`."""
    data: NDArray[Any] | None = None
    """Of a constant."""
    dtype: type[Any] = np.float32
    steps: Steps | None = None


@dataclass(frozen=True)
class Operator:
    """One of TFLite's, by its name there: ``CONV_2D``."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """By their names in TFLite's schema; enumerations by the names of their values."""


@dataclass(frozen=True)
class Graph:
    """A network."""

    tensors: Mapping[str, Tensor]
    operators: tuple[Operator, ...]
    """None comes before what it takes."""
    inputs: tuple[str, ...]
    output: str

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is part of the file, not computed."""
        return self.tensors[name].data is not None

    @property
    def activations(self) -> tuple[str, ...]:
        """The tensors that are given or computed."""
        return tuple(name for name in self.tensors if not self.is_constant(name))
