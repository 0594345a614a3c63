"""Done-markers: what says that an image is finished, and how to find out later whether what it says still holds.

A marker is written last, ``done/IMAGE.json``, and becomes a row of a pack's marker when the image is rolled up
(`batchproc.io.packs`). It tells under which settings, from which input and by which software the image was done, and
carries digests of its results: of their *contents*, the values of the columns and the encoded chunks of the stamps,
which are the same wherever they lie.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import batchproc
from batchproc.io.atomic import write_text
from batchproc.io.fitsfile import split_hdu
from batchproc.io.manifest import entry_digest
from batchproc.records import ManifestEntry, Receipt

__all__ = [
    "MARKER_SCHEMA",
    "RECEIPT_SCHEMA",
    "Marker",
    "chunks_digest",
    "entry_digest",
    "file_digest",
    "input_digest",
    "input_files",
    "marker_row",
    "now",
    "read_marker",
    "receipt_of",
    "receipt_row",
    "row_marker",
    "rows_digest",
    "software",
    "to_json",
    "write_marker",
]

_BEGINNING = datetime.fromtimestamp(0, UTC)
_SOFTWARE = ("numpy", "scipy", "astropy", "pyfftw", "numba", "sep", "zarr", "pyarrow")
_JSON = ("seconds", "quality", "metadata")  # nested fields travel as JSON text, which every reader understands


def _field(name: str, kind: pa.DataType, meaning: str, unit: str = "") -> pa.Field:
    return pa.field(name, kind, metadata={"meaning": meaning} | ({"unit": unit} if unit else {}))


RECEIPT_SCHEMA = pa.schema(
    [
        _field("image_id", pa.string(), "image_id of the manifest"),
        _field("status", pa.string(), "done, failed (foreseen) or bug"),
        _field("n_candidates", pa.int64(), "rows in the catalogue"),
        _field("seconds", pa.string(), "wall-clock seconds of each step, JSON", "s"),
        _field("cpu_seconds", pa.float64(), "CPU time of the task", "s"),
        _field("peak_memory_mb", pa.float64(), "largest resident size so far", "MiB"),
        _field("quality", pa.string(), "measured numbers, JSON"),
        _field("stage", pa.string(), "step that failed"),
        _field("error", pa.string(), "type of the error"),
        _field("message", pa.string(), "what was found, what was expected, what to do"),
        _field("traceback", pa.string(), "of a bug"),
        _field("metadata", pa.string(), "numbers of the failure, JSON"),
        _field("time", pa.timestamp("ms", tz="UTC"), "when it was noted"),
    ]
)

#: A marker as a row; without the place where a pack keeps the image (see `batchproc.io.index`).
MARKER_SCHEMA = pa.schema(
    [
        *RECEIPT_SCHEMA,
        _field("version", pa.string(), "of batchproc"),
        _field("config_digest", pa.string(), "Config.image_digest of the settings it was done with"),
        _field("entry_digest", pa.string(), "of its row of the manifest"),
        _field("input_digest", pa.string(), "of names, sizes and times of its files"),
        _field("versions", pa.string(), "of the software that did it, JSON"),
        _field("models", pa.string(), "hash of each model that the run was to score with, JSON"),
        _field("rows_digest", pa.string(), "of its rows of the catalogue"),
        _field("stamps_digest", pa.string(), "of its encoded chunks of stamps"),
        _field("digest", pa.string(), "of all of this"),
    ]
)


@dataclass(frozen=True)
class Marker:
    """What is known of a finished image.

    Attributes
    ----------
    receipt : Receipt
        Of its task; ``receipt.n_candidates`` rows in the catalogue, and as many stamps.
    config_digest, entry_digest, input_digest : str
        `Config.image_digest` of the settings, `entry_digest` of the row of the manifest, `input_digest` of the files.
    versions, models : mapping
        Software → version; model → hash, of those the run was to score with.
    rows_digest, stamps_digest : str
        `rows_digest` and `chunks_digest` of the results.
    time : datetime
        When it was written, UTC, to the millisecond.
    files : mapping
        While the image has files of its own: part (``catalogue``, ``stamps``, ``zarr.json``) → its `file_digest`.
    """

    receipt: Receipt
    config_digest: str
    entry_digest: str = ""
    input_digest: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    rows_digest: str = ""
    stamps_digest: str = ""
    time: datetime = _BEGINNING
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def image_id(self) -> str:
        """Of the manifest."""
        return self.receipt.image_id

    @property
    def n_rows(self) -> int:
        """Rows of the catalogue, and stamps."""
        return self.receipt.n_candidates

    @property
    def digest(self) -> str:
        """Of everything else in it but `files`: the same as long as nobody alters it."""
        return self.as_dict()["digest"]

    def as_dict(self) -> dict[str, Any]:
        """As it stands in its file."""
        receipt = asdict(self.receipt)
        said = {
            "receipt": receipt | {name: float(receipt[name]) for name in ("cpu_seconds", "peak_memory_mb")},
            "config_digest": self.config_digest,
            "entry_digest": self.entry_digest,
            "input_digest": self.input_digest,
            "versions": dict(self.versions),
            "models": dict(self.models),
            "rows_digest": self.rows_digest,
            "stamps_digest": self.stamps_digest,
            "time": self.time.isoformat(timespec="milliseconds"),
        }
        said = json.loads(to_json(said))
        return said | {"digest": _short(json.dumps(said, sort_keys=True).encode())}


def write_marker(path: Path, marker: Marker) -> None:
    """Write the marker of an image, whole or not at all: the last thing its task does."""
    write_text(path, to_json(marker.as_dict() | {"files": dict(marker.files)}))


def read_marker(path: Path) -> tuple[Marker, str]:
    """The marker of an image that has files of its own, and the digest that stands in it.

    Raises
    ------
    FileNotFoundError
        There is none (any more).
    ValueError
        It is no marker; the message tells what is wrong.
    """
    try:
        said = json.loads(path.read_text())
        marker = Marker(
            receipt=Receipt(**said["receipt"]),
            config_digest=str(said["config_digest"]),
            **{name: said.get(name, "") for name in ("entry_digest", "input_digest", "rows_digest", "stamps_digest")},
            **{name: said.get(name, {}) for name in ("versions", "models", "files")},
            time=_time(said["time"]) if "time" in said else datetime.fromtimestamp(path.stat().st_mtime, UTC),
        )
        if not isinstance(marker.n_rows, int) or not isinstance(marker.image_id, str):
            raise ValueError("no number of candidates")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no done-marker ({type(error).__name__}: {error})") from error
    return marker, str(said.get("digest", ""))


def marker_row(marker: Marker) -> dict[str, Any]:
    """A row of `MARKER_SCHEMA`."""
    said = marker.as_dict()
    texts = ("config_digest", "entry_digest", "input_digest", "rows_digest", "stamps_digest", "digest")
    row = receipt_row(marker.receipt, marker.time) | {name: said[name] for name in texts}
    row |= {name: to_json(said[name]) for name in ("versions", "models")}
    return row | {"version": marker.versions.get("batchproc", "")}


def row_marker(row: Mapping[str, Any]) -> tuple[Marker, str]:
    """The marker that a row of `MARKER_SCHEMA` tells of, and the digest that stands in it."""
    texts = ("config_digest", "entry_digest", "input_digest", "rows_digest", "stamps_digest")
    marker = Marker(
        receipt=receipt_of(row),
        **{name: row[name] for name in texts},
        versions=json.loads(row["versions"]),
        models=json.loads(row["models"]),
        time=row["time"],
    )
    return marker, str(row["digest"])


def receipt_row(receipt: Receipt, when: datetime) -> dict[str, Any]:
    """A row of `RECEIPT_SCHEMA`."""
    values = {name: getattr(receipt, name) for name in RECEIPT_SCHEMA.names if name != "time"}
    return values | {name: to_json(values[name]) for name in _JSON} | {"time": when}


def receipt_of(row: Mapping[str, Any]) -> Receipt:
    """The receipt that a row of `RECEIPT_SCHEMA` tells of."""
    values = {name: row[name] for name in RECEIPT_SCHEMA.names if name != "time"}
    return Receipt(**values | {name: json.loads(values[name]) for name in _JSON})


def rows_digest(rows: pa.Table) -> str:
    """Of the values of a table of `batchproc.io.catalogue.SCHEMA`, whatever file and chunks they come from."""
    found = sha256()
    for name in rows.column_names:
        chunks = rows[name].chunks
        column = pa.concat_arrays(chunks) if chunks else pa.array([], rows[name].type)
        found.update(f"{name} {column.type} {len(column)}\n".encode())
        if pa.types.is_string(column.type):
            lengths = pc.fill_null(pc.binary_length(column), -1)
            found.update(lengths.to_numpy(zero_copy_only=False).astype("<i4").tobytes())
            found.update(_text(column))
        else:
            found.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).tobytes())
    return found.hexdigest()[:32]


def chunks_digest(chunks: Iterable[bytes | None]) -> str:
    """Of stamps as they are stored: encoded inner chunks of a shard in their order, None for one without any data."""
    found = sha256()
    for chunk in chunks:
        found.update((2**64 - 1 if chunk is None else len(chunk)).to_bytes(8, "little"))
        found.update(chunk or b"")
    return found.hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    found = sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()[:32]


def input_files(entry: ManifestEntry) -> list[Path]:
    """The files that a row of the manifest names."""
    planes = (entry.new_mask, entry.new_variance, entry.new_psf)
    specs = (entry.new, *entry.ref, *planes, *entry.ref_mask, *entry.ref_variance, *entry.ref_psf)
    return [split_hdu(spec)[0] for spec in specs if spec]


def input_digest(entry: ManifestEntry) -> str:
    """Of the names, sizes and times of the files of an image; a file that changes afterwards gives another one."""
    said: list[list[Any]] = []
    for path in input_files(entry):
        try:
            found = os.stat(path)
            said.append([str(path), found.st_size, found.st_mtime_ns])
        except (OSError, ValueError):
            said.append([str(path), None, None])
    return _short(json.dumps(said).encode())


@lru_cache(maxsize=1)
def software() -> Mapping[str, str]:
    """What the values of this process depend on, with versions."""
    found = {"batchproc": batchproc.__version__, "python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # put there by other means than pip
            found[name] = ""
    return found


def now() -> datetime:
    """The time, to the millisecond that the files keep."""
    return _time(datetime.now(UTC).isoformat(timespec="milliseconds"))


def to_json(values: Any) -> str:
    """JSON of records with NumPy's numbers in them."""
    return json.dumps(values, default=_plain)


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's own; anything else as text."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return dict(value) if isinstance(value, Mapping) else str(value)


def _text(column: pa.Array) -> bytes:
    """The characters of a column of strings, end to end."""
    _, offsets, characters = column.buffers()
    if characters is None:
        return b""
    bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return characters.slice(bounds[0], bounds[-1] - bounds[0]).to_pybytes()


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _short(data: bytes) -> str:
    return sha256(data).hexdigest()[:32]
