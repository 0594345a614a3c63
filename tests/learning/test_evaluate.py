"""Metrics against scikit-learn where it is there, against their definitions otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.learning.evaluate import (
    auc_pr,
    auc_roc,
    bogus_removed,
    bootstrap,
    precision,
    rates,
    recall,
    threshold_for_completeness,
)


def sample(n_real=200, n_bogus=300, seed=0, digits=2):
    """Overlapping scores with ties."""
    random = np.random.default_rng(seed)
    real = np.arange(n_real + n_bogus) < n_real
    scores = np.round(1 / (1 + np.exp(-random.normal(np.where(real, 1.0, -1.0)))), digits)
    order = random.permutation(len(real))
    return real[order], scores[order]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), prevalence=st.sampled_from([0.5, 0.01, 1e-4]))
def test_areas_match_their_definitions(seed, prevalence):
    """ROC: the chance that a real one beats a bogus one. PR: precision averaged over the real ones, ties together."""
    real, scores = sample(40, 60, seed, digits=1)
    wins = np.sign(scores[real][:, None] - scores[~real][None, :])
    assert auc_roc(real, scores) == pytest.approx(np.mean(wins + 1) / 2)
    average = 0.0
    for s in scores[real]:
        r, b = np.mean(scores[real] >= s), np.mean(scores[~real] >= s)
        average += prevalence * r / (prevalence * r + (1 - prevalence) * b) / real.sum()
    assert auc_pr(real, scores, prevalence=prevalence) == pytest.approx(average)


def test_areas_match_scikit_learn():
    """The independent implementation that everybody knows."""
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (extra: train)")
    real, scores = sample()
    assert auc_roc(real, scores) == pytest.approx(metrics.roc_auc_score(real, scores))
    assert auc_pr(real, scores) == pytest.approx(metrics.average_precision_score(real, scores))
    weights = np.where(real, 0.01 / real.sum(), 0.99 / (~real).sum())
    expected = metrics.average_precision_score(real, scores, sample_weight=weights)
    assert auc_pr(real, scores, prevalence=0.01) == pytest.approx(expected)


def test_precision_falls_with_prevalence_and_rates_do_not():
    """The same classifier, three mixtures: what it selects is 1:1 mostly real, 1:10,000 mostly not."""
    real, scores = sample()
    areas = [auc_pr(real, scores, prevalence=p) for p in (0.5, 0.01, 1e-4)]
    assert areas[0] > areas[1] > areas[2]
    repeated = np.concatenate([real, real[~real]]), np.concatenate([scores, scores[~real]])
    assert auc_roc(*repeated) == pytest.approx(auc_roc(real, scores))
    assert auc_pr(*repeated, prevalence=0.5) == pytest.approx(areas[0])
    assert auc_pr(real, scores) == pytest.approx(auc_pr(real, scores, prevalence=real.mean()))


def test_values_at_a_threshold():
    """Selected means: at or above."""
    real = np.array([True, True, True, False, False])
    scores = np.array([0.9, 0.5, 0.2, 0.5, 0.1])
    assert recall(real, scores, 0.5) == pytest.approx(2 / 3)
    assert bogus_removed(real, scores, 0.5) == pytest.approx(1 / 2)
    assert precision(real, scores, 0.5) == pytest.approx(2 / 3)
    assert precision(real, scores, 0.5, prevalence=0.5) == pytest.approx((2 / 3) / (2 / 3 + 1 / 2))
    assert np.isnan(precision(real, scores, 0.95))


def test_perfect_and_inverted():
    """1 and 0 where the classes do not overlap."""
    real = np.array([True, True, False, False])
    scores = np.array([0.9, 0.8, 0.2, 0.1])
    assert (auc_pr(real, scores), auc_roc(real, scores), auc_roc(real, -scores)) == (1.0, 1.0, 0.0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), completeness=st.floats(0.01, 1.0))
def test_threshold_for_completeness_is_the_highest_that_does(seed, completeness):
    """It keeps what it promises, and the next higher score would not."""
    real, scores = sample(50, 50, seed)
    threshold = threshold_for_completeness(real, scores, completeness)
    assert recall(real, scores, threshold) >= completeness - 1e-9
    higher = scores[real][scores[real] > threshold]
    if len(higher):
        assert recall(real, scores, higher.min()) < completeness


def test_curve_runs_from_nothing_to_everything():
    """Rates rise to 1 as the threshold falls; one point a distinct score."""
    real, scores = sample()
    curve = rates(real, scores)
    assert len(curve.thresholds) == len(np.unique(scores))
    assert (np.diff(curve.thresholds) < 0).all()
    assert (np.diff(curve.real) >= 0).all()
    assert curve.real[-1] == curve.bogus[-1] == 1
    assert curve.precision()[-1] == pytest.approx(real.mean())


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Of 40 samples, the 90 % interval holds the true area in most; seeds repeat."""
    truth = 0.9214  # the chance that N(1, 1) exceeds N(−1, 1)
    hits = 0
    for seed in range(40):
        found = bootstrap(auc_roc, *sample(80, 120, seed, digits=6), resamples=200, level=0.9, seed=seed)
        hits += found.low <= truth <= found.high
    assert 31 <= hits <= 40
    assert bootstrap(auc_roc, *sample(), resamples=50) == bootstrap(auc_roc, *sample(), resamples=50)


def test_whole_groups_are_drawn():
    """Where the candidates of an image share their fate, the interval by images is wider than by candidates."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 50)
    real = np.tile(np.arange(50) < 25, 12)
    scores = random.normal(np.where(real, 1.0, 0.0)) + (random.normal(0, 2, 12)[groups] * real)
    single = bootstrap(auc_roc, real, scores, resamples=300)
    grouped = bootstrap(auc_roc, real, scores, groups=groups, resamples=300)
    assert grouped.value == single.value
    assert grouped.high - grouped.low > 2 * (single.high - single.low)


@pytest.mark.parametrize(
    ("real", "scores", "message"),
    [
        ([True, False], [0.5, np.nan], "1 of 2 not scored"),
        ([True, True], [0.5, 0.6], "2 real and 0 bogus"),
        ([True, False], [0.5], "one length"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(real, scores, message):
    """Not-scored is no score of zero, and one class has no curve."""
    with pytest.raises(ValueError, match=message):
        auc_pr(real, scores)
