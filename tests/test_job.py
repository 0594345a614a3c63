"""One run = one call: the same bytes wherever it runs, resumed after any kill, failures told apart from bugs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import batchproc
from batchproc import open_catalogue, open_stamps
from batchproc.config import Config
from batchproc.distribute.scoring import plan_chunks
from batchproc.errors import ConfigError, ModelError, RunMismatchError
from batchproc.io.cards import InputCard, ModelCard
from batchproc.io.models import file_hash, load_model
from batchproc.io.run_folder import RunFolder
from batchproc.job import Steps, classify, plan, retry, run
from tests import _runs

STUBS = Steps(process=_runs.process, model=_runs.load_model, wisdom=_runs.no_wisdom, report=_runs.report)
SERIAL = {"cluster": "serial", "steps": STUBS, "quiet": True}
NAMES = ("n3", "n40", "bad", "n0", "n33")


@pytest.fixture
def scheduler(dask_executor):
    """The address of a scheduler with two workers."""
    return dask_executor.client.scheduler.address


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the results, by its path."""
    parts = [path for name in ("catalogue", "stamps", "scores") for path in (folder / name).rglob("*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in parts if path.is_file()}


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("threads = [")])
def test_lost_settings_are_written_anew_by_the_same_command(tmp_path, damage):
    """Where they were the defaults none need be given; others must be, and the message names the file."""
    for config in (Config(), _runs.CONFIG):
        folder = RunFolder(tmp_path / config.digest)
        run(_runs.entries("n3"), folder.path, config=config, report=False, **SERIAL)
        damage(folder.config_file)
        if config != Config():
            with pytest.raises(ConfigError, match=r"config\.toml"):
                run(_runs.entries("n3"), folder.path, report=False, **SERIAL)
        given = None if config == Config() else config
        assert run(_runs.entries("n3"), folder.path, config=given, report=False, **SERIAL).exit_code == 0
        assert folder.config() == config


def test_a_run_from_beginning_to_end(tmp_path):
    """Catalogue, stamps, scores, failures, receipts, settings and report are there; the exit code tells."""
    config = replace(_runs.CONFIG, classify=replace(_runs.CONFIG.classify, model="stub"))
    summary = run(_runs.entries(*NAMES), tmp_path / "run", config=config, **SERIAL)
    assert summary.exit_code == 1
    assert (summary.processed, summary.scored, summary.status.done, summary.status.failed) == (5, 76, 4, 1)
    catalogue = open_catalogue(tmp_path / "run")
    assert len(catalogue) == 76 == len(open_stamps(tmp_path / "run"))
    np.testing.assert_array_equal(catalogue["score_stub"], catalogue["scorr"] / 100)
    failures = pd.read_parquet(tmp_path / "run" / "failures.parquet")
    assert failures["image_id"].tolist() == ["bad"]
    assert "needs 8: check the WCS" in failures["message"][0]
    receipts = pd.read_parquet(tmp_path / "run" / "receipts.parquet")
    assert sorted(receipts["image_id"]) == sorted(NAMES)
    assert "store" in json.loads(receipts.set_index("image_id").loc["n3", "seconds"])
    assert Config.from_toml(tmp_path / "run" / "config.toml") == config
    assert summary.report == tmp_path / "run" / "report.html"


def test_serial_and_dask_write_the_same_bytes(tmp_path, scheduler):
    """Wherever and in whatever order it runs, every file of the results is the same."""
    config = replace(_runs.CONFIG, classify=replace(_runs.CONFIG.classify, model="stub"))
    run(_runs.entries(*NAMES), tmp_path / "a", config=config, **SERIAL)
    run(_runs.entries(*NAMES), tmp_path / "b", config=config, **SERIAL | {"cluster": scheduler})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == 4 + 3 * 2 + 1


def test_again_does_only_what_is_missing(tmp_path):
    """A rerun tries nothing that was tried, failures included; an image whose marker is gone is done again."""
    images = _runs.entries(*NAMES)
    run(images, tmp_path / "run", config=_runs.CONFIG, **SERIAL)
    before = contents(tmp_path / "run")
    assert run(images, tmp_path / "run", **SERIAL).processed == 0
    RunFolder(tmp_path / "run").marker("n3").unlink()
    again = run(images, tmp_path / "run", **SERIAL)
    assert (again.processed, again.status.done, again.exit_code) == (1, 4, 1)
    assert contents(tmp_path / "run") == before


