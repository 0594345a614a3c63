"""``batchproc models``: models that score candidates."""

from __future__ import annotations

from pathlib import Path

import click

from batchproc.cli.common import InOrder, device_option, example


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


@models.command(
    "add", epilog=example("batchproc models add my_model/ --name mine", "batchproc models add braai d6_m7.h5")
)
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("weights", type=click.Path(path_type=Path), required=False)
@click.option("--name", help="What it shall be called.  [default: the name on its card]")
@click.option("--normalisation", help="How the stamps were normalised that weights of your own were trained with.")
def models_add(path: Path, weights: Path | None, name: str | None, normalisation: str | None) -> int:
    """Check a model (a folder with card.toml and ONNX or TFLite files) and copy it to where runs find it by name.

    `add braai WEIGHTS` makes the model of ZTF's network braai from its Keras weights (needs the extra 'import').
    """
    from batchproc.io.braai import add_braai
    from batchproc.io.models import add_model

    if weights is None:
        if normalisation is not None:
            raise click.UsageError("--normalisation is for weights; a folder has its normalisation on its card")
        if str(path) == "braai" and not path.is_dir():
            raise click.UsageError("braai is made of its weights: batchproc models add braai d6_m7.h5")
        click.echo(add_model(path, name))
    elif str(path) == "braai":
        click.echo(add_braai(weights, name, normalisation=normalisation))
    else:
        raise click.UsageError(f"{path} {weights}: two paths; the network that can be made of weights is braai")
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
@device_option("Where it shall run. Of edgetpu, also whether its compiler would take the file.")
def models_check(model: str, device: str) -> int:
    """Verify that a model's files are those on its card and that each version of it runs."""
    from batchproc.io.models import check_model

    for line in check_model(model, device):
        click.echo(line)
    return 0
