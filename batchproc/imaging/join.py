"""Several references on one grid made one, and what becomes of their PSFs.

Weights come from the sky noise alone, never from the noise of sources, so that a star keeps its shape whatever its
brightness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sep
from numpy.typing import NDArray

from batchproc.imaging.pixelmap import PixelMap
from batchproc.imaging.resample import Resampled, resample
from batchproc.records import MaskBit, PsfLike

__all__ = ["JoinedPsf", "MappedPsf", "join", "star_flux_ratio", "weights_of"]

#: A joined PSF follows the weights of its parts at every so many pixels.
PSF_STEP = 16
#: Fewer common stars than this say nothing about a flux ratio.
MIN_RATIO_STARS = 3


@dataclass(frozen=True)
class MappedPsf:
    """The PSF of ref as it is on new's grid: the same stamps, brought there by the same resampling.

    Attributes
    ----------
    psf : PsfLike
        Of ref, on its own grid.
    pixel_map : PixelMap
        New → ref.
    order : int
        Lanczos a.
    """

    psf: PsfLike
    pixel_map: PixelMap
    order: int = 3

    @property
    def size(self) -> int:
        """Side of the (odd, square) stamp in pixels of new."""
        # Rounded up to the next odd number; a rotated square fits by its sides, the corners of a PSF being empty.
        return 2 * int(np.ceil((self.psf.size / self._scale - 1) / 2 - 1e-3)) + 1

    @property
    def fwhm(self) -> float:
        """Full width at half maximum at the image centre, in pixels of new."""
        return self.psf.fwhm / self._scale

    def at(self, x: float, y: float) -> NDArray[np.float64]:
        """PSF stamp ``(size, size)`` at pixel (x, y) of new: centred, unit sum."""
        xr, yr = self.pixel_map(x, y)
        stamp = np.asarray(self.psf.at(float(xr), float(yr)), np.float64)
        jacobian = self.pixel_map.jacobian(x, y)
        centre = np.array([stamp.shape[1] // 2, stamp.shape[0] // 2])
        offset = centre - jacobian @ np.full(2, self.size // 2)
        local = PixelMap.from_affine(np.column_stack([jacobian, offset]), (self.size, self.size))
        # Zeros around the stamp, so that what lies beyond it counts as dark and not as unknown.
        pad = stamp.shape[0]
        mapped = resample(np.pad(stamp, pad), local.cropped(-pad, -pad), (self.size, self.size), order=self.order).data
        total = mapped.sum(dtype=np.float64)
        return mapped.astype(np.float64) / total

    @property
    def _scale(self) -> float:
        return float(np.sqrt(self.pixel_map.area))


@dataclass(frozen=True)
class JoinedPsf:
    """The PSF of a weighted sum of images.

    Attributes
    ----------
    psfs : tuple of PsfLike
        On the common grid.
    weights : ndarray (n, ny / PSF_STEP, nx / PSF_STEP) float32
        Share of each image, at every `PSF_STEP`-th pixel; they sum up to 1, or to 0 where there is no image.
    """

    psfs: tuple[PsfLike, ...]
    weights: NDArray[np.float32]

    @property
    def size(self) -> int:
        """Side of the (odd, square) stamp in pixels: that of the largest."""
        return max(psf.size for psf in self.psfs)

    @property
    def fwhm(self) -> float:
        """Full width at half maximum at the image centre, in pixels: the mean by weight over the image."""
        share = self.weights.mean(axis=(1, 2))
        return float(np.average([psf.fwhm for psf in self.psfs], weights=share))

    def at(self, x: float, y: float) -> NDArray[np.float64]:
        """PSF stamp ``(size, size)`` at pixel (x, y): centred, unit sum; of the nearest images where there is none."""
        _, ny, nx = self.weights.shape
        j, i = np.clip([round(y / PSF_STEP), round(x / PSF_STEP)], 0, [ny - 1, nx - 1])
        share = self.weights[:, j, i]
        if share.sum() <= 0:
            share = self.weights.mean(axis=(1, 2))
        out = np.zeros((self.size, self.size))
        for psf, part in zip(self.psfs, share / share.sum(), strict=True):
            if part > 0:
                edge = (self.size - psf.size) // 2
                out += part * np.pad(psf.at(x, y), edge)
        return out / out.sum()


def weights_of(images: Sequence[Resampled], rms: Sequence[float]) -> NDArray[np.float32]:
    """Share of each image in each pixel, ``(n, ny, nx)``: inverse sky variance among the good ones.

    Where no image is good, those that have data at all share by the same rule; 0 where there is none.
    """
    good = np.array([image.mask == 0 for image in images])
    some = np.array([(image.mask & MaskBit.NO_DATA) == 0 for image in images])
    usable = np.where(good.any(axis=0), good, some)
    weights = usable * (1 / np.square(np.asarray(rms, np.float32)))[:, None, None]
    total = weights.sum(axis=0)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def join(images: Sequence[Resampled], scales: Sequence[float], weights: NDArray[np.float32]) -> Resampled:
    """Weighted sum of background-subtracted images on one grid.

    Parameters
    ----------
    images : sequence of Resampled
    scales : sequence of float
        Factor that brings the flux of each to the common system.
    weights : ndarray (n, ny, nx)
        As of `weights_of`.
    """
    data = np.zeros(weights.shape[1:], np.float32)
    with_variance = all(image.variance is not None for image in images)
    variance = np.zeros_like(data) if with_variance else None
    mask = np.zeros(data.shape, np.uint8)
    for image, scale, weight in zip(images, scales, weights, strict=True):
        data += weight * np.float32(scale) * image.data
        if variance is not None and image.variance is not None:
            variance += (weight * np.float32(scale)) ** 2 * image.variance
        mask |= np.where(weight > 0, image.mask, 0)
    nothing = weights.sum(axis=0) <= 0
    mask[nothing] = MaskBit.NO_DATA
    return Resampled(data, variance, mask)


def star_flux_ratio(
    data: NDArray[np.float32],
    mask: NDArray[np.uint8],
    other: NDArray[np.float32],
    other_mask: NDArray[np.uint8],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    radius: float,
) -> float | None:
    """Median of flux / flux in the other image over stars that both see well; None where these are too few.

    Parameters
    ----------
    data, other : ndarray (ny, nx)
        Background-subtracted, one grid.
    x, y : ndarray (n,)
        Stars, the brightest first.
    radius : float
        Of the aperture, pixels: large enough to hold both PSFs.
    """
    if x.size == 0:
        return None
    bad = (mask | other_mask) != 0
    share, _, _ = sep.sum_circle(bad.astype(np.float32), x, y, radius)
    clean = (share == 0) & (x > radius) & (y > radius) & (x < data.shape[1] - radius) & (y < data.shape[0] - radius)
    x, y = x[clean][:100], y[clean][:100]
    if x.size < MIN_RATIO_STARS:
        return None
    (mine, _, _), (others, _, _) = (sep.sum_circle(image, x, y, radius) for image in (data, other))
    good = (mine > 0) & (others > 0)
    return float(np.median(mine[good] / others[good])) if good.sum() >= MIN_RATIO_STARS else None
