"""What is in the reference: its sources, and the stars among them that are too bright to subtract cleanly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sep
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from batchproc.imaging.measure import GAUSSIAN_FWHM
from batchproc.imaging.peaks import Basins, find_basins, smooth_above

__all__ = ["BrightStars", "Sources", "bright_stars", "find_sources"]


@dataclass(frozen=True)
class Sources:
    """Sources of an image.

    Attributes
    ----------
    x, y : ndarray (n,)
        Pixels, 0-based.
    flux : ndarray (n,)
        Total (Kron) flux in the units of the image.
    fwhm : ndarray (n,)
        From second moments, pixels.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]
    fwhm: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.x)

    def nearest(self, x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Distance in pixels to the nearest source of each position, and its row; inf and −1 where there is none."""
        positions = np.column_stack([x, y])
        if len(self) == 0:
            return np.full(len(positions), np.inf), np.full(len(positions), -1)
        distance, row = cKDTree(np.column_stack([self.x, self.y])).query(positions)
        return distance, row.astype(np.int64)


@dataclass(frozen=True)
class BrightStars:
    """Stars whose residuals must be expected.

    Attributes
    ----------
    x, y : ndarray (n,)
        Pixels, 0-based.
    radius : ndarray (n,)
        How far their residuals reach, pixels.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    radius: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.x)

    def __add__(self, other: BrightStars) -> BrightStars:
        return BrightStars(
            *(np.concatenate([getattr(s, name) for s in (self, other)]) for name in ("x", "y", "radius"))
        )

    def nearest(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Distance in pixels from each position to the nearest of them; inf where there is none."""
        positions = np.column_stack([x, y])
        if len(self) == 0:
            return np.full(len(positions), np.inf)
        return np.asarray(cKDTree(np.column_stack([self.x, self.y])).query(positions)[0])

    def cover(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.bool_]:
        """Whether each position lies within the radius of one of them."""
        positions = np.column_stack([x, y])
        covered = np.zeros(len(positions), bool)
        if len(self) and len(positions):
            near = cKDTree(positions).query_ball_point(np.column_stack([self.x, self.y]), self.radius)
            covered[np.concatenate([np.asarray(rows, dtype=np.int64) for rows in near])] = True
        return covered


def find_sources(
    data: NDArray[np.floating], rms: NDArray[np.floating], mask: NDArray, *, threshold: float = 3.0
) -> Sources:
    """Everything that shines in an image: five connected pixels of the image smoothed by a 3×3 kernel, with one peak.

    Places and widths are moments of those pixels; SEP measures total fluxes in ellipses around them.

    Parameters
    ----------
    data : ndarray (ny, nx)
        Background-subtracted.
    rms : ndarray (ny, nx)
        Sky noise per pixel, in the units of `data`.
    mask : ndarray (ny, nx)
        Non-zero or True where bad.
    threshold : float
        In sigma of the smoothed pixel (for white noise).
    """
    mask = np.asarray(mask)
    pixels, significance = smooth_above(data, rms, mask, threshold)
    # Less than that above the saddle to a brighter one is a bump in its light: noise, a spiral arm.
    basins = find_basins(pixels, significance, data.shape, prominence=threshold, fraction=0.25)
    image = np.ascontiguousarray(data, dtype=np.float32)
    ellipse = _ellipses(image, basins)
    bad = np.ascontiguousarray(mask != 0)
    if len(ellipse[0]) == 0:
        return Sources(*(np.zeros(0) for _ in range(4)))
    radius, _ = sep.kron_radius(image, *ellipse, 6.0, mask=bad)
    radius = np.clip(np.nan_to_num(radius), 1.4, 6.0)  # bounds of the elliptical aperture, in units of (a, b)
    flux, _, _ = sep.sum_ellipse(image, *ellipse, 2.5 * radius, mask=bad, subpix=1)
    usable = np.isfinite(flux)
    fwhm = GAUSSIAN_FWHM * np.sqrt(0.5 * (ellipse[2] ** 2 + ellipse[3] ** 2))
    return Sources(*(column[usable].astype(np.float64) for column in (ellipse[0], ellipse[1], flux, fwhm)))


def _ellipses(image: NDArray[np.float32], basins: Basins, min_area: int = 5) -> tuple[NDArray[np.float64], ...]:
    """x, y, a, b, theta of each basin of at least so many pixels, from moments weighted by the light of its pixels."""
    n = len(basins.peak)
    nx = image.shape[1]
    light = np.maximum(image.ravel()[basins.pixels].astype(np.float64), 0.0)
    # relative to the peak, so that the variance keeps its digits
    u = (basins.pixels % nx - (basins.peak % nx)[basins.owner]).astype(np.float64)
    v = (basins.pixels // nx - (basins.peak // nx)[basins.owner]).astype(np.float64)
    total = np.bincount(basins.owner, light, n)
    usable = (np.bincount(basins.owner, minlength=n) >= min_area) & (total > 0)
    total = np.where(usable, total, 1.0)

    def mean(values: NDArray) -> NDArray[np.float64]:
        return np.bincount(basins.owner, light * values, n) / total

    x, y = mean(u), mean(v)
    # A pixel is a square of variance 1 / 12: no source is narrower.
    xx, yy, xy = mean(u * u) - x * x, mean(v * v) - y * y, mean(u * v) - x * y
    middle, spread = 0.5 * (xx + yy), np.hypot(0.5 * (xx - yy), xy)
    a, b = (np.sqrt(np.maximum(axis, 1 / 12)) for axis in (middle + spread, middle - spread))
    columns = (x + basins.peak % nx, y + basins.peak // nx, a, b, 0.5 * np.arctan2(2 * xy, xx - yy))
    order = np.flatnonzero(usable)
    order = order[np.argsort(basins.peak[order])]  # in the order of the image
    return tuple(column[order] for column in columns)


def bright_stars(sources: Sources, *, snr_of_flux: float, misfit: float, fwhm: float) -> BrightStars:
    """Unsaturated stars whose wings must leave residuals above the noise.

    A PSF model that is wrong by a fraction `misfit` of a star leaves that fraction of the star's S/N behind: in the
    core, where `subtract` counts it as noise, and less evenly in the wings, where it was not measured. Stars count as
    too bright from 20 sigma of misfit on, and their residuals reach 5 FWHM, about as far as the model itself.

    Parameters
    ----------
    sources : Sources
        Of the reference. Those of more than twice the PSF's width count with the part that one such PSF holds.
    snr_of_flux : float
        S/N of a source of unit flux (in the units of `sources`) in S: flux ratio times √F_S.
    misfit : float
        Relative misfit of the PSF model, as `batchproc.imaging.subtract.ResidualModel.amplitude` measures it.
    fwhm : float
        Of the wider of the two PSFs, pixels.
    """
    core = np.minimum(1.0, (2 * fwhm / np.maximum(sources.fwhm, 1e-3)) ** 2)
    bright = misfit * snr_of_flux * sources.flux * core > 20.0
    return BrightStars(sources.x[bright], sources.y[bright], np.full(int(bright.sum()), 5.0 * fwhm))
