"""What examples are made of: runs, packets, stored sets, injections; and what says what they are. No torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from batchproc.config import Config
from batchproc.errors import ConfigError, ExposureError, UsageError
from batchproc.io.alerts import read_alerts
from batchproc.io.catalogue import open_catalogue
from batchproc.io.stamps import open_stamps
from batchproc.label_tables import read_labels, table_labels
from batchproc.training import injections, sources
from batchproc.training.examples import Examples
from batchproc.training.gather import Sources, describe, gather, known_places
from batchproc.training.injections import Injections, inject_manifest
from batchproc.training.labels import parse_rules, rule_labels
from batchproc.training.settings import TrainSettings
from batchproc.training.sources import Reading, at_most, read_source
from tests import _runs


def some(n, size=9, seed=0, **columns):
    """Examples of noise, half of them real."""
    random = np.random.default_rng(seed)
    stamps = random.normal(size=(n, 3, size, size)).astype(np.float32)
    table = pd.DataFrame({"id": [f"{seed}-{k}" for k in range(n)], "mjd": random.uniform(size=n), **columns})
    return Examples(stamps, np.where(np.arange(n) % 2 == 0, "real", "bogus"), table)


@pytest.fixture
def run(tmp_path):
    """Three images of 5, 0 and 40 candidates, and what somebody says of some of them."""
    folder = _runs.begin(tmp_path / "RUN", "a", "b", "c")
    for name, n in (("a", 5), ("b", 0), ("c", 40)):
        _runs.store(folder, name, n)
    return folder.path


# --- Examples ---------------------------------------------------------------------------------------------------------


def test_examples_come_back_from_the_disk(tmp_path):
    """Numbers as numbers, text as text, unknown text empty."""
    examples = some(6, filter=["r", None, "g", "r", "r", "r"])
    examples.save(tmp_path / "set.npz")
    back = Examples.load(tmp_path / "set.npz")
    np.testing.assert_array_equal(back.stamps, examples.stamps)
    np.testing.assert_array_equal(back.label, examples.label)
    assert list(back.table["filter"]) == ["r", "", "g", "r", "r", "r"]
    assert back.table["mjd"].tolist() == examples.table["mjd"].tolist()
    assert back.counts() == {"bogus": 3, "real": 3}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"stamps": np.zeros((2, 3, 5, 5))}, "expected the arrays stamps, and label or real; found stamps"),
        ({"stamps": np.zeros((2, 3, 5, 5)), "real": np.zeros(3, bool)}, "2 stamps, 3 labels"),
        ({"stamps": np.zeros((2, 3, 5, 5)), "real": np.array([1, np.nan])}, "real is neither 0 nor 1 in 1 of 2 rows"),
        ({"stamps": np.zeros((2, 5, 5)), "real": np.zeros(2, bool)}, r"expected \(n, 3, h, w\)"),
        ({"stamps": np.zeros((2, 3, 5, 5)), "real": np.zeros(2, bool), "mjd": np.zeros((2, 2))}, "mjd of shape"),
    ],
)
def test_other_sets_are_refused(tmp_path, arrays, message):
    """With what was expected and what was found."""
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        Examples.load(tmp_path / "set.npz")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:100])
    with pytest.raises(UsageError, match="cannot be read as a set of examples"):
        Examples.load(tmp_path / "torn.npz")


def test_joining_pads_small_stamps_and_missing_columns():
    """The middle stays the middle."""
    small, large = some(2, size=5), some(3, size=9, ccd="7")
    whole = Examples.join([small, large])
    assert whole.stamps.shape == (5, 3, 9, 9)
    np.testing.assert_array_equal(whole.stamps[:2, :, 2:7, 2:7], small.stamps)
    assert np.isnan(whole.stamps[:2, :, :2]).all()
    np.testing.assert_array_equal(whole.stamps[2:], large.stamps)
    assert whole.table["ccd"].isna().tolist() == [True, True, False, False, False]


def test_a_view_copies_no_stamps():
    """It reads from what it is a view of, as a copy would have them."""
    examples = some(10)
    rows = np.array([7, 1, 4])
    view, copy = examples.view(rows), examples[rows]
    np.testing.assert_array_equal(view.stamps[1:], copy.stamps[1:])
    assert view.stamps.shape == copy.stamps.shape
    examples.stamps[4] = 0
    assert (view.stamps[[2]] == 0).all()
    pd.testing.assert_frame_equal(view.table, copy.table)


# --- Labels -----------------------------------------------------------------------------------------------------------


def test_people_label_by_any_usual_name(tmp_path):
    """Identity and class under several names; real as 0 and 1; rows without a class say nothing."""
    pd.DataFrame({"objectId": ["Z1", "Z2", "Z3"], "class": ["SN", None, "AGN"]}).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame({"candid": [11, 12], "real": [1, 0]}).to_parquet(tmp_path / "b.parquet")
    assert read_labels(tmp_path / "a.csv").to_dict() == {"Z1": "SN", "Z3": "AGN"}
    labels = read_labels(tmp_path / "b.parquet")
    assert table_labels(labels, ["99", "12"], ["11", "11"]).tolist() == ["real", "bogus"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_identities_are_read_digit_by_digit(tmp_path, suffix):
    """Also where one of them is missing; a row without a class, or without an identity, says nothing."""
    ids, path = pd.array([1105522281015015017, None, 7, 8], "Int64"), tmp_path / f"a.{suffix}"
    table = pd.DataFrame({"candid": ids, "real": pd.array([True, True, None, False], "boolean")})
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    assert read_labels(path).to_dict() == {"1105522281015015017": "real", "8": "bogus"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ["a"], "label": ["real"]}, "needs one of candidate_id, id, candid"),
        ({"id": ["a"], "real": [2]}, "real is neither 0 nor 1 in 1 of 1 rows, such as 2"),
        ({"id": ["a", "b"], "real": [1, "no"]}, "real is neither 0 nor 1 in 1 of 2 rows, such as no"),
        ({"id": ["a", "a"], "label": ["x", "y"]}, "a has 2 classes: x, y"),
        ({"candid": [1105522281015015000, None], "real": [1, 0]}, "candid is rounded in 1 rows, such as 1.1055"),
    ],
)
def test_tables_that_say_nothing_clear_are_refused(tmp_path, columns, message):
    """With what was found."""
    pd.DataFrame(columns).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(UsageError, match=message):
        read_labels(tmp_path / "a.csv")


def test_rules_label_by_columns():
    """All conditions must hold, unknown values never do, and two rules that disagree say nothing."""
    table = pd.DataFrame(
        {"drb": [0.95, 0.2, np.nan, 0.95, 0.6], "rb": [0.9, 0.9, 0.9, 0.1, 0.1], "filter": list("grrrg")}
    )
    rules = parse_rules(["real: drb > 0.9", "bogus: drb <= 0.5", "bogus:rb<0.5 and filter == r"])
    assert rule_labels(rules, table).tolist() == ["real", "bogus", "", "", ""]
    with pytest.raises(UsageError, match=r"the rule for real: no column 'dbr'; found drb, rb, filter"):
        rule_labels(parse_rules(["real: dbr > 1"]), table)
    with pytest.raises(UsageError, match="'high' is no number"):
        rule_labels(parse_rules(["real: drb > high"]), table)
    for text in ("drb > 0.9", "real: drb", "real: drb > 0.9 or rb > 0.5 and", ": drb > 1"):
        with pytest.raises(UsageError, match="expected CLASS: COLUMN > VALUE"):
            parse_rules([text])


def test_at_most_so_many_of_each_class():
    """Drawn at random, repeatably, in order; without a label, none."""
    label = np.array(["a"] * 50 + ["b"] * 3 + [""] * 9)
    rows = at_most(label, 5, 0)
    assert (label[rows] == "a").sum() == 5
    assert (label[rows] == "b").sum() == 3
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, at_most(label, 5, 0))
    assert len(at_most(label, 0, 0)) == 53


# --- Sources ----------------------------------------------------------------------------------------------------------


def test_a_run_with_known_truth(run):
    """The nearest of the right sign is real, the rest of the image bogus, other images out, each with its stamp."""
    catalogue = open_catalogue(run)
    known = catalogue[catalogue["image_id"] == "c"].iloc[[3, 9]]
    known.assign(snr=10.0, flux=known["scorr"])[["image_id", "x", "y", "flux", "snr"]].to_parquet(run / "truth.parquet")
    reading = Reading(size=5)
    found = read_source(run, reading)
    assert set(found.table["group"]) == {"c"}
    assert set(known["candidate_id"]) == set(found.table["id"][found.label == "real"])
    assert any("images without a known transient were left out" in note for note in reading.notes)
    rows = catalogue.set_index("candidate_id").loc[found.table["id"], "stamp_index"].to_numpy()
    np.testing.assert_array_equal(found.stamps, open_stamps(run)[rows][:, :, 2:7, 2:7])
    assert {"ra", "dec", "ccd", "filter", "seeing", "mjd", "survey", "source"} <= set(found.table)


def test_a_run_that_people_have_looked_at(run, tmp_path):
    """Only what they have labelled, with their classes; no stamps where none are wanted."""
    ids = open_catalogue(run)["candidate_id"]
    pd.DataFrame({"candidate_id": ids[[2, 4, 30]], "label": ["SN", "AGN", "SN"]}).to_csv(
        tmp_path / "l.csv", index=False
    )
    reading = Reading(size=0, labels=read_labels(tmp_path / "l.csv"))
    found = read_source(run, reading)
    assert dict(zip(found.table["id"], found.label, strict=True)) == dict(
        zip(ids[[2, 4, 30]], ["SN", "AGN", "SN"], strict=True)
    )
    assert found.stamps.size == 0
    assert reading.notes == [f"{run}: 3 of 45 candidates are labelled"]
    with pytest.raises(UsageError, match="no candidate in it is labelled"):
        read_source(run, replace(reading, labels=pd.Series({"nobody": "SN"})))


def test_alert_packets_by_rules_and_by_tables(tmp_path):
    """Stamps as the packets have them; an alert or its object can be named; ZTF's columns under our names too."""
    pytest.importorskip("fastavro")
    from tests.io._packets import packet, record

    stamps = np.random.default_rng(0).normal(size=(4, 3, 63, 63)).astype(np.float32)
    for k, drb in enumerate([0.99, 0.1, 0.7, None]):
        (tmp_path / f"{k}.avro").write_bytes(packet(record(k, stamps[k], drb=drb)))
    reading = Reading(size=31, rules=parse_rules(["real: drb > 0.9", "bogus: drb < 0.5"]), quiet=True)
    found = read_source(tmp_path, reading)
    assert found.label.tolist() == ["real", "bogus"]
    np.testing.assert_array_equal(found.stamps, stamps[:2, :, 16:47, 16:47])
    assert found.table["filter"].tolist() == ["g", "g"]
    assert found.table["survey"].tolist() == ["ZTF", "ZTF"]
    assert reading.notes == [f"{tmp_path}: 2 of 4 alerts are labelled, 0 cannot be read"]
    by_table = read_source(tmp_path, replace(reading, labels=pd.Series({"ZTF3": "SN", "2": "AGN", "0": "bogus"})))
    assert by_table.label.tolist() == ["bogus", "bogus", "AGN", "SN"]  # a person goes before a rule
    with pytest.raises(UsageError, match="alert packets do not say what is real: give a table"):
        read_source(tmp_path, Reading(size=31, quiet=True))


