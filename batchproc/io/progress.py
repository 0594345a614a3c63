"""What has been done: markers that tasks write last, the log of receipts, and what is read back from the two.

A finished image has a marker in ``done/`` that holds its receipt; a rerun trusts markers and nothing else. Failures
have no marker: they live in the driver's log, ``log/NNNNNNNN.parquet``, which grows part by part (so that a campaign of
a million images never rewrites a long file) and is gathered into ``receipts.parquet`` and ``failures.parquet`` when the
driver ends, and when the next one begins. The newest row of an image counts.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchproc.io.atomic import part_name, replacing
from batchproc.io.run_folder import RunFolder
from batchproc.records import Receipt

__all__ = [
    "ReceiptLog",
    "Status",
    "done_images",
    "drop_strange_markers",
    "finished_images",
    "gather",
    "iter_receipts",
    "read_index",
    "read_status",
]

_MOST_PARTS = 200
_JSON = ("seconds", "quality", "metadata")  # nested fields travel as JSON text, which every reader understands

RECEIPT_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), metadata={"meaning": "image_id of the manifest"}),
        pa.field("status", pa.string(), metadata={"meaning": "done, failed (foreseen) or bug"}),
        pa.field("n_candidates", pa.int64(), metadata={"meaning": "rows in the catalogue"}),
        pa.field("seconds", pa.string(), metadata={"unit": "s", "meaning": "wall-clock seconds of each step, JSON"}),
        pa.field("cpu_seconds", pa.float64(), metadata={"unit": "s", "meaning": "CPU time of the task"}),
        pa.field("peak_memory_mb", pa.float64(), metadata={"unit": "MiB", "meaning": "largest resident size so far"}),
        pa.field("quality", pa.string(), metadata={"meaning": "measured numbers, JSON"}),
        pa.field("stage", pa.string(), metadata={"meaning": "step that failed"}),
        pa.field("error", pa.string(), metadata={"meaning": "type of the error"}),
        pa.field("message", pa.string(), metadata={"meaning": "what was found, what was expected, what to do"}),
        pa.field("traceback", pa.string(), metadata={"meaning": "of a bug"}),
        pa.field("metadata", pa.string(), metadata={"meaning": "numbers of the failure, JSON"}),
        pa.field("time", pa.timestamp("ms", tz="UTC"), metadata={"meaning": "when the driver noted it"}),
    ]
)

FAILURE_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), metadata={"meaning": "image_id of the manifest"}),
        pa.field("status", pa.string(), metadata={"meaning": "failed (foreseen) or bug"}),
        pa.field("stage", pa.string(), metadata={"meaning": "step that failed"}),
        pa.field("error", pa.string(), metadata={"meaning": "type of the error"}),
        pa.field("message", pa.string(), metadata={"meaning": "what was found, what was expected, what to do"}),
        pa.field("path", pa.string(), metadata={"meaning": "file of new"}),
        pa.field("metadata", pa.string(), metadata={"meaning": "numbers of the failure, JSON"}),
        pa.field("traceback", pa.string(), metadata={"meaning": "of a bug"}),
        pa.field("time", pa.timestamp("ms", tz="UTC"), metadata={"meaning": "when the driver noted it"}),
    ]
)


def done_images(folder: RunFolder, image_ids: Iterable[str]) -> set[str]:
    """Those of the images that have a done-marker (one listing of the folder, whatever their number)."""
    marked = _marked(folder)
    return {image_id for image_id in image_ids if part_name(image_id) in marked}


def drop_strange_markers(folder: RunFolder) -> int:
    """Remove markers of images that were done with other settings than the run's; returns how many there were.

    They can be left by a run that had the folder before, or copied from another; without them the images are missing.
    """
    digest = folder.config().image_digest

    def is_strange(path: Path) -> bool:
        try:
            return bool(json.loads(path.read_text())["config_digest"] != digest)
        except (ValueError, KeyError, TypeError):  # no marker of ours: it says nothing about the settings
            return True

    paths = [folder.done / f"{name}.json" for name in _marked(folder)]
    with ThreadPoolExecutor(8) as pool:  # each read waits for a file server
        strange = [path for path, bad in zip(paths, pool.map(is_strange, paths), strict=True) if bad]
    for path in strange:
        path.unlink()
    return len(strange)


class ReceiptLog:
    """The driver's log of receipts: handed over one by one, written in parts, gathered at the end.

    Parameters
    ----------
    folder : RunFolder
    rows, seconds : int, float
        A part is written when it has so many rows, or when the last one is so old.
    """

    def __init__(self, folder: RunFolder, rows: int = 1000, seconds: float = 10.0) -> None:
        self._folder = folder
        self._rows, self._seconds = rows, seconds
        self._waiting: list[dict[str, Any]] = []
        self._written = time.monotonic()
        self._number = 1 + max((int(path.stem) for path in _parts(folder)), default=0)

    def add(self, receipt: Receipt) -> None:
        """Take over one receipt."""
        self._waiting.append(_row(receipt, datetime.now(UTC)))
        if len(self._waiting) >= self._rows or time.monotonic() - self._written >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Bring to the disk what has been handed over."""
        if self._waiting:
            table = pa.Table.from_pylist(self._waiting, RECEIPT_SCHEMA)
            with replacing(self._folder.log / f"{self._number:08d}.parquet") as temporary:
                pq.write_table(table, temporary, compression="zstd")
            self._waiting, self._number = [], self._number + 1
            if len(_parts(self._folder)) >= _MOST_PARTS:
                gather(self._folder)
        self._written = time.monotonic()

    def __enter__(self) -> ReceiptLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.flush()


