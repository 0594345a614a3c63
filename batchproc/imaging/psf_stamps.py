"""The pixels around PSF stars, and the two halves of the PSF fit over them: `refine` (the stars) and `solve_planes`
(the model). All loops over stars are here, compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage

from batchproc.imaging.shift import taps, transform
from batchproc.imaging.stars import Stars

__all__ = ["StarStamps", "cut_stars", "model_stamps", "refine", "solve_planes"]

#: A PSF model is trusted to this fraction of itself; otherwise the very brightest stars would decide alone.
MODEL_ERROR = 0.01
#: The sky under a star is known from the background to this fraction of its noise.
SKY_ERROR = 0.05
#: Pixels this many sigma from the model are left out, fading (Tukey's biweight).
TUKEY = 6.0
_TABLE_STEPS = 256


@dataclass(frozen=True)
class StarStamps:
    """Stars and their pixels; arrays run over stars.

    Attributes
    ----------
    data : ndarray (n, size, size)
        Background-subtracted electrons.
    good : ndarray (n, size, size)
        1 for pixels to use; 0 where masked, outside the image, or owned by a neighbour.
    column, row : ndarray (n,) int
        Middle pixel of the stamp.
    dx, dy, flux, sky : ndarray (n,)
        The fit: offset from the middle pixel, electrons, electrons a pixel.
    dx0, dy0 : ndarray (n,)
        Offsets that the moments gave.
    rms, fwhm, snr : ndarray (n,)
        Sky noise of a pixel at the star, width and S/N from its moments.
    chi2, residual, noise_fraction : ndarray (n,)
        Reduced chi-square in the core, rms of star minus model there over the peak, and what noise makes of it.
    photons : float
        Variance per electron of source light.
    """

    data: NDArray[np.float64]
    good: NDArray[np.float64]
    column: NDArray[np.int64]
    row: NDArray[np.int64]
    dx: NDArray[np.float64]
    dy: NDArray[np.float64]
    flux: NDArray[np.float64]
    sky: NDArray[np.float64]
    dx0: NDArray[np.float64]
    dy0: NDArray[np.float64]
    rms: NDArray[np.float64]
    fwhm: NDArray[np.float64]
    snr: NDArray[np.float64]
    chi2: NDArray[np.float64]
    residual: NDArray[np.float64]
    noise_fraction: NDArray[np.float64]
    photons: float = 1.0

    @property
    def size(self) -> int:
        """Side of a stamp in pixels."""
        return int(self.data.shape[-1])

    @property
    def x(self) -> NDArray[np.float64]:
        """Position in the image, pixels."""
        return self.column + self.dx

    @property
    def y(self) -> NDArray[np.float64]:
        """Position in the image, pixels."""
        return self.row + self.dy

    def take(self, rows: NDArray[np.intp]) -> StarStamps:
        """Some of the stars."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {k: v[rows] for k, v in values.items() if isinstance(v, np.ndarray)}
        return replace(self, **chosen)

    def cut(self, image: NDArray[np.floating], outside: float = 0.0) -> NDArray[np.float64]:
        """The stamps' pixels of another image."""
        return _cut(image, self.column, self.row, self.size, outside)


