"""Stars to align by: well-exposed, isolated, unsaturated, with centroids and what these are good to.

A few hundred bright stars are all that an alignment needs, so nothing is segmented: pixels that stand high above a
rough sky and above their neighbours are stars, or soon found not to be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.ndimage import median_filter
from scipy.spatial import cKDTree

__all__ = ["MAX_STARS", "Sky", "Stars", "detect_stars", "match_stars", "rough_sky"]

#: Brightest stars of each image that are compared; more add time, not accuracy, and chance matches in crowded fields.
MAX_STARS = 1000
#: With so many stars nothing else is looked at.
ENOUGH_STARS = 20
#: Side of the cells of the rough sky, in pixels, and every how many pixels it is looked at.
CELL, SAMPLE = 64, 6
#: A peak has so many pixels of its 3 × 3 beyond so many sigma: a particle's hit has fewer.
PEAK_SIGMA, PEAK_PIXELS = 5.0, 5
#: Half the width of the square in which a peak is the highest.
PEAK_REACH = 2
#: Half the width of the square in which a star is measured, at most.
LARGEST_REACH = 64


@dataclass(frozen=True)
class Stars:
    """Stars for registration, the brightest first. All arrays ``(n,)`` float64.

    Attributes
    ----------
    x, y : windowed centroids, pixels
    sigma : 1-sigma noise of x and of y each, pixels
    flux : electrons
    fwhm : pixels, of the Gaussian with the star's second moments under that Gaussian
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    sigma: NDArray[np.float64]
    flux: NDArray[np.float64]
    fwhm: NDArray[np.float64]

    def __len__(self) -> int:
        return self.x.size

    def __getitem__(self, index: NDArray | slice) -> Stars:
        return Stars(self.x[index], self.y[index], self.sigma[index], self.flux[index], self.fwhm[index])

    @property
    def xy(self) -> NDArray[np.float64]:
        """(n, 2)."""
        return np.column_stack([self.x, self.y])


@dataclass(frozen=True)
class Sky:
    """A rough sky: level and noise of cells of `CELL` × `CELL` pixels, ``(n_y, n_x)`` float32."""

    level: NDArray[np.float32]
    rms: NDArray[np.float32]


def rough_sky(data: NDArray[np.float32], mask: NDArray[np.uint8]) -> Sky:
    """Medians and scaled median deviations of some 110 pixels of each cell; of the neighbours where it has too few.

    Parameters
    ----------
    data : ndarray (ny, nx) float32
    mask : ndarray (ny, nx) uint8
        Non-zero is bad.
    """
    level, rms = _cells(data, mask)
    known = np.isfinite(level)
    if not known.any():
        return Sky(np.zeros_like(level), np.ones_like(level))
    level[~known], rms[~known] = np.median(level[known]), np.median(rms[known])
    # A simulated image without noise has no sigma to count in: any small number will do.
    least = max(0.1 * float(np.median(rms)), 1e-3)
    return Sky(median_filter(level, 3, mode="nearest"), np.maximum(median_filter(rms, 3, mode="nearest"), least))


