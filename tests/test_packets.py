"""Alert packets are scored by several models in one pass, and every one of them is a row of one table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchproc import packets as packets_module
from batchproc.distribute import alerts as work_module
from batchproc.distribute.executors import WorkerDiedError
from batchproc.errors import ClusterError, ModelError, StorageError, UsageError
from batchproc.io import alert_table as table_module
from batchproc.io import alerts as alerts_module
from batchproc.io.alert_table import score_columns
from batchproc.io.alerts import read_files
from batchproc.io.braai import add_braai
from batchproc.io.cards import InputCard
from batchproc.io.models import Model, load_model
from batchproc.packets import _NAME as NAME_LENGTH
from batchproc.packets import MEASUREMENTS, score_packets
from tests._real import data
from tests.io._packets import packet, record, stamp_of, tarball, write_night
from tests.io.test_models import make_model


@pytest.fixture(autouse=True)
def own_models(tmp_path, monkeypatch):
    """No test sees, or touches, the models of whoever runs it."""
    monkeypatch.setenv("BATCHPROC_MODELS", str(tmp_path / "models"))


@pytest.fixture
def models(tmp_path):
    """Two that differ in what they look at."""
    new = InputCard(size=5, normalisation="none", channels=("ref", "difference", "new"))
    return [make_model(tmp_path / "toy"), make_model(tmp_path / "other", name="other", input=new)]


@pytest.fixture
def night(tmp_path):
    """A folder of five alerts, one of them with a score."""
    return write_night(tmp_path / "night")


def score(source, models, out, **options):
    return score_packets(source, models, out, quiet=True, **options)


def test_every_model_scores_every_alert_in_one_pass(night, models, tmp_path, monkeypatch):
    """Each score is what the model itself says; the packets are read once."""
    passes = []
    monkeypatch.setattr(alerts_module, "read_files", lambda *a, **k: passes.append(1) or read_files(*a, **k))
    found = score(night, models, tmp_path / "scores.parquet")
    assert passes == [1]
    assert found.text() == "5 alerts: 5 scored, 0 not scored, 0 unreadable"
    assert found.exit_code == 0
    table = pq.read_table(tmp_path / "scores.parquet")
    stamps = np.array([stamp_of(k) for k in range(5)])
    for folder, column in zip(models, ("score_toy", "score_other"), strict=True):
        np.testing.assert_array_equal(table[column].to_numpy(), load_model(folder).predict(stamps))
    assert not np.array_equal(table["score_toy"], table["score_other"])
    assert table["candid"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["object_id"].to_pylist()[4] == "ZTF4"
    assert table["ra"].to_pylist() == [10.0, 11.0, 12.0, 13.0, 14.0]
    np.testing.assert_array_equal(table["drb"].to_numpy(), [np.nan, np.nan, np.nan, 0.25, np.nan])
    assert table["drb_version"].to_pylist()[3] == "d6_m7"
    assert set(table["problem"].to_pylist()) == {""}
    assert table["origin"].to_pylist()[0] == str(night / "0.avro")


def test_the_table_says_which_models_they_were(night, models, tmp_path):
    """Name, version, variant, normalisation and hash, at the column and in the schema."""
    score(night, models, tmp_path / "scores.parquet")
    schema = pq.read_schema(tmp_path / "scores.parquet")
    about = json.loads(schema.metadata[b"models"])
    assert list(about) == ["toy", "other"]
    model = load_model(models[0])
    expected = {"model": "toy", "version": "1", "variant": "float", "normalisation": "none", "hash": model.hash}
    assert about["toy"] == expected
    column = {key.decode(): value.decode() for key, value in schema.field("score_toy").metadata.items()}
    assert expected.items() <= column.items()
    assert all(schema.field(name).metadata[b"meaning"] for name in schema.names)


def test_what_cannot_be_scored_or_read_is_a_row_that_says_so(night, models, tmp_path):
    """NaN and a problem; a truncated stamp that is scored all the same has a problem too."""
    (night / "1.avro").write_bytes(packet(record(1, stamp_of(1), cutoutDifference=None)))
    (night / "2.avro").write_bytes(b"hello")
    (night / "4.avro").write_bytes(packet(record(4, stamp_of(4)[:, :60])))
    found = score(night, models, tmp_path / "scores.parquet")
    assert found.text() == "5 alerts: 3 scored, 1 not scored, 1 unreadable"
    assert found.exit_code == 1
    table = pq.read_table(tmp_path / "scores.parquet")
    for column in ("score_toy", "score_other"):
        assert np.isfinite(table[column].to_numpy()).tolist() == [True, False, False, True, True]
        assert table[column].null_count == 0
    assert table["candid"].to_pylist() == [0, 1, -1, 3, 4]
    problems = table["problem"].to_pylist()
    assert "cutoutDifference: none in the packet" in problems[1]
    assert "not an Avro file" in problems[2]
    assert "truncated" in problems[4]
    assert table["ra"].to_pylist()[2] is None


def test_chunks_and_row_groups_do_not_change_the_table(night, models, tmp_path, monkeypatch):
    """No more than a chunk goes to a model at once, from a folder or a tarball."""
    score(night, models, tmp_path / "whole.parquet")
    tarball(night)
    seen = []
    whole = Model.predict
    monkeypatch.setattr(Model, "predict", lambda model, stamps: seen.append(len(stamps)) or whole(model, stamps))
    monkeypatch.setattr(work_module, "_CHUNK", 2)
    monkeypatch.setattr(work_module, "_FILES", 2)
    monkeypatch.setattr(table_module, "_ROW_GROUP", 3)
    expected = pd.read_parquet(tmp_path / "whole.parquet").drop(columns="origin")
    for source in (night, tmp_path / "night.tar.gz"):
        score(source, models, tmp_path / "parts.parquet")
        found = pd.read_parquet(tmp_path / "parts.parquet").drop(columns="origin")
        pd.testing.assert_frame_equal(found.sort_values("candid", ignore_index=True), expected)
        assert pq.ParquetFile(tmp_path / "parts.parquet").num_row_groups == 2
    assert max(seen) == 2


def test_a_model_of_several_classes_has_a_column_for_each(night, tmp_path):
    """Named as in a catalogue."""
    classes = make_model(tmp_path / "c", "classes", name="c", classes=("sn", "agn", "star"))
    wanted = InputCard(size=5, normalisation="none", layout="NHWC", features=("ref_distance", "fwhm"))
    needy = make_model(tmp_path / "needy", "classes", name="needy", classes=("sn", "agn", "star"), input=wanted)
    assert score_columns(load_model(classes)) == ["score_c_sn", "score_c_agn", "score_c_star"]
    with pytest.raises(ModelError, match="needs the features ref_distance, fwhm, and alert packets have none"):
        score(night, [needy], tmp_path / "scores.parquet")


def test_a_table_is_there_whole_or_not_at_all(night, models, tmp_path, monkeypatch):
    """What fails in the midst leaves what was there, and nothing else."""
    out = tmp_path / "out" / "scores.parquet"
    out.parent.mkdir()
    out.write_text("before")

    def fails(*_):
        raise ModelError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(table_module, "make_table", fails)
        with pytest.raises(ModelError, match="no more"):
            score(night, models, out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["scores.parquet", "scores.parquet.parts"]
    assert out.read_text() == "before"
    score(night, models, out)
    assert pq.read_table(out).num_rows == 5
    assert [path.name for path in out.parent.iterdir()] == ["scores.parquet"]


def test_a_disk_that_refuses_is_said(night, models, tmp_path, monkeypatch):
    """It is the disk, and no alert is to blame."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table_module.pq.ParquetWriter, "write_table", full)
    with pytest.raises(StorageError, match="No space left"):
        score(night, models, tmp_path / "scores.parquet")


