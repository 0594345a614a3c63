"""Five hundred images through one worker: it does not grow.

On a quiet machine, some minutes::

    pytest -m chaos tests/chaos/test_memory.py -s
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from batchproc.config import Config
from batchproc.distribute import order
from batchproc.io.manifest import read_manifest
from batchproc.io.night import ORDINARY, simulate_night
from batchproc.job import Steps, run
from tests.chaos._steps import MEMORY, followed

N_IMAGES, N_PAIRS, SIZE = 500, 12, 512
#: While caches fill.
FIRST = 20
ALLOWED_MB = 0.1


def slope_and_error(values: np.ndarray, blocks: int = 12) -> tuple[float, float]:
    """Of a straight line through values in their order, and its one-sigma error.

    What one image leaves behind the next one finds, so neighbours are not independent: the error is from the scatter of
    the slopes with one of several blocks left out (jackknife).
    """
    x = np.arange(len(values))
    parts = np.array_split(x, blocks)
    without = [np.polyfit(np.delete(x, part), np.delete(values, part), 1)[0] for part in parts]
    error = np.sqrt((blocks - 1) / blocks * np.sum((without - np.mean(without)) ** 2))
    return float(np.polyfit(x, values, 1)[0]), float(error)


def test_a_slope_is_found() -> None:
    """The measure itself: a leak of 0.1 MB an image in noise of 3 MB is seen, and none is not."""
    noise = np.random.default_rng(0).normal(300, 3, N_IMAGES)
    slope, error = slope_and_error(noise + ALLOWED_MB * np.arange(N_IMAGES))
    assert abs(slope - ALLOWED_MB) < 4 * error < ALLOWED_MB / 5
    assert abs(slope_and_error(noise)[0]) < 4 * error


@pytest.mark.chaos
def test_five_hundred_images_through_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident memory after each image of 512² grows by less than 0.1 MB an image after the first 20."""
    # As they come, pair by pair: the largest first, a pair that needs more would come for the first time in the middle.
    monkeypatch.setattr(order, "_DIFFER", np.inf)
    manifest = simulate_night(
        tmp_path / "night", n_images=N_PAIRS, size=SIZE, n_transients=8, scene=replace(ORDINARY, n_stars=700)
    )
    pairs = read_manifest(manifest)
    entries = [replace(pairs[n % N_PAIRS], image_id=f"image{n:03d}") for n in range(N_IMAGES)]
    steps = Steps(process=followed)
    # Without scores: those are made after the images, by the same worker, of all stamps together.
    config = Config.from_dict({"classify": {"model": ""}})
    summary = run(entries, tmp_path / "run", config=config, workers=1, steps=steps, report=False, quiet=True)
    assert summary.exit_code == 0
    process, memory = np.loadtxt(tmp_path / "night" / MEMORY).T
    assert len(memory) == N_IMAGES
    assert len(set(process)) == 1
    slope, error = slope_and_error(memory[FIRST:])
    print(
        f"{N_IMAGES} images of {SIZE}² in {summary.seconds:.0f} s: {memory[0]:.0f} MB after the first, "
        f"{memory[FIRST]:.0f} after {FIRST}, {memory[-1]:.0f} at the end; slope {slope:.4f} +- {error:.4f} MB an image"
    )
    assert slope + 2 * error < ALLOWED_MB
