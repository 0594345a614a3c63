"""Labelled stamps with what else is known of each: what every kind of classifier is trained on."""

from __future__ import annotations

import zipfile
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.errors import UsageError
from batchproc.io.atomic import replacing
from batchproc.label_tables import real_flags
from batchproc.learning.inputs import crop_or_pad

__all__ = ["BOGUS", "REAL", "Examples", "is_binary"]

#: The labels of the question that batchproc asks first.
REAL, BOGUS = "real", "bogus"


class Chosen:
    """Some rows of an array of stamps, read from it when they are asked for: nothing is copied before."""

    def __init__(self, stamps: Any, rows: NDArray[np.intp]) -> None:
        self._stamps, self._rows = stamps, rows
        self.shape = (len(rows), *stamps.shape[1:])
        self.ndim = len(self.shape)
        self.dtype = stamps.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._stamps[self._rows[rows]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        return np.asarray(self[:], dtype=dtype)


@dataclass(frozen=True)
class Examples:
    """Stamps with their labels, one row each.

    Attributes
    ----------
    stamps : ndarray (n, 3, h, w) float32
        New, reference, difference, un-normalised; NaN where there is no data. A memory map or what else has a shape and
        gives rows will do.
    label : ndarray (n,) str
        What each is: `REAL` or `BOGUS`, or the names of other classes.
    table : DataFrame of n rows
        What else is known, where it is: ``id`` (text), ``ra, dec`` (degrees), ``ccd, filter, survey`` (text),
        ``seeing`` (FWHM of new in pixels), ``mjd``, ``group`` (text: what shares pixels), and measurements, by their
        names in the catalogue, that a classifier may take as features. Numbered from 0.

    Raises
    ------
    ValueError
        Arrays of different lengths, or stamps of another shape.
    """

    stamps: Any
    label: NDArray[np.str_]
    table: pd.DataFrame

    def __post_init__(self) -> None:
        if self.stamps.ndim != 4 or self.stamps.shape[1] != 3:
            raise ValueError(f"stamps of shape {self.stamps.shape}; expected (n, 3, h, w)")
        if not len(self.stamps) == len(self.label) == len(self.table):
            raise ValueError(f"{len(self.stamps)} stamps, {len(self.label)} labels, {len(self.table)} rows")

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: Any) -> Examples:
        """Those of a slice, an array of row numbers or of booleans."""
        return Examples(self.stamps[rows], self.label[rows], self.table.iloc[rows].reset_index(drop=True))

    def view(self, rows: NDArray[np.intp]) -> Examples:
        """Those of an array of row numbers; their stamps are not copied, but taken from these when they are used."""
        return Examples(Chosen(self.stamps, rows), self.label[rows], self.table.iloc[rows].reset_index(drop=True))

    @classmethod
    def join(cls, parts: Iterable[Examples]) -> Examples:
        """One after the other; columns that some lack are NaN there. Smaller stamps are padded with NaN, centred.

        Raises
        ------
        ValueError
            No parts.
        """
        waiting = deque(parts)
        if not waiting:
            raise ValueError("nothing to join")
        size = max(max(part.stamps.shape[2:]) for part in waiting)
        stamps = np.empty((sum(map(len, waiting)), 3, size, size), np.float32)
        labels, tables, start = [], [], 0
        while waiting:  # each part can be let go when it is copied: all of them are never there twice
            part = waiting.popleft()
            same = part.stamps.shape[2:] == (size, size)
            stamps[start : start + len(part)] = part.stamps if same else crop_or_pad(part.stamps, size)
            labels.append(part.label)
            tables.append(part.table)
            start += len(part)
            del part
        table = pd.concat([one for one in tables if len(one)] or tables[:1], ignore_index=True)
        return cls(stamps, np.concatenate(labels), table)

    def counts(self) -> dict[str, int]:
        """How many of each class, in alphabetical order."""
        names, numbers = np.unique(self.label, return_counts=True)
        return {str(name): int(number) for name, number in zip(names, numbers, strict=True)}

    def save(self, path: str | Path) -> None:
        """Write ``.npz``: ``stamps``, ``label`` and a 1-d array a column; `load` gives the same back."""
        columns: dict[str, Any] = {str(name): _storable(self.table[name]) for name in self.table}
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, stamps=self.stamps, label=np.asarray(self.label, np.str_), **columns)

    @classmethod
    def load(cls, path: str | Path) -> Examples:
        """Read what `save` wrote, or any ``.npz`` with ``stamps`` and either ``label`` (text) or ``real`` (boolean).

        Raises
        ------
        UsageError
            No such file, or one without these arrays or with arrays of other lengths.
        """
        try:
            with np.load(path) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path}: cannot be read as a set of examples (.npz): {error}") from error
        if "stamps" not in arrays or not {"label", "real"} & set(arrays):
            raise UsageError(f"{path}: expected the arrays stamps, and label or real; found {', '.join(arrays)}")
        stamps = arrays.pop("stamps")
        real = arrays.pop("real", None)
        if "label" in arrays:
            label = arrays.pop("label")
        else:
            label = np.where(real_flags(path, pd.Series(np.ravel(real))), REAL, BOGUS)
        wrong = [name for name, values in arrays.items() if values.shape != (len(stamps),)]
        if wrong:
            raise UsageError(f"{path}: {wrong[0]} of shape {arrays[wrong[0]].shape}; expected ({len(stamps)},)")
        try:
            return cls(stamps, label.astype(np.str_), pd.DataFrame(arrays, index=range(len(stamps))))
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from error


def is_binary(labels: Iterable[str]) -> bool:
    """Whether it is real or bogus that is asked, and nothing else."""
    return set(map(str, labels)) <= {REAL, BOGUS}


def _storable(column: pd.Series) -> NDArray:
    """Numbers as they are, all else as text: nothing that needs pickle."""
    if column.dtype.kind in "biuf":
        return column.to_numpy()
    return column.astype(object).fillna("").astype(str).to_numpy(np.str_)
