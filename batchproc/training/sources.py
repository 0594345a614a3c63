"""Where examples come from: runs, alert packets, stored sets. Injections are in `injections`.

Of each source labels are found first, and only stamps of labelled candidates are read, and of those only the pixels
that the model looks at: 12 bytes a pixel of its side squared, 11.5 kB an example at 31 pixels, 48 kB at 63.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc.display import show
from batchproc.errors import UsageError
from batchproc.io.alerts import Alerts, read_alerts, source_size
from batchproc.io.catalogue import open_catalogue
from batchproc.io.run_folder import RunFolder
from batchproc.io.stamps import open_stamps
from batchproc.judging.candidates import label_run
from batchproc.label_tables import table_labels
from batchproc.learning.inputs import crop_or_pad
from batchproc.training.examples import BOGUS, REAL, Examples
from batchproc.training.labels import Rule, rule_labels

__all__ = ["Reading", "add_seeing", "at_most", "read_source"]

#: Stamps read at a time.
_CHUNK = 1024
_ZTF_FILTERS = {1: "g", 2: "r", 3: "i"}


@dataclass
class Reading:
    """How sources are read, and what there is to say of it.

    Attributes
    ----------
    size : int
        Side of the stamps to keep; 0: none are read, for models that take features alone.
    labels : Series, optional
        Identity → class (`batchproc.label_tables.read_labels`).
    rules : sequence of Rule
    truth : path, optional
        Of runs: known transients, as `batchproc.report.write_report` takes them.
    most : int
        Of each class and source at most so many, drawn at random; 0: all.
    seed : int
    quiet : bool
    notes : list of str
        Added to in reading.
    """

    size: int
    labels: pd.Series | None = None
    rules: Sequence[Rule] = ()
    truth: Path | None = None
    most: int = 0
    seed: int = 0
    quiet: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def told(self) -> bool:
        """Whether labels are given, and not in the sources."""
        return self.labels is not None or bool(self.rules)

    def label_of(self, table: pd.DataFrame, *identities: Any) -> NDArray[np.str_]:
        """By the table of labels, or else by the rules; empty for none."""
        found = np.full(len(table), "", object)
        if self.labels is not None:
            found = table_labels(self.labels, *identities).astype(object)
        by_rule = rule_labels(self.rules, table)
        return np.where(found == "", by_rule, found).astype(np.str_)


def read_source(path: str | Path, reading: Reading) -> Examples:
    """Labelled examples of a source: a run folder, alert packets (``.avro``, a folder or tarball of them), ``.npz``.

    Raises
    ------
    UsageError
        Nothing of these, nothing in it that is labelled, or labels that are missing.
    """
    source = Path(path)
    if source.suffix == ".npz":
        found = _of_set(source, reading)
    elif RunFolder(source).begun:
        found = _of_run(source, reading)
    else:
        found = _of_alerts(source, reading)
    if not len(found):
        raise UsageError(f"{source}: no candidate in it is labelled")
    found.table["source"] = str(source)
    return found


def _of_set(path: Path, reading: Reading) -> Examples:
    stored = Examples.load(path)
    label = stored.label
    if reading.told and "id" in stored.table:
        told = reading.label_of(stored.table, stored.table["id"])
        label = np.where(told == "", label, told)
    rows = at_most(label, reading.most, reading.seed)
    return Examples(
        _cut(stored.stamps, rows, reading.size), label[rows], stored.table.iloc[rows].reset_index(drop=True)
    )


# --- Runs -------------------------------------------------------------------------------------------------------------


def _of_run(path: Path, reading: Reading) -> Examples:
    if reading.told:
        table = open_catalogue(path)
        label = reading.label_of(table, table["candidate_id"])
        reading.notes.append(f"{path}: {(label != '').sum()} of {len(table)} candidates are labelled")
    else:
        table, notes = label_run(path, reading.truth)
        reading.notes += [f"{path}: {note}" for note in notes]
        label = np.where(table["real"], REAL, BOGUS).astype(np.str_)
    rows = at_most(label, reading.most, reading.seed)
    table, label = table.iloc[rows].reset_index(drop=True), label[rows]
    stamps = _cut(open_stamps(path), table["stamp_index"].to_numpy(), reading.size, reading.quiet)
    table.attrs = {}  # pandas compares them when tables are joined
    return Examples(stamps, label, add_seeing(table.drop(columns=["stamp_index", "real"], errors="ignore")))


def add_seeing(catalogue: pd.DataFrame) -> pd.DataFrame:
    """A catalogue of ours with the columns of `Examples.table`."""
    return catalogue.assign(
        id=catalogue["candidate_id"].astype(str), seeing=catalogue["fwhm_new"], group=catalogue["image_id"].astype(str)
    )


# --- Alerts -----------------------------------------------------------------------------------------------------------


def _of_alerts(path: Path, reading: Reading) -> Examples:
    """Labelled alerts; their stamps as they are in the packets, as ``classify-alerts`` scores them."""
    if not reading.told:
        raise UsageError(
            f"{path}: alert packets do not say what is real: give a table (--labels: candid or objectId, and label) or "
            "rules (--rule 'real: drb > 0.9' --rule 'bogus: drb < 0.5')"
        )
    parts: list[Examples] = []
    total, before, broken = source_size(path), 0, 0

    def bytes_of(alerts: Alerts) -> int:
        nonlocal before
        step, before = alerts.n_bytes - before, alerts.n_bytes
        return step

    n_alerts = 0
    wanted = {name for rule in reading.rules for name, _, _ in rule.conditions}
    found: set[str] = set()
    for alerts in show(read_alerts(path), total, "bytes", count=bytes_of, quiet=reading.quiet):
        table = _alert_table(alerts)
        absent = wanted - set(table)
        found |= wanted - absent
        # Text of no value: a rule on it holds for none of these, whether it asks for a number or for a word.
        asked = table.assign(**dict.fromkeys(absent, pd.Series(None, table.index, object)))
        label = reading.label_of(asked, table["id"], table["group"])
        readable = np.isfinite(alerts.stamps).any(axis=(1, 2, 3))
        rows = np.flatnonzero((label != "") & readable)
        n_alerts, broken = n_alerts + len(alerts), broken + int((~readable).sum())
        if len(rows):
            parts.append(
                Examples(_cut(alerts.stamps, rows, reading.size), label[rows], table.iloc[rows].reset_index(drop=True))
            )
    if (absent := wanted - found) and broken < n_alerts:
        raise UsageError(
            f"{path}: no alert has {', '.join(sorted(absent))}, for which a rule asks; look at its spelling"
        )
    reading.notes.append(f"{path}: {sum(map(len, parts))} of {n_alerts} alerts are labelled, {broken} cannot be read")
    if not parts:
        raise UsageError(f"{path}: none of {n_alerts} alerts is labelled")
    whole = Examples.join(_handed_over(parts))
    rows = at_most(whole.label, reading.most, reading.seed)
    return whole if len(rows) == len(whole) else whole[rows]


def _handed_over(parts: list[Examples]) -> Iterator[Examples]:
    """The parts, which are not held here any more."""
    while parts:
        yield parts.pop(0)


def _alert_table(alerts: Alerts) -> pd.DataFrame:
    """Measurements under the survey's names, and the columns of `Examples.table`."""
    table = pd.DataFrame([dict(candidate) for candidate in alerts.candidate], index=range(len(alerts)))

    def column(name: str) -> pd.Series:
        return table[name] if name in table else pd.Series(np.nan, range(len(alerts)))

    def numbers(name: str) -> pd.Series:
        return column(name).astype(float)

    # Of each survey one of the two is there: ZTF's, or Rubin's.
    ztf = column("fid").map(_ZTF_FILTERS).astype(object)
    ccd = numbers("rcid").fillna(numbers("detector"))
    return table.assign(
        id=alerts.candid.astype(str),
        group=list(alerts.object_id),
        drb=alerts.drb,
        ra=numbers("ra"),
        dec=numbers("dec"),
        mjd=(numbers("jd") - 2400000.5).fillna(numbers("midpointMjdTai")),
        filter=ztf.where(ztf.notna(), column("band")).fillna(""),
        ccd=ccd.map(lambda value: "" if pd.isna(value) else str(int(value))),
        survey=list(alerts.survey),
    )


