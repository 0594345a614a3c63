"""Which sources are stars fit to measure the PSF from.

The choice decides more than the algebra that follows. There is no absolute cut in roundness: stars may be elongated,
and differently so across the image. What stars have in common is that, place by place, they all look alike; so the
shape of the brighter sources is followed over the image, and what strays from it is not a star (galaxies and blends
are larger, particle hits smaller, saturated stars flatter).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from batchproc.config import PsfConfig
from batchproc.imaging.moments import fwhm_of, measure_moments
from batchproc.imaging.polynomial import Frame, n_terms
from batchproc.imaging.starpeaks import find_peaks, plain

__all__ = ["SOURCE", "Stars", "find_stars", "log_shape"]

#: Columns of `Stars.table`.
STAR = np.dtype([(name, "f8") for name in ("x", "y", "xx", "yy", "xy", "flux", "snr", "fwhm", "peak")])
#: Columns of `Stars.sources`.
SOURCE = np.dtype([(name, "f8") for name in ("x", "y", "flux", "fwhm")])

#: Pixels above this fraction of the saturation level may be non-linear already.
_SATURATION_MARGIN = 0.8
#: Sharper than this along either axis (FWHM, pixels) is a hot pixel or a particle track, not light through optics.
_SHARPEST_FWHM = 1.3
#: Light of neighbours in the middle of a star, as a fraction of its own peak, that is let through; the next value
#: is tried where fewer stars than `PsfConfig.min_stars_varying` pass.
_CONTAMINATION = (0.01, 0.03, 0.1)
#: A cell of the image takes stars below twice ``snr_min`` only up to this number in all.
_FAINT_PER_CELL = 6
#: Shapes are measured of so many sources for each star that may be used, the brightest of each cell.
_CANDIDATES_PER_STAR = 2.5
#: Of so many sources, to learn how wide stars are before the others are measured.
_FIRST = 60
#: Two peaks whose moments end within so many pixels of each other are of one source.
_SAME_PIX = 1.0
#: Moments good to this part of themselves are good enough to choose by.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Stars:
    """Stars that may serve to measure the PSF.

    Attributes
    ----------
    table : structured ndarray (n,)
        ``x, y`` (pixels), ``xx, yy, xy`` (pixels², `measure_moments`), ``flux``, ``snr``, ``fwhm`` (pixels), ``peak``
        (highest pixel); the best first.
    sources : structured ndarray (m,) of dtype `SOURCE`
        Sources of any kind above the detection threshold, by rows: ``x, y`` (pixels), ``flux`` (as if they were stars,
        where nothing better is known), ``fwhm`` (pixels): tells what is around a star.
    """

    table: NDArray[np.void]
    sources: NDArray[np.void]

    def __len__(self) -> int:
        return len(self.table)

    @property
    def n_detected(self) -> int:
        """Sources of any kind above the detection threshold."""
        return len(self.sources)

    @property
    def x(self) -> NDArray[np.float64]:
        """Position in pixels."""
        return np.array(self.table["x"])

    @property
    def y(self) -> NDArray[np.float64]:
        """Position in pixels."""
        return np.array(self.table["y"])


def find_stars(
    data: NDArray[np.floating],
    rms: NDArray[np.floating],
    mask: NDArray[np.integer] | None,
    *,
    saturation: float = float("inf"),
    config: PsfConfig | None = None,
) -> Stars:
    """Bright, unsaturated, isolated, point-like sources, well spread over the image.

    The image is read once, for its peaks; the rest costs as many sources as may be needed, not as there are.

    Parameters
    ----------
    data : ndarray (ny, nx)
        Background-subtracted image.
    rms : ndarray (ny, nx)
        Sky noise of a pixel, in the units of `data`.
    mask : ndarray (ny, nx) or None
        Non-zero is bad.
    saturation : float
        Level above the sky, in the units of `data`, at which pixels saturate.
    config : PsfConfig
        ``snr_min``, ``max_stars``, ``min_stars_varying``.

    Returns
    -------
    Stars
        Possibly none at all; it is for the caller to say how many are enough.
    """
    config = config or PsfConfig()
    image, noise = plain(data, np.float32), plain(rms, np.float32)
    bad = bad_pixels(image, mask)
    peaks = find_peaks(image, noise, bad)
    rows = _candidates(peaks, image, saturation, config)
    table, sources = _measure(peaks, rows, image, noise, bad)

    clean = np.flatnonzero(_clean(table, image.shape, bad, saturation, config))
    alike = clean[_alike(table[clean], Frame.of_image(image.shape), config)]
    worst = _contamination(table[alike], rows[alike], sources)
    stars = alike
    for limit in _CONTAMINATION:
        stars = alike[worst < limit]
        if len(stars) >= config.min_stars_varying:
            break
    return Stars(_spread(table[stars], image.shape, config), sources)


def bad_pixels(image: NDArray[np.floating], mask: NDArray[np.integer] | None) -> NDArray[np.bool_] | None:
    """Pixels that are masked or not finite; None where there are none."""
    finite = np.isfinite(image)
    bad = ~finite if not finite.all() else None
    if mask is not None:
        masked = np.asarray(mask) != 0
        if masked.any():
            bad = masked if bad is None else bad | masked
    return bad


def log_shape(table: NDArray[np.void]) -> NDArray[np.float64]:
    """Matrix logarithm of the covariance, as (n, 3): half its trace, half the difference of its diagonal, off-diagonal.

    A polynomial through these numbers always is a valid shape again, and relative changes count alike.
    """
    mean, half = (table["xx"] + table["yy"]) / 2, (table["xx"] - table["yy"]) / 2
    radius = np.hypot(half, table["xy"])
    largest, smallest = np.log(mean + radius), np.log(np.maximum(mean - radius, 1e-6))
    stretch = (largest - smallest) / 2 / np.maximum(radius, 1e-12)
    return np.stack([(largest + smallest) / 2, stretch * half, stretch * table["xy"]], axis=-1)


def _candidates(
    peaks: NDArray[np.void], image: NDArray[np.float32], saturation: float, config: PsfConfig
) -> NDArray[np.int64]:
    """Rows of the peaks to measure: neither saturated nor single pixels, the brightest of each cell of a grid."""
    rows = np.flatnonzero((peaks["peak"] < _SATURATION_MARGIN * saturation) & (peaks["peak"] > 0))
    x, y = peaks["x"][rows], peaks["y"][rows]
    ny, nx = image.shape
    inside = (x > 1) & (y > 1) & (x < nx - 2) & (y < ny - 2)
    rows, x, y = rows[inside], x[inside], y[inside]
    # Of a Gaussian of the least width, the pixels next to the peak hold this part of it; half is let through.
    least = 0.5 * np.exp(-4 * np.log(2) / _SHARPEST_FWHM**2)
    with np.errstate(invalid="ignore"):
        beside = (image[y, x - 1] + image[y, x + 1] + image[y - 1, x] + image[y + 1, x]) / 4
        rows = rows[beside > least * image[y, x]]
    rows = rows[np.argsort(-peaks["snr"][rows], kind="stable")]
    rank = _rank_in_cell(peaks["x"][rows], peaks["y"][rows], image.shape)
    most = int(_CANDIDATES_PER_STAR * config.max_stars)
    return np.sort(rows[np.argsort(rank, kind="stable")[:most]])


def _measure(
    peaks: NDArray[np.void],
    rows: NDArray[np.int64],
    image: NDArray[np.float32],
    rms: NDArray[np.float32],
    bad: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """Table of the candidates (those without usable moments have ``snr`` 0), and of all sources."""
    table = np.zeros(len(rows), dtype=STAR)
    sources = np.zeros(len(peaks), dtype=SOURCE)
    for name in ("x", "y"):
        sources[name] = peaks[name]
    sources["flux"] = peaks["light"]
    if not len(rows):
        sources["fwhm"] = 3.0
        return table, sources
    x, y = peaks["x"][rows], peaks["y"][rows]
    first = np.argsort(-peaks["snr"][rows], kind="stable")[:_FIRST]
    known = measure_moments(image, x[first], y[first], fwhm=3.0, bad=bad, tolerance=0.03)
    width = float(np.median(fwhm_of(known[known["ok"]]))) if known["ok"].any() else 3.0
    moments = measure_moments(image, x, y, fwhm=max(1.5, width), bad=bad, tolerance=_TOLERANCE)
    for name in ("x", "y", "xx", "yy", "xy", "flux"):
        table[name] = moments[name]
    table["peak"] = peaks["peak"][rows]
    table["fwhm"] = fwhm_of(moments)
    # Noise of the flux under a Gaussian weight: sigma sqrt(4 pi sigma_x sigma_y), and the star's own photons.
    area = 4 * np.pi * (table["fwhm"] / 2.3548) ** 2
    ok = moments["ok"] & (table["flux"] > 0) & (area > 0)
    sky = rms[y, x]
    table["snr"][ok] = table["flux"][ok] / np.sqrt(sky[ok] ** 2 * area[ok] + table["flux"][ok])
    if ok.any():
        width = float(np.median(table["fwhm"][ok]))
        sources["flux"] *= max(1.0, float(np.median(table["flux"][ok] / peaks["light"][rows[ok]])))
    sources["fwhm"] = width
    for name in ("x", "y", "flux", "fwhm"):
        sources[name][rows[ok]] = table[name][ok]
    table["snr"][_told_before(table, ok)] = 0.0
    return table, sources


def _told_before(table: NDArray[np.void], ok: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows whose moments have found the source of a higher peak: several peaks of one galaxy must not look alike."""
    rows = np.flatnonzero(ok)
    if len(rows) < 2:
        return rows[:0]
    pairs = cKDTree(np.c_[table["x"][rows], table["y"][rows]]).query_pairs(_SAME_PIX, output_type="ndarray")
    first, second = rows[pairs[:, 0]], rows[pairs[:, 1]]
    return np.unique(np.where(table["peak"][first] >= table["peak"][second], second, first))


