"""What the verbs share: arguments, options, how they say something."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchproc.config import Config

if TYPE_CHECKING:
    from batchproc.distribute.clusters import Where

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
    """Options of every verb that computes: it is given a `Where`, and whether to be quiet."""

    @functools.wraps(verb)
    def told_where(
        *arguments: Any,
        cluster: str,
        workers: int | None,
        min_jobs: int | None,
        max_jobs: int | None,
        performance_report: Path | None,
        **options: Any,
    ) -> Any:
        from batchproc.distribute.clusters import Where

        where = Where(cluster, workers, min_jobs, max_jobs, performance_report)
        where.check()
        return verb(*arguments, where=where, **options)

    options = (
        click.option("-q", "--quiet", is_flag=True, help="No progress."),
        click.option(
            "--performance-report",
            type=click.Path(path_type=Path),
            metavar="FILE.html",
            help="Have Dask write what its workers did when.",
        ),
        click.option("--max-jobs", type=click.IntRange(1), metavar="N", help="Never more jobs.  [default: profile]"),
        click.option(
            "--min-jobs",
            type=click.IntRange(0),
            metavar="N",
            help="Keep up so many jobs of a profile.  [default: profile]",
        ),
        click.option(
            "--workers",
            type=click.IntRange(1),
            help="Worker processes: of a local cluster, one a core by default; of a profile, those of all its jobs.",
        ),
        click.option(
            "--cluster",
            default="local",
            show_default=True,
            metavar="local|serial|PROFILE|tcp://HOST:PORT|tls://HOST:PORT",
            help="Where to run; the results are the same. PROFILE is the name or path of a site profile (cluster/).",
        ),
    )
    decorated: Callable[..., Any] = told_where
    for option in options:
        decorated = option(decorated)
    return decorated


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


models_option = click.option(
    "--model",
    "models",
    metavar="MODEL",
    required=True,
    multiple=True,
    help="A bundled or added model (`batchproc models list`), or a folder; again for each more.",
)


def device_option(meaning: str, default: str | None = "cpu") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--device``, of verbs that run models."""
    choice = click.Choice(["cpu", "gpu", "edgetpu"])
    return click.option("--device", type=choice, default=default, show_default=default is not None, help=meaning)


def set_up(config: Config | None, where: Where) -> None:
    """Hold NumPy's and other libraries' threads to the configured number; before they are imported.

    A serial run works in this process, which is ours: then it keeps its memory as a worker does.
    """
    from batchproc.distribute.memory import keep_freed_memory
    from batchproc.distribute.threads import thread_environment

    os.environ.update(thread_environment((config or Config()).threads))
    if where.cluster == "serial":
        keep_freed_memory()
