"""Retrospective search: had nobody known of it, where would it have ranked?

A known event, or all of a kind, is left out of training; a classifier is trained on the rest; and what it makes of the
left-out ones is held against the test part, which it has not seen either. A second classifier that has learnt from
the others of the kind says what not knowing it costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from batchproc.errors import UsageError
from batchproc.io.models import load_model
from batchproc.judging.measures import Plan
from batchproc.judging.ranking import Scored, rank
from batchproc.judging.searches import Search
from batchproc.training.examples import BOGUS, REAL, Examples
from batchproc.training.settings import TrainSettings
from batchproc.training.splits import Split, group_of, split_examples
from batchproc.training.train import train_model

__all__ = ["left_out_rows", "retrospective"]

#: Columns that name what was left out, in the table of its ranks, where they are there.
_TELLING = ("id", "label", "kind", "group", "ra", "dec", "snr", "survey")
_MEASURED = "in_test_part"
#: Values of a column that are left out one after the other.
_MOST_VALUES = 20


def retrospective(
    examples: Examples,
    out: str | Path,
    settings: TrainSettings,
    leave_out: Sequence[str],
    plan: Plan | None = None,
    *,
    control: bool = True,
    quiet: bool = False,
) -> Iterator[Search]:
    """Leave out, train, and rank: one search after the other.

    Parameters
    ----------
    examples : Examples
    out : path
        Folder of the trainings, one for each search.
    settings : TrainSettings
        How to divide and to train.
    leave_out : sequence of str
        ``COLUMN=VALUE`` (such as ``label=SN``, ``kind=vanished``, or ``group=ZTF18abukavn``, an object of packets), or
        ``COLUMN`` for each of its values in turn. Bogus ones of it are left out of everything.
    plan : Plan, optional
    control : bool
        Train once more with nothing left out.
    quiet : bool

    Raises
    ------
    UsageError
        No such column or value, or parts that cannot be made: before anything is trained.
    """
    plan = Plan(completeness=settings.completeness) if plan is None else plan
    searches = [search for text in leave_out for search in left_out_rows(examples, text)]
    split = split_examples(examples.label, examples.table, settings)
    _check(examples, split, searches, settings)
    told = None
    if control and any((rows & (split.part == "test")).any() for _, rows in searches):
        nothing = np.zeros(len(examples), bool)
        told = _scores(examples, split, nothing, Path(out) / "nothing-left-out", settings, quiet)
    for name, rows in searches:
        yield _search(examples, split, name, rows, Path(out), settings, plan, told, quiet)


def left_out_rows(examples: Examples, text: str) -> list[tuple[str, NDArray[np.bool_]]]:
    """What ``COLUMN=VALUE``, or ``COLUMN`` for each of its values, leaves out: names, and rows.

    Raises
    ------
    UsageError
        No such column, no example of this value, or too many values.
    """
    column, equals, value = text.partition("=")
    table = examples.table.assign(label=examples.label)
    if column not in table:
        raise UsageError(f"--leave-out {text}: no column {column!r}; found {', '.join(map(str, table))}")
    values = table[column].astype(object).where(table[column].notna(), "").astype(str).to_numpy(object)
    wanted = [value] if equals else [v for v in np.unique(values[examples.label != BOGUS]) if v]
    if len(wanted) > _MOST_VALUES:
        raise UsageError(
            f"--leave-out {text}: {len(wanted)} values are as many trainings; name some: "
            f"--leave-out {column}={wanted[0]}"
        )
    found = [(f"{column}={one}", np.asarray(values == one, bool)) for one in wanted]
    if not found or not found[0][1].any():
        some = ", ".join(np.unique(values)[:10])
        raise UsageError(f"--leave-out {text}: no example has that; {column} is one of: {some}")
    return found


def _check(
    examples: Examples, split: Split, searches: Sequence[tuple[str, NDArray[np.bool_]]], settings: TrainSettings
) -> None:
    """Raise `UsageError` for any search that could not be trained for: the first ones may take hours."""
    for name, rows in searches:
        out = rows | _beside(examples, rows, settings)
        left = sorted(set(examples.label[~out & np.isin(split.part, ("train", "valid"))]))
        if len(left) < 2:
            raise UsageError(f"--leave-out {name}: only {', '.join(left) or 'nothing'} is left to learn from")
        if (examples.label[rows] == BOGUS).all():
            raise UsageError(f"--leave-out {name}: all of it is bogus; leave out what you would want to find")
        given, table, as_divided = _given(examples, split, out, settings)
        try:
            split_examples(examples.label[given], table, as_divided)
        except UsageError as error:
            raise UsageError(f"--leave-out {name}: {error}") from error


def _given(
    examples: Examples, split: Split, out: NDArray[np.bool_], settings: TrainSettings
) -> tuple[NDArray[np.intp], pd.DataFrame, TrainSettings]:
    """What a training without the rows `out` is given: rows, their table, and settings that hold out the test part."""
    given = np.flatnonzero((split.part != "") & ~out)
    table = examples.table.assign(**{_MEASURED: np.where(split.part == "test", "yes", "no")})
    return given, table.iloc[given].reset_index(drop=True), replace(settings, holdout=(f"{_MEASURED}=yes",))


@dataclass(frozen=True)
class _Scores:
    """Of all examples, by a model that has learnt from some."""

    scores: NDArray[np.float32]
    classes: tuple[str, ...]
    learnt: NDArray[np.bool_]
    folder: Path


def _scores(
    examples: Examples, split: Split, out: NDArray[np.bool_], folder: Path, settings: TrainSettings, quiet: bool
) -> _Scores:
    """Train without the rows `out`, and score everything that was not learnt from."""
    given, table, as_divided = _given(examples, split, out, settings)
    some = Examples(examples.stamps[given], examples.label[given], table)
    trained = train_model(some, folder, as_divided, overwrite=True, quiet=quiet)
    learnt = np.zeros(len(examples), bool)
    learnt[given[trained.split.part != "test"]] = True
    asked = np.flatnonzero(~learnt)
    card = trained.card
    features = examples.table[list(card.input.features)].to_numpy(np.float32, na_value=np.nan)[asked]
    model = load_model(trained.model_folder)
    found = model.predict(
        examples.stamps[asked] if model.takes_stamps else None, features if card.input.features else None
    )
    scores = np.full((len(examples), len(card.classes)), np.nan, np.float32)
    scores[asked] = found.reshape(len(asked), -1)
    return _Scores(scores, card.classes, learnt, trained.model_folder)


def _search(
    examples: Examples,
    split: Split,
    name: str,
    rows: NDArray[np.bool_],
    out: Path,
    settings: TrainSettings,
    plan: Plan,
    told: _Scores | None,
    quiet: bool,
) -> Search:
    beside = _beside(examples, rows, settings)
    blind = _scores(examples, split, rows | beside, out / _folder_name(name), settings, quiet)
    test = (split.part == "test") & ~rows
    rows = rows & (examples.label != BOGUS)  # bogus ones were not learnt from either; nobody searches for them
    wanted = sorted(set(examples.label[rows]))
    values, score = _ranked_by(blind, wanted)
    ranking = rank(_scored(values, examples.label, rows, test, split.group), plan)
    known = None
    in_test = rows & (split.part == "test")
    if told is not None and in_test.any() and (told.learnt & rows).any():
        values_told, _ = _ranked_by(told, wanted)
        known = rank(_scored(values_told, examples.label, in_test, test, split.group), plan)
    table = examples.table[[c for c in _TELLING if c in examples.table]].assign(label=examples.label)
    table = table[rows].assign(
        score=values[rows], place=ranking.place, of=ranking.n_list, above_threshold=ranking.above
    )
    for end, part in (("", "value"), ("_low", "low"), ("_high", "high")):
        each = np.full(len(table), np.nan)
        each[: len(ranking.ahead)] = [getattr(one, part) for one in ranking.ahead]
        table[f"bogus_ahead{end}"] = each
    names, numbers = np.unique(examples.label[blind.learnt], return_counts=True)
    n_learnt = {str(name): int(number) for name, number in zip(names, numbers, strict=True)}
    return Search(name, score, ranking, known, table.reset_index(drop=True), n_learnt, int(beside.sum()), blind.folder)


def _folder_name(name: str) -> str:
    return "without-" + "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)[:80]


def _beside(examples: Examples, rows: NDArray[np.bool_], settings: TrainSettings) -> NDArray[np.bool_]:
    """Others that are the same object as what is left out, at another time or by another name."""
    return (_near(examples.table, rows, settings.same_arcsec) | _of_its_group(examples, rows, settings)) & ~rows


def _near(table: pd.DataFrame, rows: NDArray[np.bool_], same_arcsec: float) -> NDArray[np.bool_]:
    """Whatever lies within some arcseconds of what is left out."""
    near = np.zeros(len(table), bool)
    if not {"ra", "dec"} <= set(table):
        return near
    ra, dec = (np.radians(table[name].to_numpy(np.float64, na_value=np.nan)) for name in ("ra", "dec"))
    xyz = np.column_stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])
    known = np.isfinite(xyz).all(axis=1)
    if not (known & rows).any():
        return near
    chord = 2 * np.sin(np.radians(same_arcsec / 3600) / 2)
    near[known] = cKDTree(xyz[known & rows]).query(xyz[known], distance_upper_bound=chord)[0] <= chord
    return near


def _of_its_group(examples: Examples, rows: NDArray[np.bool_], settings: TrainSettings) -> NDArray[np.bool_]:
    """Whatever shares the group with what is left out, where groups are objects.

    They are taken for objects where most of those with several examples, not all bogus, are of one class. Fields,
    images and chips hold bogus ones beside the real ones, and the left-out kind in nearly each: without these, nothing
    would be left to learn from.
    """
    table, unplaced = examples.table, np.ones(len(examples), bool)
    if settings.group == "sky" and {"ra", "dec"} <= set(table):
        # Cells are wider than an object: where positions are known, they tell what is the same.
        unplaced = table[["ra", "dec"]].isna().any(axis=1).to_numpy()
        table = table.drop(columns=["ra", "dec"])
    number = np.unique(group_of(table, settings), return_inverse=True)[1]
    each = pd.DataFrame({"label": examples.label}).groupby(number)["label"]
    several = (each.size() > 1) & each.agg(lambda label: (label != BOGUS).any())
    if not several.any() or (each.nunique()[several] == 1).mean() <= 0.5:
        return np.zeros(len(examples), bool)
    return np.isin(number, number[rows]) & unplaced


def _ranked_by(found: _Scores, wanted: Sequence[str]) -> tuple[NDArray[np.float64], str]:
    """One number a candidate, the larger the sooner it is looked at, and what it is in words.

    The probability of being real; of several classes that of its own, where the model knows it, or else of not being
    bogus; where nothing is bogus, how little it looks like any class.
    """
    scores, classes = found.scores.astype(np.float64), list(found.classes)
    if classes == [REAL]:
        return scores[:, 0], "P(real)"
    if all(name in classes for name in wanted):
        return scores[:, [classes.index(name) for name in wanted]].sum(axis=1), f"P({' or '.join(wanted)})"
    if BOGUS in classes:
        return 1 - scores[:, classes.index(BOGUS)], "1 - P(bogus)"
    return 1 - scores.max(axis=1), "1 - P(most likely class)"


def _scored(
    values: NDArray[np.float64], label: NDArray, rows: NDArray[np.bool_], test: NDArray[np.bool_], group: NDArray
) -> Scored:
    """Where nothing is bogus, all others are what it has to stand out from."""
    of_bogus = test & (label == BOGUS) if (label[test] == BOGUS).any() else test
    ordinary = test & ~of_bogus
    parts = (rows, ordinary, of_bogus)
    left_out, real, bogus = (values[part] for part in parts)
    return Scored(left_out, real, bogus, tuple(group[part] for part in parts))  # type: ignore[arg-type]
