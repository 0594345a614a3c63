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

__all__ = ["Resampled", "kernel_polynomials", "kernel_scales", "kernel_table", "resample"]

#: Positions within a pixel at which the kernel is tabulated.
PHASES = 4096
#: The resampling evaluates polynomials of this degree instead, one a tap: some 1e-6 from the table for a = 3.
DEGREE = 9
#: Where ref's pixels are new's, but for whole numbers of pixels, to within so many pixels, resampling is copying.
WHOLE_PIXEL = 1e-3
#: Pixels of a row that are done together, so that all that belongs to them stays in the processor's first cache.
CHUNK = 64
#: Fewer neighbours than this are done one by one.
SHORT_RUN = 8
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
        Variance per pixel that sums over many pixels see: the input's, by squared weights of unit sum, times the
        Jacobian; 0 outside.
    mask : ndarray (ny, nx) uint8
        `MaskBit`s of old pixels that matter, and NO_DATA outside.

    Notes
    -----
    Interpolation correlates the noise of neighbours: a pixel by itself is quieter than its variance says, sums over
    many are not. By how much tells `batchproc.imaging.noise.kernel_autocorrelation`.
    """

    data: NDArray[np.float32]
    variance: NDArray[np.float32] | None
    mask: NDArray[np.uint8]


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

    but for the small correction of `kernel_table`. Where the map moves by whole pixels, the result is a copy.
    """
    shift = pixel_map.whole_shift(WHOLE_PIXEL)
    if shift is not None:
        return _copied(data, shift, shape, variance, mask)
    taps_x, taps_y = (kernel_polynomials(order, scale) for scale in kernel_scales(pixel_map))
    reach = max(len(taps_x), len(taps_y)) // 2

    plane = np.ascontiguousarray(data, np.float32)
    flags = _flags(plane, mask)
    spread: NDArray | None = None
    if isinstance(variance, np.ndarray):
        spread = np.ascontiguousarray(variance, np.float32)
        flags = _with_bit(flags, ~np.isfinite(spread), MaskBit.BAD)
    bad = flags != 0
    near = np.zeros((0, 0), np.bool_)
    if bad.any():
        plane = fill_bad(plane, bad, reach + 1)
        spread = None if spread is None else fill_bad(spread, bad, reach + 1)
        near = dilate(bad, reach)
    if variance is not None and spread is None:
        spread = np.full((1, 1), variance, np.float32)

    out = Resampled(
        np.zeros(shape, np.float32),
        None if spread is None else np.zeros(shape, np.float32),
        np.zeros(shape, np.uint8),
    )
    nothing = np.zeros((0, 0), np.float32)
    _resample(
        plane,
        nothing if spread is None else spread,
        flags,
        near,
        pixel_map.nodes,
        pixel_map.valid,
        pixel_map.origin,
        *pixel_map.step,
        taps_x,
        taps_y,
        out.data,
        nothing if out.variance is None else out.variance,
        out.mask,
    )
    return out


