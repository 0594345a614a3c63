"""What a report says, as plain numbers and tables: read from the run folder, nothing drawn yet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from batchproc.errors import UsageError
from batchproc.io.catalogue import open_catalogue
from batchproc.io.events import read_events
from batchproc.io.progress import iter_receipts
from batchproc.io.run_folder import RunFolder
from batchproc.io.stamps import open_stamps
from batchproc.records import Flag, Receipt
from batchproc.report.times import Course, read_course

__all__ = [
    "HISTOGRAM_EDGES",
    "MATCH_PIX",
    "Candidate",
    "Facts",
    "Truth",
    "flag_names",
    "gather_facts",
    "match_known",
    "read_table",
    "read_truth",
]

#: Edges of the histogram of blank-sky S_corr in a receipt's ``scorr_hist``.
HISTOGRAM_EDGES = np.linspace(-8, 8, 65)
#: A candidate this near to a known transient is that transient.
MATCH_PIX = 3.0
#: From this score on a candidate counts as likely real.
REAL = 0.5

_N_BEST = 24
_N_ASIDE = 12
_COLUMNS = (
    "candidate_id",
    "image_id",
    "x",
    "y",
    "ra",
    "dec",
    "scorr",
    "flux",
    "flux_err",
    "mag",
    "flags",
    "mjd",
    "filter",
    "stamp_index",
)


@dataclass(frozen=True)
class Candidate:
    """A row of the catalogue with its stamps, for a gallery."""

    row: dict[str, Any]
    score: float
    known: bool | None
    stamp: NDArray[np.float32]  # (3, h, w)

    @property
    def flags(self) -> list[str]:
        """Names of the flags that are set."""
        return flag_names(self.row["flags"])


@dataclass(frozen=True)
class Truth:
    """Known transients of the images that were done, and what became of them.

    Attributes
    ----------
    table : DataFrame
        One row a transient that could have been found: ``snr``, ``found`` (a candidate of its sign within `MATCH_PIX`),
        ``clean`` (unflagged), ``real`` (scored at least `REAL`), ``dx, dy`` (pixels), ``flux_ratio`` (measured over
        true).
    n_masked, n_elsewhere : int
        Known transients left out: under masks, and in images that failed or are missing.
    n_false, n_false_clean, n_false_real : int
        Candidates that are no known transient: all, unflagged, scored at least `REAL`.
    matched : ndarray of bool
        For each candidate of the catalogue.
    """

    table: pd.DataFrame
    n_masked: int
    n_elsewhere: int
    n_false: int
    n_false_clean: int
    n_false_real: int
    matched: NDArray[np.bool_]


@dataclass(frozen=True)
class Facts:
    """Everything a report is made from.

    Attributes
    ----------
    name : str
        Of the run folder.
    record : dict
        ``run.json``.
    settings : str
        ``config.toml``.
    threshold : float
        Of detection, sigma.
    n_images : int
        In the manifest.
    inputs : dict
        What the manifest says, counted.
    images : DataFrame
        One row a receipt of a finished image: counts, seconds of each step (``step:NAME``), quality.
    failures : list of Receipt
    histogram : ndarray (64,) or None
        Blank-sky S_corr of all images, on `HISTOGRAM_EDGES`.
    catalogue : DataFrame
    score : str or None
        The column of the catalogue that ranks candidates.
    models : dict
    best, aside : list of Candidate
    truth : Truth or None
    focal_planes : DataFrame or None
        ``focal_planes.parquet``, where the run has it.
    course : Course or None
        What happened when, where a driver wrote it down.
    """

    name: str
    record: dict[str, Any]
    settings: str
    threshold: float
    n_images: int
    inputs: dict[str, Any]
    images: pd.DataFrame
    failures: list[Receipt]
    histogram: NDArray[np.int64] | None
    catalogue: pd.DataFrame
    score: str | None
    models: dict[str, Any]
    best: list[Candidate]
    aside: list[Candidate]
    truth: Truth | None
    focal_planes: pd.DataFrame | None = None
    course: Course | None = None

    @property
    def scores(self) -> NDArray[np.float64]:
        """Of each candidate; NaN without."""
        if self.score is None:
            return np.full(len(self.catalogue), np.nan)
        return self.catalogue[self.score].to_numpy(dtype=np.float64)


def gather_facts(folder: RunFolder, truth: str | Path | None = None) -> Facts:
    """Read a run folder; raises `UsageError` where the truth is not to be had."""
    config = folder.config()
    images, failures, histogram = _read_receipts(iter_receipts(folder), folder.image_ids())
    catalogue, score = _read_catalogue(folder, config.classify.model)
    images = _add_filter(images, catalogue)
    known = read_truth(folder, truth)
    matched = None if known is None else _match(known, catalogue, score, set(images["image_id"]))
    best, aside = _galleries(folder, catalogue, score, None if matched is None else matched.matched)
    return Facts(
        name=folder.path.resolve().name,
        record=json.loads(folder.record.read_text()),
        settings=folder.config_file.read_text(),
        threshold=config.detect.threshold,
        n_images=len(folder.image_ids()),
        inputs=_inputs(folder),
        images=images,
        failures=failures,
        histogram=histogram,
        catalogue=catalogue,
        score=score,
        models=catalogue.attrs.get("models", {}),
        best=best,
        aside=aside,
        truth=matched,
        focal_planes=_read_focal_planes(folder),
        course=read_course(read_events(folder)),
    )


def flag_names(flags: int) -> list[str]:
    """Words for the bits of a candidate's flags."""
    return [flag.name.lower().replace("_", " ") for flag in Flag if flag.name and int(flags) & flag]


