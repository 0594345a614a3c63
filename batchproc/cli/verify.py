"""``batchproc verify``: whether a run is what it says it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchproc.cli.common import example, run_folder
from batchproc.display import show

if TYPE_CHECKING:
    from batchproc.io.run_folder import RunFolder
    from batchproc.io.verify import Problem

_SHOWN = 50  # problems in words; --json has all of them


@click.command(
    epilog=example(
        "batchproc verify RUN --quick",
        "batchproc verify RUN --repair",
        "batchproc run RUN/manifest.parquet --out RUN",
    )
)
@run_folder
@click.option("--quick", is_flag=True, help="Only whether files are there and whole; results are not read.")
@click.option("--inputs", is_flag=True, help="Also whether the images that went in have changed since, or are gone.")
@click.option(
    "--repair",
    is_flag=True,
    help="Make exactly those images missing again whose results do not hold (with --inputs: or whose files changed), "
    "for `batchproc run` to do.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def verify(run: Path, quick: bool, inputs: bool, repair: bool, as_json: bool, quiet: bool) -> int:
    """Find what is torn, missing, altered, orphaned or doubled in a run; a run at work may be looked at too.

    Everything is read and held against the digests in the markers. Exit code 0: all is as it was written; 1: something
    is not (with --repair: was not).
    """
    from batchproc.io.freeze import complete_change
    from batchproc.io.run_folder import RunFolder
    from batchproc.io.verify import again, mend, wrong_images

    folder = RunFolder.existing(run)
    with folder.locked() if repair else nullcontext():
        if repair:
            complete_change(folder)
        images, problems = _look(folder, quick, inputs, quiet)
        if repair:
            mend(folder, problems)
    wrong, command = wrong_images(problems), again(folder)
    if as_json:
        told = {
            "run": str(run),
            "images": images,
            "problems": [asdict(problem) for problem in problems],
            "wrong_images": sorted(wrong),
            "repaired": repair,
            "command": command,
        }
        click.echo(json.dumps(told, indent=2))
    else:
        click.echo("\n".join(_tell(images, problems, wrong, repair, str(run), command)))
    return int(bool(problems))


def _look(folder: RunFolder, quick: bool, inputs: bool, quiet: bool) -> tuple[int, list[Problem]]:
    """How many finished images there are, and what is wrong with the run."""
    from batchproc.io.verify import check_run, count_done

    problems: list[Problem] = []
    images = 0

    def note() -> str:
        return f"{len(problems)} problems" if problems else ""

    def looked_at() -> Iterator[int]:
        for checked in check_run(folder, quick=quick, inputs=inputs):
            problems.extend(checked.problems)
            if checked.images:
                yield checked.images

    for n in show(looked_at(), count_done(folder), "images", count=int, note=note, quiet=quiet):
        images += n
    return images, problems


def _tell(images: int, problems: list[Problem], wrong: set[str], repaired: bool, run: str, command: str) -> list[str]:
    """What a person is told."""
    lines = [str(problem) for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"… and {len(problems) - _SHOWN} more; --json lists all")
    kinds = Counter(problem.kind for problem in problems)
    found = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()) or "all is as it was written"
    lines.append(f"{images} finished images looked at: {found}")
    if wrong and repaired:
        lines.append(f"images that are missing now: {len(wrong)}; `{command}` does them")
    elif wrong:
        lines.append(
            f"images whose results do not hold: {len(wrong)}; `batchproc verify {run} --repair` makes them missing, "
            f"then `{command}` does them"
        )
    return lines
