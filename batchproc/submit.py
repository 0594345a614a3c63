"""The driver of a run as a job of its own, which submits itself again until the run is done.

`submit` writes the job's script and hands it to the batch system. In the job, this module runs as a program: it starts
``batchproc run``, ends it in good time before the walltime, and hands the same script in again while images are missing
and every few rounds some of them get done. A job whose node died is started again by the batch system itself, where
that does so; a run that stopped for good is continued by the same ``batchproc submit``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from batchproc.distribute.batch import SYSTEMS, check_installed, driver_script, worker_script
from batchproc.distribute.batch import submit as hand_in
from batchproc.distribute.clusters import DASK
from batchproc.distribute.sites import find_site, load_site
from batchproc.errors import BatchprocError, ClusterError, UsageError
from batchproc.io.atomic import write_text

__all__ = ["Submission", "drive", "prepare", "submit"]

IDLE_ROUNDS = 3  # jobs in a row that got nothing done
_MARGIN_S = 120.0  # of the walltime, for the driver to end what it has begun
_POLL_S = 0.2
_PAUSES_S = (5.0, 10.0, 20.0)  # until a batch system is asked again that did not take the next job
#: Exit codes of a run after which there is no point in another job: all done; usage; a bug or a fault.
_FINAL = (0, 2, 3)


@dataclass(frozen=True)
class Submission:
    """A run that was handed to a batch system: what is needed to hand it in again.

    Attributes
    ----------
    run, profile : str
        Paths.
    name : str
        Of the job.
    command : tuple of str
        What it runs.
    script : str
        Of the job.
    job : str
        Its number, of the last one.
    tried : int
        Images that had been tried when it was handed in.
    idle : int
        Jobs in a row before it in which no image was tried.
    again : str
        What a person types to submit it again.
    """

    run: str
    profile: str
    name: str
    command: tuple[str, ...]
    script: str
    job: str = ""
    tried: int = 0
    idle: int = 0
    again: str = ""

    @classmethod
    def read(cls, run: Path) -> Submission:
        """The last one of a run folder."""
        values = json.loads(_record(run).read_text())
        return cls(**{**values, "command": tuple(values["command"])})

    def hand_in(self) -> Submission:
        """To the batch system; on the disk as well."""
        site = load_site(self.profile)
        Path(self.run, "log", "jobs").mkdir(parents=True, exist_ok=True)
        handed = replace(self, job=hand_in(site, self.script))
        write_text(_record(Path(self.run)), json.dumps(asdict(handed), indent=2))
        return handed

    def stop_command(self) -> str:
        """Ends whichever job of the run there is; it is not handed in again then."""
        return SYSTEMS[load_site(self.profile).system].stop.format(name=self.name)


def prepare(manifest: str | Path, out: str | Path, profile: str, options: Sequence[str] = ()) -> tuple[Submission, str]:
    """A driver's job, not yet handed in, and the script of its workers' jobs.

    Parameters
    ----------
    manifest, out : path
        As for `batchproc.run`.
    profile : str
        Name or path of a site profile.
    options : sequence of str
        More of the command line of ``batchproc run``.

    Raises
    ------
    UsageError
        A profile that cannot be used, or one without a batch system.
    """
    site, run = load_site(profile), Path(out).resolve()
    if site.system not in SYSTEMS:
        raise UsageError(f"{find_site(profile)}: system = {site.system!r} has no queue; use `batchproc run --cluster`")
    check_installed(site)
    name = "bp-" + re.sub(r"[^\w.-]", "-", run.name)[:12]  # no longer than any batch system allows
    python = site.python or sys.executable
    path = str(find_site(profile).resolve())
    images = str(Path(manifest).resolve())
    command = (python, "-m", "batchproc", "run", images, "--out", str(run), "--cluster", path, *options)
    again = shlex.join(["batchproc", "submit", images, "--out", str(run), "--profile", path, *options])
    script = driver_script(site, name, run / "log", (python, "-m", "batchproc.submit", str(run)), Path.cwd())
    workers = worker_script(site, _threads(run, options), run / "log", DASK)
    return Submission(str(run), path, name, command, script, tried=_tried(run), again=again), workers


def submit(manifest: str | Path, out: str | Path, profile: str, options: Sequence[str] = ()) -> Submission:
    """Put the driver of a run on the queue; arguments as for `prepare`.

    Raises
    ------
    UsageError
        As `prepare`.
    ClusterError
        The batch system does not accept it.
    """
    submission, _ = prepare(manifest, out, profile, options)
    return submission.hand_in()


def drive(run: Path) -> int:
    """In the job: work until the walltime is near, and hand the job in again where that makes sense.

    Returns
    -------
    int
        The exit code of the job: 0 when it was handed in again, else that of the run.
    """
    submission = Submission.read(run)
    code, stopped = _work(submission)
    if stopped:
        _say("stopped from outside; `batchproc submit` goes on")
        return code
    if code in _FINAL or not _missing(run):
        return code
    tried = _tried(run)
    idle = 0 if tried > submission.tried else submission.idle + 1
    if idle >= IDLE_ROUNDS:
        _say(f"no image was tried in {idle} jobs: not handed in again; their output is in {run}/log/jobs")
        return code or 1
    try:
        handed = _hand_in_again(replace(submission, tried=tried, idle=idle))
    except BatchprocError as error:
        _say(f"{error}; `batchproc submit` goes on")
        return code or 1
    _say(f"images are missing: handed in again as job {handed.job}")
    return 0


def _work(submission: Submission) -> tuple[int, bool]:
    """Run the driver until it ends, or must; returns its exit code, and whether a signal had asked for its end."""
    end = float(os.environ.get("BATCHPROC_END_AT", "inf"))
    margin = min(_MARGIN_S, (end - time.time()) / 4)
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, ask)
    _say(shlex.join(submission.command))
    driver = subprocess.Popen(submission.command)
    told = False
    while driver.poll() is None:
        left = end - time.time()
        if not told and (asked or left < margin):
            driver.terminate()
            told = True
            _say("ending the driver: " + (f"signal {asked[0]}" if asked else f"{left:.0f} s of the walltime are left"))
        if left < margin / 2:
            driver.kill()  # so that there is time to hand in the next job
        time.sleep(_POLL_S)
    code = driver.returncode if driver.returncode >= 0 else 128 - driver.returncode  # as a shell says it
    # Signal USR1 is for sites that announce the end of a job that way: it means the walltime, not a wish.
    return code, any(number != signal.SIGUSR1 for number in asked)


def _hand_in_again(submission: Submission) -> Submission:
    """A batch system that is busy for a moment must not end a run of weeks: while there is time it is asked again.

    Where it had taken the job all the same, the second one finds that the run has a driver, and ends.
    """
    end = float(os.environ.get("BATCHPROC_END_AT", "inf"))
    for pause in _PAUSES_S:
        try:
            return submission.hand_in()
        except ClusterError as error:
            if time.time() + pause > end - _PAUSES_S[0]:
                break
            _say(f"{error}; again in {pause:g} s")
            time.sleep(pause)
    return submission.hand_in()


def _record(run: Path) -> Path:
    from batchproc.io.run_folder import RunFolder

    return RunFolder(run).submission


def _tried(run: Path) -> int:
    status = _status(run)
    return 0 if status is None else int(status.done + status.failed + status.bugs)


def _missing(run: Path) -> bool:
    """Whether there is something to do; a run that never began has everything to do."""
    status = _status(run)
    return status is None or status.missing > 0


def _status(run: Path) -> Any:
    from batchproc.io.run_folder import RunFolder
    from batchproc.io.status import read_status

    folder = RunFolder(run)
    return read_status(folder) if folder.record.is_file() else None


def _threads(run: Path, options: Sequence[str]) -> int:
    """Of the settings of a run, as its command line has them, or the run that is continued."""
    from batchproc.config import Config
    from batchproc.io.run_folder import RunFolder

    options = list(options)
    if "--config" in options:
        return Config.from_toml(options[options.index("--config") + 1]).threads
    folder = RunFolder(run)
    return (folder.config() if folder.record.is_file() else Config()).threads


def _say(message: str) -> None:
    print(f"batchproc: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(drive(Path(sys.argv[1])))
