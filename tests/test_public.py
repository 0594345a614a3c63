"""The shop window: every public name is there, documented, and importing costs next to nothing."""

import subprocess
import sys

import batchproc


def test_every_public_name_resolves_and_is_documented():
    """What ``__all__`` promises exists and has a docstring."""
    for name in batchproc.__all__:
        assert getattr(batchproc, name).__doc__, name


def test_importing_loads_nothing_heavy():
    """``import batchproc`` pulls in none of the heavy libraries."""
    code = "import sys, batchproc; print([m for m in ('numpy', 'dask', 'astropy', 'onnxruntime') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_version_matches_the_package():
    """One version, in one place that users see."""
    from importlib.metadata import version

    assert version("batchproc") == batchproc.__version__
