"""One local cluster for all the tests that need one."""

from __future__ import annotations

import pytest

from batchproc.distribute.clusters import open_executor


@pytest.fixture(scope="session")
def dask_executor():
    """Two worker processes."""
    with open_executor("local", workers=2) as executor:
        yield executor
