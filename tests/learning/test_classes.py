"""Metrics of several classes: those of scikit-learn, and what they would be in another mixture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from batchproc.learning.classes import accuracy, confusion, f1, macro_f1, mixed, precision, recall
from batchproc.learning.evaluate import bootstrap_many

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


@settings(max_examples=80, deadline=None)
@given(pairs=pairs)
def test_they_are_those_of_scikit_learn(pairs):
    """Where that has a value; NaN, not 0, where there is nothing to divide by."""
    truth, answer = np.array(pairs).T
    matrix = confusion(truth, answer, 4)
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(truth, answer, labels=range(4)))
    theirs = metrics.precision_recall_fscore_support(truth, answer, labels=range(4), zero_division=np.nan)
    np.testing.assert_allclose(precision(matrix), theirs[0])
    np.testing.assert_allclose(recall(matrix), theirs[1])
    assert macro_f1(matrix) == pytest.approx(metrics.f1_score(truth, answer, average="macro", zero_division=0))
    assert accuracy(matrix) == pytest.approx(metrics.accuracy_score(truth, answer))


@settings(max_examples=40, deadline=None)
@given(pairs=pairs, seed=st.integers(0, 9))
def test_a_resample_by_counts_is_the_resample(pairs, seed):
    """As if each candidate were there as often as it was drawn."""
    truth, answer = np.array(pairs).T
    drawn = np.random.default_rng(seed).integers(0, 3, len(truth))
    expected = confusion(np.repeat(truth, drawn), np.repeat(answer, drawn), 4)
    np.testing.assert_array_equal(confusion(truth, answer, 4, drawn=drawn), expected)


@settings(max_examples=40, deadline=None)
@given(pairs=pairs, weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_another_mixture_is_that_of_weighted_candidates(pairs, weights):
    """What scikit-learn says of them; recall is the same in all."""
    truth, answer = np.array(pairs).T
    n = np.bincount(truth, minlength=4)
    shares = np.where(n > 0, weights, 0) / np.sum(np.where(n > 0, weights, 0))
    matrix = confusion(truth, answer, 4)
    found = mixed(matrix, shares)
    weight = (shares / np.maximum(n, 1))[truth]
    theirs = metrics.precision_recall_fscore_support(
        truth, answer, labels=range(4), sample_weight=weight, zero_division=np.nan
    )
    np.testing.assert_allclose(precision(found), theirs[0])
    np.testing.assert_allclose(recall(found), recall(matrix))
    assert accuracy(mixed(matrix)) == pytest.approx(np.nansum(recall(matrix)) / (n > 0).sum()) or (n == 0).any()


def test_f1_lies_between_precision_and_recall():
    """And is 0, not NaN, for a class of which none was recognised."""
    matrix = confusion([0, 0, 1, 1, 2], [0, 1, 0, 0, 0], 4)
    np.testing.assert_allclose(f1(matrix), [2 / 6, 0, 0, np.nan])


def test_resamples_keep_the_number_of_each_class():
    """Drawn singly, they are drawn within their class, however many classes there are."""
    truth = np.repeat([0, 1, 2], [5, 20, 2])
    seen = []

    def measure(drawn):
        seen.append([int(drawn[truth == k].sum()) for k in range(3)])
        return {"a": 0.0}

    bootstrap_many(measure, truth, resamples=20)
    assert len(seen) == 21
    assert seen == [[5, 20, 2]] * 21
