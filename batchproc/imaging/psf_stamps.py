"""The pixels around PSF stars, and the two halves of the PSF fit over them: `fit_stars` (the stars) and `solve_planes`
(the model). All loops over stars are here, compiled.

A star's stamp is moved once by the fraction of a pixel that puts the star on its middle: not the star itself, which a
profile drawn at the right place stands for, but what the profile leaves of it. That remainder is a few per cent of the
star and nearly smooth, the kernel of `shift` keeps its noise white, and from there on every star lies on the model's
own pixels: the fit needs no further shift, and costs a tenth of one that shifts the model for each star and each step.
What a star is still off is counted to first order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage

from batchproc.imaging.psf_model import add_profile, edge_taper, moffat_table
from batchproc.imaging.shift import taps, transform
from batchproc.imaging.starpeaks import plain
from batchproc.imaging.stars import Stars, bad_pixels

__all__ = ["StarStamps", "cut_stars", "fit_stars", "recentred", "solve_planes"]

#: A PSF model is trusted to this fraction of itself; otherwise the very brightest stars would decide alone.
MODEL_ERROR = 0.01
#: The sky under a star is known from the background to this fraction of its noise at best.
SKY_ERROR = 0.05
#: Pixels this many sigma from the model are left out, fading (Tukey's biweight).
TUKEY = 6.0
#: A neighbour's pixels are left out where it puts more than this fraction of the sky noise into them, and more than
#: the second fraction of what the star itself does.
_NEIGHBOUR, _NEIGHBOUR_OF_STAR = 0.5, 0.003


@dataclass(frozen=True)
class StarStamps:
    """Stars and their pixels; arrays run over stars.

    Attributes
    ----------
    data : ndarray (n, size, size) float32
        Background-subtracted electrons; once `recentred`, with the star at (cx, cy) brought to the middle.
    good : ndarray (n, size, size) float32
        1 for pixels to use; 0 where masked, outside the image, or lit by a neighbour.
    profile : ndarray (n, size, size) float32
        Smooth part of the model at the star, tapered, on the middle pixel.
    column, row : ndarray (n,) int
        Middle pixel of the stamp.
    dx, dy, flux, sky : ndarray (n,)
        The fit: offset from the middle pixel of the image's stamp, electrons, electrons a pixel.
    cx, cy, kept : ndarray (n,)
        Offset that `data` were moved by, and the part of the noise's variance that the move left.
    dx0, dy0 : ndarray (n,)
        Offsets that the moments gave.
    rms, fwhm, snr : ndarray (n,)
        Sky noise of a pixel at the star, width and S/N from its moments.
    chi2, residual, noise_fraction : ndarray (n,)
        Reduced chi-square in the core, rms of star minus model there over the peak, and what noise makes of it.
    photons : float
        Variance per electron of source light.
    glow : float
        Light of undetected neighbours about a star, as a fraction of the sky noise of a pixel; 0: it averages out.
    """

    data: NDArray[np.float32]
    good: NDArray[np.float32]
    profile: NDArray[np.float32]
    column: NDArray[np.int64]
    row: NDArray[np.int64]
    dx: NDArray[np.float64]
    dy: NDArray[np.float64]
    flux: NDArray[np.float64]
    sky: NDArray[np.float64]
    cx: NDArray[np.float64]
    cy: NDArray[np.float64]
    kept: NDArray[np.float64]
    dx0: NDArray[np.float64]
    dy0: NDArray[np.float64]
    rms: NDArray[np.float64]
    fwhm: NDArray[np.float64]
    snr: NDArray[np.float64]
    chi2: NDArray[np.float64]
    residual: NDArray[np.float64]
    noise_fraction: NDArray[np.float64]
    photons: float = 1.0
    glow: float = 0.0

    def __len__(self) -> int:
        return len(self.column)

    @property
    def size(self) -> int:
        """Side of a stamp in pixels."""
        return int(self.data.shape[-1])

    @property
    def sky_error(self) -> float:
        """Error of the sky under a star, as a fraction of its noise."""
        return max(SKY_ERROR, self.glow)

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

    def cut(self, image: NDArray[np.floating]) -> NDArray[np.float32]:
        """The stamps' pixels of another image; 0 outside it."""
        out = np.zeros(self.data.shape, dtype=np.float32)
        _cut(plain(image, np.float32), self.column, self.row, out)
        return out


