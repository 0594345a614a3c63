"""`evaluate classifier` of several classes, and what models cost."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

from batchproc import cli
from batchproc.errors import UsageError
from batchproc.io.catalogue import write_scores
from batchproc.io.cost import Cost
from batchproc.io.run_folder import RunFolder
from batchproc.judging import judge
from batchproc.judging.beside import costs_on_run
from batchproc.judging.evaluate_classes import evaluate_classes
from batchproc.judging.judge import evaluate_scores
from batchproc.judging.measures import Plan
from batchproc.judging.typed import read_typed
from tests.test_report import make_run

QUICK = Plan(resamples=30)
CLASSES = ("AGN", "SN", "bogus")


def candidates(n=600, seed=0):
    """A table as a user would bring it, of two models."""
    random = np.random.default_rng(seed)
    truth = random.choice(3, n, p=[0.2, 0.1, 0.7])
    table = pd.DataFrame({"label": np.array(CLASSES)[truth], "region": np.arange(n) % 25, "ccd": np.arange(n) % 3})
    for model, skill in (("good", 3.0), ("poor", 1.0)):
        logits = random.normal(0, 1, (n, 3)) + skill * np.eye(3)[truth]
        probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        table[[f"score_{model}_{name}" for name in CLASSES]] = probability
    return table


@pytest.fixture
def call(capsys):
    """Run a command line; returns its exit code, standard output and standard error."""

    def call(*words):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(word) for word in words])
        return exit_.value.code, *capsys.readouterr()

    return call


def test_a_table_with_classes_is_judged_by_them(tmp_path, call):
    """Confusion, macro F1 and each class against all others: what scikit-learn says, with intervals around it."""
    table = candidates()
    table.to_csv(tmp_path / "scores.csv", index=False)
    code, out, _ = call("evaluate", "classifier", tmp_path / "scores.csv", "--out", tmp_path / "out", "--resamples", 30)
    assert code == 0
    assert "25 groups (region)" in out
    assert "always the commonest" in out
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["scores"]["good"]
    scores = table[[f"score_good_{name}" for name in CLASSES]].to_numpy()
    answer = np.array(CLASSES)[scores.argmax(axis=1)]
    assert found["confusion"] == metrics.confusion_matrix(table["label"], answer, labels=CLASSES).tolist()
    macro = metrics.f1_score(table["label"], answer, average="macro")
    assert found["macro_f1 sample"]["value"] == pytest.approx(macro)
    assert found["macro_f1 sample"]["low"] < macro < found["macro_f1 sample"]["high"]
    theirs = metrics.precision_recall_fscore_support(table["label"], answer, labels=CLASSES)
    for k, name in enumerate(CLASSES):
        of_class = found["classes"][name]
        here = table["label"] == name
        assert of_class["precision sample"]["value"] == pytest.approx(theirs[0][k])
        assert of_class["recall"]["value"] == pytest.approx(theirs[1][k])
        assert of_class["recall"]["low"] <= of_class["recall"]["value"] <= of_class["recall"]["high"]
        weight = np.where(here, 1 / here.sum(), 1 / (~here).sum())
        area = metrics.average_precision_score(here, scores[:, k], sample_weight=weight)
        assert of_class["auc_pr 1:1"]["value"] == pytest.approx(area)
        assert of_class["auc_roc"]["value"] == pytest.approx(metrics.roc_auc_score(here, scores[:, k]))
    assert (tmp_path / "out" / "classifier.png").read_bytes().startswith(b"\x89PNG")


def test_the_better_model_is_better_in_any_order_of_columns(tmp_path):
    """Columns are found by their names."""
    table = candidates()
    table[["region", "ccd", "label", *reversed([c for c in table if c.startswith("score")])]].to_csv(
        tmp_path / "scores.csv", index=False
    )
    typed = read_typed(tmp_path / "scores.csv", models=["good", "poor"])
    found = evaluate_classes(typed, tmp_path / "out", QUICK).judgements
    assert [one.name for one in found] == ["good", "poor"]
    assert found[0].values["macro_f1 even"].low > found[1].values["macro_f1 even"].high


def test_parts_hold_every_candidate_once(tmp_path):
    """As of real and bogus."""
    candidates().to_csv(tmp_path / "scores.csv", index=False)
    found = evaluate_classes(read_typed(tmp_path / "scores.csv"), tmp_path / "out", QUICK).judgements[0]
    assert [(part.column, part.name) for part in found.parts] == [("ccd", "0"), ("ccd", "1"), ("ccd", "2")]
    assert sum(part.n for part in found.parts) == 600
    right = sum(part.values["accuracy"].value * part.n for part in found.parts)
    assert right / 600 == pytest.approx(found.values["accuracy sample"].value)


def test_what_is_not_scored_or_not_known_is_said(tmp_path):
    """Rows without a score are in no number; classes that a model does not know are errors of it; so it is told."""
    table = candidates()
    table.loc[:9, "score_good_SN"] = np.nan
    table.loc[10:29, "label"] = "asteroid"
    table.loc[30:34, "label"] = None
    table.to_csv(tmp_path / "scores.csv", index=False)
    found = evaluate_scores(tmp_path / "scores.csv", tmp_path / "out", QUICK)
    one = found.judgements[0]
    assert (one.lost.sum(), one.n.sum()) == (10, 585)
    assert one.classes == ("AGN", "SN", "asteroid", "bogus")
    assert one.by_class["asteroid"]["recall"].value == 0
    assert np.isnan(one.by_class["asteroid"]["auc_pr 1:1"].value)
    text = found.text()
    assert "good has no class asteroid: the 20 candidates of it cannot be right" in text
    assert "5 candidates without a class were left out" in text
    assert "good: not scored, and in no number: " in text
    assert "few of asteroid (20)" in text
    json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_a_name_within_a_name_is_not_mistaken_for_it(tmp_path):
    """Of the models a and a_b, and the classes SN and Ia SN."""
    table = candidates().assign(label=lambda t: t["label"].replace({"AGN": "Ia SN"}))
    table.columns = [
        c.replace("AGN", "Ia SN").replace("score_good_", "score_a_").replace("score_poor_", "score_a_b_") for c in table
    ]
    table.to_csv(tmp_path / "scores.csv", index=False)
    found = evaluate_classes(read_typed(tmp_path / "scores.csv"), tmp_path / "out", QUICK).judgements
    assert {one.name: one.classes for one in found} == dict.fromkeys(("a", "a_b"), ("Ia SN", "SN", "bogus"))
    n = found[0].to_dict()["classes"]
    assert n["SN"]["recall"] != n["Ia SN"]["recall"]


@pytest.mark.parametrize("name", ["good_", ""])
def test_answers_of_a_class_that_no_candidate_has_are_wrong(tmp_path, name):
    """With or without the name of a model, and where that class ends in the name of another."""
    table = pd.DataFrame({"label": ["SN", "bogus"] * 20, "region": np.arange(40) % 5})
    table[[f"score_{name}{one}" for one in ("Ia_SN", "SN", "bogus")]] = [[0.8, 0.15, 0.05], [0.8, 0.05, 0.15]] * 20
    table.to_csv(tmp_path / "scores.csv", index=False)
    typed = read_typed(tmp_path / "scores.csv")
    assert typed.knows == {name.rstrip("_") or "score": ("Ia_SN", "SN", "bogus")}
    assert typed.notes == (f"{name.rstrip('_') or 'score'} has classes of which there is no candidate: Ia_SN",)
    (found,) = evaluate_classes(typed, tmp_path / "out", QUICK).judgements
    assert found.values["accuracy sample"].value == 0


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({}, ("--truth", "x.csv"), "--truth is for a run folder"),
        ({}, ("--label", "nix"), "no column nix; name that of the classes with --label"),
        ({}, ("--score", "nix"), "no model nix with several classes (there is: good, poor)"),
        ({}, ("--group", "nix"), "no column 'nix'"),
        ({"label": "SN"}, (), "all 600 candidates are SN"),
        ({"region": 1}, (), "all candidates are of one region"),
        ({"score_good_SN": np.nan}, (), "good: 0 of 600 candidates scored"),
        ({"score_good_SN": "high"}, (), "expected scores"),
    ],
)
def test_usage_errors_are_exit_code_2(change, words, message, tmp_path, call):
    """In a line that says what to do; no numbers are written."""
    candidates().assign(**change).to_csv(tmp_path / "scores.csv", index=False)
    code, _, err = call("evaluate", "classifier", tmp_path / "scores.csv", "--out", tmp_path / "out", *words)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.fixture
def run(tmp_path):
    """A run scored by a model of three classes, whose known transients have a kind."""
    catalogue = make_run(tmp_path / "run", candidates=(40, 40))
    known = catalogue.groupby("image_id").head(12)[["image_id", "x", "y", "flux"]].assign(snr=9.0)
    known["kind"] = np.resize(["SN", "AGN", "SN"], len(known))
    known.to_csv(tmp_path / "truth.csv", index=False)
    path = RunFolder(tmp_path / "run")
    images, names = (catalogue[name].to_numpy(object) for name in ("image_id", "candidate_id"))
    (path.scores / "types").mkdir(parents=True)
    about = SimpleNamespace(name="types", version="1", hash="a", fingerprint="a", normalisation="none", classes=CLASSES)
    scores = np.random.default_rng(0).dirichlet(np.ones(3), len(names)).astype(np.float32)
    write_scores(path.scores / "types" / "0.parquet", images, names, scores, about)
    return tmp_path / "run", tmp_path / "truth.csv"


def test_a_run_is_judged_by_the_kinds_of_its_transients(run):
    """What is none of them is bogus."""
    folder, truth = run
    typed = read_typed(folder, truth=truth, label="kind")
    assert typed.classes == CLASSES
    assert typed.knows == {"types": CLASSES}
    n = dict(zip(CLASSES, np.bincount(typed.truth), strict=True))
    assert (n["SN"], n["AGN"]) == (16, 8)
    assert n["bogus"] > 50
    with pytest.raises(UsageError, match="no column label"):
        read_typed(folder, truth=truth)


def test_costs_stand_beside_the_metrics(run, tmp_path, monkeypatch):
    """In the table and in the JSON, for the models that were measured."""
    folder, truth = run
    cost = Cost(1234.4, 17.2, 80, 256, "float", "CPUExecutionProvider")
    monkeypatch.setattr(judge, "costs_on_run", lambda run, models: ({"types": cost}, [f"measured {models}"]))
    found = evaluate_scores(folder, tmp_path / "out", QUICK, truth=truth, label="kind")
    lines = [line.split() for line in found.text().splitlines()]
    assert ["stamps", "per", "CPU-second", "1", "thread", "1,234"] in lines
    assert ["peak", "memory", "of", "the", "model", "1", "thread", "17", "MB"] in lines
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())["scores"]["types"]["cost"]
    assert written["stamps_per_second"] == 1234.4
    without = evaluate_scores(folder, tmp_path / "out", QUICK, truth=truth, label="kind", with_cost=False)
    assert "CPU-second" not in without.text()


def test_what_has_changed_since_it_scored_is_not_measured(run):
    """Nor what is not to be found: it is said, and the evaluation goes on."""
    costs, notes = costs_on_run(run[0], {"types": "a" * 64, "realbogus": "b" * 64})
    assert not costs
    assert "types: speed and memory are not measured: no model 'types'" in notes[0]
    assert "realbogus: speed and memory are not measured: the model of this name has changed" in notes[1]
