"""Where what was left out of training would have ranked, with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.judging.measures import Plan
from batchproc.learning.evaluate import Interval, bootstrap_many
from batchproc.learning.ranks import ahead, expected_rank, weighted_median

__all__ = ["ODDS", "Ranking", "Scored", "rank"]

#: For one real candidate, so many bogus ones, and how that is written.
ODDS = {100: "1:100", 10_000: "1:10^4"}


@dataclass(frozen=True)
class Scored:
    """What a model made of candidates that it has not learnt from.

    Attributes
    ----------
    left_out : ndarray (n,)
        Scores of what was left out; NaN: not scored.
    ordinary : ndarray (k,)
        Of the other real ones of the test part.
    bogus : ndarray (m,)
        Of its bogus ones.
    groups : tuple of three ndarray of str, or None
        What is drawn as a whole, of each of these.
    """

    left_out: NDArray[np.float64]
    ordinary: NDArray[np.float64]
    bogus: NDArray[np.float64]
    groups: tuple[NDArray[np.str_], NDArray[np.str_], NDArray[np.str_]] | None = None


@dataclass(frozen=True)
class Ranking:
    """Where it would have ranked.

    Attributes
    ----------
    scored : Scored
    threshold : float
        Keeps the completeness asked for of the ordinary real ones; NaN where there are none.
    place : ndarray (n,) of int
        Of each that was left out, from 1, in the list of the test part and itself alone; equal scores come before it,
        and what is not scored is last.
    n_list : int
        Length of that list.
    ahead : tuple of Interval
        Fraction of the bogus ones ahead of each.
    values : dict
        ``median_ahead``, ``rank_1_to_100``, ``rank_1_to_10000`` (expected place of the median one among so many bogus
        ones), ``above_threshold``, ``auc_roc`` against the bogus ones, equal scores counted against it; and of the
        ordinary real ones the same, with ``ordinary_`` before it.
    """

    scored: Scored
    threshold: float
    place: NDArray[np.intp]
    n_list: int
    ahead: tuple[Interval, ...]
    values: dict[str, Interval]

    @property
    def above(self) -> NDArray[np.bool_]:
        """Which of what was left out is at or above the threshold."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.scored.left_out >= self.threshold)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; intervals are ``{value, low, high}``."""
        return {
            "left_out": len(self.scored.left_out),
            "not_scored": int(np.isnan(self.scored.left_out).sum()),
            "test_part": {"real": len(self.scored.ordinary), "bogus": len(self.scored.bogus)},
            "threshold": self.threshold,
            "metrics": {key: vars(value) for key, value in self.values.items()},
        }


def rank(scored: Scored, plan: Plan) -> Ranking:
    """Place what was left out among the test part.

    What is not scored ranks last. Fractions that are 0 or 1 get the exact bound that their number allows: none ahead of
    some hundreds is no proof of the first place among ten thousand.

    Raises
    ------
    ValueError
        Nothing left out, or nothing bogus to rank it among.
    """
    left_out, ordinary, bogus = scored.left_out, scored.ordinary, scored.bogus
    n, k, m = len(left_out), len(ordinary), len(bogus)
    if not n or not m:
        raise ValueError(f"{n} left out, {m} bogus ones in the test part: both are needed")
    truth = np.repeat([2, 1, 0], [n, k, m])

    def measure(drawn: NDArray[np.int64]) -> dict[str, float]:
        of_left_out, of_ordinary, of_bogus = np.split(drawn, [n, n + k])
        if not of_bogus.any():
            return dict.fromkeys(_names(n), np.nan)
        threshold = _threshold(ordinary, of_ordinary, plan.completeness)
        each = ahead(left_out, bogus, drawn=of_bogus)
        found = {f"ahead {i}": float(value) for i, value in enumerate(each[:_MOST])}
        found |= _summary("", left_out, each, of_left_out, threshold)
        return found | _summary("ordinary_", ordinary, ahead(ordinary, bogus, drawn=of_bogus), of_ordinary, threshold)

    groups = None if scored.groups is None else np.concatenate(scored.groups)
    if groups is not None and len(np.unique(groups)) < 2:
        groups = None
    values = bootstrap_many(measure, truth, groups=groups, resamples=plan.resamples, level=plan.level, seed=plan.seed)
    each = tuple(values.pop(f"ahead {i}").of_rate(m, plan.level) for i in range(min(n, _MOST)))
    for start, number in (("", n), ("ordinary_", k)):
        values[f"{start}above_threshold"] = values[f"{start}above_threshold"].of_rate(number, plan.level)
        median = values[f"{start}median_ahead"] = values[f"{start}median_ahead"].of_rate(m, plan.level)
        for odds in ODDS:
            bounds = expected_rank([median.value, median.low, median.high], odds)
            values[f"{start}rank_1_to_{odds}"] = Interval(*map(float, bounds))
    others = np.concatenate([ordinary, bogus])
    return Ranking(
        scored=scored,
        threshold=_threshold(ordinary, np.ones(k, np.int64), plan.completeness),
        place=1 + np.rint(ahead(left_out, others) * len(others)).astype(np.intp),
        n_list=len(others) + 1,
        ahead=each,
        values=values,
    )


#: Of so many, each has an interval of its own.
_MOST = 1000


def _names(n: int) -> list[str]:
    kinds = ("median_ahead", "above_threshold", "auc_roc")
    return [
        *(f"ahead {i}" for i in range(min(n, _MOST))),
        *(f"{start}{kind}" for start in ("", "ordinary_") for kind in kinds),
    ]


def _summary(
    start: str, scores: NDArray[np.float64], each: NDArray[np.float64], drawn: NDArray[np.int64], threshold: float
) -> dict[str, float]:
    some = bool(drawn.any())
    with np.errstate(invalid="ignore"):
        above = scores >= threshold
    return {
        f"{start}median_ahead": weighted_median(each, drawn),
        f"{start}above_threshold": float(drawn[above].sum() / drawn.sum())
        if some and threshold == threshold
        else np.nan,
        f"{start}auc_roc": float(1 - np.average(each, weights=drawn)) if some else np.nan,
    }


def _threshold(ordinary: NDArray[np.float64], drawn: NDArray[np.int64], completeness: float) -> float:
    """The highest that keeps this fraction of the ordinary real ones that are scored; NaN where there are none."""
    known = ~np.isnan(ordinary) & (drawn > 0)
    if not known.any():
        return float("nan")
    order = np.argsort(-ordinary[known])
    total = np.cumsum(drawn[known][order])
    needed = max(1, np.ceil(completeness * total[-1] - 1e-9))
    return float(ordinary[known][order][np.searchsorted(total, needed)])
