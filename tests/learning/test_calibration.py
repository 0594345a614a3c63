"""Brier score, calibration and resampling: in double precision, against definitions and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.learning.evaluate import (
    Interval,
    Ranked,
    auc_pr,
    auc_roc,
    bootstrap,
    bootstrap_many,
    brier,
    calibration,
    rates,
    threshold_for_completeness,
)

PREVALENCES = (None, 0.5, 1 / 101, 1 / 10_001)


@st.composite
def samples(draw):
    """Both classes, ties, scores of exactly 0 and 1."""
    n = draw(st.integers(2, 40))
    real = np.array([True, False, *draw(st.lists(st.booleans(), min_size=n - 2, max_size=n - 2))])
    grid = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]))
    return real, np.array(draw(st.lists(grid, min_size=n, max_size=n)))


@settings(deadline=None, max_examples=100)
@given(sample=samples(), prevalence=st.sampled_from(PREVALENCES))
def test_brier_is_the_weighted_mean_square(sample, prevalence):
    """Between 0 and 1, as its definition has it, and as scikit-learn does where it is there."""
    real, scores = sample
    share = real.mean() if prevalence is None else prevalence
    expected = share * np.mean((1 - scores[real]) ** 2) + (1 - share) * np.mean(scores[~real] ** 2)
    found = brier(real, scores, prevalence=prevalence)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert 0 <= found <= 1
    metrics = pytest.importorskip("sklearn.metrics")
    weight = np.where(real, share / real.sum(), (1 - share) / (~real).sum())
    assert found == pytest.approx(metrics.brier_score_loss(real, scores, sample_weight=weight), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(sample=samples(), prevalence=st.sampled_from(PREVALENCES[1:]))
def test_who_always_answers_the_prevalence(sample, prevalence):
    """Scores π (1 − π), and is calibrated there; certainty that is right scores 0."""
    real, _ = sample
    always = np.full(len(real), prevalence)
    assert brier(real, always, prevalence=prevalence) == pytest.approx(prevalence * (1 - prevalence), rel=1e-12)
    assert calibration(real, always, prevalence=prevalence).error == pytest.approx(0, abs=1e-12)
    assert brier(real, real.astype(float), prevalence=prevalence) == 0
    assert calibration(real, real.astype(float), prevalence=prevalence).error == 0


@settings(deadline=None, max_examples=100)
@given(sample=samples(), prevalence=st.sampled_from(PREVALENCES), bins=st.integers(1, 20))
def test_the_table_of_calibration_adds_up(sample, prevalence, bins):
    """Every candidate is in one bin; shares add up to 1, real ones to the prevalence, scores to their mean."""
    real, scores = sample
    share = real.mean() if prevalence is None else prevalence
    table = calibration(real, scores, bins=bins, prevalence=prevalence)
    assert table.n.sum() == len(real)
    assert table.share.sum() == pytest.approx(1)
    assert np.nansum(table.share * table.real) == pytest.approx(share)
    mean = share * scores[real].mean() + (1 - share) * scores[~real].mean()
    assert np.nansum(table.share * table.score) == pytest.approx(mean, abs=1e-15)
    assert abs(share - mean) - 1e-12 <= table.error <= 1
    used = table.n > 0
    assert (np.isnan(table.real) == ~used).all()
    assert (table.score[used] >= table.edges[:-1][used] - 1e-9).all()
    assert (table.score[used] <= table.edges[1:][used] + 1e-9).all()


def test_sums_are_in_double_precision():
    """float32 scores in their hundred thousands lose nothing: the sums are those of float64."""
    random = np.random.default_rng(0)
    real, scores = random.uniform(size=300_001) < 1e-2, random.uniform(size=300_001).astype(np.float32)
    exact = np.mean((scores.astype(np.longdouble) - real) ** 2)
    assert brier(real, scores) == pytest.approx(float(exact), rel=1e-12)
    assert calibration(real, scores).share.dtype == np.float64


@settings(deadline=None, max_examples=100)
@given(sample=samples(), prevalence=st.sampled_from(PREVALENCES), completeness=st.floats(0.01, 1), seed=st.integers(0))
def test_a_resample_needs_no_sorting(sample, prevalence, completeness, seed):
    """Counts of draws give what the rows themselves give, repeated."""
    real, scores = sample
    drawn = np.random.default_rng(seed).multinomial(len(real), np.full(len(real), 1 / len(real))) + 0
    drawn[:2] += 1  # both classes
    again = np.repeat(real, drawn), np.repeat(scores, drawn)
    found = Ranked(real, scores).rates(drawn)
    assert found.auc_pr(prevalence) == pytest.approx(auc_pr(*again, prevalence=prevalence))
    assert found.auc_roc() == pytest.approx(auc_roc(*again))
    threshold = found.thresholds[found.at_completeness(completeness)]
    assert threshold == threshold_for_completeness(*again, completeness)
    assert brier(real, scores, drawn=drawn, prevalence=prevalence) == pytest.approx(
        brier(*again, prevalence=prevalence)
    )
    one = calibration(real, scores, drawn=drawn, prevalence=prevalence)
    other = calibration(*again, prevalence=prevalence)
    np.testing.assert_array_equal(one.n, other.n)
    np.testing.assert_allclose(one.real, other.real)


@pytest.mark.parametrize("grouped", [False, True])
def test_many_metrics_at_once_are_those_one_by_one(grouped):
    """The same resamples, the same intervals."""
    random = np.random.default_rng(1)
    real = np.arange(200) < 80
    scores, groups = random.normal(real, 1), np.arange(200) % 9 if grouped else None
    ranked = Ranked(real, scores)
    many = bootstrap_many(lambda drawn: {"roc": ranked.rates(drawn).auc_roc()}, real, groups=groups, resamples=50)[
        "roc"
    ]
    one = bootstrap(auc_roc, real, scores, groups=groups, resamples=50)
    assert (many.value, many.low, many.high) == pytest.approx((one.value, one.low, one.high))


def test_a_rate_of_nothing_has_a_bound():
    """0 of 30 may be 11.6 %, at 95 %; what varied is left as it is."""
    bound = Interval(0.0, 0.0, 0.0).of_rate(30)
    assert (bound.low, bound.high) == (0.0, pytest.approx(0.1157, abs=1e-4))
    assert Interval(1.0, np.nan, np.nan).of_rate(30).low == pytest.approx(1 - 0.1157, abs=1e-4)
    varied = Interval(0.5, 0.4, 0.6)
    assert varied.of_rate(30) is varied


def test_scores_that_are_no_probabilities_are_refused():
    """Logits have areas, and no Brier score."""
    real, scores = np.array([True, False]), np.array([3.0, -1.0])
    assert rates(real, scores).auc_pr() == 1
    for metric in (brier, calibration):
        with pytest.raises(ValueError, match="no probabilities"):
            metric(real, scores)