def detect_stars(
    data: NDArray[np.float32],
    mask: NDArray | None = None,
    saturation: float = np.inf,
    *,
    sky: Sky | None = None,
) -> Stars:
    """Well-exposed, isolated, unsaturated point sources.

    Parameters
    ----------
    data : ndarray (ny, nx) float32
        Electrons, sky included or not.
    mask : ndarray (ny, nx) or None
        Non-zero where bad; a star with a bad pixel within its half-light radius is left out.
    saturation : float
        Electrons, in the same terms as `data`.
    sky : Sky, optional
        As of `rough_sky`; measured where not given.

    Returns
    -------
    Stars
        At most 2 `MAX_STARS`.

    Notes
    -----
    Centroids and widths are those of the Gaussian that has, under itself as the window, the moments of the star
    (Bernstein & Jarvis 2002, AJ 123, 583; round ones here). The noise of a centroid with a Gaussian window of the
    star's own width s is, for a Gaussian star of flux F on sky noise σ, ``8π s⁴ σ² / F² + (16/9) s² / F`` per
    coordinate, squared.
    """
    data = np.ascontiguousarray(data, np.float32)
    bad = np.zeros(data.shape, np.uint8) if mask is None else np.ascontiguousarray(mask).astype(np.uint8, copy=False)
    sky = sky or rough_sky(data, bad)
    ys, xs, light = _peaks(data, bad, sky.level, sky.rms)
    order = np.argsort(-light, kind="stable")
    ys, xs, light = ys[order], xs[order], light[order]
    first = 4 * MAX_STARS
    x, y, width, flux, good = _moments(data, bad, sky.level, xs[:first], ys[:first])
    if not good.any():
        return Stars(*np.empty((5, 0)))
    typical = float(np.median(width[good][:200]))
    good &= _isolated(data, sky.level, sky.rms, xs, ys, light, 2.5 * 2.3548 * typical)[:first]
    ys, xs = ys[:first], xs[:first]

    rms = sky.rms[ys // CELL, xs // CELL]
    snr = flux / (rms * 2 * np.sqrt(np.pi) * width)
    half_light = 1.1774 * width
    good &= (np.hypot(x - xs, y - ys) < np.maximum(half_light, 1.5)) & (snr > 5) & (data[ys, xs] < 0.9 * saturation)
    good[good] = ~_near_masked(bad, x[good], y[good], half_light[good])
    # The stellar locus: the brightest good ones are stars; much sharper is a particle hit, much wider a galaxy.
    bright = np.nonzero(good & (snr > 20))[0][:50]
    bright = bright if bright.size >= 5 else np.nonzero(good)[0][:50]
    if bright.size:
        locus = np.median(width[bright])
        good &= width > 0.6 * locus
        compact = good & (width < 1.6 * locus)
        # In a field with hardly a star, galaxies are better than nothing.
        good = compact if compact.sum() >= ENOUGH_STARS else good
    with np.errstate(divide="ignore", invalid="ignore"):
        sigma = np.sqrt(8 * np.pi * width**4 * rms**2 / flux**2 + 16 / 9 * width**2 / flux)
    stars = Stars(x, y, sigma, flux, 2.3548 * width)[good]
    return stars[np.argsort(-stars.flux, kind="stable")][: 2 * MAX_STARS]


def match_stars(
    xy_new: NDArray[np.float64], xy_ref: NDArray[np.float64], radius: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of stars that are each other's nearest within `radius`; inputs (n, 2)."""
    if len(xy_new) == 0 or len(xy_ref) == 0:
        return np.empty(0, np.intp), np.empty(0, np.intp)
    distance, j = cKDTree(xy_ref).query(xy_new, distance_upper_bound=radius)
    _, i = cKDTree(xy_new).query(xy_ref)
    mine = np.nonzero(np.isfinite(distance))[0]
    mine = mine[i[j[mine]] == mine]
    return mine, j[mine]


def _near_masked(bad: NDArray[np.uint8], x: NDArray, y: NDArray, radius: NDArray) -> NDArray[np.bool_]:
    """Any bad pixel in the square of half-width `radius` around (x, y)."""
    low_x, high_x = (np.maximum(np.round(x + side * radius), 0).astype(int) for side in (-1, 1))
    low_y, high_y = (np.maximum(np.round(y + side * radius), 0).astype(int) for side in (-1, 1))
    boxes = zip(low_y, high_y, low_x, high_x, strict=True)
    return np.array([bad[y0 : y1 + 1, x0 : x1 + 1].any() for y0, y1, x0, x1 in boxes], bool)


def _isolated(
    data: NDArray, level: NDArray, rms: NDArray, x: NDArray, y: NDArray, light: NDArray, radius: float
) -> NDArray[np.bool_]:
    """No neighbour within `radius` that has more than a twentieth of the star's light.

    The noise makes several peaks of one wide star: between those there is no valley that goes deeper than noise does.
    The brightest of them is the star, the others are none.
    """
    alone = np.ones(x.size, bool)
    pairs = cKDTree(np.column_stack([x, y])).query_pairs(radius, output_type="ndarray")
    if pairs.size == 0:
        return alone
    brighter, fainter = np.sort(pairs, axis=1).T  # indices are in the order of light
    order = np.lexsort([fainter, brighter])
    _set_apart(data, level, rms, x, y, light, brighter[order], fainter[order], alone)
    return alone


@njit(cache=True, nogil=True)
def _cells(data, mask):  # type: ignore[no-untyped-def]
    """Median and 1.4826 times the median deviation of each cell; NaN with fewer than 20 good samples."""
    ny, nx = data.shape
    n_y, n_x = max(1, -(-ny // CELL)), max(1, -(-nx // CELL))
    level, rms = np.full((n_y, n_x), np.nan, np.float32), np.full((n_y, n_x), np.nan, np.float32)
    samples = np.empty((CELL // SAMPLE + 1) ** 2, np.float32)
    for j in range(n_y):
        for i in range(n_x):
            n = 0
            for y in range(j * CELL + SAMPLE // 2, min((j + 1) * CELL, ny), SAMPLE):
                # The columns move from row to row: what repeats along columns or rows is not met again and again.
                for x in range(i * CELL + (y // SAMPLE) % SAMPLE, min((i + 1) * CELL, nx), SAMPLE):
                    v = data[y, x]
                    if mask[y, x] == 0 and np.isfinite(v):
                        samples[n] = v
                        n += 1
            if n >= 20:
                found = samples[:n]
                middle = np.median(found)
                level[j, i] = middle
                rms[j, i] = 1.4826 * np.median(np.abs(found - middle))
    return level, rms


@njit(cache=True, nogil=True)
def _peaks(data, mask, level, rms):  # type: ignore[no-untyped-def]
    """Pixels above threshold that are the highest around, with the light of their 3 × 3 above the sky."""
    ny, nx = data.shape
    ys, xs, light = [0 for _ in range(0)], [0 for _ in range(0)], [np.float32(0) for _ in range(0)]
    for y in range(PEAK_REACH, ny - PEAK_REACH):
        j = y // CELL
        for i in range(level.shape[1]):
            limit = level[j, i] + np.float32(PEAK_SIGMA) * rms[j, i]
            row = data[y]
            for x in range(max(i * CELL, PEAK_REACH), min((i + 1) * CELL, nx - PEAK_REACH)):
                v = row[x]
                # Of each pair of neighbours, one comparison settles most.
                if not v > limit or v < row[x - 1] or v <= row[x + 1] or mask[y, x] != 0:
                    continue
                highest = True
                for b in range(-PEAK_REACH, PEAK_REACH + 1):
                    for a in range(-PEAK_REACH, PEAK_REACH + 1):
                        w = data[y + b, x + a]
                        # Of equals, the first is the peak.
                        if w > v or (w == v and (b < 0 or (b == 0 and a < 0))):
                            highest = highest and mask[y + b, x + a] != 0
                if not highest:
                    continue
                above, total = 0, np.float32(0.0)
                for b in range(-1, 2):
                    for a in range(-1, 2):
                        w = data[y + b, x + a]
                        above += w > limit
                        total += w - level[j, i]
                if above >= PEAK_PIXELS and np.isfinite(total):
                    ys.append(y)
                    xs.append(x)
                    light.append(total)
    return np.array(ys), np.array(xs), np.array(light)


@njit(cache=True, nogil=True)
def _sky_at(level, x, y):  # type: ignore[no-untyped-def]
    """Bilinear between the middles of cells."""
    n_y, n_x = level.shape
    u = min(max((x + 0.5) / CELL - 0.5, 0.0), n_x - 1.0)
    v = min(max((y + 0.5) / CELL - 0.5, 0.0), n_y - 1.0)
    i, j = min(int(u), max(n_x - 2, 0)), min(int(v), max(n_y - 2, 0))
    i2, j2 = min(i + 1, n_x - 1), min(j + 1, n_y - 1)
    a, b = u - i, v - j
    return (1 - b) * ((1 - a) * level[j, i] + a * level[j, i2]) + b * ((1 - a) * level[j2, i] + a * level[j2, i2])


@njit(cache=True, nogil=True)
def _moments(data, mask, level, xs, ys):  # type: ignore[no-untyped-def]
    """Centroid, width (sigma), flux and success of the Gaussian that fits each peak, by adaptive moments."""
    ny, nx = data.shape
    n = xs.size
    x_out, y_out = xs.astype(np.float64), ys.astype(np.float64)
    width, flux, good = np.ones(n), np.zeros(n), np.zeros(n, np.bool_)
    side = 2 * LARGEST_REACH + 1
    stamp, window = np.empty((side, side)), np.empty((4, side))
    for k in range(n):
        # Everything is relative to the peak. The stamp is filled as far as it is needed, and again when that grows.
        sky = _sky_at(level, xs[k], ys[k])
        x, y, s, filled = 0.0, 0.0, 1.5, -1
        for _ in range(40):
            reach = min(int(np.ceil(4 * s + max(abs(x), abs(y)))), LARGEST_REACH)
            if xs[k] < reach or ys[k] < reach or xs[k] + reach >= nx or ys[k] + reach >= ny:
                break
            if reach > filled:
                filled = min(reach + 2, LARGEST_REACH, xs[k], ys[k], nx - 1 - xs[k], ny - 1 - ys[k])
                for j in range(2 * filled + 1):
                    for i in range(2 * filled + 1):
                        v, u = ys[k] - filled + j, xs[k] - filled + i
                        stamp[j, i] = data[v, u] - sky if mask[v, u] == 0 else 0.0
            total, along_x, along_y, square = _weighted_sums(stamp, filled, reach, x, y, s, window)
            if not total > 0:
                break
            # A Gaussian under a window of its own width has half its variance, and moves by half.
            moment = square / total / 2 - (along_x**2 + along_y**2) / total**2 / 2
            rest = 1 / moment - 1 / (s * s) if moment > 0 else -1.0
            wider = 1 / np.sqrt(rest) if rest > 0 else 1.5 * s
            wider = min(max(wider, 0.6 * s, 0.5), 1.6 * s)
            step_x, step_y = 2 * along_x / total, 2 * along_y / total
            settled = abs(step_x) < 3e-4 and abs(step_y) < 3e-4 and abs(wider - s) < 2e-3 * s
            x, y, s = x + step_x, y + step_y, wider
            flux[k] = 2 * total
            if settled:
                good[k] = True
                break
            if abs(x) > 2 + s or abs(y) > 2 + s or s > 15:
                break
        x_out[k], y_out[k], width[k] = xs[k] + x, ys[k] + y, s
    return x_out, y_out, width, flux, good


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"}, forceinline=True)
def _weighted_sums(stamp, middle, reach, x, y, s, window):  # type: ignore[no-untyped-def]
    """Sums of the pixels under a Gaussian at (x, y) of width s: of themselves, times dx, times dy, times dx² + dy²."""
    n = 2 * reach + 1
    wx, wx_x, wx_xx, wy = window[0, :n], window[1, :n], window[2, :n], window[3, :n]
    for i in range(n):
        dx, dy = i - reach - x, i - reach - y
        wx[i], wy[i] = np.exp(-dx * dx / (2 * s * s)), np.exp(-dy * dy / (2 * s * s))
        wx_x[i], wx_xx[i] = wx[i] * dx, wx[i] * dx * dx
    total, along_x, along_y, square = 0.0, 0.0, 0.0, 0.0
    for j in range(n):
        pixels = stamp[middle - reach + j, middle - reach : middle + reach + 1]
        row, row_x, row_xx = 0.0, 0.0, 0.0
        for i in range(n):
            row += wx[i] * pixels[i]
            row_x += wx_x[i] * pixels[i]
            row_xx += wx_xx[i] * pixels[i]
        dy = j - reach - y
        total += wy[j] * row
        along_x += wy[j] * row_x
        along_y += wy[j] * row * dy
        square += wy[j] * (row_xx + row * dy * dy)
    return total, along_x, along_y, square


@njit(cache=True, nogil=True)
def _set_apart(data, level, rms, xs, ys, light, brighter, fainter, alone):  # type: ignore[no-untyped-def]
    """Clear `alone` for peaks with a neighbour and for peaks that are none; pairs in the order of the brighter."""
    n_same = np.zeros(xs.size, np.bool_)
    for p in range(brighter.size):
        i, j = brighter[p], fainter[p]
        if n_same[i] or n_same[j]:
            continue
        # Three by three pixels along the way, against those of the fainter peak.
        steps = max(abs(xs[j] - xs[i]), abs(ys[j] - ys[i]))
        sky, sigma = _sky_at(level, xs[j], ys[j]), rms[ys[j] // CELL, xs[j] // CELL]
        lowest = np.inf
        for step in range(1, steps):
            x = xs[i] + int(np.rint((xs[j] - xs[i]) * step / steps))
            y = ys[i] + int(np.rint((ys[j] - ys[i]) * step / steps))
            total = 0.0
            for b in range(-1, 2):
                for a in range(-1, 2):
                    total += data[y + b, x + a] - sky
            lowest = min(lowest, total)
        if light[j] - lowest < 3 * 3 * sigma:
            n_same[j] = True
            alone[j] = False
        elif light[j] > 0.05 * light[i]:
            alone[i] = False
            alone[j] = False
        else:
            alone[j] = False
