"""A Dask cluster whose workers are jobs of a batch system, kept at its number.

dask-jobqueue submits jobs. By itself it never replaces a lost one of several processes, nor one that ended before its
first worker came, nor one whose submission was refused; and it closes busy workers of a job to be rid of an idle one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import re
import shlex
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Adaptive, Client
from distributed.core import Status

from batchproc.distribute.batch import SYSTEMS, BatchSystem, check_installed, worker_options
from batchproc.distribute.sites import Site
from batchproc.distribute.tls import security_of, temporary_certificates
from batchproc.errors import ClusterError

__all__ = ["JobKeeper", "open_jobs"]

ADAPT_S = 2.0  # how often the number of jobs is looked at
LOOK_S = 15.0  # the batch system is asked no more often than this
AT_ONCE = 20  # jobs that are submitted together
REST_S = 10.0  # after a refusal, twice as long after each more
_DASK = {
    # `JobKeeper` judges which jobs are lost; Dask would cancel one whose worker takes long to start again.
    "distributed.deploy.lost-worker-timeout": "1 week",
}

_log = logging.getLogger(__name__)


@contextmanager
def open_jobs(
    site: Site, threads: int, jobs: tuple[int, int], folder: Path, settings: Mapping[str, Any]
) -> Iterator[Client]:
    """A Dask client whose workers are jobs.

    Parameters
    ----------
    site : Site
    threads : int
        Threads that libraries may use in each worker process.
    jobs : (least, most)
        How many are kept up.
    folder : path
        Seen by the workers, for what they print and the keys.
    settings : mapping
        Dask's, for scheduler and workers.

    Raises
    ------
    UsageError
        A package is missing.
    ClusterError
        The batch system does not accept the first jobs.
    """
    check_installed(site)
    system = SYSTEMS[site.system]
    with ExitStack() as stack:
        stack.enter_context(dask.config.set({**settings, **_DASK}))
        stack.enter_context(warnings.catch_warnings())
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
        warnings.filterwarnings("ignore", message=".*is already in use", category=UserWarning)
        keys = site.certificates
        if site.tls and not keys:
            keys = stack.enter_context(temporary_certificates(folder))
        security = security_of(keys) if site.tls else None
        cluster = stack.enter_context(
            _class_of(system)(
                name="batchproc",
                scheduler_options=_scheduler_options(site),
                silence_logs=logging.CRITICAL,
                **worker_options(site, threads, folder, security, settings),
            )
        )
        try:
            cluster.sync(cluster.submit_up_to, min(max(jobs[0], 1), AT_ONCE))
        except (RuntimeError, OSError, ValueError) as error:
            raise ClusterError(f"the first job was not accepted: {_plain(error)}") from error
        cluster.adapt(
            Adaptive=JobKeeper,
            minimum_jobs=jobs[0],
            maximum_jobs=jobs[1],
            interval=f"{ADAPT_S} s",
            worker_key=job_of_worker,
        )
        yield stack.enter_context(Client(cluster))


def _scheduler_options(site: Site) -> dict[str, Any]:
    interface = site.driver.interface or site.interface
    return {"dashboard_address": "127.0.0.1:8787", **({"interface": interface} if interface else {})}


class _Job:
    """What we add to a job of dask-jobqueue."""

    async def _submit_job(self: Any, script: str) -> str:
        """By standard input, as all take it. Of ``bsub``'s words dask-jobqueue would throw away why it refuses."""
        return str(await self._call([f"{self.submit_command} < {shlex.quote(script)}"], shell=True))


class _Jobs:
    """What we add to a cluster of dask-jobqueue."""

    def _new_worker_name(self: Any, number: int) -> str:
        """Never used before: the scheduler may still know a lost job's workers by their names."""
        if not hasattr(self, "_numbers"):
            self._numbers = itertools.count()
        return f"{self._name}-{next(self._numbers)}"

    async def submit_up_to(self: Any, number: int) -> None:
        """So many jobs in all; raises what goes wrong, which Dask's own way of scaling only logs."""
        while len(self.worker_spec) < number:
            self.worker_spec.update(self.new_worker_spec())
        await self._correct_state()

    async def cancel_all(self: Any) -> None:
        """With one command: Dask would give one for each of a thousand jobs, all at the same time."""
        jobs = [job for job in self.workers.values() if job.job_id]
        if jobs:
            await _ask(shlex.join([*shlex.split(self.job_cls.cancel_command), *(str(job.job_id) for job in jobs)]))
        for job in jobs:
            job.job_id = None

    async def _close(self: Any) -> None:
        await self.cancel_all()
        self._created.clear()  # else a job whose submission was refused fails an assertion of Dask's
        await super()._close()  # type: ignore[misc]


