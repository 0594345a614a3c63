"""Where a source is and how wide: moments under a Gaussian that fits itself to the source.

This is the definition of "centre" that star positions and PSF stamps share. A PSF is centred when the function here
says (0, 0); a star found here and a PSF centred here differ by no offset, however lopsided the profile, so their
difference has no dipole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from batchproc.imaging.starpeaks import plain

__all__ = ["MOMENTS", "fwhm_of", "measure_moments"]

#: Columns of `measure_moments`.
MOMENTS = np.dtype([(name, "f8") for name in ("x", "y", "xx", "yy", "xy", "flux")] + [("ok", "?")])

#: Variance (pixels²) of the narrowest weight.
NARROWEST = 0.7

_FWHM_PER_SIGMA = 2.0 * np.sqrt(2.0 * np.log(2.0))


def measure_moments(
    data: NDArray[np.floating],
    x: NDArray[Any],
    y: NDArray[Any],
    *,
    fwhm: float = 3.0,
    bad: NDArray[np.bool_] | None = None,
    tolerance: float = 1e-5,
) -> NDArray[np.void]:
    """Adaptive moments of sources at given places.

    The weight is an elliptical Gaussian whose centre and covariance M follow the source until they repeat:
    ``0 = Σ w I d`` and ``M = 2 Σ w I d dᵀ / Σ w I`` (Bernstein & Jarvis 2002, AJ 123, 583, section 3;
    Hirata & Seljak 2003, MNRAS 343, 459). For a Gaussian source M is its covariance. The weight's axes are kept from
    getting narrower than pixels can sample; a narrower source is measured under that weight.

    Parameters
    ----------
    data : ndarray (ny, nx)
        Background-subtracted image, finite.
    x, y : ndarray (n,)
        First guesses in pixels, within about half a FWHM.
    fwhm : float
        First guess of the width in pixels.
    bad : ndarray (ny, nx) bool, optional
        Pixels that count as zero, whatever they hold.
    tolerance : float
        Moves (pixels) and relative changes of the covariance below this end the iteration; what is left of them is
        about as large.

    Returns
    -------
    structured ndarray (n,) of dtype `MOMENTS`
        Centre (pixels), covariance ``xx, yy, xy`` (pixels²), flux from under the weight (the total for a Gaussian), and
        ``ok``: converged, within 2 FWHM of the guess.
    """
    image = plain(data, np.float32 if data.dtype == np.float32 else np.float64)
    start_x, start_y = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (x, y))
    out = np.empty((start_x.size, 7))
    masked = np.zeros((1, 1), dtype=np.bool_) if bad is None else bad
    _moments(image, masked, bad is not None, start_x, start_y, (fwhm / _FWHM_PER_SIGMA) ** 2, tolerance, out)
    table = np.zeros(start_x.size, dtype=MOMENTS)
    for k, name in enumerate(MOMENTS.names or ()):
        table[name] = out[:, k]
    return table


def fwhm_of(moments: NDArray[np.void]) -> NDArray[np.float64]:
    """FWHM in pixels of the Gaussian of the same area: 2.355 (xx yy − xy²)^¼."""
    area = moments["xx"] * moments["yy"] - moments["xy"] ** 2
    return _FWHM_PER_SIGMA * np.maximum(area, 0.0) ** 0.25  # type: ignore[no-any-return]


@njit(cache=True)
def _moments(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    image, bad, masked, xs, ys, variance0, tolerance, out
):
    ny, nx = image.shape
    for n in range(xs.size):
        x, y = xs[n], ys[n]
        xx, yy, xy = variance0, variance0, 0.0
        flux, ok = 0.0, False
        widest = max(150.0, 9.0 * variance0)
        for _ in range(60):
            if not (xx > 0.0 and yy > 0.0 and xx * yy > xy * xy and xx < widest and yy < widest):
                break
            wxx, wyy, wxy = _at_least(xx, yy, xy, NARROWEST)
            det = wxx * wyy - wxy * wxy
            ixx, iyy, ixy = wyy / det, wxx / det, -wxy / det
            rx, ry = 4.0 * np.sqrt(wxx), 4.0 * np.sqrt(wyy)
            x0, x1 = max(0, int(np.ceil(x - rx))), min(nx, int(np.floor(x + rx)) + 1)
            y0, y1 = max(0, int(np.ceil(y - ry))), min(ny, int(np.floor(y + ry)) + 1)
            s0 = sx = sy = sxx = syy = sxy = 0.0
            for j in range(y0, y1):
                dy = j - y
                for i in range(x0, x1):
                    dx = i - x
                    q = ixx * dx * dx + iyy * dy * dy + 2.0 * ixy * dx * dy
                    if q < 16.0 and not (masked and bad[j, i]):
                        w = np.exp(-0.5 * q) * image[j, i]
                        s0 += w
                        sx += w * dx
                        sy += w * dy
                        sxx += w * dx * dx
                        syy += w * dy * dy
                        sxy += w * dx * dy
            if not s0 > 0.0:
                break
            mx, my = sx / s0, sy / s0
            txx, tyy, txy = sxx / s0 - mx * mx, syy / s0 - my * my, sxy / s0 - mx * my
            if wxx == xx and wyy == yy:
                # Half of a wrong width survives M = 2 T, so step half as far again.
                nxx, nyy, nxy = xx + 1.5 * (2 * txx - xx), yy + 1.5 * (2 * tyy - yy), xy + 1.5 * (2 * txy - xy)
            else:
                nxx, nyy, nxy = _without_weight(txx, tyy, txy, ixx, iyy, ixy)
            nxx, nyy = min(max(nxx, 0.5 * xx), 2.0 * xx), min(max(nyy, 0.5 * yy), 2.0 * yy)
            nxy = min(max(nxy, -0.98 * np.sqrt(nxx * nyy)), 0.98 * np.sqrt(nxx * nyy))
            flux = s0 * np.sqrt(((xx + wxx) * (yy + wyy) - (xy + wxy) ** 2) / det)
            # The centroid under a weight of the source's own width moves half as far as the source is off.
            x += 2.0 * mx
            y += 2.0 * my
            move = abs(mx) + abs(my)
            change = (abs(nxx - xx) + abs(nyy - yy) + abs(nxy - xy)) / (xx + yy)
            xx, yy, xy = nxx, nyy, nxy
            if (x - xs[n]) ** 2 + (y - ys[n]) ** 2 > 4.0 * 5.545 * max(variance0, 0.5 * (xx + yy)):
                break
            if move < tolerance and (change < tolerance or xx + yy < 1e-3):
                ok = True
                break
        out[n, 0], out[n, 1], out[n, 2], out[n, 3], out[n, 4], out[n, 5], out[n, 6] = x, y, xx, yy, xy, flux, ok


@njit(cache=True)
def _at_least(xx, yy, xy, least):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The covariance with its axes no shorter than a variance."""
    mean, half = 0.5 * (xx + yy), 0.5 * (xx - yy)
    radius = np.sqrt(half * half + xy * xy)
    if mean - radius >= least:
        return xx, yy, xy
    if mean + radius <= least or radius == 0.0:
        return max(mean + radius, least), max(mean + radius, least), 0.0
    new_mean, new_radius = 0.5 * (mean + radius + least), 0.5 * (mean + radius - least)
    factor = new_radius / radius
    return new_mean + factor * half, new_mean - factor * half, factor * xy


@njit(cache=True)
def _without_weight(txx, tyy, txy, ixx, iyy, ixy):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Covariance C of a Gaussian whose moments under the weight W are T: ``C⁻¹ = T⁻¹ − W⁻¹``."""
    det = txx * tyy - txy * txy
    if det <= 1e-12:
        return txx, tyy, txy
    cxx, cyy, cxy = tyy / det - ixx, txx / det - iyy, -txy / det - ixy
    det = cxx * cyy - cxy * cxy
    if cxx <= 0.0 or cyy <= 0.0 or det <= 1e-6:
        return 2.0 * txx, 2.0 * tyy, 2.0 * txy
    return cyy / det, cxx / det, -cxy / det
