from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from batchproc import open_catalogue
from batchproc.distribute.clusters import Where
from batchproc.errors import DamagedRunError
from batchproc.finish import finish, hats, hats_format, plan, work
from batchproc.finish.sky import INDEX_ORDER, spatial_index
from batchproc.records import CATALOGUE
from tests.finish import _night

pytest.importorskip("cdshealpix", reason="needs the extra 'hats'")

SERIAL = Where("serial")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Partitions of at most 120 rows, groups of about 150."""
    monkeypatch.setattr(hats, "ROWS", 120)
    monkeypatch.setattr(work.groups_of, "__defaults__", (150,))


def hats_of(folder):
    (product,) = finish(folder.path, only=["hats"], where=SERIAL, quiet=True)
    return product


def partitions(folder):
    return sorted((folder.path / "hats" / "dataset").rglob("Npix=*.parquet"))


def read(folder):
    """All partitions as one frame, in the order of the catalogue of the run."""
    frame = pd.concat(pq.read_table(path, partitioning=None).to_pandas() for path in partitions(folder))
    return frame.sort_values("stamp_index", ignore_index=True)


def test_every_row_with_a_position_is_there_once_with_its_values_and_scores(night):
    """The rows of open_catalogue, all columns, scores and NaN included; those without a position are counted."""
    product = hats_of(night)
    expected = open_catalogue(night.path)
    placed = expected[expected["ra"].notna()].reset_index(drop=True)
    found = read(night)
    assert (product.state, product.rows) == ("made", len(placed))
    assert f"{len(expected) - len(placed)} candidates without a position" in product.note
    assert found.columns.tolist() == ["_healpix_29", *expected.columns]
    pd.testing.assert_frame_equal(found[expected.columns], placed, check_dtype=False)
    assert 0 < found["score_stub"].isna().sum() < len(found)


def test_partitions_are_sorted_and_hold_what_their_names_say(night):
    """The index is that of the position, ascending, and lies in the partition's cell; no partition is too large."""
    hats_of(night)
    paths = partitions(night)
    assert len(paths) > 5
    for path in paths:
        rows = pq.read_table(path, partitioning=None)
        index = rows["_healpix_29"].to_numpy()
        order = int(path.parts[-3].removeprefix("Norder="))
        pixel = int(path.stem.removeprefix("Npix="))
        assert path.parts[-2] == f"Dir={pixel // 10000 * 10000}"
        assert (np.diff(index) >= 0).all()
        assert (index >> 2 * (INDEX_ORDER - order) == pixel).all()
        assert (index == spatial_index(rows["ra"].to_numpy(), rows["dec"].to_numpy())).all()
        assert 0 < len(rows) <= 120


def test_units_meanings_and_models_are_in_the_schema(night):
    """The metadata of every field tells what it is, that of a score which model made it."""
    hats_of(night)
    schema = pq.read_schema(night.path / "hats" / "dataset" / "_common_metadata")
    for column in CATALOGUE:
        assert schema.field(column.name).metadata[b"meaning"].decode() == column.meaning
        assert schema.field(column.name).metadata[b"unit"].decode() == column.unit
    assert schema.field("score_stub").metadata[b"hash"].decode() == "0" * 64
    assert all(pq.read_schema(path).equals(schema) for path in partitions(night))


def test_how_it_was_grouped_leaves_no_trace(night, monkeypatch):
    """Partitions have the same bytes, however many tasks read the run."""
    hats_of(night)
    before = {path: path.read_bytes() for path in partitions(night)}
    (night.path / "hats" / "hats.properties").unlink()
    monkeypatch.setattr(work.groups_of, "__defaults__", (10**6,))
    hats_of(night)
    assert {path: path.read_bytes() for path in partitions(night)} == before


def stop_at(monkeypatch, step, after):
    """A step that is killed when so many of its tasks are done."""
    real, done = getattr(hats, step), []

    def stops(job, item):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(item)
        return real(job, item)

    monkeypatch.setattr(hats, step, stops)
    return real, done


@pytest.mark.parametrize(
    ("step", "after"), [("histogram", 1), ("split", 0), ("split", 2), ("merge", 4), ("publish", 0)]
)
def test_killed_in_any_step_it_goes_on_from_there(night, monkeypatch, step, after):
    """What was finished is not done again, and the result is that of an undisturbed call."""
    real, _ = stop_at(monkeypatch, step, after)
    with pytest.raises(KeyboardInterrupt):
        hats_of(night)
    assert not (night.path / "hats").exists()
    monkeypatch.setattr(hats, step, real)
    _, again = stop_at(monkeypatch, step, -1)
    assert hats_of(night).state == "made"
    total = {"histogram": 4, "split": 4, "merge": len(partitions(night)), "publish": 1}[step]
    assert len(again) == total - after
    assert not (night.path / "finishing").exists()
    placed = open_catalogue(night.path).dropna(subset="ra").reset_index(drop=True)
    pd.testing.assert_frame_equal(read(night)[placed.columns], placed, check_dtype=False)


