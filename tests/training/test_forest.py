"""The forest: terms of catalogue columns that know no units, and a file that answers as scikit-learn does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchproc.errors import UsageError
from batchproc.io.backends.onnx import OnnxBackend
from batchproc.io.catalogue import open_catalogue
from batchproc.io.models import load_model
from batchproc.job import classify
from batchproc.training.examples import Examples
from batchproc.training.forest import ForestConfig, fit_forest
from batchproc.training.multiclass import measure_classes
from batchproc.training.report import measure
from batchproc.training.settings import TrainSettings
from batchproc.training.splits import split_examples
from batchproc.training.terms import LIMIT, TERMS, columns_of, compute, parse, to_onnx
from batchproc.training.train import train_model
from tests import _runs

pytest.importorskip("sklearn")
pytest.importorskip("skl2onnx")

SMALL = ForestConfig(trees=12, leaves=24, smallest_leaf=3)


def table_of(n=400, seed=0):
    """Made-up catalogue rows, and what they are."""
    random = np.random.default_rng(seed)
    table = pd.DataFrame({name: random.lognormal(0, 1, n) for name in columns_of(TERMS)})
    table["flags"] = random.integers(0, 512, n).astype(np.int32)
    table["scorr"] *= random.choice([-1, 1], n)
    real = table["chi2"] + table["dipole"] + random.normal(0, 0.3, n) < 2
    return table, np.where(real, "real", "bogus")


def run_onnx(data, table, features):
    return OnnxBackend("forest", data, 1, "CPUExecutionProvider").run([table[list(features)].to_numpy(np.float32)])


# --- Terms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["|a", "a|", "a/", "a/b/c", "a&3", "a&0", "a+b", "", "1a"])
def test_what_is_no_term_is_refused(term):
    """With what one looks like."""
    with pytest.raises(UsageError, match=r"expected a catalogue column, \|COLUMN\|"):
        parse(term)


def test_columns_that_are_not_there_are_named():
    """And those that are."""
    with pytest.raises(UsageError, match="no column flux; found chi2"):
        compute(["chi2", "|flux|"], {"chi2": np.zeros(2)})


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 3e38, 1e-40])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(st.tuples(numbers, numbers, st.integers(0, 1023)), min_size=1, max_size=8))
def test_the_file_computes_terms_as_training_does(rows):
    """To the last bit, division by zero and overflow included: always finite numbers within the limit."""
    terms = ["a", "|a|", "a/b", "|b/a|", "c&1", "c&64", "c&512"]
    table = pd.DataFrame(rows, columns=["a", "b", "c"])
    data = to_onnx(terms, columns_of(terms)).SerializeToString()
    found = run_onnx(data, table, columns_of(terms))
    expected = compute(terms, table)
    assert np.isfinite(expected).all()
    assert np.abs(expected).max() <= np.float32(LIMIT)
    # Numbers too small for float32's normal range may become 0 on the way, in one of the two.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-38)
    bits = table["c"].to_numpy()
    assert (expected[:, 4:] == np.stack([bits & 1 > 0, bits & 64 > 0, bits & 512 > 0], axis=1)).all()


@settings(max_examples=20, deadline=None)
@given(power=st.integers(-12, 12), pixels=st.integers(-2, 2), seed=st.integers(0, 9))
def test_no_term_knows_units_pixels_or_signs(power, pixels, seed):
    """Another unit of flux, other pixels, a source that fades: the same terms."""
    table, _ = table_of(30, seed)
    other = table.copy()
    for name in ("flux", "flux_err", "aper_flux", "ref_flux"):
        other[name] *= 2.0**power
    for name in ("fwhm", "fwhm_new", "fwhm_ref", "ref_distance", "ref_fwhm"):
        other[name] *= 2.0**pixels
    for name in ("scorr", "flux", "aper_flux"):
        other[name] *= -1
    np.testing.assert_array_equal(compute(TERMS, other), compute(TERMS, table))


# --- The forest -------------------------------------------------------------------------------------------------------


def test_the_file_answers_as_scikit_learn_does():
    """Within 1e-5, on rows that it has not seen, and "real" alone of real and bogus."""
    table, label = table_of()
    forest = fit_forest(table, label, config=SMALL)
    assert forest.classes == ("real",)
    unseen = table_of(2000, seed=1)[0]
    found = run_onnx(forest.to_onnx(), unseen, forest.features)
    theirs = forest.estimator.predict_proba(compute(TERMS, unseen))
    assert list(forest.estimator.classes_) == ["bogus", "real"]
    np.testing.assert_allclose(found[:, 0], theirs[:, 1], atol=1e-5)
    assert np.std(found) > 0.1


def test_classes_come_in_the_order_asked_for():
    """Not in that of the alphabet, which is scikit-learn's."""
    table, label = table_of()
    label = np.where(table["elongation"] > 1.5, "agn", label)
    forest = fit_forest(table, label, config=SMALL, classes=("real", "agn", "bogus"))
    found = run_onnx(forest.to_onnx(), table, forest.features)
    theirs = forest.estimator.predict_proba(compute(TERMS, table))
    np.testing.assert_allclose(found, theirs[:, [2, 0, 1]], atol=1e-5)
    assert (found[label == "agn"].argmax(axis=1) == 1).mean() > 0.9


