"""A function in a process of its own, and what its processes hold and use while it runs, seen from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import psutil

from batchproc.distribute.threads import thread_environment

MB = 1e6

_EVERY_S = 0.5
_SETTLED = 0.3  # of the samples: what a process loads and fills at its beginning is no growth


@dataclass
class Memory:
    """Resident memory of one process over time.

    Attributes
    ----------
    seconds, mb : list of float
        Since the beginning; MB of 10⁶ bytes.
    """

    seconds: list[float] = field(default_factory=list)
    mb: list[float] = field(default_factory=list)

    @property
    def peak(self) -> float:
        """The most that was seen, MB."""
        return max(self.mb, default=0.0)

    def growth(self) -> float:
        """MB that a straight line through the later samples rises from their first to their last."""
        first = int(_SETTLED * len(self.mb))
        seconds, mb = np.array(self.seconds[first:]), np.array(self.mb[first:])
        return float(np.polyfit(seconds, mb, 1)[0] * np.ptp(seconds)) if len(mb) > 2 else 0.0


def run_watched(function: str, *, others: dict[str, int] | None = None, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Call ``package.module:function`` with JSON arguments in a new interpreter, as `run_fresh` does, and watch it.

    Parameters
    ----------
    function : str
    others : dict, optional
        Name → process id of other processes to watch.
    **arguments

    Returns
    -------
    returned
        What the function returned.
    memory : dict
        Name → `Memory`: of the process (``"driver"``), of its largest child at each moment (``"worker"``), of the
        others.

    Raises
    ------
    RuntimeError
        With the last lines that the process wrote before it failed.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks._fresh", function, json.dumps(arguments)]
    with TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env=os.environ | thread_environment(1),
            stdout=out,
            stderr=errors,
        )
        memory = {name: Memory() for name in ("driver", "worker", *(others or {}))}
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, others or {}, memory, ended))
        watcher.start()
        try:
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
            ended.set()
            watcher.join()
        for file in (out, errors):
            file.seek(0)
        lines = out.read().splitlines()
        if process.returncode or not lines:
            raise RuntimeError(f"{function} ended with {process.returncode}: {errors.read()[-2000:]}")
    return json.loads(lines[-1]), memory


def _watch(pid: int, others: dict[str, int], memory: dict[str, Memory], ended: threading.Event) -> None:
    start = time.monotonic()
    while not ended.wait(_EVERY_S):
        now = time.monotonic() - start
        with suppress(psutil.Error):
            driver = psutil.Process(pid)
            _note(memory["driver"], now, [driver])
            _note(memory["worker"], now, driver.children(recursive=True))
        for name, other in others.items():
            with suppress(psutil.Error):
                _note(memory[name], now, [psutil.Process(other)])


def _note(memory: Memory, now: float, processes: list[psutil.Process]) -> None:
    mb = 0.0
    for process in processes:
        with suppress(psutil.Error):
            mb = max(mb, process.memory_info().rss / MB)
    if mb:
        memory.seconds.append(now)
        memory.mb.append(mb)
