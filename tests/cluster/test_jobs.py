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
from batchproc.distribute.tls import security_of, temporary_certificates
from batchproc.errors import ClusterError, UsageError
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


def test_a_worker_is_a_job_and_a_lost_one_is_replaced(queue, monkeypatch):
    """Submitted with its script; when it dies another is submitted; at the end none is left, and no key."""
    log = queue.parent / "log"
    told = []
    monkeypatch.setattr(jobs._log, "warning", lambda *words: told.append(words[0] % words[1:]))
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
    assert any("jobs ended before a worker of theirs came: 1001; see what they printed" in line for line in told)
    assert any("would exceed the limit of your group; again in" in line for line in told)
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


@pytest.mark.parametrize("queue", ["pbs"], indirect=True)
def test_jobs_come_and_go_with_the_work(queue):
    """Between the least and the most: as many as may be while there is work for them, and none for none."""
    where = Where(str(queue.parent / "site.toml"), min_jobs=0, max_jobs=2)

    def working() -> int:
        return sum(_queue.alive(queue, path.name) for path in (queue / "jobs").iterdir())

    with open_executor(where, folder=queue.parent / "log") as executor:
        most, left = 0, 8
        for _ in range(left):
            executor.submit(time.sleep, 1.0)
        while left:
            left -= len(executor.wait(0.2))
            most = max(most, working())
        assert most == 2
        end = time.monotonic() + 60
        while working():
            assert time.monotonic() < end
            time.sleep(0.2)
        assert ask(executor, os.getpgid, 0)
        assert working() == 1


@pytest.mark.parametrize("queue", ["pbs"], indirect=True)
def test_a_job_with_one_busy_worker_stays(queue):
    """With fewer tasks than workers nothing that is under way is cut off to save a job; idle jobs go."""
    path = queue.parent / "site.toml"
    path.write_text(SITE.format(system="pbs", cores=2) + "min_jobs = 0\nmax_jobs = 2\n")
    begun = queue.parent / "begun"

    def deleted() -> bool:
        return "qdel" in (queue / "asked").read_text()

    with open_executor(Where(str(path)), folder=queue.parent / "log") as executor:
        client = executor.client
        many = [client.submit(time.sleep, 0.3, pure=False) for _ in range(40)]
        while len(client.nthreads()) < 4:
            time.sleep(0.1)
        workers = client.scheduler_info(n_workers=-1)["workers"]
        one_of_each = {worker["name"].rpartition("-")[0]: address for address, worker in workers.items()}
        long = [client.submit(_long, begun, workers=[a], pure=False, priority=9) for a in one_of_each.values()]
        client.gather(many)
        del many[:]
        client.gather(long)
        assert len(begun.read_text()) == 2
        assert not deleted()
        del long[:]
        end = time.monotonic() + 30
        while not deleted():
            assert time.monotonic() < end
            time.sleep(0.2)


def _long(begun: Path) -> None:
    with begun.open("a") as file:
        file.write(".")
    time.sleep(12)


@pytest.mark.parametrize("queue", ["pbs"], indirect=True)
def test_jobs_that_all_end_at_once_are_submitted_ever_more_slowly(queue, monkeypatch):
    """A wrong prologue: the wait doubles, also though every submission is accepted."""
    path = queue.parent / "site.toml"
    path.write_text(path.read_text() + 'prologue = ["exit 1"]\n')
    rests = []
    monkeypatch.setattr(jobs._log, "warning", lambda text, why, rest: rests.append(rest))
    with open_executor(profile(queue), folder=queue.parent / "log") as executor:
        executor.submit(os.getpgid, 0)
        while len(rests) < 4:
            executor.wait(0.2)
    assert rests == [0.5, 1.0, 2.0, 4.0]


def test_a_scheduler_of_somebody_else_lets_in_who_has_the_key(tmp_path):
    """By a profile that names the certificates; without them it says what is missing."""
    from distributed import LocalCluster

    with (
        temporary_certificates(tmp_path) as keys,
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            protocol="tls",
            host="127.0.0.1",
            security=security_of(keys),
            dashboard_address=None,
        ) as cluster,
    ):
        assert cluster.scheduler_address.startswith("tls://")
        text = f'system = "address"\naddress = "{cluster.scheduler_address}"\n'
        for name, more in (("with", True), ("without", False)):
            lines = f'[certificates]\nca = "{keys.ca}"\ncert = "{keys.cert}"\nkey = "{keys.key}"\n' if more else ""
            (tmp_path / f"{name}.toml").write_text(text + lines)
        with open_executor(Where(str(tmp_path / "with.toml"))) as executor:
            assert ask(executor, sum, (1, 2)) == 3
        for word in (str(tmp_path / "without.toml"), cluster.scheduler_address):
            with pytest.raises(UsageError, match="tls:// needs certificates"), open_executor(Where(word)):
                pass
        with (
            pytest.raises(UsageError, match="no Dask scheduler answers"),
            open_executor(Where(cluster.scheduler_address.replace("tls", "tcp"))),
        ):
            pass


def test_dasks_own_report_is_written_on_request(tmp_path):
    """Of what its workers did when."""
    path = tmp_path / "report.html"
    with open_executor(Where("local", 1, performance_report=path)) as executor:
        assert ask(executor, sum, (1, 2)) == 3
    assert "<html" in path.read_text().lower()
