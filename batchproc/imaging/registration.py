"""How far two images of the same stars are apart, and how well that is known.

Stars of both (`starlist`) are matched and compared; a low polynomial describes the displacement where they call for
one, and a smooth field on top of it (`spline`) where they call for that. What scatter remains beyond the noise of their
centroids is the registration error of ZOGY (E30).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

from batchproc.imaging.spline import fit_smooth_field, spline_values
from batchproc.imaging.starlist import Stars, match_stars

__all__ = ["Registration", "measure_registration", "polynomial_terms", "register"]

#: Median of chi-square with one degree of freedom.
MEDIAN_CHI2 = 0.4549364
#: A field of its own is looked for with so many stars and more …
MIN_FIELD_STARS = 80
#: … and accepted where stars are predicted by the others so many sigma better than by the polynomial alone.
MIN_FIELD_GAIN = 3.0


@dataclass(frozen=True)
class Registration:
    """Displacement of ref against new over the image, on new's grid.

    A star at (x, y) in new is at (x + dx, y + dy) in ref as it has been mapped onto new's grid. Call it for (dx, dy).

    Attributes
    ----------
    coefficients : ndarray (2, n_terms) float64
        Of dx and dy in pixels, for ``u^i v^j`` with ``i + j <= degree`` (see `polynomial_terms`).
    degree : int
        -1 for none: the stars call for no correction.
    shape : (int, int)
        (ny, nx) of new; u and v run from -1 to 1 over it.
    rms_x, rms_y : float
        Registration error in pixels that is left after the correction: scatter of the stars beyond the noise of their
        centroids, and the error of the correction itself.
    n_matches : int
        Stars that were compared.
    spline : ndarray (2, n_y, n_x) float64 or None
        Coefficients of the smooth field on top of the polynomial (`spline_values`), where the stars call for one.
    """

    coefficients: NDArray[np.float64]
    degree: int
    shape: tuple[int, int]
    rms_x: float
    rms_y: float
    n_matches: int
    spline: NDArray[np.float64] | None = None

    def __call__(self, x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(dx, dy) in pixels at (x, y) of new."""
        x, y = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
        dx, dy = np.moveaxis(polynomial_terms(x, y, self.degree, self.shape) @ self.coefficients.T, -1, 0)
        if self.spline is None:
            return dx, dy
        more_x, more_y = spline_values(self.spline, x, y, self.shape)
        return dx + more_x, dy + more_y

    @property
    def significant(self) -> bool:
        """Whether the stars call for a correction."""
        return self.degree >= 0 or self.spline is not None

    @property
    def size_xy(self) -> tuple[float, float]:
        """Rms of dx and of dy over the image, pixels."""
        dx, dy = self(*_grid(self.shape).T)
        return float(np.sqrt(np.mean(dx**2))), float(np.sqrt(np.mean(dy**2)))

    @property
    def size(self) -> float:
        """Rms length of the correction over the image, pixels."""
        return float(np.hypot(*self.size_xy))


def register(
    new: Stars, ref_on_new: Stars, shape: tuple[int, int], radius: float, *, where: NDArray[np.float64] | None = None
) -> Registration:
    """Match and measure in turn, until the matches stay the same.

    Parameters
    ----------
    new, ref_on_new : Stars
        Both in pixels of new.
    shape : (int, int)
        Of new.
    radius : float
        Largest distance of a match, pixels.
    where : ndarray (m, 2), optional
        See `measure_registration`.
    """
    registration = _nothing(shape, 0)
    # The polynomial finds the matches; the field, which costs more, comes last.
    for field, most in ((False, 8), (True, 2)):
        before: tuple[NDArray, NDArray] | None = None
        for _ in range(most):
            dx, dy = registration(new.x, new.y)
            pairs = match_stars(new.xy + np.column_stack([dx, dy]), ref_on_new.xy, radius)
            if before is not None and all(np.array_equal(*same) for same in zip(before, pairs, strict=True)):
                break
            i, j = before = pairs
            sigma = np.hypot(new.sigma[i], ref_on_new.sigma[j])
            registration = measure_registration(new.xy[i], ref_on_new.xy[j], sigma, shape, where=where, field=field)
    return registration


