"""ZTF's alert packets (Avro) as a source of stamps: a file, a folder, or a tarball of a night, chunk by chunk.

>>> for alerts in read_alerts("ztf_public_20200111.tar.gz"):                              # doctest: +SKIP
...     scores = model.predict(alerts.stamps)      # (n,), NaN where there was nothing to score
...     print(alerts.candid, alerts.drb, scores, alerts.problems)

Every alert is a row, in the order of the files: what is wrong with one stands in `Alerts.problems`, and what of it
could not be read is NaN. Needs the package ``fastavro`` (extra ``alerts``).
"""

from __future__ import annotations

import io
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from batchproc.errors import UsageError

__all__ = ["STAMP_SIZE", "Alerts", "read_alerts", "source_size"]

#: Side of a cutout, unless the edge of an image truncates it.
STAMP_SIZE = 63
#: Fields with the cutouts, in the order of the pipeline: new, ref, difference.
_CUTOUTS = ("cutoutScience", "cutoutTemplate", "cutoutDifference")
#: A whole cutout has some 20 kB unpacked, a packet some 100 kB: what is much larger is not unpacked, or read.
_MOST_CUTOUT, _MOST_PACKET = 1 << 20, 1 << 28

Stamp = NDArray[np.float32]


@dataclass(frozen=True)
class Alerts:
    """Some alerts: one row each, the same in every field.

    Attributes
    ----------
    stamps : ndarray (n, 3, 63, 63) float32
        New (science), ref (template), difference, as they are in the packets; NaN for what could not be read, and at
        the bottom and right of what the edge of an image has truncated.
    candid : ndarray (n,) int64
        −1 where it could not be read.
    drb : ndarray (n,) float64
        Score of ZTF's own classifier, NaN where the packet has none.
    drb_version : tuple of str
        Which one that was; empty where there is none.
    object_id : tuple of str
        ``ZTF20aaelulu``; empty where it could not be read.
    candidate : tuple of mapping
        The measurements in the packet, as they are there.
    problems : tuple of str
        What is wrong with an alert; empty where nothing is.
    origin : tuple of str
        The file, and within a tarball its member: ``night.tar.gz/1105522281015015000.avro``.
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
    n_bytes: int = 0

    def __len__(self) -> int:
        return len(self.candid)


def read_alerts(path: str | Path, *, chunk: int = 256) -> Iterator[Alerts]:
    """Read alert packets, so many at a time; no more than one chunk is ever held.

    Parameters
    ----------
    path : str or Path
        An ``.avro`` file, a folder with such files in it or below it, or a ``.tar``, ``.tar.gz`` or ``.tgz`` of them.
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
    rows: list[_Row] = []
    meter = _Meter()
    for row in _rows(Path(path), meter):
        rows.append(row)
        if len(rows) == chunk:
            yield _together(rows, meter.n_bytes)
            rows = []
    if rows:
        yield _together(rows, meter.n_bytes)


def source_size(path: str | Path) -> int:
    """Bytes of a source of alerts, those of a tarball as it is packed: what `Alerts.n_bytes` ends at, or nearly."""
    files = Path(path).rglob("*.avro") if Path(path).is_dir() else [Path(path)]
    return sum(_size(file) for file in files)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it will say so


@dataclass(frozen=True)
class _Row:
    """One alert."""

    origin: str
    problems: tuple[str, ...]
    stamp: Stamp | None = None
    record: Mapping[str, Any] | None = None


