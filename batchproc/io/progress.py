"""What has been done and what has failed: receipts, from markers and from the driver's log.

A finished image has a marker that holds its receipt; a rerun trusts markers and nothing else. Failures have no marker:
the driver appends them to ``log/failures.jsonl``, a line each, where they can be read at once. The newest word on an
image counts, and a marker counts more than any failure. ``receipts.parquet`` and ``failures.parquet`` are made from the
two, for people, when a driver begins and when it ends.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchproc.io.atomic import our_disk, replacing, write_text
from batchproc.io.catalogue import PARQUET
from batchproc.io.index import iter_markers
from batchproc.io.markers import RECEIPT_SCHEMA, now, receipt_of, receipt_row
from batchproc.io.run_folder import RunFolder
from batchproc.records import Receipt

__all__ = [
    "ReceiptLog",
    "bad_lines",
    "failure_log",
    "finished_images",
    "forget_failures",
    "gather",
    "iter_failures",
    "iter_receipts",
]

FAILURE_SCHEMA = pa.schema(
    [
        *(RECEIPT_SCHEMA.field(name) for name in ("image_id", "status", "stage", "error", "message")),
        pa.field("path", pa.string(), metadata={"meaning": "file of new"}),
        *(RECEIPT_SCHEMA.field(name) for name in ("metadata", "traceback", "time")),
    ]
)
_SYNC_S = 10.0  # how long a failure may be on its way to the disk, and so to other machines


class ReceiptLog:
    """The driver's log: is handed every receipt, and keeps those of failures.

    Examples
    --------
    >>> with ReceiptLog(folder) as log:                                                    # doctest: +SKIP
    ...     log.add(receipt)
    """

    def __init__(self, folder: RunFolder) -> None:
        self._file = failure_log(folder).open("a", encoding="utf-8")
        self._synced = time.monotonic()
        if self._file.tell():  # a driver that was killed may have left half a line
            self._file.write("\n")

    def add(self, receipt: Receipt) -> None:
        """Take over one receipt."""
        if receipt.status == "done":  # its marker has it
            return
        row = receipt_row(receipt, now())
        self._file.write(_line(row | {"time": row["time"].isoformat()}))
        self._file.flush()
        if time.monotonic() - self._synced >= _SYNC_S:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def __enter__(self) -> ReceiptLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._file:
            self._file.flush()
            self._sync()


def gather(folder: RunFolder) -> None:
    """Make ``receipts.parquet`` and ``failures.parquet``, and leave in the log what still counts.

    Only a driver does this, and not while it has a `ReceiptLog` open. Memory grows with the failures, and with the ids
    of what is done.

    Raises
    ------
    StorageError
        The disk does not take them; the log is what it was.
    """
    with our_disk(folder.path):
        _gather(folder)


def _gather(folder: RunFolder) -> None:
    failures = _failures(folder)
    write_text(failure_log(folder), "".join(map(_line, failures.values())))
    failed = [row | {"time": datetime.fromisoformat(row["time"])} for row in failures.values()]
    paths = {entry.image_id: entry.new for entry in folder.entries() if entry.image_id in failures} if failed else {}
    with (
        replacing(folder.receipts) as temporary,
        pq.ParquetWriter(temporary, RECEIPT_SCHEMA, **PARQUET) as receipts,
    ):
        for table in iter_markers(folder, RECEIPT_SCHEMA.names):
            receipts.write_table(table.cast(RECEIPT_SCHEMA))
        receipts.write_table(pa.Table.from_pylist(failed, RECEIPT_SCHEMA))
    with replacing(folder.failures) as temporary:
        rows = [row | {"path": paths.get(row["image_id"], "")} for row in failed]
        pq.write_table(pa.Table.from_pylist(rows, FAILURE_SCHEMA), temporary, **PARQUET)


def iter_receipts(folder: RunFolder | str | Path) -> Iterator[Receipt]:
    """The newest receipt of every image that has one (whatever the driver's state); those of failures come last."""
    folder = folder if isinstance(folder, RunFolder) else RunFolder.existing(folder)
    for table in iter_markers(folder, RECEIPT_SCHEMA.names):
        yield from map(receipt_of, table.to_pylist())
    yield from iter_failures(folder)


def iter_failures(folder: RunFolder) -> Iterator[Receipt]:
    """The newest receipt of every image that has failed and is not done."""
    yield from map(receipt_of, _failures(folder).values())


def finished_images(folder: RunFolder) -> dict[str, str]:
    """Image id → status of every image that has been tried, from markers and log."""
    statuses = {image_id: row["status"] for image_id, row in _failures(folder).items()}
    for table in iter_markers(folder, ["image_id"]):
        statuses.update(dict.fromkeys(table["image_id"].to_pylist(), "done"))
    return statuses


def forget_failures(folder: RunFolder, image_ids: Collection[str]) -> None:
    """Take images out of the log, which then have not failed; only a driver does this."""
    rows = list(_logged(folder))
    kept = [row for row in rows if row["image_id"] not in image_ids]
    if len(kept) < len(rows):
        write_text(failure_log(folder), "".join(map(_line, kept)))


def _failures(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """The newest row of each image that has failed and is not done."""
    failures: dict[str, dict[str, Any]] = {}
    for row in _logged(folder):
        failures.pop(row["image_id"], None)  # in the order of what is newest
        failures[row["image_id"]] = row
    if failures:
        for table in iter_markers(folder, ["image_id"]):
            for image_id in table["image_id"].to_pylist():
                failures.pop(image_id, None)
    return failures


def bad_lines(folder: RunFolder) -> int:
    """How many lines of the log are torn or altered."""
    return sum(row is None for row in _lines(folder))


def _logged(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """Rows of the log, without those that are torn, for their driver was killed, or altered."""
    yield from (row for row in _lines(folder) if row is not None)


def _lines(folder: RunFolder) -> Iterator[dict[str, Any] | None]:
    try:
        with failure_log(folder).open(encoding="utf-8", errors="replace") as file:
            for line in filter(str.strip, file):
                try:
                    row = json.loads(line)
                    if row.pop("crc") != _crc(row):
                        raise ValueError("altered")
                    datetime.fromisoformat(row["time"])
                    receipt_of(row)
                except (ValueError, KeyError, TypeError, AttributeError):
                    row = None
                yield row
    except FileNotFoundError:
        return


def _line(row: Mapping[str, Any]) -> str:
    """A line of the log, with a checksum."""
    return json.dumps({**row, "crc": _crc(row)}) + "\n"


def _crc(row: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())


def failure_log(folder: RunFolder) -> Path:
    """``log/failures.jsonl``."""
    return folder.log / "failures.jsonl"
