"""A Slurm of one node, for the tests of this folder; they are skipped, with the reason, where it cannot be had."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTING = ROOT / "cluster" / "testing"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Its state is in a folder of this session's own, and only what was started here is stopped."""
    pytest.importorskip("dask_jobqueue", reason="needs the extra 'hpc'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHPROC_SLURM_DIR", str(tmp_path_factory.mktemp("slurm")))
        started = subprocess.run([TESTING / "up.sh"], capture_output=True, text=True, check=False)
        if started.returncode == 77:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        patch.setenv("SLURM_CONF", re.search(r"SLURM_CONF=(\S+)", started.stdout)[1])
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        try:
            yield
        finally:
            subprocess.run([TESTING / "down.sh", "--purge"], capture_output=True, check=False)


@pytest.fixture
def no_jobs_left(slurm):
    """Whatever a test leaves on the queue is a fault, and is removed before the next one."""
    yield
    left = subprocess.run(["squeue", "--noheader", "--format=%A"], capture_output=True, text=True, check=True).stdout
    for job in left.split():
        subprocess.run(["scancel", job], check=False)
