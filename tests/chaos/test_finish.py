"""Finishing is killed at random moments, and the same call goes on. Run with ``-m chaos``."""

from __future__ import annotations

import signal
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import zarr

from batchproc import open_catalogue, open_stamps
from batchproc.distribute.clusters import Where
from batchproc.finish import finish, hats, work
from batchproc.io import dense
from tests.finish import _night

pytestmark = pytest.mark.chaos


def make(path):
    """Each product in many small files."""
    hats.ROWS, dense._SHARD_BYTES = 30, 32 * 12 * 9**2
    work.groups_of.__defaults__ = (60,)
    finish(path, where=Where("serial"), quiet=True)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_it_ends_with_what_an_undisturbed_call_makes(tmp_path, seed):
    """SIGKILL again and again, a little later each time: whole products, no leftovers, nothing lost or doubled."""
    pytest.importorskip("cdshealpix", reason="needs the extra 'hats'")
    folder = _night.make(tmp_path / "run")
    rng, context, kills = np.random.default_rng(seed), get_context("fork"), 0
    while True:
        process = context.Process(target=make, args=(folder.path,))
        process.start()
        process.join(rng.uniform(0.02, 0.1) * (1 + kills))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
        assert process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0
    assert kills >= 5
    expected = open_catalogue(folder.path)
    paths = sorted((folder.path / "hats" / "dataset").rglob("Npix=*.parquet"))
    found = pd.concat(pq.read_table(path, partitioning=None).to_pandas() for path in paths)
    found = found.sort_values("stamp_index", ignore_index=True)[expected.columns]
    placed = expected.dropna(subset="ra").reset_index(drop=True)
    pd.testing.assert_frame_equal(found, placed, check_dtype=False)
    array = zarr.open_array(str(folder.path / "stamps.zarr"), mode="r")[:]
    assert np.array_equal(array.view(np.uint32), open_stamps(folder.path)[:].view(np.uint32))
    assert len(pd.read_parquet(folder.path / "focal_planes.parquet")) == len(_night.entries())
    left = [path.name for path in folder.path.iterdir()]
    assert "finishing" not in left
    assert not list(folder.path.rglob(".tmp-*"))
