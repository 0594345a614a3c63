"""A driver as a job: what it runs, when it ends, and when it hands itself in again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

pytest.importorskip("dask_jobqueue", reason="needs the extra 'hpc'")

from batchproc import cli, submit
from batchproc.errors import ClusterError, UsageError
from batchproc.io.events import EventLog
from batchproc.io.freeze import freeze
from batchproc.io.run_folder import RunFolder
from batchproc.submit import Submission, drive, prepare
from tests import _runs

SITE = 'system = "slurm"\ncores = 1\nmemory = "1GB"\nwalltime = "01:00:00"\n'
ROOT = Path(__file__).parents[1]


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "site.toml"
    path.write_text(SITE)
    return path


@pytest.fixture
def handed(monkeypatch):
    """Scripts that were handed in; signal handlers are as they were afterwards."""
    scripts: list[str] = []

    def hand_in(site, script):
        scripts.append(script)
        return str(100 + len(scripts))

    monkeypatch.setattr(submit, "hand_in", hand_in)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield scripts
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def begun(tmp_path, profile, monkeypatch):
    """A run of three images whose driver is a program, and what is known of the run before and after it."""

    def driven_by(program: str, before: int = 0, after: int = 0, **values) -> Path:
        status = SimpleNamespace(done=after, failed=0, bugs=0, missing=3 - after)
        monkeypatch.setattr(submit, "_status", lambda run: status)
        run = tmp_path / "RUN"
        command = (sys.executable, "-c", program)
        submission = Submission(str(run), str(profile), "bp-RUN", command, "the script", tried=before, **values)
        (run / "log").mkdir(parents=True)
        (run / "log" / "submission.json").write_text(json.dumps(asdict(submission)))
        return run

    return driven_by


def test_a_driver_that_had_to_stop_is_handed_in_again(begun, handed):
    """The same script, while images are missing and some get done."""
    run = begun("raise SystemExit(143)", 1, 2, idle=2)
    assert drive(run) == 0
    assert handed == ["the script"]
    assert Submission.read(run).job == "101"
    assert Submission.read(run).idle == 0


def test_jobs_in_which_nothing_gets_done_come_to_an_end(begun, handed, capsys):
    """Three of them in a row; it says so, and where to look."""
    run = begun("import os; os.abort()")
    assert [drive(run), drive(run)] == [0, 0]
    assert drive(run) == 134
    assert len(handed) == 2
    assert "no image was tried in 3 jobs" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 2, 3])
def test_a_run_that_ended_is_not_handed_in_again(begun, handed, code):
    """All done, a wrong command, or a fault that another job would meet as well."""
    assert drive(begun(f"raise SystemExit({code})")) == code
    assert handed == []


def test_a_run_without_missing_images_is_not_handed_in_again(begun, handed):
    """However its driver ended; failures are left to ``batchproc retry``."""
    assert drive(begun("raise SystemExit(1)", 1, 3)) == 1
    assert handed == []


def test_a_driver_ends_before_its_walltime(begun, handed, monkeypatch):
    """It is asked to, a quarter of a short walltime before; one that does not listen is killed in time."""
    monkeypatch.setenv("BATCHPROC_END_AT", str(time.time() + 6))
    program = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('asked')); time.sleep(60)"
    assert drive(begun(program + "; time.sleep(60)")) == 0
    assert time.time() < float(os.environ["BATCHPROC_END_AT"])
    assert len(handed) == 1


def test_a_batch_system_that_refuses_the_next_job_is_told_of(begun, handed, monkeypatch, capsys):
    """With what to type."""

    def refuse(site, script):
        raise ClusterError("the job was not accepted: maintenance")

    monkeypatch.setattr(submit, "_PAUSES_S", (0.01,))
    monkeypatch.setattr(submit, "hand_in", refuse)
    assert drive(begun("raise SystemExit(143)")) == 143
    assert "maintenance; `batchproc submit` goes on" in capsys.readouterr().err


def test_a_batch_system_that_is_busy_for_a_moment_is_asked_again(begun, handed, monkeypatch, capsys):
    """One time-out of it does not end a run of weeks."""
    accept, answers = submit.hand_in, iter([ClusterError("Socket timed out on send/recv operation")])

    def busy(site, script):
        for error in answers:
            raise error
        return accept(site, script)

    monkeypatch.setattr(submit, "_PAUSES_S", (0.01, 0.02))
    monkeypatch.setattr(submit, "hand_in", busy)
    assert drive(begun("raise SystemExit(143)")) == 0
    assert handed == ["the script"]
    assert "Socket timed out on send/recv operation; again in 0.01 s" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "again"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_signals_reach_the_driver(begun, tmp_path, monkeypatch, number, again):
    """SIGTERM is somebody's wish that it ends; SIGUSR1 a batch system's word that its time is over."""
    queue = tmp_path / "bin" / "sbatch"
    queue.parent.mkdir()
    queue.write_text(f"#!/bin/sh\ncat > {tmp_path}/sent\necho Submitted batch job 7\n")
    queue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{queue.parent}:{os.environ['PATH']}")
    program = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'up').touch()\n"
        "time.sleep(60)"
    )
    run = begun(program)
    job = subprocess.Popen([sys.executable, "-m", "batchproc.submit", str(run)], cwd=ROOT)
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    job.send_signal(number)
    assert job.wait(30) == (0 if again else 143)
    assert (tmp_path / "sent").exists() is again
    if again:
        assert (tmp_path / "sent").read_text() == "the script"


def test_options_of_run_reach_the_run(profile, tmp_path):
    """What `batchproc submit` is given beside its own options, the driver is given; in any order."""
    manifest = tmp_path / "m.csv"
    manifest.write_text("image_id,new,ref\na,a.fits,b.fits\n")
    words = ["submit", "--max-bugs", "0", "--no-report", str(manifest), "--min-jobs", "2", "--max-jobs", "9"]
    words += ["--out", str(tmp_path / "R"), "--profile", str(profile), "--dry-run", "--redo"]
    done = CliRunner().invoke(cli.cli, words)
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if " -m batchproc run " in line)
    for option in ("--max-bugs 0", "--no-report", "--min-jobs 2", "--max-jobs 9", "--redo"):
        assert option in line
    assert f"run {manifest} --out {tmp_path}/R --cluster {profile}" in line
    assert "--pilot" not in line
    assert done.output.count("#SBATCH -J") == 2
    assert not (tmp_path / "R").exists()


def test_the_workers_script_is_that_of_the_run_that_goes_on(profile, tmp_path):
    """Its settings count where none are given: here two threads a worker."""
    profile.write_text(SITE.replace("cores = 1", "cores = 4").replace("1GB", "4GB"))
    settings = replace(_runs.CONFIG, threads=2)
    freeze(RunFolder(tmp_path / "RUN"), _runs.entries("a"), settings, lambda: "")
    _, workers = prepare(tmp_path / "m.csv", tmp_path / "RUN", str(profile))
    assert "OMP_NUM_THREADS=2" in workers
    assert "--nworkers 2 " in workers


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--profile", "nowhere"], "profiles here"),
        (["--profile", "SITE", "--no-such-option"], "No such option"),
        (["--profile", "SITE", "--config", "none.toml"], "cannot be read"),
        ([], "Missing option '--profile'"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(profile, tmp_path, words, said, capsys):
    """Not after a night in the queue."""
    manifest = tmp_path / "m.csv"
    manifest.write_text("image_id,new,ref\na,a.fits,b.fits\n")
    words = [str(profile) if word == "SITE" else word for word in words]
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", str(manifest), "--out", str(tmp_path / "R"), *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_scheduler_that_runs_already_has_no_queue(tmp_path):
    """Its address is a word for `batchproc run`."""
    path = tmp_path / "running.toml"
    path.write_text('system = "address"\naddress = "tcp://host:8786"\n')
    with pytest.raises(UsageError, match="has no queue"):
        prepare(tmp_path / "m.csv", tmp_path / "R", str(path))


def test_status_tells_of_a_run_that_waits_in_the_queue(profile, tmp_path, handed):
    """Its job, before anything else is there; what is to be typed to submit it again, once it has begun and stopped."""
    manifest, run = tmp_path / "night.csv", tmp_path / "RUN"
    submit.submit(manifest, run, str(profile), ("--max-bugs", "7"))
    told = CliRunner().invoke(cli.cli, ["status", str(run)])
    assert told.exit_code == 0
    assert told.output.startswith("submitted as job 101 (bp-RUN), and not begun yet")
    as_json = CliRunner().invoke(cli.cli, ["status", str(run), "--json"])
    assert json.loads(as_json.output)["submitted"]["job"] == "101"
    freeze(RunFolder(run), _runs.entries("n1"), _runs.CONFIG, lambda: "")
    with EventLog(RunFolder(run)) as events:
        events.beat(phase="images")
    stopped = CliRunner().invoke(cli.cli, ["status", str(run)]).output
    assert f"`batchproc submit {manifest} --out {run} --profile {profile} --max-bugs 7` goes on" in stopped
    assert "batchproc run" not in stopped
