"""The notebooks run from top to bottom, show pictures, and are kept without outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
Config = pytest.importorskip("traitlets.config").Config

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_the_notebooks_are_there():
    """Without a notebook the tests below would pass, having looked at nothing."""
    assert {"01_first_difference_image", "02_looking_around"} <= {path.stem for path in NOTEBOOKS}


@each_notebook
def test_notebook_runs_and_shows_pictures(path, tmp_path, monkeypatch):
    """Every cell runs in a fresh kernel and an empty folder, without warnings, and at least two pictures appear."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    # Over a socket in our own folder: an open port would run anyone's code.
    kernel = {"transport": "ipc", "connection_file": str(tmp_path / "kernel.json")}
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
        config=Config({"KernelManager": kernel}),
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert "Warning" not in "".join(output.get("text", "") for output in outputs if output.get("name") == "stderr")


@each_notebook
def test_notebook_is_kept_without_outputs(path):
    """What a notebook printed is not in the repository (nbstripout, run by pre-commit, takes it out)."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
