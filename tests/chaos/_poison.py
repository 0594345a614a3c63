"""Images that do to their process what their name says; a function of a module, so that workers find it by import."""

from __future__ import annotations

import ctypes
import os
import re
import time
from typing import Any

import numpy as np

from batchproc.config import Config
from batchproc.records import ManifestEntry
from tests import _runs

__all__ = ["poison"]


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
