"""Rubin's alert packets are read by what reads ZTF's: in the pipeline's order, the source in the middle."""

from __future__ import annotations

import gzip

import numpy as np
import pyarrow.parquet as pq
import pytest

from batchproc.io import alert_records as module
from batchproc.io.alerts import read_alerts
from batchproc.io.cards import InputCard
from batchproc.io.models import load_model
from batchproc.learning.inputs import to_tensor
from batchproc.packets import score_packets
from tests.io import _packets, _rubin
from tests.io.test_models import make_model


def stamp_of(seed=0, h=30, w=30):
    return np.random.default_rng(seed).normal(0.0, 2.0, (3, h, w)).astype(np.float32)


def write(path, *records, **options):
    path.write_bytes(_rubin.packet(*records, **options))
    return path


def one(path):
    """The only chunk there is."""
    (chunk,) = read_alerts(path)
    return chunk


@pytest.mark.parametrize("version", ["7_1", "10_0"])
@pytest.mark.parametrize("size", [30, 31, 51, 63])
def test_alerts_are_rows_in_the_order_of_the_pipeline(tmp_path, version, size):
    """Science, template, difference, centred, NaN around; who they are and what was measured beside them."""
    stamps = [stamp_of(k, size, size) for k in range(2)]
    path = write(tmp_path / "a.avro", *(_rubin.record(7 + k, stamp) for k, stamp in enumerate(stamps)), version=version)
    alerts = one(path)
    first = 31 - size // 2
    inside = (..., slice(first, first + size), slice(first, first + size))
    assert alerts.stamps.shape == (2, 3, 63, 63)
    np.testing.assert_array_equal(alerts.stamps[inside], stamps)
    assert np.isnan(alerts.stamps).sum() == 6 * (63 * 63 - size * size)
    assert alerts.candid.tolist() == [7, 8]
    assert alerts.object_id == ("21", "24")
    assert alerts.survey == ("LSST", "LSST")
    assert alerts.candidate[1]["midpointMjdTai"] == 60623.26
    assert alerts.problems == ("", "")
    assert np.isnan(alerts.drb).all()


@pytest.mark.parametrize("centre", [(14.6, 15.2), (15.4, 14.5), (3.0, 26.0)])
def test_the_source_is_where_the_wcs_has_it(tmp_path, centre):
    """Cutouts of an even size have no middle, and those at an edge are not centred: the nearest pixel is."""
    stamp = stamp_of()
    row, column = (round(place) for place in centre)
    stamp[:, row, column] = 1000.0
    alerts = one(write(tmp_path / "a.avro", _rubin.record(1, stamp, centre=centre)))
    assert (alerts.stamps[0, :, 31, 31] == 1000.0).all()
    tensor, _ = to_tensor(alerts.stamps, size=9, normalisation="none", min_finite=0)
    assert (tensor[0, :, 4, 4] == 1000.0).all()


def test_cutouts_larger_than_a_stamp_lose_their_edges(tmp_path):
    """As large as the source: the middle is what a model looks at."""
    stamp = stamp_of(0, 91, 91)
    alerts = one(write(tmp_path / "a.avro", _rubin.record(1, stamp)))
    np.testing.assert_array_equal(alerts.stamps[0], stamp[:, 45 - 31 : 45 + 32, 45 - 31 : 45 + 32])
    assert alerts.problems == ("",)


def test_the_fast_way_reads_what_astropy_reads():
    """Cutouts with a WCS and more HDUs behind are plain enough; the reference pixel is the same."""
    for centre, planes in (((14.6, 15.2), True), (None, False)):
        content = _rubin.cutout(stamp_of()[0], centre, planes=planes)
        plain, full = module._plain_pixels(content), module._pixels(content)
        np.testing.assert_array_equal(plain[0], full[0])
        assert plain[1] == full[1]
        assert plain[1] == pytest.approx(centre or (15, 15))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cutoutTemplate: none in the packet"),
        (b"", "cutoutTemplate: none in the packet"),
        (b"no FITS", "cutoutTemplate: not a FITS image"),
        (_rubin.cutout(stamp_of()[0])[:6000], "cutoutTemplate: not a FITS image"),
        (bytes(1 << 24), "more than 8 MB"),
        (gzip.compress(bytes(1 << 24)), "more than 8 MB"),
        (_rubin.cutout(np.full((30, 30), np.nan, np.float32)), "cutoutTemplate: no pixel holds data"),
    ],
)
def test_a_bad_cutout_is_said_and_not_scored(tmp_path, data, message):
    """The other channels and the neighbours are what they were; the alert is still a row."""
    alerts = one(
        write(tmp_path / "a.avro", _rubin.record(1, stamp_of(), cutoutTemplate=data), _rubin.record(2, stamp_of()))
    )
    assert message in alerts.problems[0]
    assert alerts.problems[1] == ""
    assert np.isnan(alerts.stamps[0, 1]).all()
    assert np.isfinite(alerts.stamps[0, 0]).sum() == 900
    assert to_tensor(alerts.stamps, size=21, normalisation="noise-log")[1].tolist() == [False, True]


def test_gzipped_cutouts_and_sources_without_object_are_read(tmp_path):
    """An asteroid has the object of the solar system; a source that is linked to nothing has none."""
    packed = {name: gzip.compress(_rubin.cutout(stamp_of()[k])) for k, name in enumerate(_rubin.NAMES)}
    linked = _rubin.record(1, stamp_of(), diaObjectId=None, ssObjectId=99, **packed)
    alerts = one(write(tmp_path / "a.avro", linked, _rubin.record(2, stamp_of(), diaObjectId=None)))
    assert alerts.object_id == ("99", "")
    np.testing.assert_array_equal(alerts.stamps[0], alerts.stamps[1])


def test_messages_of_kafka_say_what_they_lack(tmp_path):
    """Their schema is in a registry: the row says so, and what to do."""
    (tmp_path / "a.avro").write_bytes(_rubin.message(_rubin.record(1, stamp_of())))
    (problem,) = one(tmp_path / "a.avro").problems
    assert "a message of Kafka without its schema (number 703)" in problem
    assert "fastavro.writer makes one" in problem


def test_both_surveys_go_into_one_table(tmp_path, monkeypatch):
    """Each with its own measurements, null where a survey has none; scores as of the stamps themselves."""
    monkeypatch.setenv("BATCHPROC_MODELS", str(tmp_path / "models"))
    model = make_model(tmp_path / "toy", input=InputCard(size=5, normalisation="none"))
    night = tmp_path / "night"
    night.mkdir()
    (night / "a.avro").write_bytes(_packets.packet(_packets.record(5, _packets.stamp_of(5))))
    write(night / "b.avro", _rubin.record(6, stamp_of(6)))
    found = score_packets(night, [model], tmp_path / "scores.parquet", quiet=True)
    assert found.text() == "2 alerts: 2 scored, 0 not scored, 0 unreadable"
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table["survey"].to_pylist() == ["ZTF", "LSST"]
    assert table["band"].to_pylist() == [None, "r"]
    assert table["fid"].to_pylist()[1] is None
    assert table["isNegative"].to_pylist() == [None, True]
    assert table["visit"].to_pylist() == [None, 2024110800263]
    assert table["reliability"].to_pylist() == [None, 0.75]
    np.testing.assert_array_equal(table["score_toy"].to_numpy()[1:], load_model(model).predict(stamp_of(6)[None]))
