"""What finishing a run costs: rows and bytes a second and core, memory of a worker, files.

::

    python -m tests.benchmarks.finishing --images 1000 --rows 1000            # the catalogue: 10^6 rows
    python -m tests.benchmarks.finishing --images 400 --rows 60 --size 63     # stamps of the usual size

Makes a run of made-up candidates (left in --folder, used again), then each product serially in a process of its own.
CPU seconds are those of the process; its memory is what it holds beyond what it held when the run had been opened.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil

from batchproc.config import Config
from batchproc.distribute.clusters import Where
from batchproc.finish import PRODUCTS, finish
from batchproc.finish import work as steps
from batchproc.io.catalogue import write_scores
from batchproc.io.freeze import freeze
from batchproc.io.packs import plan_roll_ups, roll_up
from batchproc.io.run_folder import RunFolder
from batchproc.io.store import store_image
from batchproc.records import ManifestEntry
from tests import _runs


def entries(n: int) -> list[ManifestEntry]:
    """Sixteen CCDs an exposure."""
    return [
        ManifestEntry(
            f"e{i // 16:06d}-c{i % 16:02d}", f"/n/{i}.fits", ("/n/r.fits",), exposure_id=f"e{i // 16}", ccd=str(i % 16)
        )
        for i in range(n)
    ]


def make(path: Path, images: int, rows: int, size: int, fields: int) -> None:
    """A finished run, rolled up: exposures all over the sky, stamps of rounded noise."""
    folder = RunFolder(path)
    config = Config.from_dict({"cutouts": {"size": size}, "classify": {"model": ""}})
    freeze(folder, entries(images), config, lambda: "")
    rng = np.random.default_rng(1)
    noise = np.round(rng.normal(size=(rows, 3, size, size)) * 16).astype(np.float32) / 16
    folder.scores_of("stub").mkdir(parents=True)
    chunk: list[tuple[str, np.ndarray]] = []
    for i, entry in enumerate(entries(images)):
        made = _runs.result(entry.image_id, rows, 9)
        centre = np.random.default_rng(i // 16 % fields)
        columns = made.catalogue
        columns["ra"] = (centre.uniform(0, 360) + rng.uniform(-3, 3, rows)) % 360
        columns["dec"] = np.clip(np.degrees(np.arcsin(centre.uniform(-0.5, 1))) + rng.uniform(-3, 3, rows), -90, 90)
        store_image(folder, entry, columns, np.roll(noise, i, axis=0), made.receipt, config.image_digest)
        chunk.append((entry.image_id, columns["candidate_id"]))
        if len(chunk) == 50 or i == images - 1:
            names = np.repeat([name for name, _ in chunk], rows).astype(object)
            scores = rng.uniform(size=len(names)).astype(np.float32)
            path = folder.scores_of("stub") / f"{i:06d}.parquet"
            write_scores(path, names, np.concatenate([ids for _, ids in chunk]), scores, _runs.Model("stub"))
            chunk = []
    for number, plan in enumerate(plan_roll_ups(folder)):
        roll_up(folder, number + 1, plan.image_ids, plan.packs)


def measure(path: Path, product: str, send) -> None:
    """Make a product, step by step; sends what each cost."""
    process = psutil.Process()
    steps_of: list[tuple[str, int, float, float, float]] = []
    real = steps.Workshop.step
    before = peak = 0

    def watched(self, function, job, items, what):
        nonlocal before, peak
        stop = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not stop.wait(0.005):
                peak = max(peak, process.memory_info().rss)

        before = before or process.memory_info().rss
        peak, cpu, clock = before, time.process_time(), time.perf_counter()
        thread = threading.Thread(target=watch)
        thread.start()
        real(self, function, job, items, what)
        stop.set()
        thread.join()
        took = time.process_time() - cpu, time.perf_counter() - clock
        steps_of.append((what, len(items), *took, (peak - before) / 1e6))

    steps.Workshop.step = watched
    (made,) = finish(path, only=[product], where=Where("serial"), quiet=True)
    send.send((made, steps_of, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--size", type=int, default=9)
    parser.add_argument("--fields", type=int, default=10**6, help="places on the sky: few of them fill partitions")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    path = given.folder or Path(tempfile.mkdtemp()) / "run"
    context = get_context("spawn")
    if not path.exists():
        maker = context.Process(target=make, args=(path, given.images, given.rows, given.size, given.fields))
        maker.start()
        maker.join()
    for product in PRODUCTS:
        here, there = context.Pipe()
        worker = context.Process(target=measure, args=(path, product, there))
        worker.start()
        made, steps_of, most = here.recv()
        worker.join()
        cpu = sum(step[2] for step in steps_of)
        mb = made.rows * 12 * given.size**2 / 1e6 if product == "stamps" else made.bytes / 1e6
        print(f"{product}: {made.rows} rows, {made.bytes / 1e6:.0f} MB in {made.files} files; {cpu:.1f} CPU s, ")
        print(f"    {made.rows / cpu:.0f} rows and {mb / cpu:.0f} MB a CPU second; process at most {most:.0f} MB")
        for what, n, seconds, wall, memory in steps_of:
            print(f"    {what:16s} {n:5d} tasks {seconds:7.2f} CPU s {wall:7.2f} s, {memory:6.0f} MB")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
