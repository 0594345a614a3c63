"""Parts are disjoint, keep places of the sky whole, and are alike. Arrays only; no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.errors import UsageError
from batchproc.training.seen import seen_by, write_seen
from batchproc.training.settings import TrainSettings
from batchproc.training.splits import PARTS, group_of, sky_groups, split_examples, strata_of

SETTINGS = TrainSettings(cell_arcmin=2.0, same_arcsec=5.0)
SHARES = {"train": 0.65, "valid": 0.15, "test": 0.2}


def candidates(n, seed, side_deg=1.0, dec=20.0, real=0.3):
    """A survey: several epochs of one field, CCDs, filters, seeing."""
    random = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "ra": 150 + random.uniform(0, side_deg, n) / np.cos(np.radians(dec)),
            "dec": dec + random.uniform(0, side_deg, n),
            "ccd": random.choice(["1", "2", "3"], n),
            "filter": random.choice(["g", "r"], n, p=[0.2, 0.8]),
            "seeing": random.lognormal(1, 0.3, n),
            "mjd": 60000 + random.integers(0, 300, n).astype(float),
            "survey": random.choice(["A", "B"], n, p=[0.8, 0.2]),
        }
    )
    return np.where(random.uniform(size=n) < real, "real", "bogus"), table


def separation_arcsec(table, one, other):
    """Of every row of one set to every row of the other."""
    ra, dec = np.radians(table["ra"].to_numpy()), np.radians(table["dec"].to_numpy())
    a, b = np.ix_(one, other)
    half = np.sin((dec[a] - dec[b]) / 2) ** 2 + np.cos(dec[a]) * np.cos(dec[b]) * np.sin((ra[a] - ra[b]) / 2) ** 2
    return np.degrees(2 * np.arcsin(np.sqrt(half))) * 3600


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(300, 900), dec=st.floats(-89, 88), split_seed=st.integers(0, 5))
def test_nothing_at_one_place_is_in_two_parts(seed, n, dec, split_seed):
    """Every row is in one part, every group whole, and neighbours within five arcseconds are together."""
    label, table = candidates(n, seed, dec=dec)
    again = np.random.default_rng(seed).integers(0, n, n // 3)  # seen once more, an arcsecond away
    table = pd.concat([table, table.iloc[again].assign(dec=lambda t: t["dec"] + 1 / 3600)], ignore_index=True)
    label = np.concatenate([label, label[again]])
    found = split_examples(label, table, replace(SETTINGS, seed=split_seed))
    assert set(found.part) == set(PARTS)
    assert sum(len(found.rows(part)) for part in PARTS) == len(label)
    for group in np.unique(found.group):
        assert len(set(found.part[found.group == group])) == 1
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert separation_arcsec(table, found.rows(one), found.rows(other)).min() > SETTINGS.same_arcsec


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_strata_have_the_shares_asked_for(seed):
    """Classes, CCDs, filters, seeing and season are in each part as in all; no stratum is off by more than its groups
    are coarse.
    """
    label, table = candidates(3000, seed)
    found = split_examples(label, table, SETTINGS)
    strata = strata_of(label, table, ("ccd", "filter", "seeing", "mjd"), 3).toarray()
    marginal = strata.sum(axis=0) > 150
    for part, share in SHARES.items():
        got = strata[found.part == part].sum(axis=0) / strata.sum(axis=0)
        assert np.abs(got[marginal] - share).max() < 0.05
    assert marginal.sum() >= 2 * (1 + 3 + 2 + 3 + 3) - 2


def test_a_rare_class_is_in_every_part():
    """Thirty of three thousand: the shares hold for them as well."""
    label, table = candidates(3000, 1, real=0.01)
    found = split_examples(label, table, SETTINGS)
    n = {part: (label[found.part == part] == "real").sum() for part in PARTS}
    total = sum(n.values())
    assert total < 45
    for part, share in SHARES.items():
        assert abs(n[part] - share * total) <= 2


def test_the_seed_decides_and_repeats():
    """The same rows and seed, the same parts; another seed, others."""
    label, table = candidates(500, 2)
    first, again = (split_examples(label, table, SETTINGS) for _ in range(2))
    np.testing.assert_array_equal(first.part, again.part)
    other = split_examples(label, table, replace(SETTINGS, seed=1))
    assert (other.part != first.part).mean() > 0.1


def test_a_survey_held_out_is_measured_on_and_nothing_else_is():
    """Where it lies, nothing is learnt: other surveys' candidates at its places are in no part, and that is said."""
    label, table = candidates(1500, 3)
    found = split_examples(label, table, replace(SETTINGS, cell_arcmin=1.0, holdout=("survey=B",)))
    np.testing.assert_array_equal(found.part == "test", table["survey"] == "B")
    out = found.part == ""
    assert out.any()
    assert f"{out.sum()} examples at places where something is held out were left out" in found.notes
    for part in ("train", "valid"):
        assert separation_arcsec(table, found.rows(part), found.rows("test")).min() > SETTINGS.same_arcsec
        assert not set(found.group[found.part == part]) & set(found.group[found.part == "test"])
    assert abs((found.part == "valid").sum() / ((found.part == "valid") | (found.part == "train")).sum() - 0.15) < 0.03


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        ("survey=C", r"no example has that; survey is one of: A, B"),
        ("telescope=A", r"no column 'telescope'; there are: label, ra, dec, ccd"),
        ("mjd=60001.0", r"a cut in time alone has the same sky on both sides"),
    ],
)
def test_what_cannot_be_held_out_is_refused(holdout, message):
    """With what there is instead."""
    label, table = candidates(200, 4)
    with pytest.raises(UsageError, match=message):
        split_examples(label, table, replace(SETTINGS, holdout=(holdout,)))