def cut_stars(
    data: NDArray[np.floating],
    rms: NDArray[np.floating],
    mask: NDArray[np.integer] | None,
    stars: Stars,
    size: int,
) -> StarStamps:
    """Stamps of (size, size) pixels around stars, with first guesses from their moments."""
    table = stars.table
    n = len(table)
    column, row = np.rint(table["x"]).astype(np.int64), np.rint(table["y"]).astype(np.int64)
    image = plain(data, np.float32)
    bad = bad_pixels(image, mask)
    pixels = np.zeros((n, size, size), dtype=np.float32)
    good = np.ones((n, size, size), dtype=np.float32)
    _cut(image, column, row, pixels)
    _mark_bad(np.zeros((1, 1), dtype=np.bool_) if bad is None else bad, bad is not None, image.shape, column, row, good)
    pixels[good == 0] = 0.0
    sky_noise = np.asarray(rms[row, column], dtype=np.float64)
    order = np.argsort(stars.sources["y"], kind="stable")
    neighbours = [np.ascontiguousarray(stars.sources[name][order]) for name in ("x", "y", "flux", "fwhm")]
    reach = 2.0 * size
    begin, end = np.searchsorted(neighbours[1], table["y"] - reach), np.searchsorted(neighbours[1], table["y"] + reach)
    place = [np.ascontiguousarray(table[name]) for name in ("x", "y", "flux", "fwhm")]
    _mark_neighbours(*neighbours, begin, end, *place, column, row, sky_noise, good)
    dx, dy = table["x"] - column, table["y"] - row
    return StarStamps(
        data=pixels,
        good=good,
        profile=np.zeros_like(pixels),
        column=column,
        row=row,
        dx=dx,
        dy=dy,
        flux=table["flux"].astype(np.float64),
        sky=np.zeros(n),
        cx=np.zeros(n),
        cy=np.zeros(n),
        kept=np.ones(n),
        dx0=dx,
        dy0=dy,
        rms=sky_noise,
        fwhm=table["fwhm"].astype(np.float64),
        snr=table["snr"].astype(np.float64),
        chi2=np.ones(n),
        residual=np.zeros(n),
        noise_fraction=np.zeros(n),
    )


def recentred(raw: StarStamps, fitted: StarStamps, matrix: NDArray[np.float64], beta: float) -> StarStamps:
    """The stars `fitted` with their pixels moved from `raw` so that each star sits on the middle of its stamp.

    Parameters
    ----------
    raw : StarStamps
        As `cut_stars` made them; the same stars.
    fitted : StarStamps
        Where the stars are, and how bright.
    matrix : ndarray (n, 3)
        Of the smooth profile at the stars.
    beta : float
        Its exponent.
    """
    data, good, profile = np.empty_like(raw.data), np.empty_like(raw.good), np.empty_like(raw.data)
    kept = np.empty(len(raw))
    fit = np.stack([fitted.flux, fitted.dx, fitted.dy, fitted.sky], axis=-1)
    _recentre(raw.data, raw.good, matrix, moffat_table(beta), edge_taper(raw.size), fit, data, good, profile, kept)
    return replace(fitted, data=data, good=good, profile=profile, kept=kept, cx=fitted.dx, cy=fitted.dy)


@dataclass(frozen=True)
class Misfit:
    """What a model leaves of the stars: ``data − flux model − sky`` and its weights (n, size, size) float32."""

    residual: NDArray[np.float32]
    weight: NDArray[np.float32]

    def take(self, rows: NDArray[np.intp]) -> Misfit:
        """Of some of the stars."""
        return Misfit(self.residual[rows], self.weight[rows])