def gather(folder: RunFolder) -> None:
    """Make ``receipts.parquet`` and ``failures.parquet`` from the log and from markers that a killed driver missed.

    Reads part by part, so memory grows with the number of images by their ids alone.
    """
    paths = dict(_paths_of_failures(folder))
    with (
        replacing(folder.receipts) as receipts_file,
        replacing(folder.failures) as failures_file,
        pq.ParquetWriter(receipts_file, RECEIPT_SCHEMA, compression="zstd") as receipts,
        pq.ParquetWriter(failures_file, FAILURE_SCHEMA, compression="zstd") as failures,
    ):
        for table in _newest_rows(folder, RECEIPT_SCHEMA.names):
            receipts.write_table(table)
            failed = table.filter(pc.not_equal(table["status"], "done"))
            if failed.num_rows:
                path = pa.array([paths.get(name, "") for name in failed["image_id"].to_pylist()], pa.string())
                failures.write_table(failed.append_column("path", path).select(FAILURE_SCHEMA.names))
    # Rows are in receipts.parquet now. Were we killed before this, they would merely be read twice.
    for part in _parts(folder):
        part.unlink()


def iter_receipts(folder: RunFolder | str | Path) -> Iterator[Receipt]:
    """The newest receipt of every image that has one, image after image (whatever the driver's state)."""
    folder = folder if isinstance(folder, RunFolder) else RunFolder.existing(folder)
    for table in _newest_rows(folder, RECEIPT_SCHEMA.names):
        for row in table.drop_columns(["time"]).to_pylist():
            yield Receipt(**row | {key: json.loads(row[key]) for key in _JSON})


def finished_images(folder: RunFolder) -> dict[str, str]:
    """Image id → status of every image that has been tried, from markers and log."""
    statuses: dict[str, str] = {}
    for table in _newest_rows(folder, ["image_id", "status"]):
        statuses.update(zip(table["image_id"].to_pylist(), table["status"].to_pylist(), strict=True))
    return statuses


@dataclass(frozen=True)
class Index:
    """Where the candidates of each finished image begin in the whole run.

    Attributes
    ----------
    image_ids : tuple of str
        Finished images with candidates, in the manifest's order.
    offsets : ndarray (n_images + 1,) int64
        ``stamp_index`` of the first candidate of each, and the total at the end.
    """

    image_ids: tuple[str, ...]
    offsets: np.ndarray

    def __len__(self) -> int:
        return int(self.offsets[-1])


def read_index(folder: RunFolder) -> Index:
    """The `Index` of a run, as it is at this moment."""
    counts: dict[str, int] = {}
    for table in _newest_rows(folder, ["image_id", "status", "n_candidates"]):
        table = table.filter(pc.equal(table["status"], "done"))
        counts.update(zip(table["image_id"].to_pylist(), table["n_candidates"].to_pylist(), strict=True))
    ids = tuple(image_id for image_id in folder.image_ids() if counts.get(image_id))
    return Index(ids, np.concatenate([[0], np.cumsum([counts[i] for i in ids], dtype=np.int64)]).astype(np.int64))


@dataclass(frozen=True)
class Status:
    """How far a run has come.

    Attributes
    ----------
    total, done, failed, bugs, missing : int
        Images: in the manifest, finished, failed in a foreseen way, failed by a bug, not tried yet.
    n_candidates : int
    errors : dict
        Number of failures by "stage: type of error", the most frequent first.
    scores : dict
        Number of score files of each model.
    """

    run: str
    total: int
    done: int
    failed: int
    bugs: int
    missing: int
    n_candidates: int
    errors: Mapping[str, int] = field(default_factory=dict)
    scores: Mapping[str, int] = field(default_factory=dict)