def _class_of(system: BatchSystem) -> Any:
    """The cluster of dask-jobqueue for a batch system, with what we add."""
    job = type("Job", (_Job, system.cluster_class.job_cls), {})
    return type("Jobs", (_Jobs, system.cluster_class), {"job_cls": job})


class JobKeeper(Adaptive):
    """Replaces jobs that are lost, and follows the work between the least and the most jobs."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.system = next(s for s in SYSTEMS.values() if isinstance(self.cluster, s.cluster_class))
        self.processes: int = self.cluster._dummy_job.worker_processes
        self._looked = -math.inf
        self._rest_until = -math.inf  # after refused submissions
        self._refused = 0
        self._fruitful: set[str] = set()  # jobs of which a worker has come
        self._barren = False  # since the last job that bore a worker, some ended that bore none

    async def adapt(self) -> None:
        """Called every `ADAPT_S` seconds."""
        if self._adapting or time.monotonic() < self._rest_until:
            return
        try:
            await self.drop_lost()
            await super().adapt()
            if not self._barren:  # what is accepted may still end at once
                self._refused = 0
        except Exception as error:
            self._refused += 1
            rest = min(600.0, REST_S * 2 ** min(self._refused - 1, 10))  # weeks of refusals fit no number
            self._rest_until = time.monotonic() + rest
            _log.warning("%s; again in %.0f s", _plain(error), rest)

    async def drop_lost(self) -> None:
        """Forget the jobs that ended without our doing; those that are missing are submitted by what follows.

        Raises
        ------
        ClusterError
            Jobs ended before their first worker came: there is no hurry to submit more like them.
        """
        here = {job_of_worker(worker) for worker in self.cluster.scheduler.workers.values()} & set(self.cluster.workers)
        if here - self._fruitful:
            self._barren = False
        self._fruitful = (self._fruitful | here) & set(self.cluster.workers)
        absent = {name: job for name, job in self.cluster.workers.items() if name not in here}
        ids = [str(job.job_id) for job in absent.values() if job.job_id]
        at_work = set()
        if ids:
            if time.monotonic() < self._looked + LOOK_S:
                return
            self._looked = time.monotonic()
            answer = await _ask(self.system.status_command(ids))
            found = self.system.at_work(*answer)
            if found is None:
                raise ClusterError(f"the batch system does not say which jobs there are: {answer[1].strip()}")
            at_work = found
        lost = {name: job for name, job in absent.items() if str(job.job_id) not in at_work}
        for name, job in lost.items():
            del self.cluster.workers[name]
            self.cluster.worker_spec.pop(name, None)
            job.status = Status.closed
        fruitless = [str(job.job_id) for name, job in lost.items() if job.job_id and name not in self._fruitful]
        if fruitless:
            self._barren = True
            raise ClusterError(
                f"jobs ended before a worker of theirs came: {', '.join(fruitless[:5])}; see what they printed"
            )

    async def scale_up(self, n: int) -> None:
        """Submit what is missing of the jobs of so many workers."""
        await self.cluster.submit_up_to(math.ceil(n / self.processes))

    async def scale_down(self, workers: Iterable[Any]) -> None:
        """End jobs all of whose workers are idle: to save a job's last minutes no image is begun again elsewhere."""
        busy = {job_of_worker(worker) for worker in self.cluster.scheduler.workers.values() if worker.processing}
        await super().scale_down([name for name in workers if _job_of(name) not in busy])

    async def target(self) -> int:
        """How many workers there is work for: as many as may be, while there are more tasks than workers."""
        tasks = len(self.cluster.scheduler.tasks)
        wanted = self.maximum if tasks > max(1, len(self.observed)) else tasks
        jobs = math.ceil(wanted / self.processes)
        return int(min(jobs, len(self.cluster.worker_spec) + AT_ONCE)) * self.processes


def job_of_worker(worker: Any) -> str:
    """Name of the job that a worker (of the scheduler's records) belongs to."""
    return _job_of(worker.name)


def _job_of(name: Any) -> str:
    return re.sub(r"^(batchproc-\d+)-\d+$", r"\1", str(name))


async def _ask(command: str) -> tuple[str, str]:
    process = await asyncio.create_subprocess_shell(
        command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    return output.decode(), errors.decode()


def _plain(error: BaseException) -> str:
    """What the batch system said, of what dask-jobqueue makes of it."""
    text = str(error)
    said = re.search(r"stderr:\n(.*)", text, re.DOTALL)
    return " ".join((said[1] if said else text).split())
