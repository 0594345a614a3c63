from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.errors import UsageError
from batchproc.finish import sky
from batchproc.finish.sky import Cell, cell_of, partition, spatial_index


@pytest.fixture
def healpix():
    return pytest.importorskip("cdshealpix", reason="needs the extra 'hats'")


histograms = st.dictionaries(
    st.integers(0, 12 * 4**4 - 1), st.integers(1, 50), min_size=1, max_size=60
)  # cells of order 4 → rows


@settings(deadline=None)
@given(histograms, st.integers(1, 120))
def test_partitions_hold_every_row_once_and_are_as_large_as_they_may_be(histogram, most):
    """Cells do not overlap, cover all rows, hold no more than asked for; the parent of each would hold more."""
    pixels = np.array(sorted(histogram), np.int64)
    counts = np.array([histogram[p] for p in pixels.tolist()], np.int64)
    cells = partition(pixels, counts, most, order=4)
    of_each = {p: [c for c in cells if p >> 2 * (4 - c.order) == c.pixel] for p in pixels.tolist()}
    assert all(len(owners) == 1 for owners in of_each.values())
    for cell, n in cells.items():
        assert n == sum(histogram[p] for p, owners in of_each.items() if owners == [cell])
        assert 0 < n <= most or cell.order == 4
        if cell.order:
            parent = Cell(cell.order - 1, cell.pixel // 4)
            assert sum(n for p, n in histogram.items() if p >> 2 * (4 - parent.order) == parent.pixel) > most


@settings(deadline=None)
@given(histograms, st.integers(1, 120), st.integers(0, 2**32))
def test_every_index_finds_the_partition_that_it_lies_in(histogram, most, seed):
    """A row of a cell of the histogram goes to the partition that counted it."""
    pixels = np.array(sorted(histogram), np.int64)
    cells = list(partition(pixels, np.array([histogram[p] for p in pixels.tolist()]), most, order=4))
    inside = np.random.default_rng(seed).integers(0, 4 ** (sky.INDEX_ORDER - 4), len(pixels))
    index = (pixels << 2 * (sky.INDEX_ORDER - 4)) + inside
    owners = [cells[i] for i in cell_of(index, cells)]
    assert [i >> 2 * (sky.INDEX_ORDER - c.order) for i, c in zip(index.tolist(), owners, strict=True)] == [
        c.pixel for c in owners
    ]


def test_positions_that_are_none_have_no_index(healpix):
    """NaN, infinity and declinations beyond the poles are told apart from places; right ascensions wrap."""
    ra = np.array([10.0, np.nan, 10.0, np.inf, 10.0, 370.0, -350.0, 0.0])
    dec = np.array([-30.0, 0.0, np.nan, 0.0, 90.1, -30.0, -30.0, 90.0])
    index = spatial_index(ra, dec)
    assert (index < 0).tolist() == [False, True, True, True, True, False, False, False]
    assert index[0] == index[5] == index[6]


def test_indices_are_those_of_nested_healpix(healpix):
    """Where the twelve base cells lie (Górski et al. 2005, section 5.2), and a cell's centre is in the cell."""
    ra = np.array([45, 135, 225, 315, 0, 90, 180, 270, 45, 135, 225, 315], float)
    dec = np.degrees(np.arcsin(np.repeat([2 / 3, 0, -2 / 3], 4)))
    assert (spatial_index(ra, dec) >> 2 * sky.INDEX_ORDER).tolist() == list(range(12))


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    """No HEALPix arithmetic: a line that tells what to type."""
    monkeypatch.setitem(__import__("sys").modules, "cdshealpix", None)
    with pytest.raises(UsageError, match=r"batchproc\[hats\]"):
        sky.require_healpix()
