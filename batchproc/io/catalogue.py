"""The catalogue on disk: one Parquet part an image, scores beside it, and one data frame over all.

Units and meanings of `batchproc.records.CATALOGUE` are in the metadata of each field. A part numbers its stamps from 0;
`open_catalogue` counts them through the whole run, as `batchproc.io.stamps.open_stamps` does. Scores are rows of
``scores/MODEL/*.parquet`` with the candidate's id, so that scoring rewrites nothing that is finished; each part of them
says which images it is about. An image that is to be done again is taken out of it first (`forget_scores`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchproc.errors import DamagedRunError, RunMismatchError, UsageError
from batchproc.io.atomic import replacing
from batchproc.io.index import Index, Place, read_index, read_moving
from batchproc.io.markers import rows_digest
from batchproc.io.run_folder import RunFolder
from batchproc.records import CATALOGUE

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "PARQUET",
    "SCHEMA",
    "make_rows",
    "open_catalogue",
    "read_place",
    "scored_by",
    "scored_images",
    "scores_digest",
    "scores_schema",
    "write_part",
    "write_scores",
]

SCHEMA = pa.schema(
    [
        pa.field(
            column.name,
            pa.string() if column.dtype == "str" else pa.from_numpy_dtype(np.dtype(column.dtype)),
            metadata={"unit": column.unit, "meaning": column.meaning},
        )
        for column in CATALOGUE
    ]
)

#: How everything of ours is written: pages carry a checksum, which our readers hold against their bytes.
PARQUET: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}

#: One condition, ``("scorr", ">", 7)``; a list of them must all hold.
Filter = tuple[str, str, Any]
_OPERATORS = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "in": lambda a, b: a.isin(list(b)),
    "not in": lambda a, b: ~a.isin(list(b)),
}


def make_rows(columns: Mapping[str, NDArray]) -> pa.Table:
    """Rows of one image as a table of `SCHEMA`; `columns` has every column of `CATALOGUE`."""
    return pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)


def write_part(path: Path, rows: pa.Table) -> None:
    """Write the rows of one image, a table of `SCHEMA`, whole or not at all."""
    with replacing(path) as temporary:
        pq.write_table(rows, temporary, **PARQUET)


def read_rows(folder: RunFolder, places: Sequence[Place], columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of some images, one after the other, wherever they lie and move to; ``stamp_index`` counts within each.

    Raises
    ------
    DamagedRunError
        They are not there though they should be.
    """
    names = SCHEMA.names if columns is None else list(columns)

    def read(found: Sequence[Place]) -> pa.Table:
        parts = [_only(names).empty_table()]
        for _, together in groupby(found, lambda place: place.pack or place.image_id):
            parts += _rows_of(folder, list(together), names)
        return pa.concat_tables(parts)

    return read_moving(folder, [place for place in places if place.n], read)


def read_place(folder: RunFolder, place: Place) -> pa.Table:
    """Rows of one image where it lies; raises FileNotFoundError where it has moved."""
    return _rows_of(folder, [place], SCHEMA.names)[0]


def open_catalogue(
    run: str | Path, columns: Sequence[str] | None = None, filters: Sequence[Filter] | None = None
) -> pd.DataFrame:
    """The catalogue of a run, with the scores it has been given.

    Parameters
    ----------
    run : path
        A run folder; one at work is seen as it is at this moment.
    columns : sequence of str, optional
        Only these; ``score_<model>`` among them.
    filters : sequence of (column, operator, value), optional
        Conditions that must all hold, with ``==  !=  <  <=  >  >=  in  not in``, for any column, chosen or not. Those
        on the catalogue's own columns keep the rest from being read.

    Returns
    -------
    pandas.DataFrame
        In the manifest's order, with the columns of `batchproc.records.CATALOGUE` and a ``score_<model>`` for each
        model that has scored the run (``score_<model>_<class>`` where it has several classes; NaN: not scored).
        ``stamp_index`` is the index in `open_stamps(run)`. ``.attrs["units"]`` has the units, ``.attrs["models"]``
        version, hash and normalisation of the models.

    Raises
    ------
    UsageError
        When `run` is no run folder or has no such column, or a filter is not of this form.

    Examples
    --------
    >>> open_catalogue("RUN", columns=["ra", "dec", "score_realbogus"],
    ...                filters=[("score_realbogus", ">", 0.5), ("flags", "==", 0)])     # doctest: +SKIP
    """
    folder = RunFolder.existing(run)
    scores = _score_columns(folder)
    names = [*SCHEMA.names, *(column for model in scores.values() for column in model.columns)]
    wanted = list(names if columns is None else columns)
    conditions = _check_filters(filters)
    _check_names(folder, [*wanted, *(name for name, _, _ in conditions)], names)
    in_parts = {*SCHEMA.names} - {"stamp_index"}
    stored = [c for c in conditions if c[0] in in_parts]
    later = [c for c in conditions if c[0] not in in_parts]
    needed = {*wanted, *(name for name, _, _ in later)}

    catalogue = _read_parts(folder, read_index(folder), needed, stored)
    for model in scores.values():
        if needed & model.columns.keys():
            catalogue[list(model.columns)] = _read_scores(folder, model).reindex(catalogue["candidate_id"]).to_numpy()
    for name, operator, value in later:
        catalogue = catalogue[_OPERATORS[operator](catalogue[name], value)]
    catalogue = catalogue[wanted].reset_index(drop=True)
    catalogue.attrs["units"] = {column.name: column.unit for column in CATALOGUE if column.name in wanted}
    catalogue.attrs["models"] = {name: model.about for name, model in scores.items()}
    return catalogue