def test_what_cannot_be_done_is_refused(night, models, tmp_path):
    """Before anything is written."""
    before = sorted(tmp_path.iterdir())
    (toy, _), out = models, tmp_path / "scores.parquet"
    for source, names, target, message in (
        (tmp_path / "absent", [toy], out, "no such file or folder"),
        (toy, [toy], out, r"no \.avro file in it"),
        (night, [], out, "no model to score with"),
        (night, [toy, toy], out, "two models of the name toy"),
        (night / "0.avro", [toy], night / "0.avro", r"ends in \.parquet"),
        (night, [toy], tmp_path / "absent" / "scores.parquet", "no such folder"),
    ):
        with pytest.raises(UsageError, match=message):
            score(source, names, target)
    with pytest.raises(ModelError, match="no model 'absent'"):
        score(night, ["absent"], out)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", [None, "x", 1, 2.5, True, 2**40, 1e300, float("nan"), b"x", [1]])
def test_measurements_of_another_type_are_null(value):
    """Whatever a packet holds, it fits into the table."""
    for kind, _, _ in MEASUREMENTS.values():
        assert len(pa.array([table_module._value(value, kind)], kind)) == 1


@pytest.mark.realdata
def test_real_packets_have_the_score_of_ztf_and_ours_in_one_table(tmp_path):
    """braai's column is `drb` wherever the packet has one; all are scored by both."""
    add_braai(data("models") / "d6_m7.h5")
    found = score(data("alerts") / "packets", ["realbogus", "braai-d6_m7"], tmp_path / "scores.parquet")
    assert (found.alerts, found.exit_code) == (53, 0)
    table = pq.read_table(tmp_path / "scores.parquet").to_pandas()
    known = table["drb"].notna()
    assert known.sum() == 16
    assert (table["score_braai-d6_m7"] - table["drb"])[known].abs().max() < 1e-5
    assert table["score_realbogus"].between(0, 1).all()
    rubin = [*list(MEASUREMENTS)[list(MEASUREMENTS).index("midpointMjdTai") :]]
    assert table.drop(columns=["drb", "drb_version", "rb", *rubin]).notna().all(axis=None)
    assert table[rubin].isna().all(axis=None)
    assert set(table["survey"]) == {"ZTF"}
    assert table["candid"].is_unique


