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
from batchproc.imaging.extract import extract_sources
from batchproc.imaging.moments import fwhm_of, measure_moments
from batchproc.imaging.polynomial import Frame, n_terms

__all__ = ["Stars", "find_stars", "log_shape"]

#: Columns of `Stars.table`.
STAR = np.dtype(
    [(name, "f8") for name in ("x", "y", "xx", "yy", "xy", "flux", "snr", "fwhm", "peak")] + [("segment", "i4")]
)

#: Pixels above this fraction of the saturation level may be non-linear already.
_SATURATION_MARGIN = 0.8
#: Sharper than this along either axis (FWHM, pixels) is a hot pixel or a particle track, not light through optics.
_SHARPEST_FWHM = 1.3
#: Light of neighbours in the middle of a star, as a fraction of its own peak, that is let through; the next value
#: is tried where fewer stars than `PsfConfig.min_stars_varying` pass.
_CONTAMINATION = (0.01, 0.03, 0.1)
#: A cell of the image takes stars below twice ``snr_min`` only up to this number in all.
_FAINT_PER_CELL = 6


@dataclass(frozen=True)
class Stars:
    """Stars that may serve to measure the PSF.

    Attributes
    ----------
    table : structured ndarray (n,)
        ``x, y`` (pixels), ``xx, yy, xy`` (pixels², `measure_moments`), ``flux``, ``snr``, ``fwhm`` (pixels), ``peak``
        (highest pixel), ``segment`` (its label in `segments`); the best first.
    segments : ndarray (ny, nx) int32
        Label of the source that owns each pixel, 0 for sky: tells the pixels of a star's neighbours.
    n_detected : int
        Sources of any kind above the detection threshold.
    """

    table: NDArray[np.void]
    segments: NDArray[np.int32]
    n_detected: int

    def __len__(self) -> int:
        return len(self.table)

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
    finite = np.isfinite(data)
    bad = ~finite if mask is None else (np.asarray(mask) != 0) | ~finite
    image = np.where(bad, 0, data).astype(np.float32)
    noise = np.asarray(rms, dtype=np.float32)
    objects, segments = extract_sources(image, noise, bad, threshold=3.0)
    sources = _measure(objects, image, noise)

    clean = sources[_clean(sources, bad, saturation, config)]
    alike = clean[_alike(clean, Frame.of_image(data.shape), config)]
    stars = alike
    for limit in _CONTAMINATION:
        stars = alike[_contamination(alike, sources) < limit]
        if len(stars) >= config.min_stars_varying:
            break
    return Stars(_spread(stars, data.shape, config), segments, len(objects))


def log_shape(table: NDArray[np.void]) -> NDArray[np.float64]:
    """Matrix logarithm of the covariance, as (n, 3): half its trace, half the difference of its diagonal, off-diagonal.

    A polynomial through these numbers always is a valid shape again, and relative changes count alike.
    """
    mean, half = (table["xx"] + table["yy"]) / 2, (table["xx"] - table["yy"]) / 2
    radius = np.hypot(half, table["xy"])
    largest, smallest = np.log(mean + radius), np.log(np.maximum(mean - radius, 1e-6))
    stretch = (largest - smallest) / 2 / np.maximum(radius, 1e-12)
    return np.stack([(largest + smallest) / 2, stretch * half, stretch * table["xy"]], axis=-1)


