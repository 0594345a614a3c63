"""Examples from images whose truth nobody knows: transients are planted in them, and the pipeline finds what it finds.

What was planted and found is real; all else that was found is bogus, but for places where something real may have
changed. Each image's examples are kept in a folder, so that they are made once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc import __version__
from batchproc.config import Config
from batchproc.display import say, show
from batchproc.errors import ExposureError, UsageError
from batchproc.io.images import read_new, read_refs
from batchproc.io.manifest import read_manifest
from batchproc.io.markers import entry_digest, input_digest
from batchproc.records import ManifestEntry
from batchproc.training.cases import Case, unpaired_sources
from batchproc.training.examples import Examples
from batchproc.training.harvest import harvest
from batchproc.training.planting import plant

__all__ = ["LOW_THRESHOLD", "Injections", "inject_manifest"]

#: Lower than that of a survey: there are more artefacts to learn from. In sigma; where no settings are given.
LOW_THRESHOLD = 3.75
#: Artefacts that are mere noise: at most so many an image.
_MOST_NOISE = 150


@dataclass(frozen=True)
class Injections:
    """How transients are planted.

    Attributes
    ----------
    cache : Path
        Folder of what was made; made where it is missing.
    config : Config
        Of the pipeline.
    per_image : int
        Transients that are tried to be planted in each.
    most : int
        Artefacts of an image at most, drawn at random; those that are but noise, at most 150 of them.
    seed : int
    known : mapping
        ``image_id`` → places (x, y) where something has changed that is known: neither real nor bogus here.
    """

    cache: Path
    config: Config = field(default_factory=lambda: Config.from_dict({"detect": {"threshold": LOW_THRESHOLD}}))
    per_image: int = 100
    most: int = 500
    seed: int = 0
    known: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def known_in(self, entry: ManifestEntry) -> NDArray[np.float64]:
        """Places ``(k, 2)`` in one image."""
        return np.asarray(self.known.get(entry.image_id, np.zeros((0, 2))))

    def random_of(self, entry: ManifestEntry) -> np.random.Generator:
        """Of one image: by its name, so that it does not matter which rows of the manifest stand before it."""
        name = hashlib.sha256(entry.image_id.encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(name[:8], "big")])

    def key(self, entry: ManifestEntry) -> str:
        """Tells apart whatever gives other examples."""
        told = [
            __version__,
            entry_digest(entry),
            input_digest(entry),
            self.config.image_digest,
            self.per_image,
            self.most,
            self.seed,
        ]
        told += self.known_in(entry).round(1).tolist()
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]


def inject_manifest(
    manifest: str | Path, how: Injections, *, quiet: bool = False, notes: list[str] | None = None
) -> Examples:
    """Examples of all images of a manifest, from the folder where they are there already.

    Images that cannot be processed are left out; why is said, and added to `notes`.

    Raises
    ------
    UsageError
        No image could be used.
    ManifestError
        As of `read_manifest`.
    """
    entries = read_manifest(manifest)
    how.cache.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    whole = Examples.join(_each(show(entries, len(entries), "images", quiet=quiet), how, failed, quiet))
    if not len(whole):
        raise UsageError(f"{manifest}: none of {len(entries)} images could be used: {failed[0]}")
    if notes is not None:
        notes += [f"{manifest}: {len(failed)} of {len(entries)} images were left out: {failed[0]}"] if failed else []
    whole.table["source"] = f"{manifest} (injected)"
    return whole


def _each(entries: Iterator[ManifestEntry], how: Injections, failed: list[str], quiet: bool) -> Iterator[Examples]:
    size = how.config.cutouts.size
    yield Examples(np.zeros((0, 3, size, size), np.float32), np.zeros(0, np.str_), pd.DataFrame())
    for entry in entries:
        path = how.cache / f"{how.key(entry)}.npz"
        try:
            if not path.is_file():
                _planted(entry, how).save(path)
        except ExposureError as error:
            failed.append(f"{entry.image_id}: {error}")
            say(f"left out: {failed[-1]}", quiet=quiet)
            continue
        yield Examples.load(path)


def _planted(entry: ManifestEntry, how: Injections) -> Examples:
    """Plant, run, label. With several references, what has vanished is planted into the first."""
    random = how.random_of(entry)
    new, refs = read_new(entry), read_refs(entry)
    if new.wcs is None or refs[0].wcs is None:
        raise ExposureError("no WCS: it is not known where in the reference to plant", image_id=entry.image_id)

    def to_ref(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
        found = refs[0].wcs.all_world2pix(*new.wcs.all_pix2world(x, y, 0), 0, quiet=True)
        return found[0], found[1]

    doubtful = np.concatenate([unpaired_sources(new, refs[0], to_ref), how.known_in(entry)])
    new, ref, truth = plant(new, refs[0], to_ref, random, n=how.per_image)
    case = Case(entry.image_id, entry.image_id, new, (ref, *refs[1:]), truth, doubtful)
    return harvest(case, how.config, noise=_MOST_NOISE, most=how.most, seed=how.seed)