def _clean(
    table: NDArray[np.void],
    shape: tuple[int, ...],
    bad: NDArray[np.bool_] | None,
    saturation: float,
    config: PsfConfig,
) -> NDArray[np.bool_]:
    """Bright enough, not saturated, not as sharp as a particle hit, inside the image, no bad pixel in the core."""
    good: NDArray[np.bool_] = (table["snr"] >= config.snr_min) & (table["peak"] < _SATURATION_MARGIN * saturation)
    mean, half = (table["xx"] + table["yy"]) / 2, (table["xx"] - table["yy"]) / 2
    minor = mean - np.hypot(half, table["xy"])
    good &= minor > (_SHARPEST_FWHM / 2.3548) ** 2
    ny, nx = shape
    margin = 1.5 * table["fwhm"]
    good &= (table["x"] > margin) & (table["x"] < nx - 1 - margin)
    good &= (table["y"] > margin) & (table["y"] < ny - 1 - margin)
    if good.any() and bad is not None:
        rows = np.flatnonzero(good)
        major = np.sqrt((mean + np.hypot(half, table["xy"]))[rows])
        good[rows] = _clear_of(bad, table["x"][rows], table["y"][rows], 2.5 * major)
    return good


@njit(cache=True)
def _clear_of(bad, xs, ys, radii):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """No bad pixel within the radius."""
    ny, nx = bad.shape
    clear = np.ones(xs.size, dtype=np.bool_)
    for n in range(xs.size):
        x, y, r = xs[n], ys[n], radii[n]
        for j in range(max(0, int(y - r)), min(ny, int(y + r) + 2)):
            for i in range(max(0, int(x - r)), min(nx, int(x + r) + 2)):
                if bad[j, i] and (i - x) ** 2 + (j - y) ** 2 <= r * r:
                    clear[n] = False
    return clear


