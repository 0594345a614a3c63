"""Manifests: a table (CSV, ECSV, Parquet) of images and their references, checked as a whole.

``image_id``, ``new`` and ``ref`` must be there; the other columns are those of `ManifestEntry`. Paths are relative to
the manifest's folder and may name an HDU (``path[hdu]``); several references are joined by ``;``, and so are their
masks, variances and PSFs, in the same order (an empty item: none). All that is wrong is said at once, with row numbers
that count from 1. What a header says is checked by `check_manifest` only; which image goes with which reference is
found by `footprints`.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import hashlib
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from batchproc.errors import ManifestError, ReadError
from batchproc.io.fitsfile import split_hdu
from batchproc.io.footprints import build_manifest, covers
from batchproc.io.inspection import ImageInfo, inspect_image, unknown_unit
from batchproc.io.profiles import list_profiles
from batchproc.records import ManifestEntry

__all__ = [
    "Problem",
    "build_manifest",
    "check_manifest",
    "entry_digest",
    "manifest_digest",
    "read_manifest",
    "write_manifest",
]

_log = logging.getLogger(__name__)

COLUMNS = tuple(f.name for f in dataclasses.fields(ManifestEntry))
REQUIRED = ("image_id", "new", "ref")
TEXTS = ("survey", "filter", "exposure_id", "ccd")
PATHS = ("new_mask", "new_psf", "new_variance")
PATH_LISTS = ("ref_mask", "ref_psf", "ref_variance")
NUMBERS = {"gain": "positive", "read_noise": "not negative", "saturation": "positive", "mjd": "15000 to 120000"}
_MAX_ID = 200
_BATCH_ROWS = 10_000
_SHARED = 30_000  # paths that are remembered: a night's references


@dataclass(frozen=True)
class Problem:
    """Something about a manifest.

    Attributes
    ----------
    level : {"error", "warning", "note"}
        An error stops the manifest, or the image; a warning may spoil results; a note is for information.
    message : str
    row : int or None
        Row of the table, from 1; None for the whole.
    image_id : str
    """

    level: str
    message: str
    row: int | None = None
    image_id: str = ""

    def __str__(self) -> str:
        where = f"row {self.row}" + (f" ({self.image_id})" if self.image_id else "") + ": " if self.row else ""
        return where + self.message


def read_manifest(path: str | Path) -> list[ManifestEntry]:
    """Read and validate a manifest.

    Parameters
    ----------
    path : str or Path
        ``.csv``, ``.ecsv`` or ``.parquet``.

    Returns
    -------
    list of ManifestEntry
        In the order of the table, all paths absolute.

    Raises
    ------
    ManifestError
        Every problem of the table, with row numbers. Whether the files are there is not looked at here: a missing file
        is a failure of its image, and the others go on.
    """
    path = Path(path)
    rows, problems = _parse(path)
    errors = [problem for problem in problems if problem.level == "error"]
    if errors:
        shown = "\n".join(f"  {problem}" for problem in errors[:20])
        more = f"\n  … and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise ManifestError(f"{path}: {len(errors)} problem{'s' * (len(errors) > 1)}:\n{shown}{more}")
    for problem in problems:
        _log.info("%s: %s", path, problem)
    return [entry for _, entry in rows]


def write_manifest(table: pd.DataFrame | Sequence[ManifestEntry], path: str | Path) -> None:
    """Write a manifest; the suffix of the path chooses CSV, ECSV or Parquet.

    Parameters
    ----------
    table : DataFrame or sequence of ManifestEntry
        Columns of a manifest, written as they are (relative paths will be relative to the new manifest's folder);
        entries, with the columns that hold anything.
    path : str or Path
    """
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        if suffix in (".parquet", ".pq") and not isinstance(table, pd.DataFrame):
            _write_parquet(table, path)
            return
        frame = table if isinstance(table, pd.DataFrame) else _to_frame(table)
        if suffix == ".csv":
            frame.to_csv(path, index=False)
        elif suffix in (".parquet", ".pq"):
            frame.to_parquet(path, index=False)
        elif suffix == ".ecsv":
            from astropy.table import Table

            Table.from_pandas(frame).write(path, format="ascii.ecsv", overwrite=True)
        else:
            raise _unknown_suffix(path)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be written ({error.strerror or error})") from error


def entry_digest(entry: ManifestEntry) -> str:
    """Hash of everything that a manifest says of one image; the same for an entry that was written and read again."""
    values = [_as_read(name, getattr(entry, name)) for name in COLUMNS]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _as_read(name: str, value: Any) -> Any:
    if name in NUMBERS:
        return None if value is None else float(value)
    return [*value] if isinstance(value, tuple | list) else value or None


def manifest_digest(entries: Iterable[ManifestEntry]) -> str:
    """Hash of everything that a manifest says, whatever the order of its rows."""
    return hashlib.sha256("\n".join(sorted(map(entry_digest, entries))).encode()).hexdigest()[:16]


def check_manifest(path: str | Path, *, read_headers: bool = True) -> list[Problem]:
    """Find what will go wrong, before anything is computed.

    Parameters
    ----------
    path : str or Path
    read_headers : bool
        Open every image too: unreadable headers, raw frames, units, assumed gains, missing WCS, references that do not
        overlap, and which instrument profile was recognised. Without, only the table and the presence of the files.

    Returns
    -------
    list of Problem
        Errors first; what many images share is said once, with the number of images.
    """
    try:
        rows, problems = _parse(Path(path))
    except ManifestError as error:
        return [Problem("error", str(error))]
    problems += _missing_files(rows)
    if read_headers:
        problems += _check_headers(rows)
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(problems, key=lambda problem: (order[problem.level], problem.row or 0))


# ---- the table

#: Number of a row, and what it says.
Row = tuple[int, ManifestEntry]


def _parse(path: Path) -> tuple[list[Row], list[Problem]]:
    """Good rows, and what is wrong with the others; raises ManifestError where there is no table at all."""
    folder = os.path.dirname(os.path.abspath(path))
    # The images of a field share their references: one tuple for all of them, so that a million entries stay small.
    shared = lru_cache(_SHARED)(_paths)
    problems: list[Problem] = []
    ids: Counter[str] = Counter()
    rows: list[Row] = []
    numbers = count(1)
    for part, table in enumerate(_read_tables(path)):
        if part == 0:
            problems += _check_columns(path, table)
        for values, number in zip(zip(*table.values(), strict=True), numbers, strict=False):
            wrong: list[str] = []
            entry = _entry(dict(zip(table, values, strict=True)), folder, shared, wrong)
            ids[entry.image_id] += 1
            problems += [Problem("error", message, number, entry.image_id) for message in wrong]
            if not wrong:
                rows.append((number, entry))
    if not ids:
        raise ManifestError(f"{path}: no rows; a manifest has one row for each image")
    for number, entry in rows if len(ids) < ids.total() else ():
        if ids[entry.image_id] > 1:
            message = f"image_id {entry.image_id!r} is there {ids[entry.image_id]} times; it must be unique"
            problems.append(Problem("error", message, number, entry.image_id))
    problems += _repeated_images(rows)
    return rows, sorted(problems, key=lambda problem: problem.row or 0)


def _entry(
    row: Mapping[str, Any], folder: str, shared: Callable[..., tuple[str, ...]], wrong: list[str]
) -> ManifestEntry:
    image_id = _text(row["image_id"])
    if not image_id:
        wrong.append("image_id is empty")
    elif len(image_id) > _MAX_ID or not image_id.isprintable():
        wrong.append(f"image_id {image_id[:40]!r}…: at most {_MAX_ID} printable characters")
    paths = {name: _paths(row.get(name), folder) for name in ("new", *PATHS)}
    for name, found in paths.items():
        if len(found) > 1:
            wrong.append(f"{name} has {len(found)} paths; expected one")
    refs = shared(row["ref"], folder)
    if "" in refs:
        refs = tuple(path for path in refs if path)
    if not paths["new"]:
        wrong.append("new is empty")
    if not refs:
        wrong.append("ref is empty")
    planes = {name: shared(row.get(name), folder) for name in PATH_LISTS}
    for name, found in planes.items():
        if found and len(found) != len(refs):
            wrong.append(f"{name} has {len(found)} paths for {len(refs)} references; expected one for each")
    for name, value in [("new", paths["new"]), ("ref", refs), *paths.items(), *planes.items()]:
        if any("://" in path for path in value):
            wrong.append(f"{name} is an address; expected the path of a local file")
    return ManifestEntry(
        image_id=image_id,
        new=next(iter(paths["new"]), ""),
        ref=refs,
        **{name: next(iter(paths[name]), None) for name in PATHS},  # type: ignore[arg-type]
        **planes,  # type: ignore[arg-type]
        **{name: sys.intern(_text(row.get(name))) or None for name in TEXTS},  # type: ignore[arg-type]
        **{name: _number(name, row.get(name), wrong) for name in NUMBERS},  # type: ignore[arg-type]
    )


def _paths(value: Any, folder: str) -> tuple[str, ...]:
    text = _text(value)
    parts = (part.strip() for part in text.split(";")) if text else ()
    return tuple(_absolute(part, folder) if part else "" for part in parts)


def _absolute(path: str, folder: str) -> str:
    return path if "://" in path else os.path.normpath(os.path.join(folder, os.path.expanduser(path)))


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # Columns of whole numbers with gaps come back from Parquet as floating point.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _number(name: str, value: Any, wrong: list[str]) -> float | None:
    text = "" if value is None else str(value).strip()
    if text.lower() in ("", "nan", "none"):
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    allowed = 15000 < number < 120000 if name == "mjd" else number >= 0 if name == "read_noise" else number > 0
    if not (math.isfinite(number) and allowed):
        wrong.append(f"{name} = {text!r}: expected a number, {NUMBERS[name]}")
    return number


def _check_columns(path: Path, table: Mapping[str, Any]) -> list[Problem]:
    missing = [name for name in REQUIRED if name not in table]
    if missing:
        raise ManifestError(
            f"{path}: no column {', '.join(missing)}; found {', '.join(table) or 'none'}. "
            f"A manifest needs {', '.join(REQUIRED)}."
        )
    return _unknown_columns(table)


def _unknown_columns(table: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for name in table:
        if name in COLUMNS:
            continue
        close = difflib.get_close_matches(name.strip().lower(), [c for c in COLUMNS if c not in table], n=1, cutoff=0.8)
        if close:
            problems.append(Problem("error", f"unknown column {name!r}; did you mean {close[0]!r}?"))
        else:
            problems.append(Problem("note", f"column {name!r} is not one of a manifest's and is left out"))
    return problems


def _repeated_images(rows: Sequence[Row]) -> list[Problem]:
    first: dict[str, int] = {}
    problems = []
    for number, entry in rows:
        if first.setdefault(entry.new, number) != number:
            message = f"new is that of row {first[entry.new]} too: {entry.new}"
            problems.append(Problem("warning", message, number, entry.image_id))
    return problems


# ---- reading and writing


def _read_tables(path: Path) -> Iterator[dict[str, list[Any]]]:
    """Columns of the table by name, at least once; a long Parquet file a piece at a time."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            yield _read_csv(path)
            return
        if suffix == ".ecsv":
            from astropy.table import Table

            table = Table.read(path, format="ascii.ecsv")
            yield {name: [None if v is None else v for v in table[name].tolist()] for name in table.colnames}
            return
        if suffix in (".parquet", ".pq"):
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as file:
                yield file.schema_arrow.empty_table().to_pydict()
                for batch in file.iter_batches(_BATCH_ROWS):
                    yield batch.to_pydict()
            return
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ManifestError:
        raise
    except Exception as error:  # whatever a parser makes of a file that is not what its name says
        raise ManifestError(f"{path}: not a {suffix[1:].upper()} table ({str(error).splitlines()[0][:160]})") from error
    raise _unknown_suffix(path)


def _read_csv(path: Path) -> dict[str, list[Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file, skipinitialspace=True) if any(field.strip() for field in row)]
    if not rows:
        raise ManifestError(f"{path}: empty; expected a header line with {', '.join(REQUIRED)}")
    names = [name.strip() for name in rows[0]]
    if len(names) == 1 and ";" in names[0]:
        raise ManifestError(f"{path}: columns separated by ';'; expected commas (';' joins several references)")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ManifestError(f"{path}: column {', '.join(twice)} is there more than once")
    wrong = [f"row {number}" for number, row in enumerate(rows[1:], 1) if len(row) != len(names)]
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ManifestError(
            f"{path}: expected {len(names)} fields in each row, not so in {', '.join(wrong[:10])}{more}"
        )
    return {name: [row[column] for row in rows[1:]] for column, name in enumerate(names)}


def _unknown_suffix(path: Path) -> ManifestError:
    return ManifestError(f"{path}: unknown kind of table {path.suffix!r}; expected .csv, .ecsv or .parquet")


def _to_frame(entries: Sequence[ManifestEntry]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            name: pd.Series(_cells(entries, name), dtype="float64" if name in NUMBERS else object)
            for name in _held(entries)
        }
    )