def cut_stars(
    data: NDArray[np.floating],
    rms: NDArray[np.floating],
    mask: NDArray[np.integer] | None,
    stars: Stars,
    size: int,
) -> StarStamps:
    """Stamps of (size, size) pixels around stars, with first guesses from their moments."""
    table = stars.table
    column, row = np.rint(table["x"]).astype(np.int64), np.rint(table["y"]).astype(np.int64)
    bad = ~np.isfinite(data) if mask is None else (np.asarray(mask) != 0) | ~np.isfinite(data)
    segments = _cut(stars.segments, column, row, size, 0.0)
    others = (segments > 0) & (segments != table["segment"][:, None, None])
    # Neighbours reach a little beyond their last significant pixel.
    others = ndimage.binary_dilation(others, structure=np.ones((1, 5, 5), dtype=bool))
    good = (_cut(bad, column, row, size, 1.0) == 0) & ~others
    # A neighbour's margin must not eat the star itself.
    axis = np.arange(size) - (size - 1) / 2
    core = np.hypot(axis[:, None], axis[None, :]) < 0.75 * float(np.median(table["fwhm"]))
    own = (segments == table["segment"][:, None, None]) & core & (_cut(bad, column, row, size, 1.0) == 0)
    n = len(table)
    dx, dy = table["x"] - column, table["y"] - row
    return StarStamps(
        data=_cut(np.where(bad, 0, data), column, row, size, 0.0),
        good=(good | own).astype(np.float64),
        column=column,
        row=row,
        dx=dx,
        dy=dy,
        flux=table["flux"].astype(np.float64),
        sky=np.zeros(n),
        dx0=dx,
        dy0=dy,
        rms=np.asarray(rms, dtype=np.float64)[row, column],
        fwhm=table["fwhm"].astype(np.float64),
        snr=table["snr"].astype(np.float64),
        chi2=np.ones(n),
        residual=np.zeros(n),
        noise_fraction=np.zeros(n),
    )


