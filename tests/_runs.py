"""Runs without images: manifests of names, and work functions that make up their candidates.

Module-level functions, so that worker processes find them by import.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from batchproc.config import Config
from batchproc.errors import AlignError, ModelError
from batchproc.io.freeze import freeze
from batchproc.io.run_folder import RunFolder
from batchproc.io.store import store_image
from batchproc.records import CATALOGUE, ManifestEntry, Receipt

SIZE = 9
CONFIG = Config.from_dict({"cutouts": {"size": SIZE}, "classify": {"model": ""}})


@dataclass(frozen=True)
class Result:
    """What the campaign needs of an ImageResult."""

    catalogue: dict
    stamps: np.ndarray
    receipt: Receipt


def entries(*names: str) -> list[ManifestEntry]:
    return [ManifestEntry(name, f"/nights/{name}.fits", ("/nights/ref.fits",)) for name in names]


def no_wisdom(config: Config) -> str:
    return ""


def result(image_id: str, n: int, size: int = SIZE) -> Result:
    """n candidates whose stamps and columns tell which image and row they are of."""
    seed = sum(image_id.encode())
    rng = np.random.default_rng(seed)
    columns = {}
    for column in CATALOGUE:
        if column.dtype == "str":
            columns[column.name] = np.array([f"{image_id}-{row}" for row in range(n)], object)
        else:
            columns[column.name] = rng.uniform(0, 100, n).astype(column.dtype)
    columns["image_id"] = np.array([image_id] * n, object)
    columns["stamp_index"] = np.arange(n)
    columns["flags"] = np.zeros(n, np.int32)
    columns["scorr"] = np.arange(n, dtype=np.float32)
    stamps = rng.normal(size=(n, 3, size, size)).astype(np.float32)
    stamps[:, 0, 0, 0] = seed
    stamps[:, 0, 0, 1] = np.arange(n)
    return Result(columns, stamps, Receipt(image_id, "done", n, {"subtract": 0.5}, quality={"fwhm_new": 3.5}))


def store(folder: RunFolder, image_id: str, n: int, **changes) -> Result:
    """What a task leaves behind."""
    made = result(image_id, n)
    receipt = replace(made.receipt, **changes)
    store_image(folder, *entries(image_id), made.catalogue, made.stamps, receipt, CONFIG.image_digest)
    return made


def process(entry: ManifestEntry, config: Config) -> Result:
    """Candidates by the first number in the name; 'bad', 'bug' and 'deadly' in a name do what they say."""
    if "bad" in entry.image_id:
        raise AlignError(f"{entry.new}: found 2 matches, needs 8: check the WCS", found=2, needed=8)
    if "bug" in entry.image_id:
        raise ZeroDivisionError("nobody thought of this")
    if "deadly" in entry.image_id:
        os._exit(9)
    if "slow" in entry.image_id:
        time.sleep(0.3)
    digits = "".join(c for c in entry.image_id if c.isdigit())
    return result(entry.image_id, int(digits or 3) % 50)


def repaired(entry: ManifestEntry, config: Config) -> Result:
    """Everything works now."""
    return result(entry.image_id, 2)


def as_configured(entry: ManifestEntry, config: Config) -> Result:
    """As many candidates as the settings' threshold."""
    return result(entry.image_id, int(config.detect.threshold))


def begin(path: Path, *names: str) -> RunFolder:
    folder = RunFolder(path)
    freeze(folder, entries(*names), CONFIG, lambda: "")
    return folder


class Model:
    """Scores are a hundredth of the row number that the stamp carries."""

    version, hash, fingerprint, normalisation, classes = "1", "0" * 64, "0" * 64, "none", ("real",)
    card = SimpleNamespace(input=SimpleNamespace(features=()))
    takes_stamps = True

    def __init__(self, name: str) -> None:
        self.name = name

    def predict(self, stamps, features=None, *, batch=256):
        if self.name == "unfit":
            raise ModelError(f"stamps of {stamps.shape[-1]} pixels; it looks at 63")
        if self.name == "broken":
            raise KeyError("nobody thought of this layer")
        return np.asarray(stamps)[:, 0, 0, 1] / 100


def load_model(name: str, threads: int, device: str = "cpu") -> Model:
    if name == "nonsense":
        raise ModelError("no model 'nonsense'; known: stub")
    return Model(name)


def report(folder: Path) -> Path:
    (folder / "report.html").write_text("<html>")
    return folder / "report.html"


def broken_report(folder: Path) -> Path:
    raise RuntimeError("no ink")
