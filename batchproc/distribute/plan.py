"""What a run would do, before it does it: images, bytes, files, memory; once some images have been measured, time too.

Of a long manifest a sample is looked at, so that a plan for a million images takes no longer than reading it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq

from batchproc.config import Config
from batchproc.distribute.clusters import Where, expected_workers
from batchproc.distribute.order import images_a_task
from batchproc.distribute.prediction import Fit, Prediction, fit, predict_image, tile_bytes
from batchproc.distribute.scoring import images_of_a_chunk
from batchproc.distribute.tiles import tiles_under_way
from batchproc.io.fitsfile import split_hdu
from batchproc.io.packs import PACK_IMAGES
from batchproc.io.progress import finished_images, iter_receipts
from batchproc.io.run_folder import RunFolder
from batchproc.records import ManifestEntry, Receipt

T = TypeVar("T")

__all__ = ["Plan", "choose_spread", "evenly", "image_pixels", "images_at_once", "largest_need", "plan_run"]

_SAMPLE = 500  # images whose files are looked at, or whose results, of however many there are
_HEADERS = 8  # images whose headers are read, and as many of those with the largest files
_RECEIPTS = 10_000
_THREADS = 8  # each waits for a file server
_GUESSED_CANDIDATES = 100  # an image, where none has been measured
_COMPRESSION = 3.4  # of stamps rounded to 1/16 of the noise
_ROW_BYTES = 300
_PACK_LEAST = 20  # images that are rolled up into a pack of their own at the end of a run
_FILES = 5  # of a pack, and of an image that is in none: rows, marker, a folder of stamps with two files
_SCORE_IMAGES = 50  # to a file of scores, in short runs
_RUN_FILES = 16  # of the run itself: manifest, settings, log, report, folders
_WORTH_SPREADING = 2**24  # pixels of an image: a smaller one is subtracted in two seconds


@dataclass(frozen=True)
class Plan:
    """What there is to do, and about how much it is.

    Attributes
    ----------
    images, done, failed, missing : int
        In the manifest; finished; failed before (left to ``retry``); to do.
    missing_files : int
        Files of the images to do that are not there, in the sample that was looked at.
    bytes_in, bytes_out, files_out : float
        Of the images to do: what will be read, and what will be left (files and folders: quotas count both).
    need : Prediction
        Memory of the image that needs the most of those looked at, where images are not spread.
    measured : int
        Images of this run from which the numbers are taken, without the first of each process if there are others; 0:
        `bytes_out` is guessed, time unknown.
    seconds_per_image, cpu_seconds_per_image, peak_memory_mb : float
        Means over the measured images; largest of them. NaN where unknown.
    wanted_spread : str
        ``spread`` of the configuration.
    tile : int
        Largest side of a tile, pixels.
    threads : int
        Of each worker.
    changes : tuple of str
        What the run would be changed in, a line each.
    """

    images: int
    done: int
    failed: int
    missing: int
    missing_files: int
    bytes_in: float
    bytes_out: float
    files_out: int
    need: Prediction
    measured: int
    seconds_per_image: float
    cpu_seconds_per_image: float
    peak_memory_mb: float
    wanted_spread: str = "auto"
    tile: int = 1024
    threads: int = 1
    changes: tuple[str, ...] = ()

    def spread(self, workers: int) -> str:
        """What so many workers would share out: ``"images"`` or ``"tiles"``; see `choose_spread`."""
        return choose_spread(self.wanted_spread, self.missing, workers, self.need.pixels)

    def fit(self, where: Where) -> Fit:
        """How the image that needs the most memory fits into the workers there would be."""
        workers = expected_workers(where, self.threads)
        if self.spread(workers) == "images":
            return fit(self.need, where, images=self.missing, threads=self.threads)
        large, tiles = images_at_once(self.missing, workers), self.tile_bytes(workers)
        return fit(self.need, where, images=self.missing, threads=self.threads, large=large, tiles=tiles)

    def tile_bytes(self, workers: int) -> int:
        """Memory of all tiles of one image that are under way at a time, beyond the image's own."""
        return tile_bytes(self.tile, tiles_under_way(workers))

    def tasks(self, workers: int) -> int:
        """Tasks of images for so many workers: one each, or several to a task; see `images_a_task`."""
        return math.ceil(self.missing / (images_a_task(self.seconds_per_image, workers) if self.measured else 1))

    def seconds(self, workers: int) -> float:
        """About how long the images to do take with so many workers; NaN where unknown."""
        return self.missing * self.seconds_per_image / workers

    @property
    def cpu_hours(self) -> float:
        """That the images to do take; NaN where unknown."""
        return self.missing * self.cpu_seconds_per_image / 3600


