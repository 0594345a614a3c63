"""One small night and one undisturbed campaign on it for all the tests that compare with one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos._campaign import make_night


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 60 images of 384² pixels."""
    return make_night(tmp_path_factory.mktemp("night"))


@pytest.fixture(scope="session")
def control(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("control") / "run"
    subprocess.run([sys.executable, "-m", "tests.chaos._drive", str(manifest), str(folder)], check=True, timeout=600)
    return folder
