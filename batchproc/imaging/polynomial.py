"""Polynomials over an image, in coordinates that run from -1 to 1 across it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Frame", "n_terms", "terms"]


@dataclass(frozen=True)
class Frame:
    """Normalised coordinates: ``u = (x - x0) / x_scale``, held within ``±limit``.

    A polynomial knows nothing beyond the stars that made it, so places outside count as the nearest place inside.
    """

    x0: float
    y0: float
    x_scale: float
    y_scale: float
    limit: float = 1.0

    @classmethod
    def of_image(cls, shape: tuple[int, int]) -> Frame:
        """-1 to 1 from edge to edge."""
        ny, nx = shape
        return cls((nx - 1) / 2, (ny - 1) / 2, max(nx / 2, 1.0), max(ny / 2, 1.0))

    def terms(
        self, x: NDArray[np.floating] | float, y: NDArray[np.floating] | float, degree: int
    ) -> NDArray[np.float64]:
        """Values (n, `n_terms`) of the terms at pixels (x, y)."""
        u = np.clip((np.atleast_1d(np.asarray(x, dtype=np.float64)) - self.x0) / self.x_scale, -self.limit, self.limit)
        v = np.clip((np.atleast_1d(np.asarray(y, dtype=np.float64)) - self.y0) / self.y_scale, -self.limit, self.limit)
        return terms(u, v, degree)


def n_terms(degree: int) -> int:
    """Number of terms of a polynomial in two variables."""
    return (degree + 1) * (degree + 2) // 2


def terms(u: NDArray[np.float64], v: NDArray[np.float64], degree: int) -> NDArray[np.float64]:
    """``u^i v^j``, i + j ≤ degree, i running fastest (1, u, u², v, uv, v² for degree 2): shape (n, n_terms)."""
    return np.stack([u**i * v**j for j in range(degree + 1) for i in range(degree + 1 - j)], axis=-1)
