"""What batch systems must be told: scripts of jobs, and the commands that submit them and ask after them.

Directives and commands are dask-jobqueue's; what stands here is what it leaves to others: one thread a process in every
library, workers that leave before their walltime, no web page of a worker that is reachable from outside its node.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batchproc.distribute.sites import Certificates, Site
from batchproc.distribute.threads import thread_environment
from batchproc.distribute.tls import security_of
from batchproc.errors import ClusterError, UsageError

__all__ = ["SYSTEMS", "BatchSystem", "check_installed", "driver_script", "submit", "worker_options", "worker_script"]


@dataclass(frozen=True)
class BatchSystem:
    """What we must know of a batch system beside its directives.

    Attributes
    ----------
    name : str
        Of the classes in dask-jobqueue.
    status : str
        Shell command that lists jobs, ``{ids}`` in it; in a line of what it says, the number of a job and its state.
    joint : str
        Between the ids.
    over : str
        Regular expression: states of a job that will not work any more.
    unknown : str
        Regular expression: said of jobs that are gone.
    stop : str
        Command that ends jobs by their ``{name}``.
    """

    name: str
    status: str
    joint: str
    over: str
    unknown: str
    stop: str

    @property
    def cluster_class(self) -> Any:
        """Of dask-jobqueue; its ``job_cls`` writes scripts."""
        import dask_jobqueue

        return getattr(dask_jobqueue, f"{self.name}Cluster")

    def status_command(self, ids: Iterable[str]) -> str:
        """For the shell."""
        return self.status.format(ids=self.joint.join(ids))

    def at_work(self, output: str, errors: str) -> set[str] | None:
        """Numbers of the jobs that wait or work, by what the status command said; None where it does not tell."""
        jobs = [match.groups() for match in re.finditer(r"^\s*(\d+)\S*\s+(\S+)", output, re.MULTILINE)]
        if not jobs and errors.strip() and not re.search(self.unknown, errors):
            return None
        return {job for job, state in jobs if not re.fullmatch(self.over, state)}


SYSTEMS = {
    "slurm": BatchSystem(
        "SLURM",
        "squeue --noheader --format='%A %T' --jobs={ids}",
        ",",
        "COMPLET.*|CANCELLED|FAILED|TIMEOUT|NODE_FAIL|PREEMPTED|BOOT_FAIL|DEADLINE|OUT_OF_MEMORY|REVOKED",
        "Invalid job id",
        "scancel --name={name}",
    ),
    # The state is the last column but one; Torque keeps finished jobs in the list for a while.
    "pbs": BatchSystem(
        "PBS",
        "qstat {ids} | awk '{{ print $1, $(NF-1) }}'",
        " ",
        "[CEFX]",
        "(?i)unknown job|has finished",
        "qdel $(qselect -N {name})",
    ),
    "lsf": BatchSystem(
        "LSF", "bjobs -noheader -o 'jobid stat' {ids}", " ", "DONE|EXIT|ZOMBI", "is not found", "bkill -J {name}"
    ),
}


def check_installed(site: Site) -> None:
    """Raise `UsageError` where a package is missing that jobs need; imports nothing."""
    needed = {"dask_jobqueue": "jobs on a queue need"}
    if site.tls and not site.certificates:
        needed["cryptography"] = "TLS needs"
    for package, need in needed.items():
        if find_spec(package) is None:
            raise UsageError(f"{need} the package {package}: python -m pip install 'batchproc[hpc]'")


def worker_options(
    site: Site, threads: int, folder: Path, security: Any, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of dask-jobqueue's classes for a job of workers.

    Parameters
    ----------
    site : Site
    threads : int
        Threads that libraries may use in each worker process.
    folder : path
        For what the jobs print: ``folder/jobs``.
    security : distributed.Security or None
    settings : mapping
        Dask's settings; those of workers are handed on.
    """
    resources = ",".join(f"{name}={amount:g}" for name, amount in site.resources.items())
    return {
        **_common_options(site, "batchproc", site.queue, site.qos, site.directives, site.walltime, folder),
        "cores": site.cores,
        "memory": site.memory_bytes,
        "processes": site.processes(threads),
        "interface": site.interface or None,
        "python": shlex.quote(site.python) if site.python else None,
        "security": security,
        "death_timeout": 60,  # seconds without a scheduler
        "local_directory": '"$BATCHPROC_SCRATCH"' if site.scratch else None,
        "job_script_prologue": list(_prologue(site, threads, settings)),
        "worker_extra_args": [
            # What is given twice on the command line counts as given last: by itself dask-jobqueue leaves nothing to
            # the process that watches the workers, and hands a worker a task for each of its cores.
            *("--nthreads", "1", "--memory-limit", str(site.worker_memory(threads))),
            *("--no-dashboard", "--dashboard-address", "127.0.0.1:0"),
            *("--preload", "batchproc.distribute.leaving"),
            *(("--resources", resources) if resources else ()),
        ],
    }


