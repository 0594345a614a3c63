"""``batchproc submit``: a run whose driver is a job as well."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from batchproc.cli.common import example
from batchproc.cli.running import run as run_verb

_OWN = ("cluster", "dry_run", "quiet")  # of `run`'s options


def _options_of_run(context: click.Context) -> list[str]:
    """What was given of the options of `run`, as it would be given there."""
    words: list[str] = []
    for option in run_verb.params:
        if not isinstance(option, click.Option) or option.name in (*_OWN, "out"):
            continue
        if context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE:
            value = context.params[option.name or ""]
            words += [option.opts[-1]] if option.is_flag else [option.opts[-1], str(value)]
    return words


def _submit(manifest: Path, out: Path, profile: str, dry_run: bool, **options: object) -> int:
    """Put a run on a queue: its driver is a job that submits the workers' jobs, and itself again until all is done.

    Takes the options of `batchproc run`. Given again, it goes on with a run that was stopped.
    """
    from batchproc.config import Config
    from batchproc.io.manifest import read_manifest
    from batchproc.submit import prepare

    if options.get("config"):
        Config.from_toml(str(options["config"]))
    read_manifest(manifest)  # better now than in the job
    submission, workers = prepare(manifest, out, profile, _options_of_run(click.get_current_context()))
    if dry_run:
        click.echo(f"# ---- the driver's job\n{submission.script}")
        click.echo(f"# which runs\n# {' '.join(submission.command)}\n")
        click.echo(f"# ---- each job of workers\n{workers}")
        return 0
    submission = submission.hand_in()
    click.echo(f"job {submission.job} ({submission.name}) drives the run, and submits itself again until it is done")
    click.echo(f"  watch: batchproc status {out}")
    click.echo(f"         {submission.run}/log/jobs: what the jobs say, in the driver's how to see the live page")
    click.echo(f"  stop:  {submission.stop_command()}")
    return 0


submit = click.Command(
    "submit",
    callback=_submit,
    help=_submit.__doc__,
    params=[
        *(p for p in run_verb.params if p.name in ("manifest", "out")),
        click.Option(["--profile"], required=True, metavar="SITE", help="Name or path of a site profile (cluster/)."),
        click.Option(["--dry-run"], is_flag=True, help="Print every script and submit nothing."),
        *(p for p in run_verb.params if p.name not in (*_OWN, "manifest", "out")),
    ],
    epilog=example(
        "batchproc submit night.csv --out RUN --profile slurm --dry-run",
        "batchproc submit night.csv --out RUN --profile slurm --max-jobs 50",
    ),
)
