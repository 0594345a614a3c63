"""HATS on the disk (https://www.ivoa.net/documents/Notes/HATS/): names, Parquet settings, the files around the rows.

::

    hats.properties  properties         what the catalogue is, as Java properties (twice: older readers know the second)
    partition_info.csv                  the partitions; ours also tells their rows and bytes
    dataset/_common_metadata            the schema
    dataset/_metadata                   the footers of all partitions
    dataset/Norder=K/Dir=D/Npix=N.parquet
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import batchproc
from batchproc.finish.sky import INDEX_ORDER, Cell
from batchproc.io.atomic import remove_leftovers, replacing, write_text

__all__ = [
    "INDEX_COLUMN",
    "INDEX_FIELD",
    "is_whole",
    "partition_path",
    "read_properties",
    "write_metadata",
    "write_partition",
]

INDEX_COLUMN = f"_healpix_{INDEX_ORDER}"
INDEX_FIELD = pa.field(
    INDEX_COLUMN,
    pa.int64(),
    metadata={"unit": "", "meaning": f"nested HEALPix index of order {INDEX_ORDER} of ra and dec"},
)
_ROW_GROUP = 100_000  # readers of a small cone skip the others by the range of their indices


def partition_path(catalogue: Path, cell: Cell) -> Path:
    """Where the rows of a cell lie."""
    folder = catalogue / "dataset" / f"Norder={cell.order}" / f"Dir={cell.pixel // 10_000 * 10_000}"
    return folder / f"Npix={cell.pixel}.parquet"


def write_partition(catalogue: Path, cell: Cell, rows: pa.Table, order: NDArray[np.intp]) -> None:
    """Write the rows of a cell in this order, whole or not at all; a row group at a time is brought into it."""
    floating = [field.name for field in rows.schema if pa.types.is_floating(field.type)]
    encoding = dict.fromkeys(floating, "BYTE_STREAM_SPLIT") | {INDEX_COLUMN: "DELTA_BINARY_PACKED"}
    others = [name for name in rows.column_names if name not in encoding]
    path = partition_path(catalogue, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(
            temporary,
            rows.schema,
            compression="zstd",
            use_dictionary=others,
            column_encoding=encoding,
            write_page_checksum=True,
        ) as file,
    ):
        for start in range(0, len(order), _ROW_GROUP):
            file.write_table(rows.take(order[start : start + _ROW_GROUP]))


def write_metadata(
    catalogue: Path, cells: Mapping[Cell, int], schema: pa.Schema, name: str, about: Mapping[str, str]
) -> None:
    """Write what makes a catalogue of partitions that are all there.

    Parameters
    ----------
    catalogue : Path
    cells : mapping
        Every partition and the number of its rows.
    schema : pyarrow.Schema
        Of the partitions.
    name : str
        Of the catalogue.
    about : mapping
        Further properties.

    Raises
    ------
    RuntimeError
        A partition does not have the rows that it should.
    """
    footers, sizes = [], []
    for folder in {partition_path(catalogue, cell).parent for cell in cells}:
        remove_leftovers(folder)  # of tasks that were killed
    for cell, rows in cells.items():
        path = partition_path(catalogue, cell)
        footer = pq.read_metadata(path)
        if footer.num_rows != rows:
            raise RuntimeError(f"{path}: holds {footer.num_rows} rows, {rows} were counted")
        footer.set_file_path(str(path.relative_to(catalogue / "dataset")))
        footers.append(footer)
        sizes.append(path.stat().st_size)
    with replacing(catalogue / "dataset" / "_metadata") as temporary:
        pq.write_metadata(schema, temporary, metadata_collector=footers)
    with replacing(catalogue / "dataset" / "_common_metadata") as temporary:
        pq.write_metadata(schema, temporary)
    lines = [f"{c.order},{c.pixel},{n},{size}" for (c, n), size in zip(cells.items(), sizes, strict=True)]
    write_text(catalogue / "partition_info.csv", "\n".join(["Norder,Npix,num_rows,num_bytes", *lines, ""]))
    described = {**_describe(cells, sum(sizes), name), **about}
    text = "".join(["#HATS catalog\n", *(f"{key}={value}\n" for key, value in described.items())])
    for file in ("properties", "hats.properties"):
        write_text(catalogue / file, text)


def _describe(cells: Mapping[Cell, int], size: int, name: str) -> dict[str, str]:
    share = sum(1 / (12 * 4**cell.order) for cell in cells)
    return {
        "obs_collection": re.sub(r"[^A-Za-z0-9_.-]", "_", name) or "run",
        "dataproduct_type": "source",
        "hats_nrows": str(sum(cells.values())),
        "hats_col_ra": "ra",
        "hats_col_dec": "dec",
        "hats_col_healpix": INDEX_COLUMN,
        "hats_col_healpix_order": str(INDEX_ORDER),
        "hats_npix_suffix": ".parquet",
        "hats_max_rows": str(max(cells.values())),
        "hats_order": str(max(cell.order for cell in cells)),
        "moc_sky_fraction": f"{share:.{max(1, 3 - math.ceil(math.log10(share)))}f}",
        "hats_builder": f"batchproc v{batchproc.__version__}",
        "hats_creation_date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MUTC"),
        "hats_estsize": str(size // 1024),
        "hats_version": "v1.0",
    }


def read_properties(catalogue: Path) -> dict[str, str]:
    """The properties of a catalogue; empty where there is none."""
    try:
        lines = (catalogue / "hats.properties").read_text().splitlines()
    except FileNotFoundError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def is_whole(catalogue: Path) -> bool:
    """Whether everything of a catalogue is there: partitions of the sizes they were written with, and its metadata."""
    try:
        rows = int(read_properties(catalogue)["hats_nrows"])
        listed = pd.read_csv(catalogue / "partition_info.csv")
        partitions = listed[["Norder", "Npix", "num_bytes"]].to_numpy().tolist()
        pq.read_schema(catalogue / "dataset" / "_common_metadata")
        return (
            listed["num_rows"].sum() == rows == pq.read_metadata(catalogue / "dataset" / "_metadata").num_rows
            and (catalogue / "properties").read_bytes() == (catalogue / "hats.properties").read_bytes()
            and all(partition_path(catalogue, Cell(o, p)).stat().st_size == size for o, p, size in partitions)
        )
    except (FileNotFoundError, ValueError, KeyError):
        return False
