"""Disks that fill up or turn read-only under a run: a clear stop, nothing wrong trusted, and the same command goes on.

On small file systems of their own, since the superuser may write whatever the permissions say; skipped where mounting
is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from batchproc import job
from batchproc.cli import main
from batchproc.config import Config
from batchproc.errors import AlignError
from batchproc.io.manifest import write_manifest
from batchproc.io.run_folder import RunFolder
from batchproc.io.verify import check_run, wrong_images
from batchproc.records import ManifestEntry
from tests import _runs
from tests._faults import Disk, assert_same, seen, small_disk

NAMES = [f"n{i}" for i in range(1, 25)]  # as many candidates as the number says; enough images for a pack
CONFIG = Config.from_dict({**_runs.CONFIG.to_dict(), "classify": {"model": "stub"}})
READ_ONLY = "Read-only file system"
FULL = "No space left on device"

#: What happens when an image is processed.
_events: dict[str, Callable[[], None]] = {}


def process(entry: ManifestEntry, config: Config, **options: Any) -> _runs.Result:
    """A stand-in under which things happen to the disk."""
    if entry.image_id in _events:
        _events.pop(entry.image_id)()
    return _runs.process(entry, config)


STEPS = job.Steps(process, _runs.load_model, _runs.no_wisdom, _runs.report)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    _events.clear()
    with small_disk(tmp_path / "disk", 8) as disk:
        yield disk


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What readers see of a run that nothing happens to."""
    _events.clear()
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    job.run(_runs.entries(*NAMES), path, config=CONFIG, cluster="serial", steps=STEPS, report=False, quiet=True)
    return seen(path)


class Command:
    """``batchproc run`` with stand-ins for the work."""

    def __init__(self, tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
        self.out, self._capsys = disk.path / "run", capsys
        self._files = tmp_path / "night.parquet", tmp_path / "settings.toml"
        write_manifest(_runs.entries(*NAMES), self._files[0])
        self._files[1].write_text(CONFIG.to_toml())

    def __call__(self, *options: str) -> tuple[int, str]:
        """Exit code, and everything that is said."""
        manifest, settings = map(str, self._files)
        with pytest.raises(SystemExit) as left:
            main(["run", manifest, "--out", str(self.out), "--config", settings, "--cluster", "serial", *options])
        said = self._capsys.readouterr()
        return int(left.value.code or 0), said.out + said.err


@pytest.fixture
def command(tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(job, "run", partial(job.run, steps=STEPS))
    return Command(tmp_path, disk, capsys)


def stops(command: Command, reason: str, *options: str) -> str:
    """The command stops for the disk and says so, with the file and the room there is; nothing wrong is left."""
    code, said = command(*options)
    assert code == 3, said
    assert reason in said
    assert str(command.out) in said
    assert "MB and" in said
    assert "the same command again" in said
    assert "Traceback" not in said
    if RunFolder(command.out).record.is_file():
        found = [problem for checked in check_run(RunFolder(command.out)) for problem in checked.problems]
        assert wrong_images(found) == set()
        assert {problem.kind for problem in found} <= {"orphaned", "unscored", "missing"}
        assert not [problem for problem in found if problem.kind == "missing" and "done" in problem.path]
    return said


def goes_on(command: Command, truth: dict[str, Any], *options: str) -> None:
    """The same command does what is missing, and the results are those of an undisturbed run."""
    code, said = command(*options)
    assert code == 0, said
    assert_same(seen(command.out), truth)


def test_a_disk_that_is_full_from_the_beginning(disk: Disk, command: Command, truth: dict[str, Any]) -> None:
    """Nothing is begun, or what was begun is gone on with."""
    for room in (0, 4096, 16384):
        disk.fill(leave=room)
        stops(command, FULL)
        disk.empty()
    goes_on(command, truth)


@pytest.mark.parametrize("room", [0, 4096, 8192, 20_480, 65_536])
def test_a_disk_that_fills_up_under_an_image(disk: Disk, command: Command, truth: dict[str, Any], room: int) -> None:
    """Whichever of its files is the one for which there is no room: no image is to blame."""
    _events["n12"] = partial(disk.fill, leave=room)
    said = stops(command, FULL)
    assert "failed" not in said.splitlines()[-1]
    disk.empty()
    goes_on(command, truth)


def test_an_output_that_turns_read_only(disk: Disk, command: Command, truth: dict[str, Any]) -> None:
    """In the middle of the run, and when it is tried again."""
    _events["n12"] = disk.read_only
    stops(command, READ_ONLY)
    stops(command, READ_ONLY)
    disk.writable()
    goes_on(command, truth)


@pytest.mark.parametrize("room", [0, 8192, 40_960])
def test_a_disk_that_fills_up_while_images_are_packed(
    disk: Disk, command: Command, truth: dict[str, Any], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images stay where they are until there is room for their pack."""
    from batchproc.io import packs

    def roll_up(*arguments: Any, true: Callable[..., Any] = packs.roll_up) -> Any:
        disk.fill(leave=room)
        return true(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(packs, "roll_up", roll_up)
        stops(command, FULL)
    assert_same(seen(command.out)["catalogue"]["candidate_id"], truth["catalogue"]["candidate_id"])
    disk.empty()
    goes_on(command, truth)
    assert len(list((command.out / "done").iterdir())) == 1


def test_a_disk_that_fills_up_while_a_failure_is_noted(disk: Disk, command: Command, truth: dict[str, Any]) -> None:
    """The image has failed, or it is tried again as one that was never tried."""

    def fail() -> None:
        disk.fill()
        raise AlignError("/nights/n12.fits: found 2 matches, needs 8", found=2, needed=8)

    _events["n12"] = fail
    stops(command, FULL)
    disk.empty()
    code, _ = command()
    assert code == job.read_status(RunFolder(command.out)).failed
    job.retry(command.out, cluster="serial", steps=STEPS, report=False, quiet=True)
    assert_same(seen(command.out), truth)


def test_a_disk_that_fills_up_while_receipts_are_gathered(
    disk: Disk, command: Command, truth: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When everything is done, and when the next driver begins."""

    def gather(self: Any, true: Callable[[Any], None] = job._Job.gather) -> None:
        disk.fill()
        true(self)

    with monkeypatch.context() as patched:
        patched.setattr(job._Job, "gather", gather)
        stops(command, FULL)
        stops(command, FULL)
    disk.empty()
    goes_on(command, truth)


def test_a_disk_that_fills_up_while_candidates_are_scored(
    disk: Disk, command: Command, truth: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images are done; scores are made when there is room."""

    def predict(self: Any, *arguments: Any, true: Callable[..., Any] = _runs.Model.predict, **options: Any) -> Any:
        disk.fill()
        return true(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(_runs.Model, "predict", predict)
        stops(command, FULL)
    disk.empty()
    goes_on(command, truth)


def test_a_change_for_which_there_is_no_room(disk: Disk, command: Command, truth: dict[str, Any]) -> None:
    """The run stays the old one, with all its results."""
    goes_on(command, truth)
    changed = Config.from_dict({**CONFIG.to_dict(), "detect": {"threshold": 7.0}})
    command._files[1].write_text(changed.to_toml())
    disk.fill()
    stops(command, FULL, "--redo")
    assert_same(seen(command.out), truth)
    disk.empty()
    code, said = command("--redo")
    assert code == 0, said
    assert RunFolder(command.out).config() == changed
