"""batchproc: point it at survey images; it finds what changed in the sky, and says what is real.

>>> from batchproc import zogy, process_image, run, open_catalogue, open_stamps, load_model

Names are loaded when first used, so that ``import batchproc`` and ``batchproc --help`` stay quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchproc.config import Config
    from batchproc.errors import BatchprocError, ExposureError
    from batchproc.explore import difference
    from batchproc.flow import process_image
    from batchproc.imaging import simulate
    from batchproc.imaging.align import align
    from batchproc.imaging.zogy import zogy
    from batchproc.io.catalogue import open_catalogue
    from batchproc.io.manifest import read_manifest
    from batchproc.io.models import load_model
    from batchproc.io.stamps import open_stamps
    from batchproc.job import run
    from batchproc.records import Flag, MaskBit

__version__ = "0.3.0"

#: Public name → where it lives.
_HOMES = {
    "BatchprocError": "batchproc.errors",
    "Config": "batchproc.config",
    "ExposureError": "batchproc.errors",
    "Flag": "batchproc.records",
    "MaskBit": "batchproc.records",
    "align": "batchproc.imaging.align",
    "difference": "batchproc.explore",
    "load_model": "batchproc.io.models",
    "open_catalogue": "batchproc.io.catalogue",
    "open_stamps": "batchproc.io.stamps",
    "process_image": "batchproc.flow",
    "read_manifest": "batchproc.io.manifest",
    "run": "batchproc.job",
    "zogy": "batchproc.imaging.zogy",
}

__all__ = [
    "BatchprocError",
    "Config",
    "ExposureError",
    "Flag",
    "MaskBit",
    "align",
    "difference",
    "load_model",
    "open_catalogue",
    "open_stamps",
    "process_image",
    "read_manifest",
    "run",
    "simulate",
    "zogy",
]


def __getattr__(name: str) -> Any:
    if name == "simulate":
        return import_module("batchproc.imaging.simulate")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'batchproc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
