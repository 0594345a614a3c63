"""One evaluation of classifiers = one call: numbers, words and a picture in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from batchproc.io.cost import Cost
from batchproc.judging.beside import cost_rows
from batchproc.judging.candidates import Candidates
from batchproc.judging.drawing import draw
from batchproc.judging.measures import MIXTURES, Judgement, Plan, judge, worst
from batchproc.judging.outcome import Outcome, carry_out
from batchproc.judging.text import not_shown, say, table

__all__ = ["Evaluation", "evaluate_candidates"]


class Evaluation(Outcome):
    """What was found of each score of real and bogus; ``judgements`` is a tuple of `Judgement`."""

    def numbers(self, found: Judgement) -> dict[str, Any]:
        """One judgement, for JSON."""
        return found.to_dict(self.plan)

    def tables(self) -> list[str]:
        """All judgements, in lines for a terminal."""
        lines = [*table(("", "for real:bogus of", *(j.name for j in self.judgements)), _rows(self)), ""]
        lines += [line for found in self.judgements for line in _calibration(found)]
        lines += [line for found in self.judgements for line in _parts(found)]
        return [*lines, f"{self.drawn}; the threshold was chosen on these same candidates"]


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
    return carry_out(
        candidates, out, plan or Plan(), costs, judge=judge, warnings=_warnings, kind=Evaluation, draw=draw
    )


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
    shown, hidden = worst(found.parts, "auc_pr 1:1")
    for part in shown:
        numbers = (say(part.values[key], 3) for key in keys)
        rows.append((part.column, part.name, f"{part.n_real}, {part.n_bogus}", *numbers))
    return [*table(head, rows), *not_shown(hidden, "AUC-PR"), ""]
