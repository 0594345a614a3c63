"""``batchproc manifest``: tables of images and their references."""

from __future__ import annotations

from pathlib import Path

import click

from batchproc.cli.common import InOrder, example, manifest_argument
from batchproc.errors import ManifestError


class _ManyReferences(click.Command):
    """``--reference A B C``, as a shell's pattern gives it, means all three, up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spelt_out: list[str] = []
        greedy = False
        for word in args:
            if word.startswith("-"):
                greedy = word == "--reference"
            elif greedy and spelt_out[-1] != "--reference":
                spelt_out.append("--reference")
            spelt_out.append(word)
        return super().parse_args(ctx, spelt_out)


@click.group(cls=InOrder, epilog=example("batchproc manifest check night.csv"))
def manifest() -> None:
    """Tables of images and their references."""


@manifest.command(
    "build",
    cls=_ManyReferences,
    epilog=example("batchproc manifest build night/*.fits --reference refs/*.fits -o night.parquet"),
)
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--reference", "references", multiple=True, required=True, type=click.Path(), help="One or several files."
)
@click.option("--instrument", help="Name of an instrument profile.  [default: recognised from each header]")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="CSV, ECSV or Parquet file.")
def manifest_build(images: tuple[Path, ...], references: tuple[str, ...], instrument: str | None, output: Path) -> int:
    """Give each image the references that cover it, and write the manifest."""
    from batchproc.io.manifest import build_manifest, write_manifest

    table = build_manifest(images, references, instrument=instrument)
    write_manifest(table, output)
    for note in table.attrs["notes"]:
        click.echo(note, err=True)
    click.echo(f"{output}: {len(table)} images")
    return 0


@manifest.command("check", epilog=example("batchproc manifest check night.csv"))
@manifest_argument
@click.option("--no-headers", is_flag=True, help="Look at the table and the presence of files only.")
def manifest_check(manifest: Path, no_headers: bool) -> int:
    """Say what will go wrong with a manifest, before anything is computed.

    Exit code 0: nothing; 1: some images will fail; 2: the table cannot be used.
    """
    from batchproc.io.manifest import check_manifest, read_manifest

    problems = check_manifest(manifest, read_headers=not no_headers)
    for problem in problems:
        click.echo(f"{problem.level}: {problem}")
    try:
        click.echo(f"{len(read_manifest(manifest))} images")
    except ManifestError:
        return 2
    return int(any(problem.level == "error" for problem in problems))
