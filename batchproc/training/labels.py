"""What rules say of candidates: conditions on columns. What people say of them is in `batchproc.label_tables`."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.errors import UsageError

__all__ = ["Rule", "parse_rules", "rule_labels"]

_COMPARE = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*(\w[\w.-]*?)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")


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
