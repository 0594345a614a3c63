"""Workers as jobs of PBS and LSF, whose commands are stand-ins: submitted, replaced when lost, deleted at the end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("dask_jobqueue", reason="needs the extra 'hpc'")

from batchproc.distribute import jobs
from batchproc.distribute.clusters import Where, open_executor, watching
from batchproc.errors import ClusterError
from tests.cluster import _queue

SITE = """
system = "{system}"
interface = "lo"
cores = {cores}
memory = "{cores}GB"
walltime = "00:10:00"
login = "me@login.site.org"
"""


@pytest.fixture(params=["pbs", "lsf"])
def queue(request, tmp_path, monkeypatch):
    """A folder that is a batch system, and a profile for it."""
    folder = tmp_path / "queue"
    _queue.install(folder)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(jobs, "LOOK_S", 0.5)
    monkeypatch.setattr(jobs, "ADAPT_S", 0.5)
    monkeypatch.setattr(jobs, "REST_S", 0.5)
    (tmp_path / "site.toml").write_text(SITE.format(system=request.param, cores=1))
    yield folder
    for path in (folder / "jobs").iterdir():
        _queue.kill(folder, path.name)


def profile(queue: Path) -> Where:
    return Where(str(queue.parent / "site.toml"))


def ask(executor, function, *arguments):
    executor.submit(function, *arguments)
    ((_, outcome),) = executor.wait()
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def test_a_worker_is_a_job_and_a_lost_one_is_replaced(queue):
    """Submitted with its script; when it dies another is submitted; at the end none is left, and no key."""
    log = queue.parent / "log"
    with open_executor(profile(queue), folder=log) as executor:
        first = ask(executor, os.getpgid, 0)
        assert [path.name for path in (queue / "jobs").iterdir()] == ["1000"]
        assert (queue / "jobs" / "1000").read_text() == str(first)
        how = watching(profile(queue), executor)
        assert "-J me@login.site.org " in how
        assert "ssh -N -L" in how
        (queue / "lose").touch()  # the next job ends before its first worker comes, and the one after it is refused
        os.killpg(first, signal.SIGKILL)
        while (queue / "lose").exists():
            time.sleep(0.1)
        (queue / "refuse").touch()
        assert ask(executor, os.getpgid, 0) != first
        assert not (queue / "refuse").exists()
        assert len(list(log.glob("tls-*"))) == 1
    assert not any(_queue.alive(queue, path.name) for path in (queue / "jobs").iterdir())
    assert list(log.glob("tls-*")) == []


def test_a_refused_first_job_is_told_at_once(queue):
    """In the words of the batch system, and nothing is left behind."""
    (queue / "refuse").touch()
    with (
        pytest.raises(ClusterError, match=r"not accepted: .*would exceed the limit"),
        open_executor(profile(queue), folder=queue.parent / "log"),
    ):
        pass
    assert list((queue.parent / "log").glob("tls-*")) == []
