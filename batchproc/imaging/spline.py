"""A smooth vector field through scattered, noisy points: a polynomial and a penalised spline, as stiff as they ask for.

P-splines (Eilers & Marx 1996, Statist. Sci. 11, 89; doi:10.1214/ss/1038425655): cubic B-splines on an even grid whose
coefficients may not bend much from one to the next. How much is decided by the points themselves, each predicted by all
the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

__all__ = ["SmoothField", "fit_smooth_field", "spline_values"]

#: Stiffnesses that are tried, stiffest first, in units of the data's weight on an average coefficient.
STIFFNESS = 10.0 ** np.arange(4, -4.5, -0.5)
#: Pull of the spline to zero, against its bending: where there are no points, it comes back within some two cells.
PULL = 0.05
#: Cells of the spline along each side at most; fewer where points are few.
MAX_CELLS = 12
POINTS_PER_CELL = 3
#: Losses of single points count up to this many sigma, squared.
CLIP = 5.0


@dataclass(frozen=True)
class SmoothField:
    """What was fitted.

    Attributes
    ----------
    polynomial : ndarray (2, n_terms)
        Coefficients of the terms that were given.
    spline : ndarray (2, n_y, n_x)
        Coefficients of the B-splines, see `spline_values`.
    left_out : ndarray (n, 2)
        Value of each point minus what the others predict for it.
    gain : float
        How much better points are predicted with the spline than without, in sigma of that difference.
    error2, error2_where : float
        Variance of the field by its own account (that of the data and the stiffness), averaged over the points and over
        the places where it is wanted: larger where there are no points.
    """

    polynomial: NDArray[np.float64]
    spline: NDArray[np.float64]
    left_out: NDArray[np.float64]
    gain: float
    error2: float
    error2_where: float


def fit_smooth_field(
    xy: NDArray[np.float64],
    values: NDArray[np.float64],
    variance: NDArray[np.float64],
    terms: NDArray[np.float64],
    shape: tuple[int, int],
    where: NDArray[np.float64],
    terms_where: NDArray[np.float64],
) -> SmoothField:
    """Fit polynomial terms and a spline at once, the spline's stiffness by leave-one-out cross-validation.

    Parameters
    ----------
    xy : ndarray (n, 2)
        Points, pixels.
    values : ndarray (n, 2)
        The field at these points.
    variance : ndarray (n,)
        Of each component of a value.
    terms : ndarray (n, n_terms)
        The polynomial's terms at the points; these are not penalised.
    shape : (int, int)
        (ny, nx) of the image that the spline covers.
    where : ndarray (m, 2)
        Places where the field is wanted.
    terms_where : ndarray (m, n_terms)
        The polynomial's terms there.

    Notes
    -----
    All stiffnesses are tried at the cost of one: the data's and the penalty's quadratic forms are diagonalised
    together, and a point is predicted without itself by its residual over ``1 - h``, h its leverage.
    """
    n_terms = terms.shape[1]
    n_cells = int(np.clip(np.sqrt(len(xy) / POINTS_PER_CELL), 3, MAX_CELLS))
    weight = 1 / np.maximum(variance, 1e-12)
    design = np.concatenate([terms, _basis(xy, shape, n_cells)], axis=1)
    data_form = (design * weight[:, None]).T @ design
    penalty = np.zeros_like(data_form)
    n_splines = (n_cells + 3) ** 2
    penalty[n_terms:, n_terms:] = _roughness(n_cells + 3) * weight.sum() / n_splines
    # penalty v = share (data + penalty) v: share 0 is not penalised at all, 1 not constrained by data.
    ridge = 1e-9 * np.trace(data_form) / len(data_form) * np.eye(len(data_form))
    share, vectors = scipy.linalg.eigh(penalty, data_form + penalty + ridge)
    share = np.clip(share, 0.0, 1.0)
    modes = design @ vectors  # (n, m)
    amplitude = (modes * weight[:, None]).T @ values  # (m, 2)

    def predict(stiffness: float) -> tuple[NDArray, NDArray, NDArray]:
        damping = 1 / np.maximum((1 - share) + stiffness * share, 1e-12)
        leverage = weight * (modes**2 @ damping)
        residual = values - modes @ (damping[:, None] * amplitude)
        left_out = residual / np.maximum(1 - leverage, 1e-3)[:, None]
        loss = np.minimum(left_out**2 * weight[:, None], CLIP**2).sum(axis=1)
        return damping, left_out, loss

    stiff = predict(1e12)[2]
    tried = [predict(stiffness) for stiffness in STIFFNESS]
    damping, left_out, loss = min(tried, key=lambda result: float(result[2].mean()))
    better = stiff - loss
    gain = float(better.mean() / max(better.std() / np.sqrt(len(xy)), 1e-12))
    solution = (vectors @ (damping[:, None] * amplitude)).T
    spline = solution[:, n_terms:].reshape(2, n_cells + 3, n_cells + 3)
    modes_where = np.concatenate([terms_where, _basis(where, shape, n_cells)], axis=1) @ vectors
    error2, error2_where = (float(np.mean(m**2 @ damping)) for m in (modes, modes_where))
    return SmoothField(solution[:, :n_terms], spline, left_out, gain, error2, error2_where)


def spline_values(
    coefficients: NDArray[np.float64], x: NDArray, y: NDArray, shape: tuple[int, int]
) -> NDArray[np.float64]:
    """``(2, …)``: the spline at pixels (x, y); beyond the image, what it is at its edge.

    Parameters
    ----------
    coefficients : ndarray (2, n_y + 3, n_x + 3)
        Of uniform cubic B-splines over n_y × n_x cells that share the image evenly.
    """
    i, wx = _cubic_weights(x, shape[1], coefficients.shape[2] - 3)
    j, wy = _cubic_weights(y, shape[0], coefficients.shape[1] - 3)
    out = np.zeros((2, *np.shape(x)))
    for b in range(4):
        for a in range(4):
            out += coefficients[:, j + b, i + a] * (wy[b] * wx[a])
    return out


def _cubic_weights(x: NDArray, length: int, n_cells: int) -> tuple[NDArray[np.intp], list[NDArray[np.float64]]]:
    """The first of the four B-splines that are not zero at x, and the values of these."""
    u = np.clip((np.asarray(x, np.float64) + 0.5) / length, 0.0, 1.0) * n_cells
    i = np.minimum(u.astype(np.intp), n_cells - 1)
    t = u - i
    return i, [
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    ]


def _basis(xy: NDArray, shape: tuple[int, int], n_cells: int) -> NDArray[np.float64]:
    """(n, (n_cells + 3)²): every B-spline at every point."""
    side = n_cells + 3
    i, wx = _cubic_weights(xy[:, 0], shape[1], n_cells)
    j, wy = _cubic_weights(xy[:, 1], shape[0], n_cells)
    basis = np.zeros((len(xy), side * side))
    rows = np.arange(len(xy))
    for b in range(4):
        for a in range(4):
            basis[rows, (j + b) * side + i + a] = wy[b] * wx[a]
    return basis


def _roughness(side: int) -> NDArray[np.float64]:
    """Quadratic form of second differences along both axes, and of the size, of side × side coefficients."""
    second = np.diff(np.eye(side), 2, axis=0)
    bending = second.T @ second
    one = np.eye(side)
    return np.kron(one, bending) + np.kron(bending, one) + PULL * np.eye(side * side)
