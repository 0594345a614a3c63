"""Alert packets become stamps in the pipeline's order; what is wrong with one is said, and the alert stays a row."""

from __future__ import annotations

import builtins
import gzip
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchproc.errors import UsageError
from batchproc.io import alert_records as records_module
from batchproc.io import alerts as module
from batchproc.io.alerts import read_alerts, source_size
from batchproc.io.braai import add_braai
from batchproc.io.models import load_model
from batchproc.learning.inputs import to_tensor
from tests._real import data
from tests.io._packets import cutout, fits_bytes, packet, record, stamp_of, tarball, write_night


def one(path):
    """The only chunk there is."""
    (chunk,) = read_alerts(path)
    return chunk


@pytest.fixture
def night(tmp_path):
    """A folder of five alerts, one of them with a score."""
    return write_night(tmp_path / "night")


def test_alerts_are_rows_in_the_order_of_the_pipeline(night):
    """Science, template, difference are new, ref, difference; scores and measurements beside them."""
    alerts = one(night)
    np.testing.assert_array_equal(alerts.stamps, [stamp_of(k) for k in range(5)])
    assert alerts.stamps.dtype == np.float32
    assert (len(alerts), alerts.candid.tolist()) == (5, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(alerts.drb, [np.nan, np.nan, np.nan, 0.25, np.nan])
    assert alerts.drb_version == ("", "", "", "d6_m7", "")
    assert alerts.object_id[4] == "ZTF4"
    assert alerts.candidate[4]["ra"] == 14.0
    assert alerts.problems == ("",) * 5
    assert alerts.origin[0] == str(night / "0.avro")


@pytest.mark.parametrize(("isdiffpos", "sign"), [("t", 1), ("1", 1), (None, 1), ("f", -1), ("0", -1)])
def test_a_source_that_has_faded_is_negative_in_the_difference(tmp_path, isdiffpos, sign):
    """As in every other stamp, though ZTF cuts that of such a source from template − science."""
    path = tmp_path / "a.avro"
    path.write_bytes(packet(record(1, stamp_of(1), isdiffpos=isdiffpos)))
    np.testing.assert_array_equal(one(path).stamps[0] * np.array([1, 1, sign])[:, None, None], stamp_of(1))


@pytest.mark.parametrize("name", ["night.tar", "night.tar.gz", "night.tgz"])
def test_a_tarball_is_as_good_as_a_folder(night, name):
    """Whatever holds the packets, and however many are in one file."""
    expected, found = one(night), one(tarball(night, name))
    np.testing.assert_array_equal(found.stamps, expected.stamps)
    assert found.candid.tolist() == expected.candid.tolist()
    assert found.origin[1].endswith(f"{name}/inner/1.avro")
    joined = night.parent / "joined.avro"
    joined.write_bytes(packet(*(record(k, stamp_of(k)) for k in range(5))))
    np.testing.assert_array_equal(one(joined).stamps, expected.stamps)


def test_no_more_than_a_chunk_is_read_ahead(night, monkeypatch):
    """A night of alerts never has to fit into memory."""
    read = []
    whole = module.read_record
    monkeypatch.setattr(module, "read_record", lambda *a: read.append(1) or whole(*a))
    chunks = read_alerts(night, chunk=2)
    assert read == []
    assert len(next(chunks)) == 2
    assert len(read) == 2
    assert [len(chunk) for chunk in chunks] == [2, 1]


@pytest.mark.parametrize("name", ["", "night.tar", "night.tar.gz"])
def test_how_far_the_reading_is_can_be_told(night, name):
    """In bytes of what lies on the disk; a tarball's last ones need not be read."""
    source = tarball(night, name) if name else night
    read = [alerts.n_bytes for alerts in read_alerts(source, chunk=2)]
    assert read == sorted(read)
    assert read[0] > 0
    assert source_size(source) - 20480 <= read[-1] <= source_size(source)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cutoutTemplate: none in the packet"),
        (b"", "cutoutTemplate: none in the packet"),
        (b"no gzip", "cutoutTemplate: not a gzipped FITS image"),
        (cutout(stamp_of()[0])[:-400], "cutoutTemplate: not a gzipped FITS image (torn"),
        (gzip.compress(b"no FITS" * 1000, mtime=0), "cutoutTemplate: not a gzipped FITS image"),
        (gzip.compress(cutout(stamp_of()[0]), mtime=0), "cutoutTemplate: not a gzipped FITS image"),
        (
            gzip.compress(gzip.decompress(cutout(stamp_of()[0]))[:9000], mtime=0),
            "cutoutTemplate: not a gzipped FITS image",
        ),
        (gzip.compress(bytes(1 << 24), mtime=0), "more than 1 MB"),
        (cutout(stamp_of()), "no image of two axes"),
        (cutout(np.full((63, 63), np.nan, np.float32)), "cutoutTemplate: no pixel holds data"),
        (cutout(np.zeros((64, 63), np.float32)), "cutoutTemplate: 64 × 63 pixels; expected 63 × 63"),
    ],
)
def test_a_bad_cutout_is_said_and_not_scored(tmp_path, data, message):
    """The other channels and the neighbours are what they were; the alert is still a row."""
    path = tmp_path / "a.avro"
    path.write_bytes(packet(record(1, stamp_of(1), cutoutTemplate=data), record(2, stamp_of(2))))
    alerts = one(path)
    assert message in alerts.problems[0]
    assert alerts.problems[1] == ""
    assert alerts.candid.tolist() == [1, 2]
    assert np.isnan(alerts.stamps[0, 1]).all()
    np.testing.assert_array_equal(alerts.stamps[0, [0, 2]], stamp_of(1)[[0, 2]])
    assert to_tensor(alerts.stamps, size=63, normalisation="ztf-row-l2")[1].tolist() == [False, True]


