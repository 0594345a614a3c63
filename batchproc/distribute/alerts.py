"""What runs on a worker that scores alert packets: a share of the files. Out: parts of the table, one after the other.

A part has its name when it is complete, and the name says of which files it is, as they are: what is there is not done
again. The work of a tarball that is shared out is cut into blocks of its files; each share reads the tarball through
and scores its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchproc.distribute.memory import keep_freed_memory
from batchproc.distribute.threads import limit_threads
from batchproc.io.atomic import our_disk

if TYPE_CHECKING:
    import pyarrow as pa

    from batchproc.io.alerts import Alerts

__all__ = ["AlertJob", "Share", "plan_shares", "score_share"]

#: Files of a part, and bytes that are enough for one however few they are in.
_FILES, _BYTES = 1000, 100_000_000
#: Alerts that are held at a time: 12 MB of stamps. More are not faster.
_CHUNK = 256


@dataclass(frozen=True)
class Share:
    """What one task does.

    Attributes
    ----------
    name : str
        Of its parts; in the order of the shares, and made of the files' paths, sizes and times.
    files : tuple of str
        ``.avro`` files, or one tarball.
    n_bytes : int
        That it has to score.
    stripe, stripes : int
        Of a tarball, every how many blocks this one does, and which.
    """

    name: str
    files: tuple[str, ...]
    n_bytes: int
    stripe: int = 0
    stripes: int = 1

    def mine(self, block: int) -> bool:
        """Whether a block of the tarball is of this share."""
        return block % self.stripes == self.stripe


@dataclass(frozen=True)
class AlertJob:
    """What all tasks share; a few kilobytes.

    Attributes
    ----------
    folder : str
        Where the parts go.
    models : tuple of Model
    threads : int
        For every library of the process.
    here : bool
        The tasks run in the driver's process, which may be a user's own: they change nothing that outlasts them.
    """

    folder: str
    models: tuple[Any, ...]
    threads: int
    here: bool


def plan_shares(sources: Sequence[Path], workers: int) -> Iterator[Share]:
    """Cut a source of alerts into what tasks do: so many files each, tarballs by themselves.

    With more workers than tarballs each is shared out among several, which all have to unpack it: no more than four.
    """
    from batchproc.io.alerts import is_tarball

    tarballs = sum(map(is_tarball, sources))
    stripes = min(4, -(-workers // tarballs)) if tarballs else 1
    number = 0
    some: list[Path] = []
    n_bytes = 0
    for path in sources:
        if some and (is_tarball(path) or len(some) == _FILES or n_bytes >= _BYTES):
            yield _share(number, some)
            number, some, n_bytes = number + 1, [], 0
        if is_tarball(path):
            yield from (_share(number, [path], stripe, stripes) for stripe in range(stripes))
            number += 1
        else:
            some.append(path)
            n_bytes += _looks(path)[0]
    if some:
        yield _share(number, some)


def _share(number: int, paths: Sequence[Path], stripe: int = 0, stripes: int = 1) -> Share:
    looks = [(str(path), *_looks(path)) for path in paths]
    digest = sha256(repr(looks).encode()).hexdigest()[:16]
    n_bytes = sum(size for _, size, _ in looks) // stripes
    return Share(f"{number:07d}-{digest}", tuple(str(path) for path in paths), n_bytes, stripe, stripes)


def _looks(path: Path) -> tuple[int, int]:
    """Size, and time of the last change."""
    try:
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    except OSError:
        return 0, 0  # reading it will say so


def score_share(job: AlertJob, share: Share, tell: Callable[[], None] | None = None) -> None:
    """Score the alerts of a share that are in no part yet, and write their parts.

    Parameters
    ----------
    job : AlertJob
    share : Share
    tell : callable, optional
        Called after each part.

    Raises
    ------
    StorageError
        The disk refuses a part.
    ModelError
        A model cannot be had, or cannot score.
    """
    from batchproc.io.alert_table import table_schema
    from batchproc.io.alerts import is_tarball, read_blocks, read_files

    if not job.here:
        _settle(job.threads)
    folder, schema = Path(job.folder), table_schema(job.models)
    first = Path(share.files[0])
    if not is_tarball(first):
        path = folder / f"{share.name}.parquet"
        if not path.is_file():
            _write(path, read_files([Path(file) for file in share.files], chunk=_CHUNK), 0, job, schema)
            _call(tell)
        return
    there = {path.name for path in folder.glob(f"{share.name}-*.parquet")}

    def name(block: int) -> str:
        return f"{share.name}-{block:07d}.parquet"

    def wanted(block: int) -> bool:
        return share.mine(block) and name(block) not in there

    for block, start, alerts in read_blocks(first, size=_FILES, wanted=wanted, chunk=_CHUNK):
        _write(folder / name(block), alerts, start, job, schema)
        _call(tell)


def _call(tell: Callable[[], None] | None) -> None:
    if tell is not None:
        tell()


def _write(path: Path, alerts: Iterable[Alerts], start: int, job: AlertJob, schema: pa.Schema) -> None:
    """Score some alerts and write their part; `start` is what had been read of the source before."""
    from batchproc.io.alert_table import Part, make_table, write_part

    counts: Counter[str] = Counter()
    tables, end = [], start
    for some in alerts:
        scores = _scores(some, job.models)
        counts.update(_outcomes(some, scores))
        tables.append(make_table(some, scores, schema))
        end = some.n_bytes
    with our_disk(path.parent):
        write_part(path, tables, schema, Part(counts, end - start))


def _scores(alerts: Alerts, models: Sequence[Any]) -> list[Any]:
    """Of each model ``(n, classes)``; what models of one recipe look at is made once."""
    from batchproc.io.prepared import Prepared

    stamps = Prepared(alerts.stamps)
    return [model.predict(stamps).reshape(len(alerts), len(model.classes)) for model in models]


def _outcomes(alerts: Alerts, scores: Sequence[Any]) -> Iterator[str]:
    """A word for each alert."""
    import numpy as np

    complete = np.all([np.isfinite(found).all(axis=1) for found in scores], axis=0)
    for i, scored in enumerate(complete):
        yield "unreadable" if alerts.candid[i] == -1 else "scored" if scored else "not scored"


@lru_cache(maxsize=1)
def _settle(threads: int) -> None:
    """Once in the life of a worker's process."""
    limit_threads(threads)
    keep_freed_memory()
