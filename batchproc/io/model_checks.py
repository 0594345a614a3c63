"""Models held against their cards: that the files are those described, run, and answer with probabilities.

Nothing comes into the user's folder of models without (`add_model`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.atomic import replacing, write_text
from batchproc.io.backends import lacks_runtime, provider_for, read_bytes
from batchproc.io.cards import CARD, LEARNT_FROM, ModelCard, check_card, read_card
from batchproc.io.models import (
    Model,
    find_model,
    list_models,
    load_model,
    models_folder,
    refuse_bundled,
    unfit,
    verified_file,
)

__all__ = ["add_model", "check_model", "set_default"]


def add_model(path: str | Path, name: str | None = None) -> Path:
    """Copy a model folder into the user's folder of models, after checking it; returns the copy's path.

    Parameters
    ----------
    path : str or Path
        A folder with a card, or the name of a model that there is already.
    name : str, optional
        What it shall be called; by default the name on its card. The copy's card says so.

    Raises
    ------
    ModelError
        No card, files that are not those on the card, a model that does not run, or a name that is taken.
    """
    source = list_models().get(str(path), Path(path))
    if not (source / CARD).is_file():
        raise ModelError(f"{source}: a model is a folder with a {CARD} and the files it names; no {CARD} here")
    card = read_card(source)
    card = replace(card, name=name or card.name)
    check_card(card, source / CARD)
    taken = list_models().get(card.name)
    if taken is not None:
        raise ModelError(f"there is a model {card.name!r} already ({taken}); give another name, or remove that folder")
    check_model(source)
    target = models_folder() / card.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.mkdir()
        for file in card.files.values():
            shutil.copyfile(source / file["path"], temporary / file["path"])
        if (source / LEARNT_FROM).is_file():
            shutil.copyfile(source / LEARNT_FROM, temporary / LEARNT_FROM)
        (temporary / CARD).write_text(card.to_toml())
    return target


def set_default(name_or_path: str | Path, variant: str) -> None:
    """Make a variant that runs on this CPU the one that a model is used by where nothing else is asked for.

    Raises
    ------
    ModelError
        No such model or variant, one that does not run here, or a model that comes with batchproc.
    """
    folder = find_model(name_or_path)
    refuse_bundled(str(name_or_path))
    _try_out(load_model(folder, variant=variant))
    write_text(folder / CARD, replace(read_card(folder), default_variant=variant).to_toml())


def check_model(name_or_path: str | Path, device: str = "cpu") -> list[str]:
    """Verify the hashes of a model's files, that each variant runs, gives probabilities, and leaves blanks unscored.

    Parameters
    ----------
    name_or_path : str or Path
    device : {"cpu", "gpu", "edgetpu"}
        Variants that are not for it are not run. For an Edge TPU every TFLite file is also held against what its
        compiler takes, and one that is compiled is run.

    Returns
    -------
    list of str
        What was found to hold, one line a variant and more where there is more to say.

    Raises
    ------
    ModelError
        The first thing that does not hold: nothing for this device among the variants is such a thing.
    """
    folder = find_model(name_or_path)
    card = read_card(folder)
    paths = {variant: verified_file(folder, card, variant)[0] for variant in card.files}
    lines = list(_edgetpu_verdicts(folder, card, paths)) if device == "edgetpu" else []
    runnable = [variant for variant, path in paths.items() if provider_for(path, device)]
    idle = [variant for variant in runnable if lacks_runtime(paths[variant])]
    if set(idle) != set(runnable):  # the rest can be tried all the same; of nothing but those, it is an error
        runnable = [variant for variant in runnable if variant not in idle]
    if not runnable and not lines:
        raise unfit(folder, card, device)
    answers = {}
    for variant, path in paths.items():
        if variant in runnable:
            model = load_model(folder, variant=variant, device=device)
            answers[variant] = _try_out(model)
            lines.append(f"{variant}: {path.name} is the file on the card, runs on {model.provider}")
        elif variant in idle:
            lines.append(
                f"{variant}: {path.name} is the file on the card, not run: neither ai-edge-litert nor "
                f"tflite-runtime is installed (pip install 'batchproc[litert]')"
            )
        elif device != "edgetpu":
            lines.append(f"{variant}: {path.name} is the file on the card, is not for {device}: not run")
    return [*lines, *_differences(answers)]


def _try_out(model: Model) -> NDArray[np.float32]:
    """Scores of the generated stamps that are not blank."""
    scores = model.predict(*_specimens(model.card))
    if not np.isnan(scores[-1]).all():
        raise ModelError(f"{model.file}: a stamp without data got the score {scores[-1]}")
    if not np.isfinite(scores[:-1]).all() or scores[:-1].min() < 0 or scores[:-1].max() > 1:
        raise ModelError(
            f"{model.file}: scores from {np.nanmin(scores[:-1])} to {np.nanmax(scores[:-1])}; expected "
            f"probabilities (a model that answers logits needs a final sigmoid or softmax)"
        )
    return scores[:-1]


def _differences(answers: dict[str, NDArray[np.float32]]) -> Iterator[str]:
    reference = answers.get("float")
    for variant, scores in answers.items():
        if reference is not None and variant != "float":
            worst = float(np.max(np.abs(scores - reference)))
            yield f"{variant}: differs from float by at most {worst:.3f} on {len(scores)} generated stamps"


def _edgetpu_verdicts(folder: Path, card: ModelCard, paths: dict[str, Path]) -> Iterator[str]:
    """A line for each TFLite file; raises `ModelError` where none is for the Edge TPU."""
    from batchproc.io.backends.edgetpu import inspect
    from batchproc.io.backends.litert import load_runtime

    files = {variant: path for variant, path in paths.items() if path.suffix == ".tflite"}
    found = {v: inspect(str(path), read_bytes(path), load_runtime(path)) for v, path in files.items()}
    if all(verdict.problems for verdict in found.values()):
        told = "; ".join(f"{variant}: {verdict}" for variant, verdict in found.items()) or "no .tflite file"
        raise ModelError(
            f"{folder / CARD}: nothing for the Edge TPU: found {told}; expected int8 from end to end, batch 1, "
            f"operators that it has. Quantise the model to full integers, or leave out those operators"
        )
    for variant, verdict in found.items():
        yield f"{variant}: {files[variant].name} is {verdict}"
    if not any(verdict.compiled for verdict in found.values()):
        ready = next(files[variant] for variant, verdict in found.items() if not verdict.problems)
        yield f"to run it there: edgetpu_compiler {ready}; then put what that writes on the card as a variant"


def _specimens(card: ModelCard) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Generated stamps to try a model on: noise with and without a source, the last one blank."""
    random = np.random.default_rng(0)
    n, size = 32, card.input.size
    if not card.input.channels:
        table = random.normal(0.0, 1.0, (n + 1, len(card.input.features))).astype(np.float32)
        table[n] = np.nan
        return None, table
    stamps = random.normal(0.0, 1.0, (n + 1, 3, size, size)).astype(np.float32)
    y, x = np.mgrid[:size, :size] - size // 2
    source = np.exp(-(x**2 + y**2) / 4.0) * np.geomspace(1, 100, n)[:, None, None]
    stamps[:n, 0] += source
    stamps[:n, 2] += source
    stamps[n] = np.nan
    features = np.zeros((n + 1, len(card.input.features)), np.float32) if card.input.features else None
    return stamps, features
