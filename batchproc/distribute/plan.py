"""What a run would do, before it does it: images, bytes, files, and, once some images have been measured, time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from batchproc.config import Config
from batchproc.distribute.tiles import tiles_under_way
from batchproc.errors import BatchprocError
from batchproc.io.fitsfile import split_hdu
from batchproc.io.images import inspect_image
from batchproc.io.progress import finished_images, iter_receipts
from batchproc.io.run_folder import RunFolder
from batchproc.records import ManifestEntry

T = TypeVar("T")

__all__ = ["Plan", "choose_spread", "evenly", "image_pixels", "images_at_once", "plan_run"]

_SAMPLE = 500  # files or images that are looked at, of however many there are
_GUESSED_CANDIDATES = 100  # an image, where none has been measured
_COMPRESSION = 3.4  # of stamps rounded to 1/16 of the noise
_ROW_BYTES = 300
_FILES = 4  # an image: its rows, two of its stamps, its marker
_WORTH_SPREADING = 2**24  # pixels of an image: a smaller one is subtracted in two seconds
_TILE_BYTES = 18 * 4  # a pixel of a frame: four planes, eight spectra, six results
_LOOKED_AT = 4  # images whose headers are read for their size


@dataclass(frozen=True)
class Plan:
    """What there is to do, and about how much it is.

    Attributes
    ----------
    images, done, failed, missing : int
        In the manifest; finished; failed before (left to ``retry``); not tried yet.
    missing_files : int
        Files of the images not tried yet that are not there, in the sample that was looked at.
    bytes_in, bytes_out, files_out : float
        Of the images not tried yet: what will be read and written.
    measured : int
        Images of this run from which the numbers are taken; 0: `bytes_out` is guessed, time and memory unknown.
    seconds_per_image, peak_memory_mb : float
        Means over the measured images; largest of them. NaN where unknown.
    pixels : int
        Of the largest image not tried yet, in a small sample; 0 where unknown.
    wanted_spread : str
        ``spread`` of the configuration.
    tile : int
        Largest side of a tile, pixels.
    threads : int
        Of each worker.
    """

    images: int
    done: int
    failed: int
    missing: int
    missing_files: int
    bytes_in: float
    bytes_out: float
    files_out: int
    measured: int
    seconds_per_image: float
    peak_memory_mb: float
    pixels: int = 0
    wanted_spread: str = "auto"
    tile: int = 1024
    threads: int = 1

    def spread(self, workers: int) -> str:
        """What so many workers would share out: ``"images"`` or ``"tiles"``; see `choose_spread`."""
        return choose_spread(self.wanted_spread, self.missing, workers, self.pixels)

    def tile_bytes(self, workers: int) -> int:
        """Memory of all tiles of one image that are under way at a time, beyond the image's own."""
        return tiles_under_way(workers) * self.tile**2 * _TILE_BYTES

    def seconds(self, workers: int) -> float:
        """About how long the images not tried yet take with so many workers; NaN where unknown."""
        return self.missing * self.seconds_per_image / workers


def plan_run(folder: RunFolder, entries: Sequence[ManifestEntry], config: Config) -> Plan:
    """Look at what a run has to do; reads sizes and receipts, no pixels, and writes nothing."""
    begun = folder.record.is_file()
    tried = finished_images(folder) if begun else {}
    todo = [entry for entry in entries if entry.image_id not in tried]
    sizes = _sizes(evenly(todo, _SAMPLE))
    sample = min(len(todo), _SAMPLE)
    receipts = [r for r in islice(iter_receipts(folder), 20 * _SAMPLE) if r.status == "done"] if begun else []
    bytes_each = _GUESSED_CANDIDATES * (3 * 4 * config.cutouts.size**2 / _COMPRESSION + _ROW_BYTES)
    if receipts:
        bytes_each = float(np.mean([_written(folder, r.image_id) for r in evenly(receipts, _SAMPLE)]))
    return Plan(
        images=len(entries),
        done=sum(status == "done" for status in tried.values()),
        failed=sum(status != "done" for status in tried.values()),
        missing=len(todo),
        missing_files=sum(size is None for size in sizes.values()),
        bytes_in=sum(size or 0 for size in sizes.values()) * len(todo) / max(sample, 1),
        bytes_out=bytes_each * len(todo),
        files_out=_FILES * len(todo),
        measured=len(receipts),
        seconds_per_image=float(np.mean([sum(r.seconds.values()) for r in receipts])) if receipts else np.nan,
        peak_memory_mb=max((r.peak_memory_mb for r in receipts), default=np.nan),
        pixels=image_pixels(todo),
        wanted_spread=config.spread,
        tile=config.subtract.tile,
        threads=config.threads,
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


def image_pixels(entries: Sequence[ManifestEntry]) -> int:
    """Pixels of the largest of a few of the images, from their headers; 0 where none can be read."""
    largest = 0
    for entry in evenly(entries, _LOOKED_AT):
        try:
            largest = max(largest, math.prod(inspect_image(entry.new).shape))
        except (BatchprocError, OSError):  # the image's own task will say what is wrong
            continue
    return largest


def evenly(items: Sequence[T], n: int) -> list[T]:
    """At most n of the items, evenly spaced, so that they stand for all of them."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(n, len(items))).astype(int))]


def _sizes(entries: Iterable[ManifestEntry]) -> dict[Path, int | None]:
    """Every file of the images once, with its size; None where it is not there."""
    sizes: dict[Path, int | None] = {}
    for e in entries:
        optional = (e.new_mask, e.new_variance, e.new_psf, *e.ref_mask, *e.ref_variance, *e.ref_psf)
        for spec in (e.new, *e.ref, *optional):
            if spec:
                path = split_hdu(spec)[0]
                if path not in sizes:
                    sizes[path] = path.stat().st_size if path.is_file() else None
    return sizes


def _written(folder: RunFolder, image_id: str) -> int:
    paths = [folder.catalogue_part(image_id), folder.marker(image_id)]
    for where, _, names in os.walk(folder.stamps_part(image_id)):
        paths += [Path(where) / name for name in names]
    return sum(path.stat().st_size for path in paths if path.is_file())