def test_killed_while_the_folder_gets_its_name_nothing_is_half(night, monkeypatch):
    """Either the old catalogue is there, or the new one; the same command then makes the new one."""
    hats_of(night)
    old = {path: path.read_bytes() for path in partitions(night)}
    _night.score(night, _night.entries()[20:23], "c")

    def dies(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hats, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            hats_of(night)
    assert {path: path.read_bytes() for path in partitions(night)} == old
    assert hats_of(night).state == "made"
    assert read(night)["score_stub"].notna().all()


def test_what_is_current_is_left_alone_and_what_is_not_is_made_anew(night):
    """Nothing new: not a file is written. New scores, then a partition cut short: made anew."""
    hats_of(night)
    before = {p: p.stat().st_mtime_ns for p in (night.path / "hats").rglob("*")}
    assert hats_of(night).state == plan(night.path, only=["hats"])[0].state == "current"
    assert {p: p.stat().st_mtime_ns for p in (night.path / "hats").rglob("*")} == before
    _night.score(night, _night.entries()[20:23], "c")
    assert plan(night.path, only=["hats"])[0].state == "to make"
    assert hats_of(night).state == "made"
    assert read(night)["score_stub"].notna().all()
    torn = partitions(night)[3]
    torn.write_bytes(torn.read_bytes()[:-10])
    assert plan(night.path, only=["hats"])[0].state == "to make"
    assert hats_of(night).state == "made"
    assert hats_format.is_whole(night.path / "hats")


@pytest.mark.parametrize("cut", [True, False])
def test_whatever_is_missing_of_a_catalogue_it_is_made_anew(night, cut):
    """Not its partitions alone: LSDB opens none without these files, and would be told that it is current."""
    hats_of(night)
    for name in (
        "partition_info.csv",
        "properties",
        "hats.properties",
        "dataset/_metadata",
        "dataset/_common_metadata",
    ):
        path = night.path / "hats" / name
        whole = path.read_bytes()
        path.unlink()
        if cut:
            path.write_bytes(whole[: len(whole) // 2])
        assert plan(night.path, only=["hats"])[0].state == "to make"
        assert hats_of(night).state == "made"
        assert path.is_file()
        assert hats_format.is_whole(night.path / "hats")


def test_a_catalogue_that_was_published_is_not_published_again(night, monkeypatch):
    """A worker may die after it has given the folder its name and before anybody knows."""
    publish = hats.publish

    def twice(job, about):
        publish(job, about)
        publish(job, about)

    monkeypatch.setattr(hats, "publish", twice)
    assert hats_of(night).state == "made"
    assert len(read(night)) == open_catalogue(night.path)["ra"].notna().sum()


def test_a_dry_run_writes_nothing(night):
    """Not a file, not a folder."""
    before = sorted(night.path.rglob("*"))
    assert [product.state for product in plan(night.path)] == ["to make"] * 3
    assert sorted(night.path.rglob("*")) == before


def test_rows_that_are_not_what_was_written_are_not_taken_over(night):
    """A part whose values were changed: the image is named, and no catalogue comes of it."""
    path = night.catalogue_part("e0-c1")
    table = pq.read_table(path)
    flux = table["flux"].to_numpy().copy()
    flux[3] += 1
    pq.write_table(table.set_column(table.schema.get_field_index("flux"), table.schema.field("flux"), [flux]), path)
    with pytest.raises(DamagedRunError, match="e0-c1"):
        hats_of(night)
    assert not (night.path / "hats").exists()


def test_a_run_without_positions_has_no_catalogue_of_the_sky(tmp_path, monkeypatch):
    """All candidates without a WCS: it says so, and that is no error."""
    monkeypatch.setattr(_night, "_DEC", (np.nan,) * 6)
    folder = _night.begin(tmp_path / "run")
    _night.store(folder, _night.entries()[:3])
    product = hats_of(folder)
    assert product.state == "empty"
    assert product.note.startswith("105 candidates without a position")
    assert not (folder.path / "hats").exists()


def test_worker_processes_make_the_same(night):
    """Two processes of a local cluster leave the bytes of a serial call."""
    hats_of(night)
    before = {path: path.read_bytes() for path in partitions(night)}
    (night.path / "hats" / "hats.properties").unlink()
    (product,) = finish(night.path, only=["hats"], where=Where("local", 2), quiet=True)
    assert product.state == "made"
    # Their partitions have the size of the package, not that of these tests: all rows in fewer files.
    assert pd.concat(map(pd.read_parquet, before)).shape[0] == product.rows


def test_an_altered_page_can_be_noticed(night):
    """Pages carry checksums: who asks a reader to look at them sees a flipped byte."""
    hats_of(night)
    path = partitions(night)[0]
    pq.read_table(path, partitioning=None, page_checksum_verification=True)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(OSError, match=r"CRC|checksum"):
        pq.read_table(path, partitioning=None, page_checksum_verification=True)