def _flags(plane: NDArray[np.float32], mask: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    flags = np.zeros(plane.shape, np.uint8) if mask is None else np.ascontiguousarray(mask, np.uint8)
    return _with_bit(flags, ~np.isfinite(plane), MaskBit.NO_DATA)


def _copied(
    data: NDArray,
    shift: tuple[int, int],
    shape: tuple[int, int],
    variance: NDArray | float | None,
    mask: NDArray[np.uint8] | None,
) -> Resampled:
    """What `resample` does where pixel (x, y) of the result is pixel (x + shift_x, y + shift_y) of data."""
    dx, dy = shift
    y0, y1, x0, x1 = max(0, -dy), min(shape[0], data.shape[0] - dy), max(0, -dx), min(shape[1], data.shape[1] - dx)
    out = Resampled(
        np.zeros(shape, np.float32),
        None if variance is None else np.zeros(shape, np.float32),
        np.full(shape, MaskBit.NO_DATA, np.uint8),
    )
    if y0 >= y1 or x0 >= x1:
        return out
    there, here = np.s_[y0 + dy : y1 + dy, x0 + dx : x1 + dx], np.s_[y0:y1, x0:x1]
    out.data[here] = data[there]
    out.mask[here] = 0 if mask is None else mask[there]
    lost = ~np.isfinite(out.data)
    if lost.any():
        out.mask[lost] |= np.uint8(MaskBit.NO_DATA)
        out.data[lost] = 0
    if out.variance is not None:
        out.variance[here] = variance[there] if isinstance(variance, np.ndarray) else variance
        lost = ~np.isfinite(out.variance)
        out.mask[lost] |= np.uint8(MaskBit.BAD)
        out.variance[lost] = 0
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


@lru_cache(maxsize=16)
def kernel_polynomials(order: int, scale: float = 1.0) -> NDArray[np.float32]:
    """`kernel_table` as polynomials of the phase: tap t weighs ``Σ_d out[t, d] p^d``.

    Returns
    -------
    ndarray (n, DEGREE + 1) float32
        Exact at both ends, p = 0 and 1, and of unit sum between them. Not to be written to.
    """
    table = kernel_table(order, scale)
    p = (1 - np.cos(np.pi * np.arange(129) / 128)) / 2
    p = np.round(p * PHASES) / PHASES
    weights = table[(p * PHASES).astype(int)]
    # The straight line between the ends, and p (1 - p) times a polynomial: what is left of unit sum has sum 0.
    line = weights[0] + p[:, None] * (weights[-1] - weights[0])
    bump = np.polynomial.Polynomial([0, 1, -1])
    terms = [bump * np.polynomial.Polynomial.basis(d) for d in range(DEGREE - 1)]
    factors = np.linalg.lstsq(np.stack([term(p) for term in terms], axis=-1), weights - line, rcond=None)[0]
    out = np.zeros((table.shape[1], DEGREE + 1))
    out[:, 0], out[:, 1] = weights[0], weights[-1] - weights[0]
    for term, factor in zip(terms, factors, strict=True):
        out[:, : term.coef.size] += factor[:, None] * term.coef
    return out.astype(np.float32)


def _with_bit(flags: NDArray[np.uint8], where: NDArray[np.bool_], bit: MaskBit) -> NDArray[np.uint8]:
    return flags | (where * np.uint8(bit)) if where.any() else flags


#: What sums may do: their values are finite, and their order is that of the machine.
FAST = {"reassoc", "contract", "nsz"}
NO_DATA = int(MaskBit.NO_DATA)
LIMITS = tuple(SIGNIFICANT_WEIGHT_SATURATED if 1 << b == MaskBit.SATURATED else SIGNIFICANT_WEIGHT for b in range(8))


@njit(cache=True, nogil=True)
def _resample(  # type: ignore[no-untyped-def]
    plane,
    spread,
    flags,
    near,
    nodes,
    valid,
    origin,
    step_y,
    step_x,
    taps_x,
    taps_y,
    out,
    out_variance,
    out_mask,
):
    ny, nx = out.shape
    ny_ref, nx_ref = plane.shape
    n_x, n_y = len(taps_x), len(taps_y)
    # Of the cells along a row: xr, yr and their y-derivatives as cubics in the position within the cell.
    cubic = np.empty((4, 4))
    # Of a chunk of a row: places on ref, pixels below them, weights of the taps.
    xr, yr = np.empty(CHUNK), np.empty(CHUNK)
    kx, ky = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    area, scratch = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    wx, wy = np.empty((n_x, CHUNK), np.float32), np.empty((n_y, CHUNK), np.float32)
    for y in range(ny):
        v = (y - origin) / step_y
        j = min(max(int(np.floor(v)), 0), valid.shape[0] - 1)
        x = 0
        while x < nx:
            i = min(max(int(np.floor((x - origin) / step_x)), 0), valid.shape[1] - 1)
            end = nx if i == valid.shape[1] - 1 else min(nx, int(np.ceil(origin + (i + 1) * step_x)))
            end = min(max(end, x + 1), x + CHUNK)
            if not valid[j, i]:
                out_mask[y, x:end] = NO_DATA
                x = end
                continue
            n = end - x
            _cubics(nodes, j, i, v - j, step_y, cubic)
            _places(cubic, (x - origin) / step_x - i, step_x, xr[:n], yr[:n], area)
            _floor(xr[:n], scratch, kx)
            _weights(taps_x, scratch[:n], wx)
            _floor(yr[:n], scratch, ky)
            _weights(taps_y, scratch[:n], wy)
            _sums(plane, ky[:n], kx[:n], wy, wx, scratch, out[y, x:end])
            for c in range(n):
                on_ref = -0.5 <= xr[c] < nx_ref - 0.5 and -0.5 <= yr[c] < ny_ref - 0.5
                out[y, x + c] *= area[c] if on_ref else np.float32(0.0)
                x0, y0 = kx[c] - n_x // 2 + 1, ky[c] - n_y // 2 + 1
                inside = x0 >= 0 and y0 >= 0 and x0 + n_x <= nx_ref and y0 + n_y <= ny_ref
                if not on_ref:
                    out_mask[y, x + c] = NO_DATA
                elif not inside or (near.size > 0 and near[ky[c], kx[c]]):
                    out_mask[y, x + c] = _significant_bits(flags, y0, x0, wy, wx, c, LIMITS)
            if spread.size > 1:
                # Squared weights of unit sum.
                _square(wx[:, :n], scratch[:n])
                _square(wy[:, :n], scratch[:n])
                _sums(spread, ky[:n], kx[:n], wy, wx, scratch, out_variance[y, x:end])
            elif spread.size == 1:
                out_variance[y, x:end] = spread[0, 0]
            if spread.size > 0:
                for c in range(n):
                    out_variance[y, x + c] *= area[c] if out_mask[y, x + c] & NO_DATA == 0 else np.float32(0.0)
            x = end


@njit(cache=True, nogil=True)
def _cubics(nodes, j, i, v, step_y, cubic):  # type: ignore[no-untyped-def]
    """xr, yr, ∂xr/∂y, ∂yr/∂y along a row through the cell (j, i), as cubics in the position along the cell, 0 to 1."""
    by, gy = hermite(v)
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


@njit(cache=True, nogil=True, fastmath=FAST, forceinline=True)
def _places(cubic, first, step_x, xr, yr, area):  # type: ignore[no-untyped-def]
    """Places on ref of pixels that begin at `first` in the cell, and the area of ref that each covers."""
    for c in range(xr.size):
        t = first + c / step_x
        xr[c] = cubic[0, 0] + t * (cubic[0, 1] + t * (cubic[0, 2] + t * cubic[0, 3]))
        yr[c] = cubic[1, 0] + t * (cubic[1, 1] + t * (cubic[1, 2] + t * cubic[1, 3]))
        xr_x = (cubic[0, 1] + t * (2.0 * cubic[0, 2] + t * 3.0 * cubic[0, 3])) / step_x
        yr_x = (cubic[1, 1] + t * (2.0 * cubic[1, 2] + t * 3.0 * cubic[1, 3])) / step_x
        xr_y = cubic[2, 0] + t * (cubic[2, 1] + t * (cubic[2, 2] + t * cubic[2, 3]))
        yr_y = cubic[3, 0] + t * (cubic[3, 1] + t * (cubic[3, 2] + t * cubic[3, 3]))
        area[c] = abs(xr_x * yr_y - xr_y * yr_x)


@njit(cache=True, nogil=True)
def _floor(places, fraction, whole):  # type: ignore[no-untyped-def]
    for c in range(places.size):
        low = np.floor(places[c])
        fraction[c] = np.float32(places[c] - low)
        whole[c] = np.int64(low)


@njit(cache=True, nogil=True, fastmath=FAST, forceinline=True)
def _weights(taps, p, out):  # type: ignore[no-untyped-def]
    """``out[t, c] = Σ_d taps[t, d] p[c]^d`` (Horner), DEGREE = 9."""
    for t in range(len(taps)):
        k, row = taps[t], out[t]
        k0, k1, k2, k3, k4, k5, k6, k7, k8, k9 = k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8], k[9]
        for c in range(p.size):
            q = p[c]
            high = k5 + q * (k6 + q * (k7 + q * (k8 + q * k9)))
            row[c] = k0 + q * (k1 + q * (k2 + q * (k3 + q * (k4 + q * high))))


