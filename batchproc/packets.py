"""Alert packets, scored: one pass over the packets for all models, one table for all alerts.

>>> summary = score_packets("ztf_public_20200111.tar.gz", ["realbogus", "braai-d6_m7"], "scores.parquet")
... # doctest: +SKIP

What reads packets is in `batchproc.io.alerts`, what a worker does in `batchproc.distribute.alerts`, the table in
`batchproc.io.alert_table`. On the command line this is a verb of its own, ``classify-alerts``, beside ``classify RUN``:
the scores of a run lie in it, and those of packets need a place (``--out``), which a run's must not have.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from batchproc.display import say, show
from batchproc.distribute.alerts import AlertJob, Share, plan_shares, score_share
from batchproc.distribute.clusters import Where, expected_workers, open_executor, watching
from batchproc.distribute.executors import Executor, WorkerDiedError
from batchproc.distribute.persistent import persistent
from batchproc.distribute.scoring import check_here, check_workers, needed_resources, resources_of
from batchproc.distribute.signals import leaving_in_order
from batchproc.errors import ClusterError, ModelError, UsageError
from batchproc.io.alert_table import MEASUREMENTS, join_parts, read_part, table_schema
from batchproc.io.alerts import STAMP_SIZE, find_sources
from batchproc.io.atomic import our_disk, remove, remove_leftovers, write_text
from batchproc.io.lock import one_driver
from batchproc.io.models import Model, load_model

__all__ = ["MEASUREMENTS", "Scored", "score_packets"]

_MB = 1_000_000
_FEW_MB = 32  # that this process scores sooner than workers begin
_LOOK_S = 2.0


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
    cluster: str | Where = "serial",
    workers: int | None = None,
    quiet: bool = False,
) -> Scored:
    """Score alert packets with one or several models, and write a table with a row for each alert.

    Packets are read once for all models, and no more than a chunk of them is held by each worker. Parts of the table
    are written beside `out` (``OUT.parts``), joined when all are there, and then removed: killed before that, the same
    call goes on with what is missing. Until then, whatever has the table's name stays as it was.

    Parameters
    ----------
    source : str or Path
        An ``.avro`` file, a tarball, or a folder of them (`batchproc.io.alerts.read_alerts`).
    models : sequence of str or Path
        Models by name, or their folders; each once.
    out : str or Path
        A ``.parquet`` file: candid (−1 where it could not be read), object_id, survey, `MEASUREMENTS`, drb,
        drb_version, ``score_<model>`` (``score_<model>_<class>`` of models with several classes; NaN: not scored),
        problem (what is wrong with a packet; empty where nothing is), origin. Version, variant, normalisation and hash
        of each model are in the metadata of its columns, and of all under ``models`` in the schema's.
    device, threads
        As for `load_model`.
    cluster : str or Where
        As for `batchproc.run`; with ``"local"``, a few packets are scored in this process.
    workers : int, optional
        Worker processes.
    quiet : bool
        No progress.

    Raises
    ------
    UsageError
        Nothing to read, no model, one of them twice, `out` cannot be what it shall be, or its parts are of other
        models.
    ModelError
        A model that cannot be had, or cannot score alerts.
    StorageError
        The disk refuses the table.
    ClusterError
        Workers died under some of the files, or are gone.
    """
    target, where = Path(out), Where.of(cluster, workers)
    _check_target(target)
    where.check()
    scorers = _loaded(models, device, threads)
    sources = find_sources(Path(source).absolute())  # as workers find them
    shares = list(plan_shares(sources, expected_workers(where, threads)))
    n_bytes = sum(share.n_bytes for share in shares)
    if where.cluster == "local" and workers is None and where.workers is None and n_bytes < _FEW_MB * _MB:
        where = Where("serial")
    if device != "cpu" and where.cluster in ("serial", "local"):
        check_here(scorers)
    with _parts_of(target, scorers) as folder:
        _drop_strangers(folder, shares)
        if missing := [share for share in shares if not _done(folder, share)]:
            offered = resources_of(device)
            with leaving_in_order(), open_executor(where, threads, len(missing), resources=offered) as executor:
                say(watching(where, executor) or "", quiet=quiet or not watching(where, executor))
                if not executor.here and not check_workers(scorers, device, executor):
                    say(
                        f"no worker with device = {device!r} is here yet: that it can be used is not known", quiet=quiet
                    )
                job = AlertJob(str(folder.resolve()), tuple(scorers), threads, executor.here)
                _score(job, missing, executor, _Progress(folder, n_bytes, quiet), needed_resources(device, executor))
        counts = _joined(folder, target, scorers, source)
    return Scored(counts.total(), counts["scored"], counts["not scored"], counts["unreadable"])


def _score(job: AlertJob, shares: Sequence[Share], executor: Executor, progress: _Progress, resources: Any) -> None:
    """Score shares; those under which workers die cost the others nothing, and are told at the end."""
    work = partial(score_share, job, tell=progress.look) if executor.here else partial(score_share, job)
    died = []
    with progress:
        for share, outcome in persistent(executor, work, shares, resources=resources, idle=(progress.look, _LOOK_S)):
            if isinstance(outcome.error, WorkerDiedError):
                died.append(share)
            elif outcome.error is not None:
                raise outcome.error
            else:
                _mark_done(Path(job.folder), share)
                progress.look()
    if died:
        files = [file for share in died for file in share.files]
        raise ClusterError(
            f"{len(files)} files ({files[0]} … {files[-1]}): the worker died each time it worked on them, the others "
            "are scored; the same command again tries them again, with --cluster serial in its own process"
        )


# --- Before anything is read ------------------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    if target.suffix != ".parquet" or target.is_dir():
        raise UsageError(f"{target}: the table is a Parquet file; give it a name that ends in .parquet")
    if not target.parent.is_dir():
        raise UsageError(f"{target}: no such folder as {target.parent}; make it first")


def _loaded(names: Sequence[str | Path], device: str, threads: int) -> list[Model]:
    """The models, each proven to take alerts' stamps."""
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
        if device == "cpu":
            model.predict(np.empty((0, 3, STAMP_SIZE, STAMP_SIZE), np.float32))
    return models


