"""Real images for tests and benchmarks, found through BATCHPROC_TEST_DATA; and pairs made from the real DECam coadd."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from batchproc import simulate
from batchproc.imaging.background import measure_background
from batchproc.records import MaskBit


def data(name: str) -> Path:
    """A folder of the real data, or a skip that says what is missing."""
    folder = Path(os.environ.get("BATCHPROC_TEST_DATA", "")) / name
    if not os.environ.get("BATCHPROC_TEST_DATA") or not folder.is_dir():
        pytest.skip(f"no real {name}: set BATCHPROC_TEST_DATA to the folder that holds {name}/")
    return folder


def images() -> Path:
    """The folder of real images, or a skip that says what is missing."""
    return data("images")


def decam_pairs(folder: Path, n_pairs: int, *, size: int = 900, n_injected: int = 25, seed: int = 0):
    """Write pairs made of regions of the real DECam coadd; return (manifest path, truth rows).

    Each reference is a region of the coadd. Its science image is blurred, shifted, slightly rotated and noisier, with
    transients injected by a Moffat profile that the pipeline is not told.
    """
    source = images() / "decam_coadd"
    header = fits.getheader(source / "coadd.fits.fz", 1)
    gain = header["GAIN"]
    data = fits.getdata(source / "coadd.fits.fz", 1)
    bad = fits.getdata(source / "mask.fits.fz", 1)
    wcs = WCS(header)
    keep = {key: header[key] for key in ("GAIN", "MAGZERO", "BUNIT", "EXPTIME", "FILTER", "MJD-OBS") if key in header}
    rows, truth = ["image_id,new,ref,survey,filter,saturation"], []
    rng = np.random.default_rng(seed)
    per_side = data.shape[0] // (size + 40)
    for i in range(n_pairs):
        y0, x0 = 20 + (i // per_side) * (size + 40), 20 + (i % per_side) * (size + 40)
        window = np.s_[y0 : y0 + size, x0 : x0 + size]
        region, region_mask = data[window].astype(np.float32), (bad[window] != 0).astype(np.uint8)
        region_wcs = wcs[window]
        electrons = region * gain
        sky = measure_background(electrons, region_mask != 0)
        epoch = simulate.make_epoch(
            electrons - sky.level,
            fwhm_ref=4.6,
            fwhm_new=5.4,
            sky=30000.0,
            flux_ratio=0.8,
            shift=tuple(rng.uniform(-6, 6, 2)),
            rotation=float(rng.uniform(-0.4, 0.4)),
            mask=region_mask * np.uint8(MaskBit.BAD),
            rng=rng,
        )
        x, y = simulate.choose_positions((size, size), n_injected, rng, margin=45, min_separation=35, mask=epoch.mask)
        flux = np.exp(rng.uniform(np.log(1.5e4), np.log(2e5), n_injected))
        image = simulate.inject(epoch.data, 5.4, x, y, flux, rng=rng)
        for name, pixels, solution in (
            ("new", image / gain, simulate.transform_wcs(region_wcs, epoch.matrix)),
            ("ref", region, region_wcs),
        ):
            cards = fits.Header(keep)
            cards.update(solution.to_header(relax=True))
            fits.CompImageHDU(pixels.astype(np.float32), cards, quantize_level=64).writeto(
                folder / f"{name}{i}.fits.fz", overwrite=True
            )
        for name, plane in (("new_mask", epoch.mask != 0), ("ref_mask", region_mask)):
            fits.writeto(folder / f"{name}{i}.fits", plane.astype(np.uint8), overwrite=True)
        rows.append(f"decam{i},new{i}.fits.fz,ref{i}.fits.fz,decam,g,{header['SATURATE']}")
        truth += [(f"decam{i}", *values) for values in zip(x, y, flux / gain, strict=True)]
    header_row, *others = rows
    rows = [header_row + ",new_mask,ref_mask"]
    rows += [f"{row},new_mask{i}.fits,ref_mask{i}.fits" for i, row in enumerate(others)]
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(rows) + "\n")
    dtype = [("image_id", object), ("x", float), ("y", float), ("flux", float)]
    return manifest, np.array(truth, dtype=dtype)
