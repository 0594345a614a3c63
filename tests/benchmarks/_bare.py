"""The same images through a campaign and through bare processes, on one worker and on two.

Every leg is warmed up on images of its own and then timed from the first image to the last. A bare process calls in a
loop what a task calls. Legs follow each other and rounds repeat them, so that what else the machine does meets all of
them; medians over the rounds are what counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from batchproc.config import Config
from batchproc.distribute.threads import thread_environment
from batchproc.io.manifest import read_manifest
from batchproc.records import ManifestEntry

CONFIG = Config.from_dict({"classify": {"model": ""}})
_DISTINCT = 4  # images that are simulated; a leg does them again and again under other names
_WARM = 4  # images a worker before the clock starts
_FRESH = (sys.executable, "-W", "ignore", "-m", "tests.benchmarks._fresh")


@dataclass(frozen=True)
class Leg:
    """One way through the images.

    Attributes
    ----------
    seconds : float
        Wall clock, all images.
    work, storing, dask : float
        CPU seconds: of `batchproc.flow.process_image`; of the rest of the tasks, which is storing; of all else, which
        for bare processes is nothing.
    """

    seconds: float
    work: float
    storing: float
    dask: float


@dataclass(frozen=True)
class Round:
    """All legs, one after the other."""

    bare_1: Leg
    bare_2: Leg
    dask_1: Leg
    dask_2: Leg

    @property
    def gain(self) -> float:
        """1 → 2 workers of a campaign over 1 → 2 bare processes."""
        return (self.dask_1.seconds / self.dask_2.seconds) / (self.bare_1.seconds / self.bare_2.seconds)

    @property
    def against_bare(self) -> float:
        """Images a second of two workers over those of two bare processes."""
        return self.bare_2.seconds / self.dask_2.seconds


@dataclass(frozen=True)
class Comparison:
    """Medians over the rounds."""

    rounds: tuple[Round, ...]

    @property
    def gain(self) -> float:
        """See `Round.gain`."""
        return median(one.gain for one in self.rounds)

    @property
    def against_bare(self) -> float:
        """See `Round.against_bare`."""
        return median(one.against_bare for one in self.rounds)

    def cost(self, workers: int) -> float:
        """CPU of everything that is neither the image's work nor its storing, over that of the work."""
        legs = [one.dask_1 if workers == 1 else one.dask_2 for one in self.rounds]
        return median(leg.dask / leg.work for leg in legs)

    def storing(self) -> float:
        """CPU of storing over that of the work."""
        return median(one.dask_2.storing / one.dask_2.work for one in self.rounds)

    def cpu_against_bare(self) -> float:
        """CPU of all processes of a campaign on two workers over that of two bare processes."""
        return median(
            (one.dask_2.work + one.dask_2.storing + one.dask_2.dask) / (one.bare_2.work + one.bare_2.storing)
            for one in self.rounds
        )


def compare(scratch: Path, *, images: int = 24, size: int = 1024, rounds: int = 5, echo: bool = False) -> Comparison:
    """Run all legs so many times.

    Parameters
    ----------
    scratch : Path
        An empty folder.
    images, size : int
        Images a leg, an even number; pixels of a side.
    rounds : int
    """
    from batchproc.io.night import simulate_night

    manifest = str(simulate_night(scratch / "night", n_images=_DISTINCT, size=size, n_transients=20))
    done = []
    for number in range(rounds):
        legs = {}
        for how in ("bare_1", "dask_1", "bare_2", "dask_2"):
            kind, _, workers = how.partition("_")
            out = str(scratch / f"{number}-{how}")
            leg = _bare if kind == "bare" else _dask
            legs[how] = leg(manifest=manifest, out=out, images=images, workers=int(workers))
        done.append(Round(**legs))
        if echo:
            _tell(done[-1])
    return Comparison(tuple(done))


def _tell(one: Round) -> None:
    for name, leg in vars(one).items():
        print(f"  {name} {leg.seconds:.2f} s, CPU {leg.work:.2f} + {leg.storing:.2f} + {leg.dask:.2f}", end="")
    print(f"; gain {one.gain:.3f}, against bare {one.against_bare:.3f}", flush=True)


def entries_of(manifest: str, images: int, name: str) -> list[ManifestEntry]:
    """So many images under names of their own."""
    given = read_manifest(manifest)
    return [replace(given[i % len(given)], image_id=f"{name}-{i:04d}") for i in range(images)]


