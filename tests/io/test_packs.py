"""Rolled-up images are what they were, each exactly once, for whoever reads at whatever moment, whoever is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import zarr

from batchproc import open_catalogue, open_stamps
from batchproc.errors import DamagedRunError
from batchproc.io import index, packs
from batchproc.io.atomic import remove_leftovers
from batchproc.io.catalogue import read_rows, scored_images, write_scores
from batchproc.io.index import find_places, iter_done, iter_markers, pack_names, read_index, results_digest
from batchproc.io.markers import chunks_digest, row_marker, rows_digest
from batchproc.io.packs import RollUp, forget, loose_images, next_pack_number, plan_roll_ups, roll_up, tidy
from batchproc.io.progress import ReceiptLog, finished_images, iter_receipts
from batchproc.io.run_folder import RunFolder
from batchproc.io.shards import open_shard
from batchproc.io.stamps import CHUNK_ROWS, read_stamps_of
from batchproc.records import Receipt
from tests import _runs

#: Names and candidates; in another order than that of the manifest of `_runs.begin` below.
IMAGES = {"d": 33, "a/1": 5, "none": 0, "b": 64, "c": 1, "x" * 200: 3}


def begin(path: Path, images=IMAGES) -> RunFolder:
    folder = _runs.begin(path, *sorted(images))
    for image_id, n in images.items():
        _runs.store(folder, image_id, n)
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run of images with files of their own, and all that is to be read from it; not to be changed."""
    folder = begin(tmp_path_factory.mktemp("template") / "run")
    return folder, open_catalogue(folder.path), open_stamps(folder.path)[:]


