"""What a run is begun with, and what becomes of it when it is continued with something else.

A run is frozen before its first task: `freeze` writes ``manifest.parquet``, ``config.toml``, ``fftw_wisdom``, and then
``run.json`` with their digests. Who continues it with other images or settings is refused and shown the difference,
unless he has said that he means it: ``extend`` takes new images in, ``redo`` makes the run what is asked for now. What
a run has computed carries the digests of its settings and of its manifest row, so a change costs the images that it
concerns and no others.

A change is carried out so that a driver may be killed at any moment. What will be frozen is first written to ``next/``
and appears there whole: from then on the change is accepted. Then the results that it makes wrong are forgotten, the
frozen files take their places, ``run.json`` last, and ``next/`` goes. Before it appeared the run is the old one;
afterwards the next driver completes it (`complete_change`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import batchproc
from batchproc.config import Config
from batchproc.errors import ManifestError, RunMismatchError, UsageError
from batchproc.io.atomic import our_disk, remove, rename, replacing, write_text
from batchproc.io.catalogue import forget_scores
from batchproc.io.index import iter_done, iter_markers
from batchproc.io.manifest import entry_digest, manifest_digest, write_manifest
from batchproc.io.markers import file_digest, software
from batchproc.io.packs import forget
from batchproc.io.run_folder import RunFolder
from batchproc.records import ManifestEntry

__all__ = ["Changes", "check", "complete_change", "drop_strange", "find_changes", "freeze"]

_SHOWN = 5  # differences named in an error


@dataclass(frozen=True)
class Changes:
    """How what is asked of a run differs from what it was begun with.

    Attributes
    ----------
    settings : tuple of str
        A line each: settings, the version of batchproc, the model.
    new, gone, changed : tuple of str
        Image ids: only in the manifest now, only in the frozen one, in both with different rows.
    details : tuple of str
        What changed in the first few of `changed`.
    again : frozenset of str
        Images of both whose results do not hold any more: `changed`, or all of them for other settings.
    done_again, done_gone : int
        How many images of `again` and of `gone` are done.
    """

    settings: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    again: frozenset[str] = frozenset()
    done_again: int = 0
    done_gone: int = 0

    def __bool__(self) -> bool:
        return bool(self.settings or self.new or self.gone or self.changed)

    @property
    def only_new(self) -> bool:
        """Whether nothing changes but that images are added."""
        return bool(self.new) and not (self.settings or self.gone or self.changed)

    def differences(self) -> str:
        """The first few of all differences, and the number of the others."""
        shown = [*self.settings[:_SHOWN], *self.details[:_SHOWN]]
        shown += [f"{name} is gone" for name in self.gone[:_SHOWN]]
        shown += [f"{name} is new" for name in self.new[:_SHOWN]]
        more = len(self.settings) + len(self.changed) + len(self.gone) + len(self.new) - len(shown)
        return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")

    def consequences(self) -> str:
        """What accepting them does, in numbers."""
        told = [f"{_images(len(self.new), 'new ')} to do"] if self.new else []
        if self.again:
            told.append(
                f"{_images(len(self.again))} to do again, of which {self.done_again} {_are(self.done_again)} done"
            )
        if self.gone:
            told.append(
                f"{_images(len(self.gone))} no longer in the manifest, the results of {self.done_gone} of them deleted"
            )
        return "; ".join(told) or "no image is done again, all candidates are scored again"


def freeze(
    folder: RunFolder,
    entries: Sequence[ManifestEntry],
    config: Config,
    wisdom: Callable[[], str],
    *,
    models: Sequence[Any] = (),
    extend: bool = False,
    redo: bool = False,
) -> Changes:
    """Begin a run, or make sure that this is a continuation of the run that was begun, or change it.

    Parameters
    ----------
    folder : RunFolder
        Locked.
    entries : sequence of ManifestEntry
    config : Config
    wisdom : callable
        Returns FFTW's wisdom as text; called once in the life of the run.
    models : sequence of Model
        What the run scores with: their names and hashes.
    extend : bool
        Accept new images.
    redo : bool
        Accept any change: what it concerns is forgotten, and missing from now on.

    Returns
    -------
    Changes
        What has been changed; nothing in a plain continuation.

    Raises
    ------
    RunMismatchError
        The folder was begun with other images, settings or another batchproc, and that was not accepted; the message
        shows which, and what accepting it would do.
    UsageError
        The folder holds something else.
    StorageError
        The disk does not take it.
    """
    with our_disk(folder.path):
        if not folder.record.is_file():
            _begin(folder, entries, config, wisdom, models, redo)
            return Changes()
        complete_change(folder)
        found = check(folder, entries, config, models=models, extend=extend, redo=redo)
        if found:
            _keep_wisdom(folder, wisdom)
            _change(folder, entries, config, models)
        else:
            _mend(folder, entries, config, wisdom)
        return found


def check(
    folder: RunFolder,
    entries: Sequence[ManifestEntry],
    config: Config,
    *,
    models: Sequence[Any] = (),
    extend: bool = False,
    redo: bool = False,
) -> Changes:
    """How a run would change; raises `RunMismatchError` where that is not accepted. Writes nothing."""
    found = find_changes(folder, entries, config, models)
    if found.gone and len(found.gone) == len(folder.image_ids()):
        raise RunMismatchError(
            f"{folder.path} was begun with other images: none of its {len(found.gone)} is in this manifest, which "
            "would delete all its results; choose another --out"
        )
    if not found or redo or (extend and found.only_new):
        return found
    flag = "--extend" if found.only_new else "--redo"
    what = " and ".join(
        word
        for word, there in (("images", found.new or found.gone or found.changed), ("settings", found.settings))
        if there
    )
    raise RunMismatchError(
        f"{folder.path} was begun with other {what}: {found.differences()}. "
        f"{'--extend only adds images; ' if extend else ''}{flag} accepts that: {found.consequences()}. "
        f"Or use {folder.manifest} and {folder.config_file} again, or another --out"
    )


def find_changes(
    folder: RunFolder, entries: Sequence[ManifestEntry], config: Config, models: Sequence[Any] = ()
) -> Changes:
    """How what is asked for differs from what a run was begun with, and how many done images that concerns."""
    record = folder.read_record()
    settings = _settings_changes(folder, record, config, models)
    new: list[str] = []
    gone: list[str] = []
    changed: list[str] = []
    if manifest_digest(entries) != record["manifest_digest"]:
        before, now = folder.entry_digests(), {entry.image_id: entry_digest(entry) for entry in entries}
        new = [name for name in now if name not in before]
        gone = [name for name in before if name not in now]
        changed = [name for name in now if before.get(name, now[name]) != now[name]]
    same = (record.get("image_digest"), record["version"]) == (config.image_digest, batchproc.__version__)
    again = {*changed} if same else {*folder.image_ids()} - {*gone}
    dropped = {*gone}
    done_again = done_gone = 0
    if again or dropped:
        for done in iter_done(folder):
            done_again += done.image_id in again
            done_gone += done.image_id in dropped
    return Changes(
        settings=tuple(settings),
        new=tuple(new),
        gone=tuple(gone),
        changed=tuple(changed),
        details=tuple(_details(folder, entries, changed[:_SHOWN])),
        again=frozenset(again),
        done_again=done_again,
        done_gone=done_gone,
    )


def complete_change(folder: RunFolder) -> None:
    """Carry out a change that was accepted, from where a killed driver left it; without one, do nothing.

    Results that the change makes wrong are forgotten first, so that whoever reads the run never sees them under the new
    settings.
    """
    coming = RunFolder(folder.next)
    if not coming.path.is_dir():
        return
    if coming.manifest.is_file():  # it is the first that moves, when all is forgotten
        _forget_what_changes(folder, coming)
    for path in (coming.manifest, coming.config_file, coming.record):
        if path.is_file():
            rename(path, folder.path / path.name)
    remove(coming.path)


def drop_strange(folder: RunFolder) -> int:
    """Forget images that were done with other settings than the run's, or from another row; returns how many.

    They can be left by a run that had the folder before, or be copied from another. Scores of images that are not done
    go as well.
    """
    missing = folder.entry_digests()
    strange = _strange(folder, missing, folder.image_digest())
    forget(folder, strange)
    if folder.scores.is_dir():
        # Whose marker was lost, or taken back for damage, is done again, perhaps with other results: those would count
        # as scored as long as scores of the former ones are there.
        for table in iter_markers(folder, ["image_id"]):
            for image_id in table["image_id"].to_pylist():
                missing.pop(image_id, None)
        with our_disk(folder.path):
            forget_scores(folder, missing.keys())
    return len(strange)


def _begin(
    folder: RunFolder,
    entries: Sequence[ManifestEntry],
    config: Config,
    wisdom: Callable[[], str],
    models: Sequence[Any],
    redo: bool,
) -> None:
    strangers = [p.name for p in folder.path.iterdir() if p.name not in _OWN] if folder.path.is_dir() else []
    if strangers:
        raise UsageError(
            f"{folder.path}: holds {strangers[0]!r} and is no run folder; choose an empty or new folder for --out"
        )
    for path in (folder.path, folder.catalogue, folder.stamps, folder.done, folder.log):
        path.mkdir(parents=True, exist_ok=True)
    wrong = _strange(folder, {entry.image_id: entry_digest(entry) for entry in entries}, config.image_digest)
    if wrong and not redo:
        some = ", ".join(wrong[:_SHOWN]) + (" …" if len(wrong) > _SHOWN else "")
        raise RunMismatchError(
            f"{folder.path}: its run.json is lost, and {_images(len(wrong))} ({some}) "
            f"{'was' if len(wrong) == 1 else 'were'} done from other rows of the manifest, with other settings, or "
            "by another version of batchproc; give the manifest and the settings they were done with, choose another "
            "--out, or accept with --redo that these results are deleted"
        )
    remove(folder.next)  # a change of what was lost with run.json
    _write_inputs(folder, entries, config)
    write_text(folder.wisdom_file, wisdom())
    _write_record(folder, {"id": uuid.uuid4().hex, "begun": _now()} | _identity(entries, config, models))


def _change(folder: RunFolder, entries: Sequence[ManifestEntry], config: Config, models: Sequence[Any]) -> None:
    with replacing(folder.next) as temporary:
        coming = RunFolder(temporary)
        coming.path.mkdir()
        _write_inputs(coming, entries, config)
        _write_record(coming, folder.read_record() | _identity(entries, config, models), folder.wisdom_file)
    complete_change(folder)


def _write_inputs(folder: RunFolder, entries: Sequence[ManifestEntry], config: Config) -> None:
    with replacing(folder.manifest) as temporary:
        try:
            write_manifest(list(entries), temporary)
        except ManifestError as error:  # what the disk refuses is no matter of the manifest
            raise error.__cause__ or error from None
        _add_digests(temporary, entries)
    write_text(folder.config_file, config.to_toml())


def _add_digests(manifest: Path, entries: Sequence[ManifestEntry]) -> None:
    """The column by which results are compared with the manifest, without reading all of that."""
    table = pq.read_table(manifest)
    digests = pa.array([entry_digest(entry) for entry in entries], pa.string())
    pq.write_table(table.append_column("entry_digest", digests), manifest, compression="zstd")


def _write_record(folder: RunFolder, record: Mapping[str, Any], wisdom: Path | None = None) -> None:
    """Write run.json, the last of the frozen files, with the digests of the others."""
    files = {
        path.name: file_digest(path) for path in (folder.manifest, folder.config_file, wisdom or folder.wisdom_file)
    }
    folder.write_record({**record, "files": files})


def _mend(folder: RunFolder, entries: Sequence[ManifestEntry], config: Config, wisdom: Callable[[], str]) -> None:
    """Write frozen files again that were damaged: what we were given says what they said."""
    record = folder.read_record()
    if all(path.is_file() and file_digest(path) == record["files"][path.name] for path in _frozen(folder)):
        return
    _write_inputs(folder, entries, config)
    write_text(folder.wisdom_file, wisdom())
    _write_record(folder, record)


def _keep_wisdom(folder: RunFolder, wisdom: Callable[[], str]) -> None:
    """Put the wisdom right where it was damaged: a change takes it over with the digest that it has then."""
    path = folder.wisdom_file
    frozen = folder.read_record().get("files", {}).get(path.name)
    if not path.is_file() or file_digest(path) != frozen:
        write_text(path, wisdom())


def _frozen(folder: RunFolder) -> tuple[Path, ...]:
    return folder.manifest, folder.config_file, folder.wisdom_file


def _identity(entries: Sequence[ManifestEntry], config: Config, models: Sequence[Any]) -> dict[str, Any]:
    """What tells two runs apart, as it stands in run.json."""
    return {
        "version": batchproc.__version__,
        "frozen": _now(),
        "n_images": len(entries),
        "manifest_digest": manifest_digest(entries),
        "config_digest": config.digest,
        "image_digest": config.image_digest,
        "models": {model.name: model.hash for model in models},
        "software": dict(software()),
    }


def _strange(folder: RunFolder, digests: Mapping[str, str], image_digest: str) -> list[str]:
    """Done images that do not belong to such a run."""
    return [
        done.image_id
        for done in iter_done(folder)
        if (done.config_digest, done.version) != (image_digest, batchproc.__version__)
        or done.entry_digest != digests.get(done.image_id)
    ]


def _forget_what_changes(folder: RunFolder, coming: RunFolder) -> None:
    """Results, failures and scores that do not hold for the coming settings and rows."""
    before, now = folder.read_record(), coming.read_record()
    old, new = folder.entry_digests(), coming.entry_digests()
    same = all(before.get(key) == now[key] for key in ("image_digest", "version"))
    forget(folder, [name for name, digest in old.items() if not same or new.get(name) != digest])
    was = folder.models()
    for name, digest in coming.models().items():
        if was.get(name, digest) != digest:
            remove(folder.scores_of(name))


def _settings_changes(folder: RunFolder, record: Mapping[str, Any], config: Config, models: Sequence[Any]) -> list[str]:
    if record["version"] != batchproc.__version__:
        was = record["version"]
        return [
            f"batchproc {was}, this is {batchproc.__version__}, which may give other values (the run goes on under "
            f"batchproc {was})"
        ]
    changes: list[str] = []
    if config.digest != record["config_digest"]:
        before, after = _flat(folder.config().to_dict()), _flat(config.to_dict())
        changes = [f"{key} was {before[key]!r}, now {after[key]!r}" for key in before if before[key] != after[key]]
        changes = changes or [f"{folder.config_file} was altered after the run was begun"]
    before_models = folder.models()
    for model in models:
        digest = before_models.get(model.name, model.hash)
        if digest != model.hash:
            changes.append(f"the model {model.name} was {digest[:12]}, now {model.hash[:12]}")
    return changes


def _details(folder: RunFolder, entries: Sequence[ManifestEntry], names: Iterable[str]) -> list[str]:
    wanted = {*names}
    if not wanted:
        return []
    before, now = (
        {e.image_id: asdict(e) for e in some if e.image_id in wanted} for some in (folder.entries(), entries)
    )
    return [
        f"{name}: " + ", ".join(f"{key} was {old[key]!r}, now {new[key]!r}" for key in old if old[key] != new[key])
        for name, old, new in ((name, before[name], now[name]) for name in sorted(wanted))
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _images(n: int, kind: str = "") -> str:
    return f"{n} {kind}image{'s' * (n != 1)}"


def _are(n: int) -> str:
    return "is" if n == 1 else "are"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


#: What a run folder may hold while `run.json` is not in it: a driver was killed while it froze the run, or the file
#: was lost. The demo keeps its simulated night in there too, and anyone may put a truth table beside the catalogue.
_OWN = {".lock", "manifest.parquet", "config.toml", "fftw_wisdom", "next", "catalogue", "stamps", "done", "log"}
_OWN |= {"scores", "receipts.parquet", "failures.parquet", "report.html"}
_OWN |= {"hats", "stamps.zarr", "focal_planes.parquet", "finishing"}
_OWN |= {"night", "truth.parquet"}