def _together(rows: list[_Row], n_bytes: int) -> Alerts:
    stamps = np.full((len(rows), len(_CUTOUTS), STAMP_SIZE, STAMP_SIZE), np.nan, np.float32)
    for out, row in zip(stamps, rows, strict=True):
        if row.stamp is not None:
            out[:] = row.stamp
    records = [row.record or {} for row in rows]
    candidates = tuple(record.get("candidate", {}) for record in records)
    return Alerts(
        stamps=stamps,
        candid=np.array([record.get("candid", -1) for record in records], np.int64),
        drb=np.array([_number(candidate.get("drb")) for candidate in candidates], np.float64),
        drb_version=tuple(str(candidate.get("drbversion") or "") for candidate in candidates),
        object_id=tuple(str(record.get("objectId") or "") for record in records),
        candidate=candidates,
        problems=tuple("; ".join(row.problems) for row in rows),
        origin=tuple(row.origin for row in rows),
        n_bytes=n_bytes,
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


# --- Files and packets ------------------------------------------------------------------------------------------------


def _rows(path: Path, meter: _Meter) -> Iterator[_Row]:
    reader = _avro_reader()
    n_files = 0
    for origin, file, problem in _files(path, meter):
        n_files += 1
        if file is None:
            yield _Row(origin, (problem,))
        else:
            yield from _packets(reader, origin, file)
    if n_files == 0:
        raise UsageError(f"{path}: no .avro file in it")


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
    """How much of a source has been read."""

    n_bytes: int = 0


@dataclass(frozen=True)
class _Metered:
    """A file that is read from its beginning to its end, as a meter sees it."""

    file: BinaryIO
    meter: _Meter

    def read(self, n: int) -> bytes:
        content = self.file.read(n)
        self.meter.n_bytes += len(content)
        return content


def _files(path: Path, meter: _Meter) -> Iterator[tuple[str, BinaryIO | None, str]]:
    """Each Avro file: its name, what to read it from, or else what is wrong with it."""
    if path.is_dir():
        for file in sorted(path.rglob("*.avro")):
            yield _opened(file, meter)
    elif not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    elif path.suffix == ".avro":
        yield _opened(path, meter)
    elif path.name.endswith((".tar", ".tar.gz", ".tgz")):
        yield from _members(path, meter)
    else:
        raise UsageError(f"{path}: expected a folder of .avro files, one of them, or a .tar or .tar.gz of them")


def _opened(path: Path, meter: _Meter) -> tuple[str, BinaryIO | None, str]:
    meter.n_bytes += _size(path)
    try:
        if path.stat().st_size > _MOST_PACKET:
            return str(path), None, _too_large(path.stat().st_size)
        return str(path), io.BytesIO(path.read_bytes()), ""
    except OSError as error:
        return str(path), None, f"cannot be read ({error.strerror})"


def _members(path: Path, meter: _Meter) -> Iterator[tuple[str, BinaryIO | None, str]]:
    """Avro files of a tarball, in their order and read once; a tarball that breaks off ends in a row that says so."""
    try:
        with path.open("rb") as file, _tarball(_Metered(file, meter)) as tar:
            while member := tar.next():
                if member.isfile() and member.name.endswith(".avro"):
                    yield _member(tar, member, f"{path}/{member.name}")
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember every one of a night
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        yield str(path), None, f"the tarball breaks off here ({error})"


def _tarball(file: _Metered) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r|*")  # type: ignore[call-overload, no-any-return]  # it only reads


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, origin: str) -> tuple[str, BinaryIO | None, str]:
    if member.size > _MOST_PACKET:
        return origin, None, _too_large(member.size)
    content = tar.extractfile(member)
    return origin, io.BytesIO(content.read() if content else b""), ""


def _too_large(size: int) -> str:
    return f"{size / 1e6:.0f} MB; an alert packet has at most {_MOST_PACKET / 1e6:.0f}"


def _packets(reader: Any, origin: str, file: BinaryIO) -> Iterator[_Row]:
    """The alerts of one file; one that is no Avro, or breaks off, ends in a row that says so."""
    records = None
    while True:
        try:
            records = reader(file) if records is None else records
            record = next(records, None)
        except Exception as error:  # bytes that are no Avro raise nearly anything: ValueError, KeyError, EOFError, …
            yield _Row(origin, (f"not an Avro file, or torn ({type(error).__name__}: {error})",))
            return
        if record is None:
            return
        yield _alert(origin, record)


