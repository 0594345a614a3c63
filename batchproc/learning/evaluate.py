"""How good a classifier is, with intervals, and for which mixture of real and bogus that holds.

Everything derives from two rates that do not depend on the mixture, the fraction of the real ones and the fraction of
the bogus ones at or above a threshold (`rates`), and from the *prevalence*, the fraction of the candidates that is
real. Precision and the area under its curve mean nothing without a prevalence, so it is an argument everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Interval",
    "Rates",
    "auc_pr",
    "auc_roc",
    "bogus_removed",
    "bootstrap",
    "precision",
    "rates",
    "recall",
    "threshold_for_completeness",
]

Metric = Callable[[NDArray[np.bool_], NDArray[np.float64]], float]


@dataclass(frozen=True)
class Rates:
    """The ROC curve, one point a distinct score, from the strictest threshold to the laxest.

    Attributes
    ----------
    thresholds : ndarray (k,)
        Falling; "selected" means a score at or above it.
    real, bogus : ndarray (k,)
        Fraction of the real ones selected (true-positive rate, recall, completeness), and of the bogus ones
        (false-positive rate).
    n_real, n_bogus : int
    """

    thresholds: NDArray[np.float64]
    real: NDArray[np.float64]
    bogus: NDArray[np.float64]
    n_real: int
    n_bogus: int

    def precision(self, prevalence: float | None = None) -> NDArray[np.float64]:
        """Fraction of the selected that is real, at each threshold; `prevalence` as in `auc_pr`."""
        share = _prevalence(prevalence, self.n_real, self.n_bogus)
        return _precision(self.real, self.bogus, share)


def rates(real: ArrayLike, scores: ArrayLike) -> Rates:
    """Selected fractions at every threshold.

    Parameters
    ----------
    real : array_like (n,) bool
        The truth.
    scores : array_like (n,)
        Larger is more likely real. Leave out what was not scored before calling, and say how many those were.

    Raises
    ------
    ValueError
        NaN scores, different lengths, or nothing real, or nothing bogus.
    """
    truth, values = _checked(real, scores)
    order = np.argsort(-values, kind="stable")
    values, truth = values[order], truth[order]
    last = np.flatnonzero(np.append(np.diff(values) != 0, True))  # equal scores are selected together
    n_real, n_bogus = int(truth.sum()), int((~truth).sum())
    selected_real = np.cumsum(truth)[last]
    return Rates(values[last], selected_real / n_real, (last + 1 - selected_real) / n_bogus, n_real, n_bogus)


def auc_pr(real: ArrayLike, scores: ArrayLike, *, prevalence: float | None = None) -> float:
    """Area under the precision-recall curve (average precision: a sum of steps, nothing interpolated).

    Parameters
    ----------
    real, scores : array_like (n,)
        As in `rates`.
    prevalence : float, optional
        Fraction of real ones in the mixture that the answer is for (0.5 is 1:1; 1e-4 is about 1:10 000), whatever the
        mixture of the sample. By default that of the sample.

    Notes
    -----
    Equivalent to scikit-learn's ``average_precision_score`` with ``sample_weight`` such that the real ones make up
    `prevalence` of the weight.
    """
    curve = rates(real, scores)
    gained = np.diff(curve.real, prepend=0.0)
    return float(np.sum(gained * curve.precision(prevalence)))


def auc_roc(real: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a real one scores above a bogus one, ties counted half."""
    curve = rates(real, scores)
    middle = curve.real - 0.5 * np.diff(curve.real, prepend=0.0)
    return float(np.sum(np.diff(curve.bogus, prepend=0.0) * middle))


def recall(real: ArrayLike, scores: ArrayLike, threshold: float) -> float:
    """Fraction of the real ones with a score at or above `threshold`."""
    truth, values = _checked(real, scores)
    return float(np.mean(values[truth] >= threshold))


def bogus_removed(real: ArrayLike, scores: ArrayLike, threshold: float) -> float:
    """Fraction of the bogus ones with a score below `threshold`."""
    truth, values = _checked(real, scores)
    return float(np.mean(values[~truth] < threshold))


