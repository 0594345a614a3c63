"""A simulated night as files: exposures of several CCDs, their references and masks, a manifest, and the truth.

The pixels come from `batchproc.imaging.simulate`; here they get headers, a WCS, units, and the formats of surveys.

::

    FOLDER/
      manifest.csv
      truth.parquet          every transient: image_id, x, y, ra, dec, flux, snr, snr_local, kind, masked
      images/                plain FITS (16-bit), Rice-compressed .fz, multi-extension: an exposure of each in turn
      references/            float32 coadds with their mask in a second extension, on a grid of their own
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from astropy.io import fits
from astropy.wcs import WCS, Sip
from numpy.typing import NDArray

from batchproc.imaging.simulate import Scene, SimulatedPair, simulate_pair
from batchproc.io.manifest import write_manifest
from batchproc.records import ManifestEntry

__all__ = ["simulate_night"]

CCDS = 2  # to an exposure
FORMATS = ("plain", "compressed", "extensions")
FILTERS = ("r", "g", "i")
ZERO_POINTS = {"g": 27.9, "r": 28.1, "i": 27.7}
SCALE_ARCSEC = 0.3
GAINS = (1.6, 1.9)  # electrons per ADU of each CCD
EXPOSURE_S = 60.0
MJD = 60676.1

_REF_MARGIN = 24  # the reference reaches this much further on each side

#: What an ordinary image of the night shows; seeing, sky and transparency change from exposure to exposure.
ORDINARY = Scene(
    theta=0.0,
    flux_ratio=1.0,
    n_stars=700,
    psf_variation=0.06,
    cosmic_rays=15,
    hot_pixels=2,
    bad_columns=1,
    registration_jitter=0.03,
)


@dataclass(frozen=True)
class _Frame:
    """One CCD of one exposure, simulated: what the writers need."""

    image_id: str
    exposure: str
    ccd: int
    pair: SimulatedPair
    data: NDArray  # ADU
    header: fits.Header
    reference: NDArray  # ADU of one exposure
    header_ref: fits.Header
    truth: pd.DataFrame


def simulate_night(
    folder: str | Path,
    *,
    n_images: int = 8,
    size: int | tuple[int, int] = 1024,
    seed: int = 0,
    n_transients: int = 20,
    broken: bool = False,
    scene: Scene | None = None,
) -> Path:
    """Write a small night with known truth.

    Parameters
    ----------
    folder : str or Path
        Made where it is absent.
    n_images : int
        CCD images; two make an exposure.
    size : int or (ny, nx)
        Pixels of a CCD.
    seed : int
        The same seed writes the same pixels and the same truth.
    n_transients : int
        To an image.
    broken : bool
        Add two images that cannot be processed: one truncated, one all NaN.
    scene : Scene, optional
        What an ordinary image shows; the weather of each exposure comes on top.

    Returns
    -------
    Path
        The manifest.

    Examples
    --------
    >>> manifest = simulate_night("night", n_images=4, size=512)  # doctest: +SKIP
    """
    folder = Path(folder)
    shape = (size, size) if isinstance(size, int) else size
    ordinary = replace(scene or ORDINARY, n_transients=n_transients)
    entries, truth = [], []
    for exposure in range((n_images + CCDS - 1) // CCDS):
        ccds = range(1, min(CCDS, n_images - exposure * CCDS) + 1)
        frames = [_simulate_frame(ordinary, shape, exposure, ccd, seed) for ccd in ccds]
        entries += list(_write_exposure(folder, frames, FORMATS[exposure % len(FORMATS)]))
        truth += [frame.truth for frame in frames]
    if broken:
        entries += _write_broken(folder, entries[0])
    pd.concat(truth, ignore_index=True).to_parquet(folder / "truth.parquet", index=False)
    write_manifest(entries, folder / "manifest.csv")
    return folder / "manifest.csv"


def _simulate_frame(ordinary: Scene, shape: tuple[int, int], exposure: int, ccd: int, seed: int) -> _Frame:
    """One CCD: the conditions of its exposure, its own stars, its own pointing."""
    weather = np.random.default_rng([seed, exposure])
    scene = replace(
        ordinary,
        fwhm_new=ordinary.fwhm_new * weather.uniform(0.9, 1.2),
        axis_ratio=ordinary.axis_ratio * weather.uniform(0.88, 1.0),
        theta=ordinary.theta + weather.uniform(0, 180),
        sky_new=ordinary.sky_new * weather.uniform(0.8, 1.5),
        sky_slope=ordinary.sky_slope + weather.uniform(-0.05, 0.05),
        flux_ratio=ordinary.flux_ratio * weather.uniform(0.8, 1.1),
        satellite_trail=4.0 if (exposure, ccd) == (1, 1) else 0.0,
    )
    rng = np.random.default_rng([seed, exposure, ccd])
    shape_ref = (shape[0] + 2 * _REF_MARGIN, shape[1] + 2 * _REF_MARGIN)
    field = (150.0 + 0.3 * exposure, 2.2 + 0.15 * ccd)
    wcs = _wcs(shape, field, rng.uniform(-9, 9, 2), rng.uniform(-0.25, 0.25), rng)
    wcs_ref = _wcs(shape_ref, field, (0.0, 0.0), 0.0, rng)

    def to_ref(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
        xr, yr = wcs_ref.all_world2pix(*wcs.all_pix2world(x, y, 0), 0)
        return xr, yr

    pair = simulate_pair(shape, rng, scene=scene, to_ref=to_ref, shape_ref=shape_ref)
    name = f"e{exposure + 1:03d}"
    image_id = f"{name}_c{ccd}"
    gain, band = GAINS[(ccd - 1) % len(GAINS)], FILTERS[exposure % len(FILTERS)]
    cards = {
        "BUNIT": ("adu", "unit of the pixels"),
        "GAIN": (gain, "electrons per adu"),
        "RDNOISE": (scene.read_noise, "electrons"),
        "SATURATE": (scene.saturation / gain, "adu"),
        "MAGZERO": (ZERO_POINTS[band], "magnitude of one adu"),
        "FILTER": (band, ""),
        "EXPTIME": (EXPOSURE_S, "s"),
        "MJD-OBS": (round(MJD + exposure * 90 / 86400, 8), "start of the exposure"),
        "EXPID": (name, "exposure"),
        "CCDNUM": (ccd, ""),
        "INSTRUME": ("SIMCAM", "simulated by batchproc"),
        "OBJECT": (f"field {exposure + 1}", ""),
    }
    header, header_ref = wcs.to_header(relax=True), _astray(wcs_ref).to_header(relax=True)
    header.update(cards)
    header_ref.update(cards)
    header_ref["MJD-OBS"] = MJD - 100.0
    header_ref["EXPID"] = "coadd"
    header_ref["NCOMBINE"] = scene.depth
    # The mean of n exposures has n times the electrons behind each adu.
    header_ref["GAIN"] = gain * scene.depth
    header_ref["RDNOISE"] = scene.read_noise * np.sqrt(scene.depth)
    header_ref["MAGZERO"] = ZERO_POINTS[band] - 2.5 * np.log10(scene.flux_ratio)
    return _Frame(
        image_id,
        name,
        ccd,
        pair,
        (pair.new + pair.sky_new) / gain,
        header,
        ((pair.ref + pair.sky_ref) / gain).astype(np.float32),
        header_ref,
        _truth(image_id, pair, wcs, to_ref, gain),
    )


def _wcs(
    shape: tuple[int, int], field: tuple[float, float], dither: Any, rotation: float, rng: np.random.Generator
) -> WCS:
    """TAN-SIP: north up, east left, turned by ``rotation`` degrees; distorted by a pixel or so at the edge."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN-SIP", "DEC--TAN-SIP"]
    wcs.wcs.crval = field
    wcs.wcs.crpix = np.array([shape[1], shape[0]]) / 2 + 0.5 + np.asarray(dither)
    cos, sin = np.cos(np.radians(rotation)), np.sin(np.radians(rotation))
    wcs.wcs.cd = np.array([[-cos, sin], [sin, cos]]) * SCALE_ARCSEC / 3600
    half = max(shape) / 2
    a, b = np.zeros((2, 3, 3))
    for coefficients in (a, b):
        for power in ((2, 0), (1, 1), (0, 2)):
            coefficients[power] = rng.uniform(-0.7, 0.7) / half**2
    wcs.sip = Sip(a, b, None, None, wcs.wcs.crpix)
    wcs.wcs.set()
    return wcs


