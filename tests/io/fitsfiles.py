"""Small FITS files of every kind, for the tests of reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

SHAPE = (40, 50)

#: A plain TAN WCS of 1 arcsec pixels.
WCS_CARDS = {
    "CTYPE1": "RA---TAN",
    "CTYPE2": "DEC--TAN",
    "CRVAL1": 150.0,
    "CRVAL2": 2.0,
    "CRPIX1": 25.0,
    "CRPIX2": 20.0,
    "CD1_1": -1 / 3600,
    "CD1_2": 0.0,
    "CD2_1": 0.0,
    "CD2_2": 1 / 3600,
    "CUNIT1": "deg",
    "CUNIT2": "deg",
}
CARDS = {
    "GAIN": 2.0,
    "RDNOISE": 5.0,
    "SATURATE": 60000.0,
    "MAGZP": 25.0,
    "EXPTIME": 86.4,
    "MJD-OBS": 60000.0,
    "FILTER": "r",
    **WCS_CARDS,
}


def sky(seed: int = 1, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Sky of 100 ADU with noise; float32, whole numbers."""
    return np.random.default_rng(seed).normal(100, 5, shape).round().astype(np.float32)


def header(**cards: Any) -> fits.Header:
    """`CARDS` with changes; None takes a card out. ``_`` in a name stays, ``MJD_OBS`` style keys go through a dict."""
    values = CARDS | {key.replace("__", "-"): value for key, value in cards.items()}
    return fits.Header([(key, value) for key, value in values.items() if value is not None])


def write(path: Path, data: np.ndarray | None = None, **cards: Any) -> Path:
    """One image in the primary HDU; ``.gz`` by its suffix, ``.fz`` Rice-compressed."""
    data = sky() if data is None else data
    if path.suffix == ".fz":
        hdu = fits.CompImageHDU(data, header(**cards), compression_type="RICE_1")
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path)
    else:
        fits.PrimaryHDU(data, header(**cards)).writeto(path)
    return path


def write_mef(path: Path, hdus: list[tuple[str, np.ndarray, dict[str, Any]]], primary: dict[str, Any]) -> Path:
    """An empty primary HDU and one extension for each (EXTNAME, data, cards)."""
    images = [fits.ImageHDU(data, fits.Header(list(cards.items())), name=name) for name, data, cards in hdus]
    fits.HDUList([fits.PrimaryHDU(header=fits.Header(list(primary.items()))), *images]).writeto(path)
    return path
