"""Where a run stands: told from its folder alone, by anybody, at any time."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchproc.cli.texts import tell_status
from batchproc.io import status as module
from batchproc.io.events import EventLog, events_file, heartbeat_file
from batchproc.io.index import PACK_SCHEMA
from batchproc.io.progress import ReceiptLog, gather
from batchproc.io.run_folder import RunFolder
from batchproc.io.status import read_status
from batchproc.records import Receipt
from tests import _runs

FAILED = Receipt("d", "failed", stage="align", error="AlignError", message="no stars")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Six images: three done, one failed, two missing."""
    folder = _runs.begin(tmp_path / "run", *"abcdef")
    for name in "abc":
        _runs.store(folder, name, 5, cpu_seconds=1800.0)
    with ReceiptLog(folder) as log:
        log.add(FAILED)
    return folder


def beat(folder: RunFolder, *, age: float = 0.0, **fields) -> None:
    """A heartbeat of that age, of another machine's driver."""
    when = datetime.now(UTC) - timedelta(seconds=age)
    heart = {"time": when.isoformat(), "alive": True, "host": "node17", "pid": 4711, "since": when.isoformat()}
    heartbeat_file(folder).write_text(json.dumps(heart | fields))


def finish(folder: RunFolder, ages: list[float]) -> None:
    """Events of images that ended so long ago."""
    with events_file(folder).open("a") as file:
        for age in ages:
            when = datetime.now(UTC) - timedelta(seconds=age)
            file.write(json.dumps({"time": when.isoformat(), "event": "image_done", "image_id": "a"}) + "\n")


def test_images_are_counted_and_nothing_is_written(folder: RunFolder) -> None:
    """Done by markers, failed by cause, CPU-hours spent and to come; the folder is as it was."""

    def look() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.path.rglob("*")}

    before = look()
    status = read_status(folder)
    assert look() == before
    assert (status.total, status.done, status.failed, status.bugs, status.missing) == (6, 3, 1, 0, 2)
    assert status.n_candidates == 15
    assert status.errors == {"align: AlignError": 1}
    assert (status.cpu_hours, status.cpu_hours_left) == (1.5, 1.0)
    assert (status.driver, status.seconds_left) == (None, None)
    gather(folder)
    assert read_status(folder) == status


