"""The folder of one run: what lies where, and what is frozen in it before the first task.

::

    RUN/
      manifest.parquet  config.toml  fftw_wisdom    frozen: the entries, the effective settings, FFTW's plans
      run.json                                      their digests and the version; written after them
      catalogue/IMAGE.parquet                       one part an image: its rows (`batchproc.io.catalogue`)
      stamps/IMAGE.zarr                             one store an image: its stamps (`batchproc.io.stamps`)
      done/IMAGE.json                               its done-marker, written last (`batchproc.io.progress`)
      log/  receipts.parquet  failures.parquet      what the tasks said (`batchproc.io.progress`)
      scores/MODEL/*.parquet                        one part a chunk of stamps (`batchproc.io.catalogue`)
      report.html

Several processes write here at once, each only what it owns (the image's name is in the path). One driver at a time
has the folder: see `RunFolder.locked`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import batchproc
from batchproc.config import Config
from batchproc.errors import RunMismatchError, UsageError
from batchproc.io.atomic import part_name, remove_leftovers, replacing, write_text
from batchproc.io.lock import one_driver
from batchproc.io.manifest import manifest_digest, read_manifest, write_manifest
from batchproc.records import ManifestEntry

__all__ = ["RunFolder"]

_SHOWN = 5  # differences named in an error


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder, and its frozen part.

    >>> RunFolder(Path("/data/run")).catalogue_part("ztf 1")
    PosixPath('/data/run/catalogue/ztf%201.parquet')
    """

    path: Path

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The folder of a run that has been begun; raises `UsageError` where there is none."""
        folder = cls(Path(path))
        if not folder.record.is_file():
            raise UsageError(f"{path}: not a run folder (no run.json in it); `batchproc run MANIFEST --out {path}`")
        return folder

    @property
    def record(self) -> Path:
        """``run.json``."""
        return self.path / "run.json"

    @property
    def manifest(self) -> Path:
        """``manifest.parquet``."""
        return self.path / "manifest.parquet"

    @property
    def config_file(self) -> Path:
        """``config.toml``."""
        return self.path / "config.toml"

    @property
    def wisdom_file(self) -> Path:
        """``fftw_wisdom``."""
        return self.path / "fftw_wisdom"

    @property
    def catalogue(self) -> Path:
        """``catalogue/``."""
        return self.path / "catalogue"

    @property
    def stamps(self) -> Path:
        """``stamps/``."""
        return self.path / "stamps"

    @property
    def done(self) -> Path:
        """``done/``."""
        return self.path / "done"

    @property
    def log(self) -> Path:
        """``log/``."""
        return self.path / "log"

    @property
    def receipts(self) -> Path:
        """``receipts.parquet``."""
        return self.path / "receipts.parquet"

    @property
    def failures(self) -> Path:
        """``failures.parquet``."""
        return self.path / "failures.parquet"

    @property
    def scores(self) -> Path:
        """``scores/``."""
        return self.path / "scores"

    def scores_of(self, model: str) -> Path:
        """Scores of one model."""
        return self.scores / part_name(model)

    def catalogue_part(self, image_id: str) -> Path:
        """Rows of one image."""
        return self.catalogue / f"{part_name(image_id)}.parquet"

    def stamps_part(self, image_id: str) -> Path:
        """Stamps of one image; absent where it has no candidates."""
        return self.stamps / f"{part_name(image_id)}.zarr"

    def marker(self, image_id: str) -> Path:
        """Done-marker of one image."""
        return self.done / f"{part_name(image_id)}.json"

    def config(self) -> Config:
        """The settings of the run."""
        return Config.from_toml(self.config_file)

    def entries(self) -> list[ManifestEntry]:
        """The images of the run, in the manifest's order."""
        return read_manifest(self.manifest)

    def image_ids(self) -> list[str]:
        """Ids of the images of the run, in the manifest's order."""
        ids: list[str] = pq.read_table(self.manifest, columns=["image_id"])["image_id"].to_pylist()
        return ids

    def identity(self) -> str:
        """Tells the run from any other, also from one that had this path before it."""
        record = self._read_record()
        return f"{record['config_digest']}-{record.get('id', record['begun'])}"

    def config_digest(self) -> str:
        """`Config.digest` of the settings that the run was begun with."""
        return str(self._read_record()["config_digest"])

    def version(self) -> str:
        """The version of batchproc that began the run."""
        return str(self._read_record()["version"])

    def freeze(self, entries: Sequence[ManifestEntry], config: Config, wisdom: Callable[[], str]) -> None:
        """Begin a run, or make sure that this is a continuation of the run that was begun.

        Parameters
        ----------
        entries : sequence of ManifestEntry
        config : Config
        wisdom : callable
            Returns FFTW's wisdom as text; called once in the life of the run.

        Raises
        ------
        RunMismatchError
            The folder was begun with other images, settings or another batchproc; the message shows which.
        UsageError
            The folder holds something else.
        """
        if self.record.is_file():
            self.check(entries, config)
        else:
            self._begin(entries, config, wisdom)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Have the folder to oneself as a driver; leftovers of killed tasks are removed.

        Raises
        ------
        UsageError
            Another driver has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with one_driver(self.path, self.log / "heartbeat.json"):
            for folder in (self.path, self.catalogue, self.stamps, self.done, self.log, *self.scores.glob("*/")):
                remove_leftovers(folder)
            yield

    def _begin(self, entries: Sequence[ManifestEntry], config: Config, wisdom: Callable[[], str]) -> None:
        strangers = [p.name for p in self.path.iterdir() if p.name not in _OWN] if self.path.is_dir() else []
        if strangers:
            raise UsageError(
                f"{self.path}: holds {strangers[0]!r} and is no run folder; choose an empty or new folder for --out"
            )
        for folder in (self.path, self.catalogue, self.stamps, self.done, self.log):
            folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.manifest) as temporary:
            write_manifest(list(entries), temporary)
        write_text(self.config_file, config.to_toml())
        write_text(self.wisdom_file, wisdom())
        record = {
            "id": uuid.uuid4().hex,
            "version": batchproc.__version__,
            "begun": datetime.now(UTC).isoformat(timespec="seconds"),
            "n_images": len(entries),
            "manifest_digest": manifest_digest(entries),
            "config_digest": config.digest,
        }
        write_text(self.record, json.dumps(record, indent=2) + "\n")

    def check(self, entries: Sequence[ManifestEntry], config: Config) -> None:
        """Raise `RunMismatchError` where the run was begun with other images, settings or another batchproc."""
        self.check_version()
        record = self._read_record()
        if config.digest != record["config_digest"]:
            changes = _config_changes(self.config(), config)
            raise RunMismatchError(
                f"{self.path} was begun with other settings: {_some(changes)}; use {self.config_file} again, "
                "or another --out"
            )
        if manifest_digest(entries) != record["manifest_digest"]:
            changes = _manifest_changes(self.entries(), entries)
            raise RunMismatchError(
                f"{self.path} was begun with other images: {_some(changes)}; use {self.manifest} again, "
                "or another --out"
            )

    def check_version(self) -> None:
        """Raise `RunMismatchError` where another version of batchproc began the run: a run is all of one kind."""
        version = self.version()
        if version != batchproc.__version__:
            raise RunMismatchError(
                f"{self.path} was begun with batchproc {version}, this is {batchproc.__version__}, which may give "
                f"other values; begin a new run with another --out, or go on with this one under batchproc {version}"
            )

    def _read_record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.record.read_text())
        return record


#: What a run folder may hold before `run.json` is in it (a driver was killed while it froze the run).
#: The demo keeps its simulated night in there too, and anyone may put a truth table beside the catalogue.
_OWN = {".lock", "manifest.parquet", "config.toml", "fftw_wisdom", "catalogue", "stamps", "done", "log"}
_OWN |= {"night", "truth.parquet"}


def _config_changes(old: Config, new: Config) -> list[str]:
    before, after = _flat(old.to_dict()), _flat(new.to_dict())
    return [f"{key} was {before[key]!r}, now {after[key]!r}" for key in before if before[key] != after[key]]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _manifest_changes(old: Sequence[ManifestEntry], new: Sequence[ManifestEntry]) -> list[str]:
    before, after = ({entry.image_id: entry for entry in entries} for entries in (old, new))
    changes = [f"{name} is gone" for name in before if name not in after]
    changes += [f"{name} is new" for name in after if name not in before]
    for name in before.keys() & after.keys():
        was, now = vars(before[name]), vars(after[name])
        changes += [f"{name}: {key} was {was[key]!r}, now {now[key]!r}" for key in was if was[key] != now[key]]
    return sorted(changes)


def _some(changes: list[str]) -> str:
    more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return "; ".join(changes[:_SHOWN]) + more