def test_all_held_out_leaves_nothing():
    """And that is said."""
    label, table = candidates(200, 4)
    with pytest.raises(UsageError, match="nothing is left to learn from"):
        split_examples(label, table, replace(SETTINGS, holdout=("survey=A", "survey=B")))


def test_what_a_base_has_seen_is_not_measured_on(tmp_path, monkeypatch):
    """With another seed and more labels, what it has learnt from stays learnt from; the test part is of the rest."""
    label, table = candidates(3000, 3)
    table["id"] = [f"c{k}" for k in range(3000)]
    first = split_examples(label[:2000], table[:2000], SETTINGS)
    learnt = np.concatenate([first.rows("train"), first.rows("valid")])
    monkeypatch.setattr("batchproc.training.seen.find_model", Path)
    write_seen(tmp_path, table.iloc[learnt])
    moved = table.assign(dec=table["dec"] + 1 / 3600, id="")  # measured anew, an arcsecond off
    moved.loc[learnt[:50], ["ra", "dec"]] = np.nan
    moved.loc[learnt[:50], "id"] = table["id"].iloc[learnt[:50]]
    seen = seen_by(str(tmp_path), moved, SETTINGS.same_arcsec)
    assert seen[learnt].all()
    again = replace(SETTINGS, seed=7, base=str(tmp_path))
    assert np.isin(learnt, split_examples(label, moved, again).rows("test")).any()  # as it would be without
    found = split_examples(label, moved, again, seen=seen)
    assert not np.isin(found.group[found.rows("test")], found.group[seen]).any()
    fresh = ~np.isin(found.group, found.group[seen])
    assert 300 < fresh.sum() < 1500
    assert len(found.rows("test")) == pytest.approx(min(0.2 * 3000, 0.8 * fresh.sum()), rel=0.05)
    assert set(found.part) == set(PARTS)
    assert any("none of them is measured on" in note for note in found.notes)
    # Held out, it is left out; and what was all learnt from cannot be measured on.
    held = split_examples(label, moved, replace(again, holdout=("survey=B",)), seen=seen)
    assert set(held.part[seen & (moved["survey"] == "B").to_numpy()]) == {""}
    assert not seen[held.rows("test")].any()
    with pytest.raises(UsageError, match=r"nothing is left to measure on: 3000 of 3000 examples lie where"):
        split_examples(label, moved, again, seen=np.ones(3000, bool))


def test_what_a_base_has_seen_is_handed_on(tmp_path, monkeypatch):
    """From base to base; a folder that does not say is unknown, not unseen."""
    monkeypatch.setattr("batchproc.training.seen.find_model", Path)
    one, other = (pd.DataFrame({"ra": [ra], "dec": [1.0], "id": [f"i{ra}"]}) for ra in (10.0, 20.0))
    for name in ("first", "second", "bare"):
        (tmp_path / name).mkdir()
    write_seen(tmp_path / "first", one)
    write_seen(tmp_path / "second", other, str(tmp_path / "first"))
    both = pd.concat([one, other], ignore_index=True)
    assert seen_by(str(tmp_path / "first"), both, 5.0).tolist() == [True, False]
    assert seen_by(str(tmp_path / "second"), both, 5.0).tolist() == [True, True]
    assert seen_by(str(tmp_path / "bare"), both, 5.0) is None
    assert not seen_by(str(tmp_path / "second"), pd.DataFrame({"x": [1.0, 2.0]}), 5.0).any()


