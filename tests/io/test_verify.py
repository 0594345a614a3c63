"""Whether a run is what it says it is: whatever rots on the disk is found, and exactly that is done again."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchproc import job
from batchproc.cli import main
from batchproc.config import Config
from batchproc.errors import DamagedRunError
from batchproc.io.catalogue import open_catalogue
from batchproc.io.events import EventLog
from batchproc.io.index import loose_names, pack_names
from batchproc.io.packs import loose_images, roll_up
from batchproc.io.progress import finished_images
from batchproc.io.run_folder import RunFolder
from batchproc.io.shards import SHARD
from batchproc.io.stamps import open_stamps
from batchproc.io.store import store_image
from batchproc.io.verify import Problem, check_run, mend, wrong_images
from batchproc.records import ManifestEntry
from tests import _runs
from tests._faults import assert_same, seen

IMAGES = _runs.entries("a3", "b40", "c0", "d2", "e1", "bad7", "f5", "g0", "h33", "i2")
CONFIG = Config.from_dict({**_runs.CONFIG.to_dict(), "classify": {"model": "stub"}})
STEPS = job.Steps(_runs.process, _runs.load_model, _runs.no_wisdom, _runs.report)
NOT_HELD = {"events.jsonl", "heartbeat.json", "report.html", ".lock", "deaths.json"}


def run(path: Path) -> None:
    job.run(IMAGES, path, config=CONFIG, cluster="serial", steps=STEPS, report=False, quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with images in two packs, images with files of their own, scores, and a failure."""
    path = tmp_path_factory.mktemp("verify") / "finished"
    run(path)
    folder = RunFolder(path)
    loose = loose_images(folder)
    roll_up(folder, 1, loose[:3])
    roll_up(folder, 2, loose[3:6])
    assert (len(loose_names(folder)), len(pack_names(folder))) == (3, 2)
    return path


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))


def problems(folder: RunFolder, **options: bool) -> list[Problem]:
    return [problem for checked in check_run(folder, **options) for problem in checked.problems]


def kinds(folder: RunFolder, **options: bool) -> set[str]:
    return {problem.kind for problem in problems(folder, **options)}


def is_harmless(path: Path, truth: dict[str, Any]) -> bool:
    """Whether every reader sees what it saw."""
    try:
        assert_same(seen(path), truth)
    except Exception:  # an error of a reader, or another answer
        return False
    return True


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(max(1, path.stat().st_size)))


def lose(path: Path, rng: random.Random) -> None:
    path.unlink()


def held(path: Path) -> list[Path]:
    """The files of a run that say something."""
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name not in NOT_HELD)


def notices(folder: RunFolder, path: Path, truth: dict[str, Any]) -> None:
    """What was damaged is found, or no reader can tell."""
    if not problems(folder):
        assert is_harmless(folder.path, truth), f"{path} was damaged, unnoticed"
        assert path.exists(), f"{path} is lost, unnoticed"


def test_a_finished_run_is_as_it_was_written(folder: RunFolder) -> None:
    """Nothing to find, whichever way one looks, and nothing is written by looking."""
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.path.rglob("*") if path.is_file()}
    for options in ({}, {"quick": True}, {"inputs": True}):
        assert [p for p in problems(folder, **options) if p.kind != "input"] == []
    assert sum(checked.images for checked in check_run(folder)) == 9
    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.path.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("damage", [lose, cut, flip])
def test_whatever_is_damaged_is_found(
    finished: Path, folder: RunFolder, damage: Callable[[Path, random.Random], None]
) -> None:
    """A file that is lost, cut short, or has a byte flipped is found, unless no reader can tell."""
    truth, rng = seen(finished), random.Random(1)
    for original in held(finished):
        path = folder.path / original.relative_to(finished)
        damage(path, rng)
        notices(folder, path, truth)
        shutil.copy2(original, path)
    assert problems(folder) == []


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(4))
def test_hundreds_of_flipped_bytes_are_found(finished: Path, folder: RunFolder, seed: int) -> None:
    """As above, wherever in a file the byte lies."""
    truth, rng = seen(finished), random.Random(seed)
    for _ in range(300):
        original = rng.choice(held(finished))
        path = folder.path / original.relative_to(finished)
        rng.choice([flip, flip, flip, cut])(path, rng)
        notices(folder, path, truth)
        shutil.copy2(original, path)


