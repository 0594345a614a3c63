"""``batchproc models``: models that score candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from batchproc.cli.common import InOrder, device_option, example


def _words(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",")) if value else ()


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
    "add",
    epilog=example(
        "batchproc models add my_model/ --name mine",
        "batchproc models add mine.onnx --normalisation min-max --classes AGN,SN,bogus",
        "batchproc models add of_ztf.onnx --normalisation image-l2 --sky 13 --sign positive",
        "batchproc models add braai d6_m7.h5",
    ),
)
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("weights", type=click.Path(path_type=Path), required=False)
@click.option("--name", help="What it shall be called.  [default: the name on its card, or of its file]")
@click.option("--normalisation", help="Of a file, or weights of your own: how the stamps were normalised.")
@click.option(
    "--sky",
    type=click.FloatRange(0),
    help="Of a file that learnt from stamps with their sky: how many times new's noise those without are given.",
)
@click.option(
    "--sign",
    type=click.Choice(["new-ref", "positive"]),
    help="Of a file: that of the difference. `positive`: what fades is turned round, as in ZTF's packets.  "
    "[default: new-ref]",
)
@click.option("--size", type=click.IntRange(1), help="Of a file: side of its stamps.  [default: as in the file]")
@click.option(
    "--channels", callback=_words, metavar="A,B", help="Of a file: in its order.  [default: new,ref,difference]"
)
@click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), help="Of a file: its axes.  [default: as in the file]")
@click.option("--classes", callback=_words, metavar="A,B", help="Of a file with several answers: in its order.")
@click.option("--features", callback=_words, metavar="A,B", help="Of a file that takes columns of the catalogue.")
@click.option("--threshold", type=click.FloatRange(0, 1), help="Of a file: what it takes for real.  [default: 0.5]")
@click.option("--licence", help="Of a file.  [default: not stated]")
def models_add(path: Path, weights: Path | None, name: str | None, normalisation: str | None, **said: Any) -> int:
    """Check a model and copy it to where runs find it by name.

    PATH is a folder with card.toml and ONNX or TFLite files, or a single ONNX or TFLite file: a card is made for it, of
    what the file tells and what the options say of it.

    `add braai WEIGHTS` makes the model of ZTF's network braai from its Keras weights, in ONNX (needs the extra
    'import') and in TFLite (where the extra 'quantise' is installed too).
    """
    from batchproc.io.bare import Said, add_file
    from batchproc.io.braai import add_braai
    from batchproc.io.cards import SUFFIXES
    from batchproc.io.model_checks import add_model

    given = {option: value for option, value in said.items() if value not in (None, ())}
    if weights is None and path.suffix in SUFFIXES and not path.is_dir():
        click.echo(add_file(path, Said(name=name or "", normalisation=normalisation or "", **given)))
        return 0
    if given:
        raise click.UsageError(f"--{next(iter(given))} is for a file without a card; {path} is none")
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


@models.command(
    "quantise",
    epilog=example(
        "batchproc models quantise mine --stamps RUN --format onnx --format tflite",
        "batchproc models quantise braai-d6_m7 --stamps night.tar.gz --format all",
        "batchproc models quantise mine --stamps RUN --labels vetted.csv --tolerance 0.005",
    ),
)
@click.argument("model")
@click.option(
    "--stamps",
    "source",
    required=True,
    type=click.Path(path_type=Path),
    help="Real stamps: a run, alert packets, or .npz. Half are calibrated on, the others measured on.",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(["onnx", "tflite", "edgetpu", "all"]),
    multiple=True,
    help="May be repeated; edgetpu: TFLite that edgetpu_compiler takes.  [default: onnx]",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="What stamps are, for AUC-PR: a table with candidate_id, candid or objectId, and label or real.",
)
@click.option(
    "--tolerance", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Largest mean difference."
)
@click.option(
    "--auc-pr-tolerance",
    type=click.FloatRange(0, 1),
    default=0.005,
    show_default=True,
    help="Largest loss of AUC-PR at 1:1, where labels are known.",
)
@click.option(
    "--lost-tolerance",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Largest fraction lost of those above the threshold; of several classes, that changes its class.",
)
@click.option("--most", type=click.IntRange(1), default=4000, show_default=True, help="Use at most so many stamps.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of drawing and dividing them.")
def models_quantise(
    model: str,
    source: Path,
    formats: tuple[str, ...],
    labels: Path | None,
    tolerance: float,
    auc_pr_tolerance: float,
    lost_tolerance: float,
    most: int,
    seed: int,
) -> int:
    """Add 8-bit versions to a model, and say how far each agrees with the exact one on stamps of their own.

    Written to its card as well. Exit code 2, and nothing is written, where one differs by more than the tolerances.
    """
    from batchproc.io.models import find_model, read_card
    from batchproc.io.quantise import FORMATS, quantise_model
    from batchproc.stamp_sources import some_stamps

    some = some_stamps(source, most, labels=labels, seed=seed)
    found = quantise_model(
        model,
        some.stamps,
        formats=tuple(FORMATS) if "all" in formats else formats or ("onnx",),
        labels=some.labels,
        tolerance=tolerance,
        auc_pr_tolerance=auc_pr_tolerance,
        lost_tolerance=lost_tolerance,
        seed=seed,
    )
    for variant, agreement in found.items():
        click.echo(f"{variant} against float: {agreement}")
    card = read_card(find_model(model))
    speeds = ", ".join(f"{variant} {speed}" for variant, speed in card.speed.items())
    click.echo(f"stamps a second of CPU time, on one thread of this machine: {speeds}")
    click.echo(f"{card.default_variant} is what runs use; to change that: batchproc models default {model} VARIANT")
    return 0


@models.command("default", epilog=example("batchproc models default mine int8-tflite"))
@click.argument("model")
@click.argument("variant")
def models_default(model: str, variant: str) -> int:
    """Choose the version of a model that runs use: float, or one of those that `quantise` has made."""
    from batchproc.io.model_checks import set_default

    set_default(model, variant)
    return 0


@models.command("check", epilog=example("batchproc models check realbogus"))
@click.argument("model")
@device_option("Where it shall run. Of edgetpu, also whether its compiler would take the file.")
def models_check(model: str, device: str) -> int:
    """Verify that a model's files are those on its card and that each version of it runs."""
    from batchproc.io.model_checks import check_model

    for line in check_model(model, device):
        click.echo(line)
    return 0
