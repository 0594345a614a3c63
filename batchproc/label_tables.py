"""Tables in which people say what candidates are: identities and classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.errors import UsageError
from batchproc.report.facts import read_table

__all__ = ["read_labels", "real_flags", "table_labels"]

#: Names under which a table may have what identifies a candidate, and its class.
_IDENTITIES = ("candidate_id", "id", "candid", "object_id", "objectId")
_CLASSES = ("label", "class", "real")


def read_labels(path: str | Path) -> pd.Series:
    """A table (CSV, Parquet) as identity → class.

    The identity is ``candidate_id``, ``id``, ``candid``, ``object_id`` or ``objectId``; the class ``label`` or
    ``class`` (text), or ``real`` (0 or 1). Rows without either say nothing.

    Raises
    ------
    UsageError
        No such file or columns, an identity that was rounded, or one with two classes.
    """
    table = read_table(Path(path), names=_IDENTITIES)
    identity = next((name for name in _IDENTITIES if name in table), None)
    named = next((name for name in _CLASSES if name in table), None)
    if identity is None or named is None:
        raise UsageError(
            f"{path}: needs one of {', '.join(_IDENTITIES)}, and one of {', '.join(_CLASSES)}; "
            f"found {', '.join(map(str, table))}"
        )
    given = table[[identity, named]].dropna()
    ids = _whole(path, given[identity])
    if named == "real":
        classes = np.where(real_flags(path, given[named]), "real", "bogus").astype(object)
    else:
        classes = given[named].astype(str).to_numpy(object)
    labels = pd.Series(classes, index=ids)
    several = labels.groupby(level=0).nunique()
    if (several > 1).any():
        first = several.index[several > 1][0]
        raise UsageError(f"{path}: {first} has {several[first]} classes: {', '.join(labels[[first]].unique())}")
    return labels[~labels.index.duplicated()]


def _whole(path: str | Path, ids: pd.Series) -> NDArray:
    """Identities as text; those that a table has kept as floats without their ``.0``."""
    text = ids.astype(str).str.replace(r"^(\d+)\.0$", r"\1", regex=True)
    rounded = text.str.fullmatch(r"\d(\.\d+)?[eE]\+?\d\d").to_numpy(bool)
    if rounded.any():
        raise UsageError(
            f"{path}: {ids.name} is rounded in {rounded.sum()} rows, such as {text[rounded].iloc[0]}: write it as text "
            f"or whole numbers; in pandas, table.astype({{{ids.name!r}: 'Int64'}}) before it is joined to anything"
        )
    return text.to_numpy(object)


def real_flags(path: str | Path, values: pd.Series) -> NDArray[np.bool_]:
    """A column ``real`` of 0 and 1, or of true and false; anything else, as no value, is a `UsageError`."""
    numbers = pd.to_numeric(values, errors="coerce").astype("Float64")
    wrong = ~numbers.isin([0, 1]).to_numpy(bool)
    if wrong.any():
        raise UsageError(
            f"{path}: real is neither 0 nor 1 in {wrong.sum()} of {len(values)} rows, such as {values[wrong].iloc[0]}"
        )
    return numbers.to_numpy(bool)


def table_labels(labels: pd.Series, *identities: Sequence[Any] | NDArray) -> NDArray[np.str_]:
    """The class of each candidate by the first of its identities that `labels` knows; empty where none does."""
    found = np.full(len(identities[0]), "", object)
    for names in identities:
        one = labels.reindex([str(name) for name in names]).fillna("").to_numpy(object)
        found = np.where(found == "", one, found)
    return found.astype(np.str_)