def measure_registration(
    xy_new: NDArray[np.float64],
    xy_ref_on_new: NDArray[np.float64],
    sigma: NDArray[np.float64],
    shape: tuple[int, int],
    *,
    max_degree: int = 3,
    where: NDArray[np.float64] | None = None,
    field: bool = True,
) -> Registration:
    """Displacement of matched stars as a polynomial of the degree that they call for, and a smooth field if they do.

    The degree is that of the least BIC, among no correction at all and those with at least four stars a coefficient
    whose error, averaged over `where`, is smaller than the scatter of one star (stars in one corner say nothing about
    the other). Outliers are left out by Tukey's biweight. A field on top of the polynomial of the highest degree is
    taken where it predicts each star from the others significantly better (`fit_smooth_field`).

    Parameters
    ----------
    xy_new, xy_ref_on_new : ndarray (n, 2)
        Matched positions, pixels of new.
    sigma : ndarray (n,)
        Centroid noise of the pair, pixels, the same along x and y.
    shape : (int, int)
        (ny, nx) of new.
    max_degree : int
        0 to 3.
    where : ndarray (m, 2), optional
        Points of new where the correction is wanted (where the two overlap); default the whole image.
    field : bool
        Whether to look for a field beyond the polynomial.
    """
    n = len(xy_new)
    if n < 3:
        return _nothing(shape, n)
    where = _grid(shape) if where is None or len(where) == 0 else where
    displacement = xy_ref_on_new - xy_new
    degrees = [d for d in range(max_degree + 1) if d == 0 or n >= 4 * _n_terms(d)]
    degrees = [d for d in degrees if d == 0 or _mean_leverage(xy_new, d, shape, where) < 1]
    keep = _inliers(xy_new, displacement, sigma, degrees[-1], shape)
    if keep.sum() < 3:
        return _nothing(shape, n)
    xy, displacement, sigma = xy_new[keep], displacement[keep], sigma[keep]
    fits = [_Fit.of(xy, displacement, sigma, degree, shape, where) for degree in (-1, *degrees)]
    best = min(fits, key=lambda fit: fit.bic)
    # Where nothing is corrected, a common offset may still hide in the noise: its error counts.
    error2 = (best if best.degree >= 0 else fits[1]).error2
    rms_x, rms_y = np.sqrt(best.excess2 + error2)
    found = Registration(best.coefficients, best.degree, shape, float(rms_x), float(rms_y), int(keep.sum()))
    if not field or degrees[-1] < 3 or keep.sum() < MIN_FIELD_STARS:
        return found
    with_field = _with_field(xy, displacement, sigma, fits[-1], shape, where)
    better = with_field is not None and np.hypot(with_field.rms_x, with_field.rms_y) < np.hypot(rms_x, rms_y)
    return with_field if with_field is not None and better else found


def _with_field(
    xy: NDArray, displacement: NDArray, sigma: NDArray, cubic: _Fit, shape: tuple[int, int], where: NDArray
) -> Registration | None:
    """A cubic and a smooth field; None where the stars are predicted no better for it."""
    extra2 = float(np.mean(cubic.excess2))
    terms_where = polynomial_terms(where[:, 0], where[:, 1], cubic.degree, shape)
    for _ in range(2):  # weights and scatter depend on each other
        terms = polynomial_terms(xy[:, 0], xy[:, 1], cubic.degree, shape)
        variance = sigma**2 + extra2 + 1e-8
        fit = fit_smooth_field(xy, displacement, variance, terms, shape, where, terms_where)
        if fit.gain < MIN_FIELD_GAIN:
            return None
        # How far off the others predict each star: scatter and error of the field together.
        excess2 = np.array([_robust_excess2(r, sigma, 1.0) for r in fit.left_out.T])
        extra2 = float(np.mean(excess2))
        n_stars = len(xy)
        keep = (fit.left_out**2).sum(axis=1) < 25 * (sigma**2 + extra2 + 1e-8)
        xy, displacement, sigma = xy[keep], displacement[keep], sigma[keep]
    rms_x, rms_y = np.sqrt(excess2 + max(fit.error2_where - fit.error2, 0.0))
    return Registration(fit.polynomial, cubic.degree, shape, float(rms_x), float(rms_y), n_stars, fit.spline)


def polynomial_terms(x: NDArray, y: NDArray, degree: int, shape: tuple[int, int]) -> NDArray[np.float64]:
    """``(…, n_terms)``: u^i v^j with i + j <= degree, u and v from -1 to 1 over the image; no terms for degree -1."""
    u = (2 * x - (shape[1] - 1)) / shape[1]
    v = (2 * y - (shape[0] - 1)) / shape[0]
    terms = [u**i * v**j for i in range(degree + 1) for j in range(degree + 1 - i)]
    return np.stack(terms, axis=-1) if terms else np.empty((*x.shape, 0))


@dataclass(frozen=True)
class _Fit:
    """A weighted least-squares polynomial, with the scatter beyond the noise as part of the model."""

    degree: int
    coefficients: NDArray[np.float64]  # (2, n_terms)
    excess2: NDArray[np.float64]  # (2,) variance beyond the centroid noise, robust, along x and y
    error2: float  # variance of the polynomial, averaged over the overlap
    bic: float

    @classmethod
    def of(
        cls,
        xy: NDArray,
        displacement: NDArray,
        sigma: NDArray,
        degree: int,
        shape: tuple[int, int],
        where: NDArray,
    ) -> _Fit:
        terms = polynomial_terms(xy[:, 0], xy[:, 1], degree, shape)
        n, p = terms.shape
        extra2, minus_two_log_l = 0.0, 0.0
        for _ in range(3):  # weights and scatter depend on each other
            coefficients, covariance = _solve(terms, displacement, sigma**2 + extra2)
            residual = displacement - terms @ coefficients.T
            extra2, minus_two_log_l = _likely_scatter2(residual, sigma)
        freedom = max(n - p, 1) / n
        excess2 = np.array([_robust_excess2(r, sigma, freedom) for r in residual.T])
        error2 = _mean_variance(where, covariance, degree, shape)
        return cls(degree, coefficients, excess2, error2, minus_two_log_l + 2 * p * np.log(2 * n))


