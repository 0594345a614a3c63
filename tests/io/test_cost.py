"""What a model costs is measured in a process of its own, and says what was run."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import numpy as np
import pytest

from batchproc.errors import ModelError
from batchproc.io.cost import measure_cost, stamps_per_second


class Slow:
    """Takes a millisecond a stamp."""

    def predict(self, stamps, features=None, *, batch=256):
        until = time.process_time() + 1e-3 * len(stamps if stamps is not None else features)
        while time.process_time() < until:
            pass


@pytest.mark.parametrize("of_features", [False, True])
def test_speed_is_stamps_by_cpu_time(of_features):
    """Whatever the number of stamps."""
    rows = np.zeros((20, 3, 5, 5), np.float32)
    given = (None, rows[:, 0, 0]) if of_features else (rows, None)
    assert stamps_per_second(Slow(), *given) == pytest.approx(1000, rel=0.1)


def test_nothing_to_measure_on_is_an_error():
    """And not an infinite speed."""
    with pytest.raises(ValueError, match="no stamps"):
        stamps_per_second(SimpleNamespace(), np.zeros((0, 3, 5, 5)))


def test_the_bundled_model_costs_some_memory_and_time():
    """Its session and a batch: megabytes, not the gigabyte of the imports; this process is left as it was."""
    before = dict(os.environ)
    stamps = np.random.default_rng(0).normal(size=(300, 3, 39, 39)).astype(np.float32)
    cost = measure_cost("realbogus", stamps, batch=128)
    assert 1 < cost.memory_mb < 300
    assert 300 < cost.stamps_per_second < 1e6
    assert (cost.n_stamps, cost.batch, cost.provider) == (300, 128, "CPUExecutionProvider")
    assert dict(os.environ) == before


def test_what_the_model_does_not_take_is_said():
    """As by the model itself."""
    with pytest.raises(ModelError, match="takes no features"):
        measure_cost("realbogus", np.zeros((2, 3, 39, 39), np.float32), np.zeros((2, 1)))
