"""Where a run works: ``serial``, ``local``, the address of a Dask scheduler, or the profile of a batch system.

A local cluster is one process a core with one thread each. Its ports are bound to the loopback interface: nobody on
another machine reaches them, but other users of this machine could.
"""

from __future__ import annotations

import getpass
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchproc.distribute.batch import check_installed
from batchproc.distribute.executors import DaskExecutor, Executor, SerialExecutor
from batchproc.distribute.sites import Site, load_site
from batchproc.distribute.threads import limit_threads, thread_environment
from batchproc.distribute.tls import security_of
from batchproc.errors import UsageError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["DASK", "Where", "expected_workers", "local_workers", "open_executor", "watching", "worker_memory"]

#: Dask's settings, wherever it is ours.
DASK = {
    # The campaign itself gives a task a second chance, alone; and one task to a worker keeps blame from neighbours.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.worker-saturation": 1.0,
    # Tasks hold no Dask data, so there is nothing to spill, and pausing would only wait for memory that Python keeps.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    # What the live page keeps of each task, and a look at every thread a hundred times a second, are not for free.
    "distributed.scheduler.dashboard.tasks.task-stream-length": 5000,
    "distributed.worker.profile.enabled": False,
    # Messages and transitions that are kept for who debugs Dask: a call for 200 images has 60 kB, and would be there
    # twice.
    "distributed.admin.low-level-log-length": 20,
    # Looking at its own event loop 50 times a second costs each process of Dask more than one per cent of a core.
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "2s",
}

#: A process of a local cluster that is away for longer than this (15 s by default) is given up by Dask for good, and on
#: a busy machine the next one takes as long to begin.
_LOCAL = {"distributed.deploy.lost-worker-timeout": "1 day"}

#: Seconds after which a local cluster that has lost all its processes is given up.
_PATIENCE_S = 300.0


#: Where batch systems say from which machine a job was submitted.
_SUBMITTED_FROM = ("SLURM_SUBMIT_HOST", "PBS_O_HOST", "LSB_SUB_HOST")


@dataclass(frozen=True)
class Where:
    """Where to run; the results are the same.

    Attributes
    ----------
    cluster : str
        ``"serial"``: here, one after the other. ``"local"``: a Dask cluster on this machine. ``"tcp://host:port"`` or
        ``"tls://host:port"``: a running Dask scheduler whose workers see the same files. Else the name or path of a
        site profile (`batchproc.distribute.sites`): jobs of a batch system.
    workers : int, optional
        Worker processes of a local cluster (by default as many as there are cores), or of all jobs together (by default
        what the profile says).
    min_jobs, max_jobs : int, optional
        In place of the profile's.
    performance_report : path, optional
        Dask's own report of what its workers did, written at the end.
    """

    cluster: str = "local"
    workers: int | None = None
    min_jobs: int | None = None
    max_jobs: int | None = None
    performance_report: str | Path | None = None

    @classmethod
    def of(cls, cluster: str | Where, workers: int | None = None) -> Where:
        """What a caller said: a word and perhaps a number, or everything."""
        return cluster if isinstance(cluster, Where) else cls(cluster, workers)

    def site(self) -> Site | None:
        """The profile; None for a local or a serial run.

        Raises
        ------
        UsageError
            No such profile, or one that cannot be used.
        """
        if self.cluster in ("serial", "local"):
            return None
        if "://" in self.cluster:
            return Site(system="address", address=self.cluster)
        return load_site(self.cluster)

    def jobs(self, site: Site, threads: int, tasks: int) -> tuple[int, int]:
        """The least and the most jobs of a batch system; no more than there are tasks for."""
        processes = site.processes(threads)
        least = site.min_jobs if self.min_jobs is None else self.min_jobs
        most = max(least, site.max_jobs) if self.max_jobs is None else self.max_jobs
        if self.workers:
            wanted = math.ceil(self.workers / processes)
            most = wanted if self.max_jobs is None else min(wanted, most)
            least = most if self.min_jobs is None else least
        enough = max(1, math.ceil(tasks / processes))
        return min(least, most, enough), min(most, enough)

    def check(self) -> None:
        """Raise `UsageError` for what `open_executor` would refuse; connects to nothing."""
        if self.min_jobs is not None and self.max_jobs is not None and self.min_jobs > self.max_jobs:
            raise UsageError(f"min_jobs = {self.min_jobs} is more than max_jobs = {self.max_jobs}")
        if self.performance_report is not None and self.cluster == "serial":
            raise UsageError("a performance report is Dask's, and a serial run has none: `--cluster local --workers 1`")
        site = self.site()
        if site is not None and site.system != "address":
            check_installed(site)
        elif self.min_jobs is not None or self.max_jobs is not None:
            raise UsageError(f"--min-jobs and --max-jobs are for jobs of a batch system, and {self.cluster} has none")