def _alike(table: NDArray[np.void], frame: Frame, config: PsfConfig) -> NDArray[np.bool_]:
    """Sources whose shape is that of the stars at their place.

    The stars' shape is a polynomial in (x, y) through a ridge of the brighter sources. Several are tried: one begun
    wide, at the most common size (a PSF that varies much), and some begun narrow, at each of the sizes that bright
    sources share (few stars among many galaxies). Stars are alike and bright, galaxies are neither: the ridge that
    gathers most light of the least spread is theirs.
    """
    if len(table) < 4:
        return _near_smallest(table)
    shape = log_shape(table)
    # Error of a logarithm of a second moment, and of what is measured through noise.
    error = 2.5 / table["snr"]
    bright = np.argsort(-table["snr"], kind="stable")[: max(60, min(400, len(table) // 2))]
    size, light = shape[bright, 0], np.sqrt(table["snr"][bright])
    starts: list[tuple[float, tuple[float, ...]]] = [
        (_modes(size, np.ones(len(size)), 0.08, 1)[0], (0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05))
    ]
    starts += [(mode, (0.06, 0.05)) for mode in _modes(size, light, 0.03, 4)]
    ridges = [_ridge(table, shape, error, bright, frame, *start) for start in starts]
    expected, spread, _ = max(ridges, key=lambda ridge: ridge[2])
    limit = 4.0 * np.hypot(spread, error)
    return _distance(shape, expected) < np.minimum(limit, 0.25)  # type: ignore[no-any-return]


def _ridge(
    table: NDArray[np.void],
    shape: NDArray[np.float64],
    error: NDArray[np.float64],
    bright: NDArray[np.integer],
    frame: Frame,
    start: float,
    widths: tuple[float, ...],
) -> tuple[NDArray[np.float64], float, float]:
    """A redescending fit, narrowed step by step while the polynomial gains terms.

    Returns the expected shape at each source's place, the spread of the sources about it, and how much light of how
    little spread it has gathered.
    """
    size = shape[bright, 0]
    near = np.abs(size - start) < 0.6 * widths[0]
    guess = np.array([start, *np.median(shape[bright][near if near.any() else slice(None), 1:], axis=0)])
    expected = np.broadcast_to(guess, shape.shape)
    spread, gathered = widths[0], 0.0
    for width in (*widths, 0.0, 0.0, 0.0):
        away = _distance(shape, expected)
        if width == 0.0:
            inside = bright[away[bright] < 4 * np.hypot(spread, error[bright])]
            if inside.size < 4:
                break
            spread = max(0.01, 1.2 * float(np.median(away[inside])) / 1.5382)  # median of chi with 3 d.o.f.
            gathered = float(np.sum(np.sqrt(table["snr"][inside]))) / (spread + 0.01)
        scale = np.hypot(spread if width == 0.0 else width, error)
        z = away[bright] / scale[bright]
        weight = np.where(z < 4.0, (1 - (z / 4.0) ** 2) ** 2, 0.0) / scale[bright] ** 2
        count = np.count_nonzero(weight)
        degree = max((d for d in (0, 1, 2, 3) if count >= 6 * n_terms(d) and d <= _degree_for(width)), default=0)
        basis = frame.terms(table["x"], table["y"], degree)
        root = np.sqrt(weight)[:, None]
        if count >= 4:
            solution = np.linalg.lstsq(basis[bright] * root, shape[bright] * root, rcond=1e-8)[0]
            expected = basis @ solution
    return expected, spread, gathered


def _degree_for(width: float) -> int:
    """Terms are let in as the ridge gets narrower: freedom too early would follow the galaxies."""
    return 0 if width > 0.4 else 1 if width > 0.3 else 2 if width > 0.1 else 3


def _distance(shape: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.sum((shape - expected) ** 2, axis=1))  # type: ignore[no-any-return]


def _near_smallest(table: NDArray[np.void]) -> NDArray[np.bool_]:
    """With a handful of sources there is no ridge; the smallest are the stars."""
    if not len(table):
        return np.zeros(0, dtype=bool)
    return table["fwhm"] < 1.15 * table["fwhm"].min()  # type: ignore[no-any-return]


def _modes(values: NDArray[np.float64], weights: NDArray[np.float64], width: float, n: int) -> list[float]:
    """The `n` most common values, by a Gaussian kernel over weighted values, apart from each other by four widths."""
    density = np.exp(-0.5 * ((values[:, None] - values[None, :]) / width) ** 2) @ weights
    modes: list[float] = []
    for index in np.argsort(-density, kind="stable"):
        if len(modes) == n:
            break
        if all(abs(values[index] - mode) > 4 * width for mode in modes):
            modes.append(float(values[index]))
    return modes


def _contamination(stars: NDArray[np.void], rows: NDArray[np.int64], sources: NDArray[np.void]) -> NDArray[np.float64]:
    """Light of the worst neighbour at the centre of each star over the star's own peak."""
    order = np.argsort(sources["y"], kind="stable")
    x, y, flux = (np.ascontiguousarray(sources[name][order]) for name in ("x", "y", "flux"))
    reach = 15 * stars["fwhm"]
    begin, end = np.searchsorted(y, stars["y"] - reach), np.searchsorted(y, stars["y"] + reach)
    own = np.empty(len(sources), dtype=np.int64)
    own[order] = np.arange(len(sources))
    worst = np.zeros(len(stars))
    place = [np.ascontiguousarray(stars[name]) for name in ("x", "y", "flux", "fwhm")]
    _worst_neighbour(x, y, flux, begin, end, own[rows], *place, worst)
    return worst


@njit(cache=True)
def _worst_neighbour(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    xs, ys, fluxes, begin, end, own, star_x, star_y, star_flux, star_fwhm, worst
):
    """Neighbours fade like ``(1 + (r / FWHM)²)^-2.5``, close to a Moffat profile's wings."""
    for n in range(star_x.size):
        reach2 = (15.0 * star_fwhm[n]) ** 2
        for m in range(begin[n], end[n]):
            r2 = (xs[m] - star_x[n]) ** 2 + (ys[m] - star_y[n]) ** 2
            if m != own[n] and r2 < reach2:
                light = max(fluxes[m], 0.0) / star_flux[n] * (1.0 + r2 / star_fwhm[n] ** 2) ** -2.5
                worst[n] = max(worst[n], light)


def _spread(stars: NDArray[np.void], shape: tuple[int, ...], config: PsfConfig) -> NDArray[np.void]:
    """The best stars, taken in turn from the cells of a 5×5 grid, so that no corner is left out.

    Faint stars tell little of the PSF and hide what they are; only cells that have few take them.
    """
    stars = stars[np.argsort(-stars["snr"], kind="stable")]
    rank = _rank_in_cell(stars["x"], stars["y"], shape)
    keep = np.flatnonzero((stars["snr"] > 2 * config.snr_min) | (rank < _FAINT_PER_CELL))
    best = keep[np.argsort(rank[keep], kind="stable")[: config.max_stars]]
    return stars[np.sort(best)]


def _rank_in_cell(x: NDArray[Any], y: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """How many come before each in its cell of a 5×5 grid."""
    ny, nx = shape
    cell = (5 * y / ny).astype(int) * 5 + (5 * x / nx).astype(int)
    rank = np.zeros(len(cell), dtype=np.int64)
    for c in np.unique(cell):
        here = cell == c
        rank[here] = np.arange(np.count_nonzero(here))
    return rank
