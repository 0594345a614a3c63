"""How far a run has come, told from its folder alone: on any machine that sees it, while a driver writes, or after.

Images are counted by their markers, failures by the driver's log; who works, how fast, and with how many workers is
told by the heartbeat and the last events (`batchproc.io.events`). Nothing is written. Times are compared on the clock
of the driver that wrote them, so that another machine's may differ.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchproc.io.events import BEAT_S, FINISHED, read_events, read_heartbeat
from batchproc.io.index import iter_markers
from batchproc.io.progress import iter_failures
from batchproc.io.run_folder import RunFolder

__all__ = ["Driver", "Status", "Submitted", "read_status", "read_submitted"]

_OLD_S = 60.0  # a driver that was heard of longer ago is not at work
_SKEW_S = 3600.0  # clocks of machines that work together differ by less
_WATCH_S = 1.5 * BEAT_S  # so long one waits for a heartbeat whose clock may be another's
_RECENT_S, _FEWEST = 600.0, 10  # the rate is that of ten minutes, or of ten images where those take longer
_TAIL_BYTES = 2**21  # some 15,000 events


@dataclass(frozen=True)
class Driver:
    """The process that works on a run, or that did so last.

    Attributes
    ----------
    running : bool
        It was heard of within the last minute, and has not said that it left.
    host, pid, batch_job : str, int, str
        Where it runs, and its job on a queue ("Slurm 4711"; empty where it is in none).
    since, heard : str
        When it began, and was last heard of: UTC, on its own clock.
    command, phase : str
        What it was asked for, and what it is at.
    workers, in_flight : int
        Worker processes, and images under way.
    dashboard : str
        Dask's live page; empty where there is none.
    killed : bool
        It neither works nor has it said that it left.
    """

    running: bool = False
    host: str = ""
    pid: int = 0
    batch_job: str = ""
    since: str = ""
    heard: str = ""
    command: str = ""
    phase: str = ""
    workers: int = 0
    in_flight: int = 0
    dashboard: str = ""
    killed: bool = False


@dataclass(frozen=True)
class Submitted:
    """The job that drives a run, as it was handed in last.

    Attributes
    ----------
    job, name : str
        Number and name on the queue.
    again : str
        The command that submits the run again.
    """

    job: str
    name: str
    again: str


@dataclass(frozen=True)
class Status:
    """How far a run has come.

    Attributes
    ----------
    total, done, failed, bugs, missing : int
        Images: in the manifest, finished, failed in a foreseen way, failed by a bug, not tried yet.
    n_candidates : int
    errors : dict
        Number of failures by "stage: type of error", the most frequent first.
    scores : dict
        Number of score files of each model.
    cpu_hours : float
        Spent on what is done.
    cpu_hours_left : float or None
        That the missing images will take at the same rate; None before one is done.
    rate : float
        Images a second over the last minutes of the last driver; 0 where none was finished.
    seconds_left : float or None
        Until the driver has done what it was asked for; None where none is at work, or nothing is known.
    driver : Driver or None
        None where there has never been one.
    submitted : Submitted or None
        The job that drives it, where `batchproc submit` put it on a queue.
    """

    run: str
    total: int
    done: int
    failed: int
    bugs: int
    missing: int
    n_candidates: int
    errors: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, int] = field(default_factory=dict)
    cpu_hours: float = 0.0
    cpu_hours_left: float | None = None
    rate: float = 0.0
    seconds_left: float | None = None
    driver: Driver | None = None
    submitted: Submitted | None = None


def read_submitted(folder: RunFolder) -> Submitted | None:
    """The job that a run was submitted as, also before it has begun; None where it was not."""
    try:
        record = json.loads(folder.submission.read_text())
        return Submitted(record["job"], record["name"], record["again"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_status(folder: RunFolder) -> Status:
    """The `Status` of a run, while it is at work or afterwards.

    Takes seconds for a million images. Where the clock of this machine and the driver's disagree about whether it was
    heard of within the last minute, a heartbeat more is waited for.
    """
    heart = read_heartbeat(folder)
    driver = _driver(heart, running=_is_running(folder, heart)) if heart else None
    total = pq.read_metadata(folder.manifest).num_rows
    done, n_candidates, cpu_seconds = _count_done(folder)
    statuses: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for receipt in iter_failures(folder):
        statuses[receipt.status] += 1
        errors[f"{receipt.stage}: {receipt.error}"] += 1
    missing = max(0, total - done - statuses["failed"] - statuses["bug"])
    rate = _rate(folder, heart if driver and driver.running else {})
    to_do = heart.get("to_do", missing + heart.get("finished", 0)) - heart.get("finished", 0)
    return Status(
        run=str(folder.path),
        total=total,
        done=done,
        failed=statuses["failed"],
        bugs=statuses["bug"],
        missing=missing,
        n_candidates=n_candidates,
        errors=dict(errors.most_common()),
        scores={path.name: len(list(path.glob("[!.]*.parquet"))) for path in sorted(folder.scores.glob("*/"))},
        cpu_hours=cpu_seconds / 3600,
        cpu_hours_left=missing * cpu_seconds / done / 3600 if done else None,
        rate=rate,
        seconds_left=max(0, to_do) / rate if driver and driver.running and rate else None,
        driver=driver,
        submitted=read_submitted(folder),
    )


def _count_done(folder: RunFolder) -> tuple[int, int, float]:
    """Finished images, their candidates, and the CPU seconds they took."""
    images, candidates, cpu_seconds = 0, 0, 0.0
    for table in iter_markers(folder, ["n_candidates", "cpu_seconds"]):
        images += len(table)
        candidates += pc.sum(table["n_candidates"]).as_py() or 0
        cpu_seconds += pc.sum(table["cpu_seconds"]).as_py() or 0.0
    return images, candidates, cpu_seconds


def _is_running(folder: RunFolder, heart: Mapping[str, Any]) -> bool:
    if not heart.get("alive"):
        return False
    age = time.time() - _seconds(heart["time"])
    if heart.get("host") == socket.gethostname():  # one clock
        return age < _OLD_S and _is_process(int(heart.get("pid", 0)))
    if 0 <= age < _OLD_S:
        return True
    if abs(age) > _SKEW_S:
        return False
    end = time.monotonic() + _WATCH_S
    while time.monotonic() < end:
        time.sleep(_WATCH_S / 15)
        now = read_heartbeat(folder)
        if now.get("time", heart["time"]) != heart["time"]:
            return bool(now.get("alive"))
    return False


def _is_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return pid > 0


def _driver(heart: Mapping[str, Any], *, running: bool) -> Driver:
    known = {name: heart[name] for name in Driver.__dataclass_fields__ if heart.get(name) is not None}
    return Driver(
        **known | {"running": running, "heard": heart["time"], "killed": bool(heart["alive"]) and not running}
    )


def _rate(folder: RunFolder, heart: Mapping[str, Any]) -> float:
    """Images a second that the last driver finished lately, on its clock; of one at work, up to its last heartbeat."""
    times: list[float] = []
    for event in read_events(folder, last_bytes=_TAIL_BYTES):
        if event["event"] == "run_begun":
            times = []
        if event["event"] in (*FINISHED, "run_begun") or not times:
            times.append(_seconds(event["time"]))
    if len(times) < 2:
        return 0.0
    now = max(times[-1], _seconds(heart["time"])) if heart else times[-1]
    recent = sum(when > now - _RECENT_S for when in times[1:])
    if recent > _FEWEST:  # from the first of them on: it may have waited for processes to begin
        return (recent - 1) / max(now - times[-recent], 1e-3)
    n = min(_FEWEST, len(times) - 1)
    return n / max(now - times[-1 - n], 1e-3)


def _seconds(when: str) -> float:
    return datetime.fromisoformat(when).timestamp()
