"""Alert packets, scored: one pass over the packets for all models, one table for all alerts.

>>> summary = score_packets("ztf_public_20200111.tar.gz", ["realbogus", "braai-d6_m7"], "scores.parquet")
... # doctest: +SKIP

What reads packets is in `batchproc.io.alerts`, what scores stamps in `batchproc.io.models`. On the command line this is
a verb of its own, ``classify-alerts``, beside ``classify RUN``: the two have nothing but ``--model`` in common. The
scores of a run lie in it, are shared out among workers and gone on with; packets are read once, in this process, and
their scores need a place (``--out``), which a run's must not have.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchproc.display import show
from batchproc.errors import ModelError, UsageError
from batchproc.io.alerts import STAMP_SIZE, Alerts, read_alerts, source_size
from batchproc.io.atomic import our_disk, replacing
from batchproc.io.catalogue import PARQUET
from batchproc.io.models import Model, load_model

__all__ = ["MEASUREMENTS", "Scored", "score_packets"]

#: What the table takes of ``Alerts.candidate``, under ZTF's names: type, unit, meaning.
MEASUREMENTS = {
    "jd": (pa.float64(), "d", "Julian date of the middle of the exposure"),
    "fid": (pa.int32(), "", "filter: 1 g, 2 r, 3 i"),
    "field": (pa.int32(), "", "field of the survey"),
    "rcid": (pa.int32(), "", "readout channel, 0 to 63"),
    "ra": (pa.float64(), "deg", "right ascension, J2000"),
    "dec": (pa.float64(), "deg", "declination, J2000"),
    "magpsf": (pa.float32(), "mag", "magnitude by the PSF"),
    "sigmapsf": (pa.float32(), "mag", "its error"),
    "isdiffpos": (pa.string(), "", "t or 1: brighter than the reference; f or 0: fainter"),
    "fwhm": (pa.float32(), "pix", "full width at half maximum"),
    "rb": (pa.float32(), "", "score of ZTF's random forest"),
}
#: Alerts that are held at a time: 12 MB of stamps. More are not faster.
_CHUNK = 256
#: Rows that wait for their row group, without stamps: some MB.
_ROW_GROUP = 1 << 16
_MB = 1_000_000


@dataclass(frozen=True)
class Scored:
    """What came of a source of alerts.

    Attributes
    ----------
    alerts : int
        Rows of the table.
    scored : int
        Alerts with a score of every model.
    not_scored : int
        Alerts that were read and lack the score of one model or more.
    unreadable : int
        Packets, or tarballs that break off, of which nothing could be read.
    """

    alerts: int
    scored: int
    not_scored: int
    unreadable: int

    @property
    def exit_code(self) -> int:
        """0: all scored; 1: not all."""
        return int(self.scored < self.alerts)

    def text(self) -> str:
        """In a line."""
        return f"{self.alerts} alerts: {self.scored} scored, {self.not_scored} not scored, {self.unreadable} unreadable"


def score_packets(
    source: str | Path,
    models: Sequence[str | Path],
    out: str | Path,
    *,
    device: str = "cpu",
    threads: int = 1,
    quiet: bool = False,
) -> Scored:
    """Score alert packets with one or several models, and write a table with a row for each alert.

    Packets are read once, and no more than a chunk of them is held. The table takes its name when it is complete;
    until then, whatever has that name stays as it was.

    Parameters
    ----------
    source : str or Path
        An ``.avro`` file, a folder of them, or a tarball (`read_alerts`).
    models : sequence of str or Path
        Models by name, or their folders; each once.
    out : str or Path
        A ``.parquet`` file: candid (−1 where it could not be read), object_id, drb, drb_version, `MEASUREMENTS`,
        ``score_<model>`` (``score_<model>_<class>`` of models with several classes; NaN: not scored), problem (what is
        wrong with a packet; empty where nothing is), origin. Version, variant, normalisation and hash of each model
        are in the metadata of its columns, and of all under ``models`` in the schema's.
    device, threads
        As for `load_model`.
    quiet : bool
        No progress.

    Raises
    ------
    UsageError
        Nothing to read, no model, one of them twice, or `out` cannot be what it shall be.
    ModelError
        A model that cannot be had, or cannot score alerts.
    StorageError
        The disk refuses the table.
    """
    target = Path(out)
    _check_target(target)
    scorers = _loaded(models, device, threads)
    schema = _schema(scorers)
    total = -(-source_size(source) // _MB)
    counts: Counter[str] = Counter()

    def tables() -> Iterator[tuple[pa.Table, int]]:
        for alerts, n_mb in _steps(read_alerts(source, chunk=_CHUNK)):
            scores = [_by_class(model, model.predict(alerts.stamps)) for model in scorers]
            counts.update(_outcomes(alerts, scores))
            yield _table(alerts, scores, schema), n_mb

    def note() -> str:
        return f"{counts.total()} alerts"

    with our_disk(target.parent), replacing(target) as temporary, _writer(temporary, schema) as rows:
        for table, _ in show(tables(), total, "MB", count=lambda item: item[1], note=note, quiet=quiet):
            rows.append(table)
    return Scored(counts.total(), counts["scored"], counts["not scored"], counts["unreadable"])


# --- Before anything is read ------------------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    if target.suffix != ".parquet" or target.is_dir():
        raise UsageError(f"{target}: the table is a Parquet file; give it a name that ends in .parquet")
    if not target.parent.is_dir():
        raise UsageError(f"{target}: no such folder as {target.parent}; make it first")


def _loaded(names: Sequence[str | Path], device: str, threads: int) -> list[Model]:
    """The models, each proven to take alerts' stamps and to run where it shall."""
    if not names:
        raise UsageError("no model to score with; batchproc models list says which there are")
    models = [load_model(name, threads, device=device) for name in names]
    twice = [name for name, n in Counter(model.name for model in models).items() if n > 1]
    if twice:
        raise UsageError(f"two models of the name {', '.join(twice)}: their scores would be one column; name each once")
    for model in models:
        if model.card.input.features:
            raise ModelError(
                f"model {model.name} needs the features {', '.join(model.card.input.features)}, and alert packets have "
                "none of batchproc's catalogue; take a model of stamps alone"
            )
        model.predict(np.empty((0, 3, STAMP_SIZE, STAMP_SIZE), np.float32))
    return models


