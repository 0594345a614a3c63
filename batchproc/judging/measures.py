"""Every number that is said of a classifier, with its interval and the mixture of real and bogus that it holds for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.judging.candidates import Candidates
from batchproc.learning.evaluate import Calibration, Interval, Ranked, bootstrap_many, brier, calibration

__all__ = ["MIXTURES", "Judgement", "Part", "Plan", "judge", "split_column", "worst"]

#: Mixtures for which everything that depends on one is said, and their prevalence.
MIXTURES = {"1:1": 1 / 2, "1:100": 1 / 101, "1:10^4": 1 / 10_001}
#: Whole numbers with no more values than this are taken as names.
_NAMES_UP_TO = 8
#: Of names, the most frequent; the rest are one part. But of the columns below each is one of its own.
_MOST_PARTS = 12
_ALL_APART = ("ccd", "filter")
_NO_INTERVAL = (np.nan, np.nan)


@dataclass(frozen=True)
class Plan:
    """How to measure: the completeness to hold, and how the intervals are made."""

    completeness: float = 0.99
    resamples: int = 1000
    level: float = 0.95
    bins: int = 10
    parts: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Part:
    """Results of one bin of one column, at the threshold of the whole sample.

    Attributes
    ----------
    column, name : str
    n_real, n_bogus, n_groups : int
    values : dict
        ``auc_pr 1:1``, ``auc_roc``, ``false_negative_rate``, ``bogus_removed``; NaN where a class that it needs is
        absent, and no interval where fewer than two groups are.
    """

    column: str
    name: str
    n_real: int
    n_bogus: int
    n_groups: int
    values: dict[str, Interval]


@dataclass(frozen=True)
class Judgement:
    """What is known of one score.

    Attributes
    ----------
    name : str
    n_real, n_bogus : int
        Scored ones, on which everything rests.
    lost_real, lost_bogus : int
        Not scored.
    threshold : float
        The highest that keeps the completeness asked for.
    values : dict
        Name, followed by the mixture where it depends on one, → value with interval.
    calibration : dict
        A table for the sample and for each of `MIXTURES`; empty where scores are no probabilities.
    parts : tuple of Part
    real, scores : ndarray
        Those that were scored.
    """

    name: str
    n_real: int
    n_bogus: int
    lost_real: int
    lost_bogus: int
    threshold: float
    values: dict[str, Interval]
    calibration: dict[str, Calibration]
    parts: tuple[Part, ...]
    real: NDArray[np.bool_]
    scores: NDArray[np.float64]

    @property
    def base_rate(self) -> float:
        """Fraction of real ones in the sample."""
        return self.n_real / (self.n_real + self.n_bogus)

    @property
    def total_loss(self) -> float:
        """Fraction of all real ones below the threshold or not scored."""
        missed = self.values["false_negative_rate"].value * self.n_real
        return (missed + self.lost_real) / (self.n_real + self.lost_real)

    def to_dict(self, plan: Plan) -> dict[str, Any]:
        """For JSON; intervals are ``{value, low, high}``."""
        nested: dict[str, Any] = {}
        for key, value in self.values.items():
            name, _, mixture = key.partition(" ")
            if mixture:
                nested.setdefault(name, {})[mixture] = vars(value)
            else:
                nested[name] = vars(value)
        nested["accuracy"] = {**nested["accuracy"], "always_the_commoner": max(self.base_rate, 1 - self.base_rate)}
        return {
            "real": self.n_real,
            "bogus": self.n_bogus,
            "base_rate": self.base_rate,
            "not_scored": {"real": self.lost_real, "bogus": self.lost_bogus},
            "threshold": {"completeness": plan.completeness, "value": self.threshold},
            "false_negative_rate_with_not_scored": self.total_loss,
            "metrics": nested,
            "calibration": {
                mixture: [
                    {
                        "low": float(table.edges[k]),
                        "high": float(table.edges[k + 1]),
                        "n": int(table.n[k]),
                        "share": float(table.share[k]),
                        "score": float(table.score[k]),
                        "real": float(table.real[k]),
                    }
                    for k in range(len(table.n))
                ]
                for mixture, table in self.calibration.items()
            },
            "parts": [
                {**vars(part), "values": {name: vars(value) for name, value in part.values.items()}}
                for part in self.parts
            ],
        }


def judge(candidates: Candidates, name: str, plan: Plan) -> Judgement:
    """Everything about one score of `candidates`.

    Raises
    ------
    ValueError
        Nothing real, or nothing bogus, among the scored ones.
    """
    scored = ~np.isnan(candidates.scores[name])
    real, scores = candidates.real[scored], candidates.scores[name][scored]
    group = None if candidates.group is None else candidates.group[scored]
    ranked = Ranked(real, scores)
    curve = ranked.rates()
    chosen = curve.at_completeness(plan.completeness)
    probabilities = bool(scores.min() >= 0 and scores.max() <= 1)
    mixtures = {"sample": curve.n_real / len(real), **MIXTURES}

    def measure(drawn: NDArray[np.int64]) -> dict[str, float]:
        found = ranked.rates(drawn)
        values = {f"auc_pr {mix}": found.auc_pr(share) for mix, share in mixtures.items()}
        values["auc_roc"] = found.auc_roc()
        again = found.at_completeness(plan.completeness)  # chosen anew, as another sample would have it
        values["threshold_chosen_anew"] = float(found.thresholds[again])
        values["bogus_removed_at_completeness"] = float(1 - found.bogus[again])
        values["recall"], values["false_negative_rate"] = float(found.real[chosen]), float(1 - found.real[chosen])
        values["bogus_removed"] = float(1 - found.bogus[chosen])
        for mix, share in mixtures.items():
            values[f"precision {mix}"] = float(found.precision(share)[chosen])
        share = mixtures["sample"]
        values["accuracy"] = share * values["recall"] + (1 - share) * values["bogus_removed"]
        for mix, share in mixtures.items() if probabilities else ():
            values[f"brier {mix}"] = brier(real, scores, prevalence=share, drawn=drawn)
            table = calibration(real, scores, bins=plan.bins, prevalence=share, drawn=drawn)
            values[f"calibration_error {mix}"] = table.error
        return values

    lost = candidates.real[~scored]
    return Judgement(
        name=name,
        n_real=curve.n_real,
        n_bogus=curve.n_bogus,
        lost_real=int(lost.sum()),
        lost_bogus=int((~lost).sum()),
        threshold=float(curve.thresholds[chosen]),
        values=_rates_bounded(
            bootstrap_many(measure, real, groups=group, **_drawing(plan)), curve.n_real, curve.n_bogus, plan.level
        ),
        calibration={
            mix: calibration(real, scores, bins=plan.bins, prevalence=share) for mix, share in mixtures.items()
        }
        if probabilities
        else {},
        parts=tuple(
            _part(column, part, rows, real, scores, group, float(curve.thresholds[chosen]), plan)
            for column in candidates.parts
            for part, rows in split_column(candidates.parts[column][scored].reset_index(drop=True), plan.parts)
        ),
        real=real,
        scores=scores,
    )


def _drawing(plan: Plan) -> dict[str, Any]:
    return {"resamples": plan.resamples, "level": plan.level, "seed": plan.seed}


def _part(
    column: str,
    name: str,
    rows: NDArray[np.intp],
    all_real: NDArray[np.bool_],
    all_scores: NDArray[np.float64],
    all_groups: NDArray[np.str_] | None,
    threshold: float,
    plan: Plan,
) -> Part:
    real, scores = all_real[rows], all_scores[rows]
    group = None if all_groups is None else all_groups[rows]
    n_groups = len(rows) if group is None else len(np.unique(group))
    both = bool(real.any() and not real.all())
    ranked = Ranked(real, scores) if both else None
    below = scores < threshold

    def measure(drawn: NDArray[np.int64]) -> dict[str, float]:
        curve = None if ranked is None else ranked.rates(drawn)
        n_real, n_bogus = drawn[real].sum(), drawn[~real].sum()
        return {
            "auc_pr 1:1": np.nan if curve is None else curve.auc_pr(MIXTURES["1:1"]),
            "auc_roc": np.nan if curve is None else curve.auc_roc(),
            "false_negative_rate": float(drawn[real & below].sum() / n_real) if n_real else np.nan,
            "bogus_removed": float(drawn[~real & below].sum() / n_bogus) if n_bogus else np.nan,
        }

    if n_groups > 1:
        values = bootstrap_many(measure, real, groups=group, **_drawing(plan))
    else:
        once = measure(np.ones(len(rows), np.int64))
        values = {key: Interval(value, *_NO_INTERVAL) for key, value in once.items()}
    if n_groups > 1:
        values = _rates_bounded(values, int(real.sum()), int((~real).sum()), plan.level)
    return Part(column, name, int(real.sum()), int((~real).sum()), n_groups, values)


def _rates_bounded(values: dict[str, Interval], n_real: int, n_bogus: int, level: float) -> dict[str, Interval]:
    n = {"recall": n_real, "false_negative_rate": n_real, "bogus_removed": n_bogus}
    return {key: value.of_rate(n[key], level) if key in n else value for key, value in values.items()}


class _AnyPart(Protocol):
    @property
    def column(self) -> str: ...

    @property
    def values(self) -> dict[str, Interval]: ...


P = TypeVar("P", bound=_AnyPart)


def worst(parts: Sequence[P], key: str, most: int = _MOST_PARTS) -> tuple[list[P], dict[str, int]]:
    """Of each column those that do worst by a value, in the order that they have; and how many of it are left out.

    What has no value comes last. Columns of no more than `most` parts are there whole.
    """
    shown: list[P] = []
    hidden: dict[str, int] = {}
    for column in dict.fromkeys(part.column for part in parts):
        here = [part for part in parts if part.column == column]
        value = [part.values[key].value for part in here]
        order = np.argsort(value, kind="stable")  # NaN is last
        shown += [here[k] for k in sorted(order[:most])]
        if len(here) > most:
            hidden[column] = len(here) - most
    return shown, hidden


def split_column(column: pd.Series, parts: int) -> list[tuple[str, NDArray[np.intp]]]:
    """Parts of a column with their rows: quantile bins of numbers, otherwise values; what has no value comes last."""
    absent = column.isna().to_numpy() | (column.astype(object) == "").to_numpy()
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    if numeric:
        absent |= ~np.isfinite(column.to_numpy(dtype=np.float64, na_value=np.nan))
    present = column[~absent]
    found: list[tuple[str, NDArray[np.intp]]] = []
    whole = numeric and bool((present % 1 == 0).all())
    names = (present.nunique() <= _NAMES_UP_TO or column.name == "ccd") if whole else present.nunique() < 2
    if numeric and not names:
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        edges = np.unique(np.quantile(values[~absent], np.linspace(0, 1, parts + 1)))
        which = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
        said = _apart(edges)
        for k in range(len(edges) - 1):
            rows = np.flatnonzero((which == k) & ~absent)
            if len(rows):
                found.append((f"{said[k]} to {said[k + 1]}", rows))
    else:
        frequent = list(present.value_counts().index)
        most = len(frequent) if column.name in _ALL_APART else _MOST_PARTS
        for value in sorted(frequent[:most], key=lambda v: (isinstance(v, str), v)):
            found.append((str(value), np.flatnonzero((column == value).to_numpy(dtype=bool, na_value=False))))
        if frequent[most:]:
            rest = column.isin(frequent[most:]).to_numpy()
            found.append((f"{len(frequent) - most} others", np.flatnonzero(rest)))
    if absent.any():
        found.append(("no value", np.flatnonzero(absent)))
    return found


def _apart(edges: NDArray[np.float64]) -> list[str]:
    """Numbers with as few digits as keep them apart, three or more."""
    for digits in range(3, 17):
        words = [f"{edge:.{digits}g}" for edge in edges]
        if len(set(words)) == len(words) and not any("e" in word for word in words):
            return words
    return [str(edge) for edge in edges]
