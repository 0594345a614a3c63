"""Every number that is said of a classifier of several classes, with its interval and the mixture it holds for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.judging.measures import MIXTURES, Plan, split_column
from batchproc.judging.typed import Typed
from batchproc.learning.classes import accuracy, confusion, f1, macro_f1, mixed, precision, recall
from batchproc.learning.evaluate import Interval, Ranked, bootstrap_many

__all__ = ["ClassJudgement", "ClassPart", "judge_classes"]


@dataclass(frozen=True)
class ClassPart:
    """Results of one bin of one column; no interval where fewer than two groups are."""

    column: str
    name: str
    n: int
    n_groups: int
    values: dict[str, Interval]


@dataclass(frozen=True)
class ClassJudgement:
    """What is known of the scores of one model.

    Attributes
    ----------
    name : str
    classes : tuple of str
    matrix : ndarray (k, k)
        How many of each class (rows) got the highest score for which (columns); of scored ones.
    lost : ndarray (k,) of int
        Not scored, of each class.
    values : dict
        ``macro_f1 sample`` and ``macro_f1 even`` (as if all classes were as common), ``accuracy sample``.
    by_class : dict of dict
        The same of each class: ``recall``, ``precision sample``, ``precision even``, ``f1 sample``, ``auc_roc``,
        ``others_removed`` at the completeness of the plan, and ``auc_pr`` against all others for each of `MIXTURES`.
    parts : tuple of ClassPart
    truth : ndarray (n,) of int
    scores : ndarray (n, k)
        Those that were scored.
    """

    name: str
    classes: tuple[str, ...]
    matrix: NDArray[np.float64]
    lost: NDArray[np.intp]
    values: dict[str, Interval]
    by_class: dict[str, dict[str, Interval]]
    parts: tuple[ClassPart, ...]
    truth: NDArray[np.intp]
    scores: NDArray[np.float64]

    @property
    def n(self) -> NDArray[np.intp]:
        """Scored ones of each class."""
        return self.matrix.sum(axis=1).astype(np.intp)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; intervals are ``{value, low, high}``."""
        shares = self.n / max(self.n.sum(), 1)
        return {
            "classes": {
                name: {
                    "n": int(self.n[k]),
                    "share": float(shares[k]),
                    "not_scored": int(self.lost[k]),
                    **{key: vars(value) for key, value in self.by_class[name].items()},
                }
                for k, name in enumerate(self.classes)
            },
            "confusion": self.matrix.astype(int).tolist(),
            **{key: vars(value) for key, value in self.values.items()},
            "always_the_commonest": float(shares.max()),
            "parts": [
                {**vars(part), "values": {key: vars(value) for key, value in part.values.items()}}
                for part in self.parts
            ],
        }


def judge_classes(candidates: Typed, name: str, plan: Plan) -> ClassJudgement:
    """Everything about one model.

    Raises
    ------
    ValueError
        Fewer than two classes among the scored ones.
    """
    all_scores, k = candidates.scores[name], len(candidates.classes)
    scored = ~np.isnan(all_scores[:, 0])
    truth, scores = candidates.truth[scored], all_scores[scored]
    n = np.bincount(truth, minlength=k)
    if (n > 0).sum() < 2:
        raise ValueError("expected two classes or more")
    group = None if candidates.group is None else candidates.group[scored]
    answer = scores.argmax(axis=1)
    ranked = {
        i: Ranked(truth == i, scores[:, i])
        for i, of_class in enumerate(candidates.classes)
        if n[i] and of_class in candidates.knows[name]
    }

    def measure(drawn: NDArray[np.int64]) -> dict[str, float]:
        matrix = confusion(truth, answer, k, drawn=drawn)
        even = mixed(matrix, (n > 0) / (n > 0).sum())
        values = {
            "macro_f1 sample": macro_f1(matrix),
            "macro_f1 even": macro_f1(even),
            "accuracy sample": accuracy(matrix),
        }
        columns = (recall(matrix), precision(matrix), precision(even), f1(matrix))
        for i, of_class in enumerate(candidates.classes):
            keys = ("recall", "precision sample", "precision even", "f1 sample")
            of_this = {key: float(column[i]) for key, column in zip(keys, columns, strict=True)}
            of_this |= _ranks(ranked.get(i), drawn, int(drawn[truth == i].sum()), plan)
            values |= {f"{of_class}\n{key}": value for key, value in of_this.items()}
        return values

    overall: dict[str, Interval] = {}
    by_class: dict[str, dict[str, Interval]] = {of_class: {} for of_class in candidates.classes}
    for key, value in bootstrap_many(measure, truth, groups=group, **_drawing(plan)).items():
        of_class, is_of_class, metric = key.partition("\n")
        (by_class[of_class] if is_of_class else overall)[metric or key] = value
    for i, of_class in enumerate(candidates.classes):
        by_class[of_class]["recall"] = by_class[of_class]["recall"].of_rate(int(n[i]), plan.level)
    return ClassJudgement(
        name=name,
        classes=candidates.classes,
        matrix=confusion(truth, answer, k),
        lost=np.bincount(candidates.truth[~scored], minlength=k),
        values=overall,
        by_class=by_class,
        parts=tuple(
            _part(column, part, truth[rows], answer[rows], None if group is None else group[rows], k, plan)
            for column in candidates.parts
            for part, rows in split_column(candidates.parts[column][scored].reset_index(drop=True), plan.parts)
        ),
        truth=truth,
        scores=scores,
    )


def _drawing(plan: Plan) -> dict[str, Any]:
    return {"resamples": plan.resamples, "level": plan.level, "seed": plan.seed}


def _ranks(ranked: Ranked | None, drawn: NDArray[np.int64], n: int, plan: Plan) -> dict[str, float]:
    """What follows from the score of one class alone; NaN where a resample has none of it, or nothing else."""
    keys = [*(f"auc_pr {mix}" for mix in MIXTURES), "auc_roc", "others_removed"]
    if ranked is None or not 0 < n < drawn.sum():
        return dict.fromkeys(keys, np.nan)
    curve = ranked.rates(drawn)
    areas = [curve.auc_pr(share) for share in MIXTURES.values()]
    removed = float(1 - curve.bogus[curve.at_completeness(plan.completeness)])
    return dict(zip(keys, [*areas, curve.auc_roc(), removed], strict=True))


def _part(
    column: str,
    name: str,
    truth: NDArray[np.intp],
    answer: NDArray[np.intp],
    group: NDArray[np.str_] | None,
    k: int,
    plan: Plan,
) -> ClassPart:
    n_groups = len(truth) if group is None else len(np.unique(group))

    def measure(drawn: NDArray[np.int64]) -> dict[str, float]:
        matrix = confusion(truth, answer, k, drawn=drawn)
        return {"macro_f1": macro_f1(matrix), "accuracy": accuracy(matrix)}

    if n_groups > 1 and len(np.unique(truth)) > 1:
        values = bootstrap_many(measure, truth, groups=group, **_drawing(plan))
    else:
        once = measure(np.ones(len(truth), np.int64))
        values = {key: Interval(value, np.nan, np.nan) for key, value in once.items()}
    return ClassPart(column, name, len(truth), n_groups, values)
