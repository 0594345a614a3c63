"""`evaluate classifier`: from a table or a run to numbers that say what they hold for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from batchproc import cli
from batchproc.errors import UsageError
from batchproc.io.catalogue import write_scores
from batchproc.io.run_folder import RunFolder
from batchproc.judging.candidates import read_candidates
from batchproc.judging.evaluate import evaluate_candidates
from batchproc.judging.measures import MIXTURES, Plan, split_column
from batchproc.learning.evaluate import auc_pr, brier, recall
from tests.test_report import make_run

QUICK = Plan(resamples=30)


def candidates(n=600, seed=0):
    """A table as a user would bring it."""
    random = np.random.default_rng(seed)
    real = random.uniform(size=n) < 0.3
    region = np.arange(n) % 12
    return pd.DataFrame(
        {
            "real": real.astype(int),
            "score_good": 1 / (1 + np.exp(-3 * random.normal(np.where(real, 1.5, -1.5)))),
            "score_poor": random.uniform(size=n),
            "region": region,
            "ccd": region % 3,
            "filter": np.array(["g", "r"])[region % 2],
            "seeing": random.uniform(1, 3, n),
            "mag": np.where(random.uniform(size=n) < 0.1, np.nan, random.uniform(18, 22, n)),
        }
    )


@pytest.fixture
def call(capsys):
    """Run a command line; returns its exit code, standard output and standard error."""

    def call(*words):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(word) for word in words])
        return exit_.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_becomes_numbers_and_a_picture(kind, tmp_path, call):
    """Each number is what the numerics say, is in the JSON, and stands in the table with its mixture."""
    table = candidates()
    path = tmp_path / f"scores.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    code, out, _ = call("evaluate", "classifier", path, "--out", tmp_path / "out", "--resamples", 20)
    assert code == 0
    assert out.splitlines()[1].startswith("AUC-PR")
    for mixture in MIXTURES:
        assert f" {mixture} " in out
    assert "12 groups (region)" in out
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["scores"]
    real, scores = table["real"] == 1, table["score_good"]
    metrics = found["good"]["metrics"]
    for mixture, share in MIXTURES.items():
        assert metrics["auc_pr"][mixture]["value"] == pytest.approx(auc_pr(real, scores, prevalence=share))
        assert metrics["brier"][mixture]["value"] == pytest.approx(brier(real, scores, prevalence=share))
    threshold = found["good"]["threshold"]["value"]
    assert metrics["recall"]["value"] == pytest.approx(recall(real, scores, threshold))
    assert metrics["recall"]["value"] >= 0.99 > metrics["bogus_removed"]["value"]
    assert metrics["auc_pr"]["1:1"]["low"] < metrics["auc_pr"]["1:1"]["value"] < metrics["auc_pr"]["1:1"]["high"]
    assert metrics["accuracy"]["always_the_commoner"] == pytest.approx(1 - real.mean())
    assert (tmp_path / "out" / "classifier.png").read_bytes().startswith(b"\x89PNG")


def test_parts_hold_every_candidate_once(tmp_path):
    """Names and quantiles; what has no value is a part of its own; the same threshold in all."""
    candidates().to_csv(tmp_path / "scores.csv", index=False)
    found = evaluate_candidates(read_candidates(tmp_path / "scores.csv"), tmp_path / "out", QUICK).judgements[0]
    by = {}
    for part in found.parts:
        by.setdefault(part.column, []).append(part)
    assert {column: len(parts) for column, parts in by.items()} == {"ccd": 3, "filter": 2, "seeing": 4, "mag": 5}
    assert by["mag"][-1].name == "no value"
    for parts in by.values():
        assert (sum(p.n_real for p in parts), sum(p.n_bogus for p in parts)) == (found.n_real, found.n_bogus)
        lost = sum(p.values["false_negative_rate"].value * p.n_real for p in parts)
        assert lost == pytest.approx(found.values["false_negative_rate"].value * found.n_real)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([3, 1, 1, 3], ["1", "3"]),
        ([1.5, 1.5, 1.5, 1.5], ["1.5"]),
        ([0.5, 1.5, 2.5, 3.5], ["0.5 to 2", "2 to 3.5"]),
        (
            [60676.1003, 60676.1013, 60676.1023, np.inf],
            ["60676.1 to 60676.101", "60676.101 to 60676.102", "no value"],
        ),
        ([None, None, None, None], ["no value"]),
        (["b", "a", "", "b"], ["a", "b", "no value"]),
        (list(range(20)), ["0 to 9.5", "9.5 to 19"]),
    ],
)
def test_columns_are_cut_into_parts(values, names):
    """Whole numbers that are few, and words, by value; other numbers by quantiles; each row in one part."""
    parts = split_column(pd.Series(values, name="a"), 2)
    assert sorted(np.concatenate([rows for _, rows in parts])) == list(range(len(values)))
    assert [name for name, _ in parts] == names


def test_every_ccd_is_in_the_numbers_and_the_worst_in_the_table(tmp_path):
    """Of a camera with forty, the one whose candidates are told at random is not among "others"."""
    random = np.random.default_rng(1)
    table = candidates(8000).assign(ccd=lambda t: random.integers(1, 41, len(t)))
    broken = table["ccd"] == 33
    table.loc[broken, "score_good"] = random.uniform(size=broken.sum())
    table.to_csv(tmp_path / "scores.csv", index=False)
    read = read_candidates(tmp_path / "scores.csv", scores=["score_good"], by=["ccd"])
    found = evaluate_candidates(read, tmp_path / "out", QUICK)
    (numbers,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["scores"].values()
    assert sorted(int(part["name"]) for part in numbers["parts"]) == list(range(1, 41))
    told = [line.split()[1] for line in found.text().splitlines() if line.startswith("ccd ")]
    assert len(told) == 12
    assert "33" in told
    assert "ccd: 28 more, none with a lower AUC-PR; all are in metrics.json" in found.text()


def test_what_was_not_scored_is_said_and_counted_as_lost(tmp_path):
    """It is in no metric, and a real one without a score is a lost one."""
    table = candidates()
    gone = table.index[table["real"] == 1][:20]
    table.loc[gone, "score_good"] = np.nan
    table.to_csv(tmp_path / "scores.csv", index=False)
    found = evaluate_candidates(read_candidates(tmp_path / "scores.csv"), tmp_path / "out", QUICK)
    good = found.judgements[0]
    assert (good.lost_real, good.lost_bogus) == (20, 0)
    assert good.total_loss > 20 / (table["real"].sum())
    assert "good: the 20 not scored" in found.text()
    assert "not the same candidates" in found.text()


def test_logits_have_areas_and_no_calibration(tmp_path):
    """Said, and absent from the JSON."""
    table = candidates()[["real", "score_good"]].assign(score_good=lambda t: 20 * t["score_good"] - 10)
    table.to_csv(tmp_path / "scores.csv", index=False)
    found = evaluate_candidates(read_candidates(tmp_path / "scores.csv"), tmp_path / "out", QUICK)
    assert "no probabilities" in found.text()
    assert "brier" not in found.to_dict()["scores"]["good"]["metrics"]
    assert "resamples of single candidates" in found.text()


def test_a_part_of_one_class_or_one_group_has_no_false_interval(tmp_path):
    """No area without both classes, no interval from a single region; the rest has numbers all the same."""
    table = candidates().assign(ccd=lambda t: np.where(t["region"] == 0, "a", np.where(t["real"] == 1, "b", "c")))
    table.to_csv(tmp_path / "scores.csv", index=False)
    read = read_candidates(tmp_path / "scores.csv", scores=["score_good"], by=["ccd"])
    one, real, bogus = evaluate_candidates(read, tmp_path / "out", QUICK).judgements[0].parts
    assert (one.n_groups, one.values["auc_pr 1:1"].value > 0.9, np.isnan(one.values["auc_pr 1:1"].low)) == (
        1,
        True,
        True,
    )
    assert np.isnan(real.values["auc_pr 1:1"].value)
    assert real.values["false_negative_rate"].value < 0.02
    assert np.isnan(bogus.values["false_negative_rate"].value)
    # What needs the other class has no value; a rate of one class has its interval all the same.
    for part, key in ((real, "false_negative_rate"), (bogus, "bogus_removed")):
        rate = part.values[key]
        assert rate.low <= rate.value <= rate.high
        assert 0 < rate.high - rate.low < 0.2
    json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture
def run(tmp_path):
    """A run scored by one model, whose known transients are its first candidates."""
    catalogue = make_run(tmp_path / "run", candidates=(30, 30, 5), scores=True)
    known = catalogue[catalogue["image_id"] != "im2"].groupby("image_id").head(10)
    known = known[["image_id", "x", "y", "flux"]].assign(snr=9.0)
    known.loc[known.index[0], "flux"] *= -1  # the candidate there has the other sign
    known = pd.concat([known, pd.DataFrame({"image_id": ["im0"], "x": [-500.0], "y": 0.0, "flux": 1.0, "snr": 9.0})])
    known.to_csv(tmp_path / "truth.csv", index=False)
    return tmp_path / "run", tmp_path / "truth.csv"


def test_a_run_is_matched_with_its_truth(run, tmp_path, call):
    """As the report does; doubtful ones, and images without truth, are left out and said."""
    folder, truth = run
    found = read_candidates(folder, truth=truth)
    assert list(found.scores) == ["realbogus"]
    assert found.group_name == "image_id"
    assert found.real.sum() == 19
    assert 57 <= len(found.real) <= 59  # chance neighbours of a transient are doubtful too
    code, out, _ = call(
        "evaluate", "classifier", folder, "--truth", truth, "--out", tmp_path / "out", "--resamples", 20
    )
    assert code == 0
    assert "that are not it" in out
    assert "5 candidates of images without a known transient were left out" in out
    assert "2 of 21 known transients are no candidate" in out
    assert "2 groups (image_id)" in out
    assert "2 groups are few" in out


def test_all_models_of_a_run_are_judged(run):
    """Of one with several classes, the class real; one without must be named."""
    folder, truth = run
    path = RunFolder(folder)
    rows = [(f"im{k}", f"im{k}_{i}") for k, n in enumerate((30, 30, 5)) for i in range(n)]
    images, names = (np.array(part, object) for part in zip(*rows, strict=True))
    for model, classes in (("multi", ("real", "bogus")), ("types", ("sn", "agn"))):
        (path.scores / model).mkdir(parents=True)
        about = SimpleNamespace(
            name=model, version="1", hash="a", fingerprint="a", normalisation="none", classes=classes
        )
        values = np.random.default_rng(0).uniform(size=(len(rows), 2)).astype(np.float32)
        write_scores(path.scores / model / "0.parquet", images, names, values, about)
        if model == "multi":
            assert list(read_candidates(folder, truth=truth).scores) == ["multi_real", "realbogus"]
    with pytest.raises(UsageError, match="types has no class 'real'; name a column with --score: score_types_sn"):
        read_candidates(folder, truth=truth)
    assert list(read_candidates(folder, truth=truth, scores=["score_types_sn"]).scores) == ["types_sn"]


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({}, ("--truth", "x.csv"), "--truth is for a run folder"),
        ({}, ("--score", "nix"), "no column 'nix'; found real, score_good"),
        ({}, ("--score", "filter"), "expected scores"),
        ({}, ("--by", "nix"), "no column 'nix'"),
        ({}, ("--group", "nix"), "no column 'nix'"),
        ({}, ("--completeness", "0"), "0<x<=1"),
        ({"real": 1}, (), "600 real and 0 bogus"),
        ({"real": 0.5}, (), "neither 0 nor 1 in 600 of 600 rows"),
        ({"real": "yes"}, (), "such as yes"),
        ({"region": 1}, (), "all candidates are of one region"),
        ({"score_good": np.nan}, (), "good: 0 of 600 candidates scored"),
    ],
)
def test_usage_errors_are_exit_code_2(change, words, message, tmp_path, call):
    """In a line that says what to do; no numbers are written."""
    candidates().assign(**change).to_csv(tmp_path / "scores.csv", index=False)
    code, _, err = call("evaluate", "classifier", tmp_path / "scores.csv", "--out", tmp_path / "out", *words)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_sources_that_are_none(tmp_path, call):
    """No file, no truth, no scores."""
    common = ("--out", tmp_path / "out")
    assert "no such file or run folder" in call("evaluate", "classifier", tmp_path / "absent", *common)[2]
    make_run(tmp_path / "run", candidates=(3,))
    assert "--truth" in call("evaluate", "classifier", tmp_path / "run", *common)[2]
    known = pd.DataFrame({"image_id": ["im0"], "x": [1.0], "y": [1.0], "flux": [1.0], "snr": [1.0]})
    known.to_parquet(tmp_path / "run" / "truth.parquet")
    assert "no model has scored it" in call("evaluate", "classifier", tmp_path / "run", *common)[2]
    pd.DataFrame({"score": [1.0]}).to_csv(tmp_path / "a.csv")
    assert "no column real" in call("evaluate", "classifier", tmp_path / "a.csv", *common)[2]
    pd.DataFrame({"real": [1, 0]}).to_csv(tmp_path / "b.csv")
    assert "name yours with --score" in call("evaluate", "classifier", tmp_path / "b.csv", *common)[2]