# --- One alert --------------------------------------------------------------------------------------------------------


def _alert(origin: str, record: Any) -> _Row:
    known = isinstance(record, dict) and isinstance(record.get("candid"), int)
    if not known or not isinstance(record.get("candidate"), dict):
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        return _Row(origin, (f"not a ZTF alert: it needs candid and candidate; found {fields}",))
    stamp = np.full((len(_CUTOUTS), STAMP_SIZE, STAMP_SIZE), np.nan, np.float32)
    problems = []
    for out, name in zip(stamp, _CUTOUTS, strict=True):
        cutout, problem = _cutout(record.get(name))
        if cutout is not None:
            out[: cutout.shape[0], : cutout.shape[1]] = cutout
        if problem:
            problems.append(f"{name}: {problem}")
    kept = {key: record[key] for key in ("candid", "objectId", "candidate") if key in record}
    return _Row(origin, tuple(problems), stamp, kept)


def _cutout(field: Any) -> tuple[Stamp | None, str]:
    """The pixels of one cutout, if they can be had, and what is wrong with them, if anything is."""
    packed = field.get("stampData") if isinstance(field, dict) else None
    if not packed:
        return None, "none in the packet"
    try:
        content = _unpacked(packed)
        plain = _plain_pixels(content)
        pixels = _pixels(content) if plain is None else plain
    except Exception as error:  # torn FITS raise nearly anything
        return None, f"not a gzipped FITS image ({error})"
    h, w = pixels.shape
    if max(h, w) > STAMP_SIZE:
        return None, f"{h} × {w} pixels; expected {STAMP_SIZE} × {STAMP_SIZE}"
    if not np.isfinite(pixels).any():
        return pixels, "no pixel holds data"
    truncated = (h, w) != (STAMP_SIZE, STAMP_SIZE)
    return pixels, f"truncated to {h} × {w} pixels, blank at the bottom and right" if truncated else ""


def _unpacked(packed: bytes) -> bytes:
    """What was gzipped, unless it is much more than a cutout is."""
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    content = unpacker.decompress(packed, _MOST_CUTOUT)
    if not unpacker.eof:
        raise ValueError(f"torn, or more than {_MOST_CUTOUT / 1e6:.0f} MB")
    return content


#: Cards of nearly every cutout; none but these says what the bytes behind the header mean.
_PLAIN_CARDS = {b"SIMPLE", b"BITPIX", b"NAXIS", b"NAXIS1", b"NAXIS2", b"END", b""}
_PLAIN_CARDS |= {b"EXTEND", b"BUNIT", b"DSNRMS", b"SSNRMS", b"DSDIFF"}
_BLOCK = 2880


def _plain_pixels(content: bytes) -> Stamp | None:
    """What `_pixels` gives, some ten times as fast, for FITS as plain as nearly all cutouts; None for others."""
    cards = {content[k : k + 8].rstrip(): content[k + 10 : k + 30] for k in range(0, _BLOCK, 80)}
    if b"END" not in cards or not set(cards) <= _PLAIN_CARDS:
        return None
    try:
        kind, axes, w, h = (int(cards[key]) for key in (b"BITPIX", b"NAXIS", b"NAXIS1", b"NAXIS2"))
    except (KeyError, ValueError):
        return None
    if (kind, axes) != (-32, 2) or min(h, w) < 1 or len(content) < _BLOCK + 4 * h * w:
        return None
    return np.frombuffer(content, ">f4", h * w, _BLOCK).reshape(h, w).astype(np.float32)


def _pixels(content: bytes) -> Stamp:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what astropy repairs by itself
        # ZTF's cutouts begin with a blank card in place of SIMPLE.
        with fits.open(io.BytesIO(content), memmap=False, ignore_missing_simple=True) as hdus:
            data = hdus[0].data
            if data is None or data.ndim != 2 or data.dtype.kind not in "fiu":
                raise ValueError("its first HDU has no image of two axes")
            return np.array(data, np.float32)
