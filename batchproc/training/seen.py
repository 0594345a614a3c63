"""What a model has learnt from, kept beside it: whoever continues from it must be measured on something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.io.cards import LEARNT_FROM
from batchproc.io.models import find_model
from batchproc.training.splits import near_any

__all__ = ["record_of", "seen_by", "write_seen"]


def write_seen(folder: Path, table: pd.DataFrame, base: str = "") -> None:
    """Write where the rows of a table lie, or what they are called, and the same of what the base had learnt from."""
    rows = [_places(table)]
    if before := record_of(base):
        rows.append(pd.read_parquet(before))
    pd.concat(rows, ignore_index=True).drop_duplicates().to_parquet(folder / LEARNT_FROM, index=False)


def seen_by(base: str, table: pd.DataFrame, same_arcsec: float) -> NDArray[np.bool_] | None:
    """Which rows the base has learnt from, or something within `same_arcsec` of them; None where nothing says it.

    Rows without a position are told by their ``id``.
    """
    path = record_of(base)
    if path is None:
        return None
    before, now = pd.read_parquet(path), _places(table)
    named = (now["id"] != "").to_numpy() & now["id"].isin(before["id"]).to_numpy()
    return named | near_any(now, before, same_arcsec)


def record_of(base: str) -> Path | None:
    """What says where a base has learnt; None where nothing does, or there is no base."""
    path = find_model(base) / LEARNT_FROM if base else None
    return path if path is not None and path.is_file() else None


def _places(table: pd.DataFrame) -> pd.DataFrame:
    columns = {name: table[name] if name in table else pd.Series(np.nan, table.index) for name in ("ra", "dec")}
    name = table["id"].astype(object) if "id" in table else pd.Series("", table.index, object)
    columns = {key: column.to_numpy(np.float64, na_value=np.nan) for key, column in columns.items()}
    return pd.DataFrame({**columns, "id": name.where(name.notna(), "").astype(str).to_numpy(object)})
