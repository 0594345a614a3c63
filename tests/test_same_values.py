"""Where it runs changes nothing: serial, threads and Dask workers give the same values of real images."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from batchproc import open_catalogue, open_stamps, process_image, read_manifest, run
from batchproc.config import Config
from batchproc.io.night import simulate_night

CONFIG = Config.from_dict({"classify": {"model": ""}})


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """Three small images of a simulated night."""
    return simulate_night(tmp_path_factory.mktemp("night"), n_images=3, size=448, n_transients=8, seed=5)


def test_serial_and_dask_give_the_same_values(night, tmp_path):
    """Same rows, same values, same stamps from one process and from two Dask workers."""
    runs = []
    for cluster, workers in (("serial", None), ("local", 2)):
        out = tmp_path / cluster
        assert run(night, out, config=CONFIG, cluster=cluster, workers=workers).exit_code == 0
        runs.append((open_catalogue(out), open_stamps(out)))
    (serial, serial_stamps), (dask, dask_stamps) = runs
    assert len(serial) > 10
    pd.testing.assert_frame_equal(serial, dask, check_exact=True)
    np.testing.assert_array_equal(serial_stamps[:], dask_stamps[:])


def test_threads_give_the_same_values(night):
    """Images processed at once by the threads of one process equal those processed one by one."""
    entries = read_manifest(night)
    one_by_one = [process_image(entry, CONFIG) for entry in entries]
    with ThreadPoolExecutor(3) as pool:
        at_once = list(pool.map(lambda entry: process_image(entry, CONFIG), entries))
    for a, b in zip(one_by_one, at_once, strict=True):
        for name, values in a.catalogue.items():
            np.testing.assert_array_equal(values, b.catalogue[name], err_msg=name)
        assert a.stamps.tobytes() == b.stamps.tobytes()
