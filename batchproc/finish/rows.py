"""Rows of the catalogue for a task: those of some images, with the scores that they have been given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchproc.errors import DamagedRunError
from batchproc.finish.work import Contents, Images, Job
from batchproc.io.atomic import write_text
from batchproc.io.catalogue import SCHEMA, read_rows, scores_schema
from batchproc.io.markers import rows_digest

__all__ = ["Scores", "freeze_scores", "frozen_scores", "read_scored_rows", "scored_schema", "survey_scores"]


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


def survey_scores(contents: Contents) -> list[Scores]:
    """The models that have scored a run, and which files hold what of it."""
    places = {image_id: place for place, image_id in enumerate(contents.index.image_ids)}
    models: dict[str, Scores] = {}
    for path in sorted(contents.folder.scores.glob("*/[!.]*.parquet")):
        schema = scores_schema(contents.folder, path)
        said = {key.decode(): value.decode() for key, value in schema.metadata.items()}
        here = [places[image_id] for image_id in json.loads(said["images"]) if image_id in places]
        if here:
            names = [name for name in schema.names if name.startswith("score")]
            columns = {f"score_{said['model']}{name.removeprefix('score')}": name for name in names}
            about = {key: said[key] for key in ("model", "version", "hash", "normalisation")}
            scores = models.setdefault(said["model"], Scores(columns, about, []))
            was = path.stat()
            stamp = f"{was.st_size}-{was.st_mtime_ns}"
            scores.parts.append((str(path.relative_to(contents.folder.path)), min(here), max(here), stamp))
    return list(models.values())


def freeze_scores(job: Job, scores: Sequence[Scores]) -> None:
    """Write down which scores a product takes in: workers read from it what a task needs."""
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
    """All columns of whole images, in their order, with `scored_schema`; ``stamp_index`` counts through the run.

    A score that is not there is NaN.

    Raises
    ------
    DamagedRunError
        Rows of an image are not what its done-marker says.
    """
    table = read_rows(job.folder, images.places)
    _check(job, images, table)
    column = table.schema.get_field_index("stamp_index")
    table = table.set_column(column, SCHEMA.field(column), pa.array(np.arange(images.offsets[0], images.offsets[-1])))
    first, last = images.begin, images.begin + len(images.places) - 1
    for model in frozen_scores(job):
        paths = [job.folder.path / path for path, low, high, _ in model.parts if low <= last and first <= high]
        found = [pq.read_table(path, use_threads=False) for path in paths]
        for field, stored in zip(model.schema(), model.columns.values(), strict=True):
            table = table.append_column(field, _joined(table["candidate_id"], found, stored))
    return table


def _check(job: Job, images: Images, table: pa.Table) -> None:
    start = images.offsets[0]
    for place, first, expected in zip(images.places, images.offsets.tolist(), images.rows_digests, strict=False):
        if rows_digest(table.slice(first - start, place.n)) != expected:
            raise DamagedRunError(
                f"{place.catalogue(job.folder)}: the rows of {place.image_id} are not those that were written; "
                f"`batchproc verify {job.folder.path} --repair` finds what is altered, `batchproc run` does it again"
            )


def _joined(candidates: pa.ChunkedArray, found: Sequence[pa.Table], stored: str) -> pa.ChunkedArray | pa.Array:
    """The score of each candidate; of one that was scored twice (the same by two chunks) the first."""
    if not found:
        return pa.nulls(len(candidates), pa.float32()).fill_null(float("nan"))
    scores = pa.concat_tables([table.select(["candidate_id", stored]) for table in found])
    rows = pc.index_in(candidates, scores["candidate_id"].combine_chunks())
    return pc.fill_null(scores[stored].take(rows), float("nan")).cast(pa.float32())
