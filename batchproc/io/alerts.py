"""Alert packets (Avro), ZTF's and Rubin's, as a source of stamps: files, folders, tarballs of a night, chunk by chunk.

>>> for alerts in read_alerts("ztf_public_20200111.tar.gz"):                              # doctest: +SKIP
...     scores = model.predict(alerts.stamps)      # (n,), NaN where there was nothing to score
...     print(alerts.candid, alerts.drb, scores, alerts.problems)

Every alert is a row, in the order of the files: what is wrong with one stands in `Alerts.problems`, and what of it
could not be read is NaN. Needs the package ``fastavro`` (extra ``alerts``). What a record of either survey says is in
`batchproc.io.alert_records`.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import UsageError
from batchproc.io.alert_records import CUTOUTS, RUBIN, STAMP_SIZE, ZTF, Record, read_record

__all__ = [
    "RUBIN",
    "STAMP_SIZE",
    "ZTF",
    "Alerts",
    "find_sources",
    "is_tarball",
    "read_alerts",
    "read_blocks",
    "read_files",
    "source_size",
]

#: A packet has some 100 kB, all of one detector some 100 MB: what is larger than this is not read.
_MOST_PACKET = 1 << 28
_TARBALLS = (".tar", ".tar.gz", ".tgz")
_WRITE_CONTAINERS = "expected an Avro file with its schema in it (fastavro.writer makes one)"


@dataclass(frozen=True)
class Alerts:
    """Some alerts: one row each, the same in every field.

    Attributes
    ----------
    stamps : ndarray (n, 3, 63, 63) float32
        New (science), ref (template), difference, as they are in the packets. NaN for what could not be read, at the
        bottom and right of ZTF's that the edge of an image has truncated, and around Rubin's, which are smaller.
    candid : ndarray (n,) int64
        Of Rubin the ``diaSourceId``; −1 where it could not be read.
    drb : ndarray (n,) float64
        Score of ZTF's own classifier, NaN where the packet has none, as Rubin's.
    drb_version : tuple of str
        Which one that was; empty where there is none.
    object_id : tuple of str
        ``ZTF20aaelulu``, of Rubin a number; empty where it could not be read, or there is none.
    candidate : tuple of mapping
        The measurements in the packet, as they are there: ZTF's ``candidate``, Rubin's ``diaSource``.
    problems : tuple of str
        What is wrong with an alert; empty where nothing is.
    origin : tuple of str
        The file, and within a tarball its member: ``night.tar.gz/1105522281015015000.avro``.
    survey : tuple of str
        ``"ZTF"``, ``"LSST"`` (Rubin's); empty where it could not be read.
    n_bytes : int
        What had been read of the source (`source_size`) when the last of these had been.
    """

    stamps: NDArray[np.float32]
    candid: NDArray[np.int64]
    drb: NDArray[np.float64]
    drb_version: tuple[str, ...]
    object_id: tuple[str, ...]
    candidate: tuple[Mapping[str, Any], ...]
    problems: tuple[str, ...]
    origin: tuple[str, ...]
    survey: tuple[str, ...]
    n_bytes: int = 0

    def __len__(self) -> int:
        return len(self.candid)


def read_alerts(path: str | Path, *, chunk: int = 256) -> Iterator[Alerts]:
    """Read alert packets, so many at a time; no more than one chunk is ever held.

    Parameters
    ----------
    path : str or Path
        An ``.avro`` file, a ``.tar``, ``.tar.gz`` or ``.tgz`` of them, or a folder with any of these in it or below it.
    chunk : int
        Alerts in each item but the last.

    Yields
    ------
    Alerts
        A packet that cannot be read is a row as well, without a candid.

    Raises
    ------
    UsageError
        fastavro is not installed, `path` is not there or is none of these, or has no ``.avro`` file in it. At the first
        alert asked for.
    """
    n = 0
    for alerts in _chunks(_files(find_sources(path), meter := _Meter()), meter, chunk):
        n += len(alerts)
        yield alerts
    if not n:
        raise UsageError(f"{path}: no .avro file in it")


def read_files(paths: Sequence[Path], *, chunk: int = 256) -> Iterator[Alerts]:
    """Alerts of some ``.avro`` files and tarballs, as `read_alerts` gives them."""
    return _chunks(_files(paths, meter := _Meter()), meter, chunk)


def read_blocks(
    tarball: Path, *, size: int, wanted: Callable[[int], bool], chunk: int = 256
) -> Iterator[tuple[int, int, Iterator[Alerts]]]:
    """Alerts of some blocks of a tarball.

    Parameters
    ----------
    tarball : Path
        Read from its beginning to its end, since nothing says where a member begins; those that are not wanted are
        passed over.
    size : int
        Files in a block.
    wanted : callable
        Of the number of a block.
    chunk : int
        Alerts in each item but the last.

    Yields
    ------
    number, n_bytes, iterator of Alerts
        What had been read of the tarball when the block began. The alerts are to be read before the next block is asked
        for.
    """
    meter = _Meter()
    members = _members(tarball, meter, lambda number: wanted(number // size))
    for block, some in groupby(members, key=lambda member: member[0] // size):
        yield block, meter.before, _chunks((file for _, file in some), meter, chunk)


def find_sources(path: str | Path) -> list[Path]:
    """The ``.avro`` files and tarballs of a source of alerts, in the order in which they are read.

    Raises
    ------
    UsageError
        It is not there, or neither of them, nor a folder with some in it or below it.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix == ".avro" or is_tarball(file))
        if not found:
            raise UsageError(f"{path}: no .avro file in it")
        return found
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    if path.suffix != ".avro" and not is_tarball(path):
        raise UsageError(f"{path}: expected a folder of .avro files, one of them, or a .tar or .tar.gz of them")
    return [path]


