"""What the workers of these tests do; functions of a module, so that worker processes find them by import.

Real images are processed by the real `process_image`, at a known pace and with a note of who is busy. Poison does what
its name says.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from batchproc.config import Config
from batchproc.flow import process_image
from batchproc.io.fitsfile import split_hdu
from batchproc.records import ManifestEntry
from tests import _runs
from tests.chaos._watch import resident_mb

__all__ = ["BUSY", "MEMORY", "PACE_S", "followed", "paced", "poison"]

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


def poison(entry: ManifestEntry, config: Config) -> Any:
    """Made-up candidates, unless the name of the image says otherwise."""
    if "segfault" in entry.image_id:
        ctypes.string_at(0)
    if "gone" in entry.image_id:
        os._exit(1)
    if "eats" in entry.image_id:
        _eat()
    if "hangs" in entry.image_id:
        time.sleep(1e6)
    if "mute" in entry.image_id:
        re.match(r"(a+)+$", "a" * 60 + "b")  # for ever, and no other thread of Python has a turn
    time.sleep(0.2)
    return _runs.result(entry.image_id, 5)


def _eat() -> None:
    eaten = []
    while True:
        eaten.append(np.ones(2**21))  # 16 MB
        time.sleep(0.02)
