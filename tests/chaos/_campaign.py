"""A campaign of real pixels, small enough to be killed all day, and what it must come to."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from batchproc.config import Config
from batchproc.io.catalogue import open_catalogue
from batchproc.io.events import events_file
from batchproc.io.manifest import read_manifest
from batchproc.io.night import ORDINARY, simulate_night
from batchproc.io.progress import iter_receipts
from batchproc.io.run_folder import RunFolder
from batchproc.io.stamps import open_stamps
from batchproc.io.verify import check_run
from batchproc.job import Steps
from tests.chaos._steps import BUSY, paced

__all__ = ["CONFIG", "N_IMAGES", "STEPS", "Outcome", "events_of", "make_night", "outcome", "require_same"]

N_IMAGES = 60
STEPS = Steps(process=paced)
CONFIG = Config.from_dict({"time_limit": 120.0})


def make_night(folder: Path, n_images: int = N_IMAGES, size: int = 384) -> Path:
    """Simulated images of 384² pixels, plain, compressed and multi-extension, with masks; returns the manifest."""
    manifest = simulate_night(
        folder, n_images=n_images, size=size, n_transients=6, scene=replace(ORDINARY, n_stars=700)
    )
    (folder / BUSY).mkdir(exist_ok=True)
    return manifest


@dataclass(frozen=True)
class Outcome:
    """What a run came to, in an order of its own: by candidate, wherever it is stored."""

    catalogue: pd.DataFrame
    stamps: np.ndarray
    done: tuple[str, ...]
    quality: dict[str, str]


def outcome(run: Path) -> Outcome:
    """Read a run as its users do."""
    catalogue = open_catalogue(run).sort_values("candidate_id", ignore_index=True)
    stamps = open_stamps(run)
    receipts = list(iter_receipts(RunFolder(run)))
    return Outcome(
        catalogue.drop(columns="stamp_index"),
        stamps[catalogue["stamp_index"].to_numpy()],
        tuple(sorted(receipt.image_id for receipt in receipts if receipt.status == "done")),
        {receipt.image_id: json.dumps(receipt.quality, sort_keys=True) for receipt in receipts},
    )


def require_same(run: Path, control: Path, manifest: Path) -> None:
    """Every image done, once; rows, values, scores, stamps and measured qualities those of the undisturbed run."""
    found, expected = outcome(run), outcome(control)
    images = sorted(entry.image_id for entry in read_manifest(manifest))
    assert list(expected.done) == images, "the undisturbed run itself is not whole"
    assert len(expected.catalogue) > 5 * len(images)
    assert list(found.done) == images
    assert found.catalogue["candidate_id"].is_unique
    pd.testing.assert_frame_equal(found.catalogue, expected.catalogue, check_exact=True)
    np.testing.assert_array_equal(found.stamps, expected.stamps)
    assert found.quality == expected.quality
    assert not [str(problem) for checked in check_run(RunFolder(run)) for problem in checked.problems]


def events_of(run: Path, *names: str) -> list[dict]:
    """The events of these names, in order."""
    lines = events_file(RunFolder(run)).read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] in names]
