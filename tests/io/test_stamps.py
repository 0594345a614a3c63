"""Stamps come back as they were written, from any place of a run, however they are asked for."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchproc import open_stamps
from batchproc.errors import UsageError
from batchproc.io.stamps import CHUNK_ROWS, read_stamps, write_stamps
from tests import _runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of five images, one without candidates, one unfinished; and all its stamps in order."""
    folder = _runs.begin(tmp_path_factory.mktemp("run"), "c", "empty", "a/1", "unfinished", "b")
    stamps = [_runs.store(folder, name, n).stamps for name, n in (("b", 33), ("c", 5), ("empty", 0), ("a/1", 64))]
    write_stamps(folder.stamps_part("unfinished"), stamps[0])
    return folder.path, np.concatenate([stamps[1], stamps[3], stamps[0]])


def test_stamps_follow_the_manifest_and_leave_out_what_is_not_finished(run):
    """The order is that of the manifest, not of completion; a store without a marker is not there."""
    path, expected = run
    stamps = open_stamps(path)
    assert stamps.shape == expected.shape == (102, 3, _runs.SIZE, _runs.SIZE)
    assert len(stamps) == 102
    np.testing.assert_array_equal(stamps[:], expected)
    np.testing.assert_array_equal(np.asarray(stamps), expected)
    np.testing.assert_array_equal(stamps.of("a/1"), expected[5:69])
    assert stamps.of("empty").shape == (0, 3, _runs.SIZE, _runs.SIZE)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_indexing_is_that_of_an_array(run, data):
    """Whole numbers, slices, arrays in any order with repeats, and booleans give what NumPy would."""
    path, expected = run
    stamps = open_stamps(path)
    n = len(expected)
    i = data.draw(st.integers(-n, n - 1))
    np.testing.assert_array_equal(stamps[i], expected[i])
    some = data.draw(st.slices(n))
    np.testing.assert_array_equal(stamps[some], expected[some])
    rows = np.array(data.draw(st.lists(st.integers(-n, n - 1), max_size=6)), dtype=int)
    np.testing.assert_array_equal(stamps[rows], expected[rows])
    chosen = np.isin(np.arange(n), rows)
    np.testing.assert_array_equal(stamps[chosen], expected[chosen])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(-70, 69), max_size=9))
def test_our_reader_reads_what_zarr_reads(tmp_path, rows):
    """Decoding chunks ourselves gives Zarr's values, whichever rows are asked for, chunks without data included."""
    path = tmp_path / "x.zarr"
    if not path.exists():
        stamps = _runs.result("x", 70).stamps
        stamps[32:64] = np.nan
        write_stamps(path, stamps)
    rows = np.array(rows, dtype=int)
    array = zarr.open_array(store=str(path), mode="r")
    np.testing.assert_array_equal(read_stamps(path, rows), array[:][rows])
    np.testing.assert_array_equal(read_stamps(path, slice(5, 40, 7)), array[5:40:7])


def test_outside_is_an_error(run):
    """A stamp that is not there is an IndexError, so that a loop over stamps ends."""
    stamps = open_stamps(run[0])
    with pytest.raises(IndexError):
        stamps[102]
    assert sum(1 for _ in stamps) == 102


def test_a_store_is_two_files_and_anyone_can_open_it(tmp_path):
    """One shard and its description, in chunks of 32 rows; NaN survives; Zarr alone reads it."""
    stamps = _runs.result("x", 70).stamps
    stamps[3, 1] = np.nan
    write_stamps(tmp_path / "x.zarr", stamps)
    assert sum(path.is_file() for path in (tmp_path / "x.zarr").rglob("*")) == 2
    array = zarr.open_array(store=str(tmp_path / "x.zarr"), mode="r")
    assert array.chunks == (CHUNK_ROWS, 3, _runs.SIZE, _runs.SIZE)
    assert array.attrs["planes"] == ["new", "ref", "difference"]
    np.testing.assert_array_equal(array[:], stamps)


def test_rounded_stamps_are_compressed(tmp_path):
    """Noise that is rounded to 1/16 of itself takes less than 40 % of its size."""
    noise = np.round(np.random.default_rng(1).normal(size=(64, 3, 63, 63)) * 16) / 16
    write_stamps(tmp_path / "x.zarr", noise.astype(np.float32))
    size = sum(path.stat().st_size for path in (tmp_path / "x.zarr").rglob("*") if path.is_file())
    assert size < 0.4 * noise.size * 4


def test_writing_again_replaces(tmp_path):
    """A second task of the same image takes the place of the first; none left: no store."""
    path = tmp_path / "x.zarr"
    write_stamps(path, _runs.result("x", 70).stamps)
    again = _runs.result("y", 3).stamps
    write_stamps(path, again)
    np.testing.assert_array_equal(read_stamps(path), again)
    write_stamps(path, again[:0])
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_dies_leaves_the_old_store(tmp_path, monkeypatch):
    """Killed before the rename, nothing but a temporary name is left, and what was there still is."""
    path = tmp_path / "x.zarr"
    first = _runs.result("x", 4).stamps
    write_stamps(path, first)
    monkeypatch.setattr("batchproc.io.atomic.rename", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_stamps(path, first + 1)
    np.testing.assert_array_equal(read_stamps(path), first)


def test_an_empty_run_has_no_stamps(tmp_path):
    """The shape is right even where nothing was found."""
    _runs.begin(tmp_path / "run", "a")
    stamps = open_stamps(tmp_path / "run")
    assert stamps.shape == (0, 3, _runs.SIZE, _runs.SIZE)
    assert stamps[:].shape == stamps.shape


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    """The message says what was looked for and what to type."""
    with pytest.raises(UsageError, match=r"no run\.json .*batchproc run MANIFEST"):
        open_stamps(tmp_path)
