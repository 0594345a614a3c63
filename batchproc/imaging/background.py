"""Sky level and sky noise over an image: two looks at the cells of a mesh.

The first look, at a sample of the pixels, finds about where the sky is; what stands out of it are sources; the second
look measures the sky between them. The statistics, and the surfaces through them, are in `mesh`. Nothing is subtracted
here but on demand; stars are chosen in `stars`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import sep
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage

from batchproc.config import BackgroundConfig
from batchproc.imaging.fill import dilate
from batchproc.imaging.mesh import Cells, Surface, look_at_cells, measure_cells, node_offset, smooth_nodes, surface_row
from batchproc.imaging.planes import as_bytes
from batchproc.records import MaskBit

__all__ = ["Background", "measure_background"]

#: Light in squares of 4×4 pixels above this many times its noise belongs to a source …
_SOURCE_SNR = 3.0
#: … and so do the pixels within this many 2×2 blocks of there: faint outskirts reach beyond the last significant pixel.
_OUTSKIRTS = 2
#: Larger sources than this (hypot of the widths along both axes, pixels) have outskirts that reach farther.
_LARGE = 3.0
#: Looks at an image at most: where something large covers this many cells (but not more than this part of them all),
#: the first level was not sky.
_ROUNDS, _MANY, _MOST = 3, 4, 0.15
#: Surface brightness (in units of the noise of a pixel) below which four fifths of a nebula lie, and no galaxy.
_THIN = 4.0


@dataclass(frozen=True)
class Background:
    """Sky of one image.

    Attributes
    ----------
    level_surface, rms_surface : Surface
        Sky level, and sky noise of a single pixel (1 sigma, no source noise), in the units of the image.
    global_level, global_rms : float
        Medians of the two.
    """

    level_surface: Surface
    rms_surface: Surface
    global_level: float
    global_rms: float

    @property
    def level(self) -> NDArray[np.float32]:
        """Sky level at every pixel, (ny, nx); drawn anew each time."""
        return self.level_surface.image()

    @cached_property
    def rms(self) -> NDArray[np.float32]:
        """Sky noise at every pixel, (ny, nx); positive everywhere."""
        floor = max(1e-3 * self.global_rms, float(np.finfo(np.float32).tiny))
        return self.rms_surface.image(floor)

    def subtracted(
        self, data: NDArray[np.float32], mask: NDArray[np.uint8], *, overwrite: bool = False
    ) -> NDArray[np.float32]:
        """``data − level``, and 0 where the mask says NO_DATA; in `data` itself if wanted."""
        out = data if overwrite and data.dtype == np.float32 and data.flags.writeable else None
        return self.level_surface.below(data, mask, MaskBit.NO_DATA, out)


def measure_background(
    data: NDArray[np.floating], mask: NDArray[np.integer] | None, config: BackgroundConfig | None = None
) -> Background:
    """Sky level and noise, sources left out.

    Parameters
    ----------
    data : ndarray (ny, nx)
        Image with its sky.
    mask : ndarray (ny, nx) or None
        Non-zero is bad. Pixels that are not finite count as bad.
    config : BackgroundConfig
        Mesh size (pixels) and filter size (cells).

    Returns
    -------
    Background

    Notes
    -----
    A cell that is mostly masked speaks through its good pixels; one with hardly any takes its neighbours' values.
    A plane is taken out before: within a cell a steep gradient widens the noise, and at the edges of the mesh the
    filter over its cells bends it.
    An image without a good pixel has level 0 and noise 1.
    """
    config = config or BackgroundConfig()
    image = np.ascontiguousarray(data, dtype=np.float32)
    bad = as_bytes(mask, image.shape)
    cells = Cells.of(image.shape, config.mesh_size)

    level, rms = look_at_cells(image, bad, cells, np.zeros(3))
    if not np.isfinite(level).any():
        return Background(Surface(image.shape, np.zeros((1, 1))), Surface(image.shape, np.ones((1, 1))), 0.0, 1.0)
    plane = _plane(level, cells)
    tilt = cells.plane(plane)
    if _widens(plane, rms, cells):
        level, rms = look_at_cells(image, bad, cells, plane)
    else:
        level -= tilt
    for _ in range(_ROUNDS):
        first, scale = smooth_nodes(level, config.filter_size), _positive(smooth_nodes(rms, config.filter_size))
        surface = Surface(image.shape, first + tilt)
        hidden = _sources(image, bad, surface, scale)
        centre = np.where(np.isfinite(level), level - first, 0.0)
        width = np.clip(np.where(np.isfinite(rms), rms, scale), scale, 4 * scale)
        correction, noise = measure_cells(image, bad, hidden, cells, surface, centre, width)
        lost = np.isfinite(level) & ~np.isfinite(correction)
        if not _MANY <= np.count_nonzero(lost) <= lost.size * _MOST:
            break  # the filter over the cells takes care of a single one
        # Something large covers these cells: what the first look saw there was not sky, and hid its outskirts.
        level[lost] = rms[lost] = np.nan
    if np.isfinite(correction).any():
        first, scale = first + smooth_nodes(correction, config.filter_size), smooth_nodes(noise, config.filter_size)
    return Background(
        Surface(image.shape, first + tilt),
        Surface(image.shape, scale),
        float(np.median(first + tilt)),
        float(np.median(_positive(scale))),
    )


def _positive(rms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Noise that may be divided by: an image without noise has none."""
    return np.maximum(rms, max(1e-3 * float(np.median(rms)), float(np.finfo(np.float32).tiny)))  # type: ignore[no-any-return]


