"""What goes on the card of a model of several classes: each against all others, and the mean over classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.learning.classes import class_numbers, confusion, macro_f1
from batchproc.learning.evaluate import auc_pr, bootstrap_many

__all__ = ["measure_classes"]


def measure_classes(
    on: str,
    label: NDArray[np.str_],
    scores: NDArray[np.float32],
    *,
    classes: Sequence[str],
    groups: NDArray | None = None,
    resamples: int = 500,
) -> dict[str, Any]:
    """One table of metrics.

    Parameters
    ----------
    on : str
        The images.
    label : ndarray (n,) of str
    scores : ndarray (n, classes)
        NaN where not scored: left out, and counted.
    classes : sequence of str
    groups : ndarray (n,), optional
        Intervals are drawn by these.
    """
    scored = np.isfinite(scores).all(axis=1)
    label, scores = label[scored], scores[scored]
    groups = None if groups is None else groups[scored]
    truth = class_numbers(label, classes)
    answer = scores.argmax(axis=1)

    def values(drawn: NDArray[np.int64]) -> dict[str, float]:
        rows = np.repeat(np.arange(len(truth)), drawn)
        found = {"macro_f1": macro_f1(confusion(truth, answer, len(classes), drawn=drawn))}
        for k, name in enumerate(classes):
            of_class = truth[rows] == k
            one_sided = of_class.all() or not of_class.any()
            found[name] = np.nan if one_sided else auc_pr(of_class, scores[rows, k], prevalence=0.5)
        return found

    found = bootstrap_many(values, truth, groups=groups, resamples=resamples)
    macro = found.pop("macro_f1")
    return {
        "on": on,
        "selection": "each class against all others, at 1:1; macro F1 in the mixture of this sample",
        "n": {name: int((label == name).sum()) for name in classes},
        "n_not_scored": int((~scored).sum()),
        "prevalence": 0.5,
        "intervals": f"95 %, bootstrap by {'group' if groups is not None else 'candidate'}",
        "macro_f1": round(macro.value, 4),
        "macro_f1_interval": [round(macro.low, 4), round(macro.high, 4)],
        "auc_pr": {name: round(value.value, 4) for name, value in found.items()},
        "auc_pr_interval": {name: [round(value.low, 4), round(value.high, 4)] for name, value in found.items()},
    }