@njit(cache=True, nogil=True)
def _square(weights, total):  # type: ignore[no-untyped-def]
    """Square the weights, and bring those of each column to unit sum."""
    total[:] = np.float32(0.0)
    for t in range(len(weights)):
        for c in range(total.size):
            weights[t, c] *= weights[t, c]
            total[c] += weights[t, c]
    for t in range(len(weights)):
        for c in range(total.size):
            weights[t, c] /= total[c]


@njit(cache=True, nogil=True)
def _sums(plane, ky, kx, wy, wx, scratch, out):  # type: ignore[no-untyped-def]
    """Weighted sums around the pixels (ky, kx) of `plane`, weights in the columns of `wy` and `wx`."""
    ny, nx = plane.shape
    n_y, n_x = len(wy), len(wx)
    one_y, one_x = np.empty(n_y, np.float32), np.empty(n_x, np.float32)
    first = 0
    while first < out.size:
        # Neighbours whose pixels of plane are neighbours too.
        last = first + 1
        while last < out.size and ky[last] == ky[first] and kx[last] - kx[first] == last - first:
            last += 1
        x0, y0 = kx[first] - n_x // 2 + 1, ky[first] - n_y // 2 + 1
        inside = x0 >= 0 and y0 >= 0 and x0 + (last - 1 - first) + n_x <= nx and y0 + n_y <= ny
        if inside and last - first >= SHORT_RUN:
            _run(plane, y0, x0, wy, wx, first, scratch, out[first:last])
        else:
            for c in range(first, last):
                for t in range(n_y):
                    one_y[t] = wy[t, c]
                for t in range(n_x):
                    one_x[t] = wx[t, c]
                out[c] = _sum(plane, ky[c] - n_y // 2 + 1, kx[c] - n_x // 2 + 1, one_y, one_x)
        first = last


@njit(cache=True, nogil=True, fastmath=FAST, forceinline=True)
def _run(plane, y0, x0, wy, wx, first, scratch, out):  # type: ignore[no-untyped-def]
    """Weighted sums for neighbours: that of ``out[c]`` begins at (y0, x0 + c), its weights are in column first + c."""
    n = out.size
    row = scratch[:n]
    for r in range(len(wy)):
        pixels, weight = plane[y0 + r, x0:], wy[r, first:]
        row[:] = np.float32(0.0)
        for t in range(0, len(wx), 2):
            one, two, w_one, w_two = pixels[t:], pixels[t + 1 :], wx[t, first:], wx[t + 1, first:]
            for c in range(n):
                row[c] += w_one[c] * one[c] + w_two[c] * two[c]
        for c in range(n):
            out[c] += weight[c] * row[c]


@njit(cache=True, nogil=True, fastmath=FAST, forceinline=True)
def _sum(plane, y0, x0, wy, wx):  # type: ignore[no-untyped-def]
    """One weighted sum; at the edge, pixels are repeated outwards."""
    ny, nx = plane.shape
    total = np.float32(0.0)
    if y0 >= 0 and x0 >= 0 and y0 + wy.size <= ny and x0 + wx.size <= nx:
        for r in range(wy.size):
            pixels, row = plane[y0 + r, x0 : x0 + wx.size], np.float32(0.0)
            for t in range(wx.size):
                row += wx[t] * pixels[t]
            total += wy[r] * row
        return total
    for r in range(wy.size):
        y = min(max(y0 + r, 0), ny - 1)
        for t in range(wx.size):
            total += wy[r] * wx[t] * plane[y, min(max(x0 + t, 0), nx - 1)]
    return total


@njit(cache=True, nogil=True)
def _significant_bits(flags, y0, x0, wy, wx, c, limits):  # type: ignore[no-untyped-def]
    """Bits whose pixels carry more than their limit of |weight| (column c); outside of the image lies NO_DATA."""
    ny, nx = flags.shape
    share = np.zeros(8)
    for r in range(len(wy)):
        y = y0 + r
        for k in range(len(wx)):
            x = x0 + k
            m = flags[y, x] if 0 <= y < ny and 0 <= x < nx else NO_DATA
            if m != 0:
                weight = abs(wy[r, c] * wx[k, c])
                for b in range(8):
                    if (m >> b) & 1:
                        share[b] += weight
    bits = 0
    for b in range(8):
        if share[b] > limits[b]:
            bits |= 1 << b
    return bits


@njit(cache=True, nogil=True, inline="always")
def _power_basis(h, out):  # type: ignore[no-untyped-def]
    """Value and slope left, value and slope right → coefficients of 1, t, t², t³."""
    out[0] = h[0]
    out[1] = h[1]
    out[2] = -3.0 * h[0] - 2.0 * h[1] + 3.0 * h[2] - h[3]
    out[3] = 2.0 * h[0] + h[1] - 2.0 * h[2] + h[3]