def fit_stars(
    stars: StarStamps, basis: NDArray[np.float64], planes: NDArray[np.float64], *, n_iter: int
) -> tuple[StarStamps, Misfit]:
    """Flux, position and sky of each star against its model, by Gauss-Newton steps with outlying pixels faded out.

    Parameters
    ----------
    stars : StarStamps
        Recentred.
    basis : ndarray (n, k)
        Values of the polynomial terms at the stars.
    planes : ndarray (k, size, size)
        The model: ``profile + Σ_k basis_k taper planes_k``.
    """
    fit = np.stack([stars.flux, stars.dx - stars.cx, stars.dy - stars.cy, stars.sky], axis=-1)
    n, size = len(stars), stars.size
    scores = np.zeros((n, 3))
    residual, weight = np.empty_like(stars.data), np.empty_like(stars.data)
    tapered = (planes * edge_taper(size)).astype(np.float32)
    _fit_stars(
        stars.data.reshape(n, -1),
        stars.good.reshape(n, -1),
        stars.profile.reshape(n, -1),
        basis.astype(np.float32),
        tapered.reshape(len(planes), -1),
        size,
        stars.rms,
        stars.photons,
        stars.kept,
        stars.sky_error,
        n_iter,
        fit,
        scores,
        residual.reshape(n, -1),
        weight.reshape(n, -1),
    )
    fitted = replace(
        stars,
        flux=fit[:, 0],
        dx=stars.cx + fit[:, 1],
        dy=stars.cy + fit[:, 2],
        sky=fit[:, 3],
        chi2=scores[:, 0],
        residual=scores[:, 1],
        noise_fraction=scores[:, 2],
    )
    return fitted, Misfit(residual, weight)


