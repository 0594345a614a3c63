"""Campaigns on a real Slurm: jobs are cancelled, run out of time and memory, drivers are killed; nothing is lost.

``python -m pytest -m slurm tests/slurm``
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from batchproc import open_catalogue, open_stamps
from batchproc.io.events import read_events
from batchproc.io.night import simulate_night
from batchproc.io.run_folder import RunFolder
from batchproc.io.status import read_status
from tests.slurm import _driver
from tests.slurm.conftest import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("no_jobs_left")]

SITE = """
system = "slurm"
interface = "lo"
cores = {cores}
memory = "{memory}"
walltime = "{walltime}"
margin = {margin}
min_jobs = {jobs}
max_jobs = {jobs}
scratch = "{scratch}"
[driver]
memory = "1GB"
walltime = "{driver}"
"""


@dataclass(frozen=True)
class Campaign:
    """A run folder, its profile, and where its workers leave their notes."""

    folder: Path
    profile: Path
    seen: Path
    drivers: list[subprocess.Popen] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "RUN"

    def driver(self, n: int, kind: str = "plain") -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.slurm._driver", str(self.run), str(n), kind, str(self.profile)]
        with (self.folder / "driver.txt").open("ab") as output:
            self.drivers.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output))
        return self.drivers[-1]

    def notes(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in self.seen.glob("*.json")]

    def done(self) -> int:
        return read_status(RunFolder(self.run)).done if RunFolder(self.run).record.is_file() else 0

    def events(self, *kinds: str) -> list[dict]:
        return [event for event in read_events(RunFolder(self.run)) if event["event"] in kinds]

    def said(self) -> str:
        logs = sorted((self.run / "log" / "jobs").glob("*")) if self.run.is_dir() else []
        texts = [path.read_text(errors="replace")[-3000:] for path in logs]
        driver = self.folder / "driver.txt"
        return "\n".join([driver.read_text(errors="replace")[-5000:] if driver.exists() else "", *texts])


@pytest.fixture
def campaign(tmp_path, monkeypatch) -> Iterator[Callable[..., Campaign]]:
    def make(**settings) -> Campaign:
        values = {"cores": 1, "walltime": "00:10:00", "margin": 0, "jobs": 2, "driver": "00:10:00"} | settings
        values = {"memory": f"{values['cores']}GB"} | values
        profile, seen, scratch = tmp_path / "site.toml", tmp_path / "seen", tmp_path / "scratch"
        seen.mkdir()
        profile.write_text(SITE.format(**values, scratch=scratch))
        monkeypatch.setenv("BATCHPROC_TEST_SEEN", str(seen))
        made.append(Campaign(tmp_path, profile, seen))
        return made[-1]

    made: list[Campaign] = []
    yield make
    for driver in (driver for there in made for driver in there.drivers if driver.poll() is None):
        driver.kill()
        driver.wait()


def until(condition: Callable[[], bool], seconds: float, campaign: Campaign) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, campaign.said()
        time.sleep(0.3)


def jobs(*options: str) -> list[str]:
    """Numbers of the jobs on the queue."""
    command = ["squeue", "--noheader", "--format=%A", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def finish(driver: subprocess.Popen, campaign: Campaign, killed: bool = False) -> None:
    """Wait for a driver that does all there is to do and leaves nothing behind, but for killed jobs' scratch."""
    assert driver.wait(200) == 0, campaign.said()
    assert jobs("--states=pending,configuring,running,suspended") == []
    until(lambda: not jobs(), 15, campaign)  # until those that were cancelled have gone
    assert list((campaign.run / "log").glob("tls-*")) == []
    assert killed or list((campaign.folder / "scratch").iterdir()) == []