def test_the_same_seed_gives_the_same_bytes():
    """And another one others."""
    table, label = table_of()
    data = [fit_forest(table, label, config=replace(SMALL, seed=seed)).to_onnx() for seed in (3, 3, 4)]
    assert data[0] == data[1] != data[2]


def test_rows_that_lack_a_feature_are_not_learnt_from():
    """As if they were not there."""
    table, label = table_of()
    more = pd.concat([table, table.assign(chi2=np.nan)], ignore_index=True)
    forests = [
        fit_forest(table, label, config=SMALL),
        fit_forest(more, np.concatenate([label, label[::-1]]), config=SMALL),
    ]
    np.testing.assert_array_equal(*(forest.predict(table) for forest in forests))
    with pytest.raises(UsageError, match="found nothing among 0 of 400 candidates that have all of scorr"):
        fit_forest(table.assign(chi2=np.inf), label)


def test_classes_are_measured_in_the_order_of_the_scores():
    """Scores that are right are right in any order."""
    label = np.array(["a", "b", "c"] * 5)
    table = measure_classes("toys", label, np.eye(3)[[1, 2, 0] * 5], classes=("c", "a", "b"), resamples=2)
    assert table["macro_f1"] == 1
    assert table["n"] == {"c": 5, "a": 5, "b": 5}


# --- As a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model folder, made by the call that trains every kind."""
    table, label = table_of(600)
    table["group"] = [f"field {k % 20}" for k in range(len(table))]
    examples = Examples(np.zeros((len(table), 3, 1, 1), np.float32), label, table)
    wanted = TrainSettings(kind="forest", name="trees", trees=12, resamples=20)
    return train_model(examples, tmp_path_factory.mktemp("forest") / "out", wanted, quiet=True)


def test_training_makes_a_model_of_features_alone(trained):
    """Its card names the columns, it looks at no stamp, and what lacks a column is not scored."""
    card = trained.card
    assert (card.input.channels, card.input.size, card.classes) == ((), 0, ("real",))
    assert card.input.features == columns_of(TERMS)
    assert card.metrics[0]["auc_pr"] > 0.8
    assert sum(card.training["importance"].values()) == pytest.approx(1, abs=1e-3)
    model = load_model(trained.model_folder)
    table, _ = table_of(50, seed=5)
    table.loc[7, "ref_flux"] = np.nan
    scores = model.predict(None, table[list(card.input.features)])
    assert np.flatnonzero(np.isnan(scores)).tolist() == [7]


@pytest.mark.parametrize("part", ["valid", "test"])
def test_a_part_without_scores_is_said(tmp_path, part):
    """Without a scored real one in valid there is no threshold; in test, nothing to measure."""
    table, label = table_of(300)
    table["group"] = [f"field {k % 20}" for k in range(len(table))]
    wanted = TrainSettings(kind="forest", trees=3, resamples=5)
    rows = split_examples(label, table, wanted).rows(part)
    table.loc[rows[label[rows] == "real"], "chi2"] = np.nan
    examples = Examples(np.zeros((len(table), 3, 1, 1), np.float32), label, table)
    if part == "test":
        found = train_model(examples, tmp_path, wanted, quiet=True)
        assert found.card.metrics == ()
        assert "what has a score in the test part is of one class" in found.text()
        return
    with pytest.raises(UsageError, match=r"the part valid: \d+ of \d+ examples have a score"):
        train_model(examples, tmp_path, wanted, quiet=True)


