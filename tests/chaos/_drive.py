"""A driver to be killed: ``python -m tests.chaos._drive MANIFEST RUN`` leaves with the exit code of the run."""

from __future__ import annotations

import sys

from batchproc.job import run
from tests.chaos._campaign import CONFIG, STEPS

if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], config=CONFIG, workers=2, steps=STEPS).exit_code)