def precision(real: ArrayLike, scores: ArrayLike, threshold: float, *, prevalence: float | None = None) -> float:
    """Fraction of what is selected at `threshold` that is real, at `prevalence` (as in `auc_pr`); NaN for none."""
    truth, values = _checked(real, scores)
    share = _prevalence(prevalence, int(truth.sum()), int((~truth).sum()))
    selected = np.array([np.mean(values[truth] >= threshold)]), np.array([np.mean(values[~truth] >= threshold)])
    return float(_precision(*selected, share)[0])


def threshold_for_completeness(real: ArrayLike, scores: ArrayLike, completeness: float) -> float:
    """The highest threshold that still selects at least this fraction of the real ones (0 < completeness ≤ 1)."""
    if not 0 < completeness <= 1:
        raise ValueError(f"completeness {completeness}: must be above 0 and at most 1")
    truth, values = _checked(real, scores)
    ranked = -np.sort(-values[truth])
    # A hair's breadth: 0.99 * 100 is 99.00000000000001 and would ask for the hundredth.
    return float(ranked[int(np.ceil(completeness * len(ranked) - 1e-9)) - 1])


@dataclass(frozen=True)
class Interval:
    """A value with its interval: ``value`` of the sample, ``low`` and ``high`` of the resamples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def bootstrap(
    metric: Metric,
    real: ArrayLike,
    scores: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A metric and its percentile-bootstrap interval.

    Parameters
    ----------
    metric : callable
        ``metric(real, scores) -> float``; fix its other arguments with a lambda.
    real, scores : array_like (n,)
        As in `rates`.
    groups : array_like (n,), optional
        Whole groups (images, regions of sky) are drawn instead of single candidates: candidates of one image share
        its faults, and drawing them singly makes intervals too narrow. Single ones are drawn within each class, so
        that the mixture stays.
    resamples : int
    level : float
        Share of the resamples inside the interval.
    seed : int

    Raises
    ------
    ValueError
        As in `rates`, or fewer than two groups.
    """
    truth, values = _checked(real, scores)
    random = np.random.default_rng(seed)
    if groups is None:
        members = [np.flatnonzero(truth), np.flatnonzero(~truth)]

        def draw() -> NDArray[np.intp]:
            return np.concatenate([random.choice(m, len(m)) for m in members])
    else:
        names = np.asarray(groups)
        if names.shape != truth.shape:
            raise ValueError(f"groups of shape {names.shape}, truth of shape {truth.shape}")
        _, label = np.unique(names, return_inverse=True)
        members = [np.flatnonzero(label == k) for k in range(label.max() + 1)]
        if len(members) < 2:
            raise ValueError("one group only: nothing to draw from; leave groups out")

        def draw() -> NDArray[np.intp]:
            return np.concatenate([members[k] for k in random.integers(len(members), size=len(members))])

    found = []
    for _ in range(resamples):
        chosen = draw()
        if truth[chosen].any() and not truth[chosen].all():
            found.append(metric(truth[chosen], values[chosen]))
    tail = 50 * (1 - level)
    low, high = np.percentile(found, [tail, 100 - tail]) if found else (np.nan, np.nan)
    return Interval(float(metric(truth, values)), float(low), float(high))


def _checked(real: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    truth, values = np.asarray(real, dtype=np.bool_), np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != values.shape:
        raise ValueError(f"truth of shape {truth.shape} and scores of shape {values.shape}: expected one length")
    if np.isnan(values).any():
        raise ValueError(f"{np.isnan(values).sum()} of {values.size} not scored (NaN): leave them out, and say so")
    if not truth.any() or truth.all():
        raise ValueError(f"{truth.sum()} real and {(~truth).sum()} bogus: both are needed")
    return truth, values


def _prevalence(prevalence: float | None, n_real: int, n_bogus: int) -> float:
    if prevalence is None:
        return n_real / (n_real + n_bogus)
    if not 0 < prevalence < 1:
        raise ValueError(f"prevalence {prevalence}: must be between 0 and 1")
    return prevalence


def _precision(real: NDArray[np.float64], bogus: NDArray[np.float64], prevalence: float) -> NDArray[np.float64]:
    """Of selected fractions `real` and `bogus`: π r / (π r + (1 − π) b); NaN where nothing is selected."""
    selected = prevalence * real + (1 - prevalence) * bogus
    with np.errstate(invalid="ignore"):
        return prevalence * real / selected
