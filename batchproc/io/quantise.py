"""8-bit versions of models: calibrated on some real stamps, held against float on others, refused where they harm.

Needs the packages ``onnx`` and, for TFLite, ``ai-edge-litert`` (extra ``quantise``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchproc.errors import ModelError, UsageError
from batchproc.io.atomic import replacing, write_text
from batchproc.io.backends import lacks_runtime, provider_for
from batchproc.io.cards import CARD, ModelCard, read_card
from batchproc.io.cost import stamps_per_second
from batchproc.io.models import Model, file_hash, find_model, load_model, refuse_bundled
from batchproc.io.onnx_int8 import quantise_onnx
from batchproc.io.tflite.files import LAYOUT, integer_file
from batchproc.learning.evaluate import auc_pr

__all__ = ["FORMATS", "Agreement", "agreement", "quantise_model"]

#: Stamps needed at least, to calibrate on and to measure on.
FEWEST_STAMPS = 64
#: Stamps to calibrate on at most: ranges that they span hardly grow beyond.
MOST_CALIBRATED = 1000
#: Stamps that speed is measured on at most.
MOST_TIMED = 512
#: Stamps above the threshold from which on the share of them that is lost is judged: of fewer, one or two are too much.
FEWEST_ABOVE = 40


@dataclass(frozen=True)
class Format:
    """A kind of file that a model can be quantised to."""

    variant: str
    """What it is called on the card."""
    file: str
    method: str
    make: Callable[[str, str, NDArray[np.float32]], bytes]
    """From the file in float, its layout, and prepared stamps in that layout."""
    layout: str | None = None
    """Of its input; None: that of the file in float."""


def _onnx(path: str, layout: str, tensor: NDArray[np.float32]) -> bytes:
    return quantise_onnx(path, tensor)


def _tflite(path: str, layout: str, tensor: NDArray[np.float32]) -> bytes:
    return integer_file(path, layout, [_channels_last(tensor, layout)])


def _edgetpu(path: str, layout: str, tensor: NDArray[np.float32]) -> bytes:
    # Its compiler takes one stamp at a time, and one scale for a dense layer.
    return integer_file(path, layout, [_channels_last(tensor, layout)], batch=1, dense_per_channel=False)


def _channels_last(tensor: NDArray[np.float32], layout: str) -> NDArray[np.float32]:
    return tensor if layout == LAYOUT else np.ascontiguousarray(tensor.transpose(0, 2, 3, 1))


_WHOLE = "static, int8 from input to output, activations by minimum and maximum"
#: By the name that `models quantise --format` takes.
FORMATS = {
    "onnx": Format(
        "int8",
        "model_int8.onnx",
        "static, QDQ, int8 per channel, uint8 activations by minimum and maximum",
        _onnx,
    ),
    "tflite": Format("int8-tflite", "model_int8.tflite", f"{_WHOLE}, weights per channel", _tflite, LAYOUT),
    "edgetpu": Format(
        "edgetpu",
        "model_edgetpu.tflite",
        f"{_WHOLE}, convolutions per channel, dense layers per tensor, batch 1, for edgetpu_compiler",
        _edgetpu,
        LAYOUT,
    ),
}


@dataclass(frozen=True)
class Agreement:
    """Scores of a quantised model against those of the float one, on the same stamps."""

    n_stamps: int
    largest_difference: float
    mean_difference: float
    """Of the absolute values."""
    above: int
    """At or above the threshold in float; of several classes: all."""
    lost: int
    """At or above the threshold in float, below it quantised. Of several classes: those whose most probable one is
    another; one class loses them, and another gains them."""
    gained: int
    """The reverse."""
    auc_pr_float: float | None = None
    """Where labels are known, at 1:1; of several classes, the mean over those that occur, each against the rest."""
    auc_pr: float | None = None
    """The same, quantised."""

    def __str__(self) -> str:
        told = (
            f"largest difference {self.largest_difference:.3f}, mean {self.mean_difference:.4f} on {self.n_stamps} "
            f"stamps; {self.lost} lost and {self.gained} gained at the threshold"
        )
        if self.auc_pr is None:
            return told
        return f"{told}; AUC-PR at 1:1 {self.auc_pr:.4f}, in float {self.auc_pr_float:.4f}"


def agreement(
    reference: NDArray[np.float32],
    scores: NDArray[np.float32],
    threshold: float,
    labels: Sequence[str] | NDArray[np.str_] | None = None,
    classes: Sequence[str] = ("real",),
) -> Agreement:
    """Compare two sets of scores ``(n,)`` or ``(n, classes)``; stamps that either did not score are left out.

    Parameters
    ----------
    reference, scores : ndarray
        In float, and quantised.
    threshold : float
        For one class.
    labels : sequence of str, optional
        What each stamp is; of one class, everything else is against it.
    classes : sequence of str
        The model's.
    """
    a, b = np.reshape(reference, (len(reference), -1)), np.reshape(scores, (len(scores), -1))
    both = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
    a, b = a[both], b[both]
    difference = np.abs(a - b)
    if len(classes) > 1:
        above = len(a)
        lost = gained = int(np.sum(a.argmax(axis=1) != b.argmax(axis=1)))
    else:
        above = int(np.sum(a >= threshold))
        lost, gained = int(np.sum((a >= threshold) & (b < threshold))), int(np.sum((a < threshold) & (b >= threshold)))
    named = None if labels is None else np.asarray(labels)[both]
    return Agreement(
        n_stamps=len(a),
        largest_difference=float(difference.max(initial=0.0)),
        mean_difference=float(difference.mean()) if len(a) else float("nan"),
        above=above,
        lost=lost,
        gained=gained,
        auc_pr_float=None if named is None else _mean_auc_pr(named, a, classes),
        auc_pr=None if named is None else _mean_auc_pr(named, b, classes),
    )


def _mean_auc_pr(labels: NDArray[np.str_], scores: NDArray[np.float32], classes: Sequence[str]) -> float | None:
    """None where no class stands against another; stamps with an empty label are not counted."""
    known = labels != ""
    labels, scores = labels[known], scores[known]
    found = [
        auc_pr(labels == name, scores[:, k], prevalence=0.5)
        for k, name in enumerate(classes)
        if 0 < np.sum(labels == name) < len(labels)
    ]
    return float(np.mean(found)) if found else None


def quantise_model(
    name_or_path: str | Path,
    stamps: NDArray[np.floating],
    *,
    formats: Sequence[str] = ("onnx",),
    labels: ArrayLike | None = None,
    tolerance: float = 0.01,
    auc_pr_tolerance: float = 0.005,
    lost_tolerance: float = 0.05,
    seed: int = 0,
) -> dict[str, Agreement]:
    """Add 8-bit variants to a model folder, and write on the card how far each agrees with float and how fast all are.

    Half of the stamps, and not more than `MOST_CALIBRATED`, are calibrated on; all others are what agreement is
    measured on. The default variant stays what it is (`batchproc.io.model_checks.set_default`): which one is faster
    depends on the machine.

    Parameters
    ----------
    name_or_path : str or Path
        A model of stamps alone with a float variant in ONNX. Those that come with batchproc are not written to by name.
    stamps : ndarray (n, 3, h, w)
        Real ones, un-normalised, of the kind that it will see.
    formats : sequence of str
        Out of `FORMATS`.
    labels : array_like (n,) of str, optional
        What each stamp is, ``real`` or not, or the class; empty: not known.
    tolerance : float
        Largest acceptable mean difference of the scores.
    auc_pr_tolerance : float
        Largest acceptable loss of AUC-PR, where there are labels.
    lost_tolerance : float
        Largest acceptable fraction that is lost of the stamps at or above the threshold in float, where these are at
        least `FEWEST_ABOVE`; of several classes, of all.
    seed : int
        Of the division of the stamps.

    Returns
    -------
    dict of str to Agreement
        By variant.

    Raises
    ------
    ModelError
        A package that is missing, too few stamps, an operator that a format does not have, a variant of that name that
        was made otherwise, or scores that differ by more than a tolerance: then nothing is written at all.
    UsageError
        An unknown format.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UsageError(f"format {', '.join(unknown) or 'none'}: known: {', '.join(FORMATS)}")
    folder = find_model(name_or_path)
    refuse_bundled(str(name_or_path))
    card = read_card(folder)
    chosen = [FORMATS[name] for name in dict.fromkeys(formats)]
    _check_card(folder, card, chosen)
    exact = load_model(folder, variant="float")
    calibrated, measured = _divided(card, stamps, seed)
    tensor, _ = card.input_of("float").prepare(np.asarray(stamps[calibrated]))
    others = np.asarray(stamps[measured])
    named = None if labels is None else np.asarray(labels)[measured]
    made = {form: form.make(exact.file, card.input_of("float").layout, tensor) for form in chosen}
    card = replace(card, files={**card.files, **{form.variant: _entry(card, form) for form in chosen}})
    with TemporaryDirectory(dir=folder) as scratch:
        found = dict(_measured(card, exact, made, Path(scratch), others, named))
    _refuse_harm(card, found, tolerance, auc_pr_tolerance, lost_tolerance)
    notes = {form.variant: _notes(form, found[form.variant], len(tensor)) for form in chosen}
    card = _write(folder, card, made, notes)
    speed = {variant: round(value) for variant, value in _speeds(folder, card, others[:MOST_TIMED]).items()}
    write_text(folder / CARD, replace(read_card(folder), speed=speed).to_toml())
    return found