def _solve(terms: NDArray, displacement: NDArray, variance: NDArray) -> tuple[NDArray, NDArray]:
    """Coefficients (2, p) and their covariance (p, p), the same for x and y."""
    weights = 1 / np.maximum(variance, 1e-12)
    inverse = np.linalg.pinv((terms * weights[:, None]).T @ terms)
    return (inverse @ (terms * weights[:, None]).T @ displacement).T, inverse


def _inliers(
    xy: NDArray, displacement: NDArray, sigma: NDArray, degree: int, shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """Stars within some 5 sigma of a robust polynomial (iterated biweight, from the medians outwards)."""
    terms = polynomial_terms(xy[:, 0], xy[:, 1], degree, shape)
    residual = displacement - np.median(displacement, axis=0)
    if degree > 0:
        # A gradient would look like scatter about the medians; least absolute deviations does not mind either.
        for _ in range(20):
            weight = 1 / np.maximum(np.hypot(*residual.T), 0.02)
            residual = displacement - terms @ _solve(terms, displacement, 1 / weight)[0].T
    keep = np.ones(len(xy), bool)
    for _ in range(10):
        extra2 = np.mean([_robust_excess2(r[keep], sigma[keep], 1.0) for r in residual.T])
        total = sigma**2 + extra2 + 1e-8
        distance2 = (residual**2).sum(axis=1) / total
        weight = np.clip(1 - distance2 / 36, 0, None) ** 2
        if np.count_nonzero(weight) < max(3, terms.shape[1]):
            break
        coefficients, _ = _solve(terms, displacement, total / np.maximum(weight, 1e-12))
        residual = displacement - terms @ coefficients.T
        before, keep = keep, distance2 < 25
        if np.array_equal(before, keep):
            break
    return keep


def _likely_scatter2(residual: NDArray, sigma: NDArray) -> tuple[float, float]:
    """The most likely variance beyond the noise, common to x and y, and -2 log L there."""

    def minus_two_log_l(log_extra2: float) -> float:
        total = sigma**2 + np.exp(log_extra2)
        return float(2 * np.log(total).sum() + ((residual**2).sum(axis=1) / total).sum())

    best = minimize_scalar(minus_two_log_l, bounds=(np.log(1e-8), np.log(1e2)), method="bounded")
    return float(np.exp(best.x)), float(best.fun)


def _robust_excess2(residual: NDArray, sigma: NDArray, freedom: float) -> float:
    """Variance that has to be added to sigma² to bring the median of chi-square to that of Gaussian noise."""

    def median_chi2(extra2: float) -> float:
        return float(np.median(residual**2 / (sigma**2 + extra2))) / (MEDIAN_CHI2 * freedom)

    if residual.size == 0 or median_chi2(1e-12) <= 1:
        return 0.0
    low, high = 0.0, float(np.max(residual**2)) / (MEDIAN_CHI2 * freedom)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if median_chi2(middle) > 1 else (low, middle)
    return high


def _mean_leverage(xy: NDArray, degree: int, shape: tuple[int, int], where: NDArray) -> float:
    """Variance of a polynomial averaged over the points `where`, in units of a star's."""
    terms = polynomial_terms(xy[:, 0], xy[:, 1], degree, shape)
    if np.linalg.matrix_rank(terms) < terms.shape[1]:
        return np.inf
    return _mean_variance(where, np.linalg.inv(terms.T @ terms), degree, shape)


def _mean_variance(where: NDArray, covariance: NDArray, degree: int, shape: tuple[int, int]) -> float:
    terms = polynomial_terms(where[:, 0], where[:, 1], degree, shape)
    return float(np.mean(np.einsum("ni,ij,nj->n", terms, covariance, terms)))


def _grid(shape: tuple[int, int]) -> NDArray[np.float64]:
    """Points (81, 2) over the image."""
    x, y = np.meshgrid(np.linspace(0, shape[1] - 1, 9), np.linspace(0, shape[0] - 1, 9))
    return np.column_stack([x.ravel(), y.ravel()])


def _n_terms(degree: int) -> int:
    return (degree + 1) * (degree + 2) // 2


def _nothing(shape: tuple[int, int], n_matches: int) -> Registration:
    return Registration(np.empty((2, 0)), -1, shape, 0.0, 0.0, n_matches)