# --- The table --------------------------------------------------------------------------------------------------------


def _columns(model: Model) -> list[str]:
    """Names of a model's columns, as `open_catalogue` has them."""
    if len(model.classes) == 1:
        return [f"score_{model.name}"]
    return [f"score_{model.name}_{name}" for name in model.classes]


def _schema(models: Sequence[Model]) -> pa.Schema:
    about = {
        model.name: {
            "model": model.name,
            "version": str(model.version),
            "variant": model.variant,
            "normalisation": str(model.normalisation),
            "hash": model.hash,
        }
        for model in models
    }
    fields = [
        _field("candid", pa.int64(), "", "the alert; -1: could not be read"),
        _field("object_id", pa.string(), "", "its object"),
        *(_field(name, kind, unit, meaning) for name, (kind, unit, meaning) in MEASUREMENTS.items()),
        _field("drb", pa.float64(), "", "score in the packet; NaN: none"),
        _field("drb_version", pa.string(), "", "which network that was"),
    ]
    for model in models:
        more = about[model.name]
        fields += [_field(name, pa.float32(), "", "score; NaN: not scored", more) for name in _columns(model)]
    fields += [
        _field("problem", pa.string(), "", "what is wrong with the packet"),
        _field("origin", pa.string(), "", "its file"),
    ]
    return pa.schema(fields, {"models": json.dumps(about)})


def _field(name: str, kind: pa.DataType, unit: str, meaning: str, more: dict[str, str] | None = None) -> pa.Field:
    return pa.field(name, kind, metadata={"unit": unit, "meaning": meaning, **(more or {})})


def _table(alerts: Alerts, scores: Sequence[NDArray[np.float32]], schema: pa.Schema) -> pa.Table:
    columns: dict[str, Any] = {
        "candid": alerts.candid,
        "object_id": alerts.object_id,
        "drb": alerts.drb,
        "drb_version": alerts.drb_version,
        "problem": alerts.problems,
        "origin": alerts.origin,
    }
    for name, (kind, _, _) in MEASUREMENTS.items():
        columns[name] = [_value(candidate.get(name), kind) for candidate in alerts.candidate]
    by_column = iter(np.concatenate(scores, axis=1).T)
    names = [name for name in schema.names if name.startswith("score_")]
    columns |= dict(zip(names, by_column, strict=True))
    return pa.table([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema)


def _value(value: Any, kind: pa.DataType) -> Any:
    """What a packet says, where it is of the right type; null otherwise."""
    if isinstance(value, bool):
        return None
    if kind == pa.string():
        return value if isinstance(value, str) else None
    if kind == pa.int32():
        return value if isinstance(value, int) and abs(value) < 2**31 else None
    return float(value) if isinstance(value, int | float) else None


def _by_class(model: Model, scores: NDArray[np.float32]) -> NDArray[np.float32]:
    return scores.reshape(len(scores), len(model.classes))


def _outcomes(alerts: Alerts, scores: Sequence[NDArray[np.float32]]) -> Iterator[str]:
    """A word for each alert."""
    complete = np.all([np.isfinite(found).all(axis=1) for found in scores], axis=0)
    for i, scored in enumerate(complete):
        yield "unreadable" if alerts.candid[i] == -1 else "scored" if scored else "not scored"


class _Rows:
    """Tables on their way into a file, written in row groups of a useful size."""

    def __init__(self, file: pq.ParquetWriter) -> None:
        self.file, self.n = file, 0
        self.waiting: list[pa.Table] = []

    def append(self, table: pa.Table) -> None:
        """Take a table, to be written now or with later ones."""
        self.waiting.append(table)
        self.n += len(table)
        if self.n >= _ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self.waiting:
            self.file.write_table(pa.concat_tables(self.waiting), row_group_size=self.n)
        self.waiting, self.n = [], 0


@contextmanager
def _writer(path: Path, schema: pa.Schema) -> Iterator[_Rows]:
    with pq.ParquetWriter(path, schema, **PARQUET) as file:
        rows = _Rows(file)
        yield rows
        rows.flush()


def _steps(chunks: Iterator[Alerts]) -> Iterator[tuple[Alerts, int]]:
    """Each chunk, and the megabytes of the source that it took, which add up to whole ones."""
    before = 0
    for alerts in chunks:
        now = -(-alerts.n_bytes // _MB)
        yield alerts, now - before
        before = now
