"""Places in a list that is looked at from the best candidate down."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from batchproc.learning.ranks import ahead, expected_rank, weighted_median

scores = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.5000001, 1.0, np.nan]), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(left_out=scores, others=scores, seed=st.integers(0, 5))
def test_what_is_ahead_scores_as_high_or_higher(left_out, others, seed):
    """By counting; what is not scored is behind everything; a resample by counts is the resample."""
    expected = [1.0 if one != one else np.mean([other >= one for other in others]) for one in left_out]
    np.testing.assert_allclose(ahead(left_out, others), expected)
    drawn = np.random.default_rng(seed).integers(0, 3, len(others))
    if drawn.any():
        np.testing.assert_allclose(ahead(left_out, others, drawn=drawn), ahead(left_out, np.repeat(others, drawn)))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 100))
def test_its_mean_is_the_area_that_is_missing_under_the_roc(seed):
    """Without ties."""
    random = np.random.default_rng(seed)
    real, bogus = random.normal(1, 1, 7), random.normal(0, 1, 9)
    area = metrics.roc_auc_score(np.repeat([1, 0], [7, 9]), np.concatenate([real, bogus]))
    assert 1 - ahead(real, bogus).mean() == pytest.approx(area)


def test_the_best_is_the_first_among_however_many():
    """And the middle one in the middle."""
    np.testing.assert_allclose(expected_rank([0.0, 0.5, 1.0], 10_000), [1, 5001, 10_001])
    assert np.isnan(ahead([0.5], [])).all()


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(0, 9), min_size=1, max_size=9), seed=st.integers(0, 9))
def test_the_weighted_median_is_that_of_the_repeated_values(values, seed):
    """The lower one of the two where there are two."""
    weights = np.random.default_rng(seed).integers(0, 4, len(values))
    repeated = np.sort(np.repeat(values, weights))
    found = weighted_median(values, weights)
    assert found == repeated[(len(repeated) - 1) // 2] if len(repeated) else np.isnan(found)
