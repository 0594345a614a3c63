"""What campaigns cost: ``python -m tests.benchmarks.campaign COMMAND --help``."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from tests.benchmarks import _bare, _left_behind, _overhead
from tests.benchmarks._fresh import run_fresh


def overhead(arguments: argparse.Namespace) -> None:
    """CPU time an image beside its work, and memory, of a campaign without pixels."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as out:
        found = _overhead.measure(
            arguments.images,
            Path(out),
            stored=not arguments.nothing_stored,
            batched=not arguments.unbatched,
            workers=arguments.workers,
        )
    _tell(found)


def inodes(arguments: argparse.Namespace) -> None:
    """What a run leaves on the disk, and how long it takes to look at it, to open it, and to go on with it."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as out:
        images, run = arguments.images, Path(out) / "run"
        found = _overhead.measure(images, Path(out), planned=images + images // 100, workers=arguments.workers)
        _tell(found)
        left = _left_behind.count(run)
        print(f"left behind: {left.files} files and folders, one for {images / left.files:.0f} images")
        for kind, n in left.inodes.most_common():
            print(f"  {kind:14} {n:7} {left.size[kind] / 1e6:10.1f} MB {left.size[kind] / images:8.0f} bytes an image")
        for way, cost in _left_behind.times(run).items():
            print(f"{way:10} {cost['seconds']:.2f} s, CPU {cost['cpu']:.2f} s, {cost['MB']:.0f} MB")
        resumed = run_fresh(
            "tests.benchmarks._left_behind:resume", run=str(run), manifest=str(Path(out) / "manifest.parquet")
        )
        print("resume:", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in resumed.items()))
        print(f"left behind after that: {_left_behind.count(run).files} files and folders")


def two_workers(arguments: argparse.Namespace) -> None:
    """What two workers gain, beside what two bare processes gain, and what Dask takes for itself."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as out:
        found = _bare.compare(
            Path(out), images=arguments.images, size=arguments.size, rounds=arguments.rounds, echo=True
        )
    print(f"medians of {len(found.rounds)} rounds, {arguments.images} images of {arguments.size}² pixels:")
    print(f"1 → 2 workers over 1 → 2 bare processes: {found.gain:.3f}")
    print(f"images a second of two workers over two bare processes: {found.against_bare:.3f}")
    print(f"CPU of a campaign over that of bare processes, two workers: {found.cpu_against_bare():.3f}")
    print(f"Dask's own CPU over the work: one worker {found.cost(1):.2%}, two workers {found.cost(2):.2%}")
    print(f"storing over the work: {found.storing():.2%}")


def quadrants(arguments: argparse.Namespace) -> None:
    """What images as large as ZTF's take in a run with scores on one worker: CPU, memory, bytes in and out."""
    from batchproc import job
    from batchproc.io.run_folder import RunFolder
    from batchproc.io.verify import check_run
    from tests.benchmarks._quadrant import quadrant

    with tempfile.TemporaryDirectory(dir=arguments.scratch) as out:
        one = quadrant(Path(out))
        entries = [replace(one, image_id=f"quadrant{n}") for n in range(arguments.images)]
        read = sum(Path(name).stat().st_size for name in (one.new, *one.ref, one.new_mask))
        status = job.run(entries, Path(out) / "run", workers=1, report=False, quiet=True).status
        receipts = pq.read_table(Path(out) / "run" / "receipts.parquet", columns=["peak_memory_mb"])
        left = _left_behind.count(Path(out) / "run")
        start = time.process_time()
        wrong = [problem for image in check_run(RunFolder(Path(out) / "run")) for problem in image.problems]
        verify = time.process_time() - start
    assert not wrong, wrong
    n, cpu = status.n_candidates, 3600 * status.cpu_hours / status.done
    peak = max(receipts["peak_memory_mb"].to_pylist())
    print(f"{status.done} images: {cpu:.2f} CPU s an image, {n / status.done:.0f} candidates")
    print(f"memory of the worker: {peak:.0f} MB; to read {read / 1e6:.1f} MB an image")
    print(f"verify: {1e3 * verify / status.done:.2f} CPU ms an image")
    for kind in ("stamps", "catalogue", "scores"):
        print(f"{kind}: {left.size[kind] / n / 1e3:.2f} kB a candidate")


def _tell(found: _overhead.Overhead) -> None:
    print(f"{found.images} images in {found.tasks} tasks, {found.seconds:.0f} s")
    print(
        f"CPU ms an image: driver and scheduler {found.driver_ms:.3f}, workers beside the tasks {found.worker_ms:.3f}, "
        f"together {found.overhead_ms:.3f}; the tasks {found.task_ms:.2f}, packing {found.pack_ms:.2f}"
    )
    print(f"CPU s before the first image: {found.start_cpu:.1f}")
    for name in ("driver", "worker"):
        memory = getattr(found, name)
        print(f"memory of the {name}: peak {memory.peak:.0f} MB, growth {memory.growth():+.1f} MB")
        step = max(1, len(memory.mb) // 12)
        samples = list(zip(memory.seconds, memory.mb, strict=True))[::step]
        print("  " + ", ".join(f"{seconds:.0f} s {mb:.0f}" for seconds, mb in samples))


def main(words: Sequence[str] | None = None) -> None:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.campaign", description=__doc__)
    parser.add_argument("--scratch", help="folder for what is written; by default that of temporary files")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("overhead", help=overhead.__doc__)
    command.add_argument("--images", type=int, default=100_000)
    command.add_argument("--workers", type=int, default=2)
    command.add_argument("--unbatched", action="store_true", help="a task an image")
    command.add_argument("--nothing-stored", action="store_true", help="without files, markers and packs")
    command.set_defaults(work=overhead)
    command = commands.add_parser("inodes", help=inodes.__doc__)
    command.add_argument("--images", type=int, default=100_000)
    command.add_argument("--workers", type=int, default=2)
    command.set_defaults(work=inodes)
    command = commands.add_parser("two-workers", help=two_workers.__doc__)
    command.add_argument("--images", type=int, default=24)
    command.add_argument("--size", type=int, default=1024, help="pixels of a side")
    command.add_argument("--rounds", type=int, default=5)
    command.set_defaults(work=two_workers)
    command = commands.add_parser("quadrants", help=quadrants.__doc__)
    command.add_argument("--images", type=int, default=8)
    command.set_defaults(work=quadrants)
    arguments = parser.parse_args(words)
    arguments.work(arguments)


if __name__ == "__main__":
    main()