def model_stamps(
    pixels: NDArray[np.float64], matrix: NDArray[np.float64], beta: float, taper: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The model (n, size, size), unshifted, of unit sum."""
    out = np.array(pixels)
    _add_profiles(out, matrix, _moffat_table(beta))
    out *= taper
    return out / out.sum(axis=(1, 2), keepdims=True)  # type: ignore[no-any-return]


def refine(
    stars: StarStamps,
    pixels: NDArray[np.float64],
    matrix: NDArray[np.float64],
    beta: float,
    taper: NDArray[np.float64],
    *,
    n_iter: int,
) -> StarStamps:
    """Flux, position and sky of each star against its model, by Gauss-Newton steps with outlying pixels faded out."""
    table = _moffat_table(beta)
    scale = _scale(pixels, matrix, table, taper)
    fit = np.stack([stars.flux, stars.dx, stars.dy, stars.sky], axis=-1)
    scores = np.zeros((len(fit), 3))
    _refine(stars.data, stars.good, pixels, matrix, table, taper, scale, stars.rms, stars.photons, n_iter, fit, scores)
    return replace(
        stars,
        flux=fit[:, 0],
        dx=fit[:, 1],
        dy=fit[:, 2],
        sky=fit[:, 3],
        chi2=scores[:, 0],
        residual=scores[:, 1],
        noise_fraction=scores[:, 2],
    )


def solve_planes(
    stars: StarStamps,
    basis: NDArray[np.float64],
    pixels: NDArray[np.float64],
    matrix: NDArray[np.float64],
    beta: float,
    taper: NDArray[np.float64],
    *,
    n_iter: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Correction to the model's pixel planes, least squares over all stars, and its 1-sigma error.

    Minimises ``Σ w (data − flux shift(model + Σ_k basis_k Δ_k) − sky)²`` over the planes Δ and the skies together, by
    preconditioned conjugate gradients. (Fitted in turn instead, sky and wings would take forever to part.)

    Parameters
    ----------
    basis : ndarray (n, k)
        Values of the polynomial terms at the stars.

    Returns
    -------
    correction, noise : ndarray (k, size, size)
    """
    table = _moffat_table(beta)
    scale = _scale(pixels, matrix, table, taper)
    n_planes, size = basis.shape[1], stars.size
    weight = np.empty_like(stars.data)
    residual = np.empty_like(stars.data)
    fit = np.stack([stars.flux, stars.dx, stars.dy, stars.sky], axis=-1)
    _weigh(stars.data, stars.good, pixels, matrix, table, taper, scale, stars.rms, stars.photons, fit, weight, residual)

    right = np.zeros((n_planes, size, size))
    diagonal = np.zeros((n_planes, size, size))
    # Each star's sky is eliminated: W becomes W − W 1 (1ᵀ W 1 + prior)⁻¹ 1ᵀ W.
    prior = 1 / (SKY_ERROR * stars.rms) ** 2
    total = weight.sum(axis=(1, 2)) + prior
    sky = (np.sum(weight * residual, axis=(1, 2)) - prior * stars.sky) / total
    _adjoint((residual - sky[:, None, None]) * weight, basis, fit, right)
    _diagonal(weight, basis, fit, diagonal)
    # A pixel that hardly any star covers keeps its value.
    ridge = 1e-3 * np.median(diagonal, axis=(1, 2), keepdims=True) + 1e-300
    diagonal += ridge

    def apply(planes: NDArray[np.float64]) -> NDArray[np.float64]:
        out = np.zeros_like(planes)
        _normal(planes, weight, total, basis, fit, out)
        return out + ridge * planes

    solution = np.zeros_like(right)
    left = right.copy()
    step = left / diagonal
    direction = step.copy()
    rho = np.sum(left * step)
    first = rho
    for _ in range(n_iter):
        if rho <= 1e-6 * first:
            break
        image = apply(direction)
        length = rho / np.sum(direction * image)
        solution += length * direction
        left -= length * image
        step = left / diagonal
        rho, old = np.sum(left * step), rho
        direction = step + rho / old * direction
    return solution, 1 / np.sqrt(diagonal)


def _scale(
    pixels: NDArray[np.float64], matrix: NDArray[np.float64], table: NDArray[np.float64], taper: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Factor (n,) that brings profile plus pixels to unit sum."""
    raw = np.array(pixels)
    _add_profiles(raw, matrix, table)
    return 1 / np.tensordot(raw, taper, axes=2)  # type: ignore[no-any-return]


def _moffat_table(beta: float) -> NDArray[np.float64]:
    """``(1 + s²)^-β (β − 1) / π`` at s = 0, 1/256, …; powers for every pixel would take half the time of the fit.

    Linear between entries: within 4e-6 of the peak.
    """
    s = np.arange(64 * _TABLE_STEPS) / _TABLE_STEPS
    return (beta - 1) / np.pi * (1 + s**2) ** -beta  # type: ignore[no-any-return]


def _cut(
    image: NDArray[Any], column: NDArray[np.int64], row: NDArray[np.int64], size: int, outside: float
) -> NDArray[np.float64]:
    half = size // 2
    ny, nx = image.shape
    offset = np.arange(-half, half + 1)
    j, i = row[:, None, None] + offset[None, :, None], column[:, None, None] + offset[None, None, :]
    inside = (j >= 0) & (j < ny) & (i >= 0) & (i < nx)
    return np.where(inside, image[np.clip(j, 0, ny - 1), np.clip(i, 0, nx - 1)], outside).astype(np.float64)


@njit(cache=True)
def _add_profiles(stamps, matrix, table):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    for n in range(stamps.shape[0]):
        _add_profile(stamps[n], matrix[n], table, 0.0, 0.0)


@njit(cache=True, fastmath=True)
def _add_profile(stamp, matrix, table, dx, dy):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """What `psf_model.add_moffat` does, from the table."""
    xx, yy, xy = matrix[0], matrix[1], matrix[2]
    ny, nx = stamp.shape
    cy, cx = (ny - 1) / 2 + dy, (nx - 1) / 2 + dx
    norm = np.sqrt(max(xx * yy - xy * xy, 0.0))
    last = table.size - 2
    for j in range(ny):
        v = j - cy
        for i in range(nx):
            u = i - cx
            s = _TABLE_STEPS * np.sqrt(max(xx * u * u + yy * v * v + 2.0 * xy * u * v, 0.0))
            k = min(int(s), last)
            stamp[j, i] += norm * (table[k] + min(s - k, 1.0) * (table[k + 1] - table[k]))


@njit(cache=True)
def _draw(pixels, matrix, table, taper, scale, dx, dy, out, work):  # type: ignore[no-untyped-def]  # pragma: no cover
    """One star of unit flux at (dx, dy) from the middle."""
    transform(pixels, taps(dx), taps(dy), out, work)
    _add_profile(out, matrix, table, dx, dy)
    ny, nx = out.shape
    for j in range(ny):
        for i in range(nx):
            out[j, i] *= taper[j, i] * scale


@njit(cache=True)
def _tukey(z):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    q = 1.0 - (z / TUKEY) ** 2
    return q * q if q > 0.0 else 0.0


@njit(cache=True)
def _misfit(data, good, model, flux, sky, rms, photons):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Typical |z| of the core in sigma, at least 1: while the model is still wrong, its errors are no outliers."""
    ny, nx = data.shape
    peak = model.max()
    z = np.empty(ny * nx)
    n = 0
    for j in range(ny):
        for i in range(nx):
            if good[j, i] > 0.0 and model[j, i] > 0.1 * peak:
                m = max(flux * model[j, i], 0.0)
                sigma = np.sqrt(rms * rms + photons * m + (MODEL_ERROR * m) ** 2)
                z[n] = abs(data[j, i] - flux * model[j, i] - sky) / sigma
                n += 1
    return max(1.0, 1.4826 * np.median(z[:n])) if n > 3 else 1.0


@njit(cache=True)
def _refine(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    data, good, pixels, matrix, table, taper, scale, rms, photons, n_iter, fit, scores
):
    n_stars, ny, nx = data.shape
    model, work = np.empty((ny, nx)), np.empty((ny, nx))
    normal, right = np.empty((4, 4)), np.empty(4)
    g = np.empty(4)
    for n in range(n_stars):
        for _ in range(n_iter):
            _draw(pixels[n], matrix[n], table, taper, scale[n], fit[n, 1], fit[n, 2], model, work)
            flux, sky = fit[n, 0], fit[n, 3]
            wide = _misfit(data[n], good[n], model, flux, sky, rms[n], photons)
            normal[:] = 0.0
            right[:] = 0.0
            for j in range(2, ny - 2):
                for i in range(2, nx - 2):
                    if good[n, j, i] == 0.0:
                        continue
                    m = max(flux * model[j, i], 0.0)
                    var = rms[n] ** 2 + photons * m + (MODEL_ERROR * m) ** 2
                    r = data[n, j, i] - flux * model[j, i] - sky
                    w = _tukey(r / np.sqrt(var) / wide) / var
                    # Moving the star by +d changes a pixel by −d ∂model; five-point derivative.
                    gx = 8 * (model[j, i + 1] - model[j, i - 1]) - (model[j, i + 2] - model[j, i - 2])
                    gy = 8 * (model[j + 1, i] - model[j - 1, i]) - (model[j + 2, i] - model[j - 2, i])
                    g[0] = model[j, i]
                    g[1] = -gx / 12 * flux
                    g[2] = -gy / 12 * flux
                    g[3] = 1.0
                    for a in range(4):
                        right[a] += w * g[a] * r
                        for b in range(4):
                            normal[a, b] += w * g[a] * g[b]
            prior = 1.0 / (SKY_ERROR * rms[n]) ** 2
            normal[3, 3] += prior
            right[3] -= prior * sky
            for a in range(4):
                normal[a, a] = normal[a, a] * (1 + 1e-9) + 1e-300
            step = np.linalg.solve(normal, right)
            fit[n, 0] = max(flux + step[0], 0.1 * flux)
            fit[n, 1] = min(max(fit[n, 1] + min(max(step[1], -0.5), 0.5), -2.0), 2.0)
            fit[n, 2] = min(max(fit[n, 2] + min(max(step[2], -0.5), 0.5), -2.0), 2.0)
            fit[n, 3] = sky + step[3]
        _draw(pixels[n], matrix[n], table, taper, scale[n], fit[n, 1], fit[n, 2], model, work)
        peak = model.max()
        chi2 = square = noise = 0.0
        count = 0
        for j in range(ny):
            for i in range(nx):
                if good[n, j, i] > 0.0 and model[j, i] > 0.05 * peak:
                    m = fit[n, 0] * model[j, i]
                    var = rms[n] ** 2 + photons * m
                    r = data[n, j, i] - m - fit[n, 3]
                    chi2 += r * r / (var + (MODEL_ERROR * m) ** 2)
                    square += r * r
                    noise += var
                    count += 1
        # Four numbers were fitted.
        free = max(count - 4.0, 1.0)
        scores[n, 0] = chi2 / free
        scores[n, 1] = np.sqrt(square / free) / (fit[n, 0] * peak)
        scores[n, 2] = np.sqrt(noise / max(count, 1)) / (fit[n, 0] * peak)


@njit(cache=True)
def _weigh(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    data, good, pixels, matrix, table, taper, scale, rms, photons, fit, weight, residual
):
    n_stars, ny, nx = data.shape
    model, work = np.empty((ny, nx)), np.empty((ny, nx))
    for n in range(n_stars):
        _draw(pixels[n], matrix[n], table, taper, scale[n], fit[n, 1], fit[n, 2], model, work)
        wide = _misfit(data[n], good[n], model, fit[n, 0], fit[n, 3], rms[n], photons)
        for j in range(ny):
            for i in range(nx):
                m = max(fit[n, 0] * model[j, i], 0.0)
                var = rms[n] ** 2 + photons * m + (MODEL_ERROR * m) ** 2
                r = data[n, j, i] - fit[n, 0] * model[j, i] - fit[n, 3]
                residual[n, j, i] = r
                weight[n, j, i] = good[n, j, i] * _tukey(r / np.sqrt(var) / wide) / var


@njit(cache=True)
def _adjoint(stamps, basis, fit, planes):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Transpose of drawing all stars from the planes."""
    n_stars, ny, nx = stamps.shape
    out, work = np.empty((ny, nx)), np.empty((ny, nx))
    for n in range(n_stars):
        transform(stamps[n], taps(fit[n, 1])[::-1].copy(), taps(fit[n, 2])[::-1].copy(), out, work)
        for k in range(planes.shape[0]):
            factor = basis[n, k] * fit[n, 0]
            for j in range(ny):
                for i in range(nx):
                    planes[k, j, i] += factor * out[j, i]


@njit(cache=True)
def _normal(planes, weight, total, basis, fit, result):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    n_stars, ny, nx = weight.shape
    mixed, drawn, work = np.empty((ny, nx)), np.empty((ny, nx)), np.empty((ny, nx))
    for n in range(n_stars):
        mixed[:] = 0.0
        for k in range(planes.shape[0]):
            factor = basis[n, k] * fit[n, 0]
            for j in range(ny):
                for i in range(nx):
                    mixed[j, i] += factor * planes[k, j, i]
        tx, ty = taps(fit[n, 1]), taps(fit[n, 2])
        transform(mixed, tx, ty, drawn, work)
        mean = 0.0
        for j in range(ny):
            for i in range(nx):
                mean += drawn[j, i] * weight[n, j, i]
        mean /= total[n]
        for j in range(ny):
            for i in range(nx):
                drawn[j, i] = (drawn[j, i] - mean) * weight[n, j, i]
        transform(drawn, tx[::-1].copy(), ty[::-1].copy(), mixed, work)
        for k in range(planes.shape[0]):
            factor = basis[n, k] * fit[n, 0]
            for j in range(ny):
                for i in range(nx):
                    result[k, j, i] += factor * mixed[j, i]


@njit(cache=True)
def _diagonal(weight, basis, fit, result):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    n_stars, ny, nx = weight.shape
    out, work = np.empty((ny, nx)), np.empty((ny, nx))
    for n in range(n_stars):
        tx, ty = taps(fit[n, 1]), taps(fit[n, 2])
        transform(weight[n], (tx * tx)[::-1].copy(), (ty * ty)[::-1].copy(), out, work)
        for k in range(result.shape[0]):
            factor = (basis[n, k] * fit[n, 0]) ** 2
            for j in range(ny):
                for i in range(nx):
                    result[k, j, i] += factor * out[j, i]
