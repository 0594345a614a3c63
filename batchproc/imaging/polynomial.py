"""Polynomials over an image, in coordinates that run from -1 to 1 across it, and robust fits of them to stars."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["Frame", "Polynomial", "fit_polynomial", "n_terms", "terms", "terms_at"]


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

    def normalised(self, x: float, y: float) -> tuple[float, float]:
        """(u, v) of one place."""
        u, v = (float(x) - self.x0) / self.x_scale, (float(y) - self.y0) / self.y_scale
        return min(max(u, -self.limit), self.limit), min(max(v, -self.limit), self.limit)


def n_terms(degree: int) -> int:
    """Number of terms of a polynomial in two variables."""
    return (degree + 1) * (degree + 2) // 2


def terms(u: NDArray[np.float64], v: NDArray[np.float64], degree: int) -> NDArray[np.float64]:
    """``u^i v^j``, i + j ≤ degree, i running fastest (1, u, u², v, uv, v² for degree 2): shape (n, n_terms)."""
    return np.stack([u**i * v**j for j in range(degree + 1) for i in range(degree + 1 - j)], axis=-1)


@njit(cache=True)
def terms_at(u, v, degree):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """`terms` of one place: shape (n_terms,)."""
    out = np.empty((degree + 1) * (degree + 2) // 2)
    n = 0
    for j in range(degree + 1):
        for i in range(degree + 1 - j):
            out[n] = u**i * v**j
            n += 1
    return out


@dataclass(frozen=True, eq=False)
class Polynomial:
    """A smooth function of place: ``Σ coefficients · terms``."""

    frame: Frame
    degree: int
    coefficients: NDArray[np.float64]

    def __call__(self, x: NDArray[np.floating] | float, y: NDArray[np.floating] | float) -> NDArray[np.float64]:
        """Values (n,) at pixels (x, y)."""
        return self.frame.terms(x, y, self.degree) @ self.coefficients  # type: ignore[no-any-return]

    def image(self, shape: tuple[int, int]) -> NDArray[np.float32]:
        """Values at every pixel, (ny, nx)."""
        ny, nx = shape
        # One degree at a time along x: Σ_i u^i Σ_j c_ij v^j is a product of two slim matrices.
        v = self.frame.terms(self.frame.x0, np.arange(ny, dtype=np.float64), self.degree)  # (ny, n_terms), u = 0 there
        u = self.frame.terms(np.arange(nx, dtype=np.float64), self.frame.y0, self.degree)
        powers = [(i, j) for j in range(self.degree + 1) for i in range(self.degree + 1 - j)]
        along_y = np.zeros((ny, self.degree + 1))
        for (i, j), c in zip(powers, self.coefficients, strict=True):
            along_y[:, i] += c * v[:, powers.index((0, j))]
        return (along_y.astype(np.float32) @ u[:, : self.degree + 1].T.astype(np.float32)).astype(np.float32)


def fit_polynomial(
    frame: Frame,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    values: NDArray[np.float64],
    variance: NDArray[np.float64],
    max_degree: int,
) -> tuple[Polynomial, float]:
    """Robust polynomial through values measured at stars, of the lowest degree that the stars ask for.

    Parameters
    ----------
    x, y, values, variance : ndarray (n,)
        Pixels; measured values and their errors squared.
    max_degree : int
        Each degree needs ten stars a term, and must predict left-out stars better by 2 % in chi-square.

    Returns
    -------
    polynomial : Polynomial
    excess : float
        Variance of the stars about it beyond their errors (robust, from the better-measured half).
    """
    best, excess, best_score = Polynomial(frame, 0, np.array([np.median(values)])), 0.0, np.inf
    floor = excess_variance(values - np.median(values), variance)
    for degree in range(max_degree + 1):
        if degree > 0 and len(x) < 10 * n_terms(degree):
            break
        basis = frame.terms(x, y, degree)
        fit = np.zeros(n_terms(degree))
        fit[0] = np.median(values)
        spread = floor
        for _ in range(6):
            residual = values - basis @ fit
            spread = excess_variance(residual, variance)
            width2 = variance + spread + 1e-12
            z2 = residual**2 / width2
            weight = np.where(z2 < 16, (1 - z2 / 16) ** 2, 0) / width2
            q, r = np.linalg.qr(basis * np.sqrt(weight)[:, None])
            fit = np.linalg.lstsq(r, q.T @ (values * np.sqrt(weight)), rcond=None)[0]
        # Leave-one-out residual: the plain one over 1 − leverage.
        left_out = (values - basis @ fit) / np.maximum(1 - np.sum(q**2, axis=1), 1e-2)
        score = float(np.sum(np.minimum(left_out**2 / (variance + floor + 1e-12), 16)))
        if score < 0.98 * best_score:
            best, excess, best_score = Polynomial(frame, degree, fit), spread, score
    return best, excess


def excess_variance(residual: NDArray[np.float64], variance: NDArray[np.float64]) -> float:
    """Variance beyond the errors, from the median of the better-measured half."""
    told = variance <= np.median(variance)
    width = 1.4826 * float(np.median(np.abs(residual[told])))
    return max(0.0, width**2 - float(np.median(variance[told])))
