"""A driver as a program: ``python -m tests.slurm._driver RUN N KIND [--cluster PROFILE]``.

A run of N made-up images; the work of each takes a second or so and tells in ``RUN/seen`` where it was done. KIND says
what is done to it on the way (`WORK`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from batchproc.distribute.clusters import Where
from batchproc.job import Steps, run
from tests import _runs

SECONDS = 0.8


def _seen(entry, **more) -> Path:
    """Leave a note of where an image was worked on; returns the folder of the notes."""
    folder = Path(os.environ["BATCHPROC_TEST_SEEN"])
    job = os.environ.get("SLURM_JOB_ID", "")
    note = {
        "image": entry.image_id,
        "job": job,
        "pid": os.getpid(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        **more,
    }
    (folder / f"{entry.image_id}-{time.time_ns()}.json").write_text(json.dumps(note))
    return folder


def plain(entry, config):
    """An image that takes a while."""
    _seen(entry, scratch=os.environ.get("BATCHPROC_SCRATCH", ""), temporary=os.environ.get("TMPDIR", ""))
    time.sleep(SECONDS)
    return _runs.process(entry, config)


def long(entry, config):
    """An image that takes longer than a worker stays after it has begun to leave."""
    _seen(entry)
    time.sleep(7)
    return _runs.process(entry, config)


def hungry(entry, config):
    """Two images need far more memory than their job has, in a process of their own, when they are first tried."""
    folder = _seen(entry)
    first = folder / f"ate-{entry.image_id}"
    if entry.image_id in ("image5", "image12") and not first.exists():
        first.touch()
        subprocess.run([sys.executable, "-c", "import time; x = b'x' * 2**31; time.sleep(30)"], check=False)
    time.sleep(SECONDS)
    return _runs.process(entry, config)


WORK = {"plain": plain, "long": long, "hungry": hungry}


def names(n: int) -> list[str]:
    return [f"image{i}" for i in range(n)]


def go(folder: Path, n: int, kind: str, where: Where | str, quiet: bool = False):
    steps = Steps(process=WORK[kind], model=_runs.load_model, wisdom=_runs.no_wisdom, report=_runs.report)
    return run(
        _runs.entries(*names(n)), folder, config=_runs.CONFIG, cluster=where, report=False, quiet=quiet, steps=steps
    )


if __name__ == "__main__":
    folder, n, kind, cluster = sys.argv[1:5]
    sys.exit(go(Path(folder), int(n), kind, cluster).exit_code)
