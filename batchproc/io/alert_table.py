"""The table of scored alerts: its columns, and the parts that it is written in and joined of.

A part is a Parquet file of the table's schema, written whole or not at all, with what became of its alerts in its
metadata: so parts that are there need not be read to go on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchproc.errors import DamagedRunError
from batchproc.io.alerts import Alerts
from batchproc.io.atomic import replacing
from batchproc.io.catalogue import PARQUET
from batchproc.io.models import Model

__all__ = [
    "MEASUREMENTS",
    "Part",
    "join_parts",
    "make_table",
    "read_part",
    "score_columns",
    "table_schema",
    "write_part",
]

#: What the table takes of ``Alerts.candidate``, under the survey's names: type, unit, meaning. First ZTF's.
MEASUREMENTS = {
    "jd": (pa.float64(), "d", "Julian date of the middle of the exposure"),
    "fid": (pa.int32(), "", "filter: 1 g, 2 r, 3 i"),
    "field": (pa.int32(), "", "field of the survey"),
    "rcid": (pa.int32(), "", "readout channel, 0 to 63"),
    "ra": (pa.float64(), "deg", "right ascension, J2000"),
    "dec": (pa.float64(), "deg", "declination, J2000"),
    "magpsf": (pa.float32(), "mag", "magnitude by the PSF"),
    "sigmapsf": (pa.float32(), "mag", "its error"),
    "isdiffpos": (pa.string(), "", "t or 1: brighter than the reference; f or 0: fainter"),
    "fwhm": (pa.float32(), "pix", "full width at half maximum"),
    "rb": (pa.float32(), "", "score of ZTF's random forest"),
    "midpointMjdTai": (pa.float64(), "d", "MJD of the middle of the exposure, TAI"),
    "band": (pa.string(), "", "filter"),
    "visit": (pa.int64(), "", "exposure"),
    "detector": (pa.int32(), "", "CCD"),
    "psfFlux": (pa.float32(), "nJy", "flux by the PSF, of the difference"),
    "psfFluxErr": (pa.float32(), "nJy", "its error"),
    "snr": (pa.float32(), "", "signal-to-noise ratio of the detection"),
    "isNegative": (pa.bool_(), "", "fainter than the template"),
    "reliability": (pa.float32(), "", "Rubin's own score"),
}
#: Rows of a row group, without stamps: some MB.
_ROW_GROUP = 1 << 16


def score_columns(model: Model) -> list[str]:
    """Names of a model's columns, as `open_catalogue` has them."""
    if len(model.classes) == 1:
        return [f"score_{model.name}"]
    return [f"score_{model.name}_{name}" for name in model.classes]


def table_schema(models: Sequence[Model]) -> pa.Schema:
    """Columns with units and meanings; each model's version, variant, normalisation and hash in their metadata."""
    about = {
        model.name: {
            "model": model.name,
            "version": str(model.version),
            "variant": model.variant,
            "normalisation": str(model.normalisation),
            "hash": model.hash,
        }
        for model in models
    }
    fields = [
        _field("candid", pa.int64(), "", "the alert (of Rubin: diaSourceId); -1: could not be read"),
        _field("object_id", pa.string(), "", "its object"),
        _field("survey", pa.string(), "", "ZTF or LSST; empty: could not be read"),
        *(_field(name, kind, unit, meaning) for name, (kind, unit, meaning) in MEASUREMENTS.items()),
        _field("drb", pa.float64(), "", "ZTF's own score in the packet; NaN: none"),
        _field("drb_version", pa.string(), "", "which network that was"),
    ]
    for model in models:
        more = about[model.name]
        fields += [_field(name, pa.float32(), "", "score; NaN: not scored", more) for name in score_columns(model)]
    fields += [
        _field("problem", pa.string(), "", "what is wrong with the packet"),
        _field("origin", pa.string(), "", "its file"),
    ]
    return pa.schema(fields, {"models": json.dumps(about)})