@pytest.mark.parametrize(("h", "w"), [(63, 55), (51, 63), (40, 40)])
def test_truncated_cutouts_are_said_and_lie_in_the_corner(tmp_path, h, w):
    """Blank at the bottom and right: to a model that wants them so, the same as the stamps themselves."""
    path = tmp_path / "a.avro"
    path.write_bytes(packet(record(1, stamp_of(1, h, w))))
    alerts = one(path)
    assert f"cutoutScience: truncated to {h} × {w} pixels, blank at the bottom and right" in alerts.problems[0]
    np.testing.assert_array_equal(alerts.stamps[0, :, :h, :w], stamp_of(1, h, w))
    assert np.isnan(alerts.stamps).sum() == 3 * (63 * 63 - h * w)
    if h != w:
        how = {"size": 63, "normalisation": "ztf-row-l2", "truncated": "corner", "padding": 1e-9}
        direct, _ = to_tensor(stamp_of(1, h, w)[None], **how)
        np.testing.assert_allclose(to_tensor(alerts.stamps, **how)[0], direct, atol=1.1e-9)


def test_packets_that_cannot_be_read_are_rows_without_a_candid(tmp_path):
    """Torn, of another kind, of another survey: each with its file and what was found."""
    good = packet(record(1, stamp_of(1)))
    other = {"type": "record", "name": "alert", "fields": [{"name": "alertId", "type": "long"}]}
    (tmp_path / "a.avro").write_bytes(good[:-3000])
    (tmp_path / "b.avro").write_bytes(b"hello")
    (tmp_path / "c.avro").write_bytes(b"")
    (tmp_path / "d.avro").write_bytes(packet({"alertId": 7}, schema=other))
    (tmp_path / "e.avro").write_bytes(good)
    (tmp_path / "f.avro").mkdir()
    alerts = one(tmp_path)
    assert alerts.candid.tolist() == [-1, -1, -1, -1, 1, -1]
    assert all("not an Avro file, or torn" in problem for problem in alerts.problems[:3])
    assert (
        "not a ZTF alert: it needs candid and candidate; nor one of Rubin: diaSource; found alertId"
        in alerts.problems[3]
    )
    assert (alerts.problems[4], "cannot be read" in alerts.problems[5]) == ("", True)
    assert np.isnan(alerts.stamps[:4]).all()
    assert alerts.origin[1] == str(tmp_path / "b.avro")


@pytest.mark.parametrize("name", ["night.tar", "night.tar.gz"])
def test_a_torn_tarball_says_where_it_breaks_off(night, name):
    """What came before is there, and the last row says that there was more."""
    path = tarball(night, name)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    alerts = one(path)
    n = len(alerts) - 1
    assert 0 < n < 5
    assert alerts.candid.tolist() == [*range(n), -1]
    assert "breaks off here" in alerts.problems[-1]


def _ends(night):
    """Tarballs whose end is not as it should be: what is in the file, and how many packets of five come before that."""
    plain = tarball(night, "night.tar").read_bytes()
    third = plain.rindex(b"././@PaxHeader", 0, plain.index(b"inner/2.avro"))  # its first block
    end = -(-len(plain.rstrip(b"\0")) // 512) * 512
    damaged = plain[:third] + b"?" + plain[third + 1 :]
    packed = gzip.compress(plain, mtime=0)
    return {
        "a damaged header": (damaged, 2),
        "a torn header": (plain[: third + 100], 2),
        "cut between two files": (plain[:third], 2),
        "no end mark": (plain[:end], 5),
        "a hole of zeros": (plain[:third] + bytes(512) + plain[third + 512 :], 2),
        "a packed one without its last bytes": (packed[:-20], 5),
        "a packed one with another checksum": (packed[:-8] + bytes(4) + packed[-4:], 5),
    }


@pytest.mark.parametrize(
    "what",
    [
        "a damaged header",
        "a torn header",
        "cut between two files",
        "no end mark",
        "a hole of zeros",
        "a packed one without its last bytes",
        "a packed one with another checksum",
    ],
)
def test_no_tarball_ends_early_unsaid(night, what):
    """Only a block of zeros is its end, with nothing but zeros after it, and a packed one's checksum holds."""
    content, n = _ends(night)[what]
    path = night.parent / "broken.tar"
    path.write_bytes(content)
    alerts = one(path)
    assert alerts.candid.tolist() == [*range(n), -1]
    assert "breaks off here" in alerts.problems[-1]


def test_a_tarball_in_several_gzip_streams_is_read_through(night):
    """As packers write it that work in parallel."""
    plain = tarball(night, "night.tar").read_bytes()
    half = len(plain) // 2
    path = night.parent / "streams.tar.gz"
    path.write_bytes(gzip.compress(plain[:half], mtime=0) + gzip.compress(plain[half:], mtime=0))
    alerts = one(path)
    assert alerts.candid.tolist() == [0, 1, 2, 3, 4]
    assert set(alerts.problems) == {""}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 40_000), junk=st.binary(min_size=1, max_size=40))
