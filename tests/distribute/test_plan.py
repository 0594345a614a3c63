"""A plan tells what a run would do, from a sample, and does nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from batchproc import job
from batchproc.cli.texts import tell_plan
from batchproc.distribute import plan as module
from batchproc.distribute.clusters import Where
from batchproc.distribute.plan import Plan, largest_need, plan_run
from batchproc.distribute.prediction import Prediction, predict_memory
from batchproc.errors import UsageError
from batchproc.io.packs import next_pack_number, roll_up
from batchproc.io.run_folder import RunFolder
from batchproc.records import ManifestEntry
from tests import _runs

PLAN = Plan(10, 0, 0, 10, 0, 0.0, 0.0, 0, Prediction(), 0, math.nan, math.nan, math.nan)


def image(path: Path, shape: tuple[int, int]) -> str:
    """A FITS file of that shape."""
    fits.PrimaryHDU(np.zeros(shape, np.float32)).writeto(path)
    return str(path)


def test_of_a_long_manifest_a_sample_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many images there are, a few hundred are looked for and a few headers read; the numbers are of all."""
    new, ref = image(tmp_path / "new.fits", (30, 40)), image(tmp_path / "ref.fits", (30, 40))
    entries = [ManifestEntry(f"i{i}", new if i % 2 else f"{new}[0]", (ref,)) for i in range(100_000)]
    asked: list[str] = []
    headers: list[str] = []
    is_file, predict = Path.is_file, module.predict_image
    monkeypatch.setattr(Path, "is_file", lambda path: asked.append(str(path)) or is_file(path))
    monkeypatch.setattr(module, "predict_image", lambda entry: headers.append(entry.image_id) or predict(entry))
    plan = plan_run(RunFolder(tmp_path / "run"), entries, _runs.CONFIG)
    assert len(asked) < 10
    assert len(headers) <= 16
    assert plan.bytes_in == 100_000 * (Path(new).stat().st_size + Path(ref).stat().st_size)
    assert plan.need.bytes == predict_memory(1200, [1200])
    assert plan.files_out <= 100_000 / 20
    assert not (tmp_path / "run").exists()


def test_the_largest_images_are_among_those_looked_at(tmp_path: Path) -> None:
    """One large image among hundreds is found by the size of its file."""
    small, large = image(tmp_path / "small.fits", (30, 40)), image(tmp_path / "large.fits", (300, 400))
    entries = [ManifestEntry(f"i{i}", small, (small,)) for i in range(400)]
    entries[137] = ManifestEntry("large", large, (large,))
    need = largest_need(entries)
    assert (need.image_id, need.shape, need.refs) == ("large", (300, 400), ((300, 400),))
    assert largest_need([]) == Prediction()


def test_what_images_leave_is_measured_where_some_are_done(tmp_path: Path) -> None:
    """Loose or packed, the bytes of an image are those of its rows, stamps and marker."""
    folder = _runs.begin(tmp_path / "run", *(f"i{k}" for k in range(60)))
    entries = folder.entries()
    for k in range(30):
        _runs.store(folder, f"i{k}", 20, cpu_seconds=7200.0)
    loose = plan_run(folder, entries, _runs.CONFIG)
    assert (loose.done, loose.missing, loose.measured) == (30, 30, 30)
    files = [p for d in ("catalogue", "stamps", "done") for p in (folder.path / d).rglob("*") if p.is_file()]
    assert loose.bytes_out == pytest.approx(sum(p.stat().st_size for p in files))
    assert loose.cpu_hours == pytest.approx(60)
    roll_up(folder, next_pack_number(folder), [f"i{k}" for k in range(30)])
    packed = plan_run(folder, entries, _runs.CONFIG)
    assert (packed.done, packed.missing, packed.measured) == (30, 30, 30)
    assert 0.3 * loose.bytes_out < packed.bytes_out <= loose.bytes_out


def test_images_to_be_done_again_are_to_do(tmp_path: Path) -> None:
    """Though they were tried; and what changes is handed on."""
    folder = _runs.begin(tmp_path / "run", "a", "b", "c")
    for name in "abc":
        _runs.store(folder, name, 3)
    plan = plan_run(folder, folder.entries(), _runs.CONFIG, again={"b"}, changes=("1 image to do again",))
    assert (plan.done, plan.missing) == (2, 1)
    assert tell_plan(plan, Where("serial")).startswith("changed: 1 image to do again\n3 images: 2 done")