def test_retry_takes_up_failures(tmp_path):
    """What failed is tried again with the frozen settings; what works now leaves the table of failures."""
    run(_runs.entries("bad1", "bug2", "n3"), tmp_path / "run", config=_runs.CONFIG, **SERIAL)
    repaired = replace(STUBS, process=_runs.repaired)
    summary = retry(tmp_path / "run", **SERIAL | {"steps": repaired})
    assert (summary.processed, summary.status.done, summary.exit_code) == (2, 3, 0)
    assert len(pd.read_parquet(tmp_path / "run" / "failures.parquet")) == 0
    assert open_catalogue(tmp_path / "run")["image_id"].tolist() == ["bad1"] * 2 + ["bug2"] * 2 + ["n3"] * 3


def test_a_bug_is_recorded_with_its_traceback(tmp_path):
    """The run goes on and says so in its exit code."""
    summary = run(_runs.entries("n1", "bug", "n2"), tmp_path / "run", config=_runs.CONFIG, **SERIAL)
    assert (summary.exit_code, summary.stopped, summary.status.done, summary.status.bugs) == (3, False, 2, 1)
    row = pd.read_parquet(tmp_path / "run" / "failures.parquet").iloc[0]
    assert (row["status"], row["error"]) == ("bug", "ZeroDivisionError")
    assert "nobody thought of this" in row["traceback"]


def test_too_many_bugs_stop_the_campaign(tmp_path):
    """After the limit nothing more is begun; what has been done is kept, and the rest is missing."""
    names = ["n1", *(f"bug{i}" for i in range(20)), "n2"]
    summary = run(_runs.entries(*names), tmp_path / "run", config=_runs.CONFIG, max_bugs=3, **SERIAL)
    assert (summary.exit_code, summary.stopped) == (3, True)
    assert (summary.status.done, summary.status.bugs, summary.status.missing) == (1, 4, 17)


def test_a_deadly_image_is_a_failure_and_its_neighbours_are_not(tmp_path, scheduler):
    """An image that kills its worker is recorded as such; all the others are done."""
    names = ("n1", "deadly", *(f"n{i}" for i in range(2, 10)))
    summary = run(_runs.entries(*names), tmp_path / "run", config=_runs.CONFIG, **SERIAL | {"cluster": scheduler})
    assert (summary.status.done, summary.status.failed, summary.exit_code) == (9, 1, 1)
    row = pd.read_parquet(tmp_path / "run" / "failures.parquet").iloc[0]
    assert (row["image_id"], row["error"]) == ("deadly", "CrashError")
    assert "exit code 9" in row["message"]