@pytest.fixture
def run(template, tmp_path):
    """A copy of it."""
    shutil.copytree(template[0].path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def check(folder: RunFolder, template) -> None:
    """Everything is there once, and what it was."""
    _, catalogue, stamps = template
    pd.testing.assert_frame_equal(open_catalogue(folder.path), catalogue)
    np.testing.assert_array_equal(open_stamps(folder.path)[:], stamps)
    assert sorted(receipt.image_id for receipt in iter_receipts(folder)) == sorted(IMAGES)
    assert results_digest(folder) == results_digest(template[0])


def files(folder: RunFolder) -> list[Path]:
    """Files and folders of the results."""
    return [path for name in ("catalogue", "stamps", "done") for path in (folder.path / name).rglob("*")]


def test_a_pack_holds_what_the_images_held(run, template):
    """Catalogue, stamps, receipts and digests are the same before and after, in five files."""
    before = {receipt.image_id: receipt for receipt in iter_receipts(run)}
    packed = roll_up(run, 1, list(IMAGES))
    assert (packed.n_images, packed.bad) == (6, {})
    check(run, template)
    assert len(files(run)) == 5
    assert packed.n_bytes == sum(path.stat().st_size for path in files(run) if path.is_file())
    assert {receipt.image_id: receipt for receipt in iter_receipts(run)} == before
    assert {done.config_digest for done in iter_done(run)} == {_runs.CONFIG.image_digest}
    stamps = open_stamps(run.path)
    np.testing.assert_array_equal(stamps.of("b"), template[2][5:69])
    np.testing.assert_array_equal(stamps[[70, 3, 3, -1]], template[2][[70, 3, 3, -1]])
    assert stamps.of("none").shape == (0, 3, _runs.SIZE, _runs.SIZE)


def test_a_pack_is_read_by_anybody(run):
    """Parquet with units, and a Zarr array of one shard in which each image begins at a chunk: no software of ours."""
    name = roll_up(run, 1, list(IMAGES)).pack
    marker = pq.read_table(run.pack_marker(name)).to_pandas().set_index("image_id")
    rows = pq.read_table(run.pack_catalogue(name))
    assert rows.schema.field("flux").metadata[b"unit"] == b"file unit"
    array = zarr.open_array(store=str(run.pack_stamps(name)), mode="r")
    for image_id, n in IMAGES.items():
        made = _runs.result(image_id, n)
        first = CHUNK_ROWS * marker.loc[image_id, "chunk"]
        np.testing.assert_array_equal(array[first : first + n], made.stamps)
        assert np.isnan(array[first + n : first - (-n // CHUNK_ROWS) * CHUNK_ROWS]).all()
        start = marker.loc[image_id, "row"]
        assert rows["image_id"].to_pylist()[start : start + n] == [image_id] * n


def test_digests_are_those_of_the_contents_wherever_they_lie(run):
    """Each image can be held against its marker, which says the same of it, loose or packed."""
    roll_up(run, 1, list(IMAGES)[:3])
    for table in iter_markers(run, [*pq.read_schema(run.pack_marker(pack_names(run)[0])).names]):
        for row in table.to_pylist():
            marker, digest = row_marker(row)
            (place,) = find_places(run, [marker.image_id])
            assert marker.digest == digest
            assert rows_digest(read_rows(run, [place])) == marker.rows_digest
            chunks = open_shard(place.stamps(run)).chunks if place.n else lambda *_: ()
            assert chunks_digest(chunks(place.chunk, place.chunk - (-place.n // CHUNK_ROWS))) == marker.stamps_digest


def test_images_without_candidates_and_stamps_without_data(tmp_path):
    """A pack of nothing has no stamps; a chunk that is all NaN takes no room and stays NaN."""
    folder = _runs.begin(tmp_path / "run", "a", "b", "c")
    for name in "ab":
        _runs.store(folder, name, 0)
    roll_up(folder, 1, ["a", "b"])
    assert len(files(folder)) == 2
    made = _runs.result("c", 40)
    made.stamps[:32] = np.nan
    _runs.store_image(folder, *_runs.entries("c"), made.catalogue, made.stamps, made.receipt, "digest")
    roll_up(folder, 2, ["c"])
    assert open_shard(folder.pack_stamps(pack_names(folder)[1])).lengths()[0] is None
    np.testing.assert_array_equal(open_stamps(folder.path)[:], made.stamps)
    assert finished_images(folder) == dict.fromkeys("abc", "done")


def test_small_packs_go_into_larger_ones(run, template, monkeypatch):
    """What interrupted drivers leave comes together; the pack's files stay few however often."""
    monkeypatch.setattr(packs, "PACK_IMAGES", 8)
    ids = sorted(IMAGES)
    for number, some in enumerate((ids[:2], ids[2:4]), 1):
        roll_up(run, number, some)
    (plan,) = plan_roll_ups(run, least=2)
    assert plan == RollUp(tuple(ids[4:]), tuple(pack_names(run)))
    packed = roll_up(run, next_pack_number(run), plan.image_ids, plan.packs)
    assert pack_names(run) == [packed.pack]
    assert packed.pack.startswith("packed@000003-")
    check(run, template)
    assert len(files(run)) == 5
    assert plan_roll_ups(run, least=2) == []


def test_what_is_rolled_up_and_when(tmp_path, monkeypatch):
    """Full packs at once; a rest only where it is worth a pack; a single small pack is not copied for a few images."""
    monkeypatch.setattr(packs, "PACK_IMAGES", 4)
    names = [f"n{i}" for i in range(11)]
    folder = begin(tmp_path / "run", dict.fromkeys(names, 1))
    assert [plan.image_ids for plan in plan_roll_ups(folder, least=4)] == [
        tuple(sorted(names)[:4]),
        tuple(sorted(names)[4:8]),
    ]
    assert [len(plan.image_ids) for plan in plan_roll_ups(folder, least=3)] == [4, 4, 3]
    for number, plan in enumerate(plan_roll_ups(folder, least=4), 1):
        roll_up(folder, number, plan.image_ids)
    assert loose_images(folder) == sorted(names)[8:]
    roll_up(folder, 3, loose_images(folder)[:1])
    assert plan_roll_ups(folder, least=3) == []
    assert plan_roll_ups(folder, least=2) == [RollUp(tuple(sorted(names)[9:]), (pack_names(folder)[2],))]


def test_two_roll_ups_never_share_an_output(run, template):
    """The same number given twice, to a worker and to the one that was thought to be lost, makes two packs."""
    copies = run.path.with_name("copies")
    shutil.copytree(run.path, copies)
    first = roll_up(run, 1, list(IMAGES)).pack
    assert roll_up(run, 1, list(IMAGES)).pack == ""
    for path in (copies / "catalogue", copies / "stamps", copies / "done"):
        shutil.copytree(path, run.path / path.name, dirs_exist_ok=True)
    check(run, template)
    assert roll_up(run, 1, list(IMAGES)).pack not in ("", first)
    check(run, template)
    tidy(run)
    assert len(files(run)) == 5
    check(run, template)


class Killed(BaseException):
    """The process is no more."""


class Killer:
    """Lets so many changes of the file system pass, and then none: as if the process had been killed."""

    NAMES = ("replace", "unlink", "rmdir", "mkdir", "fsync")

    def __init__(self, monkeypatch, steps: int) -> None:
        self.left = steps
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self.guarded(getattr(os, name)))

    def guarded(self, function):
        def call(*arguments, **options):
            if self.left <= 0:
                raise Killed
            self.left -= 1
            return function(*arguments, **options)

        return call


def killed_at_every_step(run, monkeypatch, work, checked, most=200):
    """Do `work` on copies of a run, killed one step later each time, until it goes through; returns the steps."""
    for steps in range(most):
        folder = RunFolder(run.path.with_name(f"killed{steps}"))
        shutil.copytree(run.path, folder.path)
        with monkeypatch.context() as patch:
            Killer(patch, steps)
            try:
                work(folder)
                through = True
            except Killed:
                through = False
        checked(folder)
        shutil.rmtree(folder.path)
        if through:
            return steps
    raise AssertionError("it never comes to an end")


def test_a_roll_up_that_is_killed_at_any_step_loses_and_doubles_nothing(run, monkeypatch):
    """Everything is there once, before and after the next driver has tidied up and rolled up what is left."""
    monkeypatch.setattr(packs, "_ORPHANED_S", -1.0)
    forget(run, {*IMAGES} - {"c", "d", "none"})
    roll_up(run, 1, ["c"])
    old = pack_names(run)
    expected, stamps = open_catalogue(run.path), open_stamps(run.path)[:]

    def check(folder):
        pd.testing.assert_frame_equal(open_catalogue(folder.path), expected)
        np.testing.assert_array_equal(open_stamps(folder.path)[:], stamps)
        assert sorted(receipt.image_id for receipt in iter_receipts(folder)) == ["c", "d", "none"]

    def checked(folder):
        check(folder)
        for name in ("catalogue", "stamps", "done"):
            remove_leftovers(folder.path / name)
        tidy(folder)
        for plan in plan_roll_ups(folder, least=1):
            assert roll_up(folder, next_pack_number(folder), plan.image_ids, plan.packs).bad == {}
        check(folder)
        assert len(files(folder)) == 5

    steps = killed_at_every_step(run, monkeypatch, lambda folder: roll_up(folder, 2, ["d", "none"], old), checked)
    assert steps > 20


def test_forgetting_that_is_killed_at_any_step_is_done_by_forgetting_again(run, monkeypatch):
    """What is to stay is there throughout, and what is to go is gone in the end, with all its files."""
    monkeypatch.setattr(packs, "_ORPHANED_S", -1.0)
    forget(run, {*IMAGES} - {"a/1", "c", "d"})
    roll_up(run, 1, ["d", "c"])
    expected = open_catalogue(run.path, filters=[("image_id", "==", "d")]).drop(columns="stamp_index")

    def checked(folder):
        rest = open_catalogue(folder.path, filters=[("image_id", "==", "d")]).drop(columns="stamp_index")
        pd.testing.assert_frame_equal(rest, expected)
        forget(folder, ["c", "a/1"])
        for name in ("catalogue", "stamps", "done"):
            remove_leftovers(folder.path / name)
        tidy(folder)
        assert set(finished_images(folder)) == {"d"}
        pd.testing.assert_frame_equal(open_catalogue(folder.path).drop(columns="stamp_index"), expected)
        assert len(files(folder)) == 5

    assert killed_at_every_step(run, monkeypatch, lambda folder: forget(folder, ["c", "a/1"]), checked) > 15


def test_what_is_forgotten_is_neither_done_nor_failed_nor_scored(run, template):
    """Wherever an image lies; the scores of others stay."""
    model = SimpleNamespace(name="cnn", version="1", hash="h", fingerprint="h", normalisation="none")
    run.scores_of("cnn").mkdir(parents=True)
    rows = open_catalogue(run.path)
    path = run.scores_of("cnn") / "0.parquet"
    write_scores(path, rows["image_id"], rows["candidate_id"], np.ones(len(rows), np.float32), model)
    with ReceiptLog(run) as log:
        log.add(Receipt("b", "failed"))
        log.add(Receipt("other", "failed"))
    roll_up(run, 1, ["b", "c"])
    forget(run, ["b", "a/1"])
    assert set(finished_images(run)) == {*IMAGES, "other"} - {"b", "a/1"}
    assert scored_images(run, model) == {"c", "d", "x" * 200}
    assert open_catalogue(run.path)["score_cnn"].notna().all()
    forget(run, ["c", "d", "x" * 200])
    assert not list(run.scores_of("cnn").iterdir())
    assert len(open_catalogue(run.path)) == 0


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def alter_marker(folder: RunFolder) -> None:
    said = json.loads(folder.marker("b").read_text())
    said["receipt"]["cpu_seconds"] += 1
    folder.marker("b").write_text(json.dumps(said))


DAMAGES = {
    "a flipped bit in the rows": lambda f: flip(f.catalogue_part("b"), 700),
    "a flipped bit in the stamps": lambda f: flip(f.stamps_part("b") / "c.0.0.0.0", 700),
    "a flipped bit in the index of chunks": lambda f: flip(f.stamps_part("b") / "c.0.0.0.0", -10),
    "stamps cut short": lambda f: os.truncate(f.stamps_part("b") / "c.0.0.0.0", 1000),
    "rows cut short": lambda f: os.truncate(f.catalogue_part("b"), 1000),
    "rows gone": lambda f: f.catalogue_part("b").unlink(),
    "stamps gone": lambda f: shutil.rmtree(f.stamps_part("b")),
    "rows of another": lambda f: shutil.copy(f.catalogue_part("d"), f.catalogue_part("b")),
    "no description": lambda f: (f.stamps_part("b") / "zarr.json").write_text("{}"),
    "an altered marker": alter_marker,
    "no marker": lambda f: f.marker("b").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_altered_is_not_taken_along(run, template, damage):
    """An image that is not as its marker says counts as missing again; its neighbours are rolled up."""
    damage(run)
    packed = roll_up(run, 1, list(IMAGES))
    assert list(packed.bad) == ["b"]
    assert packed.n_images == len(IMAGES) - 1
    assert set(finished_images(run)) == {*IMAGES} - {"b"}
    expected = template[1][template[1]["image_id"] != "b"].drop(columns="stamp_index").reset_index(drop=True)
    pd.testing.assert_frame_equal(open_catalogue(run.path).drop(columns="stamp_index"), expected)
    _runs.store(run, "b", IMAGES["b"])
    check(run, template)


def test_a_marker_without_its_files_is_a_clear_error(run):
    """Who reads is told which file is missing and what to do; nothing is made up in its place."""
    run.catalogue_part("b").unlink()
    (run.stamps_part("d") / "c.0.0.0.0").unlink()
    with pytest.raises(DamagedRunError, match=r"b\.parquet.*missing.*batchproc verify .* --repair"):
        open_catalogue(run.path)
    with pytest.raises(DamagedRunError, match=r"d\.zarr.*missing"):
        open_stamps(run.path)[:]
    roll_up(run, 1, ["c", "none"])
    flip(run.pack_marker(pack_names(run)[0]), -6)
    with pytest.raises(DamagedRunError, match="marker of a pack cannot be read"):
        read_index(run)


def test_files_that_moved_since_the_index_was_read_are_found(run, template):
    """Stamps that were opened before a roll-up are read after it."""
    stamps, index = open_stamps(run.path), read_index(run)
    roll_up(run, 1, list(IMAGES)[:3])
    np.testing.assert_array_equal(stamps[:], template[2])
    old = pack_names(run)
    roll_up(run, 2, list(IMAGES)[3:], old)
    np.testing.assert_array_equal(stamps[::-1], template[2][::-1])
    np.testing.assert_array_equal(read_stamps_of(run, index.places()), template[2])
    assert read_rows(run, index.places(), ["candidate_id"])["candidate_id"].to_pylist() == [
        *template[1]["candidate_id"]
    ]


def test_a_listing_that_is_old_is_not_believed(run, template, monkeypatch):
    """Network file systems may list images that have gone, and not yet the pack they went into."""
    listed = os.listdir
    old = listed(run.done)
    roll_up(run, 1, list(IMAGES))
    answers = [old] * 3

    def late(folder):
        return answers.pop() if Path(folder) == run.done and answers else listed(folder)

    monkeypatch.setattr(os, "listdir", late)
    assert len(open_catalogue(run.path)) == len(template[1])
    assert answers == []


def test_the_newest_copy_of_an_image_counts(run):
    """A task that was thought to be lost may come back late: its image is there once, in its last state."""
    roll_up(run, 1, ["b", "c"])
    time.sleep(0.002)
    made = _runs.result("b", 7)
    _runs.store_image(run, *_runs.entries("b"), made.catalogue, made.stamps, made.receipt, "digest")
    frame = open_catalogue(run.path, filters=[("image_id", "==", "b")])
    assert len(frame) == 7
    np.testing.assert_array_equal(open_stamps(run.path)[frame["stamp_index"]], made.stamps)
    tidy(run)
    assert len(open_catalogue(run.path, filters=[("image_id", "==", "b")])) == 7
    roll_up(run, 2, ["b"])
    assert len(open_catalogue(run.path, filters=[("image_id", "==", "b")])) == 7


def test_files_without_a_marker_go_when_nobody_can_be_at_work_on_them(run, template, monkeypatch):
    """Those of a task that was killed long ago; a young one's task may be about to mark them."""
    shutil.copytree(run.stamps_part("b"), run.stamps / "lost.zarr")
    shutil.copy(run.catalogue_part("b"), run.catalogue / "packed@000007-abc.parquet")
    n = len(files(run))
    tidy(run)
    assert len(files(run)) == n
    monkeypatch.setattr(packs, "_ORPHANED_S", -1.0)
    assert next_pack_number(run) == 8
    tidy(run)
    assert len(files(run)) == n - 4
    check(run, template)


def test_stamps_are_copied_an_image_at_a_time(tmp_path):
    """Memory is that of one image's encoded stamps and of the rows, however many images go into a pack."""
    names = [f"n{i:02}" for i in range(16)]
    folder = _runs.begin(tmp_path / "run", *names)
    for name in names:
        made = _runs.result(name, 32, size=63)
        _runs.store_image(folder, *_runs.entries(name), made.catalogue, made.stamps, made.receipt, "digest")
    roll_up(folder, 1, names[:1])  # whatever is imported at first use
    one = (folder.stamps_part(names[1]) / "c.0.0.0.0").stat().st_size
    tracemalloc.start()
    roll_up(folder, 2, names[1:])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert one > 1_000_000
    assert peak < 4 * one


READER = """
import sys, time
from pathlib import Path
import numpy as np
from batchproc import open_catalogue, open_stamps
from batchproc.io.index import iter_markers
from batchproc.io.progress import finished_images
from batchproc.io.run_folder import RunFolder

folder, done, rounds = RunFolder(Path(sys.argv[1])), Path(sys.argv[1]) / "log" / "known", 0
(folder.log / "begun").touch()
while not (folder.log / "stop").exists():
    known = set(done.read_text().split())
    ids = [i for table in iter_markers(folder, ["image_id"]) for i in table["image_id"].to_pylist()]
    assert len(ids) == len(set(ids)) and known <= set(ids), sorted(known - set(ids))
    stamps = open_stamps(folder.path)
    catalogue = open_catalogue(folder.path, columns=["image_id", "scorr", "stamp_index"])
    counts = catalogue["image_id"].value_counts()
    assert known <= set(counts.index) and (counts == 3).all(), counts
    assert catalogue["stamp_index"].tolist() == list(range(len(catalogue)))
    found = stamps[:]
    assert len(found) >= 3 * len(known) and not np.isnan(found).any()
    assert (found[:, 0, 0, 1].reshape(-1, 3) == [0, 1, 2]).all()
    rounds += 1
print(rounds)
"""


def test_a_reader_in_another_process_never_misses_or_doubles_an_image(tmp_path):
    """While images are finished, rolled up, and packs join, what was done stays to be seen, once and whole."""
    names = [f"n{i:03}" for i in range(45)]
    folder = _runs.begin(tmp_path / "run", *names)
    known = folder.log / "known"
    known.write_text("")
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(folder.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (folder.log / "begun").exists():
        assert reader.poll() is None
        time.sleep(0.01)
    for i, name in enumerate(names, 1):
        _runs.store(folder, name, 3)
        known.with_name("coming").write_text(" ".join(names[:i]))
        known.with_name("coming").replace(known)
        if i % 5 == 0:
            roll_up(folder, next_pack_number(folder), names[i - 5 : i])
        if i % 15 == 0:
            roll_up(folder, next_pack_number(folder), [], pack_names(folder)[-3:])
    (folder.log / "stop").touch()
    rounds, trouble = reader.communicate(timeout=60)
    assert reader.returncode == 0, trouble
    assert int(rounds) >= 3


def test_a_task_whose_files_are_taken_away_does_not_mark_them(run, monkeypatch):
    """A driver that takes it for dead may remove what has no marker yet: then there is none in the end either."""
    write = _runs.store_image.__globals__["write_marker"]

    def late(path, marker):
        run.catalogue_part("b").unlink()
        write(path, marker)

    monkeypatch.setattr("batchproc.io.store.write_marker", late)
    with pytest.raises(OSError, match="another driver has the run"):
        _runs.store(run, "b", 3)
    assert "b" not in finished_images(run)


def test_an_altered_description_of_stamps_is_no_matter_of_other_images(run, template):
    """What counts is the encoded stamps, which are as they were: the pack's own description is written anew."""
    for image_id in ("d", "b"):
        about = run.stamps_part(image_id) / "zarr.json"
        about.write_text(about.read_text().replace('"clevel": 1', '"clevel": 2'))
        packed = roll_up(run, 1 if image_id == "d" else 2, list(IMAGES), pack_names(run))
        assert packed.bad == {}
        check(run, template)
        forget(run, ["b"])
        _runs.store(run, "b", IMAGES["b"])


def test_forgetting_reads_the_marker_of_each_pack_a_few_times(tmp_path, monkeypatch):
    """However many packs there are that have one of the images: other settings concern all of a million."""
    reads = {}
    for n in (4, 12):
        names = [f"i{i:02}" for i in range(2 * n)]
        folder = begin(tmp_path / f"run{n}", dict.fromkeys(names, 1))
        for i in range(n):
            roll_up(folder, i + 1, names[2 * i : 2 * i + 2])
        seen = []
        with monkeypatch.context() as patch:
            read = index._read_pack
            patch.setattr(index, "_read_pack", lambda *given, r=read, s=seen: (s.append(given), r(*given))[1])
            forget(folder, names[::2])
        assert set(finished_images(folder)) == {*names[1::2]}
        reads[n] = len(seen)
    assert reads[12] == 3 * reads[4]


def flipped(path: Path, column: str) -> Iterator[None]:
    """At each turn another bit of a column of a Parquet file is another one."""
    whole, group = path.read_bytes(), pq.read_metadata(path).row_group(0)
    chunk = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column)
    end = chunk.data_page_offset + chunk.total_compressed_size
    if chunk.dictionary_page_offset:
        end = chunk.dictionary_page_offset + chunk.total_compressed_size
    rng = np.random.default_rng(5)
    for at in rng.integers(chunk.data_page_offset, end, 40):
        content = bytearray(whole)
        content[at] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        yield
    path.write_bytes(whole)


def test_an_altered_place_is_never_believed(tmp_path):
    """A reader would take the rows and stamps of one image for those of another."""
    folder = begin(tmp_path / "run", {f"i{i:03}": 1 + i % 3 for i in range(40)})
    pack = roll_up(folder, 1, folder.image_ids()).pack
    expected = read_index(folder).places()
    for column in ("image_id", "row", "chunk", "n_candidates"):
        told = 0
        for _ in flipped(folder.pack_marker(pack), column):
            try:
                assert read_index(folder).places() == expected  # a bit that says nothing
            except DamagedRunError:
                told += 1
        assert told > 10


@pytest.mark.parametrize("packed", [False, True])
def test_an_altered_value_is_never_believed(tmp_path, packed):
    """Whichever way the rows are read."""
    folder = begin(tmp_path / "run", {"a": 200})
    path = folder.pack_catalogue(roll_up(folder, 1, ["a"]).pack) if packed else folder.catalogue_part("a")
    expected, told = open_catalogue(folder.path)["flux"].to_numpy(), 0
    for _ in flipped(path, "flux"):
        for read in (open_catalogue, lambda run: read_rows(folder, read_index(folder).places())):
            try:
                np.testing.assert_array_equal(read(folder.path)["flux"].to_numpy(), expected)
            except DamagedRunError:
                told += 1
    assert told > 20


def test_a_catalogue_without_its_end_is_named(run):
    """Loose or packed: a reader says which file it is, and what to do."""
    for packed in (False, True):
        if packed:
            _runs.store(run, "b", IMAGES["b"])
            roll_up(run, 1, list(IMAGES))
        path = find_places(run, ["b"])[0].catalogue(run)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(DamagedRunError, match=f"{re.escape(str(path))}: altered or cut short.*verify"):
            open_catalogue(run.path)
