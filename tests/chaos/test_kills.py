"""SIGKILL of workers and of the driver, again and again, through a campaign of real images.

Whatever is killed, every image is done in the end, once, with the bytes of a run that nobody disturbed::

    pytest -m chaos tests/chaos/test_kills.py -s
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
import pytest

from batchproc.io.index import iter_done
from batchproc.io.run_folder import RunFolder
from batchproc.job import run
from tests.chaos._campaign import CONFIG, N_IMAGES, STEPS, events_of, require_same
from tests.chaos._steps import BUSY, PACE_S

pytestmark = pytest.mark.chaos

#: On average so many task times pass between two kills of a worker.
TASKS_A_KILL = 3.0
DRIVER_KILLS = 10


def worker_processes(driver: int) -> list[psutil.Process]:
    """The workers of a local cluster."""
    try:
        children = psutil.Process(driver).children()
        return [child for child in children if any("spawn_main" in word for word in child.cmdline())]
    except psutil.Error:
        return []


def has_begun(worker: psutil.Process, night: Path) -> bool:
    """Whether it has ever had an image: a worker, and not a process that is on its way to become one."""
    return (night / BUSY / f"{worker.pid}.began").exists()


def is_busy(worker: psutil.Process, night: Path) -> bool:
    """Whether it, or the process in which it tries an image alone, is in the middle of one."""
    try:
        pids = [worker.pid, *(child.pid for child in worker.children(recursive=True))]
    except psutil.Error:
        return False
    return any((night / BUSY / str(pid)).exists() for pid in pids)


@dataclass
class Killer(threading.Thread):
    """Kills a random worker of this process every now and then, until it is told to stop."""

    night: Path
    rng: np.random.Generator
    every_s: float
    killed: int = 0
    killed_at_work: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        while not self.stop.wait(self.rng.exponential(self.every_s)):
            workers = [worker for worker in worker_processes(os.getpid()) if has_begun(worker, self.night)]
            if workers:
                worker = workers[self.rng.integers(len(workers))]
                self.killed_at_work += is_busy(worker, self.night)
                worker.send_signal(signal.SIGKILL)
                self.killed += 1


def test_workers_killed_all_the_while(manifest: Path, control: Path, tmp_path: Path) -> None:
    """Every three task times on average a random worker dies of SIGKILL: all images are done, with the same rows,
    values, scores and stamps as undisturbed, none twice; and nobody is blamed."""
    task_s = task_seconds(control)
    killer = Killer(manifest.parent, np.random.default_rng(1), TASKS_A_KILL * task_s)
    killer.start()
    start = time.monotonic()
    summary = run(manifest, tmp_path / "run", config=CONFIG, workers=2, steps=STEPS, quiet=True)
    seconds = time.monotonic() - start
    killer.stop.set()
    killer.join()
    assert summary.exit_code == 0
    lost = events_of(tmp_path / "run", "image_lost")
    print(
        f"tasks of {task_s:.1f} s; "
        f"{killer.killed} workers killed in {seconds:.0f} s, {killer.killed_at_work} in the middle of an image; "
        f"{len(lost)} images lost and done again"
    )
    # It was chaos indeed.
    assert killer.killed >= 8
    assert killer.killed_at_work >= 5
    assert len(lost) >= killer.killed_at_work
    require_same(tmp_path / "run", control, manifest)


def task_seconds(control: Path) -> float:
    """That an image took in the undisturbed run, on this machine as it is today."""
    moments = [datetime.fromisoformat(event["time"]).timestamp() for event in events_of(control, "image_done")]
    return max(PACE_S, 2 * (max(moments) - min(moments)) / (len(moments) - 1))


@dataclass
class Driver:
    """A driver in a process of its own; only that process is killed, its workers are left to notice."""

    manifest: Path
    folder: Path
    process: subprocess.Popen[bytes] = field(init=False)
    workers: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "tests.chaos._drive", str(self.manifest), str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def watch(self) -> Iterator[int]:
        """Images done so far, as often as one can look, while the driver lives."""
        while self.process.poll() is None:
            self.workers |= {worker.pid: worker.create_time() for worker in worker_processes(self.process.pid)}
            yield images_done(self.folder)
            time.sleep(0.05)

    def kill(self) -> int:
        """SIGKILL; returns how many of its workers were in the middle of an image."""
        workers = worker_processes(self.process.pid)
        busy = sum(is_busy(worker, self.manifest.parent) for worker in workers)
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL, "the driver had ended by itself"
        return busy


def images_done(folder: Path) -> int:
    """On the disk."""
    return len({done.image_id for done in iter_done(RunFolder(folder))}) if folder.is_dir() else 0


def alive(workers: dict[int, float]) -> list[int]:
    """Those that still live, and are not others of the same number."""
    return [
        pid for pid, born in workers.items() if psutil.pid_exists(pid) and psutil.Process(pid).create_time() == born
    ]


def test_the_driver_killed_ten_times(manifest: Path, control: Path, tmp_path: Path) -> None:
    """At ten random moments the driver dies of SIGKILL, three more times when all images are done and it is scoring,
    packing and reporting; each time the same command is given again. The end is that of an undisturbed run."""
    rng = np.random.default_rng(2)
    folder = tmp_path / "run"
    # Moments by how far the run has come: a moment by the clock might be after its end.
    moments = np.sort(rng.choice(N_IMAGES - 2, DRIVER_KILLS, replace=False)).tolist() + [N_IMAGES] * 3
    moments[0] = 0  # before anything is done: while Python starts, while the run is frozen
    busy, done, workers = [], [], {}
    for moment in moments:
        driver = Driver(manifest, folder)
        rest = float(rng.uniform(0, 2 * PACE_S))
        for n_done in driver.watch():
            if n_done >= moment:
                break
        time.sleep(rest if moment < N_IMAGES else rest / 3)
        if moment == N_IMAGES and driver.process.poll() is not None:
            continue  # too late: it had nothing left to do
        done.append(images_done(folder))
        busy.append(driver.kill())
        workers |= driver.workers
    assert len(done) >= DRIVER_KILLS
    last = Driver(manifest, folder)
    assert last.process.wait(600) == 0, last.process.stderr.read()
    print(f"killed with {done} of {N_IMAGES} images done, {busy} workers in the middle of one")
    assert sum(n > 0 for n in busy) >= 5
    assert len(set(done)) >= 6
    require_same(folder, control, manifest)
    deadline = time.monotonic() + 15
    while alive(workers) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not alive(workers), "workers outlive their drivers"
