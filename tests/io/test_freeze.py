"""What a run is begun with, and what becomes of it when it is continued with something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc import job
from batchproc.config import Config
from batchproc.errors import RunMismatchError, UsageError
from batchproc.io.catalogue import open_catalogue
from batchproc.io.freeze import Changes, check, complete_change, drop_strange, freeze
from batchproc.io.manifest import entry_digest, read_manifest, write_manifest
from batchproc.io.packs import roll_up
from batchproc.io.progress import finished_images
from batchproc.io.run_folder import RunFolder
from batchproc.io.store import store_image
from batchproc.records import ManifestEntry
from tests import _runs
from tests._faults import KilledError, killed_at

NAMES = ("a1", "b2", "c3", "d4")
THRESHOLD = Config.from_dict({**_runs.CONFIG.to_dict(), "detect": {"threshold": 6.0}})
MODEL = Config.from_dict({**_runs.CONFIG.to_dict(), "classify": {"model": "other"}})


def no_wisdom() -> str:
    return ""


def do(folder: RunFolder, images: Sequence[ManifestEntry], config: Config = _runs.CONFIG) -> None:
    for entry in images:
        result = _runs.result(entry.image_id, 2)
        store_image(folder, entry, result.catalogue, result.stamps, result.receipt, config.image_digest)


@pytest.fixture
def images() -> list[ManifestEntry]:
    return _runs.entries(*NAMES)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, of which three are done, one of them in a pack."""
    folder = RunFolder(tmp_path_factory.mktemp("freeze") / "begun")
    images = _runs.entries(*NAMES)
    freeze(folder, images, _runs.CONFIG, no_wisdom)
    do(folder, images[:3])
    roll_up(folder, 1, ["a1", "c3"])
    return folder.path


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(begun, tmp_path / "run")))


def done(folder: RunFolder) -> set[str]:
    return set(finished_images(folder))


def frozen(folder: RunFolder) -> tuple[list[ManifestEntry], Config]:
    return folder.entries(), folder.config()


def test_what_is_frozen_says_what_made_it(folder: RunFolder, images: list[ManifestEntry]) -> None:
    """Settings, images, software and model of a run are known from run.json, whoever reads it, and so is that it is
    whole."""
    record = folder.read_record()
    assert record["config_digest"] == _runs.CONFIG.digest
    assert folder.image_digest() == _runs.CONFIG.image_digest
    assert set(record["files"]) == {"manifest.parquet", "config.toml", "fftw_wisdom"}
    assert {"batchproc", "python", "numpy"} <= set(record["software"])
    assert folder.entry_digests() == {entry.image_id: entry_digest(entry) for entry in images}
    said = json.loads(folder.record.read_text())
    folder.record.write_text(json.dumps(said | {"n_images": 5}))
    with pytest.raises(UsageError, match=r"run\.json: has been altered.*batchproc verify"):
        folder.read_record()


@settings(max_examples=30, deadline=None)
@given(
    gain=st.none() | st.floats(0.1, 1e3) | st.integers(1, 9),
    ccd=st.none() | st.text("01.e ", max_size=3).map(str.strip),
    ref=st.lists(st.sampled_from(["/r1", "/r2[3]"]), min_size=1, max_size=3),
    mask=st.sampled_from([None, "/m"]),
)
def test_an_entry_keeps_its_digest_when_it_is_frozen(tmp_path_factory, gain, ccd, ref, mask) -> None:
    """What tasks say of a row and what is read back from the frozen manifest is the same."""
    entry = ManifestEntry("i", "/n", tuple(ref), gain=gain, ccd=ccd, new_mask=mask)
    path = tmp_path_factory.mktemp("m") / "m.parquet"
    write_manifest([entry], path)
    assert [entry_digest(e) for e in read_manifest(path)] == [entry_digest(entry)]


def test_a_continuation_changes_nothing(folder: RunFolder, images: list[ManifestEntry]) -> None:
    """The order of the rows and the number of threads are nobody's concern; wisdom is measured once."""
    before = {path: path.read_bytes() for path in folder.path.glob("*.*")}
    found = freeze(folder, images[::-1], replace(_runs.CONFIG, threads=4), lambda: pytest.fail("measured again"))
    assert not found
    assert {path: path.read_bytes() for path in folder.path.glob("*.*")} == before