# --- Common -----------------------------------------------------------------------------------------------------------


def at_most(label: NDArray[np.str_], most: int, seed: int) -> NDArray[np.intp]:
    """Rows with a label, in their order; of each class at most so many, drawn at random (0: all)."""
    random = np.random.default_rng(seed)
    kept = []
    for name in np.unique(label[label != ""]):
        rows = np.flatnonzero(label == name)
        kept.append(random.permutation(rows)[:most] if most and len(rows) > most else rows)
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.intp)


def _cut(stamps: Any, rows: NDArray[np.intp], size: int, quiet: bool = True) -> NDArray[np.float32]:
    """The middles of some stamps, read chunk by chunk; smaller ones stay as they are."""
    h, w = stamps.shape[2:]
    if size == 0:
        return np.zeros((len(rows), 3, 0, 0), np.float32)
    # What the edge of an image has cut off is not square, and is placed by the model's card.
    shape = (size, size) if h == w and h > size else (h, w)
    out = np.empty((len(rows), 3, *shape), np.float32)
    starts = range(0, len(rows), _CHUNK)
    for k in show(starts, len(starts), "chunks of stamps", quiet=quiet or len(starts) < 4):
        part = stamps[rows[k : k + _CHUNK]]
        out[k : k + _CHUNK] = crop_or_pad(part, size) if shape != (h, w) else part
    return out
