"""A disk that takes everything and keeps nothing: what a campaign costs without its files.

A process that imports this stores no image from then on, as a worker does that is handed `nothing_left`.
"""

from __future__ import annotations

from typing import Any

import batchproc.io.store
from batchproc.config import Config
from batchproc.io.run_folder import RunFolder
from batchproc.records import ManifestEntry, Receipt
from tests._runs import Result, result
from tests.benchmarks._planned import SIZE


def nothing_left(entry: ManifestEntry, config: Config) -> Result:
    """Stands in for the pixels and for the disk."""
    return result(entry.image_id, 0, SIZE)


def _store_nothing(
    folder: RunFolder, entry: ManifestEntry, catalogue: Any, stamps: Any, receipt: Receipt, *others: Any, **options: Any
) -> Receipt:
    return receipt


batchproc.io.store.store_image = _store_nothing
