"""Where a source is and how wide: moments under a Gaussian that fits itself to the source.

This is the definition of "centre" that star positions and PSF stamps share. A PSF is centred when the function here
says (0, 0); a star found here and a PSF centred here differ by no offset, however lopsided the profile, so their
difference has no dipole.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["MOMENTS", "fwhm_of", "measure_moments"]

#: Columns of `measure_moments`.
MOMENTS = np.dtype([(name, "f8") for name in ("x", "y", "xx", "yy", "xy", "flux")] + [("ok", "?")])

_FWHM_PER_SIGMA = 2.0 * np.sqrt(2.0 * np.log(2.0))


def measure_moments(
    data: NDArray[np.floating], x: NDArray[np.floating], y: NDArray[np.floating], *, fwhm: float = 3.0
) -> NDArray[np.void]:
    """Adaptive moments of sources at given places.

    The weight is an elliptical Gaussian whose centre and covariance M follow the source until they repeat:
    ``0 = Σ w I d`` and ``M = 2 Σ w I d dᵀ / Σ w I`` (Bernstein & Jarvis 2002, AJ 123, 583, section 3;
    Hirata & Seljak 2003, MNRAS 343, 459). For a Gaussian source M is its covariance.

    Parameters
    ----------
    data : ndarray (ny, nx)
        Background-subtracted image, finite.
    x, y : ndarray (n,)
        First guesses in pixels, within about half a FWHM.
    fwhm : float
        First guess of the width in pixels.

    Returns
    -------
    structured ndarray (n,) of dtype `MOMENTS`
        Centre (pixels), covariance ``xx, yy, xy`` (pixels²), flux under the weight (twice ``Σ w I``, the total for a
        Gaussian), and ``ok``: converged, within 2 FWHM of the guess, and no narrower than a pixel allows.
    """
    image = np.ascontiguousarray(data, dtype=np.float64)
    start_x, start_y = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (x, y))
    out = np.empty((start_x.size, 7))
    _moments(image, start_x, start_y, (fwhm / _FWHM_PER_SIGMA) ** 2, out)
    table = np.zeros(start_x.size, dtype=MOMENTS)
    for k, name in enumerate(MOMENTS.names or ()):
        table[name] = out[:, k]
    return table


def fwhm_of(moments: NDArray[np.void]) -> NDArray[np.float64]:
    """FWHM in pixels of the Gaussian of the same area: 2.355 (xx yy − xy²)^¼."""
    area = moments["xx"] * moments["yy"] - moments["xy"] ** 2
    return _FWHM_PER_SIGMA * np.maximum(area, 0.0) ** 0.25  # type: ignore[no-any-return]


@njit(cache=True)
def _moments(image, xs, ys, variance0, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    ny, nx = image.shape
    for n in range(xs.size):
        x, y = xs[n], ys[n]
        xx, yy, xy = variance0, variance0, 0.0
        flux, ok = 0.0, False
        for _ in range(60):
            det = xx * yy - xy * xy
            if not (det > 0.0036 and 0.05 < xx < 900.0 and 0.05 < yy < 900.0):
                break
            ixx, iyy, ixy = yy / det, xx / det, -xy / det
            rx, ry = 4.0 * np.sqrt(xx), 4.0 * np.sqrt(yy)
            x0, x1 = max(0, int(np.ceil(x - rx))), min(nx, int(np.floor(x + rx)) + 1)
            y0, y1 = max(0, int(np.ceil(y - ry))), min(ny, int(np.floor(y + ry)) + 1)
            s0 = sx = sy = sxx = syy = sxy = 0.0
            for j in range(y0, y1):
                dy = j - y
                for i in range(x0, x1):
                    dx = i - x
                    q = ixx * dx * dx + iyy * dy * dy + 2.0 * ixy * dx * dy
                    if q < 16.0:
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
            nxx = 2.0 * (sxx / s0 - mx * mx)
            nyy = 2.0 * (syy / s0 - my * my)
            nxy = 2.0 * (sxy / s0 - mx * my)
            flux = 2.0 * s0
            # The centroid under a weight of the source's own width moves half as far as the source is off.
            x += 2.0 * mx
            y += 2.0 * my
            move = abs(mx) + abs(my)
            change = (abs(nxx - xx) + abs(nyy - yy) + abs(nxy - xy)) / (xx + yy)
            # Half of a wrong width survives each step, so step twice as far, within reason.
            xx, yy, xy = _step(xx, nxx), _step(yy, nyy), xy + 1.5 * (nxy - xy)
            if xy * xy >= 0.95 * xx * yy:
                xy = nxy
            if (x - xs[n]) ** 2 + (y - ys[n]) ** 2 > 4.0 * 5.545 * max(variance0, 0.5 * (xx + yy)):
                break
            if move < 1e-5 and change < 1e-5:
                ok = True
                break
        out[n, 0], out[n, 1], out[n, 2], out[n, 3], out[n, 4], out[n, 5], out[n, 6] = x, y, xx, yy, xy, flux, ok


@njit(cache=True)
def _step(old, new):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    return min(max(old + 1.5 * (new - old), 0.5 * old), 2.0 * old)