def _plane(level: NDArray[np.float64], cells: Cells) -> NDArray[np.float64]:
    """The plane ``c0 + cx x + cy y`` through the levels of cells, outliers left out.

    Level along what the cells do not span: one cell, or a single row of them, knows no slope across.
    """
    known = np.isfinite(level)
    y, x = ((edges[:-1] + edges[1:] - 1) / 2 for edges in (cells.rows, cells.columns))
    places = np.stack(np.broadcast_arrays(x[None, :], y[:, None]), axis=-1)[known]  # (n, 2)
    scale = np.array([cells.shape[1], cells.shape[0]])
    values = level[known]
    near = np.ones(values.size, dtype=bool)
    for _ in range(4):
        # About their own middle: of all planes through cells in one line, the least steep is the level one.
        centre, height = places[near].mean(axis=0), float(values[near].mean())
        slopes = np.linalg.lstsq((places[near] - centre) / scale, values[near] - height, rcond=None)[0] / scale
        away = np.abs(values - height - (places - centre) @ slopes)
        closer = near & (away <= 3 * 1.4826 * np.median(away[near]))
        if np.count_nonzero(closer) < near.sum() / 2:
            break
        near = closer
    return np.array([height - slopes @ centre, *slopes])


def _widens(plane: NDArray[np.float64], rms: NDArray[np.float64], cells: Cells) -> bool:
    """Whether a plane spans so much of a cell that it widens what was taken for noise, by half a per cent."""
    across = np.hypot(plane[1] * cells.shape[1] / cells.n[1], plane[2] * cells.shape[0] / cells.n[0])
    return bool(across > 0.35 * np.nanmedian(rms))