def test_a_pass_that_was_interrupted_is_gone_on_with(night, models, tmp_path, monkeypatch):
    """What has a part is not scored again, whichever way the rest is done; the table is that of an undisturbed pass."""
    monkeypatch.setattr(work_module, "_FILES", 2)
    out, whole = tmp_path / "scores.parquet", tmp_path / "whole.parquet"
    for source in (night, tarball(night), tarball(night, "night.tar")):
        score(source, models, whole)
        predict, calls = Model.predict, []

        def dies(model, stamps, calls=calls, predict=predict):
            calls.append(len(stamps))
            if len(calls) == 5:  # with those by which models are proven
                raise KeyboardInterrupt
            return predict(model, stamps)

        with monkeypatch.context() as patch:
            patch.setattr(Model, "predict", dies)
            with pytest.raises(KeyboardInterrupt):
                score(source, models, out)
        parts = out.with_name("scores.parquet.parts")
        assert not out.exists()
        assert len(list(parts.glob("*.parquet"))) == 1
        with monkeypatch.context() as patch:
            calls.clear()
            patch.setattr(Model, "predict", lambda *a, p=predict, calls=calls: calls.append(len(a[1])) or p(*a))
            found = score(source, models, out)
        assert sum(calls) == 2 * (5 - 2)
        assert (found.alerts, found.exit_code) == (5, 0)
        pd.testing.assert_frame_equal(pd.read_parquet(out), pd.read_parquet(whole))
        assert not parts.exists()
        out.unlink()


def test_parts_of_other_models_or_files_are_not_taken(night, models, tmp_path, monkeypatch):
    """Other models are refused with what to do; a file that has changed is read again."""
    monkeypatch.setattr(work_module, "_FILES", 2)
    out = tmp_path / "scores.parquet"
    with monkeypatch.context() as patch:
        patch.setattr("batchproc.packets._joined", lambda *a: pytest.exit)
        with pytest.raises(AttributeError):
            score(night, models, out)
    assert len(list(out.with_name("scores.parquet.parts").glob("*.parquet"))) == 3
    with pytest.raises(UsageError, match=r"by other models .*toy.*give those again, or remove the folder"):
        score(night, models[:1], out)
    again = make_model(tmp_path / "again", input=InputCard(size=5, normalisation="min-max"))  # toy's file
    with pytest.raises(UsageError, match="by these with other files or cards"):
        score(night, [again, models[1]], out)
    (night / "0.avro").write_bytes(packet(record(77, stamp_of(7))))
    (night / "4.avro").unlink()
    assert score(night, models, out).alerts == 4
    assert pq.read_table(out)["candid"].to_pylist() == [77, 1, 2, 3]