def timed(entry: ManifestEntry, config: Config) -> Any:
    """What a campaign calls an image's work, with the CPU time of it in the receipt."""
    from batchproc.flow import process_image

    start = time.thread_time()
    result = process_image(entry, config)
    quality = {**result.receipt.quality, "work_cpu": time.thread_time() - start}
    return replace(result, receipt=replace(result.receipt, quality=quality))


# ---- bare processes


def _bare(manifest: str, out: str, images: int, workers: int) -> Leg:
    share = images // workers
    processes = []
    for worker in range(workers):
        arguments = {"manifest": manifest, "out": f"{out}-{worker}", "images": share}
        command = [*_FRESH, "tests.benchmarks._bare:loop", json.dumps(arguments)]
        processes.append(
            subprocess.Popen(
                command,
                cwd=Path(__file__).parents[2],
                env=os.environ | thread_environment(1),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:  # until all are warm
        while process.stdout.readline().strip() != "warm":
            if process.poll() is not None:
                raise RuntimeError("a bare process ended before it began")
    start = time.perf_counter()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    seconds = max(one["end"] for one in said) - start
    work, cpu = (sum(one[key] for one in said) for key in ("work", "cpu"))
    return Leg(seconds, work, cpu - work, 0.0)


def loop(manifest: str, out: str, images: int) -> dict[str, float]:
    """A bare process: what a task calls, in a loop."""
    from batchproc.distribute.tasks import Job, process_image
    from batchproc.distribute.threads import limit_threads

    folder = _begin(out)
    job = Job(str(folder.path), folder.identity())
    do = partial(process_image, job, timed)
    for entry in entries_of(manifest, _WARM, "warm"):
        do(entry)
    limit_threads(1)
    print("warm", flush=True)
    sys.stdin.readline()
    cpu = time.process_time()
    ids = []
    for entry in entries_of(manifest, images, "image"):
        receipt = do(entry)
        assert receipt.status == "done", receipt
        ids.append(entry.image_id)
    end, cpu = time.perf_counter(), time.process_time() - cpu
    return {"end": end, "cpu": cpu, "work": _work(folder, ids)}


# ---- campaigns


def _dask(manifest: str, out: str, images: int, workers: int) -> Leg:
    from tests.benchmarks._fresh import run_fresh

    return Leg(**run_fresh("tests.benchmarks._bare:drive", manifest=manifest, out=out, images=images, workers=workers))


def drive(manifest: str, out: str, images: int, workers: int) -> dict[str, float]:
    """A driver with a local cluster."""
    from batchproc.distribute.campaign import process_images
    from batchproc.distribute.clusters import Where, open_executor
    from batchproc.io.events import EventLog

    folder = _begin(out)

    def campaign(entries: list[ManifestEntry]) -> None:
        with EventLog(folder) as events:
            for receipt in process_images(folder, entries, executor, process=timed, events=events):
                assert receipt.status == "done", receipt

    with open_executor(Where("local", workers)) as executor:
        campaign(entries_of(manifest, _WARM * workers, "warm"))
        entries = entries_of(manifest, images, "image")
        before, own = executor.client.run(thread_cpu), time.process_time()
        start = time.perf_counter()
        campaign(entries)
        seconds, own = time.perf_counter() - start, time.process_time() - own
        after = executor.client.run(thread_cpu)
    cpu = {kind: sum(after[w][kind] - before[w][kind] for w in after) for kind in ("task", "dask")}
    work = _work(folder, [entry.image_id for entry in entries])
    return {"seconds": seconds, "work": work, "storing": cpu["task"] - work, "dask": own + cpu["dask"]}


def thread_cpu() -> dict[str, float]:
    """CPU seconds of this worker's threads: those that do tasks (and what libraries run for them), and Dask's own."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    cpu = {"task": 0.0, "dask": 0.0}
    for folder in Path("/proc/self/task").iterdir():
        seconds = int((folder / "schedstat").read_text().split()[0]) / 1e9
        name = names.get(int(folder.name), "")
        dasks = name in ("MainThread", "Profile", "IO loop") or name.startswith(("Dask-Offload", "Dask-Callback"))
        cpu["dask" if dasks else "task"] += seconds
    return cpu


def _begin(out: str) -> Any:
    from batchproc.imaging.fft import frozen_wisdom
    from batchproc.io.freeze import freeze
    from batchproc.io.run_folder import RunFolder

    folder = RunFolder(Path(out))
    freeze(folder, [ManifestEntry("any", "/any.fits", ("/any.fits",))], CONFIG, frozen_wisdom)
    return folder


def _work(folder: Any, image_ids: list[str]) -> float:
    from batchproc.io.markers import read_marker

    return sum(read_marker(folder.marker(image_id))[0].receipt.quality["work_cpu"] for image_id in image_ids)
