"""Saturated pixels: how far they spoil their surroundings."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage

from batchproc.imaging.sources import BrightStars
from batchproc.records import MaskBit

__all__ = ["grow_saturated", "saturated_stars"]


def grow_saturated(mask: NDArray[np.uint8], fwhm: float) -> NDArray[np.uint8]:
    """The mask with saturated pixels widened by half a FWHM: charge has spilled over there, and no PSF describes it.

    The mask itself, where nothing in it is saturated.
    """
    ys, xs = np.nonzero(mask & np.uint8(MaskBit.SATURATED))
    if ys.size == 0:
        return mask
    radius = max(1, round(fwhm / 2))
    grown = mask.copy()
    _paint_discs(grown, ys, xs, radius, np.uint8(MaskBit.SATURATED))
    return grown


def saturated_stars(mask: NDArray[np.uint8], fwhm: float) -> BrightStars:
    """Saturated stars, and how far their residuals reach: two FWHM beyond three radii of what is saturated."""
    blobs, n = ndimage.label(mask & np.uint8(MaskBit.SATURATED))
    if n == 0:
        return BrightStars(np.zeros(0), np.zeros(0), np.zeros(0))
    ys, xs = np.nonzero(blobs)
    blob = blobs[ys, xs]
    area = np.bincount(blob, minlength=n + 1)[1:]
    x, y = (np.bincount(blob, place, n + 1)[1:] / area for place in (xs, ys))
    return BrightStars(x, y, 3 * np.sqrt(area / np.pi) + 2 * fwhm)


@njit(cache=True, nogil=True)
def _paint_discs(mask, ys, xs, radius, bit):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Set `bit` within `radius` of each place."""
    ny, nx = mask.shape
    for k in range(ys.size):
        for v in range(max(ys[k] - radius, 0), min(ys[k] + radius + 1, ny)):
            half = int(np.sqrt(radius * radius - (v - ys[k]) ** 2))
            for u in range(max(xs[k] - half, 0), min(xs[k] + half + 1, nx)):
                mask[v, u] |= bit