# --- Before anything is made ------------------------------------------------------------------------------------------


def _check_card(folder: Path, card: ModelCard, chosen: Sequence[Format]) -> None:
    """Raise `ModelError` where there is nothing to start from, or where something is in the way."""
    if not card.input.channels or card.input.features:
        raise ModelError(
            f"model {card.name} takes {', '.join(card.input.features) or 'no stamps'}; only models of stamps alone can "
            f"be quantised"
        )
    if not card.files.get("float", {}).get("path", "").endswith(".onnx"):
        there = ", ".join(f"{variant} ({file['path']})" for variant, file in card.files.items())
        raise ModelError(f"{folder / CARD}: no float variant in ONNX to start from; there are: {there}")
    for form in chosen:
        if form.variant in card.files and form.variant not in card.quantisation:
            raise ModelError(
                f"{folder / CARD}: has a variant {form.variant} that was not made here "
                f"({card.files[form.variant]['path']}). Give it another name on the card, or take it off"
            )


def _divided(card: ModelCard, stamps: NDArray[np.floating], seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of usable stamps to calibrate on, and to measure on, in the order in which they lie."""
    scored = _usable(card, stamps)
    if len(scored) < 2 * FEWEST_STAMPS:
        raise ModelError(
            f"model {card.name}: {len(scored)} usable stamps; at least {2 * FEWEST_STAMPS} are needed, half of them to "
            f"calibrate on and half to measure on; some thousands are better"
        )
    shuffled = np.random.default_rng(seed).permutation(scored)
    n = min(len(scored) // 2, MOST_CALIBRATED)
    return np.sort(shuffled[:n]), np.sort(shuffled[n:])


def _usable(card: ModelCard, stamps: NDArray[np.floating], chunk: int = 1024) -> NDArray[np.intp]:
    wanted = card.input_of("float")
    found = [wanted.prepare(np.asarray(stamps[k : k + chunk]))[1] for k in range(0, len(stamps), chunk)]
    return np.flatnonzero(np.concatenate(found)) if found else np.zeros(0, np.intp)


# --- What was made ----------------------------------------------------------------------------------------------------


def _entry(card: ModelCard, form: Format) -> dict[str, str]:
    layout = {"layout": form.layout} if form.layout else {}
    return {**card.files["float"], **layout, "path": form.file}


def _measured(
    card: ModelCard,
    exact: Model,
    made: Mapping[Format, bytes],
    scratch: Path,
    stamps: NDArray[np.floating],
    labels: NDArray[np.str_] | None,
) -> Iterator[tuple[str, Agreement]]:
    reference = exact.predict(stamps)
    for form, data in made.items():
        path = scratch / form.file
        path.write_bytes(data)
        provider = provider_for(path, "cpu")
        assert provider is not None
        trial = Model(card, str(path), form.variant, file_hash(path), provider=provider)
        yield form.variant, agreement(reference, trial.predict(stamps), card.threshold, labels, card.classes)


def _write(
    folder: Path, measured: ModelCard, made: Mapping[Format, bytes], notes: Mapping[str, Mapping[str, Any]]
) -> ModelCard:
    """Write the files and what the card says of them; returns the card.

    What else has been written to the card during the minutes of measuring stays there. All files are on the disk before
    the first of them takes its place, and the card does so last: one that cannot be written changes nothing.
    """
    card = read_card(folder)
    _check_card(folder, card, tuple(made))
    if _judged_by(card) != _judged_by(measured):
        raise ModelError(
            f"{folder / CARD}: the float file, its input, the classes or the threshold were changed while versions "
            f"were measured. Nothing written; give the same command again"
        )
    new = {form.variant: {**_entry(card, form), "sha256": sha256(data).hexdigest()} for form, data in made.items()}
    card = replace(card, files={**card.files, **new}, quantisation={**card.quantisation, **notes})
    with ExitStack() as stack:  # ends in reverse order
        stack.enter_context(replacing(folder / CARD)).write_text(card.to_toml(), encoding="utf-8")
        for form, data in made.items():
            stack.enter_context(replacing(folder / form.file)).write_bytes(data)
    return card


def _judged_by(card: ModelCard) -> tuple[Any, ...]:
    return card.files["float"], card.input_of("float"), card.classes, card.threshold


def _speeds(folder: Path, card: ModelCard, stamps: NDArray[np.floating]) -> dict[str, float]:
    """Stamps a second of CPU time of each variant that runs on this CPU, all measured now: speeds of other machines
    cannot be compared with them.
    """
    paths = {variant: folder / file["path"] for variant, file in card.files.items()}
    here = [variant for variant, path in paths.items() if provider_for(path, "cpu") and not lacks_runtime(path)]
    return {variant: stamps_per_second(load_model(folder, variant=variant), stamps) for variant in here}


def _refuse_harm(
    card: ModelCard,
    found: Mapping[str, Agreement],
    tolerance: float,
    auc_pr_tolerance: float,
    lost_tolerance: float,
) -> None:
    for variant, each in found.items():
        if not each.mean_difference <= tolerance:
            raise ModelError(
                f"model {card.name}: {variant} differs from float by {each.mean_difference:.4f} on average over "
                f"{each.n_stamps} stamps (at most {each.largest_difference:.3f}); allowed: {tolerance}. Nothing written"
            )
        # A small mean says little of the few near the threshold, and they are what a search is for.
        if each.above >= FEWEST_ABOVE and each.lost > lost_tolerance * each.above:
            where = "at the threshold" if len(card.classes) == 1 else "to another class"
            raise ModelError(
                f"model {card.name}: {variant} loses {each.lost} of {each.above} stamps {where}, "
                f"{each.lost / each.above:.1%}; allowed: {lost_tolerance:.1%} (--lost-tolerance). Nothing written"
            )
        lost = (each.auc_pr_float or 0.0) - (each.auc_pr or 0.0)
        if not lost <= auc_pr_tolerance:
            raise ModelError(
                f"model {card.name}: {variant} has an AUC-PR at 1:1 of {each.auc_pr:.4f} where float has "
                f"{each.auc_pr_float:.4f}, on {each.n_stamps} stamps; allowed to be lost: {auc_pr_tolerance}. Nothing "
                f"written"
            )


def _notes(form: Format, found: Agreement, n_calibrated: int) -> dict[str, Any]:
    told = {key: value for key, value in asdict(found).items() if value is not None}
    if found.auc_pr is not None:
        told["prevalence"] = 0.5
    return {"method": form.method, "n_calibrated_on": n_calibrated, **told}
