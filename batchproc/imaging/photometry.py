"""Fluxes: of stars through the PSF and through circles, one image relative to another.

Images are background-subtracted; positions are 0-based pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import sep
from numba import njit
from numpy.typing import NDArray
from scipy import optimize

from batchproc.imaging.planes import as_bytes, native
from batchproc.imaging.polynomial import Frame, Polynomial, fit_polynomial
from batchproc.imaging.psf_view import PsfView
from batchproc.imaging.shift import taps, transform
from batchproc.records import PsfLike

__all__ = ["FluxRatio", "KeptPsf", "aperture_flux", "measure_flux_ratio", "psf_flux"]

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class FluxRatio:
    """Flux of the same stars in one image over that in another.

    Attributes
    ----------
    value : float
        F_new / F_ref.
    error : float
        Its 1-sigma error, absolute.
    scatter : float
        Relative scatter of single stars about it, beyond their photon noise (model errors, weak variables).
    n_stars : int
        Stars that took part; 0 where no ratio could be measured (``value`` and ``error`` are NaN then).
    variation : Polynomial or None
        Ratio at a place over `value`, minus 1, where positions were given: flat fields and thin clouds differ by some
        per cent across an image, which bright stars show.
    """

    value: float
    error: float
    scatter: float
    n_stars: int
    variation: Polynomial | None = None

    @property
    def varies(self) -> bool:
        """Whether the ratio is another at other places."""
        return self.variation is not None and self.variation.degree > 0

    def image(self, shape: tuple[int, int]) -> NDArray[np.float32]:
        """Ratio at every pixel over `value` (ny, nx): multiply the reference by it."""
        if not self.varies:
            return np.ones(shape, dtype=np.float32)
        image = self.variation.image(shape)  # type: ignore[union-attr]
        image += np.float32(1)
        return image


@dataclass(frozen=True, eq=False)
class KeptPsf(PsfView):
    """A PSF that keeps the stamps it has given: fits of positions and of fluxes ask for those of the same stars."""

    _stamps: dict[tuple[float, float], _Array] = field(default_factory=dict, repr=False)

    def at(self, x: float, y: float) -> _Array:
        """PSF stamp ``(size, size)`` at pixel (x, y), not to be written to."""
        if (x, y) not in self._stamps:
            self._stamps[x, y] = self.psf.at(x, y)
        return self._stamps[x, y]


def psf_flux(
    data: NDArray[np.floating],
    variance: NDArray[np.floating],
    mask: NDArray[np.integer] | None,
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    psf: PsfLike,
) -> tuple[_Array, _Array, _Array, NDArray[np.bool_]]:
    """PSF flux at given positions.

    Parameters
    ----------
    data : ndarray (ny, nx)
        Background-subtracted image.
    variance : ndarray (ny, nx)
        Total variance of a pixel, sources included, in the units of `data` squared.
    mask : ndarray (ny, nx) or None
        Non-zero is bad; bad pixels take no part.
    x, y : ndarray (n,)
        Positions in pixels.
    psf : PsfLike

    Returns
    -------
    flux, flux_err : ndarray (n,) float64
        Σ P D / Σ P² over the pixels within 2 FWHM, and its 1-sigma error from `variance`; NaN where not `ok`. Weighted
        by the PSF alone, as S of ZOGY is, so that the noise in `variance` does not bias it (15 % more error at worst,
        for stars far above the sky).
    chi2 : ndarray (n,) float64
        Reduced chi-square of the fit over the pixels within one FWHM.
    ok : ndarray (n,) bool
        Centre inside the image and at least 80 % of the weight (Σ P²) on good pixels.
    """
    image, noise = native(data), native(variance)
    bad = as_bytes(mask, image.shape)
    xs, ys = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (x, y))
    results = np.full((xs.size, 4), np.nan)
    results[:, 3] = 0
    ny, nx = image.shape
    inside = (xs > -0.5) & (xs < nx - 0.5) & (ys > -0.5) & (ys < ny - 0.5)
    for n in np.flatnonzero(inside):
        stamp = np.ascontiguousarray(psf.at(float(xs[n]), float(ys[n])), dtype=np.float64)
        _fit_flux(image, noise, bad, xs[n], ys[n], stamp, psf.fwhm, results[n])
    ok = results[:, 3] > 0.8
    results[~ok, :3] = np.nan
    return results[:, 0], results[:, 1], results[:, 2], ok


def aperture_flux(
    data: NDArray[np.floating],
    variance: NDArray[np.floating],
    mask: NDArray[np.integer] | None,
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    radius: float,
) -> tuple[_Array, _Array, NDArray[np.bool_]]:
    """Flux in circles of `radius` pixels, edges of pixels counted exactly (SEP).

    Returns
    -------
    flux, flux_err : ndarray (n,) float64
        Sum of `data` and 1-sigma error from `variance`, as they are; no aperture correction.
    ok : ndarray (n,) bool
        The whole circle lies in the image, on good pixels.
    """
    bad = ~np.isfinite(data) if mask is None else (np.asarray(mask) != 0) | ~np.isfinite(data)
    flux, error, flag = sep.sum_circle(
        np.where(bad, 0, data).astype(np.float32),
        np.atleast_1d(np.asarray(x, dtype=np.float64)),
        np.atleast_1d(np.asarray(y, dtype=np.float64)),
        radius,
        var=np.where(np.isfinite(variance), variance, 0).astype(np.float32),
        mask=bad,
        subpix=0,
    )
    return flux, error, flag == 0


def measure_flux_ratio(
    flux_new: NDArray[np.floating],
    err_new: NDArray[np.floating],
    flux_ref: NDArray[np.floating],
    err_ref: NDArray[np.floating],
    *,
    x: NDArray[np.floating] | None = None,
    y: NDArray[np.floating] | None = None,
    shape: tuple[int, int] | None = None,
) -> FluxRatio:
    """F_new / F_ref from the fluxes of common stars.

    Parameters
    ----------
    flux_new, err_new, flux_ref, err_ref : ndarray (n,)
        Fluxes and 1-sigma errors; entries that are not finite are ignored.
    x, y : ndarray (n,), optional
        Positions in pixels. With them and `shape`, the variation of the ratio over the image is measured too (up to
        second degree, where the stars ask for it), and `scatter` is about it.
    shape : (ny, nx), optional

    Returns
    -------
    FluxRatio

    Notes
    -----
    Maximum likelihood of a line through the origin with errors in both: with t the best estimate of a star's flux from
    both images, ``Σ w t (flux_new − β flux_ref) = 0``. The residual and t are uncorrelated, so that neither weights nor
    cuts in t bias β, however faint the stars. Residuals beyond 4 of their own widths (variables, blends) are left
    out; the width includes a relative scatter of single stars, found such that the middle half agrees with a Gaussian.
    """
    values = np.stack([np.asarray(a, dtype=np.float64).ravel() for a in (flux_new, err_new, flux_ref, err_ref)])
    sound = np.isfinite(values).all(axis=0) & (values[1] > 0) & (values[3] > 0)
    stars = _Pairs(*values[:, sound])
    ratio, use = _ratio(stars)
    if x is None or y is None or shape is None or ratio.n_stars < 10:
        return ratio
    at = np.asarray(x, dtype=np.float64)[sound], np.asarray(y, dtype=np.float64)[sound]
    flux = ratio.value * stars.common(ratio.value)
    relative = (stars.new - ratio.value * stars.ref) / np.where(use, flux, 1.0)
    error2 = stars.photon(ratio.value) / np.where(use, flux, 1.0) ** 2
    frame = Frame.of_image(shape)
    fit, _ = fit_polynomial(frame, at[0][use], at[1][use], relative[use], error2[use], 2)
    factor = 1 + fit(*at)
    flat = _Pairs(stars.new, stars.error, stars.ref * factor, stars.error_ref * factor)
    ratio, _ = _ratio(flat)
    return replace(ratio, variation=fit) if ratio.n_stars else ratio


@dataclass(frozen=True)
class _Pairs:
    """The same stars in two images."""

    new: _Array
    error: _Array
    ref: _Array
    error_ref: _Array

    def common(self, beta: float) -> _Array:
        """Best estimate of each flux in ref from both images."""
        weight_new, weight_ref = (beta / self.error) ** 2, 1 / self.error_ref**2
        return (weight_new * self.new / beta + weight_ref * self.ref) / (weight_new + weight_ref)  # type: ignore[no-any-return]

    def photon(self, beta: float) -> _Array:
        """Variance of new − β ref."""
        return self.error**2 + (beta * self.error_ref) ** 2  # type: ignore[no-any-return]


def _ratio(stars: _Pairs) -> tuple[FluxRatio, NDArray[np.bool_]]:
    """The ratio, and which stars it rests on."""
    nothing = FluxRatio(float("nan"), float("nan"), float("nan"), 0), np.zeros(stars.new.size, dtype=bool)
    beta = _first_ratio(stars)
    if not (np.isfinite(beta) and beta > 0):
        return nothing
    use = np.ones(stars.new.size, dtype=bool)
    scatter = 0.0
    for _ in range(12):
        flux, photon = stars.common(beta), stars.photon(beta)
        residual = stars.new - beta * stars.ref
        scatter = _extra_scatter(residual[use], photon[use], beta * flux[use])
        width = np.sqrt(photon + (scatter * beta * flux) ** 2)
        use = (np.abs(residual) < 4 * width) & (flux > 0)
        if not use.any():
            return nothing
        weight = flux[use] / width[use] ** 2
        old, beta = beta, float(np.sum(weight * stars.new[use]) / np.sum(weight * stars.ref[use]))
        if abs(beta - old) < 1e-9 * beta:
            break
    information = np.sum((flux[use] / width[use]) ** 2)
    return FluxRatio(beta, float(1 / np.sqrt(information)), scatter, int(np.count_nonzero(use))), use


def _first_ratio(stars: _Pairs) -> float:
    """Median ratio of the stars bright in both."""
    snr = np.minimum(stars.new / stars.error, stars.ref / stars.error_ref)
    fair = snr > 5
    if not fair.any():
        return float("nan")
    bright = snr >= np.median(snr[fair])
    return float(np.median(stars.new[bright] / stars.ref[bright]))


def _extra_scatter(residual: _Array, photon: _Array, flux: _Array) -> float:
    """Relative scatter s such that the median of |residual| / sqrt(photon + (s flux)²) is a Gaussian's."""

    def excess(s: float) -> float:
        return float(1.4826 * np.median(np.abs(residual) / np.sqrt(photon + (s * flux) ** 2)) - 1)

    if residual.size < 5 or excess(0.0) <= 0:
        return 0.0
    if excess(1.0) >= 0:
        return 1.0
    return float(optimize.brentq(excess, 0.0, 1.0, xtol=1e-6))


