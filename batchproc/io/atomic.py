"""Files that are there whole or not at all.

Everything in a run folder is written under a temporary name beside its place, brought to the disk (fsync), and then
renamed. Names that start with `TEMPORARY` are leftovers of killed processes: nobody reads them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

from batchproc.errors import StorageError

__all__ = ["TEMPORARY", "our_disk", "part_name", "remove", "remove_leftovers", "replacing", "write_bytes", "write_text"]

TEMPORARY = ".tmp-"
_REFUSED = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EFBIG),
    *(errno.ENODEV, errno.ENXIO, errno.EMLINK),
}
_PLAIN = re.compile(r"[\w~-][\w.~-]{0,149}", re.ASCII)  # what quote() leaves alone, in most ids all of it
_LONGEST_NAME = 180  # of the 255 bytes of most file systems; suffixes and TEMPORARY need the rest


def part_name(identity: str) -> str:
    """A file name for an image id or a model: the id itself where it can be one, percent-encoded otherwise.

    Different ids give different names; a very long one is cut and carries its hash.

    >>> part_name("ztf 1/2"), part_name(".hidden")
    ('ztf%201%2F2', '%2Ehidden')
    """
    if _PLAIN.fullmatch(identity):
        return identity
    name = quote(identity, safe="")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > _LONGEST_NAME:
        # quote() leaves '~' alone, so an id of that length could hold '~~' itself; its hash still tells them apart.
        name = f"{name[: _LONGEST_NAME - 34]}~~{sha256(identity.encode()).hexdigest()[:32]}"
    return name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write a file or a folder to, which takes the place of `path` when the block ends well.

    The folder of `path` must exist. When the block raises, or leaves nothing under the temporary name, or the process
    dies in it, `path` is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{path.name}"[:250])
    try:
        yield temporary
        if not temporary.exists():
            return
        _sync_tree(temporary)
        rename(temporary, path)
        _sync(path.parent)
    except BaseException:
        remove(temporary)
        raise


@contextmanager
def our_disk(path: Path) -> Iterator[None]:
    """Say of what the disk under `path` refuses that it is the disk, not what was to be written.

    Raises
    ------
    StorageError
        For a disk that is full, over quota, read-only, forbidden or broken. Errors that may heal by themselves (a file
        server that is away) are raised as they are.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise StorageError(
            f"{error.filename or path}: {error.strerror}{_free(path)}; nothing that was finished is lost: make room or "
            "mend the disk, then give the same command again"
        ) from error


def _free(path: Path) -> str:
    """How much room there is, where that can be told."""
    try:
        found = os.statvfs(path)
    except OSError:
        return ""
    return (
        f" ({found.f_bavail * found.f_frsize / 1e6:.3g} MB and {found.f_favail} files are free on the disk of {path})"
    )


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    write_bytes(path, text.encode())


def remove(path: Path) -> None:
    """Delete a file or a folder; one that is not there is fine. A folder is there whole or not at all, here too."""
    if path.is_dir():
        if not path.name.startswith(TEMPORARY):
            aside = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
            with suppress(FileNotFoundError):
                os.replace(path, aside)
            path = aside
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> int:
    """Delete what killed processes left under temporary names in this folder; returns how many."""
    leftovers = list(folder.glob(f"{TEMPORARY}*"))
    for path in leftovers:
        remove(path)
    return len(leftovers)


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder, replacing what has that name."""
    for _ in range(5):
        try:
            os.replace(source, target)
            return
        except OSError as error:
            # A folder cannot replace a full one: move that aside first. Another process may be doing the same.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            aside = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
            try:
                os.replace(target, aside)
            except FileNotFoundError:
                continue
            remove(aside)
    raise OSError(errno.EBUSY, "another process keeps writing the same folder", str(target))


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