def _read_receipts(
    receipts: Iterable[Receipt], image_ids: Sequence[str]
) -> tuple[pd.DataFrame, list[Receipt], NDArray[np.int64] | None]:
    rows, failures = [], []
    histogram = None
    for receipt in receipts:
        if receipt.status != "done":
            failures.append(receipt)
            continue
        counts = np.asarray(receipt.quality.get("scorr_hist", ()), dtype=np.int64)
        if len(counts) == len(HISTOGRAM_EDGES) - 1:
            histogram = counts if histogram is None else histogram + counts
        numbers = {k: v for k, v in receipt.quality.items() if isinstance(v, int | float | str) and v is not None}
        shape = receipt.quality.get("shape", (np.nan, np.nan))
        rows.append(
            {
                **numbers,
                "image_id": receipt.image_id,
                "n_candidates": receipt.n_candidates,
                "seconds": float(sum(receipt.seconds.values())),
                "cpu_seconds": receipt.cpu_seconds,
                "peak_memory_mb": receipt.peak_memory_mb,
                "mpix": float(np.prod(np.asarray(shape, dtype=np.float64))) / 1e6,
                **{f"step:{step}": value for step, value in receipt.seconds.items()},
            }
        )
    order = {image_id: number for number, image_id in enumerate(image_ids)}
    columns = ["image_id", "n_candidates", "seconds", "cpu_seconds", "peak_memory_mb", "mpix"]
    images = pd.DataFrame(rows) if rows else pd.DataFrame({c: pd.Series(dtype=object) for c in columns})
    images = images.sort_values("image_id", key=lambda ids: ids.map(order), ignore_index=True)
    failures.sort(key=lambda receipt: (receipt.status == "failed", order.get(receipt.image_id, 0)))
    return images, failures, histogram


def _read_catalogue(folder: RunFolder, model: str) -> tuple[pd.DataFrame, str | None]:
    """The columns that the report needs, and the one to rank by: a score of the run's own model if there is one."""
    everything = [n for n in open_catalogue(folder.path, filters=[("scorr", ">", np.inf)]) if n.startswith("score_")]
    catalogue = open_catalogue(folder.path, columns=[*_COLUMNS, *everything])
    own = [name for name in everything if name.startswith(f"score_{Path(model).stem}")] if model else []
    candidates = own or everything
    real = [name for name in candidates if name.endswith("_real")]
    score = (real or candidates or [None])[0]
    return catalogue, score


def _add_filter(images: pd.DataFrame, catalogue: pd.DataFrame) -> pd.DataFrame:
    """Filter and time of each image: of its receipt, or else of its candidates."""
    images = images.copy()
    of_image = catalogue.drop_duplicates("image_id").set_index("image_id")
    for name in ("filter", "mjd"):
        found = images["image_id"].map(of_image[name]) if len(of_image) else pd.Series(index=images.index, dtype=object)
        images[name] = images[name].where(images[name].notna(), found) if name in images else found
    images["filter"] = images["filter"].fillna("").replace("", "unknown")
    return images


