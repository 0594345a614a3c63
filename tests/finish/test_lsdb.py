"""What LSDB and HATS' own validator say of the catalogue. Needs the package lsdb; run with ``-m hats``."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from batchproc import open_catalogue
from batchproc.distribute.clusters import Where
from batchproc.finish import finish, hats
from tests.finish import _night

pytestmark = [
    pytest.mark.hats,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def lsdb():
    return pytest.importorskip("lsdb", reason="needs the package lsdb: pip install lsdb")


@pytest.fixture(scope="module")
def run(tmp_path_factory, lsdb):
    """A run with its catalogue; the rows of open_catalogue that have a position."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hats, "ROWS", 60)
        folder = _night.make(tmp_path_factory.mktemp("night") / "run")
        finish(folder.path, only=["hats"], where=Where("serial"), quiet=True)
    return folder.path, open_catalogue(folder.path).dropna(subset="ra").reset_index(drop=True)


def ordered(frame):
    plain = pd.DataFrame(frame).sort_values("stamp_index").reset_index(drop=True)
    return plain.astype({name: object for name in plain if pd.api.types.is_string_dtype(plain[name].dtype)})


def test_the_validator_of_hats_finds_nothing(run):
    """Strictly: properties, partitions, metadata and files agree."""
    from hats.io.validation import is_valid_catalog

    assert is_valid_catalog(run[0] / "hats", strict=True)


def test_lsdb_reads_every_row_as_we_do_sorted_by_the_index(run, lsdb):
    """Numbers of rows and columns, all values, and the order of the spatial index."""
    catalogue = lsdb.open_catalog(run[0] / "hats")
    found = catalogue.compute()
    assert len(catalogue) == len(found) == len(run[1])
    assert found.index.name == "_healpix_29"
    assert found.index.is_monotonic_increasing
    assert catalogue.columns.tolist() == run[1].columns.tolist()
    pd.testing.assert_frame_equal(ordered(found), ordered(run[1]), check_dtype=False)


@pytest.mark.parametrize(
    ("ra", "dec", "radius_deg"),
    [(10, -30, 0.15), (0.0, 0.0, 0.25), (359.95, 45, 0.3), (200, 90, 0.2), (80, 80, 1), (150, 60, 100)],
)
def test_cones_hold_what_lies_in_them(run, lsdb, ra, dec, radius_deg):
    """A cone search finds the rows whose separation is small enough: over 0 h, at a pole, where there are none."""
    found = lsdb.open_catalog(run[0] / "hats").cone_search(ra, dec, radius_deg * 3600).compute()
    x, y = np.deg2rad([run[1]["ra"], run[1]["dec"]]), np.deg2rad([ra, dec])
    apart = np.sin((x[1] - y[1]) / 2) ** 2 + np.cos(x[1]) * np.cos(y[1]) * np.sin((x[0] - y[0]) / 2) ** 2
    inside = 2 * np.arcsin(np.sqrt(apart)) < np.deg2rad(radius_deg)
    assert sorted(found["candidate_id"]) == sorted(run[1]["candidate_id"][inside])
    assert (inside.sum() > 0) == (dec != 80)


def test_hats_own_arithmetic_gives_the_same_index(run, lsdb):
    """The column is what hats computes from ra and dec."""
    from hats.pixel_math.spatial_index import compute_spatial_index

    found = lsdb.open_catalog(run[0] / "hats").compute()
    assert (compute_spatial_index(found["ra"].to_numpy(), found["dec"].to_numpy()) == found.index).all()
