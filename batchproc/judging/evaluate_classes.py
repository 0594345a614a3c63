"""One evaluation of classifiers of several classes = one call: numbers, words and a picture in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batchproc.io.cost import Cost
from batchproc.judging.beside import cost_rows
from batchproc.judging.class_drawing import draw_classes
from batchproc.judging.classes import ClassJudgement, judge_classes
from batchproc.judging.measures import MIXTURES, Plan, worst
from batchproc.judging.outcome import Outcome, carry_out
from batchproc.judging.text import not_shown, say, table
from batchproc.judging.typed import Typed

__all__ = ["ClassEvaluation", "evaluate_classes"]


class ClassEvaluation(Outcome):
    """What was found of each model of several classes; ``judgements`` is a tuple of `ClassJudgement`."""

    def numbers(self, found: ClassJudgement) -> dict[str, Any]:
        """One judgement, for JSON."""
        return found.to_dict()

    def tables(self) -> list[str]:
        """All judgements, in lines for a terminal."""
        lines = [*table(("", "for a mixture of", *(j.name for j in self.judgements)), _overall(self)), ""]
        for found in self.judgements:
            lines += [*_by_class(found, self.plan), *_matrix(found), *_parts(found)]
        return [*lines, self.drawn]


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
    return carry_out(
        candidates,
        out,
        plan or Plan(),
        costs,
        judge=judge_classes,
        warnings=_warnings,
        kind=ClassEvaluation,
        draw=draw_classes,
    )


def _warnings(found: list[ClassJudgement], plan: Plan) -> Iterator[str]:
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
    shown, hidden = worst(found.parts, "macro_f1")
    rows = [
        (part.column, part.name, str(part.n), say(part.values["macro_f1"], 3), say(part.values["accuracy"], 3))
        for part in shown
    ]
    return [
        *table((f"{found.name}: by", "", "candidates", "macro F1", "accuracy"), rows),
        *not_shown(hidden, "macro F1"),
        "",
    ]
