"""Where stars are, by their PSF, in two images; and the PSF of one moved so that both agree.

Registration works with centroids, subtraction with PSFs. Where the PSFs are lopsided, or the centroids were taken
otherwise, the two differ by some hundredths of a pixel, which a bright star shows as a dipole. Moving the reference's
PSF by what its stars are off takes the dipole away: ZOGY only asks that each PSF describes the stars of its image, seen
from the same positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from batchproc.imaging.polynomial import Frame, n_terms
from batchproc.imaging.shift import shift_stamp, taps, transform
from batchproc.records import PsfLike

__all__ = ["CentreMatch", "MovedPsf", "fit_positions", "match_centres"]

_Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MovedPsf:
    """A PSF whose stamps are off centre by a polynomial in (x, y).

    Attributes
    ----------
    psf : PsfLike
    coefficients : ndarray (n_terms, 2) float64
        Offset in pixels along x and y, terms of `frame`.
    degree : int
    frame : Frame
    """

    psf: PsfLike
    coefficients: _Array
    degree: int
    frame: Frame

    @property
    def size(self) -> int:
        """Side of the (odd, square) stamp in pixels."""
        return self.psf.size

    @property
    def fwhm(self) -> float:
        """Full width at half maximum at the image centre, in pixels."""
        return self.psf.fwhm

    def offset(self, x: NDArray[np.floating] | float, y: NDArray[np.floating] | float) -> _Array:
        """Offset (n, 2) of the stamps at pixels (x, y)."""
        return self.frame.terms(x, y, self.degree) @ self.coefficients  # type: ignore[no-any-return]

    def at(self, x: float, y: float) -> _Array:
        """PSF stamp ``(size, size)`` at pixel (x, y): off centre by `offset`, unit sum."""
        dx, dy = self.offset(x, y)[0]
        stamp = shift_stamp(self.psf.at(x, y), float(dx), float(dy))
        return stamp / stamp.sum()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CentreMatch:
    """How two images' stars agree.

    Attributes
    ----------
    psf : MovedPsf
        The reference's PSF, moved.
    shift_x, shift_y : float
        The move at the image centre, pixels.
    rms_x, rms_y : float
        Robust scatter of the stars' offsets after the move, beyond what noise makes of it; pixels.
    n_stars : int
    """

    psf: MovedPsf
    shift_x: float
    shift_y: float
    rms_x: float
    rms_y: float
    n_stars: int


def fit_positions(
    data: NDArray[np.floating],
    variance: NDArray[np.floating],
    mask: NDArray[np.integer] | None,
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    psf: PsfLike,
) -> tuple[_Array, _Array, _Array, NDArray[np.bool_]]:
    """Positions of stars by a PSF fit within 1.5 FWHM.

    Parameters
    ----------
    data, variance : ndarray (ny, nx)
        Background-subtracted image, and total variance of a pixel in its units squared.
    mask : ndarray (ny, nx) or None
        Non-zero is bad.
    x, y : ndarray (n,)
        First guesses, good to a pixel.
    psf : PsfLike

    Returns
    -------
    x, y : ndarray (n,) float64
        Pixels; NaN where not `ok`.
    error : ndarray (n, 2) float64
        1-sigma errors along x and y.
    ok : ndarray (n,) bool
        Converged within 1 pixel of the guess, to a positive flux, on good pixels.
    """
    image = np.ascontiguousarray(data, dtype=np.float64)
    noise = np.ascontiguousarray(variance, dtype=np.float64)
    good = np.isfinite(image) & (noise > 0)
    if mask is not None:
        good &= np.asarray(mask) == 0
    xs, ys = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (x, y))
    fits = np.full((xs.size, 5), np.nan)
    fits[:, 4] = 0
    ny, nx = image.shape
    for n in np.flatnonzero((xs > 0) & (xs < nx - 1) & (ys > 0) & (ys < ny - 1)):
        stamp = np.ascontiguousarray(psf.at(float(xs[n]), float(ys[n])), dtype=np.float64)
        _fit(image, noise, good, xs[n], ys[n], stamp, 1.5 * psf.fwhm, fits[n])
    ok = fits[:, 4] > 0
    fits[~ok] = np.nan
    return fits[:, 0], fits[:, 1], fits[:, 2:4], ok


def match_centres(
    new: NDArray[np.floating],
    ref: NDArray[np.floating],
    psf_new: PsfLike,
    psf_ref: PsfLike,
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    *,
    variance_new: NDArray[np.floating],
    variance_ref: NDArray[np.floating],
    mask_new: NDArray[np.integer] | None = None,
    mask_ref: NDArray[np.integer] | None = None,
    max_degree: int = 2,
) -> CentreMatch:
    """Move the reference's PSF to where its stars are, seen from their positions in new.

    Parameters
    ----------
    new, ref : ndarray (ny, nx)
        Background-subtracted images on one grid.
    psf_new, psf_ref : PsfLike
    x, y : ndarray (n,)
        Unsaturated stars, pixels.
    variance_new, variance_ref : ndarray (ny, nx)
        Total variance of the pixels.
    mask_new, mask_ref : ndarray (ny, nx) or None
        Non-zero is bad.
    max_degree : int
        Of the polynomial in (x, y); each degree needs ten stars a term, and must improve the prediction of stars left
        out.

    Returns
    -------
    CentreMatch
        With fewer than 5 common stars the PSF is not moved.
    """
    x_new, y_new, error_new, ok_new = fit_positions(new, variance_new, mask_new, x, y, psf_new)
    x_ref, y_ref, error_ref, ok_ref = fit_positions(ref, variance_ref, mask_ref, x, y, psf_ref)
    ok = ok_new & ok_ref
    frame = Frame.of_image(new.shape)
    if np.count_nonzero(ok) < 5:
        return CentreMatch(MovedPsf(psf_ref, np.zeros((1, 2)), 0, frame), 0.0, 0.0, 0.0, 0.0, 0)
    offset = np.stack([x_ref - x_new, y_ref - y_new], axis=-1)[ok]
    error2 = (error_new**2 + error_ref**2)[ok]
    x, y = x_new[ok], y_new[ok]
    coefficients, degree, excess = _robust_polynomial(frame, x, y, offset, error2, max_degree)
    middle = frame.terms(frame.x0, frame.y0, degree)[0] @ coefficients
    return CentreMatch(
        MovedPsf(psf_ref, coefficients, degree, frame),
        float(middle[0]),
        float(middle[1]),
        float(np.sqrt(excess[0])),
        float(np.sqrt(excess[1])),
        len(x),
    )


def _robust_polynomial(
    frame: Frame, x: _Array, y: _Array, offset: _Array, error2: _Array, max_degree: int
) -> tuple[_Array, int, _Array]:
    """Coefficients (n_terms, 2), degree, and variance (2,) of the stars about it beyond their errors."""
    best = np.median(offset, axis=0)[None]
    excess = _excess_variance(offset - best, error2)
    best_degree, best_score = 0, np.inf
    for degree in range(max_degree + 1):
        if degree > 0 and len(x) < 10 * n_terms(degree):
            break
        basis = frame.terms(x, y, degree)
        solution = np.zeros((n_terms(degree), 2))
        solution[0] = best[0]
        score, spread = 0.0, excess.copy()
        for axis in (0, 1):
            fit = np.zeros(n_terms(degree))
            fit[: 1 if degree == 0 else len(fit)] = solution[: len(fit), axis]
            for _ in range(5):
                residual = offset[:, axis] - basis @ fit
                spread[axis] = _excess_variance(residual[:, None], error2[:, axis : axis + 1])[0]
                width2 = error2[:, axis] + spread[axis] + 1e-6
                z2 = residual**2 / width2
                weight = np.where(z2 < 16, (1 - z2 / 16) ** 2, 0) / width2
                q, r = np.linalg.qr(basis * np.sqrt(weight)[:, None])
                fit = np.linalg.solve(r, q.T @ (offset[:, axis] * np.sqrt(weight)))
            left_out = (offset[:, axis] - basis @ fit) / np.maximum(1 - np.sum(q**2, axis=1), 1e-2)
            score += float(np.sum(np.minimum(left_out**2 / (error2[:, axis] + excess[axis] + 1e-6), 16)))
            solution[:, axis] = fit
        if score < 0.98 * best_score:
            best, best_degree, best_score, final = solution, degree, score, spread
    return best, best_degree, final


def _excess_variance(residual: _Array, error2: _Array) -> _Array:
    """Variance (k,) beyond the errors, from the middle half of the better-measured stars."""
    out = np.zeros(residual.shape[1])
    for axis in range(residual.shape[1]):
        told = error2[:, axis] <= np.median(error2[:, axis])
        width2 = (1.4826 * np.median(np.abs(residual[told, axis]))) ** 2
        out[axis] = max(0.0, width2 - np.median(error2[told, axis]))
    return out


@njit(cache=True)
def _fit(image, noise, good, x0, y0, stamp, radius, result):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Gauss-Newton for flux, x, y; writes x, y, their errors, and 1 where it converged."""
    ny, nx = image.shape
    size = stamp.shape[0]
    half = size // 2
    column, row = int(np.rint(x0)), int(np.rint(y0))
    dx, dy = x0 - column, y0 - row
    flux = -1.0
    model, work = np.empty(stamp.shape), np.empty(stamp.shape)
    normal, right, g = np.empty((3, 3)), np.empty(3), np.empty(3)
    for turn in range(12):
        transform(stamp, taps(dx), taps(dy), model, work)
        if turn == 0:
            cross = weight = 0.0
            for j in range(size):
                for i in range(size):
                    jj, ii = row + j - half, column + i - half
                    near = (i - half - dx) ** 2 + (j - half - dy) ** 2 < radius * radius
                    if near and 0 <= jj < ny and 0 <= ii < nx and good[jj, ii]:
                        cross += model[j, i] * image[jj, ii]
                        weight += model[j, i] ** 2
            if weight <= 0.5 * np.sum(stamp * stamp):
                return
            flux = cross / weight
        if flux <= 0.0:
            return
        normal[:] = 0.0
        right[:] = 0.0
        for j in range(2, size - 2):
            for i in range(2, size - 2):
                jj, ii = row + j - half, column + i - half
                near = (i - half - dx) ** 2 + (j - half - dy) ** 2 < radius * radius
                if near and 0 <= jj < ny and 0 <= ii < nx and good[jj, ii]:
                    g[0] = model[j, i]
                    gx = 8 * (model[j, i + 1] - model[j, i - 1]) - (model[j, i + 2] - model[j, i - 2])
                    gy = 8 * (model[j + 1, i] - model[j - 1, i]) - (model[j + 2, i] - model[j - 2, i])
                    g[1] = -flux * gx / 12
                    g[2] = -flux * gy / 12
                    r = image[jj, ii] - flux * model[j, i]
                    w = 1.0 / noise[jj, ii]
                    for a in range(3):
                        right[a] += w * g[a] * r
                        for b in range(3):
                            normal[a, b] += w * g[a] * g[b]
        det = np.linalg.det(normal)
        if not det > 0.0:
            return
        step = np.linalg.solve(normal, right)
        flux += step[0]
        dx += min(max(step[1], -0.5), 0.5)
        dy += min(max(step[2], -0.5), 0.5)
        if (column + dx - x0) ** 2 + (row + dy - y0) ** 2 > 1.0:
            return
        if abs(step[1]) + abs(step[2]) < 1e-5:
            inverse = np.linalg.inv(normal)
            result[0], result[1] = column + dx, row + dy
            result[2], result[3] = np.sqrt(inverse[1, 1]), np.sqrt(inverse[2, 2])
            result[4] = 1.0
            return
