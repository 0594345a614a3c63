"""The folder of one run: what lies where, and what is frozen in it before the first task.

::

    RUN/
      manifest.parquet  config.toml  fftw_wisdom    frozen: the entries, the effective settings, FFTW's plans
      run.json                                      their digests, software, model; written after them
      next/                                         a change of these that is being carried out
      catalogue/IMAGE.parquet                       one part an image: its rows (`batchproc.io.catalogue`)
      stamps/IMAGE.zarr                             one store an image: its stamps (`batchproc.io.stamps`)
      done/IMAGE.json                               its done-marker, written last (`batchproc.io.markers`)
      log/  receipts.parquet  failures.parquet      what the tasks said (`batchproc.io.progress`)
      scores/MODEL/*.parquet                        one part a chunk of stamps (`batchproc.io.catalogue`)
      report.html

Several processes write here at once, each only what it owns (the image's name is in the path). One driver at a time
has the folder: see `RunFolder.locked`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import batchproc
from batchproc.config import Config
from batchproc.errors import RunMismatchError, UsageError
from batchproc.io.atomic import part_name, remove_leftovers, write_text
from batchproc.io.lock import one_driver
from batchproc.io.manifest import read_manifest
from batchproc.records import ManifestEntry

__all__ = ["RunFolder"]


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
        if not folder.begun:
            raise UsageError(f"{path}: not a run folder (no run.json in it); `batchproc run MANIFEST --out {path}`")
        return folder

    @property
    def begun(self) -> bool:
        """Whether there is a run in it."""
        return self.record.is_file()

    @property
    def record(self) -> Path:
        """``run.json``."""
        return self.path / "run.json"

    @property
    def manifest(self) -> Path:
        """``manifest.parquet``."""
        return self.path / "manifest.parquet"

    @property
    def submission(self) -> Path:
        """``log/submission.json``: the job that drives the run, where it was submitted; see `batchproc.submit`."""
        return self.log / "submission.json"

    @property
    def config_file(self) -> Path:
        """``config.toml``."""
        return self.path / "config.toml"

    @property
    def wisdom_file(self) -> Path:
        """``fftw_wisdom``."""
        return self.path / "fftw_wisdom"

    @property
    def next(self) -> Path:
        """``next/``: what will be frozen, while a change is carried out (`batchproc.io.freeze`)."""
        return self.path / "next"

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

    def pack_catalogue(self, pack: str) -> Path:
        """Rows of the images of a pack."""
        return self.catalogue / f"{pack}.parquet"

    def pack_stamps(self, pack: str) -> Path:
        """Their stamps; absent where none of them has candidates."""
        return self.stamps / f"{pack}.zarr"

    def pack_marker(self, pack: str) -> Path:
        """Their done-markers."""
        return self.done / f"{pack}.parquet"

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

    def entry_digests(self) -> dict[str, str]:
        """Image id → `batchproc.io.manifest.entry_digest` of its row, in the manifest's order."""
        table = pq.read_table(self.manifest, columns=["image_id", "entry_digest"])
        return dict(zip(table["image_id"].to_pylist(), table["entry_digest"].to_pylist(), strict=True))

    def identity(self) -> str:
        """Tells the run from any other, also from one that had this path before it."""
        record = self.read_record()
        return f"{record['config_digest']}-{record['id']}"

    def config_digest(self) -> str:
        """`Config.digest` of the settings of the run."""
        return str(self.read_record()["config_digest"])

    def image_digest(self) -> str:
        """`Config.image_digest` of the settings of the run."""
        return str(self.read_record()["image_digest"])

    def version(self) -> str:
        """The version of batchproc that began the run."""
        return str(self.read_record()["version"])

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

    def check_version(self) -> None:
        """Raise `RunMismatchError` where another version of batchproc began the run: a run is all of one kind.

        So is one whose settings are about to change.
        """
        version = self.version()
        if version != batchproc.__version__:
            raise RunMismatchError(
                f"{self.path} was begun with batchproc {version}, this is {batchproc.__version__}, which may give "
                f"other values; begin a new run with another --out, or go on with this one under batchproc {version}"
            )
        if self.next.is_dir():
            raise RunMismatchError(
                f"{self.path}: a change of its images or settings was accepted and stopped half way; first give the "
                f"command again that made it (`batchproc run MANIFEST --out {self.path} --redo`)"
            )

    def read_record(self) -> dict[str, Any]:
        """What ``run.json`` says: digests of what is frozen, software, model; see `batchproc.io.freeze`.

        Raises
        ------
        UsageError
            It is not what was written.
        """
        try:
            record = json.loads(self.record.read_text())
            digest = record.pop("digest", None)
            another = digest is None and record["version"] != batchproc.__version__  # up to 0.2 without a digest
        except (ValueError, AttributeError, KeyError) as error:
            problem = f"is damaged ({type(error).__name__}: {error})"
            raise UsageError(f"{self.record}: {problem}; `batchproc verify {self.path}` says more") from error
        if digest != _digest(record) and not another:
            raise UsageError(f"{self.record}: has been altered; `batchproc verify {self.path}` says more")
        return dict(record)

    def models(self) -> dict[str, str]:
        """Name → hash of the models that the run scores with, as ``run.json`` has them."""
        record = self.read_record()
        if "models" in record:
            return dict(record["models"])
        model = record.get("model")  # as it was when a run had one
        return {model["name"]: model["hash"]} if model else {}

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write ``run.json``: the last of the frozen files, by which a run is one."""
        write_text(self.record, json.dumps({**record, "digest": _digest(record)}, indent=2) + "\n")


def _digest(record: Mapping[str, Any]) -> str:
    return sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]