@pytest.mark.parametrize("flags", [{}, {"extend": True}])
def test_other_settings_or_images_are_refused_with_the_difference(
    folder: RunFolder, images: list[ManifestEntry], flags: dict[str, bool]
) -> None:
    """A run goes on only with what it began with; the message names what changed, what that costs and what to type."""
    cost = "--redo accepts that: 4 images to do again, of which 3 are done"
    match = rf"detect\.threshold was 5\.0, now 6\.0.*{cost}.*another --out"
    with pytest.raises(RunMismatchError, match=match):
        freeze(folder, images, THRESHOLD, no_wisdom, **flags)
    other = [replace(images[0], gain=2.0), *images[1:2], images[3], replace(images[3], image_id="e")]
    with pytest.raises(RunMismatchError, match=r"a1: gain was None, now 2\.0; c3 is gone; e is new") as caught:
        freeze(folder, other, _runs.CONFIG, no_wisdom, **flags)
    assert "no longer in the manifest, the results of 1 of them deleted" in str(caught.value)
    assert frozen(folder) == (images, _runs.CONFIG)
    assert done(folder) == {"a1", "b2", "c3"}


def test_new_images_are_accepted_by_extend(folder: RunFolder, images: list[ManifestEntry]) -> None:
    """Nothing that is done is touched; without the flag the message names it."""
    more = [*_runs.entries("e5"), *images]
    with pytest.raises(RunMismatchError, match=r"e5 is new\. --extend accepts that: 1 new image to do"):
        check(folder, more, _runs.CONFIG)
    found = freeze(folder, more, _runs.CONFIG, no_wisdom, extend=True)
    assert (found.new, found.only_new) == (("e5",), True)
    assert frozen(folder) == (more, _runs.CONFIG)
    assert done(folder) == {"a1", "b2", "c3"}


def test_redo_costs_the_images_that_changed_and_no_others(folder: RunFolder, images: list[ManifestEntry]) -> None:
    """Rows that changed are missing, those that are gone have no results, the others keep theirs."""
    identity = folder.read_record()["id"]
    other = [replace(images[0], gain=2.0), images[1], *_runs.entries("e5")]
    found = freeze(folder, other, _runs.CONFIG, no_wisdom, redo=True)
    assert (found.changed, set(found.gone), found.new) == (("a1",), {"c3", "d4"}, ("e5",))
    assert (found.done_again, found.done_gone) == (1, 1)
    assert frozen(folder) == (other, _runs.CONFIG)
    assert done(folder) == {"b2"}
    assert set(open_catalogue(folder.path)["image_id"]) == {"b2"}
    assert folder.read_record()["id"] == identity
    assert drop_strange(folder) == 0


def test_other_settings_redo_all_images(folder: RunFolder, images: list[ManifestEntry]) -> None:
    """Those that are not done yet are merely missing."""
    freeze(folder, images, THRESHOLD, no_wisdom, redo=True)
    assert frozen(folder) == (images, THRESHOLD)
    assert done(folder) == set()


def test_another_model_redoes_no_image(folder: RunFolder, images: list[ManifestEntry]) -> None:
    """Only scores are made anew; those by other weights of the same name are dropped."""
    with pytest.raises(RunMismatchError, match=r"classify\.model was '', now 'other'.*no image is done again"):
        check(folder, images, MODEL)
    model = SimpleNamespace(name="other", hash="1" * 64)
    freeze(folder, images, MODEL, no_wisdom, models=[model], redo=True)
    assert done(folder) == {"a1", "b2", "c3"}
    folder.scores_of("other").mkdir(parents=True)
    (folder.scores_of("other") / "x.parquet").touch()
    assert not freeze(folder, images, MODEL, no_wisdom, models=[model])
    better = SimpleNamespace(name="other", hash="2" * 64)
    with pytest.raises(RunMismatchError, match="the model other was 111111111111, now 222222222222"):
        check(folder, images, MODEL, models=[better])
    freeze(folder, images, MODEL, no_wisdom, models=[better], redo=True)
    assert not folder.scores_of("other").exists()
    assert done(folder) == {"a1", "b2", "c3"}


