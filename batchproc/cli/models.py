"""``batchproc models``: models that score candidates."""

from __future__ import annotations

from pathlib import Path

import click

from batchproc.cli.common import InOrder, example


@click.group(cls=InOrder, epilog=example("batchproc models list"))
def models() -> None:
    """Models that score candidates."""


@models.command("list", epilog=example("batchproc models list"))
def models_list() -> int:
    """The bundled models, and those that were added."""
    from batchproc.io.models import list_models, read_card

    for name, folder in list_models().items():
        card = read_card(folder)
        click.echo(f"{name}  {card.version}  ({', '.join(card.files)})  {card.description}")
    return 0


@models.command("show", epilog=example("batchproc models show realbogus"))
@click.argument("model")
def models_show(model: str) -> int:
    """The card of a model: what it wants to see, what it was trained on, how good it is."""
    from batchproc.io.models import show_model

    click.echo(show_model(model))
    return 0


@models.command("add", epilog=example("batchproc models add my_model/ --name mine"))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="What it shall be called.  [default: the name on its card]")
def models_add(path: Path, name: str | None) -> int:
    """Check a model (a folder with card.toml and ONNX or TFLite files) and copy it to where runs find it by name."""
    from batchproc.io.models import add_model

    click.echo(add_model(path, name))
    return 0


@models.command("quantise", epilog=example("batchproc models quantise mine --stamps RUN"))
@click.argument("model")
@click.option(
    "--stamps", "run", required=True, type=click.Path(path_type=Path), help="A run whose stamps it is fitted to."
)
@click.option("--most", type=click.IntRange(1), default=2000, show_default=True, help="Use at most so many stamps.")
def models_quantise(model: str, run: Path, most: int) -> int:
    """Add an int8 version to a model, and say how far it agrees with the exact one."""
    from batchproc.distribute.plan import evenly
    from batchproc.io.quantise import quantise_model
    from batchproc.io.stamps import open_stamps

    stamps = open_stamps(run)
    found = quantise_model(model, stamps[evenly(range(len(stamps)), most)])
    click.echo(
        f"int8 against float on {found.n_stamps} stamps: largest difference {found.largest_difference:.3f}, "
        f"mean {found.mean_difference:.4f}; {found.lost} lost and {found.gained} gained at the threshold"
    )
    return 0


@models.command("check", epilog=example("batchproc models check realbogus"))
@click.argument("model")
@click.option(
    "--device",
    type=click.Choice(["cpu", "gpu", "edgetpu"]),
    default="cpu",
    show_default=True,
    help="Where it shall run. Of edgetpu, also whether its compiler would take the file.",
)
def models_check(model: str, device: str) -> int:
    """Verify that a model's files are those on its card and that each version of it runs."""
    from batchproc.io.models import check_model

    for line in check_model(model, device):
        click.echo(line)
    return 0
