"""Taking noise out of a map whose noise is known, without smoothing what is real."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["shrink"]

_SPLINE = np.array([1, 4, 6, 4, 1]) / 16
_SCALES = 5


def shrink(values: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keep of a map what stands out of its noise: pixel by pixel where it can, smoothed where it must.

    Parameters
    ----------
    values : ndarray (n, n)
        The map; its true values fall to zero towards the edge.
    noise : ndarray (n, n)
        1-sigma error of each value, nearly independent from pixel to pixel.

    Returns
    -------
    ndarray (n, n)

    Notes
    -----
    The pixels are kept times ``max(0, 1 − 3 σ² / <v²>)``, the mean taken over the neighbourhood (James & Stein's
    rule); what they leave is smoothed (B3 spline) and treated alike, and so on up the scales. Going up from the
    pixels, and not by wavelets, the strong core is gone before the wings are smoothed, and does not ring in them.

    Neighbouring errors are correlated in resampled images, which makes the larger scales noisier than counted. The
    outer part of the map tells by how much, at scales too small for a signal there.
    """
    half = (len(values) - 1) / 2
    axis = np.arange(len(values)) - half
    outer = np.hypot(axis[:, None], axis[None, :]) > 0.75 * half
    kept = np.zeros_like(values)
    point = np.zeros((127, 127))
    point[63, 63] = 1.0
    excess = 1.0
    left = values
    for scale in range(_SCALES):
        smooth = left
        for k in range(scale):
            smooth = _smooth(smooth, k)
        sigma = noise * np.sqrt(np.sum(point**2))
        if scale <= 2:
            ratio = smooth[outer] / sigma[outer]
            excess = max(excess, 1.4826 * float(np.median(np.abs(ratio - np.median(ratio)))))
        power = ndimage.gaussian_filter(smooth**2, 2.0**scale, mode="nearest")
        part = smooth * np.maximum(0.0, 1 - 3 * (excess * sigma) ** 2 / np.maximum(power, 1e-300))
        kept += part
        left = left - part
        point = _smooth(point, scale)
    return kept


def _smooth(values: NDArray[np.float64], scale: int) -> NDArray[np.float64]:
    kernel = np.zeros(4 * 2**scale + 1)
    kernel[:: 2**scale] = _SPLINE
    rows = ndimage.correlate1d(values, kernel, axis=0, mode="constant")
    return ndimage.correlate1d(rows, kernel, axis=1, mode="constant")  # type: ignore[no-any-return]
