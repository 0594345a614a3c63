"""Retrospective search: what is left out is not learnt from, and is ranked among what was not learnt from either."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from batchproc import cli
from batchproc.errors import UsageError
from batchproc.judging.measures import Plan
from batchproc.judging.ranking import Scored, rank
from batchproc.judging.searches import write_searches
from batchproc.training import retrospective as module
from batchproc.training.examples import Examples
from batchproc.training.retrospective import left_out_rows, retrospective
from batchproc.training.settings import TrainSettings
from batchproc.training.splits import split_examples

pytest.importorskip("sklearn")
pytest.importorskip("skl2onnx")

QUICK = Plan(resamples=30)
SETTINGS = TrainSettings(kind="forest", trees=12, resamples=10, features=("a", "b", "c"), group="group")


def examples(n=900, seed=0, several=False):
    """Bogus around 0; two kinds of real ones, in other directions; odd ones that look like bogus."""
    random = np.random.default_rng(seed)
    kind = random.choice(["", "up", "side", "odd"], n, p=[0.6, 0.2, 0.15, 0.05])
    table = pd.DataFrame(random.normal(0, 1, (n, 3)), columns=["a", "b", "c"])
    table["a"] += np.where(kind == "up", 6, 0)
    table["b"] += np.where(kind == "side", 6, 0)
    table["id"] = [f"c{k}" for k in range(n)]
    table["kind"], table["group"] = kind, [f"field {k % 40}" for k in range(n)]
    label = np.where(kind == "", "bogus", kind if several else "real")
    return Examples(np.zeros((n, 3, 0, 0), np.float32), label.astype(np.str_), table)


# --- Ranks ------------------------------------------------------------------------------------------------------------


def test_ranks_are_places_among_the_test_part():
    """By hand: two of four bogus ones are ahead of 0.5; what has no score comes last."""
    scored = Scored(np.array([0.9, 0.5, np.nan]), np.array([0.8, 0.6, 0.55]), np.array([0.1, 0.5, 0.7, 0.2]))
    found = rank(scored, Plan(resamples=20, completeness=0.6))
    assert found.threshold == 0.6
    assert found.place.tolist() == [1, 6, 8]  # each in a list of its own: others that were left out are not in it
    assert found.n_list == 8
    assert [one.value for one in found.ahead] == [0.0, 0.5, 1.0]
    assert found.above.tolist() == [True, False, False]
    assert found.values["rank_1_to_100"].value == 1 + 100 * 0.5
    assert found.values["above_threshold"].value == pytest.approx(1 / 3)
    assert found.values["ordinary_above_threshold"].value == pytest.approx(2 / 3)
    # None of four ahead: up to 60 % may be, at 95 %.
    assert found.ahead[0].high == pytest.approx(1 - 0.025 ** (1 / 4))


def test_ranks_have_intervals_around_them():
    """Narrower for more of them, and wider where whole groups are drawn, each of which stands together."""
    random = np.random.default_rng(0)
    ordinary, bogus = random.normal(3, 1, 100), random.normal(0, 1, 5000)
    fields = [np.arange(k) % 10 for k in (2000, 100, 5000)]
    together = tuple(field.astype(str) for field in fields)
    widths = []
    for n, groups in ((20, None), (2000, None), (2000, together)):
        left_out = random.normal(1, 1, n) + fields[0][:n] / 5
        found = rank(Scored(left_out, ordinary, bogus, groups), Plan(resamples=100)).values["median_ahead"]
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 3
    assert widths[2] > 1.5 * widths[1]


@pytest.mark.parametrize(("left_out", "bogus"), [([], [0.5]), ([0.5], [])])
def test_nothing_to_rank_is_an_error(left_out, bogus):
    """Or nothing to rank it among."""
    with pytest.raises(ValueError, match="both are needed"):
        rank(Scored(np.array(left_out), np.array([0.5]), np.array(bogus)), QUICK)


# --- What is left out -------------------------------------------------------------------------------------------------


def test_a_column_alone_is_each_of_its_values_in_turn():
    """Of those that are not bogus."""
    found = left_out_rows(examples(), "kind")
    assert [name for name, _ in found] == ["kind=odd", "kind=side", "kind=up"]
    assert all((examples().table["kind"][rows] == name.split("=")[1]).all() for name, rows in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nix=1", "no column 'nix'; found a, b, c, id, kind, group, label"),
        ("kind=nix", "no example has that; kind is one of: , odd, side, up"),
        ("id", "values are as many trainings; name some: --leave-out id=c0"),
        ("label=real", "only bogus is left to learn from"),
        ("kind=", "all of it is bogus"),
    ],
)
def test_what_cannot_be_left_out_is_said_before_anything_is_trained(text, message, tmp_path, monkeypatch):
    """With what there is."""
    monkeypatch.setattr(module, "train_model", None)
    made = examples()
    made.label[made.table["kind"] == "odd"] = "bogus"
    with pytest.raises(UsageError, match=message):
        list(retrospective(made, tmp_path, SETTINGS, [text], QUICK))
    assert not list(tmp_path.iterdir())


def test_a_later_search_that_cannot_be_trained_for_is_said_before_the_first(tmp_path, monkeypatch):
    """What it leaves of a class is in too few groups for the parts."""
    monkeypatch.setattr(module, "train_model", None)
    made = examples(several=True)
    odd = np.flatnonzero(made.label == "odd")
    made.label[odd[3:]] = "side"  # one left for each part
    part = split_examples(made.label, made.table, SETTINGS).part
    learnt = made.table["id"][odd[:3][part[odd[:3]] == "train"][0]]
    with pytest.raises(UsageError, match=f"--leave-out id={learnt}: the part .* has no odd: odd is in 2 groups"):
        list(retrospective(made, tmp_path, SETTINGS, ["kind=up", f"id={learnt}"], QUICK))
    assert not list(tmp_path.iterdir())


# --- Searches ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searches(tmp_path_factory):
    """Each kind left out in turn, and written."""
    out = tmp_path_factory.mktemp("search")
    found = list(retrospective(examples(), out, SETTINGS, ["kind"], QUICK, quiet=True))
    return {one.name: one for one in found}, write_searches(found, out, QUICK), out


def test_none_of_what_is_left_out_is_learnt_from(searches):
    """Nor of what is measured on; and all of it is ranked."""
    made = examples()
    for name, one in searches[0].items():
        kind = name.removeprefix("kind=")
        n = int((made.table["kind"] == kind).sum())
        assert len(one.table) == len(one.ranking.scored.left_out) == n
        test = len(one.ranking.scored.ordinary) + len(one.ranking.scored.bogus)
        in_test = len(one.known.scored.left_out)
        assert sum(one.n_learnt.values()) + test + n - in_test + in_test <= len(made)
        assert one.n_learnt["real"] <= int(((made.label == "real") & (made.table["kind"] != kind)).sum())
        split = pd.read_parquet(one.model_folder.parent / "split.parquet")
        assert not set(split["id"]) & set(one.table["id"])


def test_a_kind_that_is_like_bogus_ranks_low_and_what_is_known_ranks_higher(searches):
    """`up` is recognised once others of it were learnt from; `odd` never is."""
    found = searches[0]
    up, odd = found["kind=up"], found["kind=odd"]
    assert up.known.values["auc_roc"].value > 0.95
    assert up.known.values["auc_roc"].value > up.ranking.values["auc_roc"].value
    assert 0.3 < odd.ranking.values["auc_roc"].value < 0.75
    assert odd.ranking.values["rank_1_to_10000"].value > 1000
    assert odd.ranking.values["ordinary_auc_roc"].low > 0.9
    assert {one.score for one in found.values()} == {"P(real)"}


def test_the_table_holds_a_row_for_each_that_was_left_out(searches):
    """As the picture and the JSON are made of."""
    found, written, out = searches
    ranks = pd.read_parquet(out / "ranks.parquet")
    assert len(ranks) == sum(len(one.table) for one in found.values())
    assert set(ranks["left_out"]) == set(found)
    assert (ranks["bogus_ahead_low"] <= ranks["bogus_ahead"]).all()
    assert (ranks["bogus_ahead"] <= ranks["bogus_ahead_high"]).all()
    assert ranks["place"].between(1, ranks["of"]).all()
    document = json.loads((out / "retrospective.json").read_text(), parse_constant=pytest.fail)
    assert document["searches"]["kind=odd"]["never_seen"]["left_out"] == len(found["kind=odd"].table)
    assert (out / "retrospective.png").read_bytes().startswith(b"\x89PNG")
    text = written.text()
    assert "kind=odd, never seen" in text
    assert "others of it known" in text
    assert "reached by extrapolation" in text


def test_an_event_is_left_out_with_what_lies_at_its_place(tmp_path):
    """It has a row of its own, with its place in the list; what lies within arcseconds is not learnt from either."""
    made = examples()
    ra = np.linspace(10, 20, len(made))
    event = int(np.flatnonzero(made.table["kind"] == "up")[0])
    again = event + 7
    ra[again] = ra[event] + 1 / 3600
    made = Examples(made.stamps, made.label, made.table.assign(ra=ra, dec=0.0))
    found = list(retrospective(made, tmp_path, SETTINGS, [f"id=c{event}"], QUICK, control=False, quiet=True))
    (one,) = found
    assert one.n_beside == 1
    assert one.known is None
    split = pd.read_parquet(one.model_folder.parent / "split.parquet")
    assert not {f"c{event}", f"c{again}"} & set(split["id"][split["part"] != "test"])
    text = write_searches(found, tmp_path, QUICK).text()
    assert f"{one.table['place'][0]} of {one.ranking.n_list}" in text
    assert one.table["place"][0] < one.ranking.n_list / 3  # most others of its kind were learnt from


@pytest.mark.parametrize("group", ["object", "sky"])
def test_other_epochs_of_an_object_are_not_learnt_from(group):
    """Which its group tells, also where one epoch is bogus; but not what merely lies in the same field."""
    made = examples()
    real = np.flatnonzero(made.label == "real")
    names = np.array([f"bogus {k}" for k in range(len(made))], object)
    names[real] = [f"object {k // 4}" for k in range(len(real))]
    made.label[real[1]] = "bogus"
    table = made.table.assign(**{"group" if group == "sky" else group: names})
    rows = np.arange(len(made)) == real[0]
    settings = replace(SETTINGS, group=group)
    beside = module._beside(Examples(made.stamps, made.label, table), rows, settings)
    assert np.flatnonzero(beside).tolist() == real[1:4].tolist()
    placed = table.assign(ra=np.linspace(10, 20, len(made)), dec=0.0)
    beside = module._beside(Examples(made.stamps, made.label, placed), rows, settings)
    assert beside.sum() == (0 if group == "sky" else 3)
    assert not module._beside(made, rows, SETTINGS).any()


def test_of_several_classes_it_is_its_own_or_else_not_being_bogus_that_counts(tmp_path):
    """A class that no model knows cannot be asked for."""
    made = examples(several=True)
    event = made.table["id"][np.flatnonzero(made.label == "side")[0]]
    found = list(retrospective(made, tmp_path, SETTINGS, ["label=up", f"id={event}"], QUICK, control=False, quiet=True))
    assert [one.score for one in found] == ["1 - P(bogus)", "P(side)"]
    assert "up" not in found[0].n_learnt
    without_bogus = made[np.flatnonzero(made.label != "bogus")]
    (one,) = retrospective(without_bogus, tmp_path, SETTINGS, ["label=up"], QUICK, control=False, quiet=True)
    assert one.score == "1 - P(most likely class)"


def test_from_the_command_line(tmp_path, capsys):
    """A stored set of examples; the same numbers again."""
    made = examples(600)
    path = tmp_path / "set.npz"
    Examples(np.zeros((len(made), 3, 1, 1), np.float32), made.label, made.table).save(path)
    (tmp_path / "settings.toml").write_text(replace(SETTINGS, seed=0).to_toml())
    words = ["evaluate", "retrospective", str(path), "--leave-out", "kind=odd", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*words, "--settings", str(tmp_path / "settings.toml"), "--resamples", "20", "--no-control", "-q"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 0, err
    assert "kind=odd, never seen" in out
    assert "others of it known" not in out
    with pytest.raises(SystemExit) as exit_:
        cli.main([*words[:4], "kind=nix", *words[5:], "--settings", str(tmp_path / "settings.toml")])
    assert exit_.value.code == 2
    assert "no example has that" in capsys.readouterr().err


@pytest.mark.train
def test_networks_are_searched_with_as_well(tmp_path):
    """Stamps in place of columns; one epoch tells a bright middle from noise."""
    pytest.importorskip("torch")
    made = examples(500)
    stamps = np.random.default_rng(1).normal(0, 1, (500, 3, 31, 31)).astype(np.float32)
    stamps[made.label == "real", ::2, 14:17, 14:17] += 20
    made = Examples(stamps, made.label, made.table)
    wanted = replace(SETTINGS, kind="network", features=(), epochs=2)
    (one,) = retrospective(made, tmp_path, wanted, ["kind=up"], QUICK, control=False, quiet=True)
    assert one.ranking.values["auc_roc"].value > 0.9