def _astray(wcs: WCS) -> WCS:
    """The WCS as its header tells it: a quarter of a pixel wrong, as astrometry is."""
    wrong = wcs.deepcopy()
    wrong.wcs.crpix = wcs.wcs.crpix + np.array([0.25, -0.15])
    wrong.sip = Sip(wcs.sip.a, wcs.sip.b, None, None, wrong.wcs.crpix)
    wrong.wcs.set()
    return wrong


def _truth(image_id: str, pair: SimulatedPair, wcs: WCS, to_ref: Any, gain: float) -> pd.DataFrame:
    """Truth in the terms of the catalogue: flux in file units, and the position on the sky."""
    truth = pd.DataFrame(pair.truth)
    truth["flux"] /= gain
    truth.insert(0, "image_id", image_id)
    ra, dec = wcs.all_pix2world(truth["x"], truth["y"], 0)
    truth.insert(3, "ra", ra)
    truth.insert(4, "dec", dec)
    radius = round(pair.scene.fwhm_new)
    on_new = _near_bad(pair.mask_new, truth["x"], truth["y"], radius)
    x_ref, y_ref = to_ref(truth["x"].to_numpy(), truth["y"].to_numpy())
    on_ref = _near_bad(pair.mask_ref, x_ref, y_ref, radius)
    return truth.assign(masked=on_new | on_ref)


