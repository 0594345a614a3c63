"""One evaluation of classifiers = one call: numbers, words and a picture in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from batchproc.completeness.verdicts import finite
from batchproc.errors import UsageError
from batchproc.io.atomic import write_bytes, write_text
from batchproc.io.cost import Cost
from batchproc.judging.beside import ENOUGH_GROUPS, bootstrap_words, check_groups, cost_rows, how
from batchproc.judging.candidates import Candidates
from batchproc.judging.drawing import draw
from batchproc.judging.measures import MIXTURES, Judgement, Plan, judge
from batchproc.judging.text import say, table

__all__ = ["Evaluation", "evaluate_candidates"]


@dataclass(frozen=True)
class Evaluation:
    """What was found of each score, how, and where it was written.

    Attributes
    ----------
    plan : Plan
    judgements : tuple of Judgement
    group : str
        What was drawn as a whole; "none" for single candidates.
    n_groups : int
    notes : tuple of str
    files : tuple of Path
    costs : mapping
        Name of a model → what it costs, where that was measured.
    """

    plan: Plan
    judgements: tuple[Judgement, ...]
    group: str
    n_groups: int
    notes: tuple[str, ...]
    files: tuple[Path, ...]
    costs: Mapping[str, Cost] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        document = {
            "prevalences": MIXTURES,
            "bootstrap": how(self.plan, self.group, self.n_groups),
            "notes": list(self.notes),
            "scores": {
                found.name: found.to_dict(self.plan)
                | {"cost": vars(cost) if (cost := self.costs.get(found.name)) else None}
                for found in self.judgements
            },
        }
        plain: dict[str, Any] = finite(document)
        return plain

    def text(self) -> str:
        """Tables for a terminal."""
        lines = [*table(("", "for real:bogus of", *(j.name for j in self.judgements)), _rows(self)), ""]
        lines += [line for found in self.judgements for line in _calibration(found)]
        lines += [line for found in self.judgements for line in _parts(found)]
        drawn = bootstrap_words(self.plan, self.group, self.n_groups)
        lines.append(f"{drawn}; the threshold was chosen on these same candidates")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"in {self.files[0].parent}: {', '.join(path.name for path in self.files)}"])


def evaluate_candidates(
    candidates: Candidates, out: str | Path, plan: Plan | None = None, *, costs: Mapping[str, Cost] | None = None
) -> Evaluation:
    """Judge every score of `candidates`.

    Parameters
    ----------
    candidates : Candidates
    out : path
        A folder, made where it is missing: ``metrics.json`` (every number) and ``classifier.png``.
    plan : Plan, optional
    costs : mapping, optional
        What models cost, by the names of their scores.

    Raises
    ------
    UsageError
        Nothing real or nothing bogus was scored, or there is one group only.
    OSError
        The folder cannot be made; before anything is computed.
    """
    plan = Plan() if plan is None else plan
    n_groups = check_groups(candidates.group, candidates.group_name, len(candidates.real))
    Path(out).mkdir(parents=True, exist_ok=True)
    found = []
    for name in candidates.scores:
        try:
            found.append(judge(candidates, name, plan))
        except ValueError as error:
            scored = int((~np.isnan(candidates.scores[name])).sum())
            raise UsageError(f"{name}: {scored} of {len(candidates.real)} candidates scored; {error}") from error
    notes = [*candidates.notes, *_warnings(found, plan)]
    if n_groups < ENOUGH_GROUPS:
        notes.append(f"{n_groups} groups are few: intervals from fewer than {ENOUGH_GROUPS} are too narrow")
    files = (Path(out) / "metrics.json", Path(out) / "classifier.png")
    group = candidates.group_name
    result = Evaluation(plan, tuple(found), group, n_groups, tuple(notes), files, dict(costs or {}))
    write_text(files[0], json.dumps(result.to_dict(), indent=1) + "\n")
    write_bytes(files[1], draw(result.judgements))
    return result


def _warnings(found: Sequence[Judgement], plan: Plan) -> Iterator[str]:
    for one in found:
        if not one.calibration:
            yield f"{one.name}: scores beyond 0 to 1 are no probabilities: no Brier score, no calibration"
        lost = one.lost_real + one.lost_bogus
        if lost:
            yield f"{one.name}: the {lost} not scored are in no number but the loss that names them"
        allowed = (1 - plan.completeness) * one.n_real
        if allowed < 5:
            yield (
                f"{one.name}: {plan.completeness:.4g} of {one.n_real} real ones leaves {allowed:.3g} to be missed: "
                "the threshold rests on a handful"
            )
        if one.n_bogus < 1e4:
            yield (
                f"{one.name}: {one.n_bogus} bogus ones measure no false-positive rate below {1 / one.n_bogus:.2g}: "
                "what is said of 1:10^4 is reached by extrapolation"
            )
    if len({(one.n_real, one.n_bogus) for one in found}) > 1:
        yield "scores are compared on what each has scored, which are not the same candidates"


def _rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Metric, what it holds for, and its value of each score."""
    found, completeness = evaluation.judgements, evaluation.plan.completeness

    def row(label: str, mixture: str, key: str) -> tuple[str, ...]:
        return label, mixture, *(say(j.values.get(key)) for j in found)

    def plain(label: str, cells: Sequence[str]) -> tuple[str, ...]:
        return label, "", *cells

    rows = [row("AUC-PR" if mix == "1:1" else "", mix, f"auc_pr {mix}") for mix in MIXTURES]
    rows.append(row("ROC AUC", "any", "auc_roc"))
    rows.append(row(f"bogus removed, {completeness:.4g} complete", "any", "bogus_removed_at_completeness"))
    rows.append(plain("threshold for that", [f"{j.threshold:.6g}" for j in found]))
    rows.append(row("  there: recall", "any", "recall"))
    rows.append(row("  false negatives", "any", "false_negative_rate"))
    rows.append(row("  bogus removed", "any", "bogus_removed"))
    rows += [row("  precision" if mix == "1:1" else "", mix, f"precision {mix}") for mix in MIXTURES]
    rows.append(row("  accuracy", "this sample", "accuracy"))
    rows.append(plain("    always the commoner", [f"{max(j.base_rate, 1 - j.base_rate):.4f}" for j in found]))
    for key, label in (("brier", "Brier score"), ("calibration_error", "calibration error")):
        rows += [row(label if mix == "1:1" else "", mix, f"{key} {mix}") for mix in MIXTURES]
        rows.append(row("", "this sample", f"{key} sample"))
    rows.append(plain("real, bogus", [f"{j.n_real}, {j.n_bogus}" for j in found]))
    rows.append(plain("base rate of real", [f"{j.base_rate:.4g}" for j in found]))
    rows.append(plain("not scored: real, bogus", [f"{j.lost_real}, {j.lost_bogus}" for j in found]))
    rows.append(plain("real lost, not scored included", [f"{j.total_loss:.4f}" for j in found]))
    return [*rows, *cost_rows([j.name for j in found], evaluation.costs)]


def _calibration(found: Judgement) -> list[str]:
    if not found.calibration:
        return []
    sample, even = found.calibration["sample"], found.calibration["1:1"]
    head = (f"{found.name}: score", "n", "mean score", "is real, this sample", "is real, 1:1")
    rows = [
        (
            f"{sample.edges[k]:.2g} to {sample.edges[k + 1]:.2g}",
            str(sample.n[k]),
            f"{sample.score[k]:.4f}",
            f"{sample.real[k]:.4f}",
            f"{even.real[k]:.4f}",
        )
        for k in range(len(sample.n))
        if sample.n[k]
    ]
    return [*table(head, rows), ""]


def _parts(found: Judgement) -> list[str]:
    if not found.parts:
        return []
    head = (f"{found.name}: by", "", "real, bogus", "AUC-PR 1:1", "false negatives", "bogus removed")
    keys = ("auc_pr 1:1", "false_negative_rate", "bogus_removed")
    rows = []
    for part in found.parts:
        numbers = (say(part.values[key], 3) for key in keys)
        rows.append((part.column, part.name, f"{part.n_real}, {part.n_bogus}", *numbers))
    return [*table(head, rows), ""]