def write_scores(
    path: Path,
    image_ids: NDArray | pa.ChunkedArray,
    candidate_ids: NDArray | pa.ChunkedArray,
    scores: NDArray[np.float32],
    model: Any,
) -> None:
    """Write the scores of a chunk of candidates, whole or not at all.

    Parameters
    ----------
    path : Path
        In ``RUN/scores/MODEL/``.
    image_ids, candidate_ids : ndarray (n,) or pyarrow.ChunkedArray
        Of each candidate; every image is there with all its candidates.
    scores : ndarray (n,) or (n, n_classes) float32
        NaN: not scored.
    model : Model
        Its name, version, hash, fingerprint and normalisation go into the schema's metadata.
    """
    by_name = dict(zip(_score_names(model, scores), scores.reshape(len(scores), -1).T, strict=True))
    fields = [pa.field(name, pa.string()) for name in ("candidate_id", "image_id")]
    fields += [pa.field(name, pa.float32(), metadata={"unit": "", "meaning": "score"}) for name in by_name]
    metadata = {
        "model": model.name,
        "version": str(model.version),
        "hash": model.hash,
        "fingerprint": model.fingerprint,
        "normalisation": str(model.normalisation),
        "images": json.dumps(pc.unique(_texts(image_ids)).to_pylist()),
    }
    names = {"candidate_id": _texts(candidate_ids), "image_id": _texts(image_ids)}
    _write_scores(path, pa.table({**names, **by_name}, pa.schema(fields, metadata)))


def _texts(values: NDArray | pa.ChunkedArray) -> pa.ChunkedArray:
    return values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([pa.array(values, pa.string())])


def _write_scores(path: Path, table: pa.Table) -> None:
    table = table.replace_schema_metadata({**table.schema.metadata, b"digest": scores_digest(table)})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, **PARQUET)


def scores_digest(table: pa.Table) -> str:
    """Of the rows of a part of scores, and of what its metadata say of them (``digest`` apart, which is this one)."""
    about = {key: value for key, value in _text(table.schema.metadata).items() if key != "digest"}
    said = json.dumps([about, rows_digest(table)], sort_keys=True)
    return sha256(said.encode()).hexdigest()[:32]


def scored_images(folder: RunFolder, model: Any) -> set[str]:
    """Images that this model has scored already.

    Raises
    ------
    RunMismatchError
        Another version of the model has scored some, or the same file with another card: its scores are not mixed
        with new ones.
    DamagedRunError
        A part of them cannot be read.
    """
    images: set[str] = set()
    for path in _score_parts(folder.scores_of(model.name)):
        metadata = _text(scores_schema(folder, path).metadata)
        if metadata["hash"] != model.hash:
            raise RunMismatchError(
                f"{path.parent} has scores of version {metadata['version']} of the model {model.name} "
                f"({metadata['hash'][:12]}), the model now is version {model.version} ({model.hash[:12]}): "
                "remove that folder to score again, or add the model under another name"
            )
        # Scores from before there were fingerprints are known by their file, or runs would have to be scored again.
        if metadata.get("fingerprint", model.fingerprint) != model.fingerprint:
            raise RunMismatchError(
                f"{path.parent} has scores of the same file of the model {model.name} with another card (version "
                f"{metadata['version']}, normalisation {metadata['normalisation']}; now version {model.version}, "
                f"normalisation {model.normalisation}; its size, channels, layout, min_finite, padding, truncated, "
                "features or classes may differ too): remove that folder to score again, or add the model under "
                "another name"
            )
        images |= set(json.loads(metadata["images"]))
    return images


def scored_by(folder: RunFolder) -> list[str]:
    """Folders of scores that have some: one a model."""
    return [path.name for path in sorted(folder.scores.glob("*/")) if _score_parts(path)]


