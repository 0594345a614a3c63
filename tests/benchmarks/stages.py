"""What each stage of one image costs: ``python -m tests.benchmarks.stages [--shape 3080x3072] [--goto] [--profile]``.

One process, one thread, the work of a run's task: files are read, subtracted, and catalogue and stamps written; no
classification. The first image of the process is "cold"; after it the same image is done again, and of each stage the
fewest CPU seconds of these count ("warm"): on a shared machine the load of others only ever adds.

The unit "rfft2" is one float32 real transform of as many pixels as the image has, measured in the same process
(2048 × 2048, scaled by the number of pixels).
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.benchmarks._fresh import Peak, rfft2_seconds, run_fresh
from tests.benchmarks._quadrant import SHAPE, as_entry, entry_arguments, quadrant

STAGES = ("read", "align", "background", "psf", "photometry", "subtract", "detect", "cutouts", "other", "write")


def measure(entry: dict[str, Any], *, repeat: int = 2, profile: int = 0) -> dict[str, Any]:
    """CPU seconds of each stage, cold and warm, the unit, and the peak memory; call it in a fresh process.

    Parameters
    ----------
    entry : dict
        Of a `ManifestEntry`.
    repeat : int
        Warm repetitions.
    profile : int
        Print so many of the most expensive functions of one more warm call to standard error.
    """
    import numpy as np

    from batchproc import flow
    from batchproc.config import Config
    from batchproc.distribute.tasks import Job, process_image
    from batchproc.io.freeze import freeze
    from batchproc.io.run_folder import RunFolder
    from batchproc.job import Steps

    seen: dict[str, float] = {}  # CPU seconds of each step of the flow
    whole: dict[str, float] = {}  # of the flow in all
    shape: list[tuple[int, ...]] = []

    def timed(task: Any, config: Config) -> flow.ImageResult:
        start = time.process_time()
        result = flow.process_image(task, config)
        whole["flow"] = time.process_time() - start
        shape[:] = [result.new.shape]
        return result

    with tempfile.TemporaryDirectory() as scratch, patch.object(flow, "Clock", _cpu_clock(flow.Clock, seen)):
        folder = RunFolder(Path(scratch) / "run")
        config = Config()
        freeze(folder, [as_entry(entry)], config, lambda: Steps().wisdom(config))
        job = Job(str(folder.path), folder.identity())

        def once() -> dict[str, float]:
            seen.clear()
            start = time.process_time()
            receipt = process_image(job, timed, as_entry(entry))
            total = time.process_time() - start
            if receipt.status != "done":
                raise RuntimeError(f"{receipt.error}: {receipt.message}{receipt.traceback}")
            stages = dict(seen)
            stages["other"] = whole["flow"] - sum(stages.values())
            stages["write"] = total - whole["flow"]
            return stages | {"total": total, "candidates": receipt.n_candidates}

        peak = Peak()
        cold = once()
        warm = [once() for _ in range(repeat)]
        peak_mb, above_mb = peak.total_mb(), peak.above_start_mb()
        if profile:
            _print_profile(once, profile)
        return {
            "cold": cold,
            "warm": {key: min(run[key] for run in warm) for key in warm[0]},
            "rfft2 per Mpix": rfft2_seconds() / (2048**2 / 1e6),
            "Mpix": float(np.prod(shape[0])) / 1e6,
            "peak MB": peak_mb,
            "peak MB above start": above_mb,
        }


def _cpu_clock(clock: Any, seconds: dict[str, float]) -> Any:
    """The flow's clock, which counts wall seconds, made to add up CPU seconds in a dictionary as well."""

    class CpuClock(clock):
        @contextmanager
        def __call__(self, step: str) -> Iterator[None]:
            start = time.process_time()
            try:
                with super().__call__(step):
                    yield
            finally:
                seconds[step] = seconds.get(step, 0.0) + time.process_time() - start

    return CpuClock


def _print_profile(once: Any, n: int) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    once()
    profiler.disable()
    for order in ("tottime", "cumulative"):
        pstats.Stats(profiler, stream=sys.stderr).sort_stats(order).print_stats(n)


def table(numbers: dict[str, Any]) -> str:
    """The stages as a Markdown table."""
    warm, cold, mpix, unit = numbers["warm"], numbers["cold"], numbers["Mpix"], numbers["rfft2 per Mpix"]
    lines = [
        "| stage | CPU s | CPU s / Mpix | in rfft2 | share | cold, CPU s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    total = sum(warm.get(stage, 0.0) for stage in STAGES)
    for stage in (*STAGES, "total"):
        seconds = total if stage == "total" else warm.get(stage, 0.0)
        lines.append(
            f"| {stage} | {seconds:.3f} | {seconds / mpix:.4f} | {seconds / mpix / unit:.1f} "
            f"| {seconds / total:.0%} | {cold.get(stage, 0.0):.2f} |"
        )
    lines += [
        "",
        f"{mpix:.2f} Mpix, {warm['candidates']:.0f} candidates; one rfft2 is {1e3 * unit:.2f} ms a Mpix; peak memory "
        f"{numbers['peak MB']:.0f} MB, {numbers['peak MB above start']:.0f} MB of it above the imported libraries.",
    ]
    return "\n".join(lines)


def goto_entry() -> dict[str, Any]:
    """The real pair of the test data."""
    if "BATCHPROC_TEST_DATA" not in os.environ:
        raise SystemExit("set BATCHPROC_TEST_DATA to the folder that holds images/goto (epoch1.fits, epoch2.fits)")
    folder = Path(os.environ["BATCHPROC_TEST_DATA"]) / "images" / "goto"
    return {"image_id": "goto", "new": str(folder / "epoch2.fits"), "ref": [str(folder / "epoch1.fits")]}


def prepare(data: str, shape: list[int]) -> dict[str, Any]:
    """Make the simulated quadrant if it is not there; in a process of its own, for the sake of memory."""
    return entry_arguments(quadrant(Path(data), (shape[0], shape[1])))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=f"{SHAPE[0]}x{SHAPE[1]}", help="rows x columns of the simulated quadrant")
    parser.add_argument("--goto", action="store_true", help="the real pair of BATCHPROC_TEST_DATA instead")
    parser.add_argument(
        "--data", type=Path, default=Path(tempfile.gettempdir()) / "batchproc-bench", help="files are kept"
    )
    parser.add_argument("--repeat", type=int, default=2, help="warm repetitions, of which the best counts")
    parser.add_argument("--profile", nargs="?", type=int, const=25, default=0, help="and the most expensive functions")
    options = parser.parse_args(arguments)
    if options.goto:
        entry = goto_entry()
    else:
        shape = [int(side) for side in options.shape.split("x")]
        entry = run_fresh("tests.benchmarks.stages:prepare", data=str(options.data.resolve()), shape=shape)
    numbers = run_fresh(
        "tests.benchmarks.stages:measure", echo=True, entry=entry, repeat=options.repeat, profile=options.profile
    )
    print(table(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
