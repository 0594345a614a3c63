"""What campaigns take at sizes that no test reaches, reckoned from what was measured at smaller ones.

``python -m tests.benchmarks.sizing [--write]`` prints the tables of docs/scaling.md, or puts them into that page.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from batchproc.distribute.order import images_a_task

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
START, END = "<!-- reckoned: python -m tests.benchmarks.sizing --write -->", "<!-- end of what was reckoned -->"
NODES = (10, 100, 1000)


@dataclass(frozen=True)
class Measured:
    """What was measured on one core; each with the command that measures it (``python -m tests.benchmarks.…``)."""

    cpu_s: float = 4.2  # campaign quadrants: an image with everything, scores too
    candidates: int = 147  # campaign quadrants
    worker_mb: int = 1055  # campaign quadrants
    read_mb: float = 12.1  # campaign quadrants: science image, mask, reference, all compressed
    kb_a_candidate: float = 15.6  # campaign quadrants: stamps, row, score
    start_s: float = 12.0  # campaign inodes: of the driver, until its first image; workers begin meanwhile
    task_ms: float = 7.2  # campaign overhead --unbatched: CPU of driver and scheduler, a task of one image
    image_ms: float = 0.46  # campaign inodes: the same, an image among many in a task
    driver_mb: float = 260.0  # campaign overhead --unbatched: with few images
    driver_kb: float = 0.9  # campaign inodes: an image of the manifest
    resume_ms: float = 0.066  # campaign inodes: until a run is continued, an image
    verify_ms: float = 12.0  # campaign quadrants: an image, all its bytes
    finish_rows: float = 170_000.0  # finishing: catalogue, rows a CPU second
    finish_stamps: float = 3_000.0  # finishing: stamps a CPU second


@dataclass(frozen=True)
class Site:
    """What a cluster is taken to have; nothing of this was measured."""

    cores: int = 32  # a node
    disk_gb: float = 20.0  # that the shared file system reads a second, for all
    creations: float = 20_000.0  # of files and folders a second


#: Files and folders that come and go with an image before it lies in a pack: a marker, a catalogue, a folder of stamps
#: with two files in it, each first under a temporary name.
CREATED = 5
#: And stay: a pack of five for 500 images, and a file of scores for 50.
LEFT = 5 / 500 + 1 / 50
IMAGES_A_RUN = 1_000_000


@dataclass(frozen=True)
class Campaign:
    """A number of images on so many nodes."""

    name: str
    images: int
    nodes: int
    measured: Measured
    site: Site

    @property
    def workers(self) -> int:
        """One a core."""
        return self.nodes * self.site.cores

    @property
    def images_a_task(self) -> int:
        """That go to a worker together."""
        return images_a_task(self.measured.cpu_s, self.workers)

    @property
    def rates(self) -> dict[str, float]:
        """Images a second that each part could take, if it were the only one."""
        m = self.measured
        return {
            "processors": self.workers / m.cpu_s,
            "one driver": 1e3 / (m.task_ms / self.images_a_task + m.image_ms),
            "reading": 1e3 * self.site.disk_gb / m.read_mb,
            "creating files": self.site.creations / CREATED,
        }

    @property
    def drivers(self) -> int:
        """Runs at the same time, so that no driver is busy for more than half of its time."""
        return max(1, math.ceil(2 * self.rates["processors"] / self.rates["one driver"]))

    @property
    def rate(self) -> float:
        """Images a second, with as many drivers as that takes."""
        return min(rate for part, rate in self.rates.items() if part != "one driver")

    @property
    def narrowest(self) -> str:
        """What holds the rest up."""
        return min((rate, part) for part, rate in self.rates.items() if part != "one driver")[1]

    @property
    def seconds(self) -> float:
        """From the first job's start to the last image."""
        return self.measured.start_s + max(self.images / self.rate, self.measured.cpu_s)

    @property
    def runs(self) -> int:
        """Run folders."""
        return max(self.drivers, math.ceil(self.images / IMAGES_A_RUN))


