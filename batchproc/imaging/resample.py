"""Lanczos resampling of one image onto the grid of another.

What is conserved is flux: a star has the same sum of pixels before and after, whatever the pixel scales, because each
value is the local surface brightness (normalised Lanczos weights) times the area of ref that the pixel covers (the
Jacobian of the map). Where ref is finer than new the kernel is widened to new's pixels, so that nothing aliases.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from batchproc.imaging.fill import dilate, fill_bad
from batchproc.imaging.pixelmap import PixelMap, hermite
from batchproc.records import MaskBit

__all__ = ["Resampled", "kernel_scales", "kernel_table", "resample"]

#: Positions within a pixel at which the kernel is tabulated; the nearest is taken (off by at most 1.2e-4 px).
PHASES = 4096
#: A bit of the mask propagates where |weights| of the pixels that carry it sum up to more than this. A filled pixel is
#: wrong by about the noise, so a tenth of it is of no account; a saturated one is wrong by any amount.
SIGNIFICANT_WEIGHT = 0.1
SIGNIFICANT_WEIGHT_SATURATED = 0.02


@dataclass(frozen=True)
class Resampled:
    """An image on another grid.

    Attributes
    ----------
    data : ndarray (ny, nx) float32
        Flux per pixel of the new grid; 0 outside of the old image.
    variance : ndarray (ny, nx) float32 or None
        Variance of each pixel by itself: squared weights times the input's (times the Jacobian squared); 0 outside.
    mask : ndarray (ny, nx) uint8
        `MaskBit`s of old pixels that matter, and NO_DATA outside.
    noise_kept : ndarray (ny, nx) float32
        Interpolation correlates the noise of neighbours: each pixel by itself is quieter, sums over many are not. This
        is the variance of a pixel by itself over the variance per pixel that large apertures see, between 0.6 and 1 for
        images of like scale; 0 outside. Divide a variance by it (or an rms by its root) to get the level of white noise
        that does the same to a matched filter.
    """

    data: NDArray[np.float32]
    variance: NDArray[np.float32] | None
    mask: NDArray[np.uint8]
    noise_kept: NDArray[np.float32]


def resample(
    data: NDArray,
    pixel_map: PixelMap,
    shape: tuple[int, int],
    *,
    variance: NDArray | float | None = None,
    mask: NDArray[np.uint8] | None = None,
    order: int = 3,
) -> Resampled:
    """Bring an image onto another grid.

    Parameters
    ----------
    data : ndarray (ny_ref, nx_ref)
        Any real dtype and byte order; sky included or not. Not modified.
    pixel_map : PixelMap
        Pixel of the result → pixel of `data`.
    shape : (int, int)
        (ny, nx) of the result.
    variance : ndarray like `data`, or float, optional
        A number stands for the same variance everywhere.
    mask : ndarray (ny_ref, nx_ref) uint8, optional
        Bits of `MaskBit`. Masked pixels and those that are not finite are filled from their neighbours before they can
        ring or spread; their bits go where they had a share in the result.
    order : {2, 3, 4}
        Lanczos a: half the width of the kernel in pixels.

    Returns
    -------
    Resampled

    Notes
    -----
    Equivalent to, for each pixel (x, y) of the result, with (s_x, s_y) the map's scales or 1 where they are smaller::

        xr, yr = pixel_map(x, y)
        w = lanczos((k_x - xr) / s_x) * lanczos((k_y - yr) / s_y)      # over pixels (k_x, k_y) of data
        result = (w * data).sum() / w.sum() * abs(det(pixel_map.jacobian(x, y)))

    but for the small correction of `kernel_table`.
    """
    table_x, table_y = (kernel_table(order, scale) for scale in kernel_scales(pixel_map))
    reach = max(table_x.shape[1], table_y.shape[1]) // 2

    plane = np.ascontiguousarray(data, np.float32)
    flags = np.zeros(plane.shape, np.uint8) if mask is None else np.ascontiguousarray(mask, np.uint8)
    flags = _with_bit(flags, ~np.isfinite(plane), MaskBit.NO_DATA)
    spread: NDArray | None = None
    if isinstance(variance, np.ndarray):
        spread = np.ascontiguousarray(variance, np.float32)
        flags = _with_bit(flags, ~np.isfinite(spread), MaskBit.BAD)
    bad = flags != 0
    any_bad = bool(bad.any())
    near = bad
    if any_bad:
        plane = fill_bad(plane, bad, reach + 1)
        spread = None if spread is None else fill_bad(spread, bad, reach + 1)
        near = dilate(bad, reach)

    nothing = np.zeros((0, 0), np.float32)
    out = Resampled(
        np.zeros(shape, np.float32),
        None if variance is None else np.zeros(shape, np.float32),
        np.zeros(shape, np.uint8),
        np.zeros(shape, np.float32),
    )
    _resample(
        plane,
        nothing if spread is None else spread,
        flags,
        near,
        any_bad,
        pixel_map.nodes,
        pixel_map.valid,
        pixel_map.origin,
        *pixel_map.step,
        table_x,
        table_y,
        table_x**2,
        table_y**2,
        (table_x**2).sum(1),
        (table_y**2).sum(1),
        out.data,
        nothing if out.variance is None or spread is None else out.variance,
        out.mask,
        out.noise_kept,
    )
    if out.variance is not None and spread is None:
        # The same variance everywhere: V Σw² J² = V · noise_kept · J.
        out.variance[:] = out.noise_kept * (np.float32(variance) * _areas(pixel_map, shape))
    return out


def kernel_scales(pixel_map: PixelMap) -> tuple[float, float]:
    """Widths of the kernel's unit in pixels of ref, along x and y: those of new's pixels where ref is finer, else 1."""
    # A tenth of a per cent of widening would cost two more rows of taps and gain nothing.
    scale_x, scale_y = (scale if scale > 1.01 else 1.0 for scale in pixel_map.scales)
    return scale_x, scale_y


@lru_cache(maxsize=16)
def kernel_table(order: int, scale: float = 1.0) -> NDArray[np.float64]:
    """Lanczos weights by phase: row p, tap t weighs pixel ``k - n/2 + 1 + t`` in the value at ``x = k + p / PHASES``.

    Parameters
    ----------
    order : int
        a in ``sinc(u) sinc(u / a)``, |u| < a.
    scale : float
        Width of the kernel's unit in pixels, at least 1.

    Returns
    -------
    ndarray (PHASES + 1, n) float64
        n = 2 ceil(a scale); each row has unit sum. Kept for the next call: not to be written to.

    Notes
    -----
    Lanczos weights do not reproduce a gradient: Σ w (k - x) is up to 0.02 pixels for a = 3, and a star seen through
    them is off by that, depending on its sub-pixel place: wide stars by nearly all of it, sharp ones by little. Half of
    it is taken out, which leaves at most 0.004 pixels (a = 3, FWHM 2.5 to 5, PSF-weighted place) instead of 0.011.
    """
    half = int(np.ceil(order * scale - 1e-9))
    taps = np.arange(-half + 1, half + 1)
    u = (taps - np.arange(PHASES + 1)[:, None] / PHASES) / scale
    weights = np.where(np.abs(u) < order, np.sinc(u) * np.sinc(u / order), 0.0)
    if scale == 1.0:
        # On the grid the kernel is a delta function to the last bit: an identity map returns its input.
        weights[0], weights[-1] = taps == 0, taps == 1
    weights /= weights.sum(axis=1, keepdims=True)
    # A window with which to add a slope; its three sums make the change one of the first moment only.
    window = np.where(np.abs(u) < order, np.sinc(u / order), 0.0)
    s0, s1, s2 = (np.sum(window * u**k, axis=1, keepdims=True) for k in range(3))
    excess = 0.5 * scale * np.sum(weights * u, axis=1, keepdims=True)
    return weights - excess * window * (u * s0 - s1) / (s0 * s2 - s1**2) / scale


def _with_bit(flags: NDArray[np.uint8], where: NDArray[np.bool_], bit: MaskBit) -> NDArray[np.uint8]:
    return flags | (where * np.uint8(bit)) if where.any() else flags


def _areas(pixel_map: PixelMap, shape: tuple[int, int]) -> NDArray[np.float32]:
    """|det J| at each pixel, from its values every 16 pixels: areas hardly change within an image."""
    ys, xs = (np.unique(np.append(np.arange(0, n, 16), n - 1)) for n in shape)
    j = pixel_map.jacobian(xs[None, :], ys[:, None])
    areas = np.abs(j[..., 0, 0] * j[..., 1, 1] - j[..., 0, 1] * j[..., 1, 0])
    rows = np.array([np.interp(np.arange(shape[1]), xs, row) for row in areas])
    return np.array([np.interp(np.arange(shape[0]), ys, c) for c in rows.T], np.float32).T


# Sums may be reassociated and contracted: every value in them is finite by then.
@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _sum_inside(plane, y0, x0, wy, wx):  # type: ignore[no-untyped-def]
    total = 0.0
    for r in range(wy.size):
        row = 0.0
        for k in range(wx.size):
            row += wx[k] * plane[y0 + r, x0 + k]
        total += wy[r] * row
    return total


@njit(cache=True, nogil=True)
def _sum_clamped(plane, y0, x0, wy, wx):  # type: ignore[no-untyped-def]
    """The same at the edge, whose pixels are repeated outwards."""
    ny, nx = plane.shape
    total = 0.0
    for r in range(wy.size):
        y = min(max(y0 + r, 0), ny - 1)
        for k in range(wx.size):
            x = min(max(x0 + k, 0), nx - 1)
            total += wy[r] * wx[k] * plane[y, x]
    return total


@njit(cache=True, nogil=True)
def _significant_bits(flags, y0, x0, wy, wx, limits):  # type: ignore[no-untyped-def]
    """Bits whose pixels carry more than their limit of |weight|; outside of the image lies NO_DATA."""
    ny, nx = flags.shape
    share = np.zeros(8)
    for r in range(wy.size):
        y = y0 + r
        for k in range(wx.size):
            x = x0 + k
            m = flags[y, x] if 0 <= y < ny and 0 <= x < nx else NO_DATA
            if m != 0:
                weight = abs(wy[r] * wx[k])
                for b in range(8):
                    if (m >> b) & 1:
                        share[b] += weight
    bits = 0
    for b in range(8):
        if share[b] > limits[b]:
            bits |= 1 << b
    return bits


NO_DATA = int(MaskBit.NO_DATA)
LIMITS = tuple(SIGNIFICANT_WEIGHT_SATURATED if 1 << b == MaskBit.SATURATED else SIGNIFICANT_WEIGHT for b in range(8))


@njit(cache=True, nogil=True)
def _resample(  # type: ignore[no-untyped-def]
    plane,
    spread,
    flags,
    near,
    any_bad,
    nodes,
    valid,
    origin,
    step_y,
    step_x,
    table_x,
    table_y,
    squares_x,
    squares_y,
    sum_squares_x,
    sum_squares_y,
    out,
    out_variance,
    out_mask,
    out_kept,
):
    ny, nx = out.shape
    ny_ref, nx_ref = plane.shape
    n_x, n_y = table_x.shape[1], table_y.shape[1]
    phases = table_x.shape[0] - 1
    n_cells_y, n_cells_x = valid.shape
    with_variance = spread.size > 0
    # Of the cells along a row: xr, yr and their y-derivatives as cubics in the position within the cell.
    cubic = np.empty((4, 4))
    for y in range(ny):
        v = (y - origin) / step_y
        j = min(max(int(np.floor(v)), 0), n_cells_y - 1)
        by, gy = hermite(v - j)
        x = 0
        while x < nx:
            i = min(max(int(np.floor((x - origin) / step_x)), 0), n_cells_x - 1)
            end = nx if i == n_cells_x - 1 else min(nx, int(np.ceil(origin + (i + 1) * step_x)))
            end = max(end, x + 1)
            if not valid[j, i]:
                out_mask[y, x:end] = NO_DATA
                x = end
                continue
            for c in range(2):
                f = np.empty(4)  # value and slope along x, left and right
                g = np.empty(4)  # their derivatives along y
                for a in range(2):
                    for d in range(2):
                        low, high = nodes[c, d, j, i + a], nodes[c, d, j + 1, i + a]
                        low_y, high_y = nodes[c, 2 + d, j, i + a], nodes[c, 2 + d, j + 1, i + a]
                        f[2 * a + d] = by[0] * low + by[1] * low_y + by[2] * high + by[3] * high_y
                        g[2 * a + d] = (gy[0] * low + gy[1] * low_y + gy[2] * high + gy[3] * high_y) / step_y
                _power_basis(f, cubic[c])
                _power_basis(g, cubic[2 + c])
            for column in range(x, end):
                t = (column - origin) / step_x - i
                xr = cubic[0, 0] + t * (cubic[0, 1] + t * (cubic[0, 2] + t * cubic[0, 3]))
                yr = cubic[1, 0] + t * (cubic[1, 1] + t * (cubic[1, 2] + t * cubic[1, 3]))
                if not (-0.5 <= xr < nx_ref - 0.5 and -0.5 <= yr < ny_ref - 0.5):
                    out_mask[y, column] = NO_DATA
                    continue
                xr_x = (cubic[0, 1] + t * (2.0 * cubic[0, 2] + t * 3.0 * cubic[0, 3])) / step_x
                yr_x = (cubic[1, 1] + t * (2.0 * cubic[1, 2] + t * 3.0 * cubic[1, 3])) / step_x
                xr_y = cubic[2, 0] + t * (cubic[2, 1] + t * (cubic[2, 2] + t * cubic[2, 3]))
                yr_y = cubic[3, 0] + t * (cubic[3, 1] + t * (cubic[3, 2] + t * cubic[3, 3]))
                area = abs(xr_x * yr_y - xr_y * yr_x)

                k_x, k_y = int(np.floor(xr)), int(np.floor(yr))
                p_x, p_y = int((xr - k_x) * phases + 0.5), int((yr - k_y) * phases + 0.5)
                wx, wy = table_x[p_x], table_y[p_y]
                x0, y0 = k_x - n_x // 2 + 1, k_y - n_y // 2 + 1
                kept = sum_squares_x[p_x] * sum_squares_y[p_y] * area
                out_kept[y, column] = kept
                inside = x0 >= 0 and y0 >= 0 and x0 + n_x <= nx_ref and y0 + n_y <= ny_ref
                if inside:
                    out[y, column] = area * _sum_inside(plane, y0, x0, wy, wx)
                    if with_variance:
                        out_variance[y, column] = (
                            area * area * _sum_inside(spread, y0, x0, squares_y[p_y], squares_x[p_x])
                        )
                else:
                    out[y, column] = area * _sum_clamped(plane, y0, x0, wy, wx)
                    if with_variance:
                        out_variance[y, column] = (
                            area * area * _sum_clamped(spread, y0, x0, squares_y[p_y], squares_x[p_x])
                        )
                k_x, k_y = min(max(k_x, 0), nx_ref - 1), min(max(k_y, 0), ny_ref - 1)
                if not inside or (any_bad and near[k_y, k_x]):
                    out_mask[y, column] = _significant_bits(flags, y0, x0, wy, wx, LIMITS)
            x = end


@njit(cache=True, nogil=True, inline="always")
def _power_basis(h, out):  # type: ignore[no-untyped-def]
    """Value and slope left, value and slope right → coefficients of 1, t, t², t³."""
    out[0] = h[0]
    out[1] = h[1]
    out[2] = -3.0 * h[0] - 2.0 * h[1] + 3.0 * h[2] - h[3]
    out[3] = 2.0 * h[0] + h[1] - 2.0 * h[2] + h[3]
