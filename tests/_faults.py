"""Faults for tests: a process that dies between two writes, small disks that fill up, files that rot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchproc.io.catalogue import open_catalogue
from batchproc.io.progress import finished_images, iter_receipts
from batchproc.io.run_folder import RunFolder
from batchproc.io.stamps import open_stamps


class KilledError(BaseException):
    """Stands for SIGKILL: nothing that tidies up catches it, and nothing is written after it."""


@dataclass
class _Guard:
    """Counts what changes the disk under a folder, and dies at one of these moments."""

    folder: str = ""
    deadly: int = 0
    count: int = 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.folder and self._writes(event, arguments):
            self.count += 1
            if self.count >= self.deadly:  # and whatever would tidy up afterwards is dead as well
                raise KilledError(f"{event} {arguments}")

    def _writes(self, event: str, arguments: tuple[object, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            return writes and str(path).startswith(self.folder)
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            return str(arguments[0]).startswith(self.folder)
        return False


_guard = _Guard()
_hooked = False


@contextmanager
def killed_at(folder: Path, moment: int) -> Iterator[_Guard]:
    """Within the block everything dies at the given write (from 1) under a folder; the guard counts the writes."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_guard)  # for the life of the process: it does nothing outside of these blocks
        _hooked = True
    _guard.folder, _guard.deadly, _guard.count = str(folder), moment, 0
    try:
        yield _guard
    finally:
        _guard.folder = ""


@dataclass(frozen=True)
class Disk:
    """A small file system of its own, which can be filled and made read-only."""

    path: Path

    def free(self) -> int:
        """Bytes that can still be written."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Take all of its space but some bytes."""
        with (self.path / "ballast").open("ab", buffering=0) as file:
            while (n := self.free() - leave) > 0:
                try:
                    file.write(bytes(min(n, 2**16)))
                except OSError:
                    break

    def empty(self) -> None:
        """Give the space back."""
        (self.path / "ballast").unlink(missing_ok=True)

    def read_only(self) -> None:
        """As a file server does that is in trouble: whatever is opened from now on."""
        _mount("--bind", str(self.path), str(self.path))
        _mount("-o", "remount,bind,ro", str(self.path))

    def writable(self) -> None:
        """As it was."""
        subprocess.run(["umount", str(self.path)], check=True, capture_output=True)


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Disk]:
    """A file system of so many megabytes at a path; the test is skipped where mounting is refused."""
    path.mkdir(parents=True)
    try:
        _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here ({error})")
    try:
        yield Disk(path)
    finally:
        while os.path.ismount(path):
            subprocess.run(["umount", "--lazy", str(path)], check=True, capture_output=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


def seen(path: Path) -> dict[str, Any]:
    """What readers see of a run."""
    folder = RunFolder.existing(path)
    whole, bright = open_catalogue(path), open_catalogue(path, filters=[("scorr", ">", 1.0)])
    return {
        "catalogue": whole.to_dict("list"),
        "filtered": bright.to_dict("list"),
        "models": whole.attrs["models"],
        "stamps": np.asarray(open_stamps(path)[:]).tobytes(),
        "receipts": {
            r.image_id: (r.status, r.n_candidates, r.quality, r.error, r.message) for r in iter_receipts(path)
        },
        "finished": finished_images(folder),
        "frozen": (folder.entries(), folder.config()),
    }


def assert_same(one: Any, other: Any) -> None:
    """Raise AssertionError where two of what `seen` returns differ; NaN is NaN."""
    np.testing.assert_equal(one, other)