def test_a_killed_driver_is_resumed(tmp_path):
    """SIGKILL in the middle of a run: the next one does the rest, and the results are those of an undisturbed run."""
    names = [f"slow{i}" for i in range(8)]
    code = (
        "from tests.test_job import SERIAL, _runs, run\n"
        f"run(_runs.entries(*{names}), {str(tmp_path / 'run')!r}, config=_runs.CONFIG, **SERIAL)"
    )
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    ) as driver:
        done = tmp_path / "run" / "done"
        deadline = time.monotonic() + 60
        while len(list(done.glob("[!.]*"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    n_done = len(list(done.glob("[!.]*")))
    assert 3 <= n_done < 8
    assert len(open_catalogue(tmp_path / "run")["image_id"].unique()) == len(
        [n for n in names[:n_done] if n != "slow0"]
    )
    summary = run(_runs.entries(*names), tmp_path / "run", **SERIAL)
    assert (summary.processed, summary.status.done, summary.exit_code) == (8 - n_done, 8, 0)
    assert len(pd.read_parquet(tmp_path / "run" / "receipts.parquet")) == 8
    run(_runs.entries(*names), tmp_path / "other", config=_runs.CONFIG, **SERIAL)
    assert contents(tmp_path / "run") == contents(tmp_path / "other")


@pytest.mark.parametrize("step", ["write_part", "write_stamps", "write_marker"])
def test_a_task_that_dies_between_its_steps_is_not_trusted(tmp_path, monkeypatch, step):
    """Wherever a task dies, a rerun does the image again and ends with what an undisturbed one writes."""

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"batchproc.io.store.{step}", killed)
        with pytest.raises(KeyboardInterrupt):
            run(_runs.entries("n3", "n4"), tmp_path / "run", config=_runs.CONFIG, **SERIAL)
    assert len(open_catalogue(tmp_path / "run")) == len(open_stamps(tmp_path / "run")) == 0
    assert run(_runs.entries("n3", "n4"), tmp_path / "run", **SERIAL).processed == 2
    run(_runs.entries("n3", "n4"), tmp_path / "other", config=_runs.CONFIG, **SERIAL)
    assert contents(tmp_path / "run") == contents(tmp_path / "other")


def test_other_settings_are_refused_before_anything_happens(tmp_path):
    """A run is one set of images and settings; given none, it takes its own."""
    run(_runs.entries("n1"), tmp_path / "run", config=_runs.CONFIG, **SERIAL)
    with pytest.raises(RunMismatchError, match=r"cutouts\.size was 9, now 63"):
        run(_runs.entries("n1"), tmp_path / "run", config=Config(), **SERIAL)
    with pytest.raises(RunMismatchError, match="n2 is new"):
        plan(_runs.entries("n1", "n2"), tmp_path / "run")
    assert run(_runs.entries("n1"), tmp_path / "run", **SERIAL).exit_code == 0


@pytest.mark.parametrize(
    "again", [lambda out: run(_runs.entries("n1"), out, **SERIAL), lambda out: retry(out, **SERIAL)]
)
def test_another_version_is_refused(tmp_path, monkeypatch, again):
    """A run is of one version; the message shows both, and how to go on."""
    run(_runs.entries("n1"), tmp_path / "run", config=_runs.CONFIG, **SERIAL)
    version = batchproc.__version__
    monkeypatch.setattr(batchproc, "__version__", "99.0")
    with pytest.raises(RunMismatchError, match=rf"batchproc {version}, this is 99\.0.*another --out"):
        again(tmp_path / "run")


def test_a_folder_begun_anew_is_another_run(tmp_path):
    """Deleted and begun again at the same path in the same process, a run is done with its own settings."""
    steps = replace(STUBS, process=_runs.as_configured)
    for threshold in (4.0, 7.0):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        config = replace(_runs.CONFIG, detect=replace(_runs.CONFIG.detect, threshold=threshold))
        run(_runs.entries("a"), tmp_path / "run", config=config, **SERIAL | {"steps": steps})
        assert len(open_catalogue(tmp_path / "run")) == threshold


def test_markers_of_other_settings_are_not_trusted(tmp_path):
    """An image that was done with other settings, or whose marker cannot be read, is missing."""
    images = _runs.entries("n1", "n2", "n3")
    run(images, tmp_path / "run", config=_runs.CONFIG, **SERIAL)
    folder = RunFolder(tmp_path / "run")
    marker = json.loads(folder.marker("n1").read_text())
    folder.marker("n1").write_text(json.dumps(marker | {"config_digest": "another"}))
    folder.marker("n2").write_text("")
    again = run(images, folder.path, **SERIAL)
    assert (again.processed, again.status.done) == (2, 3)


def test_a_model_that_is_not_there_is_known_before_the_first_image(tmp_path):
    """No image is processed for a run that could not be scored."""
    config = replace(_runs.CONFIG, classify=replace(_runs.CONFIG.classify, model="nonsense"))
    with pytest.raises(ModelError):
        run(_runs.entries("n1"), tmp_path / "run", config=config, **SERIAL)
    assert not (tmp_path / "run").exists()


def test_scoring_does_what_is_missing(tmp_path):
    """A second model scores beside the first; a model scores what it has not scored; whole images to a chunk."""
    run(_runs.entries("n3", "n4"), tmp_path / "run", config=_runs.CONFIG, **SERIAL)
    folder = RunFolder(tmp_path / "run")
    chunks = list(plan_chunks(folder, [SimpleNamespace(name="stub", hash="", fingerprint="")], size=3))
    assert [[place.image_id for place in chunk.places] for chunk in chunks] == [["n3"], ["n4"]]
    assert classify(folder.path, "stub", **SERIAL).candidates == 7
    assert classify(folder.path, "stub", **SERIAL).candidates == 0
    assert classify(folder.path, "other", **SERIAL).candidates == 7
    catalogue = open_catalogue(folder.path)
    assert (catalogue["score_stub"] == catalogue["score_other"]).all()


def small_model(folder: Path) -> Path:
    """One network in ONNX and in TFLite."""
    folder.mkdir()
    files = {}
    for variant, name, layout in (("float", "small.onnx", "NCHW"), ("int8", "small_int8.tflite", "NHWC")):
        copy = shutil.copy(Path(__file__).parent / "io" / "golden" / name, folder)
        files[variant] = {"path": name, "sha256": file_hash(copy), "layout": layout}
    card = ModelCard("small", "1", "A small network.", "BSD-3-Clause", 0.5, "float", InputCard(5, "none"), files)
    (folder / "card.toml").write_text(card.to_toml())
    return folder


def test_the_settings_say_what_runs_a_model(tmp_path):
    """TFLite like ONNX; a GPU that is not there is refused before anything is begun."""
    folder = small_model(tmp_path / "small")
    steps = {"steps": replace(STUBS, model=Steps().model)}
    run(_runs.entries("n3", "n4"), tmp_path / "run", config=_runs.CONFIG, **SERIAL)
    text = (folder / "card.toml").read_text()
    if importlib.util.find_spec("ai_edge_litert"):
        (folder / "card.toml").write_text(text.replace('default_variant = "float"', 'default_variant = "int8"'))
        assert classify(tmp_path / "run", str(folder), **SERIAL | steps).candidates == 7
        exact = load_model(folder, variant="float").predict(open_stamps(tmp_path / "run"))
        catalogue = open_catalogue(tmp_path / "run")
        np.testing.assert_allclose(catalogue["score_small"], exact[catalogue["stamp_index"]], atol=0.02)
    config = replace(_runs.CONFIG, classify=replace(_runs.CONFIG.classify, model=str(folder), device="gpu"))
    with pytest.raises(ModelError, match="CUDAExecutionProvider is not in this ONNX Runtime"):
        run(_runs.entries("n3"), tmp_path / "gpu", config=config, **SERIAL | steps)
    assert not (tmp_path / "gpu" / "manifest.parquet").exists()
    with pytest.raises(ModelError, match="CUDAExecutionProvider is not in this ONNX Runtime"):
        classify(tmp_path / "run", str(folder), device="gpu", **SERIAL | steps)


def test_a_model_that_does_not_fit_leaves_the_images_done(tmp_path):
    """What the images gave is kept; the summary says what was wrong with the scoring."""
    config = replace(_runs.CONFIG, classify=replace(_runs.CONFIG.classify, model="unfit"))
    summary = run(_runs.entries("n3"), tmp_path / "run", config=config, **SERIAL)
    assert summary.status.done == 1
    assert "stamps of 9 pixels" in summary.problem
    assert summary.exit_code == 3


def test_a_bug_in_scoring_leaves_a_report_and_a_summary(tmp_path):
    """Whatever the scoring raises is told after the images, beside what the report has to complain of."""
    config = replace(_runs.CONFIG, classify=replace(_runs.CONFIG.classify, model="broken"))
    summary = run(_runs.entries("n3"), tmp_path / "run", config=config, **SERIAL)
    assert (summary.status.done, summary.exit_code, summary.report) == (1, 3, tmp_path / "run" / "report.html")
    assert "nobody thought of this layer" in summary.problem
    both = run(_runs.entries("n3"), tmp_path / "run", **SERIAL | {"steps": replace(STUBS, report=_runs.broken_report)})
    assert "nobody thought of this layer" in both.problem
    assert "no ink" in both.problem


def test_a_report_that_fails_hides_nothing(tmp_path):
    """The run's own result is told, with the traceback of the report."""
    broken = replace(STUBS, report=_runs.broken_report)
    summary = run(_runs.entries("n3"), tmp_path / "run", config=_runs.CONFIG, **SERIAL | {"steps": broken})
    assert (summary.status.done, summary.report, summary.exit_code) == (1, None, 3)
    assert "no ink" in summary.problem


def test_a_plan_computes_nothing(tmp_path):
    """Images, bytes and files are told beforehand; time and memory once some images have been measured."""
    names = [f"n{i}" for i in range(30)]
    before = plan(_runs.entries(*names), tmp_path / "run", config=_runs.CONFIG)
    assert (before.images, before.missing, before.measured, before.missing_files) == (30, 30, 0, 31)
    assert before.bytes_out > 0
    assert not (tmp_path / "run").exists()
    pilot = run(_runs.entries(*names), tmp_path / "run", config=_runs.CONFIG, pilot=4, **SERIAL)
    assert (pilot.processed, pilot.status.missing) == (4, 26)
    after = plan(_runs.entries(*names), tmp_path / "run")
    assert (after.done, after.missing, after.measured) == (4, 26, 4)
    assert after.seconds_per_image >= 0.5  # what the stand-in says, and the storing
    assert after.seconds(2) == pytest.approx(13 * after.seconds_per_image)


def test_progress_is_told_to_who_waits(tmp_path, capsys):
    """Elsewhere than on a terminal: a line with the number, the rate and the failures."""
    run(_runs.entries("n1", "bad", "n2"), tmp_path / "run", config=_runs.CONFIG, **SERIAL | {"quiet": False})
    told = capsys.readouterr()
    assert told.out == ""
    assert "3/3 images" in told.err
    assert "(1 failed)" in told.err


def test_progress_counts_what_was_done_before(tmp_path, capsys):
    """A pilot is as long as itself; the run that goes on begins where it ended; a retry is of what failed."""
    images = _runs.entries("n1", "bad", "n2", "n3", "n4")
    told = []
    for options in ({"pilot": 1}, {}):
        run(images, tmp_path / "run", config=_runs.CONFIG, **SERIAL | options | {"quiet": False})
        told.append(capsys.readouterr().err)
    retry(tmp_path / "run", **SERIAL | {"quiet": False})
    assert "1/1 images" in told[0]
    assert "5/5 images" in told[1]
    assert "1/1 images" in capsys.readouterr().err
