"""Candidates of known truth with their scores: from a table, or from a run and its known transients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.errors import UsageError
from batchproc.io.catalogue import open_catalogue
from batchproc.io.run_folder import RunFolder
from batchproc.label_tables import real_flags
from batchproc.report.facts import MATCH_PIX, match_known, read_table, read_truth

__all__ = ["BREAK_DOWN", "Candidates", "columns_to_use", "label_run", "read_candidates", "words"]

#: Columns by which results are broken down where nothing else is asked for.
BREAK_DOWN = ("ccd", "filter", "fwhm_new", "fwhm", "seeing", "mag", "mjd")
#: Columns of which the first that is there tells which candidates share their faults.
_GROUPS = ("group", "region", "image_id", "image")


@dataclass(frozen=True)
class Candidates:
    """Scored candidates of known truth.

    Attributes
    ----------
    real : ndarray (n,) of bool
    scores : dict
        Score of each candidate by name of the model; NaN: not scored.
    group : ndarray (n,) of str, or None
        Which candidates share their faults (an image, a region of sky), and what it is called.
    group_name : str
    parts : DataFrame
        The columns to break down by.
    notes : tuple of str
        What was left out, in words.
    """

    real: NDArray[np.bool_]
    scores: dict[str, NDArray[np.float64]]
    group: NDArray[np.str_] | None
    group_name: str
    parts: pd.DataFrame
    notes: tuple[str, ...] = ()


def read_candidates(
    source: str | Path,
    *,
    truth: str | Path | None = None,
    scores: Sequence[str] = (),
    group: str | None = None,
    by: Sequence[str] | None = None,
) -> Candidates:
    """Read a table (CSV, Parquet), or a run folder.

    Parameters
    ----------
    source : path
        A table with ``real`` (0 or 1) and scores, or a run folder.
    truth : path, optional
        Of a run: its known transients, as `batchproc.report.write_report` takes them; ``truth.parquet`` of the run by
        default. A candidate is real where it is the nearest of the right sign to one of them, bogus where none is near;
        others, and images of which the table has no row, are left out.
    scores : sequence of str
        Columns; by default ``score`` and ``score_…`` of a table, and all models of a run.
    group : str, optional
        A column; by default the first of ``group``, ``region``, ``image_id``, ``image`` that is there. "none" for none.
    by : sequence of str, optional
        Columns to break down by; by default those of `BREAK_DOWN` that are there.

    Raises
    ------
    UsageError
        No such file or column, values that are no truth or no score, or one class only.
    """
    path = Path(source)
    if path.is_dir():
        table, notes = label_run(path, truth)
        chosen = list(scores) or _models(table, path)
    else:
        if truth is not None:
            raise UsageError(
                f"--truth is for a run folder, and {path} is none: a table has its truth in the column real"
            )
        table, notes = _of_table(path)
        chosen = list(scores) or [n for n in table if n == "score" or n.startswith("score_")]
    if not chosen:
        found = ", ".join(map(str, table))
        raise UsageError(f"{path}: no column score or score_…; name yours with --score; found {found}")
    group, by = columns_to_use(path, table, chosen, group, by)
    real = table["real"].to_numpy(dtype=bool)
    if not real.any() or real.all():
        why = f" ({'; '.join(notes)})" if notes else ""
        raise UsageError(f"{path}: {real.sum()} real and {(~real).sum()} bogus candidates: both are needed{why}")
    return Candidates(
        real=real,
        scores={_short(name): table[name].to_numpy(dtype=np.float64, na_value=np.nan) for name in chosen},
        group=None if group == "none" else words(table[group]),
        group_name=group,
        parts=table[by].reset_index(drop=True),
        notes=tuple(notes),
    )


def columns_to_use(
    path: Path, table: pd.DataFrame, scores: Sequence[str], group: str | None, by: Sequence[str] | None
) -> tuple[str, list[str]]:
    """What groups are made by, and what results are broken down by; `UsageError` for columns that will not do."""
    group = group or next((name for name in _GROUPS if name in table), "none")
    if by is None:  # fwhm of a run is that of the candidate; the seeing is fwhm_new
        by = [name for name in BREAK_DOWN if name in table and not (name == "fwhm" and "fwhm_new" in table)]
    for name in [*scores, *by, *([] if group == "none" else [group])]:
        if name not in table:
            raise UsageError(f"{path}: no column {name!r}; found {', '.join(map(str, table))}")
    for name in scores:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise UsageError(f"{path}: the column {name} holds {table[name].dtype} values; expected scores")
    return group, list(by)


def words(column: pd.Series) -> NDArray[np.str_]:
    """A column as text, empty where it has no value."""
    return column.astype(object).fillna("").astype(str).to_numpy(dtype=str)


def _short(column: str) -> str:
    return column.removeprefix("score_")


def _of_table(path: Path) -> tuple[pd.DataFrame, list[str]]:
    if not path.exists():
        raise UsageError(
            f"{path}: no such file or run folder; give a table (CSV, Parquet) with real and scores, or a RUN"
        )
    table = read_table(path)
    if "real" not in table:
        raise UsageError(f"{path}: no column real (0 or 1); found {', '.join(map(str, table))}")
    return table.assign(real=real_flags(path, table["real"])), []


def label_run(path: Path, truth: str | Path | None = None) -> tuple[pd.DataFrame, list[str]]:
    """The catalogue of a run with `real` beside it, for candidates of known truth, and what was left out, in words.

    Columns of words of the known transients, such as their ``kind``, come along: empty for all that is bogus.
    """
    folder = RunFolder.existing(path)
    known = read_truth(folder, truth)
    if known is None:
        raise UsageError(f"{path}: no truth.parquet in it; give the table of the known transients with --truth")
    catalogue = open_catalogue(path)
    match, near = match_known(known.reset_index(drop=True), catalogue)
    real = np.zeros(len(catalogue), dtype=bool)
    real[match[match >= 0]] = True
    told = catalogue["image_id"].isin(set(known["image_id"])).to_numpy()
    doubtful = near & ~real
    notes = []
    if doubtful.any():
        notes.append(
            f"{doubtful.sum()} candidates within {MATCH_PIX:g} pixels of a known transient that are not it (the other "
            "sign, or farther than another) were left out"
        )
    if (~told).any():
        notes.append(f"{(~told).sum()} candidates of images without a known transient were left out")
    if (match < 0).any():
        notes.append(
            f"{(match < 0).sum()} of {len(match)} known transients are no candidate (not detected, masked, of images "
            "that failed): no classifier is charged with them"
        )
    kinds = {}
    for name in known.columns.difference(catalogue.columns):
        if not pd.api.types.is_numeric_dtype(known[name]):
            kinds[name] = np.full(len(catalogue), "", object)
            kinds[name][match[match >= 0]] = words(known[name])[match >= 0]
    table = catalogue.assign(real=real, **kinds)[told & ~doubtful]
    table.attrs = catalogue.attrs
    return table, notes


def _models(table: pd.DataFrame, path: Path) -> list[str]:
    """The column of each model that says how likely a candidate is real."""
    models = table.attrs.get("models", {})
    if not models:
        raise UsageError(f"{path}: no model has scored it; `batchproc classify {path} --model NAME` does")
    chosen = []
    for model in models:
        column = next((name for name in (f"score_{model}", f"score_{model}_real") if name in table), None)
        if column is None:
            classes = [str(name) for name in table if str(name).startswith(f"score_{model}_")]
            raise UsageError(f"{path}: {model} has no class 'real'; name a column with --score: {', '.join(classes)}")
        chosen.append(column)
    return chosen
