"""A function in a process of its own: one thread, memory that nobody else has filled, and a clock that counts CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from batchproc.distribute.threads import thread_environment

_STATUS = Path("/proc/self/status")


def run_fresh(function: str, *, echo: bool = False, **arguments: Any) -> dict[str, Any]:
    """Call ``package.module:function`` with JSON arguments in a new interpreter; returns the JSON that it returns.

    With ``echo`` what it writes to standard error is shown.

    Raises
    ------
    RuntimeError
        With the last line that the process wrote before it failed.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks._fresh", function, json.dumps(arguments)]
    root = Path(__file__).parents[2]
    environment = os.environ | thread_environment(1)
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if echo:
        print(done.stderr, end="", file=sys.stderr)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        raise RuntimeError(f"{function}: {last}")
    return json.loads(lines[-1])


def resident_mb() -> float:
    """What this process has in memory now."""
    return _status("VmRSS")


class Peak:
    """The most memory that this process has had since, in MB: the whole of it, or above what it had then."""

    def __init__(self) -> None:
        # The kernel's own high-water mark; getrusage would hand on that of the parent process.
        Path("/proc/self/clear_refs").write_text("5")
        self._start = resident_mb()

    def total_mb(self) -> float:
        """With inputs, libraries and the interpreter."""
        return _status("VmHWM")

    def above_start_mb(self) -> float:
        """Without what was there already."""
        return self.total_mb() - self._start


def _status(key: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def cpu_and_wall(work: Any) -> tuple[Any, float, float]:
    """What ``work()`` returns, and the CPU and wall seconds that it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def least_cpu(work: Any, *, repeat: int) -> float:
    """The fewest CPU seconds of several calls: other people's load only ever adds."""
    return min(cpu_and_wall(work)[1] for _ in range(repeat))


def rfft2_plan(shape: tuple[int, int]) -> Any:
    """pyFFTW's float32 ``rfft2`` of a shape on one thread, planned with FFTW_MEASURE; ``execute()`` copies nothing."""
    import pyfftw

    real = pyfftw.zeros_aligned(shape, dtype="float32")
    half = pyfftw.zeros_aligned((shape[0], shape[1] // 2 + 1), dtype="complex64")
    return pyfftw.FFTW(real, half, axes=(0, 1), flags=("FFTW_MEASURE",), threads=1)


def rfft2_seconds(shape: tuple[int, int] = (2048, 2048), *, repeat: int = 25) -> float:
    """CPU seconds of one float32 ``rfft2``: the unit of the tables."""
    plan = rfft2_plan(shape)
    plan.execute()
    return least_cpu(plan.execute, repeat=repeat)


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    returned = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    print(flush=True)  # a library may have left a line unfinished
    print(json.dumps(returned))
