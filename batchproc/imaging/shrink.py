"""Taking noise out of a map whose noise is known, without smoothing what is real."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["shrink"]

_SPLINE = np.array([1, 4, 6, 4, 1]) / 16
_SCALES = 5


def shrink(
    values: NDArray[np.float64], noise: NDArray[np.float64], common: NDArray[np.float64] | float = 0.0
) -> NDArray[np.float64]:
    """Keep of a map what stands out of its noise: pixel by pixel where it can, smoothed where it must.

    Parameters
    ----------
    values : ndarray (…, n, n)
        Maps; their true values fall to zero towards the edge.
    noise : ndarray (…, n, n)
        1-sigma error of each value, nearly independent from pixel to pixel.
    common : ndarray (…, n, n) or float
        1-sigma error that neighbouring values share, so that no smoothing makes it less.

    Returns
    -------
    ndarray (…, n, n)

    Notes
    -----
    The pixels are kept times ``max(0, 1 − 3 σ² / <v²>)``, the mean taken over the neighbourhood (James & Stein's
    rule); what they leave is smoothed (B3 spline) and treated alike, and so on up the scales. Going up from the
    pixels, and not by wavelets, the strong core is gone before the wings are smoothed, and does not ring in them.

    Neighbouring errors are correlated in resampled images, which makes the larger scales noisier than counted. The
    outer part of the map tells by how much, at scales too small for a signal there.
    """
    size = values.shape[-1]
    half = (size - 1) / 2
    axis = np.arange(size) - half
    outer = np.hypot(axis[:, None], axis[None, :]) > 0.75 * half
    kept = np.zeros_like(values)
    excess = np.ones(values.shape[:-2])
    left = values
    for scale in range(_SCALES):
        smoothing, spread, mean = _operators(size, scale)
        smooth = smoothing @ left @ smoothing.T
        sigma = noise * spread
        if scale <= 2:
            ratio = smooth[..., outer] / sigma[..., outer]
            middle = np.median(ratio, axis=-1, keepdims=True)
            excess = np.maximum(excess, 1.4826 * np.median(np.abs(ratio - middle), axis=-1))
        power = mean @ smooth**2 @ mean.T
        error2 = (excess[..., None, None] * sigma) ** 2 + common**2
        part = smooth * np.maximum(0.0, 1 - 3 * error2 / np.maximum(power, 1e-300))
        kept += part
        left = left - part
    return kept


@functools.cache
def _operators(size: int, scale: int) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
    """What `shrink` does along one axis before a scale, as matrices.

    Returns the smoothing (size, size), zero outside; what it leaves of independent noise, in both axes together; and
    the Gaussian mean over the neighbourhood (size, size), its ends repeated.
    """
    smoothing, wide = np.eye(size), np.eye(127)
    for k in range(scale):
        smoothing, wide = _smooth(smoothing, k), _smooth(wide, k)
    mean = ndimage.gaussian_filter1d(np.eye(size), 2.0**scale, axis=0, mode="nearest")
    # Convolutions along both axes: the sum of squares of the product is the product of the sums.
    spread = float(np.sum(wide[:, 63] ** 2))
    for array in (smoothing, mean):
        array.flags.writeable = False  # one array serves all
    return smoothing, spread, mean


def _smooth(values: NDArray[np.float64], scale: int) -> NDArray[np.float64]:
    kernel = np.zeros(4 * 2**scale + 1)
    kernel[:: 2**scale] = _SPLINE
    return ndimage.correlate1d(values, kernel, axis=0, mode="constant")  # type: ignore[no-any-return]
