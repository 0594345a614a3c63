from __future__ import annotations

import shutil

import pytest

from batchproc.io.run_folder import RunFolder
from tests.finish import _night


@pytest.fixture(scope="session")
def one_night(tmp_path_factory):
    return _night.make(tmp_path_factory.mktemp("night") / "run").path


@pytest.fixture
def night(one_night, tmp_path):
    """A run at its end, of one's own: see `_night.make`."""
    return RunFolder(shutil.copytree(one_night, tmp_path / "run"))