def test_rules_pass_over_alerts_that_cannot_be_read(tmp_path, monkeypatch):
    """A chunk of nothing else has no columns; a column that no alert at all has is an error."""
    pytest.importorskip("fastavro")
    from tests.io._packets import packet, record, stamp_of

    monkeypatch.setattr(sources, "read_alerts", lambda path: read_alerts(path, chunk=1))
    (tmp_path / "0.avro").write_bytes(b"torn")
    (tmp_path / "1.avro").write_bytes(packet(record(1, stamp_of())))
    reading = Reading(size=9, rules=parse_rules(["real: fid == 1", "bogus: fid == 2 and objectId == x"]), quiet=True)
    with pytest.raises(UsageError, match="no alert has objectId, for which a rule asks"):
        read_source(tmp_path, reading)
    found = read_source(tmp_path, replace(reading, rules=reading.rules[:1], notes=[]))
    assert found.label.tolist() == ["real"]


def test_packets_of_rubin_have_its_names(tmp_path):
    """Survey, time, filter and detector, by which the parts are made alike."""
    pytest.importorskip("fastavro")
    from tests.io import _packets, _rubin

    (tmp_path / "a.avro").write_bytes(_rubin.packet(_rubin.record(1, _packets.stamp_of(h=49, w=49), band="i")))
    (tmp_path / "b.avro").write_bytes(_packets.packet(_packets.record(2, _packets.stamp_of())))
    table = read_source(tmp_path, Reading(size=9, labels=pd.Series({"1": "SN", "2": "SN"}), quiet=True)).table
    assert table["survey"].tolist() == ["LSST", "ZTF"]
    assert table["filter"].tolist() == ["i", "g"]
    assert table["ccd"].tolist() == ["94", ""]
    assert table["mjd"].iloc[0] == pytest.approx(60623.26)


