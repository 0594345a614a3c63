"""Site profiles: one TOML file says how jobs are asked for on one cluster.

The keys are the fields below, and what is said of them here is what ``cluster/README.md`` says. Nothing here knows
Dask: `batchproc.distribute.jobs` makes jobs of a profile.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchproc.config import read_toml, settings_from
from batchproc.errors import ConfigError, UsageError

__all__ = ["QUEUES", "Certificates", "DriverJob", "Site", "find_site", "load_site", "site_folders"]

#: Batch systems; beside them ``address`` is a scheduler that runs already.
QUEUES = ("slurm", "pbs", "lsf")

#: What the process that watches the workers of a job, and starts them anew, takes for itself.
LAUNCHER_MEMORY = 200 * 2**20

#: What a worker holds that has imported everything, and some.
LEAST_MEMORY = 400 * 10**6

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class DriverJob:
    """The job of the driver, which hands out the work and computes nothing: `batchproc submit`."""

    walltime: str = "24:00:00"
    """``HH:MM:SS``. It stops two minutes before (a quarter of a short one), and submits itself again; the workers' jobs
    that still wait go with it, so this should be long against the wait."""
    memory: str = "4GB"
    """Of the job."""
    cores: int = 1
    """Of the job."""
    queue: str = ""
    """Queue or partition; that of the workers where left out."""
    qos: str = ""
    """Quality of service (Slurm); that of the workers where left out."""
    directives: tuple[str, ...] = ()
    """More directives, as for the workers, which the driver does not inherit."""
    interface: str = ""
    """Network interface of the driver's machine, where it has another name than on the workers' nodes."""

    def __post_init__(self) -> None:
        _seconds(self.walltime, "driver.walltime")
        _require(
            self.memory_bytes >= LEAST_MEMORY,
            f"driver.memory = {self.memory!r}: must be at least {LEAST_MEMORY / 1e6:.0f} MB",
        )
        _require(self.cores >= 1, f"driver.cores = {self.cores}: must be at least 1")

    @property
    def walltime_s(self) -> int:
        """Seconds that the job may take."""
        return _seconds(self.walltime, "driver.walltime")

    @property
    def memory_bytes(self) -> int:
        """Memory of the job."""
        return _bytes(self.memory, "driver.memory")


@dataclass(frozen=True)
class Certificates:
    """Files of TLS that exist already, for ``tls://`` schedulers or in place of temporary ones; seen by the workers."""

    ca: str = ""
    """Whom to trust (PEM)."""
    cert: str = ""
    """Who we are (PEM)."""
    key: str = ""
    """Its private key (PEM)."""

    def __post_init__(self) -> None:
        given = [bool(self.ca), bool(self.cert), bool(self.key)]
        _require(all(given) or not any(given), "certificates: ca, cert and key are needed together")

    def __bool__(self) -> bool:
        return bool(self.ca)


