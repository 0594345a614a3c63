"""What a model has learnt from, kept beside it: whoever continues from it must be measured on something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.io.cards import LEARNT_FROM
from batchproc.io.models import find_model
from batchproc.training.splits import near_any

__all__ = ["seen_by", "write_seen"]


def write_seen(folder: Path, table: pd.DataFrame, base: str = "") -> None:
    """Write where the rows of a table lie, or what they are called, and the same of what the base had learnt from."""
    rows = [_places(table)]
    if base and (before := find_model(base) / LEARNT_FROM).is_file():
        rows.append(pd.read_parquet(before))
    pd.concat(rows, ignore_index=True).drop_duplicates().to_parquet(folder / LEARNT_FROM, index=False)


def seen_by(base: str, table: pd.DataFrame, same_arcsec: float) -> NDArray[np.bool_] | None:
    """Which rows the base has learnt from, or something within `same_arcsec` of them; None where it does not say.

    Rows without a position are told by their ``id``.
    """
    path = find_model(base) / LEARNT_FROM
    if not path.is_file():
        return None
    before, now = pd.read_parquet(path), _places(table)
    there, here = (np.isfinite(t["ra"].to_numpy()) & np.isfinite(t["dec"].to_numpy()) for t in (before, now))
    seen = (now["id"] != "").to_numpy() & now["id"].isin(before["id"]).to_numpy()
    seen[here] |= near_any(now[["ra", "dec"]][here], before[["ra", "dec"]][there], same_arcsec)
    return seen


def _places(table: pd.DataFrame) -> pd.DataFrame:
    columns = {name: table[name] if name in table else pd.Series(np.nan, table.index) for name in ("ra", "dec")}
    name = table["id"].astype(object) if "id" in table else pd.Series("", table.index, object)
    columns = {key: column.to_numpy(np.float64, na_value=np.nan) for key, column in columns.items()}
    return pd.DataFrame({**columns, "id": name.where(name.notna(), "").astype(str).to_numpy(object)})
