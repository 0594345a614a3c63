"""What every evaluation does and gives, whatever is asked of the scores: judge each, write numbers and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from batchproc.completeness.verdicts import finite
from batchproc.errors import UsageError
from batchproc.io.atomic import write_bytes, write_text
from batchproc.io.cost import Cost
from batchproc.judging.beside import ENOUGH_GROUPS, bootstrap_words, check_groups, how
from batchproc.judging.measures import MIXTURES, Plan

__all__ = ["Outcome", "carry_out"]

Kind = TypeVar("Kind", bound="Outcome")


@dataclass(frozen=True)
class Outcome:
    """What was found of each score, how, and where it was written.

    Attributes
    ----------
    plan : Plan
    judgements : tuple
    group : str
        What was drawn as a whole; "none" for single candidates.
    n_groups : int
    notes : tuple of str
    files : tuple of Path
    costs : mapping
        Name of a model → what it costs, where that was measured.
    """

    plan: Plan
    judgements: tuple[Any, ...]
    group: str
    n_groups: int
    notes: tuple[str, ...]
    files: tuple[Path, ...]
    costs: Mapping[str, Cost] = field(default_factory=dict)

    def numbers(self, found: Any) -> dict[str, Any]:
        """One judgement, for JSON."""
        raise NotImplementedError

    def tables(self) -> list[str]:
        """All judgements, in lines for a terminal; the last one begins with how intervals were made (`drawn`)."""
        raise NotImplementedError

    @property
    def drawn(self) -> str:
        """How intervals were made."""
        return bootstrap_words(self.plan, self.group, self.n_groups)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: no NaN, which JSON does not have."""
        document = {
            "prevalences": MIXTURES,
            "bootstrap": how(self.plan, self.group, self.n_groups),
            "notes": list(self.notes),
            "scores": {
                found.name: self.numbers(found) | {"cost": vars(cost) if (cost := self.costs.get(found.name)) else None}
                for found in self.judgements
            },
        }
        plain: dict[str, Any] = finite(document)
        return plain

    def text(self) -> str:
        """Tables for a terminal."""
        notes = [f"note: {note}" for note in self.notes]
        files = f"in {self.files[0].parent}: {', '.join(path.name for path in self.files)}"
        return "\n".join([*self.tables(), *notes, files])


def carry_out(
    candidates: Any,
    out: str | Path,
    plan: Plan,
    costs: Mapping[str, Cost] | None,
    *,
    judge: Callable[[Any, str, Plan], Any],
    warnings: Callable[[list[Any], Plan], Iterable[str]],
    kind: type[Kind],
    draw: Callable[[tuple[Any, ...]], bytes],
) -> Kind:
    """Judge every score of `candidates` and write ``metrics.json`` and ``classifier.png``.

    Parameters
    ----------
    candidates : Candidates or Typed
    out : path
        A folder, made where it is missing, before anything is computed.
    plan : Plan
    costs : mapping, optional
        What models cost, by the names of their scores.
    judge, warnings, draw : callable
        One score → its judgement; what is to be said of all judgements; their picture.
    kind : type
        Of the result.

    Raises
    ------
    UsageError
        A score that cannot be judged, or there is one group only.
    OSError
        The folder cannot be made.
    """
    scores: Mapping[str, NDArray] = candidates.scores
    n = len(next(iter(scores.values()), ()))
    n_groups = check_groups(candidates.group, candidates.group_name, n)
    Path(out).mkdir(parents=True, exist_ok=True)
    found = []
    for name, values in scores.items():
        try:
            found.append(judge(candidates, name, plan))
        except ValueError as error:
            scored = int((~np.isnan(values.reshape(n, -1)[:, 0])).sum())
            raise UsageError(f"{name}: {scored} of {n} candidates scored; {error}") from error
    notes = [*candidates.notes, *warnings(found, plan)]
    if n_groups < ENOUGH_GROUPS:
        notes.append(f"{n_groups} groups are few: intervals from fewer than {ENOUGH_GROUPS} are too narrow")
    files = (Path(out) / "metrics.json", Path(out) / "classifier.png")
    result = kind(plan, tuple(found), candidates.group_name, n_groups, tuple(notes), files, dict(costs or {}))
    write_text(files[0], json.dumps(result.to_dict(), indent=1) + "\n")
    write_bytes(files[1], draw(result.judgements))
    return result