def _read_focal_planes(folder: RunFolder) -> pd.DataFrame | None:
    """All images of the manifest, in the order of time; None where `batchproc finish` has to make the table."""
    columns = ["exposure_id", "ccd", "mjd", "status", "n_candidates", "fwhm_new", "seeing", "depth"]
    try:
        table = pd.read_parquet(folder.path / "focal_planes.parquet", columns=columns)
    except (OSError, ValueError):  # not there, or torn: no reason to have no report
        return None
    return table.sort_values("mjd", kind="stable", ignore_index=True)


def _inputs(folder: RunFolder) -> dict[str, Any]:
    entries = folder.entries()
    return {
        "images": len(entries),
        "references": len({ref for entry in entries for ref in entry.ref}),
        "exposures": len({entry.exposure_id for entry in entries if entry.exposure_id}),
        "surveys": sorted({entry.survey for entry in entries if entry.survey}),
        "masks": sum(entry.new_mask is not None for entry in entries),
        "variances": sum(entry.new_variance is not None for entry in entries),
        "psfs": sum(entry.new_psf is not None for entry in entries),
        "joined": sum(len(entry.ref) > 1 for entry in entries),
    }


def read_truth(folder: RunFolder, truth: str | Path | None) -> pd.DataFrame | None:
    """The table of known transients, ``truth.parquet`` of the run by default; None where there is none."""
    path = folder.path / "truth.parquet" if truth is None else Path(truth)
    if not path.is_file():
        if truth is None:
            return None
        raise UsageError(f"{path}: no such file; give the table of the known transients, CSV or Parquet")
    table = read_table(path)
    missing = {"image_id", "x", "y", "flux"} - set(table)
    if missing or not {"snr", "snr_local"} & set(table):
        raise UsageError(f"{path}: needs the columns image_id, x, y, flux and snr; found {', '.join(map(str, table))}")
    numbers = [name for name in ("x", "y", "flux", "snr", "snr_local") if name in table]
    words = [name for name in numbers if not pd.api.types.is_numeric_dtype(table[name])]
    if words:
        raise UsageError(f"{path}: the column {words[0]} holds {table[words[0]].dtype} values; expected numbers")
    return table.assign(snr=table["snr_local"] if "snr_local" in table else table["snr"])


def read_table(path: Path, *, names: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV or Parquet file; anything else is a `UsageError`. The columns `names`, where there, are read as text."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet", ".pq"):
        raise UsageError(f"{path}: unknown kind of table {suffix!r}; expected .csv or .parquet")
    try:
        # An image_id of digits alone is a name all the same.
        if suffix == ".csv":
            return pd.read_csv(path, dtype=dict.fromkeys(("image_id", *names), str))
        if not names:
            return pd.read_parquet(path)
        # Else pandas makes floats of integers of which one is missing, and 64-bit ones are no longer what they were.
        table = pd.read_parquet(path, dtype_backend="numpy_nullable")
        return table.astype({name: "string" for name in names if name in table})
    except (OSError, ValueError) as error:  # pandas' and pyarrow's errors of parsing are ValueErrors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{path}: not a {suffix[1:].upper()} table ({reason[:160]})") from error


