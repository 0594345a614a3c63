"""The benchmark: ``make bench``, or ``python -m tests.benchmarks.performance [--only subtraction,stages] [--write]``.

One run measures everything beside everything else and prints Markdown tables. Each contender has a process of its own,
one thread, and what counts is its least CPU time of a few calls. Rows whose program is not installed say so: the others
come with ``pip install 'batchproc[bench]'`` (``make bench`` does that), and SWarp from the system's packages.

``--write`` puts the tables into docs/performance.md, with the machine and the versions.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.benchmarks import stages
from tests.benchmarks._fresh import run_fresh
from tests.benchmarks.contenders import FLOOR_TRANSFORMS

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- measured: make bench ARGS=--write -->", "<!-- end of what was measured -->"
SIDES = (1024, 2048, 4096, 8192)

#: What a run does: the others' time is told in units of it.
OURS = "batchproc `subtract`, as the flow asks"

#: Name in the table, contender, and how often it is run on each pair (0: left out, for want of time).
SUBTRACTIONS = (
    ("batchproc `subtract`, bare", "subtract", {"plain": 4, "hard": 4}),
    (OURS, "subtract, all on", {"plain": 4, "hard": 4}),
    ("batchproc `zogy`, one frame", "zogy", {"plain": 4, "hard": 4}),
    ("stdpipe `run_zogy`, fits off", "stdpipe", {"plain": 2, "hard": 2}),
    ("sfft, order 0", "sfft", {"plain": 1, "hard": 0}),
)
RESAMPLINGS = (
    ("batchproc, Lanczos 3", "batchproc"),
    ("reproject `interp`, bicubic", "reproject interp"),
    ("reproject `adaptive`", "reproject adaptive"),
    ("SWarp, Lanczos 3", "SWarp"),
)


def subtraction(data: str) -> str:
    """Every subtraction of the same pairs."""
    return "\n\n".join(f"{title}\n\n{_subtractions(data, kind)}" for kind, title in _PAIRS.items())


_PAIRS = {
    "plain": "2048 × 2048, 80 transients, PSFs known and constant:",
    "hard": "The same with 0.15 px of registration jitter, saturated stars that bleed, and dead columns:",
}


def _subtractions(data: str, kind: str) -> str:
    pair = run_fresh("tests.benchmarks._pairs:make_pair", data=data, kind=kind)
    done: dict[str, dict[str, Any]] = {}
    for title, name, repeats in SUBTRACTIONS:
        if repeats[kind]:
            done[title] = _try("contenders", name=name, hard=kind == "hard", repeat=repeats[kind], **pair)
    ours = done[OURS].get("CPU", float("nan"))
    rows = []
    for title, row in done.items():
        if "CPU" not in row:
            rows.append([title, *_why(row), *[""] * 6])
            continue
        floor = FLOOR_TRANSFORMS * row["rfft2"]
        rows.append(
            [
                title,
                f"{row['CPU']:.2f}",
                f"{row['wall']:.2f}",
                f"{row['CPU'] / floor:.2f}",
                f"{row['CPU'] / ours:.1f}",
                f"{row['MB']:.0f}",
                f"{row['found']} of {row['expected']}",
                f"{row['false']}",
            ]
        )
    head = ["", "CPU s", "wall s", "in floors", "in ours", "MB above inputs", "found", "false"]
    return _table(head, rows)


def resampling(data: str) -> str:
    """Every way to another grid."""
    done = {title: _try("resampling", name=name) for title, name in RESAMPLINGS}
    rows = []
    for title, row in done.items():
        if "CPU" not in row:
            rows.append([title, *_why(row), *[""] * 6])
            continue
        memory = "–" if row["MB"] is None else f"{row['MB']:.0f}"
        rows.append(
            [
                title,
                f"{row['CPU'] / row['Mpix']:.3f}",
                f"{row['CPU'] / row['rfft2']:.0f}",
                memory,
                f"{1e3 * row['flux bias']:+.2f}",
                f"{1e3 * row['flux rms']:.2f}",
                f"{1e3 * row['position rms']:.1f}",
                f"{100 * row['wider by']:+.1f}",
            ]
        )
    head = [
        "",
        "CPU s / Mpix",
        "in rfft2",
        "MB above inputs",
        "flux bias ‰",
        "flux rms ‰",
        "position rms mpx",
        "width %",
    ]
    return _table(head, rows)


def chain(data: str) -> str:
    """Every stage of one image, from files to files."""
    shape = list(stages.SHAPE)
    entry = run_fresh("tests.benchmarks.stages:prepare", data=data, shape=shape)
    return stages.table(run_fresh("tests.benchmarks.stages:measure", entry=entry, repeat=3))


def scaling(data: str) -> str:
    """The subtraction from 1k² to 8k²."""
    pair = run_fresh("tests.benchmarks._pairs:make_pair", data=data, kind="plain", side=1024)
    rows, first = [], 0.0
    for side in SIDES:
        row = run_fresh("tests.benchmarks.scaling:measure", side=side, repeat=4 if side < 4096 else 2, **pair)
        first = first or row["CPU per Mpix"]
        rows.append(
            [
                f"{side}²",
                f"{row['CPU per Mpix']:.3f}",
                f"{row['floors']:.2f}",
                f"{row['CPU per Mpix'] / first:.2f}",
                f"{row['MB']:.0f}",
                f"{row['MB'] / row['Mpix']:.1f}",
            ]
        )
    head = ["image", "CPU s / Mpix", "in floors", "against 1024²", "MB above inputs", "bytes a pixel"]
    return _table(head, rows)


SECTIONS: dict[str, tuple[str, Callable[[str], str]]] = {
    "subtraction": ("Subtraction", subtraction),
    "resampling": ("Resampling", resampling),
    "stages": ("The stages of one image", chain),
    "scaling": ("The subtraction by size of the image", scaling),
}


def _try(module: str, **arguments: Any) -> dict[str, Any]:
    """A row, or why there is none: one program that fails does not cost the others' rows."""
    try:
        return run_fresh(f"tests.benchmarks.{module}:measure", **arguments)
    except RuntimeError as error:
        return {"failed": str(error)}


def _why(row: dict[str, Any]) -> list[str]:
    return [f"not installed ({row['absent']})" if "absent" in row else f"failed: {row['failed']}"]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """The processor, Python, and what the numbers depend on, in a sentence."""
    packages = ("batchproc", "numpy", "scipy", "numba", "pyfftw", "sep", "astropy", "stdpipe", "sfft", "reproject")
    return f"{_processor()}; Python {platform.python_version()}, {', '.join(_versions(packages))}."


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions(packages: tuple[str, ...]) -> Iterator[str]:
    for name in packages:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield f"no {name}"


def write(text: str, page: Path = PAGE) -> None:
    """Put the tables between the page's markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{page} lacks the lines {BEGIN} and {END}, between which the tables go")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument(
        "--data", type=Path, default=Path(tempfile.gettempdir()) / "batchproc-bench", help="files are kept"
    )
    options = parser.parse_args(arguments)
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"--only {','.join(sorted(unknown))}: known are {','.join(SECTIONS)}")
    if options.write and set(chosen) != set(SECTIONS):
        parser.error("--write needs every table: they are of one run")
    start = time.monotonic()
    parts = [f"Measured on {machine()}"]
    print(parts[0], flush=True)
    for name in chosen:
        title, section = SECTIONS[name]
        parts.append(f"### {title}\n\n{section(str(options.data.resolve()))}")
        print(f"\n{parts[-1]}", flush=True)
    print(f"\n{time.monotonic() - start:.0f} s in all", file=sys.stderr)
    if options.write:
        write("\n\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