def test_another_manifest_altogether_is_never_accepted(folder: RunFolder) -> None:
    """Whoever mistakes the night does not lose one."""
    with pytest.raises(RunMismatchError, match=r"none of its 4 is in this manifest.*choose another --out"):
        freeze(folder, _runs.entries("x", "y"), _runs.CONFIG, no_wisdom, redo=True)
    assert done(folder) == {"a1", "b2", "c3"}


def test_another_version_is_refused_and_redone(
    folder: RunFolder, images: list[ManifestEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is all of one kind."""
    monkeypatch.setattr("batchproc.__version__", "99.0")
    with pytest.raises(RunMismatchError, match=r"batchproc .*, this is 99\.0, which may give other values"):
        freeze(folder, images, _runs.CONFIG, no_wisdom)
    freeze(folder, images, _runs.CONFIG, no_wisdom, redo=True)
    assert folder.version() == "99.0"
    assert done(folder) == set()


def test_strange_results_are_forgotten(folder: RunFolder, images: list[ManifestEntry]) -> None:
    """Done with other settings, from another row, or of no image of the run: whoever put them there."""
    do(folder, images[:1], THRESHOLD)
    do(folder, [replace(images[1], gain=3.0), *_runs.entries("z9")])
    assert drop_strange(folder) == 3
    assert done(folder) == {"c3"}


@pytest.mark.parametrize("kind", ["extend", "redo", "settings"])
def test_a_change_killed_at_any_moment_is_whole(
    begun: Path, tmp_path: Path, images: list[ManifestEntry], kind: str
) -> None:
    """Between any two writes the run is the old one, with all or some of its results, or the new one; whoever reads it
    sees no result under settings that it was not made with, and the same command completes it."""
    new, config = {
        "extend": ([*images, *_runs.entries("e5")], _runs.CONFIG),
        "redo": ([replace(images[0], gain=2.0), images[1], *_runs.entries("e5")], _runs.CONFIG),
        "settings": (images, THRESHOLD),
    }[kind]
    kept = {"extend": {"a1", "b2", "c3"}, "redo": {"b2"}, "settings": set()}[kind]
    flags = {"extend": kind == "extend", "redo": kind != "extend"}
    moment = 0
    while True:
        moment += 1
        folder = RunFolder(Path(shutil.copytree(begun, tmp_path / f"run{moment}")))
        try:
            with killed_at(folder.path, moment):
                freeze(folder, new, config, no_wisdom, **flags)
            break
        except KilledError:
            pass
        assert kept <= done(folder) <= {"a1", "b2", "c3"}
        if folder.read_record()["n_images"] != 4 or folder.config_digest() != _runs.CONFIG.digest:
            assert done(folder) == kept
        assert set(open_catalogue(folder.path)["image_id"]) == done(folder)
        if moment % 2:  # any other driver completes what was accepted
            complete_change(folder)
        freeze(folder, new, config, no_wisdom, **flags)
        assert frozen(folder) == (new, config)
        assert done(folder) == kept
        assert not folder.next.exists()
        assert drop_strange(folder) == 0
    assert moment > 5


def test_a_beginning_killed_at_any_moment_is_begun_again(tmp_path: Path, images: list[ManifestEntry]) -> None:
    """Without run.json nothing was frozen, whatever else lies there; other images may follow."""
    moment = 0
    while True:
        moment += 1
        folder = RunFolder(tmp_path / f"run{moment}")
        try:
            with killed_at(folder.path, moment):
                freeze(folder, images, _runs.CONFIG, no_wisdom)
            break
        except KilledError:
            pass
        assert not folder.record.exists()
        with folder.locked():
            freeze(folder, images[:2], THRESHOLD, no_wisdom)
        assert frozen(folder) == (images[:2], THRESHOLD)
    assert moment > 8


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    """Nothing is written among a user's own files."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        _runs.begin(tmp_path, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["manifest.parquet", "config.toml", "fftw_wisdom"])
def test_a_damaged_frozen_file_is_put_right_by_the_same_command(
    folder: RunFolder, images: list[ManifestEntry], name: str
) -> None:
    """What it said is known by its digest, so whoever says the same again can be believed."""
    whole = (folder.path / name).read_bytes()
    for damage in (b"damaged", None):
        (folder.path / name).unlink() if damage is None else (folder.path / name).write_bytes(damage)
        assert not freeze(folder, images, _runs.CONFIG, no_wisdom)
        assert (folder.path / name).read_bytes() == whole
    assert done(folder) == {"a1", "b2", "c3"}


def test_a_lost_run_json_costs_nothing_that_fits(folder: RunFolder, images: list[ManifestEntry]) -> None:
    """The same command takes the run up again; another one is told what it would delete."""
    folder.record.unlink()
    with pytest.raises(RunMismatchError, match=r"run\.json is lost, and 1 image \(a1\).*--redo"):
        freeze(folder, [replace(images[0], gain=2.0), *images[1:]], _runs.CONFIG, no_wisdom)
    freeze(folder, images, _runs.CONFIG, no_wisdom)
    assert done(folder) == {"a1", "b2", "c3"}
    assert drop_strange(folder) == 0


def test_consequences_are_told_in_numbers() -> None:
    """One image is one image."""
    found = Changes(new=("a",), gone=("b", "c"), again=frozenset("d"), done_again=1, done_gone=2)
    assert found.consequences() == (
        "1 new image to do; 1 image to do again, of which 1 is done; 2 images no longer in the manifest, "
        "the results of 2 of them deleted"
    )


def test_a_run_that_is_redone_has_the_results_of_one_that_was_begun_so(tmp_path: Path) -> None:
    """Through the job: what changed is done and scored again, a failure whose row was corrected is tried again, what is
    gone is gone, and the rest is not touched."""
    steps = job.Steps(_runs.process, _runs.load_model, _runs.no_wisdom, _runs.report)
    config = Config.from_dict({**_runs.CONFIG.to_dict(), "classify": {"model": "stub"}})
    options = {"config": config, "cluster": "serial", "report": False, "quiet": True}
    images = [*_runs.entries("a3", "b4", "c5"), replace(_runs.entries("bad6")[0], gain=1.0)]
    out = tmp_path / "run"
    assert job.run(images, out, steps=steps, **options).exit_code == 1
    kept = (out / "catalogue" / "b4.parquet").stat().st_mtime_ns
    changed = [replace(images[0], gain=2.0), images[1], replace(images[3], gain=2.0), *_runs.entries("d6")]
    plan = job.plan(changed, out, config=config, redo=True)
    assert plan.changes == (
        "1 new image to do; 2 images to do again, of which 1 is done; 1 image no longer in the manifest, the "
        "results of 1 of them deleted",
    )
    assert (plan.images, plan.missing) == (4, 3)
    mended = replace(steps, process=_runs.repaired)
    assert job.run(changed, out, steps=mended, redo=True, **options).exit_code == 0
    assert (out / "catalogue" / "b4.parquet").stat().st_mtime_ns == kept
    catalogue = open_catalogue(out)
    assert catalogue["image_id"].value_counts().to_dict() == {"b4": 4, "a3": 2, "bad6": 2, "d6": 2}
    assert catalogue["score_stub"].notna().all()


@pytest.mark.parametrize("damage", [b"damaged", None])
def test_a_change_does_not_take_damaged_wisdom_over(
    folder: RunFolder, images: list[ManifestEntry], damage: bytes | None
) -> None:
    """It is put right first: by its digest it would be good from then on, and the values of new images other ones."""
    folder.wisdom_file.unlink() if damage is None else folder.wisdom_file.write_bytes(damage)
    freeze(folder, [*images, *_runs.entries("e5")], _runs.CONFIG, no_wisdom, extend=True)
    assert folder.wisdom_file.read_text() == no_wisdom()
    assert not freeze(folder, [*images, *_runs.entries("e5")], _runs.CONFIG, no_wisdom)


def test_a_change_of_a_run_whose_run_json_is_lost_is_not_carried_out(
    folder: RunFolder, images: list[ManifestEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the folder is begun with anew is what counts, not what had been accepted before it was lost."""
    with monkeypatch.context() as patch:
        patch.setattr("batchproc.io.freeze.complete_change", lambda folder: None)
        freeze(folder, images[:2], _runs.CONFIG, no_wisdom, redo=True)
    assert folder.next.is_dir()
    folder.record.unlink()
    freeze(folder, images, _runs.CONFIG, no_wisdom)
    complete_change(folder)
    assert frozen(folder) == (images, _runs.CONFIG)
    assert done(folder) == {"a1", "b2", "c3"}
