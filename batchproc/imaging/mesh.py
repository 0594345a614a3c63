"""A coarse mesh over an image: clipped statistics of its cells, and smooth surfaces through them.

The cells divide the image evenly. What the statistics mean (sky, noise) is the business of `background`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["Cells", "Surface", "look_at_cells", "measure_cells", "node_offset", "smooth_nodes", "surface_row"]

#: A cell with fewer good pixels than this says nothing (or than half of its pixels, where it is small).
MIN_PIXELS = 64
#: Width that is left of a unit Gaussian which is cut at 3 of its own widths until nothing changes: the root of
#: c² = 1 − 2 t φ(t) / (2 Φ(t) − 1), t = 3 c.
CLIPPED_WIDTH = 0.98485
#: Bins of a cell's histogram, and how many of them make one sigma of the first look.
N_BINS, BINS_PER_SIGMA = 256, 20.0
#: Pixels of a cell that the first look takes, about.
_SAMPLE = 256

_Nodes = NDArray[np.float64]


@dataclass(frozen=True)
class Cells:
    """An even division of an image.

    Attributes
    ----------
    shape : (ny, nx)
    rows, columns : ndarray (m + 1,) int64
        Where the cells begin along y and x; the last entries are ny and nx.
    """

    shape: tuple[int, int]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]

    @classmethod
    def of(cls, shape: tuple[int, int], side: int) -> Cells:
        """Cells of about ``side`` pixels a side."""
        return cls(shape, *(np.rint(np.linspace(0, n, max(1, round(n / side)) + 1)).astype(np.int64) for n in shape))

    @property
    def n(self) -> tuple[int, int]:
        """Cells along y and x."""
        return self.rows.size - 1, self.columns.size - 1

    def plane(self, plane: NDArray[np.float64]) -> _Nodes:
        """Values of ``c0 + cx x + cy y`` (pixels) in the middles of the cells."""
        y, x = ((edges[:-1] + edges[1:] - 1) / 2 for edges in (self.rows, self.columns))
        return plane[0] + plane[1] * x[None, :] + plane[2] * y[:, None]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Surface:
    """A natural bicubic spline through one value a cell; straight on beyond the outermost middles.

    Attributes
    ----------
    shape : (ny, nx)
        Of the image.
    nodes : ndarray (my, mx) float64
    """

    shape: tuple[int, int]
    nodes: _Nodes

    def __post_init__(self) -> None:
        object.__setattr__(self, "curvature", _second_derivatives(self.nodes))

    curvature: _Nodes = None  # type: ignore[assignment]
    """Second derivatives along y at the nodes, per cell²."""

    def image(self, floor: float = -np.inf) -> NDArray[np.float32]:
        """The surface at every pixel, (ny, nx), but not below `floor`."""
        out = np.empty(self.shape, np.float32)
        _draw(self.nodes, self.curvature, np.float32(floor), out)
        return out

    def below(
        self,
        image: NDArray[np.float32],
        mask: NDArray[np.uint8],
        empty: int,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """``image − surface``, and 0 where ``mask & empty``; a new array, or `out`, which may be `image` itself."""
        out = np.empty(self.shape, np.float32) if out is None else out
        _take_off(image, mask, np.uint8(empty), self.nodes, self.curvature, out)
        return out


def smooth_nodes(nodes: _Nodes, filter_size: int) -> _Nodes:
    """Fill nodes that are NaN smoothly from the others, then a median filter over `filter_size` nodes a side."""
    known = np.isfinite(nodes)
    if not known.any():
        return nodes
    filled = nodes
    if not known.all():
        nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
        filled = nodes[tuple(nearest)]
        for _ in range(2 * max(nodes.shape)):  # a membrane over the gaps
            padded = np.pad(filled, 1, mode="edge")
            mean = (padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]) / 4
            filled = np.where(known, nodes, mean)
    return ndimage.median_filter(filled, filter_size, mode="nearest") if filter_size > 1 else filled


def look_at_cells(
    image: NDArray[np.float32], mask: NDArray[np.uint8], cells: Cells, plane: NDArray[np.float64]
) -> tuple[_Nodes, _Nodes]:
    """A first look at a sample of each cell: clipped mean and width of what the good pixels have above a plane.

    Parameters
    ----------
    image : ndarray (ny, nx) float32
        Pixels that are not finite count as bad.
    mask : ndarray (ny, nx) uint8
        Non-zero is bad.
    cells : Cells
    plane : ndarray (3,)
        ``c0 + cx x + cy y``.

    Returns
    -------
    level, width : ndarray (my, mx)
        NaN where a cell has too few good pixels.
    """
    level, width = np.empty(cells.n), np.empty(cells.n)
    _look(image, mask, cells.rows, cells.columns, plane, level, width)
    return level, width


def measure_cells(
    image: NDArray[np.float32],
    mask: NDArray[np.uint8],
    hidden: NDArray[np.bool_],
    cells: Cells,
    surface: Surface,
    centre: _Nodes,
    scale: _Nodes,
) -> tuple[_Nodes, _Nodes]:
    """Clipped mean and width of what the good pixels of each cell have above a surface, by histograms.

    Equivalent, up to the width of a bin, to::

        v = (image - surface.image())[cell & good]
        while any are cut: v = v[abs(v - median(v)) <= 3 * std(v)]
        mean(v), std(v) / CLIPPED_WIDTH

    Parameters
    ----------
    image, mask
        As in `look_at_cells`.
    hidden : ndarray (ceil(ny / 2), ceil(nx / 2)) bool
        Blocks of 2×2 pixels to leave out.
    cells : Cells
    surface : Surface
    centre, scale : ndarray (my, mx)
        Where to look: about `N_BINS` / 2 / `BINS_PER_SIGMA` scales around the centre.

    Returns
    -------
    mean, width : ndarray (my, mx)
        NaN where a cell has too few good pixels.
    """
    mean, width = np.empty(cells.n), np.empty(cells.n)
    _measure(
        image,
        mask,
        hidden,
        cells.rows,
        cells.columns,
        surface.nodes,
        surface.curvature,
        centre,
        scale,
        mean,
        width,
    )
    return mean, width


# ---- statistics


@njit(cache=True, nogil=True)
def _enough(n, area):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    return n >= min(MIN_PIXELS, area // 2) and n > 0


@njit(cache=True, nogil=True)
def _look(image, mask, rows, columns, plane, level, width):  # type: ignore[no-untyped-def]  # pragma: no cover
    biggest = (np.max(rows[1:] - rows[:-1])) * (np.max(columns[1:] - columns[:-1]))
    values = np.empty(biggest, np.float32)
    for j in range(rows.size - 1):
        for i in range(columns.size - 1):
            area = (rows[j + 1] - rows[j]) * (columns[i + 1] - columns[i])
            step = max(1, int(np.sqrt(area / _SAMPLE)))
            n = 0
            # A sample of the cell; all of it, where that holds too few good pixels.
            while True:
                n = 0
                for y in range(rows[j], rows[j + 1], step):
                    base = plane[0] + plane[2] * y
                    for x in range(columns[i] + (y // step) % step, columns[i + 1], step):
                        v = image[y, x]
                        if mask[y, x] == 0 and abs(v) < np.inf:
                            values[n] = v - (base + plane[1] * x)
                            n += 1
                if step == 1 or _enough(n, area):
                    break
                step = 1
            if _enough(n, area):
                level[j, i], width[j, i] = _clip_sorted(np.sort(values[:n]))
            else:
                level[j, i] = width[j, i] = np.nan


@njit(cache=True, nogil=True)
def _clip_sorted(values):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Mean and width after cutting at 3 sigma about the median until nothing changes.

    The first width is that of the lower half, which sources do not widen.
    """
    n = values.size
    middle = float(values[n // 2])
    sigma = middle - values[int(0.158655 * n)]
    low, high = 0, n
    mean = middle
    for turn in range(30):
        old_low, old_high = low, high
        if turn > 0 or sigma > 0:
            low, high = (
                np.searchsorted(values, middle - 3 * sigma),
                np.searchsorted(values, middle + 3 * sigma, side="right"),
            )
        if turn > 1 and low == old_low and high == old_high:
            break
        total = square = 0.0
        for k in range(low, high):
            total += values[k] - middle
        shift = total / (high - low)
        for k in range(low, high):
            square += (values[k] - middle - shift) ** 2
        mean = middle + shift
        sigma = np.sqrt(square / (high - low))
        middle = 0.5 * (float(values[(low + high - 1) // 2]) + values[(low + high) // 2])
    return mean, sigma / CLIPPED_WIDTH


@njit(cache=True, nogil=True)
def _measure(image, mask, hidden, rows, columns, nodes, curvature, centre, scale, mean, width):  # type: ignore[no-untyped-def]  # pragma: no cover
    ny, nx = image.shape
    offset = np.float32(node_offset(nodes))
    my, mx = centre.shape
    histogram = np.empty((mx, N_BINS + 2), np.int32)
    level = np.empty(nx, np.float32)
    bins = np.empty(nx, np.int32)
    skip = np.empty(nx, np.uint8)
    for j in range(my):
        histogram[:] = 0
        for y in range(rows[j], rows[j + 1]):
            surface_row(nodes, curvature, ny, nx, y, offset, level)
            for k in range(nx // 2):
                skip[2 * k] = skip[2 * k + 1] = hidden[y // 2, k]
            if nx % 2:
                skip[nx - 1] = hidden[y // 2, nx // 2]
            for i in range(mx):
                x0, x1 = columns[i], columns[i + 1]
                per_unit = np.float32(BINS_PER_SIGMA / scale[j, i])
                zero = np.float32(N_BINS / 2 + 1 - centre[j, i] * BINS_PER_SIGMA / scale[j, i])
                pixels, row_mask, row_skip, row_level, found = (
                    image[y, x0:x1],
                    mask[y, x0:x1],
                    skip[x0:x1],
                    level[x0:x1],
                    bins[x0:x1],
                )
                for x in range(x1 - x0):
                    t = ((pixels[x] - offset) - row_level[x]) * per_unit + zero
                    # Bins 0 and N_BINS + 1 take what is not to be counted; a comparison with NaN is False.
                    t = t if t >= np.float32(0) else np.float32(0)
                    t = t if t < np.float32(N_BINS + 1) else np.float32(N_BINS + 1)
                    found[x] = np.int32(t) if (row_mask[x] | row_skip[x]) == 0 else np.int32(0)
                counts = histogram[i]
                for x in range(x1 - x0):
                    counts[found[x]] += 1
        for i in range(mx):
            area = (rows[j + 1] - rows[j]) * (columns[i + 1] - columns[i])
            m, s, n = _clip_histogram(histogram[i])
            if _enough(n, area):
                mean[j, i] = centre[j, i] + m * scale[j, i] / BINS_PER_SIGMA
                width[j, i] = s * scale[j, i] / BINS_PER_SIGMA
            else:
                mean[j, i] = width[j, i] = np.nan


@njit(cache=True, nogil=True)
def _clip_histogram(counts):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Mean and width, in bins from the middle, and number, after cutting at 3 sigma about the median."""
    low, high = 1, N_BINS + 1
    middle = mean = sigma = 0.0
    n = 0
    for _ in range(30):
        n = 0
        total = square = 0.0
        for k in range(low, high):
            c = counts[k]
            p = k + 0.5 - (N_BINS / 2 + 1)
            n += c
            total += c * p
            square += c * p * p
        if n == 0:
            return 0.0, 0.0, 0
        mean = total / n
        # Pixels lie anywhere in their bin, which adds 1/12 to the variance (but not where all share one bin).
        sigma = np.sqrt(max(square / n - mean * mean - 1 / 12, 0.0))
        half, seen, k = n / 2, 0, low
        while seen + counts[k] < half:
            seen += counts[k]
            k += 1
        middle = k + (half - seen) / counts[k] - (N_BINS / 2 + 1)
        old_low, old_high = low, high
        low = max(1, int(np.ceil(middle - 3 * sigma + N_BINS / 2 + 0.5)))
        high = min(N_BINS + 1, int(np.floor(middle + 3 * sigma + N_BINS / 2 + 0.5)) + 1)
        low, high = min(low, k), max(high, k + 1)
        if low == old_low and high == old_high:
            break
    return mean, sigma / CLIPPED_WIDTH, n


# ---- surfaces


def _second_derivatives(nodes: _Nodes) -> _Nodes:
    """Of natural cubic splines along the first axis, per node distance squared."""
    m = len(nodes)
    out = np.zeros_like(nodes)
    if m > 2:
        bend = 6 * (nodes[2:] - 2 * nodes[1:-1] + nodes[:-2])
        matrix = np.diag(np.full(m - 2, 4.0)) + np.diag(np.ones(m - 3), 1) + np.diag(np.ones(m - 3), -1)
        out[1:-1] = np.linalg.solve(matrix, bend)
    return out


@njit(cache=True, nogil=True)
def node_offset(nodes):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """A value near all of them: what is left when it is taken off keeps its digits in float32."""
    return np.float32(nodes[nodes.shape[0] // 2, nodes.shape[1] // 2])


@njit(cache=True, nogil=True)
def _segment(position, n, m):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The interval between nodes that a pixel lies in, and where in it (0 to 1; outside at the ends)."""
    t = (position + 0.5) * m / n - 0.5
    k = min(max(int(np.floor(t)), 0), max(m - 2, 0))
    return k, t - k


@njit(cache=True, nogil=True)
def surface_row(nodes, curvature, ny, nx, y, offset, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """One row of the spline, less `offset`."""
    my, mx = nodes.shape
    row = np.empty(mx)
    j, t = _segment(y, ny, my)
    for i in range(mx):
        if my == 1:
            row[i] = nodes[0, i] - offset
        else:
            row[i] = _cubic(nodes[j, i], nodes[j + 1, i], curvature[j, i], curvature[j + 1, i], t) - offset
    bend = _bend(row)
    if mx == 1:
        out[:] = row[0]
        return
    begin = 0
    for i in range(mx - 1):
        # Pixels before the next node; the first and the last interval reach to the edges.
        end = nx if i == mx - 2 else int(np.ceil((i + 1.5) * nx / mx - 0.5))
        _fill_segment(row[i], row[i + 1], bend[i], bend[i + 1], i, mx / nx, begin, end, out)
        begin = end


@njit(cache=True, nogil=True)
def _fill_segment(a, b, bend_a, bend_b, i, cells_per_pixel, begin, end, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    c1 = np.float32(b - a - (2 * bend_a + bend_b) / 6)
    c0, c2, c3 = np.float32(a), np.float32(bend_a / 2), np.float32((bend_b - bend_a) / 6)
    start, step = np.float32((begin + 0.5) * cells_per_pixel - 0.5 - i), np.float32(cells_per_pixel)
    part = out[begin:end]
    for x in range(end - begin):
        t = start + np.float32(x) * step
        part[x] = c0 + t * (c1 + t * (c2 + t * c3))
    # Beyond the outermost middles the natural spline goes straight on.
    if start < 0:
        for x in range(end - begin):
            t = start + np.float32(x) * step
            if t >= 0:
                break
            part[x] = c0 + t * c1
    for x in range(end - begin - 1, -1, -1):
        t = start + np.float32(x) * step
        if t <= 1:
            break
        part[x] = c0 + c1 + c2 + c3 + (t - 1) * (c1 + 2 * c2 + 3 * c3)


@njit(cache=True, nogil=True)
def _cubic(a, b, bend_a, bend_b, t):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    slope = b - a - (2 * bend_a + bend_b) / 6
    if t < 0:
        return a + t * slope
    if t > 1:
        return b + (t - 1) * (slope + bend_a + (bend_b - bend_a) / 2)
    return a + t * (slope + t * (bend_a / 2 + t * (bend_b - bend_a) / 6))


@njit(cache=True, nogil=True)
def _bend(row):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Second derivatives of the natural spline through a row (Thomas' algorithm)."""
    m = row.size
    bend = np.zeros(m)
    if m < 3:
        return bend
    upper = np.zeros(m)
    for i in range(1, m - 1):
        pivot = 4.0 - upper[i - 1]
        upper[i] = 1.0 / pivot
        bend[i] = (6 * (row[i + 1] - 2 * row[i] + row[i - 1]) - bend[i - 1]) / pivot
    for i in range(m - 3, 0, -1):
        bend[i] -= upper[i] * bend[i + 1]
    return bend


@njit(cache=True, nogil=True)
def _draw(nodes, curvature, floor, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    ny, nx = out.shape
    offset = np.float32(node_offset(nodes))
    for y in range(ny):
        row = out[y]
        surface_row(nodes, curvature, ny, nx, y, offset, row)
        for x in range(nx):
            row[x] = max(row[x] + offset, floor)


@njit(cache=True, nogil=True)
def _take_off(image, mask, empty, nodes, curvature, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    ny, nx = out.shape
    offset = np.float32(node_offset(nodes))
    level = np.empty(nx, np.float32)
    for y in range(ny):
        row, pixels, bits = out[y], image[y], mask[y]
        surface_row(nodes, curvature, ny, nx, y, offset, level)
        for x in range(nx):
            v = (pixels[x] - offset) - level[x]
            row[x] = v if (bits[x] & empty) == 0 else np.float32(0)