def _sources(
    image: NDArray[np.float32], bad: NDArray[np.uint8], sky: Surface, rms: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Blocks of 2×2 pixels that belong to sources, their outskirts included: (ceil(ny / 2), ceil(nx / 2))."""
    ny, nx = image.shape
    light = np.empty(((ny + 1) // 2, (nx + 1) // 2), np.float32)
    found = np.zeros(light.shape, dtype=bool)
    _significant(image, bad, sky.nodes, sky.curvature, rms, light, found)
    labels, n = ndimage.label(found, np.ones((3, 3)))
    if n == 0:
        return found
    y, x = np.nonzero(found)
    source = labels[y, x]
    thin = _thin(y, x, source, light, rms)
    found[y[thin], x[thin]] = False
    halo = _halos(y, x, np.where(np.isin(source, np.unique(source[thin])), 0, source), n, light)
    found = dilate(found, _OUTSKIRTS)
    return found if halo is None else found | halo


def _thin(
    y: NDArray, x: NDArray, source: NDArray, light: NDArray[np.float32], rms: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Blocks of nebulae: of faint light over more than a mesh cell, which the mesh follows. Stars in it stay sources.

    A galaxy of that size has a bright middle: a fifth of its blocks are far above the noise of a pixel.
    """
    size = np.bincount(source)
    large = np.flatnonzero(size > light.size / rms.size)
    thin = np.zeros(source.size, dtype=bool)
    for one in large:
        here = np.flatnonzero(source == one)
        j, i = (place[here] * m // n for place, m, n in zip((y, x), rms.shape, light.shape, strict=True))
        brightness = light[y[here], x[here]] / 4 / rms[j, i]
        if np.percentile(brightness, 80) < _THIN:
            thin[here] = brightness < _THIN
    return thin


def _halos(y: NDArray, x: NDArray, source: NDArray, n: int, light: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    """Ellipses of 6 widths around large sources, on blocks; None where there are none. Source 0 does not count."""
    weight = np.maximum(light[y, x], 0).astype(np.float64)

    def mean(values: NDArray) -> NDArray:
        return np.bincount(source, weight * values, n + 1)[1:] / total  # type: ignore[no-any-return]

    total = np.maximum(np.bincount(source, weight, n + 1)[1:], 1e-30)
    x0, y0 = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - x0 * x0, mean(y * y) - y0 * y0, mean(x * y) - x0 * y0
    half, middle = np.hypot((xx - yy) / 2, xy), (xx + yy) / 2
    large = 2 * np.sqrt(2 * middle) > _LARGE  # hypot(a, b) in pixels
    if not large.any():
        return None
    a, b = np.sqrt(middle + half)[large], np.sqrt(np.maximum(middle - half, 1 / 12))[large]
    theta = 0.5 * np.arctan2(2 * xy, xx - yy)[large]
    halo = np.zeros(light.shape, dtype=bool)
    sep.mask_ellipse(halo, x0[large], y0[large], a, b, theta, r=6.0)
    return halo


@njit(cache=True, nogil=True)
def _significant(image, mask, nodes, curvature, rms, light, found):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Light of 2×2 blocks, and whether they lie in a 4×4 square of significant light."""
    ny, nx = image.shape
    n_rows, n_columns = light.shape
    offset = np.float32(node_offset(nodes))
    level, flat = np.zeros(2 * n_columns, np.float32), np.zeros(2 * n_columns, np.float32)
    good = np.zeros(2 * n_columns, np.float32)
    count, before = np.zeros(n_columns, np.float32), np.zeros(n_columns, np.float32)
    noise2 = np.empty(n_columns, np.float32)
    strong = np.zeros(n_columns, np.bool_)
    for j in range(n_rows):
        total = light[j]
        total[:] = 0
        count[:] = 0
        for y in range(2 * j, min(2 * j + 2, ny)):
            surface_row(nodes, curvature, ny, nx, y, offset, level[:nx])
            pixels, bits = image[y], mask[y]
            for x in range(nx):
                v = (pixels[x] - offset) - level[x]
                usable = (bits[x] == 0) & (abs(v) < np.float32(np.inf))
                flat[x] = v if usable else np.float32(0)
                good[x] = np.float32(1) if usable else np.float32(0)
            for i in range(n_columns):
                total[i] += flat[2 * i] + flat[2 * i + 1]
                count[i] += good[2 * i] + good[2 * i + 1]
        cell = min(int((2 * j + 0.5) * rms.shape[0] / ny), rms.shape[0] - 1)
        for i in range(n_columns):
            noise2[i] = np.float32(
                (_SOURCE_SNR * rms[cell, min(int((2 * i + 0.5) * rms.shape[1] / nx), rms.shape[1] - 1)]) ** 2
            )
        if j > 0:
            above = light[j - 1]
            for i in range(n_columns - 1):
                s = total[i] + total[i + 1] + above[i] + above[i + 1]
                n = count[i] + count[i + 1] + before[i] + before[i + 1]
                strong[i] = (s > 0) & (s * s > noise2[i] * n)
            for i in range(n_columns - 1):
                if strong[i]:
                    found[j - 1, i] = found[j - 1, i + 1] = found[j, i] = found[j, i + 1] = True
        count, before = before, count