def campaigns(measured: Measured, site: Site) -> list[Campaign]:
    """A night and ten years of 300 nights of the Zwicky Transient Facility."""
    night = 45_000
    sizes = (("a night", night), ("ten years", 10 * 300 * night))
    return [Campaign(name, images, nodes, measured, site) for name, images in sizes for nodes in NODES]


def tables(measured: Measured, site: Site) -> str:
    """All tables of the page."""
    every = campaigns(measured, site)
    night, decade = (next(c for c in every if c.name == name) for name in ("a night", "ten years"))
    m = measured
    what = [
        ("images (tasks)", *(f"{c.images:,}" for c in (night, decade))),
        ("CPU-hours", *(f"{c.images * m.cpu_s / 3600:,.0f}" for c in (night, decade))),
        ("to read", *(size(c.images * m.read_mb * 1e6) for c in (night, decade))),
        ("candidates", *(f"{c.images * m.candidates:.1e}" for c in (night, decade))),
        ("to write", *(size(c.images * m.candidates * m.kb_a_candidate * 1e3) for c in (night, decade))),
        ("files and folders left", *(f"{c.images * LEFT:,.0f}" for c in (night, decade))),
        ("files if images were not packed", *(f"{c.images * CREATED:,}" for c in (night, decade))),
        (
            "run folders, of a million images at most",
            *(str(math.ceil(c.images / IMAGES_A_RUN)) for c in (night, decade)),
        ),
        (
            "memory of a driver",
            *(f"{m.driver_mb + m.driver_kb * min(c.images, IMAGES_A_RUN) / 1e3:,.0f} MB" for c in (night, decade)),
        ),
        (
            "to go on after a kill, before the first image",
            *(f"{m.resume_ms * min(c.images, IMAGES_A_RUN) / 1e3:.1f} s" for c in (night, decade)),
        ),
        ("`verify`, CPU-hours", *(f"{m.verify_ms * c.images / 3.6e6:.2g}" for c in (night, decade))),
        (
            "`finish`: catalogue, CPU-hours",
            *(f"{c.images * m.candidates / m.finish_rows / 3600:.2g}" for c in (night, decade)),
        ),
        (
            "`finish`: stamps, CPU-hours",
            *(f"{c.images * m.candidates / m.finish_stamps / 3600:,.2g}" for c in (night, decade)),
        ),
    ]
    rows = [
        (
            c.name,
            f"{c.nodes:,}",
            f"{c.workers:,}",
            f"{c.rates['processors']:,.0f}",
            str(c.images_a_task),
            f"{c.rates['processors'] / c.rates['one driver']:.0%}",
            str(c.drivers),
            f"{c.rates['processors'] * m.read_mb / 1e3:,.1f} GB",
            f"{c.rates['processors'] * CREATED:,.0f}",
            c.narrowest,
            duration(c.seconds),
        )
        for c in every
    ]
    head = (
        "",
        "nodes",
        "workers",
        "images/s wanted",
        "images a task",
        "load of one driver",
        "drivers",
        "read/s wanted",
        "files made/s wanted",
        "narrowest",
        "takes",
    )
    return "\n\n".join((table(("", "a night", "ten years"), what), table(head, rows)))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """In Markdown, numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def size(n_bytes: float) -> str:
    """'540 GB', '1.6 PB'."""
    power = min(5, int(math.log10(n_bytes) // 3))
    return f"{n_bytes / 1000**power:,.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:.0f} s"


def page_with(text: str, made: str) -> str:
    """The page with its tables anew."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{made}\n\n{END}{rest.partition(END)[2]}"


def main(words: Sequence[str] | None = None) -> None:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sizing", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    for cls in (Measured, Site):
        group = parser.add_argument_group(cls.__name__.lower())
        for item in fields(cls):
            group.add_argument(f"--{item.name.replace('_', '-')}", type=type(item.default), default=item.default)
    given = vars(parser.parse_args(words))
    measured, site = (cls(**{item.name: given[item.name] for item in fields(cls)}) for cls in (Measured, Site))
    made = tables(measured, site)
    if given["write"]:
        PAGE.write_text(page_with(PAGE.read_text(), made))
    else:
        print(made)


if __name__ == "__main__":
    main()
