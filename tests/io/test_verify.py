"""Whether a run is what it says it is: whatever rots on the disk is found, and exactly that is done again."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchproc import job
from batchproc.cli import main
from batchproc.config import Config
from batchproc.io.catalogue import open_catalogue
from batchproc.io.index import loose_names, pack_names
from batchproc.io.packs import loose_images, roll_up
from batchproc.io.progress import finished_images, iter_receipts
from batchproc.io.run_folder import RunFolder
from batchproc.io.stamps import open_stamps
from batchproc.io.verify import Problem, check_run, mend, wrong_images
from tests import _runs

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


def seen(path: Path) -> dict[str, Any]:
    """What readers see of a run."""
    folder = RunFolder.existing(path)
    whole, bright = open_catalogue(path), open_catalogue(path, filters=[("scorr", ">", 1.0)])
    return {
        "catalogue": whole.to_dict("list"),
        "filtered": bright.to_dict("list"),
        "models": whole.attrs["models"],
        "stamps": np.asarray(open_stamps(path)[:]).tobytes(),
        "receipts": {
            r.image_id: (r.status, r.n_candidates, r.quality, r.error, r.message) for r in iter_receipts(path)
        },
        "finished": finished_images(folder),
        "frozen": (folder.entries(), folder.config()),
    }


def same(one: Any, other: Any) -> bool:
    np.testing.assert_equal(one, other)
    return True


def is_harmless(path: Path, truth: dict[str, Any]) -> bool:
    """Whether every reader sees what it saw."""
    try:
        return same(seen(path), truth)
    except Exception:
        return False


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


def cases() -> Iterator[tuple[str, Callable[[Path, random.Random], None], int]]:
    """Each file lost and cut, and bytes flipped in all of them."""
    for damage, seeds in ((lose, 1), (cut, 1), (flip, 2)):
        for seed in range(seeds):
            yield damage.__name__, damage, seed


def damage_and_repair(folder: RunFolder, path: Path, truth: dict[str, Any]) -> None:
    """What was damaged is found, or nobody can tell; what was found is done again, and nothing else is."""
    found = problems(folder)
    if not found:
        if path.exists():
            assert is_harmless(folder.path, truth), f"{path} was altered, unnoticed"
        return
    if folder.record == path:
        folder.record.unlink(missing_ok=True)  # as the message says
    else:
        before = set(finished_images(folder)) if path.parent != folder.done else set()
        mend(folder, found)
        wrong = wrong_images(found)
        left = set(finished_images(folder))
        assert not wrong & left
        assert before - wrong <= left
    run(folder.path)
    assert is_harmless(folder.path, truth) or same(seen(folder.path), truth)
    assert [p for p in problems(folder) if p.kind != "orphaned"] == []


def test_a_finished_run_is_as_it_was_written(folder: RunFolder) -> None:
    """Nothing to find, whichever way one looks, and nothing is written by looking."""
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.path.rglob("*") if path.is_file()}
    for options in ({}, {"quick": True}, {"inputs": True}):
        assert [p for p in problems(folder, **options) if p.kind != "input"] == []
    assert sum(checked.images for checked in check_run(folder)) == 9
    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.path.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(("name", "damage", "seed"), cases())
def test_whatever_is_damaged_is_found_and_done_again(
    finished: Path, tmp_path: Path, name: str, damage: Callable[[Path, random.Random], None], seed: int
) -> None:
    """A file that is lost, cut short, or has a byte flipped is found, unless no reader can tell; when it is repaired and
    the run is given again, the results are those of a run that nothing happened to."""
    truth = seen(finished)
    rng = random.Random(seed)
    for number, original in enumerate(held(finished)):
        folder = RunFolder(Path(shutil.copytree(finished, tmp_path / f"run{number}")))
        path = folder.path / original.relative_to(finished)
        damage(path, rng)
        damage_and_repair(folder, path, truth)
        shutil.rmtree(folder.path)
