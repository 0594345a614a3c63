"""All examples of a training, from all its sources, and what it would do with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.display import size as bytes_text
from batchproc.errors import UsageError
from batchproc.io.manifest import read_manifest
from batchproc.io.models import find_model, read_card
from batchproc.io.run_folder import RunFolder
from batchproc.report.facts import read_truth
from batchproc.training.examples import Examples
from batchproc.training.injections import Injections, inject_manifest
from batchproc.training.settings import TrainSettings
from batchproc.training.sources import Reading, read_source
from batchproc.training.train import check_examples, part_table, split_anew

__all__ = ["Sources", "describe", "gather", "known_places", "stamp_size"]


@dataclass(frozen=True)
class Sources:
    """Where examples come from.

    Attributes
    ----------
    paths : sequence of path
        Runs, alert packets, stored sets.
    manifests : sequence of path
        Transients are planted in their images.
    injections : Injections
        How.
    """

    paths: Sequence[Path]
    manifests: Sequence[Path]
    injections: Injections

    def missing(self) -> int:
        """Images whose injections are still to be made."""
        entries = [entry for manifest in self.manifests for entry in read_manifest(manifest)]
        return sum(not (self.injections.cache / f"{self.injections.key(entry)}.npz").is_file() for entry in entries)


def gather(sources: Sources, reading: Reading) -> Examples:
    """One set of examples of all sources.

    Raises
    ------
    UsageError
        No source, or one that has nothing labelled.
    """
    if not sources.paths and not sources.manifests:
        raise UsageError(
            "nothing to learn from: name a RUN, alert packets or a stored set (.npz), or --inject MANIFEST"
        )

    def each() -> Iterator[Examples]:
        for path in sources.paths:
            yield read_source(path, reading)
        for manifest in sources.manifests:
            found = inject_manifest(manifest, sources.injections, quiet=reading.quiet, notes=reading.notes)
            yield replace(found, stamps=found.stamps[..., :0, :0]) if reading.size == 0 else found

    return Examples.join(each())


def known_places(paths: Sequence[Path], truth: Path | None) -> dict[str, NDArray[np.float64]]:
    """Image → places (x, y) of the transients that are known in it, of a table or of the runs that have one."""
    runs = [RunFolder(path) for path in paths if RunFolder(path).record.is_file()]
    tables = [read_truth(run, truth) for run in runs or ([RunFolder(Path())] if truth is not None else [])]
    known = [table[["image_id", "x", "y"]] for table in tables if table is not None]
    if not known:
        return {}
    places = pd.concat(known).drop_duplicates().groupby("image_id")
    return {str(name): rows[["x", "y"]].to_numpy(np.float64) for name, rows in places}


def stamp_size(settings: TrainSettings) -> int:
    """Side of the stamps that the model will look at; 0 where it looks at none.

    Raises
    ------
    UsageError
        PyTorch is not installed, or no such network.
    ModelError
        No such base.
    """
    if settings.kind == "forest":
        return 0
    if settings.base:
        return read_card(find_model(settings.base)).input.reach
    from batchproc.training.neural import check_torch, wanted_input

    check_torch()
    return wanted_input(settings).reach


def describe(sources: Sources, reading: Reading, settings: TrainSettings, size: int) -> str:
    """What there is to learn from, its parts, and what would be done; no pixel of a run is read, nothing is computed.

    Raises
    ------
    UsageError
        As of `gather` and `split_anew`.
    """
    missing = sources.missing()
    lines = []
    if missing:
        lines.append(
            f"injections: {missing} images are still to be made ({sources.injections.cache}); not counted below"
        )
    ready = replace(sources, manifests=()) if missing else sources
    if ready.paths or ready.manifests:
        examples = gather(ready, replace(reading, size=0))
        check_examples(examples, settings)
        split = split_anew(examples, settings)
        lines += [_sources(examples), "", part_table(examples.label, split).to_string(), ""]
        lines += [f"note: {note}" for note in (*reading.notes, *split.notes)]
        if size:
            lines.append(f"memory for stamps: {bytes_text(12 * size * size * len(examples))} ({size} × {size} pixels)")
    base = f"continue from {settings.base}" if settings.base else settings.network
    doing = base + f", at most {settings.epochs} epochs" if settings.kind == "network" else settings.kind
    lines.append(f"would train: {doing}")
    return "\n".join(lines)


def _sources(examples: Examples) -> str:
    counts = examples.table.assign(label=examples.label).groupby(["source", "label"]).size().unstack(fill_value=0)
    counts.index.name = counts.columns.name = None
    return str(counts.astype(np.int64).to_string())