@pytest.mark.parametrize(("seconds", "tasks"), [(math.nan, 100_000), (5.0, 100_000), (0.5, 10_000), (0.001, 500)])
def test_short_images_share_tasks(seconds: float, tasks: int) -> None:
    """About five seconds of work to a task, two hundred images at most."""
    measured = 0 if math.isnan(seconds) else 3
    plan = replace(PLAN, missing=100_000, measured=measured, seconds_per_image=seconds)
    assert plan.tasks(2) == tasks


@pytest.mark.parametrize("images", [1, 19, 20, 519, 520, 100_000])
def test_files_are_counted_as_they_will_be_after_packing(images: int) -> None:
    """Packs of five hundred; nineteen images at most stay by themselves."""
    alone = images % 500 if images % 500 < 20 else 0
    packs = -(-(images - alone) // 500)
    assert module._files_out(images, models=0) == module._RUN_FILES + 5 * (packs + alone)
    assert module._files_out(0, models=1) == 0


def test_a_run_is_held_against_the_memory_that_its_plan_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A serial run spreads no tiles, however many cores there are."""
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", 22 * 10**8)
    monkeypatch.setattr("dask.system.CPU_COUNT", 16)
    need = Prediction("i", 17 * 10**8, (4096, 4096), ((4096, 4096),), 1)
    monkeypatch.setattr(job, "largest_need", lambda entries: need)
    replace(PLAN, missing=1, need=need).fit(Where("serial")).check()
    work = job._Job(
        RunFolder(tmp_path), _runs.CONFIG, job.Steps(), Where("serial"), report=False, max_bugs=0, quiet=True
    )
    work.place(_runs.entries("i"), [])


@pytest.mark.parametrize(("cluster", "tasks"), [("local", 8), ("site.toml", 5)])
def test_jobs_are_asked_for_by_images(monkeypatch, tmp_path, cluster, tasks):
    """Processes of this machine help with the tiles of few large images; no job is paid for that has no image."""
    monkeypatch.chdir(tmp_path)
    Path("site.toml").write_text('system = "slurm"\ncores = 4\nmemory = "64GB"\nwalltime = "01:00:00"\nmax_jobs = 9\n')
    monkeypatch.setattr(job, "largest_need", lambda entries: Prediction("i", 10**9, (4096, 4096), ((4096, 4096),), 1))
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", 64 * 10**9)
    monkeypatch.setattr(Where, "check", lambda where: None)
    monkeypatch.setattr(job, "open_executor", lambda where, threads, tasks, large, folder, resources: tasks)
    where = Where(cluster, 8 if cluster == "local" else None)
    work = job._Job(RunFolder(tmp_path), _runs.CONFIG, job.Steps(), where, report=False, max_bugs=0, quiet=True)
    assert work.place(_runs.entries(*"abcde"), []) == tasks


def test_memory_is_held_against_what_a_worker_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of one machine share its memory; the advice is what fits, and tiles under way count."""
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", 8 * 10**9)
    need = Prediction("i", 10**9, (3000, 3000), ((3000, 3000),), 1)
    plan = replace(PLAN, missing=100, need=need)
    plan.fit(Where("serial")).check()
    plan.fit(Where("local", 6)).check()
    assert "memory: up to 1 GB a worker (image i, 3000 x 3000 pixels), of 1.2 GB" in tell_plan(plan, Where("local", 6))
    with pytest.raises(UsageError, match="`--workers 6` leaves enough for each"):
        plan.fit(Where("local", 16)).check()
    replace(plan, missing=4).fit(Where("local", 16)).check()  # no more workers than images
    spread = replace(plan, missing=1, wanted_spread="tiles")
    assert spread.fit(Where("local", 4)).need.bytes == 10**9 + 8 * 1024**2 * 72
    spread.fit(Where("local", 16)).check()


def test_the_first_image_of_a_process_is_not_what_the_rest_will_be_like(tmp_path: Path) -> None:
    """It loads and compiles; where there are others, time and memory are theirs."""
    folder = _runs.begin(tmp_path / "run", "a", "b", "c")
    for name, seconds, metadata in (("a", 60.0, {"first_of_process": True}), ("b", 2.0, {})):
        costs = {"seconds": {"read": seconds}, "cpu_seconds": seconds, "peak_memory_mb": 10 * seconds}
        _runs.store(folder, name, 3, **costs, metadata=metadata)
        plan = plan_run(folder, folder.entries(), _runs.CONFIG)
        assert plan.measured == 1
        assert plan.cpu_seconds_per_image == seconds
        assert plan.peak_memory_mb == 10 * seconds