def match_known(known: pd.DataFrame, catalogue: pd.DataFrame) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Which candidate is which known transient.

    Parameters
    ----------
    known, catalogue : DataFrame
        With ``image_id, x, y`` (pixels), and the sign in ``flux`` and in ``scorr``.

    Returns
    -------
    match : ndarray (len(known),) of int
        Row of the nearest candidate of the same sign within `MATCH_PIX`; -1 for none.
    near : ndarray (len(catalogue),) of bool
        Whether a candidate, of either sign, has a known transient within `MATCH_PIX`.
    """
    match = np.full(len(known), -1)
    matched = np.zeros(len(catalogue), dtype=bool)
    by_image = catalogue.groupby("image_id").indices
    for image_id, rows in known.groupby("image_id").indices.items():
        candidates = by_image.get(image_id)
        if candidates is None:
            continue
        xy = catalogue[["x", "y"]].to_numpy()[candidates]
        sign = np.sign(catalogue["scorr"].to_numpy()[candidates])
        near = cKDTree(xy).query_ball_point(known[["x", "y"]].to_numpy()[rows], MATCH_PIX)
        for row, several in zip(rows, near, strict=True):
            matched[candidates[several]] = True
            same = [i for i in several if sign[i] == np.sign(known["flux"].iloc[row])]
            if same:
                distance = np.hypot(*(xy[same] - known[["x", "y"]].to_numpy()[row]).T)
                match[row] = candidates[same[int(np.argmin(distance))]]
    return match, matched


def _match(known: pd.DataFrame, catalogue: pd.DataFrame, score: str | None, done: set[str]) -> Truth:
    """Nearest candidate of the same sign for each known transient, image by image."""
    here = known[known["image_id"].isin(done)].reset_index(drop=True)
    masked = here["masked"].to_numpy(dtype=bool) if "masked" in here else np.zeros(len(here), dtype=bool)
    match, matched = match_known(here, catalogue)
    found = match >= 0
    partner = catalogue.iloc[np.maximum(match, 0)].reset_index(drop=True) if len(catalogue) else None

    def of_partner(values: Any, absent: float) -> NDArray:
        return np.where(found, values, absent) if partner is not None else np.full(len(here), absent)

    scores = catalogue[score].to_numpy() if score else np.full(len(catalogue), np.nan)
    table = here.assign(
        found=found,
        clean=of_partner(None if partner is None else partner["flags"] == 0, False).astype(bool),
        real=of_partner(None if partner is None else scores[np.maximum(match, 0)] >= REAL, False).astype(bool),
        dx=of_partner(None if partner is None else partner["x"] - here["x"], np.nan),
        dy=of_partner(None if partner is None else partner["y"] - here["y"], np.nan),
        flux_ratio=of_partner(None if partner is None else partner["flux"] / here["flux"], np.nan),
    )
    in_truth = catalogue["image_id"].isin(set(here["image_id"])).to_numpy()
    false = in_truth & ~matched
    return Truth(
        table=table[~masked].reset_index(drop=True),
        n_masked=int(masked.sum()),
        n_elsewhere=len(known) - len(here),
        n_false=int(false.sum()),
        n_false_clean=int((false & (catalogue["flags"] == 0)).sum()),
        n_false_real=int((false & (scores >= REAL)).sum()),
        matched=matched,
    )


def _galleries(
    folder: RunFolder, catalogue: pd.DataFrame, score: str | None, known: NDArray[np.bool_] | None
) -> tuple[list[Candidate], list[Candidate]]:
    """The best-scored candidates, and the strongest ones that were flagged or scored low."""
    if catalogue.empty:
        return [], []
    flags, strength = catalogue["flags"].to_numpy(), np.abs(catalogue["scorr"].to_numpy())
    scores = catalogue[score].to_numpy(dtype=np.float64) if score else np.full(len(catalogue), np.nan)
    # Beyond two digits scores rank nothing; and without scores, clean ones come first.
    rank = np.where(np.isnan(scores), -1.0, np.round(scores, 2)) if score else (flags == 0).astype(float)
    good = scores >= REAL if score else flags == 0
    order = np.lexsort((-strength, -rank))
    best = [i for i in order if good[i]][:_N_BEST] or list(order[:_N_BEST])
    aside = _varied([i for i in np.argsort(-strength, kind="stable") if not good[i]], flags, _N_ASIDE)
    aside = [i for i in aside if i not in set(best)]
    stamps = open_stamps(folder.path)

    def candidates(rows: Sequence[int]) -> list[Candidate]:
        if not rows:
            return []
        images = stamps[catalogue["stamp_index"].to_numpy()[list(rows)]]
        return [
            Candidate(catalogue.iloc[i].to_dict(), float(scores[i]), None if known is None else bool(known[i]), image)
            for i, image in zip(rows, images, strict=True)
        ]

    return candidates(best), candidates(aside)


def _varied(rows: Sequence[int], flags: NDArray, n: int) -> list[int]:
    """Rows in their order, at first one of each combination of flags."""
    first: dict[int, int] = {}
    for i in rows:
        first.setdefault(int(flags[i]), i)
    chosen = list(first.values())[:n]
    taken = set(chosen)
    for i in rows:
        if len(chosen) >= n:
            break
        if i not in taken:
            chosen.append(i)
    return chosen
