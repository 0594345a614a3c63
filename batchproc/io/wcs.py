"""From header to WCS, forgiving what surveys write and refusing what cannot be right."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales, wcs_to_celestial_frame
from numpy.typing import NDArray

from batchproc.io.fitsfile import first_line, quiet

__all__ = ["celestial_wcs", "pixel_scale_arcsec"]

#: Reference frames that astropy knows; the header's default stands in for others.
_FRAMES = {"ICRS", "FK5", "FK4", "FK4-NO-E"}
#: No camera's pixels differ so much in area from what its matrix says: a coefficient is wrong.
_MAX_DISTORTION = 4.0


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
            wcs_to_celestial_frame(wcs)
            scale = pixel_scale_arcsec(wcs)
            areas = _pixel_areas(wcs, shape) / math.radians(scale / 3600) ** 2
    except Exception as error:
        # wcslib has dozens of ways to say that a header is inconsistent; star patterns will do without it.
        return None, f"no WCS: {first_line(error)}"
    if not np.isfinite(areas).all() or not 1e-4 < scale < 3600:
        return None, f"no WCS: what the header describes is not an image of the sky (scale {scale:g} arcsec)"
    areas *= np.sign(areas[0])
    if not (areas.min() > 1 / _MAX_DISTORTION and areas.max() < _MAX_DISTORTION):
        found = f"pixels of {areas.min():.2g} to {areas.max():.2g} times the area that its matrix gives them"
        return None, f"no WCS: what the header describes has {found}"
    return wcs, "; ".join(notes)


def _pixel_areas(wcs: WCS, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Solid angles (sr) of 25 pixels all over an image, negative where it is mirrored; NaN where the sky is not."""
    y, x = (axis.ravel() for axis in np.meshgrid(*(np.linspace(0, n - 1, 5) for n in shape), indexing="ij"))
    place, right, up = (_unit_vectors(wcs, x + dx, y + dy) for dx, dy in ((0, 0), (1, 0), (0, 1)))
    return np.einsum("ij,ij->i", place, np.cross(right - place, up - place))  # type: ignore[no-any-return]


def _unit_vectors(wcs: WCS, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    lon, lat = np.radians(wcs.all_pix2world(x, y, 0))
    return np.stack([np.cos(lon) * np.cos(lat), np.sin(lon) * np.cos(lat), np.sin(lat)], axis=-1)


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
    frame = str(header.get("RADESYS", header.get("RADECSYS", "ICRS"))).strip().upper()
    if frame not in _FRAMES:
        drop("RADESYS|RADECSYS", f"reference frame {frame!r} is not known: taken for the default")
    equinox = header.get("EQUINOX", header.get("EPOCH", 2000.0))
    if not (isinstance(equinox, int | float) and 1800 < equinox < 2200):
        drop("EQUINOX|EPOCH", f"equinox {equinox!r} is not a year: taken for the default")
    # Lookup tables of distortions live in other HDUs and cannot be followed from a header.
    drop(
        r"(CPDIS\d|D2IMDIS\d|CPERR\d|D2IMERR\d|DP\d.*|D2IM\d.*|AXISCORR)",
        "distortion tables in other HDUs: not applied",
    )
    return header, notes
