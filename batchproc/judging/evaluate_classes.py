"""One evaluation of classifiers of several classes = one call: numbers, words and a picture in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from batchproc.completeness.verdicts import finite
from batchproc.errors import UsageError
from batchproc.io.atomic import write_bytes, write_text
from batchproc.io.cost import Cost
from batchproc.judging.beside import ENOUGH_GROUPS, bootstrap_words, check_groups, cost_rows, how
from batchproc.judging.class_drawing import draw_classes
from batchproc.judging.classes import ClassJudgement, judge_classes
from batchproc.judging.measures import MIXTURES, Plan
from batchproc.judging.text import say, table
from batchproc.judging.typed import Typed

__all__ = ["ClassEvaluation", "evaluate_classes"]


@dataclass(frozen=True)
class ClassEvaluation:
    """What was found of each model, how, and where it was written.

    Attributes
    ----------
    plan, group, n_groups, notes, files, costs
        As of `batchproc.judging.evaluate.Evaluation`.
    judgements : tuple of ClassJudgement
    """

    plan: Plan
    judgements: tuple[ClassJudgement, ...]
    group: str
    n_groups: int
    notes: tuple[str, ...]
    files: tuple[Path, ...]
    costs: Mapping[str, Cost] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: no NaN, which JSON does not have."""
        document = {
            "prevalences": MIXTURES,
            "bootstrap": how(self.plan, self.group, self.n_groups),
            "notes": list(self.notes),
            "scores": {
                found.name: found.to_dict() | {"cost": vars(cost) if (cost := self.costs.get(found.name)) else None}
                for found in self.judgements
            },
        }
        plain: dict[str, Any] = finite(document)
        return plain

    def text(self) -> str:
        """Tables for a terminal."""
        lines = [*table(("", "for a mixture of", *(j.name for j in self.judgements)), _overall(self)), ""]
        for found in self.judgements:
            lines += [*_by_class(found, self.plan), *_matrix(found), *_parts(found)]
        lines.append(bootstrap_words(self.plan, self.group, self.n_groups))
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"in {self.files[0].parent}: {', '.join(path.name for path in self.files)}"])


def evaluate_classes(
    candidates: Typed, out: str | Path, plan: Plan | None = None, *, costs: Mapping[str, Cost] | None = None
) -> ClassEvaluation:
    """Judge every model of `candidates`.

    Parameters
    ----------
    candidates : Typed
    out : path
        A folder, made where it is missing: ``metrics.json`` (every number) and ``classifier.png``.
    plan : Plan, optional
    costs : mapping, optional
        What models cost, by their names.

    Raises
    ------
    UsageError
        Fewer than two classes were scored, or there is one group only.
    OSError
        The folder cannot be made; before anything is computed.
    """
    plan = Plan() if plan is None else plan
    n_groups = check_groups(candidates.group, candidates.group_name, len(candidates.truth))
    Path(out).mkdir(parents=True, exist_ok=True)
    found = []
    for name in candidates.scores:
        try:
            found.append(judge_classes(candidates, name, plan))
        except ValueError as error:
            scored = int((~np.isnan(candidates.scores[name][:, 0])).sum())
            raise UsageError(f"{name}: {scored} of {len(candidates.truth)} candidates scored; {error}") from error
    notes = [*candidates.notes, *_warnings(found)]
    if n_groups < ENOUGH_GROUPS:
        notes.append(f"{n_groups} groups are few: intervals from fewer than {ENOUGH_GROUPS} are too narrow")
    files = (Path(out) / "metrics.json", Path(out) / "classifier.png")
    group = candidates.group_name
    result = ClassEvaluation(plan, tuple(found), group, n_groups, tuple(notes), files, dict(costs or {}))
    write_text(files[0], json.dumps(result.to_dict(), indent=1) + "\n")
    write_bytes(files[1], draw_classes(result.judgements))
    return result


def _warnings(found: list[ClassJudgement]) -> Iterator[str]:
    for one in found:
        if one.lost.sum():
            told = ", ".join(f"{n} {name}" for name, n in zip(one.classes, one.lost, strict=True) if n)
            yield f"{one.name}: not scored, and in no number: {told}"
        few = [f"{name} ({n})" for name, n in zip(one.classes, one.n, strict=True) if 0 < n < 30]
        if few:
            yield f"{one.name}: few of {', '.join(few)}: what is said of them is rough"
    if len({tuple(one.n) for one in found}) > 1:
        yield "models are compared on what each has scored, which are not the same candidates"


def _overall(evaluation: ClassEvaluation) -> list[tuple[str, ...]]:
    found = evaluation.judgements
    return [
        ("macro F1", "this sample", *(say(j.values["macro_f1 sample"]) for j in found)),
        ("", "classes 1:1", *(say(j.values["macro_f1 even"]) for j in found)),
        ("accuracy", "this sample", *(say(j.values["accuracy sample"]) for j in found)),
        ("  always the commonest", "this sample", *(f"{j.n.max() / j.n.sum():.4f}" for j in found)),
        ("scored, not scored", "", *(f"{j.n.sum()}, {j.lost.sum()}" for j in found)),
        *cost_rows([j.name for j in found], evaluation.costs),
    ]


def _by_class(found: ClassJudgement, plan: Plan) -> list[str]:
    """A column a class: there are fewer classes than numbers."""
    complete = f"others removed, {plan.completeness:.4g} complete"
    keys = [
        ("AUC-PR against all others", "1:1", "auc_pr 1:1"),
        *(("", mix, f"auc_pr {mix}") for mix in MIXTURES if mix != "1:1"),
        ("ROC AUC", "any", "auc_roc"),
        (complete, "any", "others_removed"),
        ("recall of the answer", "any", "recall"),
        ("its precision", "this sample", "precision sample"),
        ("", "classes 1:1", "precision even"),
        ("its F1", "this sample", "f1 sample"),
    ]
    rows = [
        (label, mixture, *(say(found.by_class[name][key], 3) for name in found.classes)) for label, mixture, key in keys
    ]
    share = found.n / found.n.sum()
    rows.append(("candidates (share)", "", *(f"{n} ({part:.3g})" for n, part in zip(found.n, share, strict=True))))
    return [*table((found.name, "for", *found.classes), rows), ""]


def _matrix(found: ClassJudgement) -> list[str]:
    rows = [
        (name, *(str(int(value)) for value in found.matrix[k]), str(found.lost[k]))
        for k, name in enumerate(found.classes)
        if found.n[k] or found.lost[k]
    ]
    return [*table((f"{found.name}: is, taken for", *found.classes, "not scored"), rows), ""]


def _parts(found: ClassJudgement) -> list[str]:
    if not found.parts:
        return []
    rows = [
        (part.column, part.name, str(part.n), say(part.values["macro_f1"], 3), say(part.values["accuracy"], 3))
        for part in found.parts
    ]
    return [*table((f"{found.name}: by", "", "candidates", "macro F1", "accuracy"), rows), ""]
