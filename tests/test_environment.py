"""What installs batchproc agrees with what batchproc imports, for pip and for conda alike."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

#: Where conda-forge has another name than PyPI: the package without its optional companions.
CONDA_NAMES = {"dask": "dask-core", "matplotlib": "matplotlib-base"}
#: Imports whose distribution has another name, and what each pulls in for sure (and so needs no line of its own).
DISTRIBUTIONS = {
    "ai_edge_litert": "ai-edge-litert",
    "tomli_w": "tomli-w",
    "skimage": "astroalign",
    "numcodecs": "zarr",
    "google_crc32c": "zarr",
    "psutil": "distributed",
    "cloudpickle": "distributed",
}


def split(requirement: str) -> tuple[str, str]:
    """('numpy', '>=2.0') from 'numpy>=2.0'."""
    name, version = re.fullmatch(r"([A-Za-z0-9._-]+?)\s*(>=.*)?", requirement.strip()).groups()
    return name.lower(), version or ""


def conda_packages() -> dict[str, str]:
    """Name and version of every line of environment.yml's list, the pip part left out."""
    text = (ROOT / "environment.yml").read_text(encoding="utf-8").split("dependencies:")[1]
    return dict(split(line) for line in re.findall(r"^  - ([^:\n]+)$", text, flags=re.MULTILINE))


def is_optional(node: ast.AST) -> bool:
    """A ``try`` that goes on without what it could not import."""
    return isinstance(node, ast.Try) and any(getattr(h.type, "id", "") == "ImportError" for h in node.handlers)


def imports(node: ast.AST) -> set[str]:
    """Top-level packages imported under a node, optional ones left out."""
    if is_optional(node):
        return set()
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module.split(".")[0]}
    return set().union(*map(imports, ast.iter_child_nodes(node)))


def imported_packages() -> dict[str, Path]:
    """Packages that the runtime imports and Python does not have, each with a file that does."""
    found = {}
    for path in sorted((ROOT / "batchproc").rglob("*.py")):
        if "training" not in path.parts:  # needs the extra 'train'; nothing else imports it
            found.update(dict.fromkeys(imports(ast.parse(path.read_text(encoding="utf-8"))), path))
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | {"batchproc"}}


def test_conda_environment_lists_what_pip_installs():
    """environment.yml has every runtime dependency of pyproject.toml with the same lower bound, and nothing else."""
    wanted = {}
    for name, version in map(split, PYPROJECT["dependencies"]):
        wanted[CONDA_NAMES.get(name, name)] = version
    wanted["python"] = PYPROJECT["requires-python"]
    assert {name: version for name, version in conda_packages().items() if name != "pip"} == wanted


def test_every_runtime_import_is_declared():
    """What the package imports outside the extras is a dependency in pyproject.toml."""
    extras = PYPROJECT["optional-dependencies"]
    allowed = {split(r)[0] for r in [*PYPROJECT["dependencies"], *extras["hpc"], *extras["litert"]]}
    undeclared = {
        name: str(path.relative_to(ROOT))
        for name, path in imported_packages().items()
        if DISTRIBUTIONS.get(name, name).replace("_", "-") not in allowed
    }
    assert not undeclared


@pytest.mark.parametrize("heavy", ["torch", "tensorflow", "onnx", "scikit-learn", "jupyterlab"])
def test_runtime_install_stays_light(heavy):
    """Training and notebook packages are extras, never runtime dependencies."""
    assert heavy not in {split(r)[0] for r in PYPROJECT["dependencies"]}


def test_extras_are_those_promised():
    """The README's extras exist."""
    promised = {"train", "hpc", "notebooks", "litert", "tflite", "import", "alerts", "bench", "dev"}
    assert set(PYPROJECT["optional-dependencies"]) >= promised


def test_no_extra_replaces_a_package():
    """ONNX Runtime's builds for GPUs write the files of the plain one: changing it takes an uninstall, not an extra."""
    named = {re.match(r"[\w.-]+", r)[0] for extra in PYPROJECT["optional-dependencies"].values() for r in extra}
    assert not {name for name in named if name.startswith(("onnxruntime", "tensorflow", "tflite-runtime"))}