@contextmanager
def open_executor(
    where: Where,
    threads: int = 1,
    tasks: int = 10**9,
    large: int | None = None,
    folder: Path | None = None,
    resources: Mapping[str, float] | None = None,
) -> Iterator[Executor]:
    """An executor for the time of a ``with`` block.

    Parameters
    ----------
    where : Where
    threads : int
        Threads that libraries may use in each process.
    tasks : int
        A local cluster has no more processes than this.
    large : int, optional
        Where no more than so many processes of a local cluster will hold much at a time, the memory is theirs; by
        default it is shared out equally.
    folder : path, optional
        Seen by the workers: what jobs print goes there, and for the time of the run the keys of TLS. By default
        ``~/.batchproc``.
    resources : mapping, optional
        What each process of a local cluster offers; other workers say so themselves.

    Raises
    ------
    UsageError
        Another word, a profile that cannot be used, or a scheduler that does not answer.
    """
    site = where.site()
    if where.cluster == "serial":
        with limit_threads(threads):  # of the caller's process, which gets its own back
            yield SerialExecutor()
        return
    with ExitStack() as stack:
        if site is None:
            client = stack.enter_context(_local_client(where.workers, threads, tasks, large, resources))
            executor = DaskExecutor(client, patience=_PATIENCE_S)
        elif site.system == "address":
            executor = DaskExecutor(stack.enter_context(_remote_client(site)))
        else:
            executor = DaskExecutor(
                stack.enter_context(_job_client(site, where.jobs(site, threads, tasks), threads, folder)),
                resources=tuple(site.resources),
            )
        if where.performance_report is not None:
            stack.enter_context(_performance_report(Path(where.performance_report)))
        yield executor


@contextmanager
def _performance_report(path: Path) -> Iterator[None]:
    """Dask's own report of what happens in the block; a run does not fail for want of it."""
    from distributed import performance_report

    report = performance_report(filename=str(path))
    report.__enter__()
    try:
        yield
    finally:
        try:
            report.__exit__(None, None, None)
        except Exception as error:
            warnings.warn(f"{path}: Dask's performance report was not written ({error})", stacklevel=2)


def worker_memory(where: Where, threads: int = 1, tasks: int = 10**9, large: int | None = None) -> int | None:
    """Bytes that one worker will have, known before anything is started; None where nobody knows.

    Arguments as for `open_executor`.
    """
    from distributed.system import MEMORY_LIMIT

    if where.cluster == "serial":
        return int(MEMORY_LIMIT)
    site = where.site()
    if site is None:
        return _local_memory(_local_processes(where.workers, threads, tasks), large)
    return None if site.system == "address" else site.worker_memory(threads)


def watching(where: Where, executor: Executor) -> str | None:
    """How to see the live page, in words for people; None where there is none.

    On a cluster the page is open to nobody but this machine (it asks for no password), so the way there is SSH.
    """
    client = getattr(executor, "client", None)
    site = where.site()
    if client is None:
        return None
    if site is None or site.system == "address":
        return f"watch it at {client.dashboard_link}"
    port = client.scheduler_info(n_workers=0)["services"].get("dashboard")
    return None if port is None else f"watch it at http://127.0.0.1:{port}/status after: {_tunnel(site, port)}"


def _tunnel(site: Site, port: int) -> str:
    """The command by which a user's own machine reaches a page of this one."""
    asked_from = next((os.environ[name] for name in _SUBMITTED_FROM if os.environ.get(name)), None)
    entrance = site.login or asked_from
    here = f"{getpass.getuser()}@{socket.gethostname()}"
    jump = f"-J {entrance} " if entrance and entrance not in (here, socket.gethostname()) else ""
    return f"ssh -N -L {port}:127.0.0.1:{port} {jump}{here}"


def local_workers(workers: int | None, threads: int) -> int:
    """Processes of a local cluster that has tasks enough: by default as many as there are cores for `threads` each."""
    from dask.system import CPU_COUNT

    return max(1, workers or CPU_COUNT // threads)


def expected_workers(where: Where, threads: int) -> int:
    """How many images will be worked on at once, as far as one can know before; 1 for a scheduler's address."""
    if where.cluster == "serial":
        return 1
    site = where.site()
    if site is None:
        return local_workers(where.workers, threads)
    if site.system == "address":
        return where.workers or 1
    return where.jobs(site, threads, 10**9)[1] * site.processes(threads)


def _local_processes(workers: int | None, threads: int, tasks: int) -> int:
    return max(1, min(local_workers(workers, threads), tasks))


def _local_memory(processes: int, large: int | None) -> int:
    from distributed.system import MEMORY_LIMIT

    return int(0.9 * MEMORY_LIMIT / min(processes, large or processes))


@contextmanager
def _local_client(
    workers: int | None, threads: int, tasks: int, large: int | None, resources: Mapping[str, float] | None
) -> Iterator[Client]:
    import dask
    from distributed import Client, LocalCluster

    processes = _local_processes(workers, threads, tasks)
    environment = dask.config.get("distributed.nanny.pre-spawn-environ", {}) | thread_environment(threads)
    settings = DASK | {"distributed.nanny.pre-spawn-environ": environment, **_LOCAL}
    with dask.config.set(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is already in use", category=UserWarning)
        with (
            LocalCluster(
                n_workers=processes,
                threads_per_worker=1,
                processes=True,
                memory_limit=_local_memory(processes, large),
                host="127.0.0.1",
                dashboard_address="127.0.0.1:8787",
                silence_logs=logging.CRITICAL,
                resources=dict(resources or {}),
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client


@contextmanager
def _job_client(site: Site, jobs: tuple[int, int], threads: int, folder: Path | None) -> Iterator[Client]:
    from batchproc.distribute.jobs import open_jobs

    with open_jobs(site, threads, jobs, folder or Path.home() / ".batchproc", DASK) as client:
        yield client


@contextmanager
def _remote_client(site: Site) -> Iterator[Client]:
    from distributed import Client

    try:
        client = Client(site.address, timeout=10, security=security_of(site.certificates))
    except (OSError, ValueError, TypeError) as error:
        hint = "is it running?"
        if site.address.startswith("tls://") and not site.certificates:
            hint = (
                "tls:// needs certificates: name them in a profile (system = 'address', [certificates] ca, cert, key), "
                "or in Dask's own configuration (distributed.comm.tls)"
            )
        raise UsageError(f"no Dask scheduler answers at {site.address} ({error}); {hint}") from error
    with client:
        yield client