def worker_script(site: Site, threads: int, folder: Path, settings: Mapping[str, Any]) -> str:
    """The script of a job of workers, as it would be submitted, but for the scheduler's address and the keys."""
    keys = site.certificates or Certificates(*(f"{folder}/tls-KEYS/{name}.pem" for name in ("ca", "cert", "key")))
    options = worker_options(site, threads, folder, security_of(keys) if site.tls else None, settings)
    address = f"{'tls' if site.tls else 'tcp'}://SCHEDULER:PORT"
    return str(SYSTEMS[site.system].cluster_class.job_cls(address, name="batchproc-0", **options).job_script())


def driver_script(site: Site, name: str, folder: Path, command: Iterable[str], work_folder: Path) -> str:
    """The script of a job that runs one command: the driver.

    The command finds in its environment when it must have ended: ``BATCHPROC_END_AT``, in seconds since 1970.
    """
    driver = site.driver
    queue, qos = driver.queue or site.queue, driver.qos or site.qos
    options = {
        **_common_options(site, name, queue, qos, driver.directives, driver.walltime, folder),
        "cores": driver.cores,
        "memory": driver.memory_bytes,
        "processes": 1,
    }
    job = SYSTEMS[site.system].cluster_class.job_cls("tcp://", name=name, **options)
    lines = [
        str(job.shebang),
        "",
        str(job.job_header),
        f"export BATCHPROC_END_AT=$(($(date +%s) + {driver.walltime_s}))",
        *site.prologue,
        f"cd {shlex.quote(str(work_folder))} || exit 1",
        f"exec {shlex.join(command)}",
    ]
    return "\n".join(lines) + "\n"


def submit(site: Site, script: str) -> str:
    """Hand a script to the batch system; returns the job's number. Raises `ClusterError` where it is refused."""
    job_class = SYSTEMS[site.system].cluster_class.job_cls
    try:
        done = subprocess.run(
            shlex.split(job_class.submit_command), input=script, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ClusterError(
            f"{job_class.submit_command}: {error.strerror}: is {site.system} on this machine?"
        ) from error
    found = re.search(job_class.job_id_regexp, done.stdout)
    if done.returncode or not found:
        raise ClusterError(f"the job was not accepted: {' '.join((done.stderr or done.stdout).split())}")
    return found["job_id"]


def _common_options(
    site: Site, name: str, queue: str, qos: str, directives: Iterable[str], walltime: str, folder: Path
) -> dict[str, Any]:
    logs = folder / "jobs"
    if re.search(r"[^\w./+@=,:-]", str(logs)):  # directives know no quotation marks
        raise UsageError(f"{logs}: a run on a queue needs a path of letters, digits and ./+@=,:-_ only")
    # Output and errors in one file a job: files are counted on shared file systems. (Told its log_directory,
    # dask-jobqueue would make two, and the folder when it only writes a script.)
    chosen = [d for d in directives if site.system == "pbs" and d.startswith("-l select=")]
    output = [f"-o {logs}/", "-j oe"] if site.system == "pbs" else [f"-o {logs}/{name}-%J.out"]
    return {
        "job_name": name,
        "walltime": _in_minutes(walltime) if site.system == "lsf" else walltime,
        "queue": queue or None,
        "project" if site.system == "lsf" else "account": site.account or None,
        "job_extra_directives": [
            *output,
            *([f"--qos={qos}"] if qos else []),
            *(d for d in directives if d not in chosen),
        ],
        **({"resource_spec": chosen[-1].removeprefix("-l ")} if chosen else {}),
    }


def _prologue(site: Site, threads: int, settings: Mapping[str, Any]) -> Iterator[str]:
    spread = max(1, (site.walltime_s - site.leave_after_s) // 4)  # not all jobs at the same moment
    yield f"export BATCHPROC_LEAVE_AT=$(($(date +%s) + {site.leave_after_s} - RANDOM % {spread}))"
    yield from site.prologue
    for name, value in thread_environment(threads).items():
        yield f"export {name}={value}"
    for key, value in settings.items():
        if key.startswith("distributed.worker."):
            yield f"export DASK_{key.replace('.', '__').replace('-', '_').upper()}={value}"
    if site.scratch:
        yield f'mkdir -p "{site.scratch}" && BATCHPROC_SCRATCH=$(mktemp -d "{site.scratch}/batchproc-XXXXXX") || exit 1'
        yield 'export BATCHPROC_SCRATCH TMPDIR="$BATCHPROC_SCRATCH"'
        yield "trap 'rm -rf \"$BATCHPROC_SCRATCH\"' EXIT"
        yield "trap : TERM  # wait for the workers, then clean up"
        if site.stage:
            yield "export BATCHPROC_STAGE=1"


def _in_minutes(walltime: str) -> str:
    """HH:MM, as LSF wants it."""
    hours, minutes, seconds = map(int, walltime.split(":"))
    total = 60 * hours + minutes + (seconds > 0)
    return f"{total // 60:02d}:{total % 60:02d}"