def plan_run(
    folder: RunFolder,
    entries: Sequence[ManifestEntry],
    config: Config,
    *,
    again: Collection[str] = (),
    changes: tuple[str, ...] = (),
) -> Plan:
    """Look at what a run has to do; reads sizes, headers and receipts, no pixels, and writes nothing.

    Parameters
    ----------
    folder : RunFolder
        May not be there yet.
    entries : sequence of ManifestEntry
    config : Config
    again : collection of str
        Images to be done again though they were tried.
    changes : tuple of str
        Handed on to the plan.
    """
    begun = folder.record.is_file()
    tried = finished_images(folder) if begun else {}
    for image_id in again:
        tried.pop(image_id, None)
    todo = [entry for entry in entries if entry.image_id not in tried]
    statuses = [tried[entry.image_id] for entry in entries if entry.image_id in tried]
    sample = evenly(todo, _SAMPLE)
    sizes = _sizes(sample)
    receipts = [r for r in islice(iter_receipts(folder), _RECEIPTS) if r.status == "done"] if begun else []
    # The first image of a process loads and, on a new machine, compiles: the others are what the rest will be like.
    warm = [r for r in receipts if not r.metadata.get("first_of_process")] or receipts
    return Plan(
        images=len(entries),
        done=statuses.count("done"),
        failed=len(statuses) - statuses.count("done"),
        missing=len(todo),
        missing_files=sum(size is None for size in sizes.values()),
        bytes_in=_bytes_in(sample, sizes) * len(todo),
        bytes_out=(_bytes_out(folder) or _guessed_bytes(receipts, config)) * len(todo),
        files_out=_files_out(len(todo), models=len(config.classify.models)),
        need=largest_need(todo, sizes),
        measured=len(warm),
        seconds_per_image=_mean([sum(r.seconds.values()) for r in warm]),
        cpu_seconds_per_image=_mean([r.cpu_seconds for r in warm]),
        peak_memory_mb=max((r.peak_memory_mb for r in warm), default=np.nan),
        wanted_spread=config.spread,
        tile=config.subtract.tile,
        threads=config.threads,
        changes=changes,
    )


def choose_spread(wanted: str, n_images: int, workers: int, pixels: int) -> str:
    """What the workers share out among themselves: ``"images"`` or ``"tiles"``.

    Images are the quickest way through many of them. Tiles are it where workers would be idle, fewer images than
    workers, and each image is large enough.

    Parameters
    ----------
    wanted : {"auto", "images", "tiles"}
        Another word than auto is taken at its word, wherever there are two workers.
    n_images, workers : int
    pixels : int
        Of an image.
    """
    if workers < 2:
        return "images"
    if wanted != "auto":
        return wanted
    return "tiles" if n_images < workers and pixels >= _WORTH_SPREADING else "images"


def images_at_once(n_images: int, workers: int) -> int:
    """Images under way when their tiles are spread: all where they are fewer than workers, else one after the other."""
    return n_images if n_images < workers else 1


