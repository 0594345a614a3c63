"""One local cluster for all the tests that need one, and one number of threads for every test process."""

from __future__ import annotations

import os

import pytest

from batchproc.distribute.clusters import Where, open_executor
from batchproc.distribute.threads import thread_environment

# Before Numba is imported: it refuses another number once it has begun, and the command line and Dask's nannies
# set these variables while tests run.
os.environ.update(thread_environment(1))


@pytest.fixture(scope="session")
def dask_executor():
    """Two worker processes."""
    with open_executor(Where("local", 2)) as executor:
        yield executor
