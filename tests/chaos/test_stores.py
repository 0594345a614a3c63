"""Stores damaged by hand: readers refuse them, `verify` names them, `--repair` and a rerun make the run whole again.

By the commands that a user would give, on a run of real images; unit tests of each kind of damage are in
``tests/io/test_verify.py``::

    pytest -m chaos tests/chaos/test_stores.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from batchproc.errors import DamagedRunError
from batchproc.io.catalogue import open_catalogue
from batchproc.io.index import find_places
from batchproc.io.manifest import read_manifest, write_manifest
from batchproc.io.run_folder import RunFolder
from batchproc.io.shards import SHARD
from batchproc.io.stamps import open_stamps
from batchproc.job import run
from tests.chaos._campaign import CONFIG, events_of, require_same

pytestmark = pytest.mark.chaos

N_LOOSE = 6


@pytest.fixture(scope="module")
def few(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A manifest and a run so small that its images are not packed."""
    folder = tmp_path_factory.mktemp("few")
    write_manifest(read_manifest(manifest)[:N_LOOSE], folder / "manifest.csv")
    assert run(folder / "manifest.csv", folder / "run", config=CONFIG, workers=2, quiet=True).exit_code == 0
    return folder / "manifest.csv", folder / "run"


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """As a user gives it."""
    return subprocess.run(
        [sys.executable, "-m", "batchproc", *map(str, words)], capture_output=True, text=True, timeout=600
    )


def read_all(run: Path) -> None:
    """Rows and stamps, as a user reads them."""
    open_catalogue(run)
    open_stamps(run)[:]


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_catalogue(catalogue: Path, stamps: Path) -> None:
    """the catalogue cut in half"""
    cut_in_half(catalogue)


def cut_stamps(catalogue: Path, stamps: Path) -> None:
    """the stamps cut in half"""
    cut_in_half(stamps / SHARD)


def no_catalogue(catalogue: Path, stamps: Path) -> None:
    """a marker without its catalogue"""
    catalogue.unlink()


def no_stamps(catalogue: Path, stamps: Path) -> None:
    """a marker without its stamps"""
    shutil.rmtree(stamps)


def no_files(catalogue: Path, stamps: Path) -> None:
    """a marker without its files"""
    catalogue.unlink()
    shutil.rmtree(stamps)


def flipped(catalogue: Path, stamps: Path) -> None:
    """one bit of the stamps flipped"""
    content = bytearray((stamps / SHARD).read_bytes())
    content[len(content) // 3] ^= 4
    (stamps / SHARD).write_bytes(content)


DAMAGES = (cut_catalogue, cut_stamps, no_catalogue, no_stamps, no_files, flipped)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("kind", ["loose", "packed"])
def test_damage_is_found_and_done_again(
    few: tuple[Path, Path],
    manifest: Path,
    control: Path,
    tmp_path: Path,
    kind: str,
    damage: Callable[[Path, Path], None],
) -> None:
    """Before the repair nothing damaged is handed out as data; after it exactly the damaged images are computed anew,
    and the run is the one that it was."""
    images, whole = few if kind == "loose" else (manifest, control)
    folder = RunFolder(shutil.copytree(whole, tmp_path / "run"))
    (place,) = find_places(folder, [read_manifest(images)[1].image_id])
    assert (not place.pack) == (kind == "loose")
    before = command("verify", folder.path, "--json")
    assert before.returncode == 0, before.stdout + before.stderr

    damage(place.catalogue(folder), place.stamps(folder))
    if damage is not flipped:  # that, only a checksum tells; verify does
        with pytest.raises((DamagedRunError, OSError)):
            read_all(folder.path)

    found = command("verify", folder.path, "--json")
    assert found.returncode == 1, found.stdout + found.stderr
    wrong = json.loads(found.stdout)["wrong_images"]
    n_images = len(read_manifest(images))
    assert 1 <= len(wrong) <= (1 if kind == "loose" else n_images)
    if kind == "loose" or damage is flipped:
        assert len(wrong) == 1

    repaired = command("verify", folder.path, "--repair")
    assert repaired.returncode == 1, repaired.stdout + repaired.stderr
    status = json.loads(command("status", folder.path, "--json").stdout)
    assert status["missing"] == len(wrong)
    again = command("run", folder.manifest, "--out", folder.path, "--workers", 2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert events_of(folder.path, "run_begun")[-1]["to_do"] == len(wrong)
    require_same(folder.path, whole, images)