def test_several_sources_are_one_set(tmp_path):
    """Each row says where it is from; of each at most so many of a class."""
    for k in (1, 2):
        some(20, seed=k).save(tmp_path / f"{k}.npz")
    paths = [tmp_path / "1.npz", tmp_path / "2.npz"]
    found = gather(Sources(paths, (), Injections(tmp_path / "cache")), Reading(size=7, most=4))
    assert found.stamps.shape == (16, 3, 7, 7)
    assert found.table["source"].value_counts().to_dict() == {str(path): 8 for path in paths}
    with pytest.raises(UsageError, match="nothing to learn from"):
        gather(Sources((), (), Injections(tmp_path)), Reading(size=7))


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """A manifest of three images, one of which fails; how often each was worked on."""
    worked = []

    def fake(entry, how):
        worked.append(entry.image_id)
        if entry.image_id == "bad":
            raise ExposureError("too few stars")
        return some(4, size=31, seed=int(how.random_of(entry).integers(1000)))

    monkeypatch.setattr(injections, "_planted", fake)
    monkeypatch.setattr(injections, "read_manifest", lambda path: _runs.entries("a", "bad", "c"))
    monkeypatch.setattr("batchproc.training.gather.read_manifest", lambda path: _runs.entries("a", "bad", "c"))
    return worked


