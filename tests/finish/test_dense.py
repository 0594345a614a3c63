from __future__ import annotations

import os

import numpy as np
import pytest
import zarr

from batchproc import open_catalogue, open_stamps
from batchproc.distribute.clusters import Where
from batchproc.errors import DamagedRunError
from batchproc.finish import finish, plan
from batchproc.io import dense as form
from batchproc.io.dense import Dense
from batchproc.io.packs import roll_up
from tests.finish import _night

SERIAL = Where("serial")
SHARD_BYTES = form._SHARD_BYTES


def stamps_of(folder, **options):
    (product,) = finish(folder.path, only=["stamps"], where=SERIAL, quiet=True, **options)
    return product


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of 64 rows: many of a few hundred stamps."""
    monkeypatch.setattr(form, "_SHARD_BYTES", 64 * 12 * 9**2)


def same(a, b):
    return np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def test_rows_are_the_stamps_in_the_order_of_stamp_index(night):
    """Zarr alone reads what open_stamps reads, bit by bit, over shards that begin in the middle of images."""
    product = stamps_of(night)
    array = zarr.open_array(str(night.path / "stamps.zarr"), mode="r")
    stamps = open_stamps(night.path)
    assert product.state == "made"
    assert product.rows == array.shape[0] == len(stamps) == len(open_catalogue(night.path))
    assert len(list((night.path / "stamps.zarr").glob("c.*"))) == -(-len(stamps) // 64) > 5
    assert same(array[:], stamps[:])
    assert same(array[[5, 200, 63, 64]], stamps[[5, 200, 63, 64]])


def test_a_folder_of_it_has_nothing_but_shards_and_their_description(night):
    """One file a shard and two more; no folders in the folder."""
    stamps_of(night)
    names = sorted(path.name for path in (night.path / "stamps.zarr").iterdir())
    assert [n for n in names if not n.startswith("c.")] == [".inputs", "zarr.json"]
    assert all(path.is_file() for path in (night.path / "stamps.zarr").iterdir())


def test_what_is_current_is_left_alone(night):
    """The second call writes nothing."""
    stamps_of(night)
    before = {p: p.stat().st_mtime_ns for p in (night.path / "stamps.zarr").iterdir()}
    assert plan(night.path, only=["stamps"])[0].state == "current"
    assert stamps_of(night).state == "current"
    assert {p: p.stat().st_mtime_ns for p in (night.path / "stamps.zarr").iterdir()} == before


def test_rolling_up_changes_nothing_of_it(night):
    """Images that went into a pack since are the same images: the array stays current."""
    stamps_of(night)
    roll_up(night, 3, [entry.image_id for entry in _night.entries()])
    assert stamps_of(night).state == "current"
    (night.path / "stamps.zarr" / "zarr.json").unlink()
    (night.path / "stamps.zarr" / "c.1.0.0.0").unlink()
    assert stamps_of(night).state == "made"
    assert same(zarr.open_array(str(night.path / "stamps.zarr"), mode="r")[:], open_stamps(night.path)[:])


@pytest.mark.parametrize("harm", ["cut", "gone", "longer", "empty"])
def test_of_a_harmed_array_only_the_torn_shard_is_written_again(night, harm):
    """Cut short, missing, too long, empty: that shard is known by its index, and no other is touched."""
    stamps_of(night)
    store = night.path / "stamps.zarr"
    torn = store / "c.2.0.0.0"
    before = {p.name: p.stat().st_ino for p in store.glob("c.*")}
    whole = torn.read_bytes()
    if harm == "gone":
        torn.unlink()
    else:
        torn.write_bytes({"cut": whole[:-1], "longer": b"x" + whole, "empty": b""}[harm])
    assert form.open_dense(store, len(open_stamps(night.path)), 9, _inputs(store)) is None
    assert stamps_of(night).state == "made"
    after = {p.name: p.stat().st_ino for p in store.glob("c.*")}
    assert torn.read_bytes() == whole
    assert {n for n in before if before[n] != after[n]} <= {"c.2.0.0.0"}


def _inputs(store):
    return dict(zarr.open_array(str(store), mode="r").attrs)["batchproc_inputs"]


def test_killed_between_shards_it_goes_on_with_those_that_are_missing(night, monkeypatch):
    """Shards written before a stop are kept, and until all are there nobody takes the folder for an array."""
    write, written = Dense.write_shard, []

    def stops(self, number, blocks):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, blocks)

    monkeypatch.setattr(Dense, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        stamps_of(night)
    assert not (night.path / "stamps.zarr" / "zarr.json").exists()
    kept = {p.name: p.stat().st_ino for p in (night.path / "stamps.zarr").glob("c.*")}
    monkeypatch.setattr(Dense, "write_shard", write)
    assert stamps_of(night).state == "made"
    assert len(kept) == 3
    assert {n: (night.path / "stamps.zarr" / n).stat().st_ino for n in kept} == kept
    assert same(zarr.open_array(str(night.path / "stamps.zarr"), mode="r")[:], open_stamps(night.path)[:])


def test_after_new_images_all_of_it_is_made_anew(tmp_path):
    """An array of fewer images is no array of these; the new one has them all, and no shard of the old."""
    folder = _night.begin(tmp_path / "run")
    _night.store(folder, _night.entries()[4:12])
    stamps_of(folder)
    _night.store(folder, _night.entries()[:4])
    assert plan(folder.path, only=["stamps"])[0].state == "to make"
    assert stamps_of(folder).state == "made"
    assert same(zarr.open_array(str(folder.path / "stamps.zarr"), mode="r")[:], open_stamps(folder.path)[:])


def test_an_altered_chunk_is_noticed_by_any_reader(night):
    """A flipped byte inside a shard: Zarr refuses to read it."""
    stamps_of(night)
    path = night.path / "stamps.zarr" / "c.1.0.0.0"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(str(night.path / "stamps.zarr"), mode="r")[64:70]


def test_stamps_that_are_not_what_was_written_are_not_taken_over(night):
    """A store of an image with one flipped byte: the image is named, and no array comes of it."""
    image = night.stamps_part("e0-c0")
    (shard,) = image.glob("c*")
    data = bytearray(shard.read_bytes())
    data[50] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(DamagedRunError, match=image.name.removesuffix(".zarr")):
        stamps_of(night)
    assert not (night.path / "stamps.zarr" / "zarr.json").exists()


def test_a_run_without_candidates_has_no_array(tmp_path):
    """Nothing to make it from is no error."""
    folder = _night.begin(tmp_path / "run")
    _night.store(folder, _night.entries()[3:4])
    assert stamps_of(folder).state == "empty"
    assert not (folder.path / "stamps.zarr").exists()


@pytest.mark.parametrize("size", [9, 31, 63, 255])
def test_shards_are_of_whole_chunks_and_of_100_to_200_megabytes(size, monkeypatch):
    """Whatever the size of the stamps: memory of a reader, and files of a run."""
    monkeypatch.setattr(form, "_SHARD_BYTES", SHARD_BYTES)
    rows = Dense("store", 10**7, size).rows
    assert rows % 32 == 0
    assert 100e6 < rows * 12 * size**2 <= 200e6


def test_one_shard_more_than_its_rows_is_refused(tmp_path):
    """Stamps that do not add up to the shard's rows leave no file."""
    dense = Dense(tmp_path, 40, 9)
    for n in (39, 41):
        with pytest.raises(ValueError, match="it has 40"):
            dense.write_shard(0, [np.zeros((n, 3, 9, 9), np.float32)])
    assert os.listdir(tmp_path) == []
