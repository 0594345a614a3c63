from __future__ import annotations

import shutil

import pytest

from batchproc.io.packs import roll_up
from batchproc.io.run_folder import RunFolder
from tests.finish import _night


@pytest.fixture(scope="session")
def one_night(tmp_path_factory):
    """Two thirds of its images are in packs, and in another order than the manifest's."""
    folder = _night.make(tmp_path_factory.mktemp("night") / "run")
    names = [entry.image_id for entry in _night.entries()]
    roll_up(folder, 1, names[9:17])
    roll_up(folder, 2, [*names[20:], *names[2:7]])
    return folder.path


@pytest.fixture
def night(one_night, tmp_path):
    """A run at its end, of one's own: see `_night.make`."""
    return RunFolder(shutil.copytree(one_night, tmp_path / "run"))
