"""What people, or rules, say of candidates: tables of identities and classes, and conditions on columns."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.errors import UsageError
from batchproc.report.facts import read_table
from batchproc.training.examples import BOGUS, REAL

__all__ = ["Rule", "parse_rules", "read_labels", "rule_labels", "table_labels"]

#: Names under which a table may have what identifies a candidate, and its class.
_IDENTITIES = ("candidate_id", "id", "candid", "object_id", "objectId")
_CLASSES = ("label", "class", "real")
_COMPARE = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*(\w[\w.-]*?)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")


def read_labels(path: str | Path) -> pd.Series:
    """A table (CSV, Parquet) as identity → class.

    The identity is ``candidate_id``, ``id``, ``candid``, ``object_id`` or ``objectId``; the class ``label`` or
    ``class`` (text), or ``real`` (0 or 1).

    Raises
    ------
    UsageError
        No such file or columns, or an identity with two classes.
    """
    table = read_table(Path(path))
    identity = next((name for name in _IDENTITIES if name in table), None)
    named = next((name for name in _CLASSES if name in table), None)
    if identity is None or named is None:
        raise UsageError(
            f"{path}: needs one of {', '.join(_IDENTITIES)}, and one of {', '.join(_CLASSES)}; "
            f"found {', '.join(map(str, table))}"
        )
    given = table[[identity, named]].dropna()
    classes = _real_or_bogus(path, given[named]) if named == "real" else given[named].astype(str)
    labels = pd.Series(classes.to_numpy(object), index=given[identity].astype(str).to_numpy(object))
    several = labels.groupby(level=0).nunique()
    if (several > 1).any():
        first = several.index[several > 1][0]
        raise UsageError(f"{path}: {first} has {several[first]} classes: {', '.join(labels[[first]].unique())}")
    return labels[~labels.index.duplicated()]


def _real_or_bogus(path: str | Path, values: pd.Series) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce")
    if not numbers.isin([0, 1]).all():
        wrong = values[~numbers.isin([0, 1])].iloc[0]
        raise UsageError(f"{path}: real is neither 0 nor 1 in some rows, such as {wrong}")
    return numbers.map({0: BOGUS, 1: REAL})


def table_labels(labels: pd.Series, *identities: Sequence[Any] | NDArray) -> NDArray[np.str_]:
    """The class of each candidate by the first of its identities that `labels` knows; empty where none does."""
    found = np.full(len(identities[0]), "", object)
    for names in identities:
        one = labels.reindex([str(name) for name in names]).fillna("").to_numpy(object)
        found = np.where(found == "", one, found)
    return found.astype(np.str_)


@dataclass(frozen=True)
class Rule:
    """A class for all candidates for which every condition holds: ``real: drb > 0.9 and ndethist > 3``."""

    label: str
    conditions: tuple[tuple[str, str, str], ...]
    """Column, comparison, value."""

    def __call__(self, table: pd.DataFrame) -> NDArray[np.bool_]:
        """For which rows it holds; unknown values never do."""
        holds = np.ones(len(table), np.bool_)
        for name, comparison, value in self.conditions:
            if name not in table:
                raise UsageError(f"the rule for {self.label}: no column {name!r}; found {', '.join(map(str, table))}")
            column = table[name]
            known = column.notna().to_numpy()
            if pd.api.types.is_numeric_dtype(column):
                compared = _COMPARE[comparison](column.to_numpy(np.float64, na_value=np.nan), self._number(value))
            else:
                compared = _COMPARE[comparison](column.astype(str).to_numpy(object), value)
            holds &= known & np.asarray(compared, np.bool_)
        return holds

    def _number(self, value: str) -> float:
        try:
            return float(value)
        except ValueError:
            raise UsageError(f"the rule for {self.label}: {value!r} is no number") from None


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """Rules from text.

    >>> parse_rules(["real: drb > 0.9", "bogus: drb < 0.5 and rb < 0.5"])[1].conditions
    (('drb', '<', '0.5'), ('rb', '<', '0.5'))

    Raises
    ------
    UsageError
        Text of another form.
    """
    rules = []
    for text in texts:
        label, colon, rest = text.partition(":")
        found = [_CONDITION.fullmatch(part) for part in re.split(r"\band\b", rest)]
        if not (colon and label.strip() and all(found)):
            raise UsageError(
                f"rule {text!r}: expected CLASS: COLUMN > VALUE (<=, >=, ==, !=, <, >; several with and), such as "
                "'real: drb > 0.9'"
            )
        rules.append(Rule(label.strip(), tuple(one.groups() for one in found if one)))  # type: ignore[misc]
    return tuple(rules)


def rule_labels(rules: Sequence[Rule], table: pd.DataFrame) -> NDArray[np.str_]:
    """The class of each candidate by the rules; empty where none holds, or two of different classes."""
    found = np.full(len(table), "", object)
    for rule in rules:
        holds = rule(table)
        clash = holds & (found != "") & (found != rule.label)
        found[holds] = rule.label
        found[clash] = "\0"
    found[found == "\0"] = ""
    return found.astype(np.str_)
