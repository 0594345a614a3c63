"""How good a classifier is, with intervals, and for which mixture of real and bogus that holds.

Everything derives from two rates that do not depend on the mixture, the fraction of the real ones and the fraction of
the bogus ones at or above a threshold (`rates`), and from the *prevalence*, the fraction of the candidates that is
real. Precision and the area under its curve mean nothing without a prevalence, so it is an argument everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Calibration",
    "Interval",
    "Ranked",
    "Rates",
    "auc_pr",
    "auc_roc",
    "bogus_removed",
    "bootstrap",
    "bootstrap_many",
    "brier",
    "calibration",
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

    def auc_pr(self, prevalence: float | None = None) -> float:
        """As the function of this name."""
        gained = np.diff(self.real, prepend=0.0)
        some = gained > 0  # precision is no number where nothing is selected
        return float(np.sum(gained[some] * self.precision(prevalence)[some]))

    def auc_roc(self) -> float:
        """As the function of this name."""
        middle = self.real - 0.5 * np.diff(self.real, prepend=0.0)
        return float(np.sum(np.diff(self.bogus, prepend=0.0) * middle))

    def at_completeness(self, completeness: float) -> int:
        """Index of the highest threshold that selects at least this fraction of the real ones (0 < it ≤ 1)."""
        if not 0 < completeness <= 1:
            raise ValueError(f"completeness {completeness}: must be above 0 and at most 1")
        # A hair's breadth: 0.99 * 100 is 99.00000000000001 and would ask for the hundredth.
        needed = max(1, np.ceil(completeness * self.n_real - 1e-9))
        return int(np.searchsorted(np.rint(self.real * self.n_real), needed))


class Ranked:
    """Scores sorted once, from which the rates of many resamples follow without sorting again.

    Parameters
    ----------
    real, scores : array_like (n,)
        As in `rates`.
    """

    def __init__(self, real: ArrayLike, scores: ArrayLike) -> None:
        truth, values = _checked(real, scores)
        self._order = np.argsort(-values, kind="stable")
        self._truth = truth[self._order]
        ranked = values[self._order]
        self._last = np.flatnonzero(np.append(np.diff(ranked) != 0, True))  # equal scores are selected together
        self._thresholds = ranked[self._last]

    def rates(self, drawn: NDArray[np.int64] | None = None) -> Rates:
        """Rates of the sample, or of a resample.

        Parameters
        ----------
        drawn : ndarray (n,) of int, optional
            How often each candidate is in the resample. Equivalent to ``rates(np.repeat(real, drawn),
            np.repeat(scores, drawn))``, but for points of the curve at which nothing is gained.
        """
        count = np.ones(len(self._order), np.int64) if drawn is None else drawn[self._order]
        real = np.cumsum(np.where(self._truth, count, 0))[self._last]
        bogus = np.cumsum(count)[self._last] - real
        n_real, n_bogus = int(real[-1]), int(bogus[-1])
        if not n_real or not n_bogus:
            raise ValueError(f"{n_real} real and {n_bogus} bogus: both are needed")
        return Rates(self._thresholds, real / n_real, bogus / n_bogus, n_real, n_bogus)


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
    return Ranked(real, scores).rates()


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
    return rates(real, scores).auc_pr(prevalence)


def auc_roc(real: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a real one scores above a bogus one, ties counted half."""
    return rates(real, scores).auc_roc()


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
    curve = rates(real, scores)
    return float(curve.thresholds[curve.at_completeness(completeness)])


def brier(
    real: ArrayLike, scores: ArrayLike, *, prevalence: float | None = None, drawn: NDArray[np.int64] | None = None
) -> float:
    """Mean square of score minus truth; 0 is perfect, and always answering the prevalence π scores π (1 − π).

    Parameters
    ----------
    real, scores : array_like (n,)
        As in `rates`, and scores are probabilities.
    prevalence : float, optional
        As in `auc_pr`.
    drawn : ndarray (n,) of int, optional
        How often each candidate counts, as in `Ranked.rates`.

    Raises
    ------
    ValueError
        Scores outside 0 to 1; otherwise as in `rates`.

    Notes
    -----
    Brier (1950), DOI 10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.
    """
    truth, values = _probabilities(real, scores)
    return float(np.sum(_weights(truth, prevalence, drawn) * (values - truth) ** 2))


