"""What a driver says of itself while it is at work: a log of events, a line each, and a heartbeat.

``log/events.jsonl`` grows by one JSON object a line, each with its ``time`` (ISO, UTC, the driver's clock) and its
``event``; ``log/heartbeat.json`` is one object that is replaced every few seconds. Both are for people and programs
that watch: nothing is resumed from them, and a disk that takes no more of them stops nobody. `batchproc.io.status` and
the report read them, from any machine, while they are written.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from batchproc.io.atomic import TEMPORARY
from batchproc.io.run_folder import RunFolder

__all__ = [
    "BEAT_S",
    "FINISHED",
    "EventLog",
    "NullEvents",
    "events_file",
    "heartbeat_file",
    "read_events",
    "read_heartbeat",
]

#: The heartbeat is replaced so often at most, seconds; a driver that works never lets it grow much older.
BEAT_S = 10.0
_FLUSH_S = 1.0
_FLUSH_BYTES = 2**16

#: Events with which an image ends, until somebody tries it again.
FINISHED = ("image_done", "image_failed", "image_bug")
_FROM_BEGIN = ("command", "cluster", "to_do", "dashboard")  # of run_begun, in every heartbeat

#: Under what name a queue tells a job its number.
_BATCH_JOB = {"SLURM_JOB_ID": "Slurm", "PBS_JOBID": "PBS", "LSB_JOBID": "LSF"}


def events_file(folder: RunFolder) -> Path:
    """``log/events.jsonl``."""
    return folder.log / "events.jsonl"


def heartbeat_file(folder: RunFolder) -> Path:
    """``log/heartbeat.json``."""
    return folder.log / "heartbeat.json"


class NullEvents:
    """Takes everything an `EventLog` takes, and does nothing."""

    def write(self, event: str, **fields: Any) -> None:
        """Forget an event."""

    def beat(self, **fields: Any) -> None:
        """Forget a heartbeat."""

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class EventLog(NullEvents):
    """The log and the heartbeat of one driver.

    Lines are collected for up to a second and appended together, so that an event costs microseconds; a killed driver
    loses no more than that of its log, and nothing of its run. One driver at a time writes (`RunFolder.locked`).

    Within a ``with`` block a thread brings lines and heartbeat to the disk, also while the driver waits for a worker.
    Without it they go there with the calls.

    Parameters
    ----------
    folder : RunFolder
        Begun: ``log/`` is there.

    Examples
    --------
    >>> with EventLog(folder) as events:  # doctest: +SKIP
    ...     events.write("run_begun", to_do=60)
    ...     events.write("image_done", image_id="ztf_1", seconds=2.1, cpu_seconds=2.0, n_candidates=12)
    ...     events.beat(in_flight=4, workers=2)
    """

    def __init__(self, folder: RunFolder) -> None:
        self._log, self._heart = events_file(folder), heartbeat_file(folder)
        self._lines: list[bytes] = []
        self._bytes = 0
        self._flushed = time.monotonic()
        self._beaten = -math.inf
        self._fields: dict[str, Any] = {**_driver(), "since": _now(), "finished": 0}
        self._mine = threading.RLock()
        self._closed = threading.Event()

    def write(self, event: str, **fields: Any) -> None:
        """Append an event; fields are what JSON knows, and anything else as its text.

        The heartbeat counts the images that have ended, and keeps what ``run_begun`` said there was to do.
        """
        line = _json({"time": _now(), "event": event, **fields}).encode() + b"\n"
        with self._mine:
            if event in FINISHED:
                self._fields["finished"] += 1
            elif event == "run_begun":
                self._fields |= {key: fields[key] for key in _FROM_BEGIN if key in fields}
            self._lines.append(line)
            self._bytes += len(line)
            due = time.monotonic() - self._flushed >= _FLUSH_S or self._bytes >= _FLUSH_BYTES
            if due or event not in FINISHED:  # the others are rare, and the report of a run is written before it closes
                self._flush()

    def beat(self, **fields: Any) -> None:
        """Say that the driver is alive, every `BEAT_S` at most; fields stay until they are given again."""
        with self._mine:
            self._fields |= fields
            if time.monotonic() - self._beaten >= BEAT_S:
                self._beat(alive=True)

    def close(self) -> None:
        """Bring everything to the disk, and say that this driver has left of its own will."""
        self._closed.set()
        with self._mine:
            self._flush()
            self._beat(alive=False)

    def __enter__(self) -> Self:
        threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True).start()
        return self

    def _keep_alive(self) -> None:
        while not self._closed.is_set():
            with self._mine:
                self._flush()
            self.beat()
            self._closed.wait(_FLUSH_S)

    def _flush(self) -> None:
        data, self._lines, self._bytes = b"".join(self._lines), [], 0
        self._flushed = time.monotonic()
        if data:
            with suppress(OSError):  # a full disk stops the campaign where its results are written, not here
                _append(self._log, data)

    def _beat(self, *, alive: bool) -> None:
        if alive and self._closed.is_set():
            return
        self._beaten = time.monotonic()
        _replace(self._heart, _json({"time": _now(), "alive": alive, **self._fields}))


def read_events(folder: RunFolder, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Events in the order in which they were written; torn or foreign lines are passed over.

    Parameters
    ----------
    folder : RunFolder
    last_bytes : int, optional
        Begin with the first whole line of so many bytes at the end; by default with the first of all.
    """
    try:
        file = events_file(folder).open("rb")
    except FileNotFoundError:
        return
    with file:
        if last_bytes is not None and (size := file.seek(0, os.SEEK_END)) > last_bytes:
            file.seek(size - last_bytes)
            file.readline()
        else:
            file.seek(0)
        for line in file:
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event and "time" in event:
                    yield event


def read_heartbeat(folder: RunFolder) -> dict[str, Any]:
    """The last heartbeat of the last driver; empty where there has been none."""
    with suppress(OSError, ValueError):
        heart = json.loads(heartbeat_file(folder).read_text())
        if isinstance(heart, dict):
            return heart
    return {}


def _driver() -> dict[str, Any]:
    """Who writes: machine, process, and its job on a queue."""
    found: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    for variable, system in _BATCH_JOB.items():
        if number := os.environ.get(variable):
            found["batch_job"] = f"{system} {number}"
    return found


def _append(path: Path, data: bytes) -> None:
    """Add lines to a file; where the last one in it was torn by a kill, on a line of their own."""
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data
        file.write(data)


def _replace(path: Path, text: str) -> None:
    # Not synced to the disk as results are: it is out of date in ten seconds, and a sync may take as long.
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with suppress(OSError):
        temporary.write_text(text)
        os.replace(temporary, path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, default=str, separators=(",", ":"))