def _measure(objects: NDArray[Any], image: NDArray[np.float32], rms: NDArray[np.float32]) -> NDArray[np.void]:
    """Table of all sources; those without usable moments have ``snr`` 0."""
    table = np.zeros(len(objects), dtype=STAR)
    if not len(objects):
        return table
    width = 2.3548 * np.sqrt(np.median(objects["a"] * objects["b"]))
    moments = measure_moments(image, objects["x"], objects["y"], fwhm=max(2.0, float(width)))
    for name in ("x", "y", "xx", "yy", "xy", "flux"):
        table[name] = moments[name]
    table["peak"] = objects["peak"]
    table["segment"] = np.arange(1, len(objects) + 1)
    table["fwhm"] = fwhm_of(moments)
    ny, nx = image.shape
    sky = rms[np.clip(objects["y"].astype(int), 0, ny - 1), np.clip(objects["x"].astype(int), 0, nx - 1)]
    # Noise of the flux under a Gaussian weight: sigma sqrt(4 pi sigma_x sigma_y), and the star's own photons.
    area = 4 * np.pi * (table["fwhm"] / 2.3548) ** 2
    ok = moments["ok"] & (table["flux"] > 0) & (area > 0)
    table["snr"][ok] = table["flux"][ok] / np.sqrt(sky[ok] ** 2 * area[ok] + table["flux"][ok])
    lost = ~moments["ok"]  # still a neighbour of others
    table["x"][lost], table["y"][lost], table["flux"][lost] = (
        objects["x"][lost],
        objects["y"][lost],
        objects["flux"][lost],
    )
    return table


def _clean(table: NDArray[np.void], bad: NDArray[np.bool_], saturation: float, config: PsfConfig) -> NDArray[np.bool_]:
    """Bright enough, not saturated, not as sharp as a particle hit, inside the image, no bad pixel in the core."""
    good: NDArray[np.bool_] = (table["snr"] >= config.snr_min) & (table["peak"] < _SATURATION_MARGIN * saturation)
    mean, half = (table["xx"] + table["yy"]) / 2, (table["xx"] - table["yy"]) / 2
    minor = mean - np.hypot(half, table["xy"])
    good &= minor > (_SHARPEST_FWHM / 2.3548) ** 2
    ny, nx = bad.shape
    margin = 1.5 * table["fwhm"]
    good &= (table["x"] > margin) & (table["x"] < nx - 1 - margin)
    good &= (table["y"] > margin) & (table["y"] < ny - 1 - margin)
    if good.any() and bad.any():
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


def _contamination(stars: NDArray[np.void], sources: NDArray[np.void]) -> NDArray[np.float64]:
    """Light of the worst neighbour at the centre of each star over the star's own peak.

    Neighbours fade like ``(1 + (r / FWHM)²)^-2.5``, close to a Moffat profile's wings.
    """
    worst = np.zeros(len(stars))
    if not len(stars) or len(sources) < 2:
        return worst
    tree = cKDTree(np.stack([sources["x"], sources["y"]], axis=-1))
    for n, near in enumerate(tree.query_ball_point(np.stack([stars["x"], stars["y"]], axis=-1), 15 * stars["fwhm"])):
        others = sources[[m for m in near if sources["segment"][m] != stars["segment"][n]]]
        r2 = ((others["x"] - stars["x"][n]) ** 2 + (others["y"] - stars["y"][n]) ** 2) / stars["fwhm"][n] ** 2
        light = np.maximum(others["flux"], 0) / stars["flux"][n] * (1 + r2) ** -2.5
        worst[n] = light.max(initial=0.0)
    return worst


def _spread(stars: NDArray[np.void], shape: tuple[int, int], config: PsfConfig) -> NDArray[np.void]:
    """The best stars, taken in turn from the cells of a 5×5 grid, so that no corner is left out.

    Faint stars tell little of the PSF and hide what they are; only cells that have few take them.
    """
    stars = stars[np.argsort(-stars["snr"], kind="stable")]
    ny, nx = shape
    cell = (5 * stars["y"] / ny).astype(int) * 5 + (5 * stars["x"] / nx).astype(int)
    rank = np.zeros(len(stars), dtype=int)
    for c in np.unique(cell):
        here = cell == c
        rank[here] = np.arange(np.count_nonzero(here))
    keep = np.flatnonzero((stars["snr"] > 2 * config.snr_min) | (rank < _FAINT_PER_CELL))
    best = keep[np.argsort(rank[keep], kind="stable")[: config.max_stars]]
    return stars[np.sort(best)]
