"""The sky in cells: HEALPix indices of positions, and cells that each hold about so many rows.

HEALPix (Górski et al. 2005, ApJ 622, 759; doi:10.1086/427976) cuts the sphere into ``12 · 4^order`` equal areas. In the
nested numbering a cell's four children follow each other, so the cell of any lower order is a shift of the index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import UsageError

__all__ = ["HISTOGRAM_ORDER", "INDEX_ORDER", "Cell", "cell_of", "partition", "require_healpix", "spatial_index"]

INDEX_ORDER = 29  # of the column _healpix_29: cells of 0.4 milliarcseconds
HISTOGRAM_ORDER = 10  # cells of 3.4 arcmin: no partition is smaller


@dataclass(frozen=True, order=True)
class Cell:
    """One HEALPix cell, nested numbering; sorts by order, then number."""

    order: int
    pixel: int

    @property
    def start(self) -> int:
        """First index of order `INDEX_ORDER` in it."""
        return self.pixel << 2 * (INDEX_ORDER - self.order)


def require_healpix() -> Any:
    """The module that does the arithmetic; raises `UsageError` where it is not installed."""
    try:
        import cdshealpix
    except ImportError:
        raise UsageError(
            "a sky-partitioned catalogue needs the package cdshealpix: `pip install 'batchproc[hats]'`, "
            "or leave it out with `--only stamps` or `--only focal-planes`"
        ) from None
    return cdshealpix


def spatial_index(ra: NDArray[np.float64], dec: NDArray[np.float64]) -> NDArray[np.int64]:
    """HEALPix index of order `INDEX_ORDER` of positions (deg, ICRS); −1 for what is no position."""
    from astropy import units
    from astropy.coordinates import Latitude, Longitude

    index = np.full(len(ra), -1, np.int64)
    good = np.isfinite(ra) & (np.abs(dec) <= 90)
    lonlat_to_healpix = require_healpix().lonlat_to_healpix
    place = Longitude(ra[good], units.deg), Latitude(dec[good], units.deg)
    # One thread, as every library of a worker; by default it takes all cores.
    index[good] = lonlat_to_healpix(*place, INDEX_ORDER, num_threads=1).astype(np.int64)
    return index


def partition(
    pixels: NDArray[np.int64], counts: NDArray[np.int64], rows: int, order: int = HISTOGRAM_ORDER
) -> dict[Cell, int]:
    """The largest cells that hold no more than so many rows each, and how many each holds.

    Parameters
    ----------
    pixels, counts : ndarray (n,) int64
        A histogram: cells of `order` that hold rows, ascending, and their numbers of rows.
    rows : int
        The most rows of a cell; only a cell of the histogram itself may hold more.
    order : int
        Of the histogram.

    Returns
    -------
    dict
        In the order of the spatial index. Every row is in exactly one cell, and no cell is empty.
    """
    total = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def inside(cell: Cell) -> int:
        shift = 2 * (order - cell.order)
        first, last = np.searchsorted(pixels, [cell.pixel << shift, (cell.pixel + 1) << shift])
        return int(total[last] - total[first])

    cells: dict[Cell, int] = {}
    waiting = [Cell(0, pixel) for pixel in reversed(range(12))]
    while waiting:
        cell = waiting.pop()
        n = inside(cell)
        if n > rows and cell.order < order:
            waiting += [Cell(cell.order + 1, 4 * cell.pixel + child) for child in (3, 2, 1, 0)]
        elif n:
            cells[cell] = n
    return cells


def cell_of(index: NDArray[np.int64], cells: list[Cell]) -> NDArray[np.int64]:
    """Position in `cells` (ascending, as `partition` gives them, covering all indices) of each spatial index."""
    starts = np.array([cell.start for cell in cells], np.int64)
    return np.searchsorted(starts, index, side="right") - 1