def test_workers_share_the_work_out(night, models, tmp_path, dask_executor, monkeypatch):
    """Files of a folder, and blocks of a tarball; the table is the same, and its rows in the same order."""
    monkeypatch.setattr(work_module, "_FILES", 2)
    address = dask_executor.client.scheduler.address
    broken = night / "2.avro"
    broken.write_bytes(b"hello")
    for source in (night, tarball(night)):
        score(source, models, tmp_path / "serial.parquet")
        found = score(source, models, tmp_path / "dask.parquet", cluster=address, workers=2)
        assert found.text() == "5 alerts: 4 scored, 0 not scored, 1 unreadable"
        pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path / f"{n}.parquet") for n in ("serial", "dask")))


def test_a_part_that_is_being_written_is_none_yet(night, models, tmp_path):
    """Who looks at the parts while others write passes over those that have not their name yet."""
    whole = score(night, models, tmp_path / "whole.parquet")
    parts = tmp_path / "scores.parquet.parts"
    parts.mkdir()
    (parts / ".tmp-0.parquet").write_bytes(b"PAR1 and no more")
    assert score(night, models, tmp_path / "scores.parquet").text() == whole.text()
    assert not parts.exists()


def test_shares_cover_every_file_once(tmp_path, monkeypatch):
    """Tarballs by themselves, shared out among several workers where there are few of them."""
    monkeypatch.setattr(work_module, "_FILES", 3)
    names = ["a.avro", "b.avro", "c.avro", "d.avro", "e.tar", "f.avro", "g.tar.gz"]
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.touch()
    shares = list(work_module.plan_shares(paths, 4))
    told = [("".join(Path(file).name[0] for file in share.files), share.stripe, share.stripes) for share in shares]
    assert told == [("abc", 0, 1), ("d", 0, 1), ("e", 0, 2), ("e", 1, 2), ("f", 0, 1), ("g", 0, 2), ("g", 1, 2)]
    assert [share.name for share in shares] == sorted(share.name for share in shares)
    assert all(len(share.name) == NAME_LENGTH for share in shares)
    assert [[share.mine(block) for share in shares[2:4]].count(True) for block in range(6)] == [1] * 6


def test_files_under_which_workers_die_cost_the_others_nothing(night, models, tmp_path, monkeypatch):
    """They are named, the others' parts stay, and the table is made once all are there."""
    monkeypatch.setattr(work_module, "_FILES", 2)
    out = tmp_path / "scores.parquet"
    share = packets_module.score_share

    def dies(job, some, **options):
        if some.files[0].endswith("2.avro"):
            raise WorkerDiedError("died")
        share(job, some, **options)

    with monkeypatch.context() as patch:
        patch.setattr(packets_module, "score_share", dies)
        with pytest.raises(ClusterError, match=r"2 files \(.*2\.avro … .*3\.avro\): the worker died each time"):
            score(night, models, out)
    assert not out.exists()
    assert len(list(out.with_name("scores.parquet.parts").glob("*.parquet"))) == 2
    assert score(night, models, out).exit_code == 0


def test_progress_is_that_of_the_parts(night, models, tmp_path, monkeypatch):
    """Bytes of all blocks add up to those of the source, whoever reads how much of it."""
    monkeypatch.setattr(work_module, "_FILES", 2)
    monkeypatch.setattr(packets_module, "_MB", 1000)
    seen = []
    monkeypatch.setattr(
        packets_module, "show", lambda items, total, what, count, **k: (seen.append((n, total)) or n for n in items)
    )
    for source in (night, tarball(night, "night.tar")):
        seen.clear()
        score(source, models, tmp_path / "scores.parquet")
        assert len(seen) >= 3
        assert sum(n for n, _ in seen) == seen[0][1]
        assert max(n for n, _ in seen) < 0.7 * seen[0][1]