def largest_need(entries: Sequence[ManifestEntry], sizes: dict[Path, int | None] | None = None) -> Prediction:
    """Memory of the image that needs the most, of some spread over the manifest and of those with the largest files.

    Parameters
    ----------
    entries : sequence of ManifestEntry
    sizes : dict, optional
        Bytes of the files of a sample of them, where they have been looked at.
    """
    sample = evenly(entries, _SAMPLE)
    sizes = _sizes(sample) if sizes is None else sizes
    largest = sorted(sample, key=lambda entry: _size_of(entry, sizes), reverse=True)[:_HEADERS]
    chosen = {entry.image_id: entry for entry in (*evenly(entries, _HEADERS), *largest)}
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [prediction for prediction in pool.map(predict_image, chosen.values()) if prediction is not None]
    if not found:
        return Prediction()
    return replace(max(found, key=lambda prediction: prediction.bytes), looked_at=len(found))


def image_pixels(entries: Sequence[ManifestEntry]) -> int:
    """Pixels of the largest of some of the images, from their headers; 0 where none can be read."""
    return largest_need(entries).pixels


def evenly(items: Sequence[T], n: int) -> list[T]:
    """At most n of the items, evenly spaced, so that they stand for all of them."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(n, len(items))).astype(int))]


def _files(entry: ManifestEntry) -> list[Path]:
    """Every file that reading the image opens, as far as the manifest names it."""
    optional = (entry.new_mask, entry.new_variance, entry.new_psf, *entry.ref_mask, *entry.ref_variance, *entry.ref_psf)
    return [split_hdu(spec)[0] for spec in (entry.new, *entry.ref, *optional) if spec]


def _sizes(entries: Iterable[ManifestEntry]) -> dict[Path, int | None]:
    """Every file of the images once, with its size; None where it is not there."""
    paths = list(dict.fromkeys(path for entry in entries for path in _files(entry)))

    def size(path: Path) -> int | None:
        try:
            return path.stat().st_size if path.is_file() else None
        except (OSError, ValueError):  # its own task will say what is wrong with it
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(paths, pool.map(size, paths), strict=True))


def _size_of(entry: ManifestEntry, sizes: dict[Path, int | None]) -> int:
    return sum(sizes.get(path) or 0 for path in _files(entry))


def _bytes_in(sample: Sequence[ManifestEntry], sizes: dict[Path, int | None]) -> float:
    """That an image reads: a reference is read once for each image that has it."""
    return sum(_size_of(entry, sizes) for entry in sample) / max(len(sample), 1)


def _guessed_bytes(receipts: Sequence[Receipt], config: Config) -> float:
    candidates = _mean([r.n_candidates for r in receipts]) if receipts else _GUESSED_CANDIDATES
    return candidates * (3 * 4 * config.cutouts.size**2 / _COMPRESSION + _ROW_BYTES)


def _bytes_out(folder: RunFolder) -> float:
    """That a finished image left, from a sample of files; 0 where there are none."""
    n_bytes, images = 0, 0
    for marker in evenly(sorted(folder.done.glob("[!.]*")), _SAMPLE) if folder.done.is_dir() else []:
        name = marker.stem if marker.suffix == ".parquet" else marker.name.removesuffix(".json")
        try:
            images += pq.read_metadata(marker).num_rows if marker.suffix == ".parquet" else 1
        except OSError:  # it has gone into a pack
            continue
        stamps = (Path(where) / file for where, _, files in os.walk(folder.stamps / f"{name}.zarr") for file in files)
        for path in (marker, folder.catalogue / f"{name}.parquet", *stamps):
            n_bytes += path.stat().st_size if path.is_file() else 0
    return n_bytes / max(images, 1)


def _files_out(images: int, *, models: int) -> int:
    """Files and folders that so many images leave behind."""
    if not images:
        return 0
    packs, rest = divmod(images, PACK_IMAGES)
    kept = packs + (1 if rest >= _PACK_LEAST else rest)
    scored_together = max(_SCORE_IMAGES, images_of_a_chunk(images, models))
    return _RUN_FILES + _FILES * kept + models * (1 + math.ceil(images / scored_together))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