@dataclass(frozen=True)
class Site:
    """One cluster, and how much of it to take."""

    system: str = "slurm"
    """``slurm``, ``pbs``, ``lsf``; or ``address``: a Dask scheduler that runs already. Must be given."""
    address: str = ""
    """Of that scheduler: ``tls://host:8786`` or ``tcp://host:8786``. For ``address`` only, which needs nothing else but
    ``certificates``."""
    cores: int = 1
    """Cores of one job. Must be given."""
    memory: str = "4GB"
    """Memory of one job, its workers share it: ``"64GB"``, ``"60GiB"``. Must be given."""
    walltime: str = "01:00:00"
    """Of one job, ``HH:MM:SS``. Must be given."""
    workers: int = 0
    """Worker processes of one job. 0: one a core (one for each ``threads`` cores, a setting of the run)."""
    min_jobs: int = 1
    """So many jobs are kept up. Fewer than ``max_jobs``: the number follows the work. `--min-jobs` overrules it."""
    max_jobs: int = 1
    """Never more jobs than this. `--max-jobs` overrules it."""
    margin: int = 0
    """Seconds before the walltime in which a worker begins nothing more; longer than an image takes, and than a minute.
    0: a tenth of the walltime, 10 minutes at most."""
    queue: str = ""
    """Queue or partition."""
    account: str = ""
    """Account or project that pays."""
    qos: str = ""
    """Quality of service (Slurm only; elsewhere a directive)."""
    directives: tuple[str, ...] = ()
    """More directives for the workers, without ``#SBATCH``, ``#PBS`` or ``#BSUB``: ``["--constraint=haswell"]``. In PBS
    one that begins with ``-l select=`` takes the place of ours."""
    prologue: tuple[str, ...] = ()
    """Lines of shell before Python starts: ``["module load python", "source /sw/env/bin/activate"]``."""
    python: str = ""
    """The Python that runs the jobs, by its path in full or a name; by default the one that submits them."""
    interface: str = ""
    """Network interface of scheduler and workers: ``"ib0"``, ``"hsn0"``."""
    scratch: str = ""
    """Folder on the node's own disk, as the shell there expands it: ``"$TMPDIR"``, ``"/scratch/$USER"``. A folder of
    the job's own is made in it for temporary files, and removed with the job."""
    stage: bool = False
    """Copy the files of an image to ``scratch`` before they are read, and remove them after it."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """What each worker process has that not all have: ``{ GPU = 1 }``, ``{ EDGETPU = 1 }``."""
    tls: bool = True
    """Encrypt, and let in only who has the key. Without it anybody on the network can run code as you."""
    login: str = ""
    """``user@host`` by which one reaches the site, for the line that shows the dashboard."""
    certificates: Certificates = field(default_factory=Certificates)
    """Table: files of TLS that exist already; by default temporary ones are made for each run."""
    driver: DriverJob = field(default_factory=DriverJob)
    """Table: the job of the driver itself."""

    def __post_init__(self) -> None:
        _require(
            self.system in (*QUEUES, "address"), f"system = {self.system!r}: must be {', '.join(QUEUES)} or address"
        )
        if self.system == "address":
            _require("://" in self.address, f"address = {self.address!r}: must be tls://host:port or tcp://host:port")
            return
        _require(not self.address, f"address is for system = 'address'; here system = {self.system!r}")
        _require(self.cores >= 1, f"cores = {self.cores}: must be at least 1")
        _require(self.workers >= 0, f"workers = {self.workers}: must be positive, or 0")
        _require(
            0 <= self.min_jobs <= self.max_jobs, f"min_jobs = {self.min_jobs}: must be 0 to max_jobs = {self.max_jobs}"
        )
        _require(self.max_jobs >= 1, f"max_jobs = {self.max_jobs}: must be at least 1")
        _require(
            0 <= self.margin < self.walltime_s,
            f"margin = {self.margin}: must be shorter than the walltime, {self.walltime}",
        )
        _require(not self.qos or self.system == "slurm", f"qos: {self.system} has none; say it in directives")
        _require(
            "/" not in self.python or self.python.startswith("/"),
            f"python = {self.python!r}: must be a path in full, or a name: jobs begin elsewhere",
        )
        _require(not self.stage or bool(self.scratch), "stage = true: needs scratch, where to copy to")
        _require(
            all(isinstance(n, (int, float)) and not isinstance(n, bool) and n > 0 for n in self.resources.values()),
            f"resources = {dict(self.resources)}: must be positive numbers",
        )
        share = self.worker_memory(threads=1)
        _require(
            share >= LEAST_MEMORY,
            f"memory = {self.memory!r}: leaves {share / 1e6:.0f} MB to each of {self.processes(1)} workers; they need "
            f"{LEAST_MEMORY / 1e6:.0f} MB before they have seen an image: more memory, or workers = fewer",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Site:
        """Build from what a TOML file says; raises `ConfigError`."""
        site: Site = settings_from(cls, values)
        needed = ("system", "address") if site.system == "address" else ("system", "cores", "memory", "walltime")
        missing = [key for key in needed if key not in values]
        _require(not missing, f"{' and '.join(missing)}: must be given")
        return site

    @property
    def walltime_s(self) -> int:
        """Seconds that a job may take."""
        return _seconds(self.walltime, "walltime")

    @property
    def leave_after_s(self) -> int:
        """Seconds after the job's start at which its workers begin nothing more."""
        return self.walltime_s - (self.margin or min(self.walltime_s // 10, 600))

    @property
    def memory_bytes(self) -> int:
        """Memory of a job."""
        return _bytes(self.memory, "memory")

    def processes(self, threads: int) -> int:
        """Worker processes of a job."""
        return self.workers or max(1, self.cores // threads)

    def worker_memory(self, threads: int) -> int:
        """Bytes that one of them may use."""
        return (self.memory_bytes - LAUNCHER_MEMORY) // self.processes(threads)


def site_folders() -> list[Path]:
    """Where a profile is looked for by its name: here, the user's own, and those of a checkout."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [Path("cluster"), home / "batchproc" / "clusters", Path(__file__).parents[2] / "cluster"]


def find_site(word: str) -> Path:
    """The file of a profile, given by its path or its name; raises `UsageError` where there is none."""
    if "/" in word or word.endswith(".toml"):
        return Path(word)
    folders = site_folders()
    for folder in folders:
        path = folder / f"{word}.toml"
        if path.is_file():
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.toml")})
    close = difflib.get_close_matches(word, ["local", "serial", *known], n=1)
    hint = f"did you mean {close[0]}?" if close else f"profiles here: {', '.join(known) or 'none'}"
    raise UsageError(
        f"cluster {word!r}: expected local, serial, tcp://host:port, tls://host:port, or a profile: {word}.toml in "
        f"{', '.join(map(str, folders))}, or its path; {hint}"
    )


def load_site(word: str) -> Site:
    """A profile by its path or name; raises `UsageError` (`ConfigError` for what it says)."""
    path = find_site(word)
    values = read_toml(path)
    try:
        return Site.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _seconds(text: str, key: str) -> int:
    match = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", text)
    _require(match is not None, f'{key} = {text!r}: must be hours, minutes, seconds: "12:00:00"')
    hours, minutes, seconds = map(int, match.groups())  # type: ignore[union-attr]
    total = 3600 * hours + 60 * minutes + seconds
    _require(total > 0, f"{key} = {text!r}: must be longer")
    return total


def _bytes(text: str, key: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b", text.strip().lower())
    _require(match is not None, f'{key} = {text!r}: must be a size with its unit: "64GB", "60GiB"')
    number, unit = match.groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS[unit or ""])
