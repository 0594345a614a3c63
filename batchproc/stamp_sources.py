"""Some stamps of wherever there are any, with what they are where that is known: what models are quantised on."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.errors import UsageError
from batchproc.io.alerts import read_alerts
from batchproc.io.catalogue import open_catalogue
from batchproc.io.run_folder import RunFolder
from batchproc.io.stamps import open_stamps
from batchproc.label_tables import read_labels, real_flags, table_labels

__all__ = ["SomeStamps", "some_stamps"]


@dataclass(frozen=True)
class SomeStamps:
    """Stamps, and their labels."""

    stamps: NDArray[np.float32]
    """``(n, 3, h, w)``: new, reference, difference, un-normalised."""
    labels: NDArray[np.str_] | None
    """``(n,)``: ``real``, ``bogus`` or a class; empty: not known. None where nothing is known of any."""


def some_stamps(source: str | Path, most: int, *, labels: str | Path | None = None, seed: int = 0) -> SomeStamps:
    """At most so many stamps, drawn at random, in the order in which they lie.

    Parameters
    ----------
    source : str or Path
        A run folder, alert packets (`read_alerts`), or an ``.npz`` with ``stamps`` ``(n, 3, h, w)`` and, if known,
        ``label`` (text) or ``real`` (true, false).
    most : int
    labels : str or Path, optional
        A table (CSV, Parquet), as of `batchproc.label_tables.read_labels`: by ``candidate_id`` (of a run), by
        ``candid`` or ``objectId`` (of packets).
    seed : int

    Raises
    ------
    UsageError
        No such source, nothing in it, or labels that do not belong to it.
    """
    path = Path(source)
    if labels is not None and path.suffix == ".npz":
        raise UsageError(f"--labels is for runs and packets; {path} has its labels in its arrays label or real")
    if path.suffix == ".npz":
        found = _of_arrays(path, most, seed)
    elif RunFolder(path).begun:
        found = _of_run(path, most, seed, labels)
    else:
        found = _of_packets(path, most, seed, labels)
    if not len(found.stamps):
        raise UsageError(f"{path}: no stamps in it")
    return found


def _drawn(n: int, most: int, seed: int) -> NDArray[np.intp]:
    return np.sort(np.random.default_rng(seed).permutation(n)[:most])


def _of_arrays(path: Path, most: int, seed: int) -> SomeStamps:
    try:
        with np.load(path) as stored:
            if "stamps" not in stored.files:
                raise UsageError(f"{path}: expected an array stamps; found {', '.join(stored.files) or 'none'}")
            stamps = stored["stamps"]
            names = stored["label"].astype(np.str_) if "label" in stored.files else None
            if names is None and "real" in stored.files:
                names = np.where(real_flags(path, pd.Series(stored["real"].ravel())), "real", "bogus")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: cannot be read as arrays (.npz): {error}") from error
    if stamps.ndim != 4 or stamps.shape[1] != 3 or (names is not None and names.shape != stamps.shape[:1]):
        told = "none" if names is None else str(names.shape)
        raise UsageError(f"{path}: stamps {stamps.shape} and labels {told}; expected (n, 3, h, w) and (n,)")
    rows = _drawn(len(stamps), most, seed)
    return SomeStamps(stamps[rows].astype(np.float32), None if names is None else names[rows])


def _of_run(path: Path, most: int, seed: int, labels: str | Path | None) -> SomeStamps:
    stamps = open_stamps(path)
    rows = _drawn(len(stamps), most, seed)
    if labels is None:
        return SomeStamps(stamps[rows], None)
    table = open_catalogue(path, columns=["candidate_id", "stamp_index"]).sort_values("stamp_index")
    ids = table["candidate_id"].to_numpy()
    return SomeStamps(stamps[rows], _labelled(labels, ids[rows]))


def _of_packets(path: Path, most: int, seed: int, labels: str | Path | None) -> SomeStamps:
    """Drawn while reading (reservoir sampling): how many there are is known at the end."""
    random = np.random.default_rng(seed)
    kept: list[tuple[int, int, str, NDArray[np.float32]]] = []
    seen = 0
    for alerts in read_alerts(path):
        for candid, name, stamp in zip(alerts.candid, alerts.object_id, alerts.stamps, strict=True):
            place = len(kept) if len(kept) < most else int(random.integers(seen + 1))
            if place < most:
                kept[place : place + 1] = [(seen, int(candid), name, stamp.copy())]
            seen += 1
    kept.sort(key=lambda item: item[0])
    stamps = np.stack([stamp for *_, stamp in kept]) if kept else np.empty((0, 3, 1, 1), np.float32)
    if labels is None:
        return SomeStamps(stamps, None)
    names = np.array([(str(candid), name) for _, candid, name, _ in kept], np.str_)  # (n, 2)
    return SomeStamps(stamps, _labelled(labels, *names.T))


def _labelled(path: str | Path, *identities: NDArray) -> NDArray[np.str_]:
    labels = read_labels(path)
    found = table_labels(labels, *identities)
    if not np.any(found != ""):
        raise UsageError(
            f"{path}: none of its {len(labels)} labels is of one of the {len(found)} stamps, which are named "
            f"{', '.join(str(each) for names in identities for each in names[:1])} and so on"
        )
    return found
