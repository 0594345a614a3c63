"""What runs on a worker that scores: one chunk of stamps, read once for all models. Out: a file of scores a model."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from batchproc.distribute.tasks import Job, prepare
from batchproc.distribute.transient import is_transient
from batchproc.io.atomic import our_disk
from batchproc.io.index import CHUNK_ROWS, Place

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

__all__ = ["Chunk", "Failure", "Piece", "classify_chunk", "open_models"]

#: Candidates whose stamps are in memory at a time: 50 MB of stamps of 63 pixels, and as much while they are read.
_PIECE = 1024


@dataclass(frozen=True)
class Piece:
    """Some candidates of some images.

    Attributes
    ----------
    places : tuple of Place
    parts : tuple of slice
        Which candidates of each.
    """

    places: tuple[Place, ...]
    parts: tuple[slice, ...]

    def __len__(self) -> int:
        return sum(part.stop - part.start for part in self.parts)


@dataclass(frozen=True)
class Chunk:
    """Whole images whose candidates are scored by one task, into one file a model.

    Attributes
    ----------
    places : tuple of Place
    models : tuple of str
        Names of the models that shall score them.
    """

    places: tuple[Place, ...]
    models: tuple[str, ...] = ()

    @property
    def n_candidates(self) -> int:
        """In all of its images."""
        return sum(place.n for place in self.places)

    @property
    def name(self) -> str:
        """Of its files: made of its images."""
        return sha256("\n".join(place.image_id for place in self.places).encode()).hexdigest()[:32]

    def pieces(self, size: int = _PIECE) -> Iterator[Piece]:
        """What is in memory at a time: at most `size` candidates (a multiple of `CHUNK_ROWS`), in their order."""
        assert size % CHUNK_ROWS == 0
        some: list[tuple[Place, slice]] = []
        n = 0
        for place in self.places:
            for start in range(0, place.n, size):
                part = slice(start, min(start + size, place.n))
                if some and n + part.stop - part.start > size:
                    yield _piece(some)
                    some, n = [], 0
                some.append((place, part))
                n += part.stop - part.start
        if some:
            yield _piece(some)


def _piece(some: Sequence[tuple[Place, slice]]) -> Piece:
    places, parts = zip(*some, strict=True)
    return Piece(places, parts)


@dataclass(frozen=True)
class Failure:
    """Why a model could not score: its error, and where that came from."""

    error: Exception
    traceback: str


def classify_chunk(job: Job, models: Sequence[Any], chunk: Chunk) -> Mapping[str, Failure]:
    """Score the candidates of a chunk of images with those of the models that it names, in one pass over its stamps.

    A model that fails leaves no file, and the others theirs.

    Returns
    -------
    mapping of str to Failure
        Models that failed.

    Raises
    ------
    StorageError, DamagedRunError
        The scores cannot be written, or the stamps not be read.
    """
    import numpy as np

    from batchproc.io.catalogue import read_rows, write_scores

    folder, config = prepare(job)
    asked = [model for model in models if model.name in chunk.models]
    columns = ["candidate_id", "image_id", *dict.fromkeys(name for model in asked for name in _features(model))]
    rows = read_rows(folder, chunk.places, columns)
    scores: dict[str, list[NDArray[Any]]] = {model.name: [] for model in asked}
    failed: dict[str, Failure] = {}
    before = 0
    for piece in chunk.pieces():
        going = [model for model in asked if model.name not in failed]
        if not going:
            break
        stamps = _read(folder, piece) if any(_takes_stamps(model) for model in going) else None
        for batch in range(0, len(piece), config.classify.batch):
            some = slice(batch, min(batch + config.classify.batch, len(piece)))
            table = rows.slice(before + batch, some.stop - batch)
            _score(going, table, None if stamps is None else stamps[some], scores, failed)
        before += len(piece)
    for model in asked:
        if model.name not in failed:
            path = folder.scores_of(model.name) / f"{chunk.name}.parquet"
            with our_disk(folder.path):
                found = np.concatenate(scores.pop(model.name))
                write_scores(path, rows["image_id"], rows["candidate_id"], found, model)
    return failed


def open_models(models: Sequence[Any]) -> None:
    """Open models on their devices in this process; raises `ModelError` for the first that cannot be had."""
    for model in models:
        model.open()


def _read(folder: Any, piece: Piece) -> Any:
    from batchproc.io.stamps import read_stamps_of

    return read_stamps_of(folder, piece.places, piece.parts)


def _score(
    models: Sequence[Any],
    rows: pa.Table,
    stamps: Any,
    scores: Mapping[str, list[NDArray[Any]]],
    failed: dict[str, Failure],
) -> None:
    """Append the scores of some rows to those of each model, or the reason why it has none to the failed ones."""
    import numpy as np

    from batchproc.io.prepared import Prepared

    batch = None if stamps is None else Prepared(stamps)
    for model in models:
        if model.name in failed:
            continue
        names = _features(model)
        features = np.column_stack([rows[name].to_numpy() for name in names]) if names else None
        try:
            found = model.predict(batch if _takes_stamps(model) else None, features, batch=len(rows))
        except Exception as error:
            if is_transient(error):  # of the disk that the model lies on
                raise
            failed[model.name] = Failure(error, traceback.format_exc())
            continue
        scores[model.name].append(np.asarray(found, np.float32))


def _features(model: Any) -> Sequence[str]:
    return tuple(model.card.input.features)


def _takes_stamps(model: Any) -> bool:
    return bool(model.takes_stamps)
