"""Whether what a run says of itself is true: everything on its disk, held against its markers and digests.

A finished image has a marker with digests of its results; `check_run` reads all of it and tells what is torn, missing,
altered, orphaned or doubled, and `mend` makes exactly the images missing again whose results do not hold, so that
``batchproc run`` does them. Nothing is written by looking. Every file is read once, in threads, a piece at a time.

Not held against anything are the report, the event log and what ``batchproc finish`` makes of a run: nothing is
computed from these, and all of them can be made again.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchproc.errors import BatchprocError
from batchproc.io.atomic import TEMPORARY, remove
from batchproc.io.catalogue import scores_digest
from batchproc.io.events import heartbeat_file, read_heartbeat
from batchproc.io.index import iter_markers, loose_names, pack_names, read_index
from batchproc.io.markers import (
    Marker,
    chunks_digest,
    file_digest,
    input_digest,
    input_files,
    marker_row,
    read_marker,
    row_marker,
    rows_digest,
)
from batchproc.io.packs import forget, next_pack_number, pack_files, roll_up, tidy
from batchproc.io.progress import bad_lines, failure_log
from batchproc.io.run_folder import RunFolder
from batchproc.io.shards import SHARD, open_shard
from batchproc.io.stamps import CHUNK_ROWS
from batchproc.records import ManifestEntry

__all__ = ["Checked", "Problem", "again", "check_run", "count_done", "mend", "wrong_images"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREADS = 8  # most of the time a file server is waited for
_AHEAD = 4  # files handed out to each thread
_AT_ONCE = 500  # images whose inputs are looked at together
_QUICK = ("image_id", "n_candidates", "row", "chunk", "entry_digest", "config_digest", "version")
_OLD_S = 60.0  # a heartbeat of this age is of a driver that has gone
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes
    ----------
    kind : {"missing", "torn", "altered", "strange", "orphaned", "doubled", "unscored", "input"}
    path : str
        The file or folder.
    message : str
        What was found, and what was expected.
    image_ids : tuple of str
        Images whose results do not hold.
    cure : {"forget", "repack", "remove", "score", "begin", ""}
        What helps: to forget the images; to write the pack anew; to remove the path, and score what is without scores
        then; to give the command again that began the run; nothing that a program could do.
    """

    kind: str
    path: str
    message: str
    image_ids: tuple[str, ...] = ()
    cure: str = "forget"

    def __str__(self) -> str:
        return f"{self.kind}: {self.path}: {self.message}"


@dataclass(frozen=True)
class Checked:
    """What was looked at, and what is wrong with it.

    Attributes
    ----------
    images : int
        Finished images that were looked at.
    problems : tuple of Problem
    ids : ndarray of uint64
        Hashes of their ids.
    """

    images: int = 0
    problems: tuple[Problem, ...] = ()
    ids: NDArray[np.uint64] = field(default_factory=lambda: _hashes(()), repr=False)