def one_of(folder: RunFolder, what: str) -> Path:
    """A file of a kind, of the pack or image that has most in it."""
    image, pack = "h33", max(pack_names(folder), key=lambda name: folder.pack_catalogue(name).stat().st_size)
    return {
        "rows of an image": folder.catalogue_part(image),
        "stamps of an image": folder.stamps_part(image) / SHARD,
        "marker of an image": folder.marker(image),
        "rows of a pack": folder.pack_catalogue(pack),
        "stamps of a pack": folder.pack_stamps(pack) / SHARD,
        "zarr.json of a pack": folder.pack_stamps(pack) / "zarr.json",
        "marker of a pack": folder.pack_marker(pack),
        "scores": next(folder.scores.glob("*/*.parquet")),
        "manifest": folder.manifest,
        "settings": folder.config_file,
    }[what]


#: What is damaged, how, and the images that have to be done again for it.
REPAIRS = [
    ("rows of an image", flip, {"h33"}),
    ("rows of an image", lose, {"h33"}),
    ("stamps of an image", cut, {"h33"}),
    ("marker of an image", flip, {"h33"}),
    ("rows of a pack", cut, {"a3", "b40", "c0"}),
    ("stamps of a pack", flip, {"b40"}),
    ("zarr.json of a pack", lose, {"a3", "b40"}),
    ("marker of a pack", lose, {"a3", "b40", "c0"}),
    ("marker of a pack", cut, {"a3", "b40", "c0"}),
    ("scores", flip, set()),
    ("manifest", flip, set()),
    ("settings", lose, set()),
]


@pytest.mark.parametrize(("what", "damage", "again"), REPAIRS)
def test_what_does_not_hold_is_done_again_and_nothing_else(
    finished: Path, folder: RunFolder, what: str, damage: Callable[[Path, random.Random], None], again: set[str]
) -> None:
    """Repaired, and the run given again, it has the results of a run that nothing happened to."""
    truth, before = seen(finished), set(finished_images(folder))
    damage(one_of(folder, what), random.Random(3))
    found = problems(folder)
    assert found
    mend(folder, found)
    assert before - set(finished_images(folder)) == again
    run(folder.path)
    assert_same(seen(folder.path), truth)
    assert [problem for problem in problems(folder) if problem.kind != "orphaned"] == []


def test_a_pack_whose_footers_lie_is_written_anew(finished: Path, folder: RunFolder) -> None:
    """Where every image still is what it was, none is done again."""
    pack = folder.pack_stamps(pack_names(folder)[0])
    said = json.loads((pack / "zarr.json").read_text())
    (pack / "zarr.json").write_text(json.dumps(said | {"fill_value": 0.0}))
    found = problems(folder)
    assert {(problem.kind, problem.cure) for problem in found} == {("altered", "forget"), ("altered", "repack")}
    assert wrong_images(found) == set()
    mend(folder, found)
    assert problems(folder) == []
    assert_same(seen(folder.path), seen(finished))


@pytest.mark.parametrize("what", ["rows of an image", "stamps of an image", "rows of a pack", "stamps of a pack"])
@pytest.mark.parametrize("damage", [lose, cut])
def test_a_marker_without_its_files_is_trusted_by_nobody(
    finished: Path, folder: RunFolder, what: str, damage: Callable[[Path, random.Random], None]
) -> None:
    """Readers do not make up what is not there, and name what finds out more; a driver that rolls it up finds it, and
    the next one does it again."""
    truth = seen(finished)
    damage(one_of(folder, what), random.Random(1))
    read = open_catalogue if what.startswith("rows") else lambda path: open_stamps(path)[:]
    with pytest.raises(DamagedRunError, match=f"batchproc verify {folder.path} --repair"):
        read(folder.path)
    run(folder.path)
    assert kinds(folder) <= {"orphaned"}
    run(folder.path)
    assert_same(seen(folder.path), truth)


def test_quick_looks_at_presence_and_footers(folder: RunFolder) -> None:
    """What is lost or cut short is found without reading results; what is altered is not."""
    flip(one_of(folder, "stamps of an image"), random.Random(0))
    assert kinds(folder, quick=True) == set()
    assert kinds(folder) == {"altered"}
    cut(one_of(folder, "stamps of an image"), random.Random(0))
    cut(one_of(folder, "rows of a pack"), random.Random(0))
    lose(one_of(folder, "rows of an image"), random.Random(0))
    assert kinds(folder, quick=True) == {"torn", "missing"}


def test_what_belongs_to_nobody_is_told(folder: RunFolder) -> None:
    """Files without a marker, what a killed task left under a temporary name, and images that have two markers; not
    while a driver is at work, whose tasks may be about to write theirs."""
    shutil.copytree(folder.stamps_part("h33"), folder.stamps_part("x"))
    (folder.catalogue / ".tmp-1-x.parquet").touch()
    assert [problem.kind for problem in problems(folder)] == ["orphaned", "orphaned"]
    with EventLog(folder) as events:
        events.beat()
        assert problems(folder) == []
    copy = Path(shutil.copytree(folder.path, folder.path.with_name("copy")))
    roll_up(folder, 3, ["h33"])
    for part in ("catalogue", "stamps", "done"):
        shutil.copytree(copy / part, folder.path / part, dirs_exist_ok=True)
    assert "doubled" in kinds(folder)
    mend(folder, problems(folder))
    assert "doubled" not in kinds(folder)


