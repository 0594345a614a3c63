"""Sky level and sky noise over an image, by SEP's mesh in two passes.

The first pass finds the sources, the second measures the sky between them. Nothing is subtracted here; stars are
chosen in `stars`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sep
from numpy.typing import NDArray
from scipy import ndimage

from batchproc.config import BackgroundConfig
from batchproc.imaging.extract import extract_sources

__all__ = ["Background", "measure_background"]

#: Width that is left of a unit Gaussian which is cut at 3 of its own widths until nothing changes: the root of
#: c² = 1 − 2 t φ(t) / (2 Φ(t) − 1), t = 3 c. SEP's mesh clips that way and does not correct for it.
_CLIPPED_WIDTH = 0.98485

#: A mesh cell with fewer good pixels than this says nothing of the sky.
_MIN_PIXELS = 64


@dataclass(frozen=True)
class Background:
    """Sky of one image.

    Attributes
    ----------
    level : ndarray (ny, nx) float32
        Sky level, in the units of the image.
    rms : ndarray (ny, nx) float32
        Sky noise of a single pixel (1 sigma, no source noise), in the units of the image; positive everywhere.
    global_level, global_rms : float
        Medians of the two.
    """

    level: NDArray[np.float32]
    rms: NDArray[np.float32]
    global_level: float
    global_rms: float


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
    image = np.asarray(data, dtype=np.float32)
    bad = ~np.isfinite(image) if mask is None else (np.asarray(mask) != 0) | ~np.isfinite(image)
    image = np.where(bad, np.float32(0), image)

    plane = _plane(_mesh(image, bad, config)[0], bad)
    image = np.where(bad, np.float32(0), image - plane)
    first, first_rms = _mesh(image, bad, config)
    flat = image - first
    correction, rms = _mesh(flat, bad | _sources(flat, first_rms, bad), config)
    level = plane + first + correction
    good = ~bad if not bad.all() else bad
    return Background(level, rms, float(np.median(level[good])), float(np.median(rms[good])))


def _plane(level: NDArray[np.float32], bad: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The plane through a level map, its outliers left out."""
    ny, nx = level.shape
    y, x = np.mgrid[0 : ny : max(1, ny // 32), 0 : nx : max(1, nx // 32)]
    values = level[y, x].ravel().astype(np.float64)
    basis = np.stack([np.ones(y.size), (x / nx - 0.5).ravel(), (y / ny - 0.5).ravel()], axis=-1)
    weight = ~bad[y, x].ravel() if not bad[y, x].all() else np.ones(y.size, dtype=bool)
    fit = np.array([np.median(values[weight]), 0.0, 0.0])
    for _ in range(4):
        fit = np.linalg.lstsq(basis[weight], values[weight], rcond=None)[0]
        away = np.abs(values - basis @ fit)
        near = weight & (away <= 3 * 1.4826 * np.median(away[weight]))
        if np.count_nonzero(near) < weight.sum() / 2:
            break
        weight = near
    columns, rows = np.arange(nx) / nx - 0.5, np.arange(ny) / ny - 0.5
    return (fit[0] + fit[1] * columns[None, :] + fit[2] * rows[:, None]).astype(np.float32)  # type: ignore[no-any-return]


def _mesh(
    image: NDArray[np.float32], bad: NDArray[np.bool_], config: BackgroundConfig
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Level and noise by SEP's mesh over the good pixels."""
    ny, nx = image.shape
    # Cells that divide the image evenly: a sliver of a cell at the far edge would be noisy, and misplaced by SEP.
    height, width = (-(-n // max(1, round(n / config.mesh_size))) for n in (ny, nx))
    filled, ignore = _speak_for_masked(image, bad, height, width)
    if ignore.all():
        return np.zeros_like(image), np.ones_like(image)
    size = config.filter_size
    mesh = sep.Background(np.ascontiguousarray(filled), mask=ignore, bw=width, bh=height, fw=size, fh=size)
    rms = mesh.rms(dtype=np.float32) / np.float32(_CLIPPED_WIDTH)
    floor = max(1e-3 * float(np.median(rms)), float(np.finfo(np.float32).tiny))
    return mesh.back(dtype=np.float32), np.maximum(rms, np.float32(floor))


def _speak_for_masked(
    image: NDArray[np.float32], bad: NDArray[np.bool_], height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Repeat the good pixels of cells that are more than half masked over their bad ones.

    SEP ignores such cells, and gives up (level 0, noise 1) where all are like that. Repeating leaves every statistic
    of a cell as its good pixels have it.
    """
    ny, nx = image.shape
    rows, columns = np.arange(0, ny, height), np.arange(0, nx, width)
    n_bad = np.add.reduceat(np.add.reduceat(bad, rows, axis=0, dtype=np.int64), columns, axis=1)
    if not n_bad.any():
        return image, bad
    area = np.outer(np.diff(np.append(rows, ny)), np.diff(np.append(columns, nx)))
    filled, ignore = image.copy(), bad.copy()
    for j, i in np.argwhere(2 * n_bad > area * 0.98):
        cell = (slice(rows[j], rows[j] + height), slice(columns[i], columns[i] + width))
        lost, good = ignore[cell], image[cell][~bad[cell]]
        if good.size >= min(_MIN_PIXELS, lost.size // 2):
            filled[cell][lost] = np.resize(good, np.count_nonzero(lost))
            ignore[cell] = False
        else:
            ignore[cell] = True
    return filled, ignore


def _sources(flat: NDArray[np.float32], rms: NDArray[np.float32], bad: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels that belong to sources, their outskirts included."""
    objects, segments = extract_sources(flat, rms, bad, threshold=2.5, deblend=False)
    found = segments > 0
    # Faint outskirts reach beyond the last significant pixel, and farther the larger the source.
    reach = np.hypot(objects["a"], objects["b"]) > 3.0 if objects.size else np.zeros(0, dtype=bool)
    large = objects[reach]
    if large.size:
        halo = np.zeros(flat.shape, dtype=bool)
        sep.mask_ellipse(halo, large["x"], large["y"], large["a"], large["b"], large["theta"], r=6.0)
        found |= halo
    return ndimage.binary_dilation(found, iterations=4)  # type: ignore[no-any-return]
