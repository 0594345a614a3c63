"""Copies of an image's files on the node's own disk, for the time in which they are read.

For shared file systems that are slow at reading here and there in a file. Asked for by the profile of a site, which
sets ``BATCHPROC_STAGE`` and ``BATCHPROC_SCRATCH`` for its workers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from batchproc.errors import ExposureError
from batchproc.io.fitsfile import split_hdu
from batchproc.records import ManifestEntry

__all__ = ["staged"]

#: Fields of an entry that name files.
_FILES = [f.name for f in fields(ManifestEntry) if f.name in ("new", "ref") or f.name.startswith(("new_", "ref_"))]


@contextmanager
def staged(entry: ManifestEntry) -> Iterator[ManifestEntry]:
    """An entry whose files are copies; the entry itself where no copies are asked for.

    A file that cannot be copied (missing, broken, no room on the disk, or no such disk) is named where it is, so that
    reading finds out and tells. What is said of a copy in an `ExposureError` is said of the file that the manifest
    names.
    """
    scratch = os.environ.get("BATCHPROC_SCRATCH")
    if not scratch or os.environ.get("BATCHPROC_STAGE") != "1":
        yield entry
        return
    try:
        place = tempfile.TemporaryDirectory(prefix="image-", dir=scratch, ignore_cleanup_errors=True)
    except OSError:  # a node's disk that is full or gone is no fault of its images
        yield entry
        return
    with place as folder:
        copies = _Copies(Path(folder))
        try:
            yield replace(entry, **{name: copies.of(getattr(entry, name)) for name in _FILES})
        except ExposureError as error:
            error.args = tuple(map(copies.named, error.args))
            error.metadata = {key: copies.named(value) for key, value in error.metadata.items()}
            raise


class _Copies:
    """Each file once, under its own name, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[Path, Path] = {}

    def of(self, value: Any) -> Any:
        """What a field of an entry says, of copies."""
        if isinstance(value, tuple):
            return tuple(self.of(item) for item in value)
        if value is None:
            return None
        path, hdu = split_hdu(value)
        return f"{self._copy(path)}{value[value.rindex('[') :] if hdu is not None else ''}"

    def named(self, said: Any) -> Any:
        """A text in which the files have their own names again."""
        if isinstance(said, str):
            for path, copy in self.made.items():
                said = said.replace(str(copy), str(path))
        return said

    def _copy(self, path: Path) -> Path:
        if path not in self.made:
            copy = self.folder / str(len(self.made)) / path.name
            try:
                copy.parent.mkdir()
                shutil.copyfile(path, copy)
            except OSError:
                copy.unlink(missing_ok=True)
                copy = path
            self.made[path] = copy
        return self.made[path]
