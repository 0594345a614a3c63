"""A simulated quadrant of the Zwicky Transient Facility as files: what IPAC delivers, with the headers that its own
profile reads.

The science image is float32 counts, Rice-compressed with subtractive dither as ``fpack`` does it; its mask is 16 bits
of ZTF's own meaning; the reference is a coadd on its own grid, a few pixels and a twentieth of a degree away, whose
WCS is a fraction of a pixel wrong.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS, Sip

from batchproc.imaging.simulate import Scene, simulate_pair
from batchproc.records import ManifestEntry, MaskBit

SHAPE = (3080, 3072)
GAIN = 6.2  # electrons per count
SCALE_ARCSEC = 1.012

SCENE = Scene(
    fwhm_new=2.4,
    fwhm_ref=2.1,
    axis_ratio=0.93,
    psf_variation=0.08,
    sky_new=450.0,
    sky_ref=350.0,
    sky_slope=0.03,
    read_noise=10.0,
    depth=15,
    flux_ratio=1.1,
    saturation=2.6e5,
    n_stars=330,
    star_flux=(600.0, 5e6),
    n_galaxies=60,
    n_transients=60,
    registration_jitter=0.03,
    cosmic_rays=40,
    hot_pixels=10,
    bad_columns=2,
)

#: Bits of ZTF's mask for what the simulation knows.
_BITS = ((MaskBit.SATURATED, 8), (MaskBit.BAD, 4), (MaskBit.NO_DATA, 10))


def quadrant(folder: Path, shape: tuple[int, int] = SHAPE, seed: int = 0) -> ManifestEntry:
    """The manifest entry of a quadrant of so many pixels; its files are made in ``folder`` if they are not there."""
    name = f"ztf_{shape[0]}x{shape[1]}_{seed}"
    new, mask, ref = (folder / f"{name}_{kind}.fits.fz" for kind in ("sciimg", "mskimg", "refimg"))
    if not all(path.is_file() for path in (new, mask, ref)):
        folder.mkdir(parents=True, exist_ok=True)
        _write(new, mask, ref, shape, seed)
    return ManifestEntry(image_id=name, new=str(new), ref=(str(ref),), new_mask=str(mask), survey="ztf")


def entry_arguments(entry: ManifestEntry) -> dict[str, Any]:
    """The entry as JSON takes it; ``as_entry`` undoes it."""
    return asdict(entry)


def as_entry(arguments: dict[str, Any]) -> ManifestEntry:
    """The entry from what JSON has made of it."""
    return ManifestEntry(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})


def _write(new: Path, mask: Path, ref: Path, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng([seed, 3])
    wcs, wcs_ref = _distorted_wcs(shape, (7.3, -4.6), 0.05, rng), _distorted_wcs(shape, (0.0, 0.0), 0.0, rng)

    def to_ref(x: Any, y: Any) -> Any:
        return wcs_ref.all_world2pix(*wcs.all_pix2world(x, y, 0), 0)

    pair = simulate_pair(shape, seed, scene=SCENE, to_ref=to_ref)
    science = {"SATURATE": 4e4, "MAGZP": 26.2, "GAIN": GAIN, "READNOI": SCENE.read_noise, "EXPTIME": 30.0}
    coadd = {"SATURATE": 4e4, "MAGZP": 26.1, "GAIN": GAIN * SCENE.depth, "READNOI": 38.0, "EXPTIME": 30.0}
    _compress(new, ((pair.new + pair.sky_new) / GAIN).astype(np.float32), _header(wcs, science))
    _compress(ref, ((pair.ref + pair.sky_ref) / GAIN).astype(np.float32), _header(_astray(wcs_ref), coadd))
    bits = sum(((pair.mask_new & ours) != 0).astype(np.int16) << bit for ours, bit in _BITS)
    _compress(mask, bits.astype(np.int16), _header(wcs, {}))


def _header(wcs: WCS, cards: dict[str, float]) -> fits.Header:
    header = wcs.to_header(relax=True)
    header.update({"INSTRUME": "ZTF/MOSAIC", "FILTER": "ZTF_r", "OBSMJD": 60676.1, "CCDID": 4, "QID": 3, **cards})
    return header


def _compress(path: Path, data: np.ndarray, header: fits.Header) -> None:
    how: dict[str, Any] = {"compression_type": "RICE_1"}
    if data.dtype.kind == "f":
        how |= {"quantize_level": 4.0, "quantize_method": 1, "dither_seed": 1}
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(data, header, **how)]).writeto(path, overwrite=True)


def tan_wcs(shape: tuple[int, int], dither: tuple[float, float], rotation: float) -> WCS:
    """A tangent plane: north up, east left, turned by so many degrees."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = (150.0, 2.2)
    wcs.wcs.crpix = np.array([shape[1], shape[0]]) / 2 + 0.5 + np.array(dither)
    cos, sin = np.cos(np.radians(rotation)), np.sin(np.radians(rotation))
    wcs.wcs.cd = np.array([[-cos, sin], [sin, cos]]) * SCALE_ARCSEC / 3600
    wcs.wcs.set()
    return wcs


def _distorted_wcs(
    shape: tuple[int, int], dither: tuple[float, float], rotation: float, rng: np.random.Generator
) -> WCS:
    """The same with SIP terms: a distortion of a pixel and a half at the edge."""
    wcs = tan_wcs(shape, dither, rotation)
    wcs.wcs.ctype = ["RA---TAN-SIP", "DEC--TAN-SIP"]
    a, b = np.zeros((2, 3, 3))
    for coefficients in (a, b):
        for power in ((2, 0), (1, 1), (0, 2)):
            coefficients[power] = rng.uniform(-1.5, 1.5) / (max(shape) / 2) ** 2
    wcs.sip = Sip(a, b, None, None, wcs.wcs.crpix)
    wcs.wcs.set()
    return wcs


def _astray(wcs: WCS) -> WCS:
    """As the header tells it: a fifth of a pixel wrong."""
    wrong = wcs.deepcopy()
    wrong.wcs.crpix = wcs.wcs.crpix + np.array([0.2, -0.15])
    wrong.sip = Sip(wcs.sip.a, wcs.sip.b, None, None, wrong.wcs.crpix)
    wrong.wcs.set()
    return wrong
