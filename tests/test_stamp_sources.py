"""Stamps of a run, of packets and of arrays, each with the label that belongs to it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from batchproc.errors import UsageError
from batchproc.stamp_sources import some_stamps
from tests import _runs
from tests.io import _packets


@pytest.fixture
def run(tmp_path):
    """Two images of 20 and 13 candidates."""
    folder = _runs.begin(tmp_path / "run", "a", "b")
    for name, n in (("a", 20), ("b", 13)):
        _runs.store(folder, name, n)
    return tmp_path / "run"


def test_stamps_of_a_run_have_the_labels_of_their_candidates(run, tmp_path):
    """Drawn over all images; a candidate that the table does not name has none."""
    rows = [{"candidate_id": f"a-{k}", "label": "sn" if k % 2 else "star"} for k in range(18)]
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    found = some_stamps(run, 25, labels=tmp_path / "labels.csv")
    assert found.stamps.shape[:2] == (25, 3)
    image, row = found.stamps[:, 0, 0, 0], found.stamps[:, 0, 0, 1].astype(int)
    of_a = image == sum(b"a")
    assert 0 < of_a.sum() < 25
    expected = ["" if not here or k >= 18 else "sn" if k % 2 else "star" for here, k in zip(of_a, row, strict=True)]
    assert found.labels.tolist() == expected
    assert some_stamps(run, 100).labels is None
    assert len(some_stamps(run, 100).stamps) == 33


def test_stamps_of_packets_are_drawn_from_all_of_them(tmp_path):
    """However many there are, in the order of the files; labels by candid."""
    random = np.random.default_rng(0)
    stamps = random.normal(size=(40, 3, 63, 63)).astype(np.float32)
    stamps[:, 0, 0, 0] = np.arange(40)
    (tmp_path / "night").mkdir()
    for k in range(0, 40, 10):
        records = [_packets.record(100 + j, stamps[j]) for j in range(k, k + 10)]
        (tmp_path / "night" / f"{k:02d}.avro").write_bytes(_packets.packet(*records))
    table = pd.DataFrame({"candid": np.arange(100, 140), "real": np.arange(40) % 3 == 0})
    table.to_parquet(tmp_path / "labels.parquet")
    found = some_stamps(tmp_path / "night", 12, labels=tmp_path / "labels.parquet")
    which = found.stamps[:, 0, 0, 0].astype(int)
    assert len(which) == 12
    assert (np.diff(which) > 0).all()
    assert which.max() >= 20
    assert found.labels.tolist() == ["real" if k % 3 == 0 else "bogus" for k in which]
    assert len(some_stamps(tmp_path / "night", 100).stamps) == 40
    table["real"] = table["real"].astype(object).where(table["candid"] != 139, np.nan)  # nobody knows
    table.assign(objectId=[f"ZTF{k}" for k in table["candid"]]).drop(columns="candid").to_csv(tmp_path / "l.csv")
    found = some_stamps(tmp_path / "night", 100, labels=tmp_path / "l.csv")
    assert found.labels.tolist() == ["real" if k % 3 == 0 else "bogus" for k in range(39)] + [""]


def test_a_folder_of_tarballs_is_one_of_packets(tmp_path):
    """Whether there is a run in a folder, its run.json says."""
    night = _packets.write_night(tmp_path / "night", 3)
    (tmp_path / "nights").mkdir()
    _packets.tarball(night).rename(tmp_path / "nights" / "one.tar.gz")
    assert len(some_stamps(tmp_path / "nights", 10).stamps) == 3


def test_stamps_of_arrays_bring_their_labels(tmp_path):
    """As text, as true and false, or not at all."""
    stamps = np.zeros((6, 3, 5, 5), np.float32)
    stamps[:, 0, 0, 0] = np.arange(6)
    real = np.arange(6) < 2
    path = tmp_path / "some.npz"
    for more, expected in (
        ({"real": real}, np.where(real, "real", "bogus")),
        ({"label": np.array(["sn", "agn"] * 3)}, np.array(["sn", "agn"] * 3)),
    ):
        np.savez(path, stamps=stamps, **more)
        found = some_stamps(path, 4)
        which = found.stamps[:, 0, 0, 0].astype(int)
        assert found.labels.tolist() == expected[which].tolist()
    np.savez(path, stamps=stamps)
    assert some_stamps(path, 4).labels is None


def test_what_is_no_source_is_refused(run, tmp_path):
    """With what was found and what is wanted."""
    path = tmp_path / "some.npz"
    np.savez(path, pixels=np.zeros(3))
    with pytest.raises(UsageError, match="expected an array stamps; found pixels"):
        some_stamps(path, 5)
    np.savez(path, stamps=np.zeros((4, 5, 5, 3)))
    with pytest.raises(UsageError, match=r"stamps \(4, 5, 5, 3\) and labels none; expected \(n, 3, h, w\) and \(n,\)"):
        some_stamps(path, 5)
    np.savez(path, stamps=np.zeros((0, 3, 5, 5)))
    with pytest.raises(UsageError, match="no stamps in it"):
        some_stamps(path, 5)
    np.savez(path, stamps=np.zeros((2, 3, 5, 5)), real=np.array([1, np.nan]))
    with pytest.raises(UsageError, match="real is neither 0 nor 1 in 1 of 2 rows, such as nan"):
        some_stamps(path, 5)
    with pytest.raises(UsageError, match="has its labels in its arrays"):
        some_stamps(path, 5, labels="labels.csv")
    (tmp_path / "torn.npz").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"torn\.npz: cannot be read as arrays"):
        some_stamps(tmp_path / "torn.npz", 5)
    with pytest.raises(UsageError, match="nowhere"):
        some_stamps(tmp_path / "nowhere", 5)
    labels = tmp_path / "labels.csv"
    labels.write_text("name,label\n1,sn\n")
    with pytest.raises(UsageError, match=r"needs one of candidate_id, id, .*; found name, label"):
        some_stamps(run, 5, labels=labels)
    labels.write_text("candidate_id,label\nzzz,sn\n")
    with pytest.raises(UsageError, match="none of its 1 labels is of one of the 5 stamps, which are named a-"):
        some_stamps(run, 5, labels=labels)
