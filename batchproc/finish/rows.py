"""Rows of the catalogue for a task: those of some images, with the scores that they have been given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchproc.finish.work import Images, Job
from batchproc.io.atomic import write_text
from batchproc.io.catalogue import SCHEMA
from batchproc.io.progress import Index
from batchproc.io.run_folder import RunFolder

__all__ = ["Scores", "freeze_scores", "read_rows", "read_scored_rows", "scored_schema", "survey_scores"]


@dataclass(frozen=True)
class Scores:
    """What one model has said of a run.

    Attributes
    ----------
    columns : dict
        Name in the catalogue → name in the model's files.
    about : dict
        ``model``, ``version``, ``hash``, ``normalisation``.
    parts : list of (path, first, last, stamp)
        Files, relative to the run folder; the first and the last of the images in each, by their places in the run; and
        what tells the file from another of that name.
    """

    columns: dict[str, str]
    about: dict[str, str]
    parts: list[tuple[str, int, int, str]]

    def schema(self) -> pa.Schema:
        """Its columns, as the catalogue has them."""
        meaning = f"score of the model {self.about['model']}; NaN: not scored"
        return pa.schema(
            [
                pa.field(name, pa.float32(), metadata={"unit": "", "meaning": meaning, **self.about})
                for name in self.columns
            ]
        )


def read_rows(folder: RunFolder, images: Images, columns: Sequence[str]) -> pa.Table:
    """Rows of whole images, in their order; ``stamp_index`` counts through the run."""
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    tables = [schema.empty_table()]
    for image_id, first in zip(images.image_ids, images.offsets.tolist(), strict=False):
        table = pq.read_table(folder.catalogue_part(image_id), columns=list(columns), use_threads=False)
        table = table.select(columns).cast(schema)
        if "stamp_index" in columns:
            place = schema.get_field_index("stamp_index")
            table = table.set_column(place, schema.field(place), pc.add(table["stamp_index"], first))
        tables.append(table)
    return pa.concat_tables(tables)


def survey_scores(folder: RunFolder, index: Index) -> list[Scores]:
    """The models that have scored a run, and which files hold what of it."""
    places = {image_id: place for place, image_id in enumerate(index.image_ids)}
    models: dict[str, Scores] = {}
    for path in sorted(folder.scores.glob("*/[!.]*.parquet")):
        schema = pq.read_schema(path)
        about = {key.decode(): value.decode() for key, value in schema.metadata.items()}
        here = [places[image_id] for image_id in json.loads(about.pop("images")) if image_id in places]
        if here:
            names = [name for name in schema.names if name != "candidate_id"]
            columns = {f"score_{about['model']}{name.removeprefix('score')}": name for name in names}
            about.pop("ARROW:schema", None)
            scores = models.setdefault(about["model"], Scores(columns, about, []))
            was = path.stat()
            stamp = f"{was.st_size}-{was.st_mtime_ns}"
            scores.parts.append((str(path.relative_to(folder.path)), min(here), max(here), stamp))
    return list(models.values())


def freeze_scores(job: Job, scores: Sequence[Scores]) -> None:
    """Write down which scores a product takes in: workers read from it what a task needs."""
    if not job.path("scores.json").is_file():
        write_text(job.path("scores.json"), json.dumps([asdict(model) for model in scores]))


def frozen_scores(job: Job) -> list[Scores]:
    """The scores that a product takes in."""
    return _scores(job.path("scores.json"))


@lru_cache(maxsize=1)
def _scores(path: Path) -> list[Scores]:
    return [Scores(**model) for model in json.loads(path.read_text())]


def scored_schema(scores: Sequence[Scores]) -> pa.Schema:
    """The catalogue's columns and those of the scores, with their units and meanings."""
    return pa.schema([*SCHEMA, *(field for model in scores for field in model.schema())])


def read_scored_rows(job: Job, images: Images) -> pa.Table:
    """All columns of whole images, in their order, with `scored_schema`; a score that is not there is NaN."""
    table = read_rows(job.folder, images, SCHEMA.names)
    everything = job.images()
    first = everything.place(images)
    last = first + len(images.image_ids) - 1
    for model in frozen_scores(job):
        paths = [job.folder.path / path for path, low, high, _ in model.parts if low <= last and first <= high]
        found = [pq.read_table(path, use_threads=False) for path in paths]
        for field, stored in zip(model.schema(), model.columns.values(), strict=True):
            table = table.append_column(field, _joined(table["candidate_id"], found, stored))
    return table


def _joined(candidates: pa.ChunkedArray, found: Sequence[pa.Table], stored: str) -> pa.ChunkedArray | pa.Array:
    """The score of each candidate; of one that was scored twice (the same by two chunks) the first."""
    if not found:
        return pa.nulls(len(candidates), pa.float32()).fill_null(float("nan"))
    scores = pa.concat_tables([table.select(["candidate_id", stored]) for table in found])
    rows = pc.index_in(candidates, scores["candidate_id"].combine_chunks())
    return pc.fill_null(scores[stored].take(rows), float("nan")).cast(pa.float32())
