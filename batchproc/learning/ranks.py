"""Where candidates stand in a list that is looked at from the highest score down."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ahead", "expected_rank", "weighted_median"]


def ahead(scores: ArrayLike, others: ArrayLike, *, drawn: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """Fraction of the others that is looked at before each candidate: of those that score as high or higher.

    Equivalent to ``[(others >= score).mean() for score in scores]``. Equal scores count as ahead, for nobody knows in
    which order they come. A candidate that is not scored (NaN) comes last: 1. Others that are not scored are behind all
    that are.

    Parameters
    ----------
    scores : array_like (n,)
    others : array_like (m,)
    drawn : ndarray (m,) of int, optional
        How often each of the others counts; once by default.
    """
    values, rest = np.asarray(scores, np.float64), np.asarray(others, np.float64)
    if not len(rest):
        return np.full(len(values), np.nan)
    order = np.argsort(np.nan_to_num(rest, nan=-np.inf))
    count = np.ones(len(rest)) if drawn is None else drawn[order].astype(np.float64)
    below = np.concatenate([[0.0], np.cumsum(count)])
    place = np.searchsorted(np.nan_to_num(rest, nan=-np.inf)[order], values, side="left")
    with np.errstate(invalid="ignore"):  # none of them drawn
        fraction = 1 - below[place] / below[-1]
    return np.where(np.isnan(values), 1.0, fraction)


def expected_rank(fraction: ArrayLike, n: float) -> NDArray[np.float64]:
    """Place, from 1, of a candidate that this fraction of `n` others is ahead of: ``1 + n · fraction``."""
    return np.asarray(1 + n * np.asarray(fraction, np.float64))


def weighted_median(values: ArrayLike, weights: ArrayLike) -> float:
    """The smallest value at or below which half of the weight lies; NaN without any weight."""
    numbers, weight = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    order = np.argsort(numbers)
    total = np.cumsum(weight[order])
    if not len(total) or total[-1] <= 0:
        return float("nan")
    return float(numbers[order][np.searchsorted(total, total[-1] / 2)])
