"""What is in the reference: its sources, and the stars among them that are too bright to subtract cleanly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sep
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from batchproc.imaging.extract import extract_sources
from batchproc.imaging.measure import GAUSSIAN_FWHM

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
    """Everything that shines in an image, by SEP.

    Parameters
    ----------
    data : ndarray (ny, nx)
        Background-subtracted.
    rms : ndarray (ny, nx)
        Sky noise per pixel, in the units of `data`.
    mask : ndarray (ny, nx)
        Non-zero or True where bad.
    threshold : float
        In units of `rms`, for five connected pixels of the smoothed image.
    """
    objects, _ = extract_sources(data, rms, np.asarray(mask) != 0, threshold=threshold)
    if len(objects) == 0:
        return Sources(*(np.zeros(0) for _ in range(4)))
    image = np.ascontiguousarray(data, dtype=np.float32)
    bad = np.ascontiguousarray(np.asarray(mask) != 0)
    ellipse = [objects[name].astype(np.float64) for name in ("x", "y", "a", "b", "theta")]
    ellipse[4] = np.clip(ellipse[4], -np.pi / 2, np.pi / 2)  # SEP refuses what its own rounding puts beyond
    radius, _ = sep.kron_radius(image, *ellipse, 6.0, mask=bad)
    radius = np.clip(np.nan_to_num(radius), 1.4, 6.0)  # bounds of the elliptical aperture, in units of (a, b)
    flux, _, _ = sep.sum_ellipse(image, *ellipse, 2.5 * radius, mask=bad, subpix=1)
    usable = np.isfinite(flux)
    fwhm = GAUSSIAN_FWHM * np.sqrt(0.5 * (ellipse[2] ** 2 + ellipse[3] ** 2))
    return Sources(*(column[usable].astype(np.float64) for column in (ellipse[0], ellipse[1], flux, fwhm)))


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