def forget_scores(folder: RunFolder, image_ids: Collection[str]) -> None:
    """Take images out of the scores of all models, which then count as not scored; so do parts that are torn."""
    for path in (part for model in folder.scores.glob("*/") for part in _score_parts(model)):
        try:
            metadata = scores_schema(folder, path).metadata
        except DamagedRunError:
            path.unlink()
            continue
        before = json.loads(metadata[b"images"])
        left = [image_id for image_id in before if image_id not in image_ids]
        if not left:
            path.unlink()
        elif len(left) < len(before):
            table = pq.read_table(path)
            table = table.filter(pc.is_in(table["image_id"], pa.array(left, pa.string())))
            _write_scores(path, table.replace_schema_metadata({**metadata, b"images": json.dumps(left)}))


def scores_schema(folder: RunFolder, path: Path) -> pa.Schema:
    """Columns and metadata of a part of scores.

    Raises
    ------
    DamagedRunError
        It is none (any more).
    """
    try:
        schema = pq.read_schema(path)
        json.loads(schema.metadata[b"images"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not what is on it
            raise
        raise _unreadable_scores(folder, path, error) from error
    return schema


def _unreadable_scores(folder: RunFolder, path: Path, error: Exception) -> DamagedRunError:
    return DamagedRunError(
        f"{path}: scores cannot be read ({error}); `batchproc verify {folder.path} --repair` removes what is damaged, "
        "and the next `batchproc run` or `batchproc classify` makes it again"
    )


def _rows_of(folder: RunFolder, places: Sequence[Place], names: Sequence[str]) -> list[pa.Table]:
    """Rows of some images in one file, of which only the row groups are read that they are in."""
    first = min(place.row for place in places)
    last = max(place.row + place.n for place in places)
    with pq.ParquetFile(places[0].catalogue(folder), page_checksum_verification=True) as file:
        about = file.metadata
        starts = np.cumsum([0, *(about.row_group(i).num_rows for i in range(about.num_row_groups))])
        groups = [i for i in range(about.num_row_groups) if starts[i] < last and starts[i + 1] > first]
        table = file.read_row_groups(groups, columns=list(names)).select(list(names)).cast(_only(names))
    start = int(starts[groups[0]]) if groups else 0
    parts = [table.slice(place.row - start, place.n) for place in places]
    for place, part in zip(places, parts, strict=True):
        if len(part) != place.n:
            raise ValueError(
                f"{place.catalogue(folder)}: {len(part)} rows of the image {place.image_id}, {place.n} in its marker"
            )
    return parts


def _read_parts(folder: RunFolder, index: Index, wanted: Iterable[str], filters: Sequence[Filter]) -> pd.DataFrame:
    columns = [name for name in SCHEMA.names if name in {*wanted, "candidate_id", "image_id", "stamp_index"}]
    condition = None
    for name, operator, value in filters:
        part = pq.filters_to_expression([(name, operator, value)])
        condition = part if condition is None else condition & part

    def read(places: Sequence[Place]) -> list[pa.Table]:
        return _filtered(folder, places, columns, condition)

    # Files of their own first: they are what moves while we read.
    parts = [_only(columns).empty_table()]
    for some in (np.flatnonzero(index.pack < 0), np.flatnonzero(index.pack >= 0)):
        parts += read_moving(folder, index.places(some.tolist()), read)
    table = pa.concat_tables(parts)
    if condition is None and len(table) != len(index):
        raise DamagedRunError(
            f"{folder.path}: {len(table)} rows in the catalogue, {len(index)} in the markers; `batchproc verify "
            f"{folder.path} --repair` finds all that is altered"
        )
    offsets = dict(zip(index.image_ids, index.offsets[:-1].tolist(), strict=True))
    images = table["image_id"].combine_chunks().dictionary_encode()
    first = np.array([offsets[image_id] for image_id in images.dictionary.to_pylist()], np.int64)
    catalogue: pd.DataFrame = table.to_pandas()
    catalogue["stamp_index"] += first[images.indices.to_numpy()]
    return catalogue.sort_values("stamp_index", ignore_index=True)


def _filtered(folder: RunFolder, places: Sequence[Place], columns: Sequence[str], condition: Any) -> list[pa.Table]:
    """Those rows of some images that fulfil a condition."""
    import pyarrow.dataset as ds

    def rows(paths: list[Path], condition: Any) -> pa.Table:
        files = ds.dataset([str(path) for path in paths], schema=SCHEMA, format=_checked_parquet())
        return files.to_table(columns=list(columns), filter=condition)

    whole, parts = [], []
    for pack, together in groupby(sorted(places, key=lambda place: place.pack), lambda place: place.pack):
        some = list(together)
        path = some[0].catalogue(folder)
        if not pack:
            whole += [place.catalogue(folder) for place in some]
        elif _n_rows(path) == sum(place.n for place in some):
            whole.append(path)
        else:  # an image of this pack lies, newer, in another place
            here = pc.field("image_id").isin([place.image_id for place in some])
            parts.append(rows([path], here if condition is None else condition & here))
    return [*parts, rows(whole, condition)] if whole else parts


def _checked_parquet() -> Any:
    """The format of data sets whose pages are held against their checksums while they are read."""
    import pyarrow.dataset as ds

    how = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    return ds.ParquetFileFormat(default_fragment_scan_options=how)


def _n_rows(path: Path) -> int:
    with pq.ParquetFile(path) as file:
        return int(file.metadata.num_rows)


def _only(columns: Sequence[str]) -> pa.Schema:
    return pa.schema([SCHEMA.field(name) for name in columns])


@dataclass(frozen=True)
class _Scores:
    """Scores of one model: its files, its columns (in the catalogue → in the files), and what made them."""

    parts: list[Path]
    columns: dict[str, str]
    about: dict[str, str]


def _score_columns(folder: RunFolder) -> dict[str, _Scores]:
    models = {}
    for path in sorted(folder.scores.glob("*/")):
        parts = _score_parts(path)
        if parts:
            schema = scores_schema(folder, parts[0])
            metadata = _text(schema.metadata)
            columns = {
                f"score_{metadata['model']}{name.removeprefix('score')}": name
                for name in schema.names
                if name not in ("candidate_id", "image_id")
            }
            about = {key: metadata[key] for key in ("version", "hash", "normalisation")}
            models[metadata["model"]] = _Scores(parts, columns, about)
    return models


def _read_scores(folder: RunFolder, model: _Scores) -> pd.DataFrame:
    import pyarrow.dataset as ds

    columns = ["candidate_id", *model.columns.values()]
    try:
        frame = ds.dataset(model.parts, format=_checked_parquet()).to_table(columns=columns).to_pandas()
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not what is on it
            raise
        raise _unreadable_scores(folder, model.parts[0].parent, error) from error
    # A chunk that was scored twice (a driver was killed, and the next one cut other chunks) gave the same scores.
    return frame.drop_duplicates("candidate_id").set_index("candidate_id")[list(model.columns.values())]


def _score_parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.parquet"))


def _score_names(model: Any, scores: NDArray[np.float32]) -> list[str]:
    if scores.ndim == 1:
        return ["score"]
    classes = getattr(model, "classes", ()) or range(scores.shape[1])
    return [f"score_{name}" for name in classes]


def _check_names(folder: RunFolder, asked: Iterable[str], known: Sequence[str]) -> None:
    unknown = [name for name in asked if name not in known]
    if unknown:
        hint = "; `batchproc classify` makes scores" if unknown[0].startswith("score_") else ""
        raise UsageError(f"{folder.path}: no column {unknown[0]!r} in the catalogue; known: {', '.join(known)}{hint}")


def _check_filters(filters: Any) -> list[Filter]:
    """The conditions, each as a tuple; UsageError for anything else than a list of (column, operator, value)."""
    if filters is None:
        return []
    form = f"expected [(column, operator, value), …], all of which must hold, with {'  '.join(_OPERATORS)}"
    if not isinstance(filters, list | tuple):
        raise UsageError(f"filters = {filters!r}: {form}")
    conditions: list[Filter] = []
    for condition in filters:
        if not (isinstance(condition, list | tuple) and len(condition) == 3 and isinstance(condition[0], str)):
            raise UsageError(f"filters: {condition!r} is no condition; {form}")
        name, operator, value = condition
        if not (isinstance(operator, str) and operator in _OPERATORS):
            raise UsageError(f"filters: {condition!r}: unknown operator {operator!r}; {form}")
        several = operator in ("in", "not in")
        if several and (isinstance(value, str) or not isinstance(value, Iterable)):
            raise UsageError(f"filters: {condition!r}: {operator!r} needs a list of values; {form}")
        values = list(value) if several else [value]
        kind = str if name in SCHEMA.names and SCHEMA.field(name).type == pa.string() else (Real, np.bool_)
        if not all(isinstance(one, kind) for one in values):
            expected = "text" if kind is str else "numbers"
            raise UsageError(f"filters: {condition!r}: the column {name} holds {expected}; {form}")
        conditions.append((name, operator, values if several else value))
    return conditions


def _text(metadata: Mapping[bytes, bytes]) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in metadata.items()}
