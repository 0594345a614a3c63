"""From header to WCS, forgiving what surveys write and refusing what cannot be right."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales

from batchproc.io.fitsfile import first_line, quiet

__all__ = ["celestial_wcs", "pixel_scale_arcsec"]


def celestial_wcs(header: Any, shape: tuple[int, int]) -> tuple[WCS | None, str]:
    """Build the celestial WCS of an image.

    Parameters
    ----------
    header : astropy.io.fits.Header
    shape : (ny, nx)

    Returns
    -------
    wcs : WCS or None
        None where the header has none that is celestial and finite on the image.
    note : str
        Why there is none, or what was put right; empty otherwise.
    """
    try:
        with quiet():
            if not str(header.get("CTYPE1", "")).strip():
                return None, "no WCS: the header has no CTYPE1"
            header, notes = _repair(header)
            wcs = WCS(header)
            if not wcs.has_celestial:
                return None, f"no WCS: CTYPE1 = {header.get('CTYPE1')!r} is not celestial"
            wcs = wcs.celestial if wcs.naxis > 2 else wcs
            ny, nx = shape
            sky = wcs.all_pix2world([[0, 0], [nx - 1, ny - 1], [(nx - 1) / 2, (ny - 1) / 2]], 0)
            scale = pixel_scale_arcsec(wcs)
    except Exception as error:
        # wcslib has dozens of ways to say that a header is inconsistent; star patterns will do without it.
        return None, f"no WCS: {first_line(error)}"
    if not np.isfinite(sky).all() or not 1e-4 < scale < 3600:
        return None, f"no WCS: what the header describes is not an image of the sky (scale {scale:g} arcsec)"
    return wcs, "; ".join(notes)


def pixel_scale_arcsec(wcs: WCS) -> float:
    """Geometric mean of the pixel scales at the reference point, arcsec."""
    return float(np.sqrt(np.prod(proj_plane_pixel_scales(wcs)[:2]))) * 3600


def _repair(header: Any) -> tuple[Any, list[str]]:
    """A copy of the header without its contradictions, and what they were."""
    header = header.copy()
    notes: list[str] = []

    def drop(pattern: str, why: str) -> None:
        keys = [key for key in header if re.fullmatch(pattern, key)]
        for key in keys:
            header.remove(key, ignore_missing=True, remove_all=True)
        if keys:
            notes.append(why)

    if "CD1_1" in header:
        # The standard forbids both. Programs that edit a WCS (IRAF, SCAMP) write CD and leave PC as it was.
        drop(r"PC\d_\d", "the header has both CD and PC matrices: CD used")
    if "TPV" in str(header["CTYPE1"]):
        drop(r"(A|B|AP|BP)_(ORDER|DMAX|\d+_\d+)", "SIP coefficients beside a TPV projection: left out")
    elif "A_ORDER" in header and "TAN" in str(header["CTYPE1"]) and "SIP" not in str(header["CTYPE1"]):
        # astropy would apply them and log a line for each image; said once, here.
        header["CTYPE1"], header["CTYPE2"] = (str(header[key]).strip() + "-SIP" for key in ("CTYPE1", "CTYPE2"))
        notes.append("SIP coefficients without -SIP in CTYPE: applied")
    # Lookup tables of distortions live in other HDUs and cannot be followed from a header.
    drop(
        r"(CPDIS\d|D2IMDIS\d|CPERR\d|D2IMERR\d|DP\d.*|D2IM\d.*|AXISCORR)",
        "distortion tables in other HDUs: not applied",
    )
    return header, notes