def check_run(folder: RunFolder, *, quick: bool = False, inputs: bool = False) -> Iterator[Checked]:
    """Hold everything in a run folder against what it should be; one at work is checked as far as it has come.

    Parameters
    ----------
    folder : RunFolder
    quick : bool
        Only whether files are there and whole by their footers, without reading the results.
    inputs : bool
        Also whether the files that images were made from still are those of then, by sizes and times.

    Yields
    ------
    Checked
        Each image, pack, or other thing.
    """
    at_work = _is_at_work(folder)
    yield Checked(problems=tuple(_check_frozen(folder)))
    run = _Run.of(folder, quick)
    seen: list[NDArray[np.uint64]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        # Images with files of their own first: what is rolled up meanwhile is found in its pack afterwards.
        for check, names in ((_check_loose, loose_names), (_check_pack, pack_names)):
            for checked in _in_order(pool, partial(check, run), names(folder)):
                seen.append(checked.ids)
                yield checked
        yield from _in_order(pool, partial(_check_scores, folder), sorted(folder.scores.glob("*/[!.]*.parquet")))
        yield from _check_log(folder)
        if not at_work:  # what a task has in its hands may have no marker yet, or two
            yield Checked(problems=tuple(_orphans(folder)))
            yield Checked(problems=tuple(_doubled(folder, np.concatenate([_hashes(()), *seen]))))
            yield Checked(problems=tuple(_unscored(folder)))
        if inputs:
            yield from _check_inputs(folder, pool)


def count_done(folder: RunFolder) -> int:
    """About how many finished images there are to look at."""
    total = len(loose_names(folder))
    for name in pack_names(folder):
        with suppress(*_UNREADABLE):
            total += int(pq.read_metadata(folder.pack_marker(name)).num_rows)
    return total


def wrong_images(problems: Iterable[Problem]) -> set[str]:
    """Images whose results do not hold, and which `mend` makes missing."""
    return {image_id for problem in problems if problem.cure == "forget" for image_id in problem.image_ids}


def mend(folder: RunFolder, problems: Sequence[Problem]) -> None:
    """Make images missing whose results do not hold, and remove what nobody can read.

    Only who has the folder to himself does this. What a command of the user has to put right (`Problem.cure` is
    ``"begin"``) is left as it is, and so are images whose input files are gone.

    Raises
    ------
    StorageError
        The disk does not take it; it can be called again.
    """
    for path in (Path(problem.path) for problem in problems if problem.cure == "remove"):
        if path.parent == folder.done:
            for part in reversed(pack_files(folder, path.stem)):
                remove(part)
        else:
            remove(path)
    forget(folder, wrong_images(problems))
    for problem in problems:
        if problem.cure == "repack" and Path(problem.path).exists():
            roll_up(folder, next_pack_number(folder), (), (Path(problem.path).stem,))
    tidy(folder)


@dataclass(frozen=True)
class _Run:
    """What the markers of a run should say.

    Attributes
    ----------
    image_digest, version : str
        Empty where run.json does not tell.
    rows : Series
        `entry_digest` of each row of the manifest as a number, by the hash of its image id: 16 bytes an image.
    """

    folder: RunFolder
    quick: bool
    image_digest: str
    version: str
    rows: pd.Series | None

    @classmethod
    def of(cls, folder: RunFolder, quick: bool) -> _Run:
        try:
            record = folder.read_record()
            digests = pq.read_table(folder.manifest, columns=["image_id", "entry_digest"])
            rows = pd.Series(
                [_number(text) for text in digests["entry_digest"].to_pylist()],
                index=_hashes(digests["image_id"].to_pylist()),
                dtype=np.uint64,
            )
            return cls(folder, quick, record["image_digest"], record["version"], rows)
        except (*_UNREADABLE, BatchprocError):  # told of by _check_frozen; results are then held against themselves
            return cls(folder, quick, "", "", None)

    def strange(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Images, of these rows of markers, that were done with other settings or from another row of the manifest."""
        if self.rows is None or not rows:
            return []
        wanted = self.rows.reindex(_hashes([row["image_id"] for row in rows]), fill_value=np.uint64(0)).to_numpy()
        found = np.array([_number(row["entry_digest"]) for row in rows], np.uint64)
        mine = (self.image_digest, self.version)
        same = [(row["config_digest"], row["version"]) == mine for row in rows]
        return [row["image_id"] for row, holds in zip(rows, same & (wanted == found), strict=True) if not holds]


# ---- what is frozen


def _check_frozen(folder: RunFolder) -> Iterator[Problem]:
    again = f"give the command again that began the run (batchproc run MANIFEST --out {folder.path} …)"
    try:
        files = folder.read_record()["files"]
    except (BatchprocError, *_UNREADABLE):
        yield Problem("altered", str(folder.record), f"it is not what was written; remove it and {again}", cure="begin")
        return
    for path in (folder.manifest, folder.config_file, folder.wisdom_file):
        if not path.is_file():
            yield Problem("missing", str(path), f"{again}: it is written anew", cure="begin")
        elif file_digest(path) != files.get(path.name):
            yield Problem("altered", str(path), f"it is not what was written; {again}: it is put right", cure="begin")
    if folder.next.is_dir():
        yield Problem("torn", str(folder.next), f"a change stopped half way; {again} with --redo", cure="begin")


# ---- images with files of their own


def _check_loose(run: _Run, name: str) -> Checked:
    path = run.folder.done / f"{name}.json"
    try:
        marker, digest = read_marker(path)
    except FileNotFoundError:  # rolled up since it was listed
        return Checked()
    except ValueError as error:
        return Checked(1, (Problem("torn", str(path), str(error), tuple(_named(run.folder, name))),))
    ids = (marker.image_id,)
    problems: list[Problem] = []
    if marker.digest != digest or run.folder.marker(marker.image_id) != path:
        problems.append(
            Problem("altered", str(path), "the marker is not what was written", tuple(_named(run.folder, name)))
        )
    elif run.strange([marker_row(marker)]):
        problems.append(Problem("strange", str(path), "done with other settings or from another row", ids))
    else:
        problems += [Problem(kind, str(where), why, ids) for kind, where, why in _check_parts(run, marker)]
    if problems and not path.exists():
        return Checked()
    return Checked(1, tuple(problems), _hashes(ids))


def _named(folder: RunFolder, name: str) -> list[str]:
    """The image of the manifest with files of this name, in a list; empty where there is none."""
    try:
        return [image_id for image_id in folder.image_ids() if folder.marker(image_id).stem == name]
    except _UNREADABLE:
        return []


#: Kind of a problem, the file, the message.
Fault = tuple[str, Path, str]


def _check_parts(run: _Run, marker: Marker) -> Iterator[Fault]:
    part, store = run.folder.catalogue_part(marker.image_id), run.folder.stamps_part(marker.image_id)
    files = {"catalogue": part}
    if marker.n_rows:
        files |= {"stamps": store / SHARD, "zarr.json": store / "zarr.json"}
    yield from _missing(files.values())
    if run.quick:
        yield from _check_footers(part, store, marker.n_rows)
        return
    for key, path in files.items():
        if path.is_file() and file_digest(path) != marker.files.get(key):
            yield "altered", path, "its bytes are not those that were written"


def _missing(paths: Iterable[Path]) -> Iterator[Fault]:
    for path in paths:
        if not path.is_file():
            yield "missing", path, "its marker says that it is there"


def _check_footers(part: Path, store: Path, n: int, n_chunks: int | None = None) -> Iterator[Fault]:
    """Whether files that are there are as long as they should be."""
    if part.is_file():
        try:
            rows = pq.read_metadata(part).num_rows
            if rows != n:
                yield "torn", part, f"{rows} rows, expected {n}"
        except _UNREADABLE as error:
            yield "torn", part, f"cannot be read ({error})"
    if (store / SHARD).is_file() and (store / "zarr.json").is_file():
        try:
            shard = open_shard(store)
            found, expected = (shard.n_rows, n) if n_chunks is None else (shard.n_chunks, n_chunks)
            if found != expected:
                yield "torn", store, f"{found} stamps or chunks of stamps, expected {expected}"
            next(shard.chunks(0, 0), None)  # reads the index at the end of the file, and its checksum
        except _UNREADABLE as error:
            yield "torn", store, f"cannot be read ({error})"


# ---- packs


def _check_pack(run: _Run, name: str) -> Checked:
    path = run.folder.pack_marker(name)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            rows = file.read(list(_QUICK) if run.quick else None).to_pylist()
            files = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
            altered = () if run.quick else _altered(rows)
    except FileNotFoundError:  # gone into a newer pack since it was listed
        return Checked()
    except _UNREADABLE as error:
        message = f"the marker of a pack cannot be read ({error}): its images have to be done again"
        return Checked(problems=(Problem("torn", str(path), message, cure="remove"),))
    problems = [Problem("altered", str(path), "markers are not what was written", altered)] if altered else []
    if strange := run.strange([row for row in rows if row["image_id"] not in altered]):
        problems.append(Problem("strange", str(path), "done with other settings or from other rows", tuple(strange)))
    pack = _Pack(path, run.folder.pack_catalogue(name), run.folder.pack_stamps(name), rows, files)
    problems += _check_pack_files(pack, quick=run.quick)
    if problems and not path.exists():
        return Checked()
    return Checked(len(rows), tuple(problems), _hashes([row["image_id"] for row in rows]))


def _altered(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Images whose markers do not have the digest that stands in them."""
    markers = (row_marker(row) for row in rows)
    return tuple(marker.image_id for marker, digest in markers if marker.digest != digest)


@dataclass(frozen=True)
class _Pack:
    """A pack: its files, the rows of its marker, and the digests that the marker gives of the files."""

    marker: Path
    catalogue: Path
    stamps: Path
    rows: Sequence[dict[str, Any]]
    files: dict[str, str]

    @property
    def n_rows(self) -> int:
        return sum(row["n_candidates"] for row in self.rows)


def _check_pack_files(pack: _Pack, *, quick: bool) -> Iterator[Problem]:
    """Files as a whole; where one is not as it was written, the images in it one by one."""
    files = {"catalogue": pack.catalogue}
    if pack.n_rows:
        files |= {"stamps": pack.stamps / SHARD, "zarr.json": pack.stamps / "zarr.json"}
    faults = [*_missing(files.values())]
    if quick:
        faults += _check_footers(pack.catalogue, pack.stamps, pack.n_rows, _chunks_of(pack))
    else:
        for key, path in files.items():
            if path.is_file() and file_digest(path) != pack.files.get(key):
                faults.append(("altered", path, "its bytes are not those that were written"))
    if not faults:
        return
    bad = tuple(_bad_images(pack))
    for kind, path, why in faults:
        yield Problem(kind, str(path), f"{why}; results of {len(bad)} of its {len(pack.rows)} images do not hold", bad)
    if not bad:
        yield Problem("altered", str(pack.marker), "the pack is to be written anew", cure="repack")


def _chunks_of(pack: _Pack) -> int:
    return max((row["chunk"] - (-row["n_candidates"] // CHUNK_ROWS) for row in pack.rows), default=0)


def _bad_images(pack: _Pack) -> Iterator[str]:
    """Images whose results in the pack are not those that their markers tell of."""
    try:
        with pq.ParquetFile(pack.catalogue, page_checksum_verification=True) as file:
            catalogue = file.read()
    except _UNREADABLE:
        catalogue = None
    try:
        shard = open_shard(pack.stamps) if pack.n_rows else None
    except _UNREADABLE:
        shard = None
    for row in pack.rows:
        n, first = row["n_candidates"], row["chunk"]
        try:
            rows = rows_digest(catalogue.slice(row["row"], n)) if catalogue is not None else ""
            chunks = shard.chunks(first, first - (-n // CHUNK_ROWS)) if shard is not None and n else ()
            if (rows, chunks_digest(chunks)) == (row["rows_digest"], row["stamps_digest"]):
                continue
        except _UNREADABLE:
            pass
        yield row["image_id"]


# ---- scores, log, what belongs to nobody


def _check_scores(folder: RunFolder, path: Path) -> Checked:
    """Scores cost little: what is not as it was written is removed, and made again."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        digest = table.schema.metadata[b"digest"].decode()
        problem = "" if scores_digest(table) == digest else "the scores are not those that were written"
    except FileNotFoundError:
        return Checked()
    except _UNREADABLE as error:
        problem = f"cannot be read ({error})"
    return Checked(problems=(Problem("altered", str(path), problem, cure="remove"),) if problem else ())


def _check_log(folder: RunFolder) -> Iterator[Checked]:
    """Whether receipts and failures can be read."""
    for path in (folder.receipts, folder.failures):
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for batch in file.iter_batches():
                    batch.validate(full=True)
        except FileNotFoundError:
            why = "not there; the next run writes it anew"
            yield Checked(problems=(Problem("missing", str(path), why, cure=""),))
        except _UNREADABLE as error:
            message = f"cannot be read ({error}); the next run writes it anew"
            yield Checked(problems=(Problem("altered", str(path), message, cure="remove"),))
    log, then = failure_log(folder), "images that failed by what it told are tried again"
    if not log.is_file():
        yield Checked(problems=(Problem("missing", str(log), then, cure=""),))
    elif lines := bad_lines(folder):
        yield Checked(problems=(Problem("altered", str(log), f"{lines} lines are torn or altered; {then}", cure=""),))


def _orphans(folder: RunFolder) -> Iterator[Problem]:
    """Files that belong to no finished image."""
    known = {*loose_names(folder), *pack_names(folder)}
    for where in (folder.catalogue, folder.stamps, folder.done):
        for path in where.iterdir() if where.is_dir() else ():
            if path.name.rpartition(".")[0] not in known or path.name.startswith(TEMPORARY):
                why = "no marker says that it is finished: nobody reads it, and a run removes what is old of its kind"
                yield Problem("orphaned", str(path), why, cure="")


def _doubled(folder: RunFolder, ids: NDArray[np.uint64]) -> Iterator[Problem]:
    """Images that have two markers: left by a roll-up that was killed."""
    found, counts = np.unique(ids, return_counts=True)
    twice = {*found[counts > 1].tolist()}
    if twice:
        known = folder.image_ids()
        names = [name for name, number in zip(known, _hashes(known).tolist(), strict=True) if number in twice]
        why = f"{len(names)} images ({_some(names)}) have two markers; readers take the newer, the next run removes one"
        yield Problem("doubled", str(folder.done), why, cure="")


def _unscored(folder: RunFolder) -> Iterator[Problem]:
    """Whether the models of the run have scored what is finished."""
    try:
        models = folder.models()
        index = read_index(folder)
    except (BatchprocError, *_UNREADABLE):  # told of already
        return
    for name in models:
        parts = sorted(folder.scores_of(name).glob("[!.]*.parquet"))
        scored = np.concatenate([_hashes(()), *map(_scored, parts)])
        left = len(index.image_ids) - int(np.isin(_hashes(index.image_ids), scored).sum())
        if left:
            why = f"{left} finished images have no scores; `{again(folder)}` makes them"
            yield Problem("unscored", str(folder.scores_of(name)), why, cure="")


def _scored(part: Path) -> NDArray[np.uint64]:
    try:
        return _hashes(json.loads(pq.read_schema(part).metadata[b"images"]))
    except _UNREADABLE:  # told of already
        return _hashes(())


def _is_at_work(folder: RunFolder) -> bool:
    """Whether a driver is at work, or may have been until a moment ago."""
    with suppress(OSError):
        age = time.time() - heartbeat_file(folder).stat().st_mtime
        return bool(read_heartbeat(folder).get("alive")) and age < _OLD_S
    return False


# ---- inputs


def _check_inputs(folder: RunFolder, pool: ThreadPoolExecutor) -> Iterator[Checked]:
    """Whether the files of images are those that they were made from."""
    ids, digests = [_hashes(())], [np.empty(0, np.uint64)]
    for table in iter_markers(folder, ["image_id", "input_digest"]):
        ids.append(_hashes(table["image_id"].to_pylist()))
        digests.append(np.array([_number(text[:16]) for text in table["input_digest"].to_pylist()], np.uint64))
    then = pd.Series(np.concatenate(digests), np.concatenate(ids))

    def check(entries: Sequence[ManifestEntry]) -> Checked:
        known = then.reindex(_hashes([entry.image_id for entry in entries]), fill_value=np.uint64(0))
        problems = [
            _input_problem(entry)
            for entry, was in zip(entries, known.tolist(), strict=True)
            if was and _number(input_digest(entry)[:16]) != was
        ]
        return Checked(problems=tuple(problems))

    entries = folder.entries()
    yield from _in_order(pool, check, (entries[i : i + _AT_ONCE] for i in range(0, len(entries), _AT_ONCE)))


def _input_problem(entry: ManifestEntry) -> Problem:
    gone = [path for path in input_files(entry) if not path.exists()]
    if gone:
        why = "gone since an image was made from it; the results hold, but cannot be made again"
        return Problem("input", str(gone[0]), why, (entry.image_id,), cure="")
    why = "it or a file beside it has another size or time than when the image was made from them"
    return Problem("input", entry.new, why, (entry.image_id,))


def again(folder: RunFolder) -> str:
    """The command that does what is missing."""
    return f"batchproc run {folder.manifest} --out {folder.path}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _in_order(pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map`` in threads, with a few items under way, however many there are."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= _AHEAD * _THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _number(digest: str) -> int:
    """An `entry_digest` as a number of 64 bits."""
    return int(digest or "0", 16)


def _hashes(image_ids: Iterable[str]) -> NDArray[np.uint64]:
    return pd.util.hash_array(np.array([*image_ids], object))
