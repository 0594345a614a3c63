"""What spoils images without being light of the sky: particle hits, hot pixels, trails. For training only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from batchproc.imaging.background import measure_background
from batchproc.imaging.stars import find_stars
from batchproc.records import Exposure

__all__ = ["clip_bright", "spoil"]


def spoil(exposure: Exposure, sigma: float, fwhm: float, rng: np.random.Generator, *, hits: int, hot: int) -> Exposure:
    """The exposure with particle hits and hot pixels, and in every other case a trail.

    Parameters
    ----------
    exposure : Exposure
        In electrons; left alone. What is added is not masked.
    sigma : float
        Sky noise, electrons: amplitudes are drawn in units of it.
    fwhm : float
        Seeing, pixels: the width of trails.
    rng : Generator
    hits, hot : int
        Mean numbers of particle hits and of hot pixels.
    """
    light = np.zeros(exposure.shape)
    for _ in range(rng.poisson(hits)):
        _hit(light, _amplitude(sigma, 3000, rng), rng)
    ny, nx = exposure.shape
    for _ in range(rng.poisson(hot)):
        light[rng.integers(ny), rng.integers(nx)] += _amplitude(sigma, 300, rng)
    if rng.uniform() < 1 / 2:
        light += _trail(exposure.shape, _amplitude(sigma / 10, 60, rng), fwhm, rng)
    return replace(exposure, data=(exposure.data + light).astype(np.float32))


def clip_bright(exposure: Exposure, rng: np.random.Generator) -> tuple[Exposure, NDArray[np.bool_]]:
    """The exposure with the cores of its brightest stars cut off, as if it saturated without the header telling.

    The level is drawn so that one in three to one in fifty of the stars exceed it. In half of the cases the innermost
    pixels are dark besides, as where a coadd has no good exposure of them.

    Returns
    -------
    exposure : Exposure
        A copy, whose mask tells nothing of it; where there is no star, it itself.
    altered : ndarray (ny, nx) bool
        Pixels that were cut.
    """
    sky = measure_background(exposure.data, exposure.mask != 0)
    stars = find_stars(exposure.data - sky.level, sky.rms, exposure.mask, saturation=exposure.saturation).table
    if not len(stars):
        return exposure, np.zeros(exposure.shape, np.bool_)
    light = exposure.data - sky.level
    level = float(np.quantile(stars["peak"], rng.uniform(0.67, 0.98)))
    dark = level * rng.uniform(1.1, 3.0) if rng.uniform() < 0.5 else np.inf
    altered = light > level
    noise = rng.normal(0, 0.02 * level, light.shape)
    cut = np.where(light > dark, rng.uniform(0.0, 0.7) * level, level) + noise
    data = np.where(altered, sky.level + cut, exposure.data).astype(np.float32)
    return replace(exposure, data=data), altered


def _amplitude(sigma: float, highest: float, rng: np.random.Generator) -> float:
    """6 sigma to `highest` sigma, evenly in the logarithm."""
    return sigma * float(np.exp(rng.uniform(np.log(6), np.log(highest))))


def _hit(light: NDArray[np.float64], charge: float, rng: np.random.Generator) -> None:
    """A straight track of 1 to some tens of pixels, one or two wide, its charge uneven; in place."""
    ny, nx = light.shape
    x, y, angle = rng.uniform(0, nx - 1), rng.uniform(0, ny - 1), rng.uniform(0, 2 * np.pi)
    steps = np.arange(0, 1 + rng.exponential(4.0), 0.25)
    spread = rng.choice([0.0, 0.35]) * rng.standard_normal(len(steps))
    columns = np.rint(x + steps * np.cos(angle) - spread * np.sin(angle)).astype(int)
    rows = np.rint(y + steps * np.sin(angle) + spread * np.cos(angle)).astype(int)
    inside = (columns >= 0) & (columns < nx) & (rows >= 0) & (rows < ny)
    share = rng.uniform(0.5, 1.5, len(steps)) / np.sqrt(len(steps))
    np.add.at(light, (rows[inside], columns[inside]), charge * share[inside] / 2)


def _trail(shape: tuple[int, int], peak: float, fwhm: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Light of a satellite across the image."""
    ny, nx = shape
    angle, x0, y0 = rng.uniform(0, np.pi), rng.uniform(0, nx), rng.uniform(0, ny)
    y, x = np.ogrid[:ny, :nx]
    across = (y - y0) * np.cos(angle) - (x - x0) * np.sin(angle)
    light: NDArray[np.float64] = peak * np.exp(-4 * np.log(2) * (across / (fwhm * rng.uniform(1.0, 2.5))) ** 2)
    return light
