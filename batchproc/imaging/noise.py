"""How the noise of neighbouring pixels hangs together: measured on blank sky, predicted for a kernel, as a spectrum.

An interpolated image is quieter pixel by pixel than its sums are, and a coadd of interpolated images more so. ZOGY
takes noise for white; with the spectrum of what it really is in its place, the difference is white again. The rms of
single pixels stays what `background` measures; here is only the shape, 1 at zero lag.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from batchproc.imaging.pixelmap import PixelMap
from batchproc.imaging.resample import kernel_scales, kernel_table

__all__ = [
    "Autocorrelation",
    "kernel_autocorrelation",
    "measure_autocorrelation",
    "noise_autocorrelation",
    "noise_power",
    "seen_by",
]

#: Side of the windows that are looked at, and what is looked at around them for sources that reach in.
WINDOW = 64
MARGIN = 4
#: Windows at most: a million pixels, with which a lag is known to 0.001.
MAX_WINDOWS = 256
#: Sky is what stays within so many sigma, as it is and smoothed; what does not takes its surroundings along.
CLIP = 4.0
GROW = 4
#: Lags so much farther out tell what is no noise of neighbours: an uneven sky, and the wings of faint sources.
BEYOND = 6
#: A correlation below so many of its errors is no correlation.
SIGNIFICANT = 3.0
#: Faint sources must be surer than a lag: seen where there are none, they would widen S_corr by their whole share.
SURE = 5.0
#: A spectrum is nowhere less than this: a truncated autocorrelation may dip below zero.
FLOOR = 0.01


@dataclass(frozen=True)
class Autocorrelation:
    """Correlation of the noise of pixels that lie (dx, dy) apart.

    Attributes
    ----------
    values : ndarray (2 L + 1, 2 L + 1) float64
        ``values[L + dy, L + dx]``: 1 in the middle, point-symmetric; 0 where insignificant.
    error : float
        1 sigma of a value that should be 0, from the scatter of the windows (NaN where nothing could be measured).
    sources : float
        Share of faint undetected sources in the variance of blank sky, taken out of ``values``.
    n_pixels : int
        Blank pixels that were looked at.
    """

    values: NDArray[np.float64]
    error: float
    sources: float
    n_pixels: int


def noise_autocorrelation(
    data: NDArray,
    mask: NDArray | None,
    rms: NDArray | float,
    max_lag: int = 3,
    *,
    psf: NDArray | None = None,
) -> NDArray[np.float64]:
    """Autocorrelation of blank-sky noise: `measure_autocorrelation` without its errors.

    Returns
    -------
    ndarray (2 max_lag + 1, 2 max_lag + 1) float64
        1 at zero lag, point-symmetric; white noise gives exact zeros elsewhere (but for one lag in some hundred).
    """
    return measure_autocorrelation(data, mask, rms, max_lag, psf=psf).values


def measure_autocorrelation(
    data: NDArray,
    mask: NDArray | None,
    rms: NDArray | float,
    max_lag: int = 3,
    *,
    psf: NDArray | None = None,
) -> Autocorrelation:
    """Autocorrelation of blank-sky noise, sources left out.

    Parameters
    ----------
    data : ndarray (ny, nx)
        Background-subtracted; pixels that are not finite count as masked.
    mask : ndarray (ny, nx) or None
        Non-zero is bad (or a source).
    rms : ndarray (ny, nx) or float
        Sky rms of a pixel, positive, in the units of `data`.
    max_lag : int
        Largest lag in x and y.
    psf : ndarray (h, w), optional
        PSF stamp. Sources too faint to be found are correlated too, but they are in both images and subtract. With
        their shape known, they are told from noise by the lags beyond `max_lag`, which noise does not reach.

    Returns
    -------
    Autocorrelation

    Notes
    -----
    At most `MAX_WINDOWS` windows of 64 × 64 pixels, evenly spread. In each, pixels beyond 4 sigma, by themselves or
    after a small smoothing, are left out with their surroundings, and the mean is subtracted; windows with an unusual
    variance or correlation (galaxies, halos) are left out. The error of a value falls with the root of the blank
    pixels: 0.001 for a million.
    """
    lags, far = _half_plane(max_lag), _far_lags(max_lag)
    corners = _windows(data.shape)
    plane = np.ascontiguousarray(data, np.float32)
    bad = np.zeros((0, 0), np.bool_) if mask is None else np.ascontiguousarray(np.asarray(mask) != 0)
    sigma = np.ascontiguousarray(np.atleast_2d(rms), np.float32)
    all_lags = np.concatenate([np.zeros((1, 2), np.int64), lags, far])
    sums, counts = _lag_sums(plane, bad, sigma, corners, all_lags)
    full = counts[:, 0] >= WINDOW**2 / 8
    covariance, weight = sums[full] / np.maximum(counts[full], 1.0), counts[full, 0]
    weight = weight * _ordinary(covariance, len(lags)) if weight.size else weight
    if not weight.any():
        return Autocorrelation(_assemble(lags, np.zeros(len(lags)), max_lag), np.nan, 0.0, 0)
    mean = weight @ covariance / weight.sum()
    value = mean / mean[0]
    scatter2 = weight**2 @ (covariance / mean[0] - value) ** 2 / weight.sum() ** 2
    error = float(np.sqrt(max(np.mean(scatter2[1:]), 1 / weight.sum())))

    plateau, share = _no_noise(value[1 + len(lags) :], far, psf, error)
    near = value[1 : 1 + len(lags)] - plateau - share * _psf_autocorrelation(psf, lags)
    near /= 1 - plateau - share
    near[np.abs(near) < SIGNIFICANT * error] = 0.0
    return Autocorrelation(_assemble(lags, near, max_lag), error, share, int(weight.sum()))


def kernel_autocorrelation(pixel_map: PixelMap, order: int = 3, max_lag: int = 3) -> NDArray[np.float64]:
    """Autocorrelation that `resample` gives to white noise, averaged over the image.

    Parameters
    ----------
    pixel_map : PixelMap
        As given to `resample`; its places between pixels are what counts.
    order : int
        Lanczos a.
    max_lag : int

    Returns
    -------
    ndarray (2 max_lag + 1, 2 max_lag + 1) float64
        ``Σ_k w(k - r) w(k - r') / Σ_k w(k - r)²`` with w the two-dimensional weights and r, r' the places of two pixels
        that are (dx, dy) apart; numerator and denominator averaged over some thousand pixels.
    """
    table_x, table_y = (kernel_table(order, scale) for scale in kernel_scales(pixel_map))
    # Additive recurrence of the plastic number: points that fill a plane evenly, whatever their number.
    steps = np.arange(1, 4097)[:, None] * np.array([0.7548776662466927, 0.5698402909980532])
    x, y = np.floor((steps % 1) * np.array(pixel_map.shape[::-1])).T
    places = np.stack(pixel_map(x, y), axis=-1)
    jacobian = pixel_map.jacobian(x, y)
    lags = np.concatenate([np.zeros((1, 2), np.int64), _half_plane(max_lag)])
    covariance = _kernel_covariance(places, jacobian, lags, table_x, table_y)
    return _assemble(lags[1:], covariance[1:] / covariance[0], max_lag)


def noise_power(acf: ArrayLike, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Power spectrum of noise with this autocorrelation, in units of that of white noise of the same rms.

    Parameters
    ----------
    acf : array_like (2 L + 1, 2 L + 1)
        As of `noise_autocorrelation`.
    shape : (int, int)
        Frame (ny, nx), larger than the lags.

    Returns
    -------
    ndarray (ny, nx // 2 + 1) float32
        ``Σ acf(d) cos(2π k·d)`` as `rfft2` orders it, nowhere below `FLOOR`, of mean 1 over the full plane.
    """
    values = np.asarray(acf, np.float64)
    lag = len(values) // 2
    steps = np.arange(-lag, lag + 1)
    along_y = 2 * np.pi * np.fft.fftfreq(shape[0])[:, None] * steps
    along_x = 2 * np.pi * np.fft.rfftfreq(shape[1])[:, None] * steps
    power = np.cos(along_y) @ values @ np.cos(along_x).T - np.sin(along_y) @ values @ np.sin(along_x).T
    np.maximum(power, FLOOR, out=power)
    # All columns but those of kx = 0 and Nyquist stand for two.
    rows = power.mean(axis=0)
    last = rows[-1] if shape[1] % 2 == 0 else 0.0
    mean = (2 * rows.sum() - rows[0] - last) / shape[1]
    return (power / mean).astype(np.float32)


def seen_by(psf: NDArray, acf: NDArray[np.float64]) -> float:
    """Variance of this noise after a filter of the shape of the PSF, in units of that of white noise of the same rms.

    ``Σ_d acf(d) p(d)``, p the autocorrelation of the PSF, 1 at zero lag: above 1 for what an interpolation leaves.
    """
    lag = len(acf) // 2
    steps = np.arange(-lag, lag + 1)
    lags = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    return max(float(_psf_autocorrelation(psf, lags) @ acf.ravel()), FLOOR)


def _half_plane(reach: int) -> NDArray[np.int64]:
    """Lags (dy, dx), zero and mirror images left out."""
    lags = [(dy, dx) for dy in range(reach + 1) for dx in range(-reach, reach + 1) if dy > 0 or dx > 0]
    return np.array(lags, np.int64).reshape(-1, 2)


def _far_lags(max_lag: int) -> NDArray[np.int64]:
    """A fifth of the lags of the half-plane beyond `max_lag`, evenly spread."""
    lags = _half_plane(max_lag + BEYOND)
    far = np.abs(lags).max(axis=1) > max_lag
    return lags[far & ((lags[:, 0] + 2 * lags[:, 1]) % 5 == 0)]


def _assemble(lags: NDArray[np.int64], values: NDArray, max_lag: int) -> NDArray[np.float64]:
    """The full square of lags from those of the half-plane."""
    acf = np.zeros((2 * max_lag + 1, 2 * max_lag + 1))
    acf[max_lag, max_lag] = 1.0
    for sign in (1, -1):
        acf[max_lag + sign * lags[:, 0], max_lag + sign * lags[:, 1]] = values
    return acf


def _windows(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """First pixels (y, x) of at most `MAX_WINDOWS` windows with their margins inside, on an even grid."""
    axes = [np.arange(MARGIN, n - WINDOW - MARGIN + 1, WINDOW) for n in shape]
    every = max(1, int(np.ceil(np.sqrt(axes[0].size * axes[1].size / MAX_WINDOWS))))
    ys, xs = (axis[(axis.size - 1) % every // 2 :: every] for axis in axes)
    return np.array([(y, x) for y in ys for x in xs], np.int64).reshape(-1, 2)


def _ordinary(covariance: NDArray, n_lags: int) -> NDArray[np.bool_]:
    """Windows whose variance, and whose correlation of neighbours, is like that of most."""
    keep = np.ones(len(covariance), bool)
    near = covariance[:, 1 : 1 + n_lags].sum(axis=1) / covariance[:, 0]
    for value in (covariance[:, 0], near):
        middle = np.median(value)
        spread = 1.4826 * np.median(np.abs(value - middle))
        keep &= np.abs(value - middle) <= 4 * spread + 1e-6 * abs(middle)
    return keep


def _psf_autocorrelation(psf: NDArray | None, lags: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of the PSF at these lags, 1 at zero; zeros without a PSF."""
    if psf is None:
        return np.zeros(len(lags))
    reach = int(np.abs(lags).max())
    stamp = np.pad(np.asarray(psf, np.float64), reach)
    inner = stamp[reach:-reach, reach:-reach]
    height, width = inner.shape
    products = [
        np.sum(inner * stamp[reach + dy : reach + dy + height, reach + dx : reach + dx + width]) for dy, dx in lags
    ]
    return np.array(products) / np.sum(inner**2)


def _no_noise(tail: NDArray, far: NDArray[np.int64], psf: NDArray | None, error: float) -> tuple[float, float]:
    """Level of the correlation at far lags, and the share of faint sources where it is significant."""
    outer = np.abs(far).max(axis=1) > np.abs(far).max() - 3
    plateau = float(tail[outer].mean())
    if psf is None:
        return plateau, 0.0
    terms = np.column_stack([_psf_autocorrelation(psf, far), np.ones(len(far))])
    covariance = np.linalg.pinv(terms.T @ terms)
    share, level = covariance @ terms.T @ tail
    # Wide sources look like an uneven sky, sharp ones hide behind the noise of neighbours: what cannot be told for sure
    # is left to the noise.
    sure = SURE * error * np.sqrt(covariance[0, 0]) < share < 0.5
    share = share if sure else 0.0
    return (float(level), float(share)) if share > 0 else (plateau, 0.0)


@njit(cache=True, nogil=True)
def _lag_sums(plane, bad, rms, corners, lags):  # type: ignore[no-untyped-def]
    """Per window and lag, the sum of products of blank pixels (window mean subtracted) and their number."""
    side = WINDOW + 2 * MARGIN
    sums, counts = np.zeros((len(corners), len(lags))), np.zeros((len(corners), len(lags)))
    value, good = np.empty((side, side), np.float32), np.empty((side, side), np.bool_)
    smooth, rows = np.empty_like(value), np.empty_like(value)
    # Rows end in zeros, so that a lag is an offset in one long row; which pixels are blank is a bit in one word a row.
    stride = WINDOW + int(np.abs(lags).max())
    inner = np.zeros(WINDOW * stride, np.float32)
    blank = np.empty(WINDOW, np.uint64)
    for w in range(len(corners)):
        y0, x0 = corners[w, 0] - MARGIN, corners[w, 1] - MARGIN
        for y in range(side):
            for x in range(side):
                sigma = rms[y0 + y, x0 + x] if rms.size > 1 else rms[0, 0]
                v = plane[y0 + y, x0 + x] / sigma
                masked = bad.size > 0 and bad[y0 + y, x0 + x]
                good[y, x] = not masked and np.isfinite(v)
                value[y, x] = v if good[y, x] else np.float32(0.0)
        _smooth(value, rows, smooth)
        _leave_out(value, good)
        _leave_out(smooth, good)
        n, total = 0, 0.0
        for y in range(WINDOW):
            for x in range(WINDOW):
                if good[MARGIN + y, MARGIN + x]:
                    n += 1
                    total += value[MARGIN + y, MARGIN + x]
        mean = np.float32(total / n) if n else np.float32(0.0)
        for y in range(WINDOW):
            word = np.uint64(0)
            for x in range(WINDOW):
                seen = good[MARGIN + y, MARGIN + x]
                word |= np.uint64(seen) << np.uint64(x)
                inner[y * stride + x] = value[MARGIN + y, MARGIN + x] - mean if seen else np.float32(0.0)
            blank[y] = word
        for k in range(len(lags)):
            dy, dx = lags[k, 0], lags[k, 1]
            sums[w, k] = _product(inner, dy * stride + dx)
            counts[w, k] = _count(blank, dy, dx)
    return sums, counts


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _product(row, offset):  # type: ignore[no-untyped-def]
    farther = row[offset:]
    total = np.float32(0.0)
    for i in range(farther.size):
        total += row[i] * farther[i]
    return total


@njit(cache=True, nogil=True)
def _count(words, dy, dx):  # type: ignore[no-untyped-def]
    """Pairs of set bits: bit x of word y and bit x + dx of word y + dy."""
    pairs = np.uint64(0)
    for y in range(words.size - dy):
        other = words[y + dy]
        both = words[y] & (other >> np.uint64(dx) if dx >= 0 else other << np.uint64(-dx))
        # Bits set in a word: sums of pairs, of fours, of bytes, of all.
        both -= (both >> np.uint64(1)) & np.uint64(0x5555555555555555)
        both = (both & np.uint64(0x3333333333333333)) + ((both >> np.uint64(2)) & np.uint64(0x3333333333333333))
        both = (both + (both >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        pairs += (both * np.uint64(0x0101010101010101)) >> np.uint64(56)
    return pairs


@njit(cache=True, nogil=True)
def _smooth(plane, rows, out):  # type: ignore[no-untyped-def]
    """Binomial smoothing over 5 pixels each way; the outermost two rows and columns stay 0."""
    ny, nx = plane.shape
    a, b, c = np.float32(1 / 16), np.float32(4 / 16), np.float32(6 / 16)
    rows[:] = np.float32(0.0)
    out[:] = np.float32(0.0)
    for y in range(ny):
        for x in range(2, nx - 2):
            rows[y, x] = (
                a * (plane[y, x - 2] + plane[y, x + 2]) + b * (plane[y, x - 1] + plane[y, x + 1]) + c * plane[y, x]
            )
    for y in range(2, ny - 2):
        for x in range(nx):
            out[y, x] = a * (rows[y - 2, x] + rows[y + 2, x]) + b * (rows[y - 1, x] + rows[y + 1, x]) + c * rows[y, x]


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _leave_out(plane, good):  # type: ignore[no-untyped-def]
    """Mark pixels beyond `CLIP` sigma, and those around them, as not good; sigma is that of the rest."""
    ny, nx = plane.shape
    # Mean |v| of a Gaussian is 0.798 sigma, of one that is cut at 2.5 sigma 0.772 sigma.
    sigma, limit = np.float32(0.0), np.float32(np.inf)
    for step in range(5):
        n, total = 0, np.float32(0.0)
        for y in range(2, ny - 2, 2):
            for x in range(2, nx - 2):
                a = abs(plane[y, x])
                known = good[y, x] and a < limit
                n += known
                total += a if known else np.float32(0.0)
        if n == 0:
            return
        sigma = total / np.float32(n) / np.float32(0.7979 if step == 0 else 0.7724)
        limit = np.float32(2.5) * sigma
    limit = np.float32(CLIP) * sigma
    for y in range(ny):
        for x in range(nx):
            if abs(plane[y, x]) > limit:
                for v in range(max(y - GROW, 0), min(y + GROW + 1, ny)):
                    for u in range(max(x - GROW, 0), min(x + GROW + 1, nx)):
                        good[v, u] = False


@njit(cache=True, nogil=True)
def _kernel_covariance(places, jacobian, lags, table_x, table_y):  # type: ignore[no-untyped-def]
    """Sum over places of the overlap of the weights there and those a lag farther."""
    out = np.zeros(len(lags))
    for k in range(len(lags)):
        dy, dx = lags[k, 0], lags[k, 1]
        for n in range(len(places)):
            x, y = places[n, 0], places[n, 1]
            step_x = jacobian[n, 0, 0] * dx + jacobian[n, 0, 1] * dy
            step_y = jacobian[n, 1, 0] * dx + jacobian[n, 1, 1] * dy
            out[k] += _overlap(table_x, x, x + step_x) * _overlap(table_y, y, y + step_y)
    return out


@njit(cache=True, nogil=True)
def _overlap(table, a, b):  # type: ignore[no-untyped-def]
    """Σ_k w(k - a) w(k - b)."""
    phases, taps = table.shape[0] - 1, table.shape[1]
    i, j = int(np.floor(a)), int(np.floor(b))
    p, q = int((a - i) * phases + 0.5), int((b - j) * phases + 0.5)
    total = 0.0
    for t in range(max(0, j - i), min(taps, taps + j - i)):
        total += table[p, t] * table[q, t - (j - i)]
    return total