def test_a_driver_at_work_is_seen(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who, where, in which job, how fast and how long still; when it has left, that it has."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with EventLog(folder) as events:
        events.write("run_begun", to_do=42, command="run", dashboard="http://127.0.0.1:8787/status")
        for _ in range(2):
            time.sleep(0.1)
            events.write("image_done", image_id="a")
        events.beat(phase="images", in_flight=4, workers=2)
        events._flush()
        events._beat(alive=True)
        status = read_status(folder)
        driver = status.driver
        assert driver is not None
        assert driver.running
        assert not driver.killed
        assert (driver.host, driver.pid, driver.batch_job) == (socket.gethostname(), os.getpid(), "Slurm 77")
        assert (driver.workers, driver.in_flight, driver.phase, driver.command) == (2, 4, "images", "run")
        assert 0.1 < status.rate < 12
        assert status.seconds_left == pytest.approx(40 / status.rate)
        text = tell_status(status)
        assert f"at work: images, process {os.getpid()} on {socket.gethostname()}, Slurm 77, since 20" in text
        assert "2 workers, 4 images under way" in text
        assert "dashboard: http://127.0.0.1:8787/status" in text
        assert json.loads(json.dumps(asdict(status), allow_nan=False))["driver"]["running"]
    ended = read_status(folder)
    assert ended.driver is not None
    assert (ended.driver.running, ended.driver.killed, ended.seconds_left) == (False, False, None)
    assert "nobody is at work" in tell_status(ended)
    assert f"`batchproc run {folder.path}/manifest.parquet --out {folder.path}` goes on" in tell_status(ended)


def test_a_killed_driver_is_seen_at_once_on_its_own_machine(folder: RunFolder) -> None:
    """Its process is gone, whatever its heartbeat said a moment ago."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    beat(folder, host=socket.gethostname(), pid=gone.pid)
    driver = read_status(folder).driver
    assert driver is not None
    assert (driver.running, driver.killed) == (False, True)
    assert "killed, or out of reach" in tell_status(read_status(folder))


def test_a_driver_elsewhere_is_known_by_its_heartbeat(folder: RunFolder) -> None:
    """Fresh: at work. Hours old: not; and nobody waits to learn that."""
    beat(folder, age=5)
    start = time.monotonic()
    driver = read_status(folder).driver
    assert driver is not None
    assert driver.running
    beat(folder, age=7200)
    driver = read_status(folder).driver
    assert driver is not None
    assert (driver.running, driver.killed) == (False, True)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("skew", [-600.0, 600.0])
def test_clocks_may_disagree(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, skew: float) -> None:
    """Minutes old or from the future: whoever beats on is at work, whoever does not is not."""
    monkeypatch.setattr(module, "_WATCH_S", 0.6)
    beat(folder, age=skew)
    driver = read_status(folder).driver
    assert driver is not None
    assert not driver.running
    later = threading.Timer(0.2, beat, [folder], {"age": skew - 10})
    later.start()
    driver = read_status(folder).driver
    later.join()
    assert driver is not None
    assert driver.running


def test_the_rate_is_that_of_the_last_minutes(folder: RunFolder) -> None:
    """Not of the beginning; and a driver that finishes nothing gets slower as time passes."""
    finish(folder, [86400 - i for i in range(2000)])
    finish(folder, [590 - 10 * i for i in range(58)])
    beat(folder, age=0, to_do=10_000, finished=2058)
    status = read_status(folder)
    assert status.rate == pytest.approx(0.1, rel=0.1)
    assert status.seconds_left == pytest.approx(7942 / status.rate)
    events_file(folder).unlink()
    finish(folder, [3600 + 10 * i for i in range(50, 0, -1)])
    assert read_status(folder).rate < 0.1 / 20


def test_another_driver_begins_its_own_rate(folder: RunFolder) -> None:
    """What an earlier one finished, and the night between them, say nothing."""
    finish(folder, [86400 + i for i in range(50, 0, -1)])
    with EventLog(folder) as events:
        events.write("run_begun", to_do=2)
    assert read_status(folder).rate == 0


def test_a_torn_log_is_no_obstacle(folder: RunFolder) -> None:
    """Half a line, half a heartbeat: what can be read counts."""
    finish(folder, [30, 20, 10])
    with events_file(folder).open("ab") as file:
        file.write(b'{"time":"2026-11-2')
    heartbeat_file(folder).write_text('{"time":"20')
    status = read_status(folder)
    assert status.rate == pytest.approx(0.1, rel=0.01)
    assert status.driver is None
    assert status.done == 3


def test_a_hundred_thousand_images_take_a_moment(tmp_path: Path) -> None:
    """Packs are counted by a few columns; no more than 2 CPU seconds (a tenth of a million)."""
    n, pack = 100_000, 500
    folder = _runs.begin(tmp_path / "run", *(f"ztf_{i:06d}" for i in range(10)))
    for first in range(0, n, pack):
        columns = {
            field.name: pa.array(
                [f"ztf_{i:06d}" for i in range(first, first + pack)]
                if field.name == "image_id"
                else [datetime.now(UTC)] * pack
                if pa.types.is_timestamp(field.type)
                else ["x" * 32] * pack
                if pa.types.is_string(field.type)
                else [2] * pack,
                field.type,
            )
            for field in PACK_SCHEMA
        }
        pq.write_table(pa.table(columns, PACK_SCHEMA), folder.done / f"packed@{first // pack + 1:06d}-0a0b0c.parquet")
    start = time.process_time()
    status = read_status(folder)
    assert time.process_time() - start < 2
    assert (status.done, status.n_candidates) == (n, 2 * n)
    assert math.isclose(status.cpu_hours, 2 * n / 3600)