def _field(name: str, kind: pa.DataType, unit: str, meaning: str, more: Mapping[str, str] | None = None) -> pa.Field:
    return pa.field(name, kind, metadata={"unit": unit, "meaning": meaning, **(more or {})})


def make_table(alerts: Alerts, scores: Sequence[NDArray[np.float32]], schema: pa.Schema) -> pa.Table:
    """Rows of some alerts; `scores` has the ``(n, classes)`` of each model."""
    columns: dict[str, Any] = {
        "candid": alerts.candid,
        "object_id": alerts.object_id,
        "survey": alerts.survey,
        "drb": alerts.drb,
        "drb_version": alerts.drb_version,
        "problem": alerts.problems,
        "origin": alerts.origin,
    }
    for name, (kind, _, _) in MEASUREMENTS.items():
        columns[name] = [_value(candidate.get(name), kind) for candidate in alerts.candidate]
    by_column = iter(np.concatenate(scores, axis=1).T)
    names = [name for name in schema.names if name.startswith("score_")]
    columns |= dict(zip(names, by_column, strict=True))
    return pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)


def _value(value: Any, kind: pa.DataType) -> Any:
    """What a packet says, where it is of the right type; null otherwise."""
    if kind == pa.bool_() or isinstance(value, bool):
        return value if kind == pa.bool_() and isinstance(value, bool) else None
    if kind == pa.string():
        return value if isinstance(value, str) else None
    if pa.types.is_integer(kind):
        return value if isinstance(value, int) and abs(value) < 2 ** (kind.bit_width - 1) else None
    return float(value) if isinstance(value, int | float) else None


# --- Parts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What a part says of itself.

    Attributes
    ----------
    counts : dict
        Alerts that were "scored", "not scored" and "unreadable".
    n_bytes : int
        Of the source that it took.
    """

    counts: Mapping[str, int]
    n_bytes: int


def write_part(path: Path, tables: Sequence[pa.Table], schema: pa.Schema, part: Part) -> None:
    """Write a part, whole or not at all."""
    about = json.dumps({"counts": dict(part.counts), "n_bytes": part.n_bytes})
    table = pa.concat_tables([schema.empty_table(), *tables]).replace_schema_metadata(
        {**schema.metadata, b"part": about}
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary, **PARQUET)


def read_part(path: Path) -> Part:
    """What a part says of itself.

    Raises
    ------
    DamagedRunError
        It is none (any more).
    """
    try:
        about = json.loads(pq.read_schema(path).metadata[b"part"])
        return Part(Counter(about["counts"]), int(about["n_bytes"]))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _damaged(path, error) from error


def join_parts(parts: Iterable[Path], out: Path, schema: pa.Schema) -> None:
    """Write the rows of all parts to one file, whole or not at all; no more than a row group is held.

    Raises
    ------
    DamagedRunError
        A part cannot be read (any more).
    """
    with replacing(out) as temporary, pq.ParquetWriter(temporary, schema, **PARQUET) as file:
        waiting: list[pa.Table] = []
        for table in _tables(parts, schema):
            waiting.append(table)
            if sum(map(len, waiting)) >= _ROW_GROUP:
                _flush(waiting, file)
        _flush(waiting, file)


def _tables(parts: Iterable[Path], schema: pa.Schema) -> Iterator[pa.Table]:
    for path in parts:
        try:
            table = pq.read_table(path, page_checksum_verification=True, partitioning=None)
        except (ValueError, OSError) as error:
            raise _damaged(path, error) from error
        yield table.replace_schema_metadata(schema.metadata).cast(schema)


def _flush(waiting: list[pa.Table], file: pq.ParquetWriter) -> None:
    if waiting:
        table = pa.concat_tables(waiting)
        file.write_table(table, row_group_size=len(table))
        waiting.clear()


def _damaged(path: Path, error: Exception) -> DamagedRunError:
    return DamagedRunError(f"{path}: cannot be read ({error}); remove it and give the same command again")
