"""What the verbs share: arguments, options, how they say something."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from batchproc.config import Config

INTERRUPTED = 130  # as a shell says it: 128 + SIGINT


def complain(message: str) -> None:
    """Say on standard error what went wrong."""
    click.echo(f"batchproc: {message}", err=True)


def example(*lines: str) -> str:
    """An epilog that click leaves as it is."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


class InOrder(click.Group):
    """Verbs in the order in which one needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs as they were added."""
        return list(self.commands)


manifest_argument = click.argument("manifest", type=click.Path(path_type=Path))
run_folder = click.argument("run", type=click.Path(path_type=Path))
out_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The run folder: made, or continued."
)


def where_to_run(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every verb that computes."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="No progress."),
        click.option("--workers", type=click.IntRange(1), help="Processes of a local cluster.  [default: one a core]"),
        click.option(
            "--cluster",
            default="local",
            show_default=True,
            metavar="local|serial|tcp://HOST:PORT",
            help="Where to run; the results are the same.",
        ),
    ):
        verb = option(verb)
    return verb


spread_option = click.option(
    "--spread",
    type=click.Choice(["auto", "images", "tiles"]),
    help="What the workers share out: images, or the tiles of each.  [default: as configured, auto]",
)
report_option = click.option("--no-report", is_flag=True, help="Do not write report.html.")
max_bugs_option = click.option(
    "--max-bugs",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Stop after more than so many images failed by a bug.",
)


def set_up(config: Config | None, cluster: str) -> None:
    """Hold NumPy's and other libraries' threads to the configured number; before they are imported.

    A serial run works in this process, which is ours: then it keeps its memory as a worker does.
    """
    from batchproc.distribute.memory import keep_freed_memory
    from batchproc.distribute.threads import thread_environment

    os.environ.update(thread_environment((config or Config()).threads))
    if cluster == "serial":
        keep_freed_memory()