def solve_planes(
    stars: StarStamps, misfit: Misfit, basis: NDArray[np.float64], *, n_iter: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Correction to the model's pixel planes, least squares over all stars, and its 1-sigma errors.

    Minimises ``Σ w (residual − flux Σ_k basis_k Δ_k − sky)²`` over the planes Δ and the skies together, by
    preconditioned conjugate gradients. (Fitted in turn instead, sky and wings would take forever to part.)

    Parameters
    ----------
    basis : ndarray (n, k)
        Values of the polynomial terms at the stars, best orthonormal over them.

    Returns
    -------
    correction, noise, common : ndarray (k, size, size)
        `noise`, of each pixel by itself, is the stars' own scatter (White 1980, doi:10.2307/1912934), smoothed over
        neighbouring pixels: the weights, which trust no model to better than `MODEL_ERROR`, would overstate it for
        bright stars.
        `common` is what light about the stars that is not theirs (`StarStamps.glow`) makes of whole regions of
        the planes: a star's by as much everywhere, and from star to star by chance.
    """
    n, size = len(stars), stars.size
    n_planes = basis.shape[1]
    weight, residual = misfit.weight.reshape(n, -1), misfit.residual.reshape(n, -1)
    factor = (basis * stars.flux[:, None]).astype(np.float32)
    # Each star's sky is eliminated: W becomes W − W 1 (1ᵀ W 1 + prior)⁻¹ 1ᵀ W.
    prior = 1 / (stars.sky_error * stars.rms) ** 2
    right = np.zeros((n_planes, size * size), dtype=np.float32)
    diagonal = np.zeros((n_planes, size * size), dtype=np.float32)
    scatter = np.zeros((n_planes, size * size), dtype=np.float32)
    total = np.zeros(n, dtype=np.float32)
    _right_side(weight, residual, factor, prior, stars.sky, total, right, diagonal, scatter)
    # A pixel that no star covers keeps its value. (The least weights are those of bright stars' peaks.)
    ridge = 1e-7 * np.median(diagonal, axis=1, keepdims=True) + np.float32(1e-30)
    diagonal += ridge

    solution = np.zeros_like(right)
    left = right.copy()
    step = left / diagonal
    direction = step.copy()
    rho = np.sum(left * step, dtype=np.float64)
    first = rho
    for _ in range(n_iter):
        if rho <= 1e-6 * first:
            break
        image = np.zeros_like(right)
        _normal(direction, weight, total, factor, image)
        image += ridge * direction
        length = np.float32(rho / np.sum(direction * image, dtype=np.float64))
        solution += length * direction
        left -= length * image
        step = left / diagonal
        rho, old = np.sum(left * step, dtype=np.float64), rho
        direction = step + np.float32(rho / old) * direction
    shape = (n_planes, size, size)
    share = (scatter / diagonal * (n / max(n - n_planes, 1))).reshape(shape)
    share = np.clip(ndimage.gaussian_filter(share, (0, 1.5, 1.5), mode="nearest"), 0.1, 10.0)
    noise = np.sqrt(share / diagonal.reshape(shape))
    pull = (factor * (stars.glow * stars.rms)[:, None]).astype(np.float32)
    common = (np.sqrt((pull**2).T @ weight**2) / diagonal).reshape(shape)
    return solution.reshape(shape).astype(np.float64), noise.astype(np.float64), common.astype(np.float64)


@njit(cache=True)
def _cut(image, column, row, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    ny, nx = image.shape
    size = out.shape[1]
    half = size // 2
    for n in range(column.size):
        j0, i0 = row[n] - half, column[n] - half
        for j in range(max(0, -j0), min(size, ny - j0)):
            a, b = max(0, -i0), min(size, nx - i0)
            out[n, j, a:b] = image[j0 + j, i0 + a : i0 + b]


@njit(cache=True)
def _mark_bad(bad, masked, shape, column, row, good):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """0 where a pixel is bad or outside the image."""
    ny, nx = shape
    size = good.shape[1]
    half = size // 2
    for n in range(column.size):
        j0, i0 = row[n] - half, column[n] - half
        whole = j0 >= 0 and i0 >= 0 and j0 + size <= ny and i0 + size <= nx
        if whole and not masked:
            continue
        for j in range(size):
            for i in range(size):
                if not (0 <= j0 + j < ny and 0 <= i0 + i < nx) or (masked and bad[j0 + j, i0 + i]):
                    good[n, j, i] = 0.0


@njit(cache=True)
def _light(flux, fwhm, r2):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Electrons a pixel at a distance: a Moffat profile's wings, ``(1 + (r / FWHM)²)^-2.5``."""
    return 0.477 * flux / fwhm**2 * (1.0 + r2 / fwhm**2) ** -2.5


@njit(cache=True)
def _mark_neighbours(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    xs, ys, fluxes, widths, begin, end, star_x, star_y, star_flux, star_fwhm, column, row, rms, good
):
    """0 where a neighbour puts much light; never within 0.75 FWHM of the star."""
    size = good.shape[1]
    half = size // 2
    for n in range(column.size):
        j0, i0 = row[n] - half, column[n] - half
        for m in range(begin[n], end[n]):
            distance2 = (xs[m] - star_x[n]) ** 2 + (ys[m] - star_y[n]) ** 2
            if distance2 < star_fwhm[n] ** 2 or fluxes[m] <= 0.0:
                continue
            width = max(widths[m], star_fwhm[n])
            excess = (_light(fluxes[m], width, 0.0) / (_NEIGHBOUR * rms[n])) ** 0.4 - 1.0
            if excess <= 0.0:
                continue
            radius = width * np.sqrt(excess) + 1.0
            y0, y1 = int(np.ceil(ys[m] - radius)) - j0, int(np.floor(ys[m] + radius)) + 1 - j0
            x0, x1 = int(np.ceil(xs[m] - radius)) - i0, int(np.floor(xs[m] + radius)) + 1 - i0
            for j in range(max(0, y0), min(size, y1)):
                for i in range(max(0, x0), min(size, x1)):
                    r2 = (i0 + i - xs[m]) ** 2 + (j0 + j - ys[m]) ** 2
                    if r2 > radius * radius:
                        continue
                    own2 = (i0 + i - star_x[n]) ** 2 + (j0 + j - star_y[n]) ** 2
                    if own2 < (0.75 * star_fwhm[n]) ** 2:
                        continue
                    # A pixel of margin; the rest fades out by itself.
                    nearer = max(0.0, np.sqrt(r2) - 1.0) ** 2
                    allowed = _NEIGHBOUR * rms[n] + _NEIGHBOUR_OF_STAR * _light(star_flux[n], star_fwhm[n], own2)
                    if _light(fluxes[m], width, nearer) > allowed:
                        good[n, j, i] = 0.0


@njit(cache=True)
def _recentre(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    raw, raw_good, matrix, table, taper, fit, data, good, profile, kept
):
    n_stars, ny, nx = raw.shape
    rest, moved, work = np.empty((ny, nx)), np.empty((ny, nx)), np.empty((ny, nx))
    drawn, still = np.empty((ny, nx)), np.empty((ny, nx))
    for n in range(n_stars):
        flux, dx, dy, sky = fit[n, 0], fit[n, 1], fit[n, 2], fit[n, 3]
        drawn[:] = 0.0
        still[:] = 0.0
        add_profile(drawn, matrix[n], table, dx, dy)
        add_profile(still, matrix[n], table, 0.0, 0.0)
        for j in range(ny):
            for i in range(nx):
                rest[j, i] = raw_good[n, j, i] * (raw[n, j, i] - flux * taper[j, i] * drawn[j, i] - sky)
        tx, ty = taps(-dx), taps(-dy)
        kept[n] = np.sum(tx * tx) * np.sum(ty * ty)
        transform(rest, tx, ty, moved, work)
        for j in range(ny):
            for i in range(nx):
                profile[n, j, i] = taper[j, i] * still[j, i]
                data[n, j, i] = moved[j, i] + flux * taper[j, i] * still[j, i] + sky
        # A moved pixel is good where the two by two that it comes from are.
        a, b = int(np.floor(dx)), int(np.floor(dy))
        for j in range(ny):
            for i in range(nx):
                fine = 1.0
                for v in range(j + b, j + b + 2):
                    for u in range(i + a, i + a + 2):
                        if not (0 <= v < ny and 0 <= u < nx) or raw_good[n, v, u] == 0.0:
                            fine = 0.0
                good[n, j, i] = fine


@njit(cache=True)
def _wide(residual, model, good, flux, rms, photons):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Typical |z| of the core in sigma, at least 1: while the model is still wrong, its errors are no outliers."""
    limit = 0.1 * model.max()
    z = np.empty(model.size, dtype=np.float32)
    n = 0
    for p in range(model.size):
        if model[p] > limit and good[p] > 0.0:
            m = flux * model[p]
            z[n] = abs(residual[p]) / np.sqrt(rms * rms + photons * m + (MODEL_ERROR * m) ** 2)
            n += 1
    return max(1.0, 1.4826 * np.median(z[:n])) if n > 3 else 1.0


@njit(cache=True, fastmath=True, forceinline=True)
def _fill_model(profile, basis, planes, model):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    for p in range(model.size):
        model[p] = profile[p]
    for k in range(basis.size):
        b, plane = basis[k], planes[k]
        for p in range(model.size):
            model[p] += b * plane[p]


@njit(cache=True, fastmath=True, forceinline=True)
def _slopes(model, size, gx, gy):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Five-point derivatives; the taper is zero at the ends of rows, where they mean nothing."""
    eight, one = np.float32(8 / 12), np.float32(1 / 12)
    n = model.size - 4 * size
    left2, left, right, right2 = (
        model[2 * size - 2 :],
        model[2 * size - 1 :],
        model[2 * size + 1 :],
        model[2 * size + 2 :],
    )
    up2, up, down, down2 = model, model[size:], model[3 * size :], model[4 * size :]
    a, b = gx[2 * size :], gy[2 * size :]
    for p in range(n):
        a[p] = eight * (right[p] - left[p]) - one * (right2[p] - left2[p])
    for p in range(n):
        b[p] = eight * (down[p] - up[p]) - one * (down2[p] - up2[p])


@njit(cache=True, fastmath=True, forceinline=True)
def _leave(data, model, gx, gy, flux, ex, ey, sky, residual):  # type: ignore[no-untyped-def]  # pragma: no cover
    for p in range(data.size):
        residual[p] = data[p] - flux * (model[p] - ex * gx[p] - ey * gy[p]) - sky


@njit(cache=True, fastmath=True, forceinline=True)
def _weigh(residual, good, model, flux, rms, photons, wide, weight):  # type: ignore[no-untyped-def]  # pragma: no cover
    floor, zero, one = rms * rms, np.float32(0), np.float32(1)
    reach2 = np.float32(1) / (np.float32(TUKEY) * wide) ** 2
    error2 = np.float32(MODEL_ERROR**2)
    for p in range(residual.size):
        m = max(flux * model[p], zero)
        inverse = one / (floor + photons * m + error2 * m * m)
        q = max(one - residual[p] * residual[p] * inverse * reach2, zero)
        weight[p] = good[p] * q * q * inverse


@njit(cache=True, fastmath=True, forceinline=True)
def _sums(residual, weight, model, gx, gy, ex, ey, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Normal equations of (flux, ex, ey, sky), the derivatives by ex and ey per electron and of the other sign."""
    z = np.float32(0)
    a0 = a1 = a2 = a3 = b01 = b02 = b03 = b12 = b13 = b23 = z
    r0 = r1 = r2 = r3 = z
    for p in range(residual.size):
        w, x, y, r = weight[p], gx[p], gy[p], residual[p]
        m = model[p] - ex * x - ey * y
        wm, wx, wy, wr = w * m, w * x, w * y, w * r
        a0 += wm * m
        a1 += wx * x
        a2 += wy * y
        a3 += w
        b01 += wm * x
        b02 += wm * y
        b03 += wm
        b12 += wx * y
        b13 += wx
        b23 += wy
        r0 += wm * r
        r1 += wx * r
        r2 += wy * r
        r3 += wr
    out[0], out[1], out[2], out[3], out[4], out[5], out[6] = a0, a1, a2, a3, b01, b02, b03
    out[7], out[8], out[9], out[10], out[11], out[12], out[13] = b12, b13, b23, r0, r1, r2, r3


@njit(cache=True)
def _fit_stars(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    data, good, profile, basis, planes, size, rms, photons, kept, sky_error, n_iter, fit, scores, residual, weight
):
    n_stars, n_pixels = data.shape
    model = np.empty(n_pixels, dtype=np.float32)
    gx, gy = np.zeros(n_pixels, dtype=np.float32), np.zeros(n_pixels, dtype=np.float32)
    sums = np.empty(14)
    normal, right = np.empty((4, 4)), np.empty(4)
    for n in range(n_stars):
        _fill_model(profile[n], basis[n], planes, model)
        _slopes(model, size, gx, gy)
        noise, light = np.float32(rms[n] * np.sqrt(kept[n])), np.float32(photons * kept[n])
        for turn in range(n_iter + 1):
            flux, ex, ey, sky = fit[n, 0], fit[n, 1], fit[n, 2], fit[n, 3]
            f, x, y = np.float32(flux), np.float32(ex), np.float32(ey)
            _leave(data[n], model, gx, gy, f, x, y, np.float32(sky), residual[n])
            wide = np.float32(_wide(residual[n], model, good[n], f, noise, light))
            _weigh(residual[n], good[n], model, f, noise, light, wide, weight[n])
            if turn == n_iter:
                break
            _sums(residual[n], weight[n], model, gx, gy, x, y, sums)
            prior = 1.0 / (sky_error * rms[n]) ** 2
            normal[0, 0], normal[1, 1], normal[2, 2] = sums[0], flux * flux * sums[1], flux * flux * sums[2]
            normal[3, 3] = sums[3] + prior
            normal[0, 1] = normal[1, 0] = -flux * sums[4]
            normal[0, 2] = normal[2, 0] = -flux * sums[5]
            normal[0, 3] = normal[3, 0] = sums[6]
            normal[1, 2] = normal[2, 1] = flux * flux * sums[7]
            normal[1, 3] = normal[3, 1] = -flux * sums[8]
            normal[2, 3] = normal[3, 2] = -flux * sums[9]
            right[0], right[1], right[2] = sums[10], -flux * sums[11], -flux * sums[12]
            right[3] = sums[13] - prior * sky
            for a in range(4):
                normal[a, a] = normal[a, a] * (1 + 1e-9) + 1e-300
            step = np.linalg.solve(normal, right)
            fit[n, 0] = max(flux + step[0], 0.1 * flux)
            fit[n, 1] = min(max(ex + min(max(step[1], -0.5), 0.5), -2.0), 2.0)
            fit[n, 2] = min(max(ey + min(max(step[2], -0.5), 0.5), -2.0), 2.0)
            fit[n, 3] = sky + step[3]
        limit = 0.05 * model.max()
        chi2 = square = spread = 0.0
        count = 0
        for p in range(n_pixels):
            if model[p] > limit and good[n, p] > 0.0:
                m = fit[n, 0] * model[p]
                var = kept[n] * (rms[n] ** 2 + photons * m)
                r = residual[n, p]
                chi2 += r * r / (var + (MODEL_ERROR * m) ** 2)
                square += r * r
                spread += var
                count += 1
        # Four numbers were fitted.
        free = max(count - 4.0, 1.0)
        peak = fit[n, 0] * limit / 0.05
        scores[n, 0] = chi2 / free
        scores[n, 1] = np.sqrt(square / free) / peak
        scores[n, 2] = np.sqrt(spread / max(count, 1)) / peak


@njit(cache=True, fastmath=True)
def _right_side(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    weight, residual, factor, prior, sky, total, right, diagonal, scatter
):
    n_stars, n_pixels = weight.shape
    for n in range(n_stars):
        w, r = weight[n], residual[n]
        sum_w = sum_r = np.float32(0)
        for p in range(n_pixels):
            sum_w += w[p]
            sum_r += w[p] * r[p]
        total[n] = sum_w + prior[n]
        shift = np.float32((sum_r - prior[n] * sky[n]) / total[n])
        for k in range(factor.shape[1]):
            f, f2 = factor[n, k], factor[n, k] ** 2
            out, square, spread = right[k], diagonal[k], scatter[k]
            for p in range(n_pixels):
                pull = w[p] * (r[p] - shift)
                out[p] += f * pull
                square[p] += f2 * w[p]
                spread[p] += f2 * pull * pull


@njit(cache=True, fastmath=True)
def _normal(planes, weight, total, factor, result):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    n_stars, n_pixels = weight.shape
    mixed = np.empty(n_pixels, dtype=np.float32)
    for n in range(n_stars):
        w = weight[n]
        for p in range(n_pixels):
            mixed[p] = 0.0
        for k in range(planes.shape[0]):
            f, plane = factor[n, k], planes[k]
            for p in range(n_pixels):
                mixed[p] += f * plane[p]
        mean = np.float32(0)
        for p in range(n_pixels):
            mean += mixed[p] * w[p]
        mean /= total[n]
        for p in range(n_pixels):
            mixed[p] = (mixed[p] - mean) * w[p]
        for k in range(planes.shape[0]):
            f, out = factor[n, k], result[k]
            for p in range(n_pixels):
                out[p] += f * mixed[p]
