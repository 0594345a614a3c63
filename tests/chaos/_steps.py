"""What the workers of these tests do; functions of a module, so that worker processes find them by import.

Real images are processed by the real `process_image`, at a known pace and with a note of who is busy. Poison is in a
module of its own, which has little to import: a process that tries it alone has its time limit from its beginning.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from batchproc.config import Config
from batchproc.flow import process_image
from batchproc.io.fitsfile import split_hdu
from batchproc.records import ManifestEntry
from tests.chaos._watch import resident_mb

__all__ = ["BUSY", "MEMORY", "PACE_S", "followed", "paced"]

#: Seconds that an image takes at least: long against a worker's start, or nobody would ever be hit at work.
PACE_S = 1.5
#: Folder beside the images, with a file for each process that works on one.
BUSY = "busy"
#: File beside the images, to which each image adds a line: process, resident MB.
MEMORY = "memory.txt"


def beside(entry: ManifestEntry) -> Path:
    """The folder of the night."""
    return split_hdu(entry.new)[0].parent.parent


def paced(entry: ManifestEntry, config: Config) -> Any:
    """The real thing, and then a rest until `PACE_S` have passed."""
    note = beside(entry) / BUSY / str(os.getpid())
    for pid in (os.getpid(), os.getppid()):  # of a process that tries an image alone, the worker is the parent
        note.with_name(f"{pid}.began").touch()
    note.write_text(entry.image_id)
    start = time.monotonic()
    try:
        result = process_image(entry, config)
        time.sleep(max(0.0, start + PACE_S - time.monotonic()))
        return result
    finally:
        note.unlink(missing_ok=True)


def followed(entry: ManifestEntry, config: Config) -> Any:
    """The real thing, with a note of the memory that this process has after it."""
    result = process_image(entry, config)
    with (beside(entry) / MEMORY).open("a") as file:
        file.write(f"{os.getpid()} {resident_mb():.3f}\n")
    return result