def test_real_ones_without_a_score_are_lost():
    """The card says completeness of those that have one, and of all."""
    real = np.arange(40) % 2 == 0
    scores = np.where(real, 0.9, 0.1)
    scores[:8] = np.nan
    table = measure("toys", "all", real, scores, threshold=0.5, resamples=10)
    assert (table["completeness"], table["completeness_of_all"]) == (1, 0.8)
    assert table["completeness_of_all_interval"][0] <= 0.8 <= table["completeness_of_all_interval"][1]


def test_a_former_training_stays_whole_until_the_new_one_is(tmp_path, monkeypatch):
    """Trained anew, it may be continued from; what fails leaves it as it was, and the model comes last."""
    table, label = table_of(300)
    table["group"] = [f"field {k % 20}" for k in range(len(table))]
    examples = Examples(np.zeros((len(table), 3, 1, 1), np.float32), label, table)
    out, wanted = tmp_path / "out", TrainSettings(kind="forest", trees=3, resamples=5)
    base = train_model(examples, out, wanted, quiet=True).model_folder

    def read():
        return {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}

    before = read()

    def failing(*_):
        raise UsageError("stopped")

    monkeypatch.setattr("batchproc.training.train._measured", failing)
    with pytest.raises(UsageError, match="stopped"):
        train_model(examples, out, replace(wanted, seed=1), overwrite=True, quiet=True)
    assert read() == before
    monkeypatch.undo()
    found = train_model(examples, out, replace(wanted, seed=1, base=str(base)), overwrite=True, quiet=True)
    assert "base_on_the_same" in found.card.training
    assert TrainSettings.from_toml(out / "config.toml").seed == 1


def test_the_model_comes_last(tmp_path, monkeypatch):
    """Where what stands beside it cannot be written, there is no model that looks finished."""
    table, label = table_of(300)
    table["group"] = [f"field {k % 20}" for k in range(len(table))]
    examples = Examples(np.zeros((len(table), 3, 1, 1), np.float32), label, table)

    def failing(*_):
        raise OSError("disk full")

    monkeypatch.setattr("batchproc.training.train._write_history", failing)
    with pytest.raises(OSError, match="disk full"):
        train_model(examples, tmp_path, TrainSettings(kind="forest", trees=3, resamples=5), quiet=True)
    assert not (tmp_path / "model").exists()


def test_features_that_are_not_there_are_said_before_anything_is_done(tmp_path):
    """A column in a term is a column."""
    table, label = table_of(50)
    examples = Examples(np.zeros((50, 3, 1, 1), np.float32), label, table)
    with pytest.raises(UsageError, match="feature 'seeing': no such column"):
        train_model(examples, tmp_path / "out", TrainSettings(kind="forest", features=("chi2", "fwhm/seeing")))
    assert not (tmp_path / "out").exists()


def test_a_run_is_scored_by_its_catalogue(trained, tmp_path, monkeypatch):
    """`classify` hands over the columns of the card, in its order, and no stamp; scores stand beside the catalogue."""
    folder = _runs.begin(tmp_path / "run", "a3", "b4")
    for name, n in (("a3", 3), ("b4", 4)):
        _runs.store(folder, name, n)

    def unread(*_):
        raise AssertionError("stamps of a run were read for a model that takes none")

    monkeypatch.setattr("batchproc.io.stamps.read_stamps_of", unread)
    found = classify(folder.path, [str(trained.model_folder)], cluster="serial", quiet=True)
    assert (found.candidates, found.problems) == (7, ())
    catalogue = open_catalogue(folder.path)
    columns = catalogue[list(trained.card.input.features)]
    expected = load_model(trained.model_folder).predict(None, columns)
    np.testing.assert_array_equal(catalogue["score_trees"], expected)
    assert np.isfinite(expected).all()