def test_injections_are_made_once(planted, tmp_path):
    """A second training reads them; other settings make others; what failed is tried again, and said."""
    how, notes = Injections(tmp_path / "cache"), []
    first = inject_manifest("night.csv", how, quiet=True, notes=notes)
    assert planted == ["a", "bad", "c"]
    assert len(first) == 8
    assert notes == ["night.csv: 1 of 3 images were left out: bad: too few stars"]
    again = inject_manifest("night.csv", how, quiet=True)
    assert planted == ["a", "bad", "c", "bad"]
    np.testing.assert_array_equal(first.stamps, again.stamps)
    assert Sources((), ["night.csv"], how).missing() == 1
    assert Sources((), ["night.csv"], replace(how, seed=1)).missing() == 3
    other = Config.from_dict({"detect": {"threshold": 5.0}})
    assert Sources((), ["night.csv"], replace(how, config=other)).missing() == 3


def test_injections_do_not_depend_on_the_other_images(planted, monkeypatch, tmp_path):
    """An image has the same ones wherever it stands in a manifest; another image, or seed, has others."""
    whole = inject_manifest("night.csv", Injections(tmp_path / "one"), quiet=True)
    monkeypatch.setattr(injections, "read_manifest", lambda path: _runs.entries("c"))
    alone = inject_manifest("night.csv", Injections(tmp_path / "two"), quiet=True)
    np.testing.assert_array_equal(alone.stamps, whole.stamps[4:])
    assert not (alone.stamps == whole.stamps[:4]).any()
    assert not (inject_manifest("night.csv", Injections(tmp_path, seed=1), quiet=True).stamps == alone.stamps).any()