def test_results_of_other_settings_or_rows_are_strange(folder: RunFolder) -> None:
    """They do not belong to the run, whole as they are."""
    made, other = _runs.result("h33", 2), Config.from_dict({"detect": {"threshold": 9.0}})
    (entry,) = (entry for entry in IMAGES if entry.image_id == "h33")
    store_image(folder, entry, made.catalogue, made.stamps, made.receipt, other.image_digest)
    found = problems(folder)
    assert {problem.kind for problem in found} == {"strange"}
    assert wrong_images(found) == {"h33"}


def test_inputs_that_changed_are_done_again_and_those_that_are_gone_are_not(tmp_path: Path) -> None:
    """What cannot be made again is kept."""
    images = [replace(entry, new=str(tmp_path / entry.image_id), ref=(str(tmp_path / "ref"),)) for entry in IMAGES[:3]]
    for entry in images:
        Path(entry.new).write_bytes(b"pixels")
    (tmp_path / "ref").write_bytes(b"reference")
    folder = RunFolder(tmp_path / "run")
    job.run(images, folder.path, config=_runs.CONFIG, cluster="serial", steps=STEPS, report=False, quiet=True)
    assert problems(folder, inputs=True) == []
    os.utime(images[0].new, (1, 1))
    Path(images[1].new).unlink()
    found = problems(folder, inputs=True)
    assert [(problem.kind, problem.image_ids, problem.cure) for problem in found] == [
        ("input", ("a3",), "forget"),
        ("input", ("b40",), ""),
    ]
    assert problems(folder) == []
    mend(folder, found)
    assert set(finished_images(folder)) == {"b40", "c0"}


def test_the_command_tells_what_to_do(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """In words with the commands to type, or for programs; the exit code says whether there was anything."""

    def verify(*options: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["verify", str(folder.path), "--quiet", *options])
        return int(left.value.code or 0), capsys.readouterr().out

    assert verify() == (0, "9 finished images looked at: all is as it was written\n")
    lose(one_of(folder, "rows of an image"), random.Random(0))
    code, text = verify()
    assert code == 1
    assert "missing: " in text
    assert f"`batchproc verify {folder.path} --repair` makes them missing" in text
    code, text = verify("--json")
    told = json.loads(text)
    assert (code, told["wrong_images"], told["repaired"]) == (1, ["h33"], False)
    code, text = verify("--repair")
    assert (code, "images that are missing now: 1" in text, f"`{told['command']}` does them" in text) == (1, True, True)
    with pytest.raises(SystemExit) as left:
        main(["verify", str(folder.path / "nowhere")])
    assert left.value.code == 2


def other_stamps(entry: ManifestEntry, config: Config) -> _runs.Result:
    """What comes out of another file: the same names of candidates, other stamps, and a candidate more."""
    found = _runs.process(entry, config)
    found = _runs.result(entry.image_id, len(found.stamps) + 1)
    found.stamps[:, 0, 0, 1] += 50
    return found


@pytest.mark.parametrize("what", ["marker of an image", "marker of a pack"])
def test_an_image_that_is_done_again_is_scored_again(folder: RunFolder, what: str) -> None:
    """Also where its marker was lost, so that nobody could say which image had to be forgotten."""
    before = set(finished_images(folder))
    cut(one_of(folder, what), random.Random(3))
    if what == "marker of a pack":  # without which nothing is to be read; a torn one of an image counts for nothing
        mend(folder, problems(folder))
    again = before - set(finished_images(folder))
    steps = job.Steps(other_stamps, _runs.load_model, _runs.no_wisdom, _runs.report)
    job.run(IMAGES, folder.path, config=CONFIG, cluster="serial", steps=steps, report=False, quiet=True)
    catalogue = open_catalogue(folder.path, columns=["image_id", "score_stub"])
    assert again
    assert ((catalogue["score_stub"] >= 0.5) == catalogue["image_id"].isin(again)).all()


def test_torn_scores_are_told_to_readers_and_made_again_by_a_driver(folder: RunFolder) -> None:
    """They cost little, so a driver needs nobody's word for that."""
    truth = seen(folder.path)
    part = next(folder.scores_of("stub").glob("*.parquet"))
    whole = part.read_bytes()
    for length in (100, 0):
        part.write_bytes(whole[:length])
        with pytest.raises(DamagedRunError, match=rf"{part.name}.*batchproc verify .* --repair"):
            open_catalogue(folder.path)
        run(folder.path)
        assert_same(seen(folder.path), truth)
