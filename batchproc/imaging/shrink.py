"""Taking noise out of a map whose noise is known, without smoothing what is real."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["shrink"]

_SPLINE = np.array([1, 4, 6, 4, 1]) / 16


def shrink(values: NDArray[np.float64], noise: NDArray[np.float64], n_scales: int = 4) -> NDArray[np.float64]:
    """Shrink the wavelet coefficients of a map by how little they stand out of the noise.

    Parameters
    ----------
    values : ndarray (n, n)
        The map; its true values fall to zero towards the edge.
    noise : ndarray (n, n)
        1-sigma error of each value, nearly independent from pixel to pixel.

    Returns
    -------
    ndarray (n, n)
        À-trous wavelets with a B3 spline (Starck & Murtagh 1994, A&A 288, 342); each coefficient times
        ``max(0, 1 − 1.5 σ² / <w²>)``, the mean taken over its neighbourhood.

    Notes
    -----
    Neighbouring errors are correlated in resampled images, which makes the larger scales noisier than counted. The
    outer part of the map, where there is hardly any signal, tells by how much.
    """
    half = (len(values) - 1) / 2
    axis = np.arange(len(values)) - half
    outer = np.hypot(axis[:, None], axis[None, :]) > 0.75 * half
    out = np.zeros_like(values)
    unit = _unit_noise(values.shape[0], n_scales)
    smooth = values
    for scale in range(n_scales + 1):
        if scale < n_scales:
            coarse = _smooth(smooth, scale)
            detail, smooth = smooth - coarse, coarse
        else:
            detail = smooth
        sigma = noise * unit[scale]
        excess = np.median(np.abs(detail[outer]) / sigma[outer]) / 0.6745
        sigma = sigma * max(1.0, float(excess))
        power = ndimage.gaussian_filter(detail**2, 2.0**scale, mode="nearest")
        out += detail * np.maximum(0.0, 1 - 1.5 * sigma**2 / np.maximum(power, 1e-300))
    return out


def _smooth(values: NDArray[np.float64], scale: int) -> NDArray[np.float64]:
    kernel = np.zeros(4 * 2**scale + 1)
    kernel[:: 2**scale] = _SPLINE
    rows = ndimage.correlate1d(values, kernel, axis=0, mode="constant")
    return ndimage.correlate1d(rows, kernel, axis=1, mode="constant")  # type: ignore[no-any-return]


def _unit_noise(size: int, n_scales: int) -> list[float]:
    """Noise of the coefficients at each scale for unit white noise."""
    point = np.zeros((127, 127))
    point[63, 63] = 1.0
    norms = []
    for scale in range(n_scales):
        coarse = _smooth(point, scale)
        norms.append(float(np.sqrt(np.sum((point - coarse) ** 2))))
        point = coarse
    return [*norms, float(np.sqrt(np.sum(point**2)))]
