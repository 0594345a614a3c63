"""A small star-field simulator for tests: Gaussian stars at given places, integrated over pixels, and plain WCS."""

import numpy as np
from astropy.wcs import WCS
from scipy.special import erf

from batchproc.records import Exposure

FWHM_TO_SIGMA = 1 / 2.3548200450309493


def render(shape, x, y, flux, fwhm, *, elongation=1.0):
    """Noiseless stars, each pixel the integral of the Gaussian over it; `elongation` stretches along x."""
    image = np.zeros(shape)
    sy = fwhm * FWHM_TO_SIGMA
    sx = sy * elongation
    reach = int(np.ceil(6 * max(sx, sy)))
    for xi, yi, fi in zip(x, y, np.broadcast_to(flux, np.shape(x)), strict=True):
        x0, x1 = max(round(xi) - reach, 0), min(round(xi) + reach + 1, shape[1])
        y0, y1 = max(round(yi) - reach, 0), min(round(yi) + reach + 1, shape[0])
        if x0 >= x1 or y0 >= y1:
            continue
        px, py = (
            np.diff(erf((np.arange(a, b + 1) - 0.5 - c) / (s * np.sqrt(2)))) / 2
            for a, b, c, s in ((x0, x1, xi, sx), (y0, y1, yi, sy))
        )
        image[y0:y1, x0:x1] += fi * py[:, None] * px[None, :]
    return image


def scatter_stars(n, shape, seed, *, margin=0, faintest=3e3, brightest=2e5, apart=0.0):
    """Positions and fluxes (power law, the brightest first); `apart`: no two nearer than this."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(margin, shape[1] - 1 - margin, 20 * n if apart else n)
    y = rng.uniform(margin, shape[0] - 1 - margin, x.size)
    if apart:
        keep = []
        for k in range(x.size):
            if all(np.hypot(x[k] - x[j], y[k] - y[j]) >= apart for j in keep):
                keep.append(k)
            if len(keep) == n:
                break
        x, y = x[keep], y[keep]
    low, high = faintest**-0.7, brightest**-0.7
    flux = np.sort((low + (high - low) * rng.random(x.size)) ** (-1 / 0.7))[::-1]
    return x, y, flux


def expose(clean, seed, *, sky=400.0, **kwargs):
    """An Exposure with Poisson-like (Gaussian) noise of sky and stars, in electrons."""
    rng = np.random.default_rng(seed)
    mean = np.asarray(clean, np.float64) + sky
    data = (mean + rng.normal(size=mean.shape) * np.sqrt(mean)).astype(np.float32)
    kwargs.setdefault("mask", np.zeros(data.shape, np.uint8))
    return Exposure(data=data, variance=None, meta={"path": f"seed{seed}"}, **kwargs)


def tan_wcs(shape, *, ra=150.0, dec=20.0, scale_arcsec=1.0, angle_deg=0.0, parity=-1, centre=None):
    """A TAN WCS, its tangent point at `centre` (x, y; default the middle)."""
    w = WCS(naxis=2)
    w.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    w.wcs.crval = [ra, dec]
    cx, cy = centre or ((shape[1] - 1) / 2, (shape[0] - 1) / 2)
    w.wcs.crpix = [cx + 1, cy + 1]
    c, s = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
    w.wcs.cd = scale_arcsec / 3600 * np.array([[parity * c, -parity * s], [s, c]])
    w.wcs.set()
    return w


def sip_wcs(shape, *, strength=1.0, **kwargs):
    """TAN-SIP with some pixels of distortion in the corners (order 3), forward coefficients only."""
    header = tan_wcs(shape, **kwargs).to_header(relax=True)
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN-SIP", "DEC--TAN-SIP"
    half = max(shape) / 2
    header["A_ORDER"] = header["B_ORDER"] = 3
    header["A_2_0"], header["A_1_1"], header["A_3_0"], header["A_1_2"] = (
        strength * k / half**p for k, p in ((1.5, 2), (-0.8, 2), (2.0, 3), (1.0, 3))
    )
    header["B_0_2"], header["B_1_1"], header["B_0_3"], header["B_2_1"] = (
        strength * k / half**p for k, p in ((-1.0, 2), (0.6, 2), (1.5, 3), (-2.0, 3))
    )
    return WCS(header)


def tpv_wcs(shape, *, strength=1.0, **kwargs):
    """TPV as DECam has it: PV terms of second and third order, some pixels in the corners."""
    header = tan_wcs(shape, **kwargs).to_header()
    header["CTYPE1"], header["CTYPE2"] = "RA---TPV", "DEC--TPV"
    half = max(shape) / 2 * kwargs.get("scale_arcsec", 1.0) / 3600
    header["PV1_1"], header["PV2_1"] = 1.0 + 1e-3 * strength, 1.0 - 5e-4 * strength
    pixel = kwargs.get("scale_arcsec", 1.0) / 3600
    header["PV1_4"], header["PV2_4"] = 1.5 * strength * pixel / half**2, -1.0 * strength * pixel / half**2
    header["PV1_7"], header["PV2_7"] = 2.0 * strength * pixel / half**3, 1.5 * strength * pixel / half**3
    return WCS(header)