def test_no_altered_byte_ends_the_reading(tmp_path, where, junk):
    """Whatever a packet has become, it is at least one row; numbers that were altered cannot be known."""
    content = bytearray(packet(record(1, stamp_of(1)), record(2, stamp_of(2))))
    where %= len(content)
    content[where : where + len(junk)] = junk
    path = tmp_path / "a.avro"
    path.write_bytes(content)
    alerts = one(path)
    assert len(alerts) >= 1
    assert alerts.stamps.shape[1:] == (3, 63, 63)


@settings(deadline=None, max_examples=60)
@given(
    h=st.integers(1, 70),
    w=st.integers(1, 70),
    dtype=st.sampled_from(["f4", "f8", "i2", "u2", "i4"]),
    cards=st.sampled_from([{}, {"BUNIT": "DN"}, {"DSNRMS": 2.5}, {"BLANK": 3}, {"BSCALE": 2.0}, {"OBJECT": "x"}]),
    seed=st.integers(0, 1000),
)
def test_the_fast_way_reads_what_astropy_reads(h, w, dtype, cards, seed):
    """Plain cutouts by hand, and whatever else there may be in FITS by astropy."""
    pixels = np.random.default_rng(seed).integers(0, 500, (h, w)).astype(dtype)
    content = fits_bytes(pixels, **cards)
    plain, (full, _) = records_module._plain_pixels(content), records_module._pixels(content)
    assert (plain is not None) == (dtype == "f4" and not cards.keys() & {"BSCALE", "BLANK", "OBJECT"})
    if plain is not None:
        np.testing.assert_array_equal(plain[0], full)
    if not cards.keys() & {"BSCALE", "BLANK"}:
        np.testing.assert_array_equal(full, pixels)
    assert full.dtype == np.float32


def test_what_is_no_source_of_alerts_is_refused(tmp_path):
    """Before anything is read."""
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("absent", "no such file or folder"),
        ("a.csv", r"expected a folder of \.avro files"),
        ("empty", r"no \.avro file in it"),
    ):
        with pytest.raises(UsageError, match=message):
            next(read_alerts(tmp_path / name))


def test_without_fastavro_the_extra_is_named(night, monkeypatch):
    """What to type is in the message."""
    there = builtins.__import__

    def without(name, *arguments, **options):
        if name == "fastavro":
            raise ImportError("No module named 'fastavro'")
        return there(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'batchproc\[alerts\]'"):
        next(read_alerts(night))


@pytest.mark.realdata
def test_drb_comes_back_from_the_real_packets(tmp_path, monkeypatch):
    """All that have one, within 1e-5, from packet to score; the same from a tarball of them."""
    monkeypatch.setenv("BATCHPROC_MODELS", str(tmp_path / "models"))
    model = load_model(add_braai(data("models") / "d6_m7.h5"))
    packets = data("alerts") / "packets"
    with tarfile.open(tmp_path / "packets.tar", "w") as tar:
        tar.add(packets, "packets")
    for source in (packets, tmp_path / "packets.tar"):
        chunks = list(read_alerts(source, chunk=20))
        drb = np.concatenate([chunk.drb for chunk in chunks])
        scores = np.concatenate([model.predict(chunk.stamps) for chunk in chunks])
        known = np.isfinite(drb)
        assert (len(drb), known.sum()) == (53, 16)
        assert np.abs(scores[known] - drb[known]).max() < 1e-5
        assert {v for chunk in chunks for v in chunk.drb_version} == {"", "d6_m7"}
        assert not any(problem for chunk in chunks for problem in chunk.problems)


@pytest.mark.realdata
def test_real_packets_hold_the_pixels_that_were_taken_from_them():
    """Bit for bit, blank ones included; the difference of what has faded the other way round than in the packet."""
    with np.load(data("alerts") / "ztf_triplets.npz") as taken:
        expected = dict(zip(taken["candid"].tolist(), taken["triplets"].transpose(0, 3, 1, 2), strict=True))
    for alerts in read_alerts(data("alerts") / "packets"):
        found = alerts.stamps.copy()
        faded = [about["isdiffpos"] == "f" for about in alerts.candidate]
        assert any(faded)
        assert (np.nanmean(found[faded, 2, 30:33, 30:33], axis=(1, 2)) < 0).all()
        found[faded, 2] *= -1
        np.testing.assert_array_equal(found, [expected[candid] for candid in alerts.candid.tolist()])
