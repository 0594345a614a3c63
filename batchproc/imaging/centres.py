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

from batchproc.imaging.planes import as_bytes, native
from batchproc.imaging.polynomial import Frame, Polynomial, fit_polynomial
from batchproc.imaging.psf_view import PsfView
from batchproc.imaging.shift import HALF, shift_stamp, taps, transform
from batchproc.records import PsfLike

__all__ = ["CentreMatch", "MovedPsf", "fit_positions", "match_centres"]

_Array = NDArray[np.float64]

#: Fits of positions end after a step shorter than this, in pixels.
_SMALL_STEP = 1e-3


@dataclass(frozen=True, eq=False)
class MovedPsf(PsfView):
    """A PSF whose stamps are off centre by `dx` and `dy` pixels, polynomials of the place."""

    dx: Polynomial
    dy: Polynomial

    def at(self, x: float, y: float) -> _Array:
        """PSF stamp ``(size, size)`` at pixel (x, y): off centre by (`dx`, `dy`), unit sum."""
        stamp = shift_stamp(self.psf.at(x, y), float(self.dx(x, y)[0]), float(self.dy(x, y)[0]))
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
    image, noise = native(data), native(variance)
    bad = as_bytes(mask, image.shape)
    xs, ys = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (x, y))
    fits = np.full((xs.size, 5), np.nan)
    fits[:, 4] = 0
    ny, nx = image.shape
    for n in np.flatnonzero((xs > 0) & (xs < nx - 1) & (ys > 0) & (ys < ny - 1)):
        stamp = np.ascontiguousarray(psf.at(float(xs[n]), float(ys[n])), dtype=np.float64)
        _fit(image, noise, bad, xs[n], ys[n], stamp, 1.5 * psf.fwhm, fits[n])
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
        Of the polynomials in (x, y).

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
        still = Polynomial(frame, 0, np.zeros(1))
        return CentreMatch(MovedPsf(psf_ref, still, still), 0.0, 0.0, 0.0, 0.0, 0)
    variance = (error_new**2 + error_ref**2)[ok]
    at = x_new[ok], y_new[ok]
    dx, excess_x = fit_polynomial(frame, *at, (x_ref - x_new)[ok], variance[:, 0], max_degree)
    dy, excess_y = fit_polynomial(frame, *at, (y_ref - y_new)[ok], variance[:, 1], max_degree)
    return CentreMatch(
        MovedPsf(psf_ref, dx, dy),
        shift_x=float(dx(frame.x0, frame.y0)[0]),
        shift_y=float(dy(frame.x0, frame.y0)[0]),
        rms_x=float(np.sqrt(excess_x)),
        rms_y=float(np.sqrt(excess_y)),
        n_stars=int(np.count_nonzero(ok)),
    )


@njit(cache=True)
def _is_good(image, noise, bad, j, i):  # type: ignore[no-untyped-def]  # pragma: no cover
    return bad[j, i] == 0 and np.isfinite(image[j, i]) and noise[j, i] > 0


@njit(cache=True)
def _fit(image, noise, bad, x0, y0, stamp, radius, result):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Gauss-Newton for flux, x, y; writes x, y, their errors, and 1 where it converged."""
    ny, nx = image.shape
    # Of the stamp, what lies within the radius and the reach of shifts and derivatives.
    spare = max(0, stamp.shape[0] // 2 - int(np.ceil(radius)) - HALF - 3)
    stamp = stamp[spare : stamp.shape[0] - spare, spare : stamp.shape[1] - spare]
    size = stamp.shape[0]
    half = size // 2
    reach = min(half - 2, int(np.ceil(radius)) + 1)
    column, row = int(np.rint(x0)), int(np.rint(y0))
    dx, dy = x0 - column, y0 - row
    flux = -1.0
    model, work = np.empty(stamp.shape), np.empty(stamp.shape)
    normal, right, g = np.empty((3, 3)), np.empty(3), np.empty(3)
    for turn in range(12):
        transform(stamp, taps(dx), taps(dy), model, work)
        if turn == 0:
            cross = weight = 0.0
            for j in range(half - reach, half + reach + 1):
                for i in range(half - reach, half + reach + 1):
                    jj, ii = row + j - half, column + i - half
                    near = (i - half - dx) ** 2 + (j - half - dy) ** 2 < radius * radius
                    if near and 0 <= jj < ny and 0 <= ii < nx and _is_good(image, noise, bad, jj, ii):
                        cross += model[j, i] * image[jj, ii]
                        weight += model[j, i] ** 2
            if weight <= 0.5 * np.sum(stamp * stamp):
                return
            flux = cross / weight
        if flux <= 0.0:
            return
        normal[:] = 0.0
        right[:] = 0.0
        for j in range(half - reach, half + reach + 1):
            for i in range(half - reach, half + reach + 1):
                jj, ii = row + j - half, column + i - half
                near = (i - half - dx) ** 2 + (j - half - dy) ** 2 < radius * radius
                if near and 0 <= jj < ny and 0 <= ii < nx and _is_good(image, noise, bad, jj, ii):
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
        if not np.linalg.det(normal) > 0.0:
            return
        step = np.linalg.solve(normal, right)
        flux += step[0]
        dx += min(max(step[1], -0.5), 0.5)
        dy += min(max(step[2], -0.5), 0.5)
        if (column + dx - x0) ** 2 + (row + dy - y0) ** 2 > 1.0:
            return
        # Each step leaves far less than a tenth of itself.
        if abs(step[1]) + abs(step[2]) < _SMALL_STEP:
            inverse = np.linalg.inv(normal)
            result[0], result[1] = column + dx, row + dy
            result[2], result[3] = np.sqrt(inverse[1, 1]), np.sqrt(inverse[2, 2])
            result[4] = 1.0
            return
