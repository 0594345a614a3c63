"""What retrospective searches found: numbers, words and a picture in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from batchproc.completeness.verdicts import finite
from batchproc.io.atomic import replacing, write_bytes, write_text
from batchproc.judging.beside import ENOUGH_GROUPS
from batchproc.judging.measures import Plan
from batchproc.judging.rank_drawing import draw_searches
from batchproc.judging.ranking import ODDS, Ranking
from batchproc.judging.text import say, table
from batchproc.learning.evaluate import Interval
from batchproc.learning.ranks import expected_rank

__all__ = ["Search", "Searches", "write_searches"]

#: Where so few were left out, each has a row.
_ROWS = 20


@dataclass(frozen=True)
class Search:
    """One search.

    Attributes
    ----------
    name : str
        What was left out: ``COLUMN=VALUE``.
    score : str
        What the candidates are ranked by.
    ranking : Ranking
        Of all that was left out, in the eyes of the model that knows nothing of it.
    known : Ranking or None
        Of those of it in the test part, in the eyes of a model that has learnt from the others of its kind; None where
        there are no such, or none to learn from.
    table : DataFrame
        One row each: what it is, score, place, fraction of the bogus ones ahead of it.
    n_learnt : dict
        Class → how many were learnt from.
    n_beside : int
        Left out as well, for they lie where it lies, or are of the same object.
    model_folder : Path
    """

    name: str
    score: str
    ranking: Ranking
    known: Ranking | None
    table: pd.DataFrame
    n_learnt: dict[str, int]
    n_beside: int
    model_folder: Path


@dataclass(frozen=True)
class Searches:
    """Some searches, how they were judged, and where that was written.

    Attributes
    ----------
    plan : Plan
    found : tuple of Search
    notes : tuple of str
    files : tuple of Path
    """

    plan: Plan
    found: tuple[Search, ...]
    notes: tuple[str, ...]
    files: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        document = {
            "completeness": self.plan.completeness,
            "bootstrap": {"resamples": self.plan.resamples, "level": self.plan.level, "seed": self.plan.seed},
            "notes": list(self.notes),
            "searches": {
                one.name: {
                    "ranked_by": one.score,
                    "learnt": one.n_learnt,
                    "left_out_beside": one.n_beside,
                    "model": str(one.model_folder),
                    "never_seen": one.ranking.to_dict(),
                    "known": None if one.known is None else one.known.to_dict(),
                }
                for one in self.found
            },
        }
        plain: dict[str, Any] = finite(document)
        return plain

    def text(self) -> str:
        """Tables for a terminal."""
        places = (f"place at {ODDS[odds]}" for odds in ODDS)
        head = ("left out", "number", "of the median: bogus ahead", *places, "above threshold", "ROC AUC")
        rows = [row for one in self.found for row in _rows(one)]
        lines = [*table(head, rows), ""]
        for one in self.found:
            if len(one.table) <= _ROWS:
                lines += [*_each(one), ""]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"in {self.files[0].parent}: {', '.join(path.name for path in self.files)}"])


def write_searches(found: Sequence[Search], out: str | Path, plan: Plan, notes: Sequence[str] = ()) -> Searches:
    """Write ``retrospective.json``, ``ranks.parquet`` (a row for each that was left out) and ``retrospective.png``."""
    folder = Path(out)
    files = tuple(folder / name for name in ("retrospective.json", "ranks.parquet", "retrospective.png"))
    result = Searches(plan, tuple(found), (*notes, *_notes(found, plan)), files)
    write_text(files[0], json.dumps(result.to_dict(), indent=1) + "\n")
    ranks = pd.concat([one.table.assign(left_out=one.name) for one in found], ignore_index=True)
    with replacing(files[1]) as temporary:
        ranks.to_parquet(temporary, index=False)
    write_bytes(files[2], draw_searches([(one.name, one.ranking, one.known) for one in found]))
    return result


def _notes(found: Sequence[Search], plan: Plan) -> Iterator[str]:
    first = found[0].ranking.scored
    yield f"ranked by {'; '.join(dict.fromkeys(one.score for one in found))}"
    yield (
        f"the threshold keeps {plan.completeness:.4g} of the ordinary real ones of the test part "
        f"({len(first.ordinary)} real, {len(first.bogus)} bogus there)"
    )
    rarest = max(ODDS)
    if len(first.bogus) < rarest:
        yield (
            f"{len(first.bogus)} bogus ones tell nothing finer than 1 in {len(first.bogus)}: "
            f"the place at {ODDS[rarest]} is reached by extrapolation"
        )
    if first.groups is not None:
        n = len(np.unique(np.concatenate(first.groups)))
        yield f"intervals: {plan.level:.0%} of {plan.resamples} resamples of {n} groups" + (
            f", which are few: they are too narrow with fewer than {ENOUGH_GROUPS}" if n < ENOUGH_GROUPS else ""
        )
    for one in found:
        lost = int(np.isnan(one.ranking.scored.left_out).sum())
        if lost:
            yield f"{one.name}: {lost} of {len(one.table)} cannot be scored, and rank last"
        if one.n_beside:
            yield f"{one.name}: {one.n_beside} other candidates of the same places or objects were not learnt from"


def _rows(one: Search) -> Iterator[tuple[str, ...]]:
    yield (f"{one.name}, never seen", *_cells(one.ranking, ""))
    if one.known is not None:
        yield ("  others of it known", *_cells(one.known, ""))
    if len(one.ranking.scored.ordinary):
        yield ("  ordinary real ones", *_cells(one.ranking, "ordinary_"))


def _cells(ranking: Ranking, start: str) -> tuple[str, ...]:
    n = len(ranking.scored.ordinary if start else ranking.scored.left_out)
    values = ranking.values
    return (
        str(n),
        say(values[f"{start}median_ahead"]),
        *(say(values[f"{start}rank_1_to_{odds}"], 1) for odds in ODDS),
        say(values[f"{start}above_threshold"], 3),
        say(values[f"{start}auc_roc"], 3),
    )


def _each(one: Search) -> list[str]:
    names = one.table["id"] if "id" in one.table else one.table.index.astype(str)
    head = (
        one.name,
        "score",
        "place",
        "bogus ahead",
        *(f"place at {ODDS[odds]}" for odds in ODDS),
        "above the threshold",
    )
    rows = []
    for name, row, ahead in zip(names, one.table.to_dict("records"), one.ranking.ahead, strict=True):
        expected = (Interval(*map(float, expected_rank([ahead.value, ahead.low, ahead.high], odds))) for odds in ODDS)
        score = "not scored" if np.isnan(row["score"]) else f"{row['score']:.4g}"
        cells = (say(ahead), *(say(value, 1) for value in expected), "yes" if row["above_threshold"] else "no")
        rows.append((str(name), score, f"{row['place']} of {row['of']}", *cells))
    return table(head, rows)
