"""Candidates of several known classes, with the scores of models that tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.errors import UsageError
from batchproc.judging.candidates import columns_to_use, label_run, words
from batchproc.report.facts import read_table

__all__ = ["LABELS", "Typed", "has_classes", "read_typed"]

#: Columns of which the first that is there holds the classes.
LABELS = ("label", "class")
#: What a candidate of a run is that is none of the known transients.
_BOGUS = "bogus"


@dataclass(frozen=True)
class Typed:
    """Scored candidates of known class.

    Attributes
    ----------
    classes : tuple of str
        Of the candidates and of the models, in the order of the alphabet.
    truth : ndarray (n,) of int
        Number of each one's class.
    scores : dict
        Name of a model → ``(n, len(classes))``; NaN throughout: not scored; 0 for classes that it does not know.
    knows : dict
        Name of a model → its classes.
    group, group_name, parts, notes
        As of `batchproc.judging.candidates.Candidates`.
    """

    classes: tuple[str, ...]
    truth: NDArray[np.intp]
    scores: dict[str, NDArray[np.float64]]
    knows: dict[str, tuple[str, ...]]
    group: NDArray[np.str_] | None
    group_name: str
    parts: pd.DataFrame
    notes: tuple[str, ...] = ()


def has_classes(source: str | Path) -> bool:
    """Whether a table tells classes, and not what is real."""
    path = Path(source)
    if not path.is_file():
        return False
    columns = read_table(path).columns
    return "real" not in columns and any(name in columns for name in LABELS)


def read_typed(
    source: str | Path,
    *,
    label: str | None = None,
    truth: str | Path | None = None,
    models: Sequence[str] = (),
    group: str | None = None,
    by: Sequence[str] | None = None,
) -> Typed:
    """Read a table (CSV, Parquet), or a run folder.

    Parameters
    ----------
    source : path
        A table with classes, and a column ``score_CLASS`` or ``score_MODEL_CLASS`` for each class; or a run.
    label : str, optional
        The column of the classes: of the table (``label`` or ``class`` by default; rows without are left out), or of
        the known transients of the run, whose other candidates are "bogus".
    truth : path, optional
        Of a run: as of `batchproc.judging.candidates.read_candidates`.
    models : sequence of str
        By default all of which there is more than one class.
    group, by
        As of `batchproc.judging.candidates.read_candidates`.

    Raises
    ------
    UsageError
        No such file or column, one class only, or no model with several classes.
    """
    path = Path(source)
    if path.is_dir():
        table, notes = label_run(path, truth)
        name = _label_column(path, table, label)
        names = np.where(table["real"], words(table[name]), _BOGUS)
        known = list(table.attrs.get("models", {}))
    else:
        if truth is not None:
            raise UsageError(f"--truth is for a run folder, and {path} is none: a table has its classes in a column")
        table, notes = read_table(path), []
        names = words(table[_label_column(path, table, label)])
        known = []
    kept = names != ""
    if not kept.all():
        notes.append(f"{(~kept).sum()} candidates without a class were left out")
    table, names = table[kept], names[kept]
    if len(np.unique(names)) < 2:
        raise UsageError(f"{path}: all {len(names)} candidates are {', '.join(np.unique(names)) or 'without a class'}")
    columns = _score_columns(path, table, set(names), models, known)
    chosen = [column for of_model in columns.values() for column in of_model.values()]
    group, by = columns_to_use(path, table, chosen, group, by)
    classes = tuple(sorted({*names, *(name for of_model in columns.values() for name in of_model)}))
    for model, of_model in columns.items():
        unknown = sorted(set(names) - set(of_model))
        if unknown:
            n = int(np.isin(names, unknown).sum())
            notes.append(f"{model} has no class {', '.join(unknown)}: the {n} candidates of it cannot be right")
        absent = sorted(set(of_model) - set(names))
        if absent:
            notes.append(f"{model} has classes of which there is no candidate: {', '.join(absent)}")
    return Typed(
        classes=classes,
        truth=np.searchsorted(np.asarray(classes), names),
        scores={model: _scores(table, of_model, classes) for model, of_model in columns.items()},
        knows={model: tuple(of_model) for model, of_model in columns.items()},
        group=None if group == "none" else words(table[group]),
        group_name=group,
        parts=table[by].reset_index(drop=True),
        notes=tuple(notes),
    )


def _label_column(path: Path, table: pd.DataFrame, label: str | None) -> str:
    name = label or next((name for name in LABELS if name in table), None)
    if name is None or name not in table:
        raise UsageError(
            f"{path}: no column {label or 'label'}; name that of the classes with --label; found "
            f"{', '.join(map(str, table))}"
        )
    return name


def _score_columns(
    path: Path, table: pd.DataFrame, labels: set[str], models: Sequence[str], known: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Model → class → column."""
    columns = [str(name) for name in table if str(name).startswith("score_")]
    there = tuple(columns)
    found: dict[str, dict[str, str]] = {}
    # The longest name first: of the models a and a_b, the column score_a_b_SN is of the second.
    for model in sorted(known or _prefixes(columns, labels), key=len, reverse=True):
        start = _start(model)
        # Those of classes that no candidate has as well: a model can be wrong by answering with one of these.
        for column in [name for name in columns if name.startswith(start)]:
            found.setdefault(model, {})[column.removeprefix(start)] = column
            columns.remove(column)
    several = {model or "score": of_model for model, of_model in found.items() if len(of_model) > 1}
    missing = [model for model in models if model not in several]
    if missing or not several:
        which = f"no model {missing[0]} with" if missing else "no"
        raise UsageError(
            f"{path}: {which} several classes (there is: {', '.join(several) or 'none'}): expected columns "
            f"score_MODEL_CLASS for {', '.join(sorted(labels))}; found {', '.join(there) or 'none'}"
        )
    return {model: several[model] for model in models or several}


def _prefixes(columns: Sequence[str], labels: set[str]) -> list[str]:
    """What stands before a class in the names of several columns, one of which ends in a known class: the models.

    One column alone is none: score_a_Ia_SN, where SN is known and Ia_SN is not, is no class SN of a model a_Ia.
    """
    found: dict[str, None] = {}  # in the order of the columns
    for rest in (name.removeprefix("score_") for name in columns):
        of_label = max((name for name in labels if rest == name or rest.endswith(f"_{name}")), key=len, default="")
        if of_label:
            found[rest.removesuffix(of_label).removesuffix("_")] = None
    return [model for model in found if sum(name.startswith(_start(model)) for name in columns) > 1]


def _start(model: str) -> str:
    return f"score_{model}_" if model else "score_"


def _scores(table: pd.DataFrame, columns: dict[str, str], classes: Sequence[str]) -> NDArray[np.float64]:
    own = table[list(columns.values())].to_numpy(dtype=np.float64, na_value=np.nan)
    scores = np.zeros((len(table), len(classes)))
    scores[:, [classes.index(name) for name in columns]] = own
    scores[np.isnan(own).any(axis=1)] = np.nan
    return scores