def test_too_few_groups_are_refused_with_their_numbers():
    """One image of one place cannot be divided; smaller cells are the way out."""
    label, table = candidates(50, 5, side_deg=0.001)
    with pytest.raises(UsageError, match=r"real is in 1 group, grouped by sky in cells of 2 arcmin.*smaller cells"):
        split_examples(label, table, SETTINGS)


@pytest.mark.parametrize("n_images", [3, 4, 10])
def test_few_images_are_divided_if_there_is_one_for_each_part(n_images):
    """Each in its own seeing, filter and night: no stratum can be shared out, and yet each part has both classes."""
    label = np.tile(["real", "bogus", "bogus"], 20 * n_images)
    image = np.repeat(np.arange(n_images), 60)
    table = pd.DataFrame({"image_id": image.astype(str), "seeing": 2.0 + image, "mjd": image.astype(float)})
    found = split_examples(label, table.assign(filter=table["image_id"]), replace(SETTINGS, group="image_id"))
    n = {part: len(np.unique(found.group[found.part == part])) for part in PARTS}
    assert min(n.values()) >= 1
    assert n["train"] >= max(n.values())
    assert sum(n.values()) == n_images


def test_few_and_large_groups_are_said():
    """Parts are no finer than groups."""
    label, table = candidates(600, 6)
    table["image"] = np.random.default_rng(0).choice(list("abcdefgh"), 600, p=[0.44] + 7 * [0.08])
    notes = split_examples(label, table, replace(SETTINGS, group="image")).notes
    assert any(note.endswith("the shares of the parts cannot come near those asked for") for note in notes)
    assert any(note.startswith("the part test is of") for note in notes)


def test_without_positions_the_column_group_is_whole():
    """Positions decide where they are known; what has neither is alone."""
    _, table = candidates(100, 7)
    table["group"] = [f"image{k % 5}" for k in range(100)]
    table.loc[:49, ["ra", "dec"]] = np.nan
    table.loc[:9, "group"] = None
    found = group_of(table, SETTINGS)
    assert len(set(found[:10])) == 10
    assert set(found[10:50]) == {f"image{k}" for k in range(5)}
    assert not set(found[50:]) & set(found[:50])
    assert set(group_of(table, replace(SETTINGS, group="none"))) == {f"row {k}" for k in range(100)}
    with pytest.raises(UsageError, match="group = 'tile': no such column"):
        group_of(table, replace(SETTINGS, group="tile"))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 360, exclude_max=True), st.floats(-90, 90)), min_size=1, max_size=40))
def test_cells_of_the_whole_sky(places):
    """Poles and the meridian included, a cell is no larger than twice its side across."""
    ra, dec = np.array(places).T
    cell = sky_groups(ra, dec, cell_arcmin=60.0, same_arcsec=1.0)
    table = pd.DataFrame({"ra": ra, "dec": dec})
    for name in np.unique(cell):
        rows = np.flatnonzero(cell == name)
        assert separation_arcsec(table, rows, rows).max() <= 2 * 3600 + 2 * len(rows)


def test_the_border_of_a_cell_divides_no_one_thing():
    """Two detections of a star on either side of it go together, and so does a chain of them."""
    dec = 10 + 2 / 60 * 3 + np.array([-6, -2, 2, 6, 60]) / 3600
    cell = sky_groups(np.full(5, 30.0), dec, cell_arcmin=2.0, same_arcsec=5.0)
    assert len(set(cell[:4])) == 1
    far = sky_groups(np.full(5, 30.0), dec, cell_arcmin=2.0, same_arcsec=3.0)
    assert far[1] != far[2] or far[0] != far[1]


def test_parts_keep_their_distance():
    """As far as asked, for the sake of what is measured on: nothing of the test part is given up for it."""
    label, table = candidates(3000, 8)
    table.loc[:9, "ra"] = np.nan
    plain = split_examples(label, table, SETTINGS)
    found = split_examples(label, table, replace(SETTINGS, apart_arcsec=30.0))
    nearest = {}
    for split in (plain, found):
        rows = {part: split.rows(part)[split.rows(part) > 9] for part in PARTS}
        for one, other in (("train", "test"), ("valid", "test"), ("train", "valid")):
            nearest.setdefault((one, other), []).append(separation_arcsec(table, rows[one], rows[other]).min())
    assert all(before < 30 < after for before, after in nearest.values())
    np.testing.assert_array_equal(found.rows("test"), plain.rows("test"))
    left_out = (found.part == "").sum()
    assert 0 < left_out < 1000
    assert f"{left_out} examples within 30″ of another part were left out" in found.notes
