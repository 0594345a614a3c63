"""What a long run leaves on the disk, and how quickly it is found again: files counted, the index timed.

python -m tests.benchmarks.storage            3,000 images through a run, an index of 100,000; about two minutes
python -m tests.benchmarks.storage 100000     so many through a run; about an hour
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq

from batchproc.distribute.scoring import images_of_a_chunk
from batchproc.io.catalogue import PARQUET
from batchproc.io.freeze import freeze
from batchproc.io.index import PACK_SCHEMA, Done, iter_done, read_index
from batchproc.io.markers import Marker, marker_row, now, software
from batchproc.io.packs import PACK_IMAGES
from batchproc.io.progress import finished_images, gather
from batchproc.io.run_folder import RunFolder
from batchproc.job import Steps, run
from batchproc.records import ManifestEntry, Receipt
from tests import _runs

CANDIDATES = 100  # an image, of the index that is timed


@dataclass(frozen=True)
class Files:
    """Files and folders of a run: at its end, the most while it was at work, and how many of them per pack."""

    images: int
    left: int
    most: int
    packs: int

    def at(self, images: int, models: int = 1) -> float:
        """What so many images leave: what every run has, five a pack, and the models' files of scores."""
        every_run = self.left - 5 * self.packs
        return every_run + 5 * -(-images // PACK_IMAGES) + models * images / images_of_a_chunk(images, models)


def count(path: Path) -> int:
    """Files and folders under a folder: what a quota counts."""
    return sum(len(folders) + len(files) for _, folders, files in os.walk(path))


def files_of_a_run(path: Path, images: int) -> Files:
    """Process, roll up and score so many images without pixels, and count what is there."""
    config = replace(_runs.CONFIG, classify=replace(_runs.CONFIG.classify, model="stub"))
    steps = Steps(process=_runs.process, model=_runs.load_model, wisdom=_runs.no_wisdom, report=_runs.report)
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            most[0] = max(most[0], count(path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        entries = _runs.entries(*(f"n{i:06d}" for i in range(images)))
        run(entries, path, config=config, cluster="serial", steps=steps, quiet=True)
    finally:
        over.set()
        watcher.join()
    return Files(images, count(path), most[0], len(list((path / "done").glob("*.parquet"))))


def marked_run(path: Path, images: int) -> RunFolder:
    """A run of so many images in packs, of which only the markers are there."""
    names = [f"exposure_{i:08d}_c01" for i in range(images)]
    entries = [ManifestEntry(name, f"/nights/{name}.fits", ("/nights/ref.fits",)) for name in names]
    folder = RunFolder(path)
    freeze(folder, entries, _runs.CONFIG, lambda: "")
    for number, start in enumerate(range(0, images, PACK_IMAGES), 1):
        rows = []
        for i, name in enumerate(names[start : start + PACK_IMAGES]):
            digest = sha256(name.encode()).hexdigest()[:32]
            quality = {"fwhm_new": 3.5 + i, "scorr_hist": list(range(64))}
            receipt = Receipt(name, "done", CANDIDATES, {"read": 0.25, "subtract": 1.5}, 1.5 + i, 300.0, quality)
            marker = Marker(receipt, "c" * 16, digest[:16], digest, software(), {}, digest, digest, now())
            rows.append(marker_row(marker) | {"row": CANDIDATES * i, "chunk": 4 * i})
        table = pa.Table.from_pylist(rows, PACK_SCHEMA)
        pq.write_table(table, folder.pack_marker(f"packed@{number:06d}-00000000"), **PARQUET)
    return folder


def list_done(folder: RunFolder) -> list[Done]:
    """By what every image was done: what a driver looks at when it begins."""
    return list(iter_done(folder))


def cpu_seconds(function: Callable[[RunFolder], object], folder: RunFolder) -> float:
    """CPU time of a call."""
    start = time.process_time()
    function(folder)
    return time.process_time() - start


def main() -> None:
    """Print both."""
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    with TemporaryDirectory() as folder:
        files = files_of_a_run(Path(folder) / "run", images)
        print(f"{files.images} images: {files.left} files and folders at the end, {files.most} at most on the way")
        for models in (1, 5):
            left = files.at(100_000, models)
            print(f"so 100,000 images leave {left:.0f} with {models} models, one per {100_000 / left:.0f} images")
    with TemporaryDirectory() as path:
        for n in (10_000, 100_000):
            folder = marked_run(Path(path) / str(n), n)
            for what in (read_index, list_done, finished_images, gather):
                print(f"{n} images: {what.__name__} {cpu_seconds(what, folder):.2f} CPU-s")


if __name__ == "__main__":
    main()