def test_injections_notice_other_pixels(tmp_path):
    """An image that was made again, under the name it had, is planted in again."""
    (tmp_path / "new.fits").write_bytes(b"one")
    entry, how = replace(_runs.entries("a")[0], new=str(tmp_path / "new.fits")), Injections(tmp_path)
    before = how.key(entry)
    assert how.key(entry) == before
    (tmp_path / "new.fits").write_bytes(b"three")
    assert how.key(entry) != before


def test_what_is_known_to_have_changed_is_no_artefact(run):
    """Known transients of the runs that are learnt from are places of which injections say nothing."""
    entry = _runs.entries("c")[0]
    known = pd.DataFrame({"image_id": ["c", "c"], "x": [1.0, 2.0], "y": [3.0, 4.0], "flux": 1.0, "snr": 9.0})
    assert known_places([run], None) == {}
    known.to_parquet(run / "truth.parquet")
    how = Injections(run, known=known_places([run], None))
    np.testing.assert_array_equal(how.known_in(entry), [[1, 3], [2, 4]])
    assert how.known_in(_runs.entries("a")[0]).shape == (0, 2)
    assert how.key(entry) != Injections(run).key(entry)
    assert known_places([], run / "truth.parquet").keys() == {"c"}


def test_a_dry_run_counts_and_computes_nothing(planted, tmp_path):
    """Classes of each source, groups and parts, memory; injections that are still to be made are only counted."""
    some(300, size=31, group=[f"g{k % 40}" for k in range(300)]).save(tmp_path / "set.npz")
    sources = Sources([tmp_path / "set.npz"], ["night.csv"], Injections(tmp_path / "cache"))
    told = describe(sources, Reading(size=31), TrainSettings(), 31)
    assert planted == []
    assert "3 images are still to be made" in told
    assert "set.npz    150   150" in told
    assert "memory for stamps: 3.46 MB (31 × 31 pixels)" in told
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line[:5] in ("train", "valid", "test ")}
    assert sum(int(bogus) for bogus, _, _ in rows.values()) == 150
    assert sum(int(groups) for _, _, groups in rows.values()) == 40


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_settings_come_back_from_their_file(tmp_path):
    """All of them; unknown keys and wrong types are refused by name."""
    settings = TrainSettings(kind="forest", holdout=("survey=B",), features=("fwhm",), epochs=7, balance="sampling")
    (tmp_path / "config.toml").write_text(settings.to_toml())
    assert TrainSettings.from_toml(tmp_path / "config.toml") == settings
    (tmp_path / "config.toml").write_text("epoch = 3")
    with pytest.raises(ConfigError, match=r"config.toml: unknown key epoch; did you mean epochs\?"):
        TrainSettings.from_toml(tmp_path / "config.toml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "tree"}, "kind = 'tree'; expected one of: network, forest"),
        ({"valid": 0.5, "test": 0.5}, "shares above 0 that leave something to train on"),
        ({"holdout": ("GOTO",)}, "expected COLUMN=VALUE, such as survey=GOTO"),
        ({"freeze": True}, "without a base to continue from"),
        ({"epochs": 0}, "epochs = 0: must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    """Before anything is read."""
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**values)
