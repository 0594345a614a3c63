"""What ``batchproc evaluate classifier`` does: read, measure what models cost, judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from batchproc.io.catalogue import open_catalogue
from batchproc.io.cost import Cost
from batchproc.judging.beside import costs_on_run
from batchproc.judging.candidates import read_candidates
from batchproc.judging.evaluate import Evaluation, evaluate_candidates
from batchproc.judging.evaluate_classes import ClassEvaluation, evaluate_classes
from batchproc.judging.measures import Plan
from batchproc.judging.typed import has_classes, read_typed

__all__ = ["evaluate_scores"]


def evaluate_scores(
    source: str | Path,
    out: str | Path,
    plan: Plan | None = None,
    *,
    truth: str | Path | None = None,
    label: str | None = None,
    scores: Sequence[str] = (),
    group: str | None = None,
    by: Sequence[str] | None = None,
    with_cost: bool = True,
) -> Evaluation | ClassEvaluation:
    """Say how good scores are: of real and bogus, or of several classes where there are any.

    Parameters
    ----------
    source, truth, scores, group, by
        As of `batchproc.judging.candidates.read_candidates`; of several classes, `scores` names models.
    out : path
        Folder of the results.
    plan : Plan, optional
    label : str, optional
        As of `batchproc.judging.typed.read_typed`; with it, or a table that has classes, it is these that are judged.
    with_cost : bool
        Of a run: measure speed and memory of its models too.

    Raises
    ------
    UsageError
        What cannot be evaluated.
    """
    if label is not None or has_classes(source):
        typed = read_typed(source, label=label, truth=truth, models=scores, group=group, by=by)
        costs, notes = _costs(source, typed.scores) if with_cost else ({}, [])
        return evaluate_classes(replace(typed, notes=(*typed.notes, *notes)), out, plan, costs=costs)
    candidates = read_candidates(source, truth=truth, scores=scores, group=group, by=by)
    costs, notes = _costs(source, candidates.scores) if with_cost else ({}, [])
    return evaluate_candidates(replace(candidates, notes=(*candidates.notes, *notes)), out, plan, costs=costs)


def _costs(source: str | Path, scores: Sequence[str] | dict) -> tuple[dict[str, Cost], list[str]]:
    """By the names of scores: those of the models of a run, or of one class of theirs."""
    if not Path(source).is_dir():
        return {}, []
    about = open_catalogue(source, columns=["candidate_id"]).attrs["models"]
    model_of = {
        name: max((m for m in about if name == m or name.startswith(f"{m}_")), key=len, default="") for name in scores
    }
    used = {model: about[model]["hash"] for model in model_of.values() if model}
    found, notes = costs_on_run(source, used)
    return {name: found[model] for name, model in model_of.items() if model in found}, notes