def results(run: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows and stamps, in an order that does not depend on who did what when."""
    rows = open_catalogue(run).sort_values("candidate_id", ignore_index=True)
    stamps = open_stamps(run)
    return rows.drop(columns="stamp_index"), np.stack([stamps[int(i)] for i in rows["stamp_index"]])


def assert_same_results(campaign: Campaign, n: int, kind: str, tmp_path: Path, monkeypatch) -> None:
    """Exactly what a serial run on this machine gives."""
    monkeypatch.setattr(_driver.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(_driver.subprocess, "run", lambda *arguments, **options: None)
    serial = _driver.go(tmp_path / "serial", n, kind, "serial", quiet=True)
    monkeypatch.undo()
    assert serial.exit_code == 0
    (rows, stamps), (expected_rows, expected_stamps) = results(campaign.run), results(tmp_path / "serial")
    assert len(rows) > n
    pd.testing.assert_frame_equal(rows, expected_rows)
    np.testing.assert_array_equal(stamps, expected_stamps)


def test_a_profile_takes_a_run_to_its_end(campaign, tmp_path, monkeypatch):
    """Two jobs of two workers: each process has one thread and the job's scratch; the way to the page is told."""
    there = campaign(cores=2)
    driver = there.driver(40)
    until(lambda: there.done() > 4, 60, there)
    keys = list((there.run / "log").glob("tls-*"))
    assert [path.stat().st_mode & 0o777 for path in keys] == [0o700]
    finish(driver, there)
    notes = there.notes()
    assert {note["threads"] for note in notes} == {"1"}
    assert len({note["job"] for note in notes}) == 2
    assert len({note["pid"] for note in notes}) == 4
    for note in notes:
        assert note["scratch"].startswith(f"{tmp_path}/scratch/batchproc-")
        assert note["temporary"] == note["scratch"]
    assert re.search(r"ssh -N -L \d+:127\.0\.0\.1:\d+ \S+", there.said())
    assert len(list((there.run / "log" / "jobs").iterdir())) == 2  # one file a job
    assert_same_results(there, 40, "plain", tmp_path, monkeypatch)


def test_cancelled_jobs_are_replaced(campaign, tmp_path, monkeypatch):
    """One job is cancelled, later all of them: others take their place, and every image is done once."""
    there = campaign()
    driver = there.driver(40)
    until(lambda: there.done() > 3, 60, there)
    subprocess.run(["scancel", jobs()[0]], check=True)
    until(lambda: there.done() > 15, 90, there)
    subprocess.run(["scancel", *jobs()], check=True)
    finish(driver, there)
    assert len({note["job"] for note in there.notes()}) >= 4
    assert_same_results(there, 40, "plain", tmp_path, monkeypatch)


def test_workers_leave_before_their_walltime(campaign, tmp_path, monkeypatch):
    """Jobs of one minute for a run of two: no worker is in the middle of an image when its time is over."""
    there = campaign(walltime="00:01:00", margin=12)
    finish(there.driver(180), there)
    assert len({note["job"] for note in there.notes()}) >= 4
    assert there.events("image_lost") == []
    assert len(there.notes()) == 180
    assert_same_results(there, 180, "plain", tmp_path, monkeypatch)


def test_jobs_that_reach_their_walltime_lose_nothing(campaign, tmp_path, monkeypatch):
    """Images that take longer than the margin are cut off with their job; they are done by the next one."""
    there = campaign(walltime="00:01:00", margin=1)
    finish(there.driver(24, "long"), there)
    assert len({note["job"] for note in there.notes()}) >= 4
    assert_same_results(there, 24, "long", tmp_path, monkeypatch)


def test_a_job_killed_for_its_memory_is_replaced(campaign, tmp_path, monkeypatch):
    """Slurm kills the job with the image that needed too much and with its neighbours; nobody is blamed for good."""
    there = campaign(cores=2)
    finish(there.driver(40, "hungry"), there, killed=True)
    assert len(list(there.seen.glob("ate-*"))) == 2
    assert len({note["job"] for note in there.notes()}) >= 3
    assert_same_results(there, 40, "hungry", tmp_path, monkeypatch)


def test_a_killed_driver_leaves_no_jobs_and_goes_on(campaign, tmp_path, monkeypatch):
    """Workers without a scheduler end by themselves; the same command again does what is missing, and no more."""
    there = campaign()
    driver = there.driver(40)
    until(lambda: there.done() > 5, 60, there)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = len(there.notes())
    until(lambda: not jobs(), 120, there)
    finish(there.driver(40), there)
    assert len(there.notes()) - before <= 40 - 5
    assert_same_results(there, 40, "plain", tmp_path, monkeypatch)


def submitted(there: Campaign, n: int):
    """The driver of a made-up run as a job."""
    from batchproc.submit import prepare

    manifest = there.folder / "unused.csv"
    submission, _ = prepare(manifest, there.run, str(there.profile))
    command = (sys.executable, "-m", "tests.slurm._driver", str(there.run), str(n), "plain", str(there.profile))
    return replace(submission, command=command).hand_in()


def test_a_driver_goes_on_in_another_job(campaign, tmp_path, monkeypatch):
    """Its walltime is too short for the run: it ends in time, hands itself in again, and takes no worker along."""
    monkeypatch.chdir(ROOT)
    there = campaign(driver="00:01:00")
    submitted(there, 160)
    until(lambda: there.done() == 160 and not jobs(), 240, there)
    assert len(list((there.run / "log" / "jobs").glob("bp-RUN-*"))) >= 2
    assert "handed in again" in there.said()
    assert list((there.run / "log").glob("tls-*")) == []
    assert_same_results(there, 160, "plain", tmp_path, monkeypatch)


def test_a_cancelled_driver_stays_away_until_it_is_submitted_again(campaign, tmp_path, monkeypatch):
    """What one is told ends it: its workers go, nothing comes back; submitting it again does what is missing."""
    monkeypatch.chdir(ROOT)
    there = campaign()
    submission = submitted(there, 40)
    until(lambda: there.done() > 5, 60, there)
    subprocess.run(submission.stop_command().split(), check=True)
    until(lambda: not jobs(), 120, there)
    time.sleep(3)
    assert jobs() == []
    assert 5 < there.done() < 40
    submitted(there, 40)
    until(lambda: there.done() == 40 and not jobs(), 150, there)
    assert_same_results(there, 40, "plain", tmp_path, monkeypatch)


def test_the_command_line_from_images_to_a_finished_run(campaign, tmp_path, monkeypatch):
    """Real images by ``batchproc submit``: the same bytes of results as ``batchproc run`` gives here."""
    there = campaign(cores=2, jobs=1, memory="3GB")
    manifest = simulate_night(tmp_path / "night", n_images=6, size=256, seed=3, n_transients=6)
    common = [sys.executable, "-m", "batchproc"]

    def call(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([*common, *words], capture_output=True, text=True, check=False, cwd=tmp_path)

    words = ["submit", str(manifest), "--out", "RUN", "--profile", str(there.profile), "--no-report", "--max-bugs", "0"]
    dry = call(*words, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count("#SBATCH -J") == 2
    assert not there.run.exists()
    assert jobs() == []
    sent = call(*words)
    assert sent.returncode == 0, sent.stderr
    assert re.search(r"job \d+ \(bp-RUN\) drives the run", sent.stdout)
    assert "scancel --name=bp-RUN" in sent.stdout
    until(lambda: there.done() == 6 and not jobs(), 200, there)
    here = call("run", str(manifest), "--out", "HERE", "--cluster", "serial", "--no-report", "-q")
    assert here.returncode == 0, here.stderr
    (rows, stamps), (expected_rows, expected_stamps) = results(there.run), results(tmp_path / "HERE")
    pd.testing.assert_frame_equal(rows, expected_rows)
    np.testing.assert_array_equal(stamps, expected_stamps)
    assert os.listdir(there.run / "log" / "jobs")