def is_tarball(path: Path) -> bool:
    """By its name."""
    return path.name.endswith(_TARBALLS)


def source_size(path: str | Path) -> int:
    """Bytes of a source of alerts, those of a tarball as it is packed: what `Alerts.n_bytes` ends at, or nearly."""
    return sum(_size(file) for file in find_sources(path))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it will say so


def _chunks(files: Iterable[_File], meter: _Meter, chunk: int) -> Iterator[Alerts]:
    rows: list[_Row] = []
    n_bytes = 0
    for row in _rows(files):
        rows.append(row)
        n_bytes = meter.n_bytes  # before the next file is asked for
        if len(rows) == chunk:
            yield _together(rows, n_bytes)
            rows = []
    if rows:
        yield _together(rows, n_bytes)


@dataclass(frozen=True)
class _Row:
    """One alert, and where it came from."""

    origin: str
    alert: Record


def _together(rows: list[_Row], n_bytes: int) -> Alerts:
    stamps = np.full((len(rows), len(CUTOUTS), STAMP_SIZE, STAMP_SIZE), np.nan, np.float32)
    for out, row in zip(stamps, rows, strict=True):
        if row.alert.stamp is not None:
            out[:] = row.alert.stamp
    alerts = [row.alert for row in rows]
    candidates = tuple(alert.candidate or {} for alert in alerts)
    return Alerts(
        stamps=stamps,
        candid=np.array([alert.candid for alert in alerts], np.int64),
        drb=np.array([_number(candidate.get("drb")) for candidate in candidates], np.float64),
        drb_version=tuple(str(candidate.get("drbversion") or "") for candidate in candidates),
        object_id=tuple(alert.object_id for alert in alerts),
        candidate=candidates,
        problems=tuple("; ".join(alert.problems) for alert in alerts),
        origin=tuple(row.origin for row in rows),
        survey=tuple(alert.survey for alert in alerts),
        n_bytes=n_bytes,
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


# --- Files and packets ------------------------------------------------------------------------------------------------


#: An Avro file: its name, what to read it from, or else what is wrong with it.
_File = tuple[str, BinaryIO | None, str]


def _rows(files: Iterable[_File]) -> Iterator[_Row]:
    reader = _avro_reader()
    for origin, file, problem in files:
        if file is None:
            yield _Row(origin, Record((problem,)))
        else:
            yield from _packets(reader, origin, file)


def _avro_reader() -> Any:
    try:
        import fastavro
    except ImportError as error:
        raise UsageError(
            f"to read alert packets, install what that needs: pip install 'batchproc[alerts]' ({error})"
        ) from None
    return fastavro.reader


@dataclass
class _Meter:
    """How much of a source has been read: now, and before the last member of a tarball."""

    n_bytes: int = 0
    before: int = 0


@dataclass(frozen=True)
class _Metered:
    """A file that is read from its beginning to its end, as a meter sees it."""

    file: BinaryIO
    meter: _Meter

    def read(self, n: int) -> bytes:
        content = self.file.read(n)
        self.meter.n_bytes += len(content)
        return content


def _files(sources: Iterable[Path], meter: _Meter) -> Iterator[_File]:
    for source in sources:
        if is_tarball(source):
            yield from (file for _, file in _members(source, meter))
        else:
            yield _opened(source, meter)


def _opened(path: Path, meter: _Meter) -> _File:
    meter.n_bytes += _size(path)
    try:
        if path.stat().st_size > _MOST_PACKET:
            return str(path), None, _too_large(path.stat().st_size)
        return str(path), io.BytesIO(path.read_bytes()), ""
    except OSError as error:
        return str(path), None, f"cannot be read ({error.strerror})"


def _members(
    path: Path, meter: _Meter, wanted: Callable[[int], bool] = lambda number: True
) -> Iterator[tuple[int, _File]]:
    """Avro files of a tarball with their numbers, read once; one that breaks off ends in a file that says so."""
    number = 0
    try:
        with path.open("rb") as file, _tarball(_Metered(file, meter), _is_gzipped(path)) as tar:
            while member := tar.next():
                if member.isfile() and member.name.endswith(".avro"):
                    if wanted(number):
                        yield number, _member(tar, member, f"{path}/{member.name}")
                    number += 1
                meter.before = meter.n_bytes
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember every one of a night
            _check_rest(tar)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        if wanted(number):
            yield number, (str(path), None, f"the tarball breaks off here ({error})")


class _Header(tarfile.TarInfo):
    """The header of a member; `tarfile` takes one that is damaged, cut off or not there for the end of the tarball."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros: the end as it should be
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, expected another member or the end mark") from error


@dataclass(frozen=True)
class _Unpacked:
    """What is in a packed file, up to where it breaks off: `GzipFile.read` would not give the last of it."""

    file: gzip.GzipFile

    def read(self, n: int) -> bytes:
        return self.file.read1(n)


def _is_gzipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _tarball(file: _Metered, gzipped: bool) -> tarfile.TarFile:
    # `tarfile` would stop at the end of the first of several gzip streams, and never look at their checksums.
    content = _Unpacked(gzip.GzipFile(fileobj=file, mode="rb")) if gzipped else file  # type: ignore[call-overload]
    return tarfile.open(fileobj=content, mode="r|*", tarinfo=_Header)  # type: ignore[call-overload, no-any-return]


def _check_rest(tar: tarfile.TarFile) -> None:
    """Read to the end of a tarball after its end mark: only there is the checksum of a packed one."""
    while rest := tar.fileobj.read(1 << 20):  # type: ignore[union-attr]
        if rest.strip(b"\0"):
            raise tarfile.ReadError("more than zeros after the end mark")


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, origin: str) -> _File:
    if member.size > _MOST_PACKET:
        return origin, None, _too_large(member.size)
    content = tar.extractfile(member)
    return origin, io.BytesIO(content.read() if content else b""), ""


def _too_large(size: int) -> str:
    return f"{size / 1e6:.0f} MB; an alert packet has at most {_MOST_PACKET / 1e6:.0f}"


def _packets(reader: Any, origin: str, file: BinaryIO) -> Iterator[_Row]:
    """The alerts of one file; one that is no Avro, or breaks off, ends in a row that says so."""
    start = file.read(5)
    file.seek(0)
    if start[:1] == b"\0" and len(start) == 5:
        number = int.from_bytes(start[1:], "big")
        yield _Row(origin, Record((f"a message of Kafka without its schema (number {number}): {_WRITE_CONTAINERS}",)))
        return
    records = None
    while True:
        try:
            records = reader(file) if records is None else records
            record = next(records, None)
        except Exception as error:  # bytes that are no Avro raise nearly anything: ValueError, KeyError, EOFError, …
            lacks = "need to install" in str(error)  # a codec
            told = f"{error}" if lacks else f"not an Avro file, or torn ({type(error).__name__}: {error})"
            yield _Row(origin, Record((told,)))
            return
        if record is None:
            return
        yield _Row(origin, read_record(record))