# --- The folder of parts ----------------------------------------------------------------------------------------------

#: In a folder of parts: by which models they are.
_MODELS = "models.json"


@contextmanager
def _parts_of(target: Path, models: Sequence[Model]) -> Iterator[Path]:
    """The folder of a table's parts, for this driver alone: made, or that of an earlier call with the same models."""
    folder = target.with_name(f"{target.name}.parts")
    asked = json.dumps({model.name: [model.fingerprint, model.version] for model in models}, sort_keys=True)
    with our_disk(folder.parent):
        folder.mkdir(exist_ok=True)
        with one_driver(folder, folder / "heartbeat.json"):
            remove_leftovers(folder)
            record = folder / _MODELS
            if not record.is_file():
                write_text(record, asked)
            elif record.read_text() != asked:
                raise UsageError(
                    f"{folder}: has parts of {target} by other models ({', '.join(json.loads(record.read_text()))}; "
                    f"now {', '.join(model.name for model in models)}) or by these with other files or cards; give "
                    "those again, or remove the folder, or choose another --out"
                )
            yield folder


def _drop_strangers(folder: Path, shares: Sequence[Share]) -> None:
    """Remove parts of files that are others now, or gone."""
    known = {share.name for share in shares}
    for path in folder.iterdir():
        if path.suffix in (".parquet", ".done") and path.stem[:_NAME] not in known:
            path.unlink()


_NAME = 24  # characters of a share's name


def _done(folder: Path, share: Share) -> bool:
    return _marker(folder, share).is_file()


def _mark_done(folder: Path, share: Share) -> None:
    """That all parts of a share are there, of which a tarball does not tell how many they are."""
    with our_disk(folder):
        write_text(_marker(folder, share), "")


def _marker(folder: Path, share: Share) -> Path:
    return folder / f"{share.name}-{share.stripe}of{share.stripes}.done"


def _joined(folder: Path, target: Path, models: Sequence[Model], source: str | Path) -> Counter[str]:
    """Join the parts, take their folder away, and count what became of the alerts."""
    parts = sorted(folder.glob("[!.]*.parquet"))
    counts: Counter[str] = Counter()
    for path in parts:
        counts.update(read_part(path).counts)
    if not counts.total():
        remove(folder)
        raise UsageError(f"{source}: no .avro file in it")
    with our_disk(target.parent):
        join_parts(parts, target, table_schema(models))
        remove(folder)
    return counts


class _Progress:
    """What is shown of the parts that appear, whoever writes them."""

    def __init__(self, folder: Path, n_bytes: int, quiet: bool) -> None:
        self.folder, self.counts = folder, Counter[str]()
        self._seen: set[str] = set()
        self._bytes, self._new = 0, 0
        self._before = self._advance() // _MB
        self._total = max(-(-n_bytes // _MB), self._before)
        self._shown = show(
            self._steps(),
            self._total,
            "MB",
            count=lambda n: n,
            note=lambda: f"{self.counts.total()} alerts",
            before=self._before,
            quiet=quiet,
        )

    def look(self) -> None:
        """Count the parts that are new."""
        before = self._bytes // _MB
        self._new = self._advance() // _MB - before
        if self._new:
            next(self._shown)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._new = self._total - self._bytes // _MB
        if kind is None and self._new > 0:  # the ends of tarballs are not read
            next(self._shown)
        self._shown.close()  # type: ignore[attr-defined]

    def _steps(self) -> Iterator[int]:
        while True:
            yield self._new

    def _advance(self) -> int:
        for path in self.folder.glob("[!.]*.parquet"):
            if path.name not in self._seen:
                self._seen.add(path.name)
                part = read_part(path)
                self.counts.update(part.counts)
                self._bytes += part.n_bytes
        return self._bytes