def _near_bad(mask: NDArray, x: Any, y: Any, radius: int) -> NDArray[np.bool_]:
    """Whether a bad pixel lies in the square around each position."""
    columns, rows = np.rint(x).astype(int), np.rint(y).astype(int)
    around = range(-radius, radius + 1)
    inside = [
        mask[np.clip(rows + dy, 0, mask.shape[0] - 1), np.clip(columns + dx, 0, mask.shape[1] - 1)] != 0
        for dy in around
        for dx in around
    ]
    return np.any(inside, axis=0)


def _write_exposure(folder: Path, frames: list[_Frame], kind: str) -> Iterator[ManifestEntry]:
    """Write the files of one exposure in one of `FORMATS`; an entry for each of its CCDs."""
    images, references = folder / "images", folder / "references"
    for path in (images, references):
        path.mkdir(parents=True, exist_ok=True)
    if kind == "extensions":
        name = frames[0].exposure
        _write_extensions(images / f"{name}.fits", [(f.data.astype(np.float32), f.header, f.ccd) for f in frames])
        _write_extensions(images / f"{name}_mask.fits", [(f.pair.mask_new, f.header, f.ccd) for f in frames])
    for frame in frames:
        if kind == "extensions":
            new, mask = (f"images/{frame.exposure}{part}.fits[CCD{frame.ccd}]" for part in ("", "_mask"))
        else:
            suffix = ".fits.fz" if kind == "compressed" else ".fits"
            new, mask = (f"images/{frame.image_id}{part}{suffix}" for part in ("", "_mask"))
            adu = np.clip(np.rint(frame.data), 0, 65535).astype(np.int32 if kind == "compressed" else np.uint16)
            _write_image(folder / new, adu, frame.header)
            _write_image(folder / mask, frame.pair.mask_new, frame.header)
        ref = f"references/{frame.image_id}_ref.fits"
        fits.HDUList(
            [
                fits.PrimaryHDU(),
                fits.ImageHDU(frame.reference, frame.header_ref, name="SCI"),
                fits.ImageHDU(frame.pair.mask_ref, name="MASK"),
            ]
        ).writeto(folder / ref, overwrite=True)
        yield ManifestEntry(image_id=frame.image_id, new=new, ref=(ref,), new_mask=mask)


def _write_image(path: Path, data: NDArray, header: fits.Header) -> None:
    if path.suffix == ".fz":
        compressed = fits.CompImageHDU(data, header, compression_type="RICE_1")
        fits.HDUList([fits.PrimaryHDU(), compressed]).writeto(path, overwrite=True)
    else:
        fits.PrimaryHDU(data, header).writeto(path, overwrite=True)


def _write_extensions(path: Path, images: list[tuple[NDArray, fits.Header, int]]) -> None:
    primary = fits.PrimaryHDU(header=fits.Header({key: images[0][1][key] for key in ("INSTRUME", "EXPID", "OBJECT")}))
    extensions = [fits.ImageHDU(data, header, name=f"CCD{ccd}") for data, header, ccd in images]
    fits.HDUList([primary, *extensions]).writeto(path, overwrite=True)


def _write_broken(folder: Path, good: ManifestEntry) -> list[ManifestEntry]:
    """A download that stopped half way, and an image without a single number."""
    whole = (folder / good.new).read_bytes()
    truncated, empty = "images/truncated.fits", "images/all_nan.fits"
    (folder / truncated).write_bytes(whole[: len(whole) // 2])
    with fits.open(folder / good.new) as hdus:
        header = hdus[0].header.copy()
        nothing = np.full(hdus[0].data.shape, np.nan, np.float32)
    for key in ("BZERO", "BSCALE"):
        header.remove(key, ignore_missing=True)
    fits.PrimaryHDU(nothing, header).writeto(folder / empty, overwrite=True)
    return [
        replace(good, image_id="truncated", new=truncated, new_mask=None),
        replace(good, image_id="all_nan", new=empty, new_mask=None),
    ]
