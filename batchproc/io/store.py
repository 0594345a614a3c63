"""One image onto the disk: its rows, its stamps, and last its done-marker."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchproc.io.atomic import our_disk
from batchproc.io.catalogue import make_rows, write_part
from batchproc.io.markers import (
    Marker,
    chunks_digest,
    entry_digest,
    file_digest,
    now,
    read_marker,
    rows_digest,
    software,
    write_marker,
)
from batchproc.io.shards import open_shard
from batchproc.io.stamps import write_stamps

if TYPE_CHECKING:
    from batchproc.io.run_folder import RunFolder
    from batchproc.records import ManifestEntry, Receipt

__all__ = ["store_image", "stored_receipt"]


def store_image(
    folder: RunFolder,
    entry: ManifestEntry,
    catalogue: Mapping[str, NDArray],
    stamps: NDArray[np.float32],
    receipt: Receipt,
    config_digest: str,
    *,
    inputs: str = "",
    models: Mapping[str, str] | None = None,
) -> Receipt:
    """Store what came out of an image; when it returns, the image is done.

    Killed at any moment before that, it leaves nothing that anybody reads.

    Parameters
    ----------
    folder : RunFolder
    entry : ManifestEntry
    catalogue : mapping
        Every column of `batchproc.records.CATALOGUE`, ``(n,)`` each.
    stamps : ndarray (n, 3, h, w) float32
    receipt : Receipt
        ``done``, with n candidates.
    config_digest : str
        `Config.image_digest` of the settings it was made with.
    inputs : str
        `batchproc.io.markers.input_digest` of the entry, taken before its files were read.
    models : mapping, optional
        Name → hash of the models that the run scores with.

    Returns
    -------
    Receipt
        With the seconds that it took, as ``store``: what stands in the marker.

    Raises
    ------
    StorageError
        The disk does not take it: it is full, read-only, or broken.
    OSError
        The disk was away for a moment, or somebody removes what is stored.
    ValueError
        Rows, stamps and receipt are not of one number.
    """
    start = time.perf_counter()
    rows = make_rows(catalogue)
    if not len(rows) == len(stamps) == receipt.n_candidates:
        raise ValueError(
            f"{entry.image_id}: {len(rows)} rows and {len(stamps)} stamps, {receipt.n_candidates} in the receipt"
        )
    with our_disk(folder.path):
        files, chunks = _write_parts(folder, entry.image_id, rows, stamps)
        receipt = replace(receipt, seconds={**receipt.seconds, "store": time.perf_counter() - start})
        marker = Marker(
            receipt=receipt,
            config_digest=config_digest,
            entry_digest=entry_digest(entry),
            input_digest=inputs,
            versions=software(),
            models=models or {},
            rows_digest=rows_digest(rows),
            stamps_digest=chunks,
            time=now(),
            files=files,
        )
        write_marker(folder.marker(entry.image_id), marker)
        _check_kept(folder, entry.image_id, len(stamps))
    return receipt


def stored_receipt(folder: RunFolder, entry: ManifestEntry, config_digest: str) -> Receipt | None:
    """The receipt of an image that has been done with these settings and has files of its own; None otherwise.

    For a task that may be run twice; what is rolled up, it does not see.
    """
    try:
        marker, digest = read_marker(folder.marker(entry.image_id))
    except (OSError, ValueError):
        return None
    same = (marker.config_digest, marker.entry_digest, marker.digest) == (config_digest, entry_digest(entry), digest)
    return marker.receipt if same else None


def _check_kept(folder: RunFolder, image_id: str, n: int) -> None:
    """Undo the marker of a task that was taken for dead, by a driver that removed what it had not marked yet."""
    needed = [folder.catalogue_part(image_id), *([folder.stamps_part(image_id)] if n else [])]
    missing = [path for path in needed if not path.exists()]
    if missing:
        folder.marker(image_id).unlink(missing_ok=True)
        raise OSError(errno.ESTALE, "removed while its image was stored: another driver has the run", str(missing[0]))


def _write_parts(
    folder: RunFolder, image_id: str, rows: pa.Table, stamps: NDArray[np.float32]
) -> tuple[dict[str, str], str]:
    """Digests of the files of an image, and that of its encoded stamps, read back from where they were written."""
    part, store = folder.catalogue_part(image_id), folder.stamps_part(image_id)
    write_part(part, rows)
    write_stamps(store, stamps)
    files = {"catalogue": file_digest(part)}
    if not len(stamps):
        return files, chunks_digest(())
    shard = open_shard(store)
    files |= {"stamps": file_digest(shard.path), "zarr.json": file_digest(store / "zarr.json")}
    return files, chunks_digest(shard.chunks())