def read_status(folder: RunFolder) -> Status:
    """The `Status` of a run, while it is at work or afterwards."""
    statuses: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    n_candidates = 0
    for table in _newest_rows(folder, ["image_id", "status", "n_candidates", "stage", "error"]):
        rows = table.to_pylist()
        statuses.update(row["status"] for row in rows)
        errors.update(f"{row['stage']}: {row['error']}" for row in rows if row["status"] != "done")
        n_candidates += sum(row["n_candidates"] for row in rows)
    total = pq.read_metadata(folder.manifest).num_rows
    return Status(
        run=str(folder.path),
        total=total,
        done=statuses["done"],
        failed=statuses["failed"],
        bugs=statuses["bug"],
        missing=total - sum(statuses.values()),
        n_candidates=n_candidates,
        errors=dict(errors.most_common()),
        scores={path.name: len(list(path.glob("[!.]*.parquet"))) for path in sorted(folder.scores.glob("*/"))},
    )


def _row(receipt: Receipt, when: datetime) -> dict[str, Any]:
    values = {name: getattr(receipt, name) for name in RECEIPT_SCHEMA.names if name != "time"}
    return values | {key: _to_json(values[key]) for key in _JSON} | {"time": when}


def _parts(folder: RunFolder) -> list[Path]:
    return sorted(folder.log.glob("[0-9]*.parquet"))


def _newest_rows(folder: RunFolder, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Tables with one row an image, its newest; from receipts.parquet, the log, and markers not yet in either.

    Markers rule: an image is done if and only if it has one, whatever the log says.
    """
    marked = _marked(folder)
    sources = _open_sources(folder)
    newest: dict[str, int] = {}  # image → number of its newest row, counted through all sources
    total = 0
    for table in _stored_rows(sources, ["image_id"]):
        newest.update((name, total + i) for i, name in enumerate(table["image_id"].to_pylist()))
        total += table.num_rows
    keep = np.zeros(total, bool)
    keep[np.fromiter(newest.values(), np.int64, len(newest))] = True
    logged: set[str] = set()
    start = 0
    for table in _stored_rows(sources, list(dict.fromkeys([*columns, "status", "image_id"]))):
        names = [part_name(image_id) for image_id in table["image_id"].to_pylist()]
        done = [status == "done" for status in table["status"].to_pylist()]
        true = [(name in marked) == is_done for name, is_done in zip(names, done, strict=True)]
        chosen = keep[start : start + table.num_rows] & np.array(true, bool)
        start += table.num_rows
        logged.update(names[i] for i in np.flatnonzero(chosen))
        yield table.filter(pa.array(chosen)).select(list(columns))
    late = [folder.done / f"{name}.json" for name in sorted(marked - logged)]
    for some in (late[i : i + 1000] for i in range(0, len(late), 1000)):
        yield pa.Table.from_pylist([_row_of_marker(path) for path in some], RECEIPT_SCHEMA).select(list(columns))


def _marked(folder: RunFolder) -> set[str]:
    """Names of the done-markers."""
    if not folder.done.is_dir():
        return set()
    return {name.removesuffix(".json") for name in os.listdir(folder.done) if not name.startswith(".")}


def _open_sources(folder: RunFolder) -> list[pq.ParquetFile]:
    """receipts.parquet and the parts of the log, opened: a driver that gathers meanwhile takes nothing away.

    The parts first: gathering replaces receipts.parquet before it deletes them, so every row is seen at least once.
    """
    files = []
    for path in [*_parts(folder), folder.receipts]:
        with suppress(FileNotFoundError):
            files.append(pq.ParquetFile(path))
    if files and folder.receipts.is_file():
        files.insert(0, files.pop())  # in order of time
    return files


def _stored_rows(sources: Sequence[pq.ParquetFile], columns: Sequence[str]) -> Iterator[pa.Table]:
    for file in sources:
        for batch in file.iter_batches(batch_size=10_000, columns=list(columns)):
            yield pa.Table.from_batches([batch])


def _row_of_marker(path: Path) -> dict[str, Any]:
    receipt = Receipt(**json.loads(path.read_text())["receipt"])
    return _row(receipt, datetime.fromtimestamp(path.stat().st_mtime, UTC))


def _paths_of_failures(folder: RunFolder) -> Iterator[tuple[str, str]]:
    failed = {name for name, status in finished_images(folder).items() if status != "done"}
    if failed:
        yield from ((entry.image_id, entry.new) for entry in folder.entries() if entry.image_id in failed)


def _to_json(values: Any) -> str:
    return json.dumps(values, default=_plain)


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's own; anything else as text."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return dict(value) if isinstance(value, Mapping) else str(value)