@njit(cache=True)
def _fit_flux(image, noise, bad, x, y, stamp, fwhm, result):  # type: ignore[no-untyped-def]  # pragma: no cover
    """flux, error, reduced chi-square, covered fraction of the weight."""
    ny, nx = image.shape
    size = stamp.shape[0]
    half = size // 2
    column, row = int(np.rint(x)), int(np.rint(y))
    dx, dy = x - column, y - row
    model, work = np.empty(stamp.shape), np.empty(stamp.shape)
    transform(stamp, taps(dx), taps(dy), model, work)
    whole = weight = cross = spread = 0.0
    for j in range(size):
        for i in range(size):
            if (i - half - dx) ** 2 + (j - half - dy) ** 2 > 4.0 * fwhm * fwhm:
                continue
            p = model[j, i]
            whole += p * p
            jj, ii = row + j - half, column + i - half
            if 0 <= jj < ny and 0 <= ii < nx and bad[jj, ii] == 0:
                value, variance = float(image[jj, ii]), float(noise[jj, ii])
                if np.isfinite(value) and np.isfinite(variance):
                    weight += p * p
                    cross += p * value
                    spread += p * p * variance
    result[3] = weight / whole if whole > 0 else 0.0
    if weight <= 0.0:
        return
    flux = cross / weight
    chi2 = 0.0
    count = 0
    for j in range(size):
        for i in range(size):
            jj, ii = row + j - half, column + i - half
            near = (i - half - dx) ** 2 + (j - half - dy) ** 2 <= fwhm * fwhm
            if near and 0 <= jj < ny and 0 <= ii < nx and bad[jj, ii] == 0:
                r, variance = image[jj, ii] - flux * model[j, i], float(noise[jj, ii])
                if np.isfinite(r) and 0.0 < variance < np.inf:
                    chi2 += r * r / variance
                    count += 1
    result[0] = flux
    result[1] = np.sqrt(spread) / weight
    result[2] = chi2 / max(count - 1, 1)
