"""What goes on the card: metrics on images that a model has not seen, each with its interval and its prevalence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.learning.evaluate import (
    Interval,
    auc_pr,
    auc_roc,
    bogus_removed,
    bootstrap,
    precision,
    recall,
    threshold_for_completeness,
)

__all__ = ["measure"]


def measure(
    on: str,
    selection: str,
    real: NDArray[np.bool_],
    scores: NDArray[np.float32],
    *,
    threshold: float,
    groups: NDArray | None = None,
    resamples: int = 500,
) -> dict[str, Any]:
    """One table of metrics.

    Parameters
    ----------
    on, selection : str
        The images, and what counts as real and as bogus on them.
    real : ndarray (n,) bool
    scores : ndarray (n,)
        NaN where not scored: left out, and counted; in ``completeness_of_all`` the real ones count as lost.
    threshold : float
        That of the model.
    groups : ndarray (n,), optional
        Intervals are drawn by these.
    """
    scored = np.isfinite(scores)
    n_unscored = int((~scored).sum())
    every_score = np.where(scored, scores, -np.inf)  # what has none is kept at no threshold
    of_all = bootstrap(lambda r, s: recall(r, s, threshold), real, every_score, groups=groups, resamples=resamples)
    real, scores = real[scored], scores[scored]
    groups = None if groups is None else groups[scored]

    def interval(metric: Any) -> Interval:
        return bootstrap(metric, real, scores, groups=groups, resamples=resamples)

    def removed_at_99(r: NDArray, s: NDArray) -> float:
        return bogus_removed(r, s, threshold_for_completeness(r, s, 0.99))

    found = {
        "auc_pr": interval(lambda r, s: auc_pr(r, s, prevalence=0.5)),
        "auc_roc": interval(auc_roc),
        "bogus_removed_at_99_completeness": interval(removed_at_99),
        "completeness": interval(lambda r, s: recall(r, s, threshold)),
        "completeness_of_all": of_all,
        "bogus_removed": interval(lambda r, s: bogus_removed(r, s, threshold)),
    }
    table: dict[str, Any] = {
        "on": on,
        "selection": selection,
        "n_real": int(real.sum()),
        "n_bogus": int((~real).sum()),
        "n_not_scored": n_unscored,
        "n_groups": len(real) if groups is None else len(np.unique(groups)),
        "prevalence": 0.5,
        "threshold": threshold,
        "intervals": f"95 %, bootstrap by {'region' if groups is not None else 'candidate'}",
    }
    for name, value in found.items():
        table[name] = round(value.value, 4)
        table[f"{name}_interval"] = [round(value.low, 4), round(value.high, 4)]
    for odds in (100, 10_000):
        table[f"precision_at_1_to_{odds}"] = round(precision(real, scores, threshold, prevalence=1 / (1 + odds)), 4)
    return table