@dataclass(frozen=True)
class Calibration:
    """Whether a score is the chance of being real: one row a bin of scores, of equal width from 0 to 1.

    Attributes
    ----------
    edges : ndarray (bins + 1,)
    n : ndarray (bins,)
        Candidates in the bin.
    share : ndarray (bins,)
        Fraction of the mixture that lies in the bin.
    score, real : ndarray (bins,)
        Mean score, and fraction that is real, of the mixture; NaN where a bin is empty.
    """

    edges: NDArray[np.float64]
    n: NDArray[np.int64]
    share: NDArray[np.float64]
    score: NDArray[np.float64]
    real: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error: mean of |real − score| over the mixture."""
        return float(np.nansum(self.share * np.abs(self.real - self.score)))


def calibration(
    real: ArrayLike,
    scores: ArrayLike,
    *,
    bins: int = 10,
    prevalence: float | None = None,
    drawn: NDArray[np.int64] | None = None,
) -> Calibration:
    """Mean score against the fraction that is real, bin by bin; arguments and errors as of `brier`.

    A network trained on as many real as bogus ones can be calibrated at 1:1 only: what its 0.9 means where one in a
    hundred is real is in the table of that prevalence.
    """
    truth, values = _probabilities(real, scores)
    weights = _weights(truth, prevalence, drawn)
    bin_of = np.minimum((values * bins).astype(np.intp), bins - 1)  # 1 belongs to the last

    def total(of: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(bin_of, of, bins).astype(np.float64)

    share = total(weights)
    with np.errstate(invalid="ignore"):
        score, fraction = total(weights * values) / share, total(weights * truth) / share
    count = total(np.ones(len(truth)) if drawn is None else drawn.astype(np.float64))
    return Calibration(np.linspace(0, 1, bins + 1), count.astype(np.int64), share, score, fraction)


@dataclass(frozen=True)
class Interval:
    """A value with its interval: ``value`` of the sample, ``low`` and ``high`` of the resamples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"

    def of_rate(self, n: int, level: float = 0.95) -> Interval:
        """The same, where no resample can vary: a rate of 0 or 1 in `n` gets its exact binomial bound.

        None lost of 30 is no proof that none is ever lost: at 95 % up to 11.6 % are (Clopper and Pearson 1934,
        DOI 10.1093/biomet/26.4.404).
        """
        if not n or self.value not in (0.0, 1.0):
            return self
        reach = 1 - ((1 - level) / 2) ** (1 / n)
        low, high = (0.0, reach) if self.value == 0 else (1 - reach, 1.0)
        return Interval(self.value, float(np.fmin(self.low, low)), float(np.fmax(self.high, high)))


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
    found = [metric(truth[chosen], values[chosen]) for chosen in _resamples(truth, groups, resamples, seed)]
    return Interval(float(metric(truth, values)), *_percentiles(found, level))


def bootstrap_many(
    measure: Callable[[NDArray[np.int64]], Mapping[str, float]],
    real: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Many metrics of the same resamples, with intervals; each as `bootstrap` gives it.

    Parameters
    ----------
    measure : callable
        ``measure(drawn) -> {name: value}``, with how often each candidate was drawn; all once is the sample itself.
        NaN where a resample has no such value.
    real, groups, resamples, level, seed
        As in `bootstrap`; `real` may be numbers of several classes, or of one.
    """
    truth = np.asarray(real)
    values = measure(np.ones(len(truth), np.int64))
    found: dict[str, list[float]] = {name: [] for name in values}
    for chosen in _resamples(truth, groups, resamples, seed):
        for name, value in measure(np.bincount(chosen, minlength=len(truth))).items():
            found[name].append(value)
    return {name: Interval(float(values[name]), *_percentiles(found[name], level)) for name in values}


def _resamples(truth: NDArray, groups: ArrayLike | None, resamples: int, seed: int) -> Iterator[NDArray[np.intp]]:
    """Rows of each resample; those with a single class are left out, unless there is no other."""
    random = np.random.default_rng(seed)
    if groups is None:
        classes = [np.flatnonzero(truth == value) for value in np.unique(truth)[::-1]]

        def draw() -> NDArray[np.intp]:
            return np.concatenate([random.choice(m, len(m)) for m in classes])
    else:
        names = np.asarray(groups)
        if names.shape != truth.shape:
            raise ValueError(f"groups of shape {names.shape}, truth of shape {truth.shape}")
        _, label = np.unique(names, return_inverse=True)
        members = np.split(np.argsort(label, kind="stable"), np.cumsum(np.bincount(label))[:-1])
        if len(members) < 2:
            raise ValueError("one group only: nothing to draw from; leave groups out")

        def draw() -> NDArray[np.intp]:
            return np.concatenate([members[k] for k in random.integers(len(members), size=len(members))])

    alone = not (truth != truth[0]).any()
    for _ in range(resamples):
        chosen = draw()
        if alone or (truth[chosen] != truth[chosen[0]]).any():
            yield chosen


def _percentiles(found: list[float], level: float) -> tuple[float, float]:
    values = np.asarray(found, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _checked(real: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    truth, values = np.asarray(real, dtype=np.bool_), np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != values.shape:
        raise ValueError(f"truth of shape {truth.shape} and scores of shape {values.shape}: expected one length")
    if np.isnan(values).any():
        raise ValueError(f"{np.isnan(values).sum()} of {values.size} not scored (NaN): leave them out, and say so")
    if not truth.any() or truth.all():
        raise ValueError(f"{truth.sum()} real and {(~truth).sum()} bogus: both are needed")
    return truth, values


def _probabilities(real: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    truth, values = _checked(real, scores)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"scores from {values.min():.4g} to {values.max():.4g} are no probabilities (0 to 1)")
    return truth, values


def _weights(
    truth: NDArray[np.bool_], prevalence: float | None, drawn: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """Of each candidate in the mixture; their sum is 1."""
    count = np.ones(len(truth)) if drawn is None else drawn.astype(np.float64)
    n_real, n_bogus = float(count[truth].sum()), float(count[~truth].sum())
    share = n_real / (n_real + n_bogus) if prevalence is None else _prevalence(prevalence, 1, 1)
    return np.where(truth, count * (share / n_real), count * ((1 - share) / n_bogus))


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