def _write_parquet(entries: Sequence[ManifestEntry], path: Path) -> None:
    """A piece at a time: a long manifest is in memory once already."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.float64() if name in NUMBERS else pa.string()) for name in _held(entries)])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(entries), _BATCH_ROWS):
            piece = entries[start : start + _BATCH_ROWS]
            writer.write_table(pa.table({name: _cells(piece, name) for name in schema.names}, schema))


def _held(entries: Sequence[ManifestEntry]) -> list[str]:
    """Columns that hold anything."""
    return [n for n in COLUMNS if n in REQUIRED or any(getattr(entry, n) not in (None, ()) for entry in entries)]


def _cells(entries: Sequence[ManifestEntry], name: str) -> list[Any]:
    values = [getattr(entry, name) for entry in entries]
    return [";".join(value) or None for value in values] if name in ("ref", *PATH_LISTS) else values


# ---- the files behind it


def _missing_files(rows: Sequence[Row]) -> list[Problem]:
    problems = []
    known: dict[str, bool] = {}
    for number, entry in rows:
        for name in ("new", "ref", *PATHS, *PATH_LISTS):
            value = getattr(entry, name)
            for spec in value if isinstance(value, tuple) else (value,):
                if spec and not known.setdefault(spec, split_hdu(spec)[0].is_file()):
                    problems.append(Problem("error", f"{name}: no such file: {spec}", number, entry.image_id))
    return problems


def _check_headers(rows: Sequence[Row]) -> list[Problem]:
    problems: list[Problem] = []
    shared: dict[tuple[str, str], list[int]] = {}
    profiles = list_profiles()
    references: dict[tuple[str, str | None], ImageInfo | ReadError] = {}

    def inspect(spec: str, named: str | None, *, is_new: bool) -> ImageInfo | ReadError:
        try:
            return inspect_image(spec, profile=named if is_new else None, otherwise=named)
        except ReadError as error:
            return error

    for number, entry in rows:
        named = entry.survey if entry.survey in profiles else None
        new = inspect(entry.new, named, is_new=True)
        found: list[ImageInfo] = []
        for spec in entry.ref:
            key = (spec, named)
            if key not in references:
                references[key] = inspect(spec, named, is_new=False)
            reference = references[key]
            found += [reference] if isinstance(reference, ImageInfo) else []
            if isinstance(reference, ReadError) and split_hdu(spec)[0].is_file():
                shared.setdefault(("error", f"ref: {reference}"), []).append(number)
        if isinstance(new, ReadError):
            if split_hdu(entry.new)[0].is_file():  # that it is missing has been said
                problems.append(Problem("error", f"new: {new}", number, entry.image_id))
            continue
        for level, message in _remarks(entry, new, found):
            shared.setdefault((level, message), []).append(number)
    for (level, message), numbers in shared.items():
        if len(numbers) == 1:
            problems.append(Problem(level, message, numbers[0]))
        else:
            problems.append(Problem(level, f"{message} ({len(numbers)} images, the first in row {numbers[0]})"))
    return problems


def _remarks(entry: ManifestEntry, new: ImageInfo, references: Sequence[ImageInfo]) -> Iterable[tuple[str, str]]:
    yield "note", f"profile {new.profile.name}"
    given = {name for name in NUMBERS if getattr(entry, name) is not None}
    if math.isnan(new.calibration.electrons_per_unit) and "gain" not in given and not entry.new_variance:
        yield "error", f"new: {unknown_unit(new)}"
    for name, sentence in new.calibration.assumed.items():
        if name not in given:
            yield "warning", f"assumed: {sentence}"
    for note in new.notes:
        yield "warning" if new.wcs is None else "note", note
    if math.isnan(new.mjd) and "mjd" not in given:
        yield "warning", "no time in the header: the column mjd gives it"
    for reference in references:
        if new.wcs is not None and reference.wcs is not None and not covers(reference, new).any():
            yield "error", f"ref does not overlap new: {reference.path}"
        filters = entry.filter or new.texts["filter"], reference.texts["filter"]
        if all(filters) and filters[0] != filters[1]:
            yield "warning", f"new is in filter {filters[0]!r}, its reference in {filters[1]!r}"
