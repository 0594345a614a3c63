"""One training = one call: examples in, a folder with the model, its card and how it came about.

The parts are chosen here, and what is measured is measured here, the same for every kind of classifier; how one is
fitted to examples is up to a `Learner`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from batchproc import __version__
from batchproc.errors import UsageError
from batchproc.io.atomic import replacing, write_bytes, write_text
from batchproc.io.cards import CARD, InputCard, ModelCard, check_card, read_card
from batchproc.io.models import Model, file_hash, find_model, load_model
from batchproc.learning.evaluate import threshold_for_completeness
from batchproc.training.examples import BOGUS, REAL, Examples, is_binary
from batchproc.training.multiclass import measure_classes
from batchproc.training.report import measure
from batchproc.training.seen import record_of, seen_by, write_seen
from batchproc.training.settings import TrainSettings
from batchproc.training.splits import PARTS, Split, split_examples
from batchproc.training.terms import TERMS, columns_of

__all__ = [
    "LEARNERS",
    "Learner",
    "Learnt",
    "Trained",
    "check_examples",
    "check_room",
    "classes_of",
    "part_table",
    "split_anew",
    "train_model",
]

#: Kind of classifier → the module whose ``learn`` is its `Learner`; imported when asked for.
LEARNERS = {"network": "batchproc.training.neural", "forest": "batchproc.training.forest"}
_BESIDE = ("config.toml", "split.parquet", "history.csv", "curves.png")
_MADE = (*_BESIDE, "model")


@dataclass(frozen=True)
class Learnt:
    """What a learner has made.

    Attributes
    ----------
    files : mapping
        Variant → name of the file that was written for it; ``float`` is one of them.
    input : InputCard
        What the files want to see.
    notes : mapping
        What goes on the card about the training, of values that TOML knows.
    history : DataFrame
        One row an epoch (``epoch, train_loss, valid_loss, valid_auc_pr``); none where there are no epochs.
    best_epoch : int or None
        The one whose weights were kept.
    interrupted : bool
        Somebody stopped it: these are the best weights so far.
    """

    files: Mapping[str, str]
    input: InputCard
    notes: Mapping[str, Any]
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    best_epoch: int | None = None
    interrupted: bool = False


class Learner(Protocol):
    """Fits a classifier, and writes it to `folder` as files that `batchproc.io.backends` run.

    The files answer ``(n, 1)``, the probability of being real, for the classes ``("real",)``, and ``(n, classes)``
    for several. Features come in raw, after the stamps, in the order of ``settings.features``.
    """

    def __call__(
        self,
        train: Examples,
        valid: Examples,
        *,
        classes: Sequence[str],
        folder: Path,
        settings: TrainSettings,
        quiet: bool,
    ) -> Learnt:
        """Fit to `train`, stop by `valid`."""


@dataclass(frozen=True)
class Trained:
    """What came out.

    Attributes
    ----------
    folder : Path
    model_folder : Path
        Can be given to `batchproc.load_model`, or ``batchproc models add``.
    card : ModelCard
    split : Split
    history : DataFrame
    counts : DataFrame
        Examples by part and class.
    notes : tuple of str
    interrupted : bool
    """

    folder: Path
    model_folder: Path
    card: ModelCard
    split: Split
    history: pd.DataFrame
    counts: pd.DataFrame
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    def text(self) -> str:
        """For a terminal."""
        lines = [self.counts.to_string(), ""]
        lines += [f"note: {note}" for note in self.notes]
        if len(self.history):
            lines.append(
                f"kept: epoch {self.card.training['epochs']} of {len(self.history)}"
                + ("; interrupted, these are the best weights so far" if self.interrupted else "")
            )
        for table in self.card.metrics:
            lines += _say(table, self.card.training.get("base_on_the_same", {}))
        if not self.card.metrics:
            lines.append("not measured: what has a score in the test part is of one class")
        files = ", ".join(name for name in _MADE if (self.folder / name).exists())
        lines += [f"in {self.folder}: {files}", f"next: batchproc models add {self.model_folder} --name NAME"]
        return "\n".join(lines)


def train_model(
    examples: Examples, out: str | Path, settings: TrainSettings, *, overwrite: bool = False, quiet: bool = False
) -> Trained:
    """Divide the examples, fit a classifier, measure it, and write ``out``.

    Parameters
    ----------
    examples : Examples
    out : path
        Made where it is missing: ``config.toml``, ``split.parquet``, ``history.csv``, ``curves.png``, ``model/``.
    settings : TrainSettings
    overwrite : bool
        Train anew where there is a model already.
    quiet : bool
        No progress.

    Raises
    ------
    UsageError
        A model is there already; examples of one class only, or too few; parts that cannot be made; columns of
        features that are not there; packages that are missing.
    ModelError
        A base that cannot be continued from.
    """
    folder = Path(out)
    check_room(folder, overwrite)
    classes = _as_in_base(check_examples(examples, settings), settings)
    split = split_anew(examples, settings)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: examples.view(split.rows(name)) for name in PARTS}
    learn: Learner = importlib.import_module(LEARNERS[settings.kind]).learn
    with replacing(folder / "model") as temporary:
        temporary.mkdir()
        learnt = learn(
            parts["train"], parts["valid"], classes=classes, folder=temporary, settings=settings, quiet=quiet
        )
        learnt_from = np.concatenate([split.rows(part) for part in ("train", "valid")])
        write_seen(temporary, examples.table.iloc[learnt_from], settings.base)
        card = _card(temporary, learnt, classes, parts, settings)
        card = _measured(temporary, card, parts, split, settings)
        # A former training, which may be the base of this one, stays whole until here; its model is replaced last.
        _remove_former(folder)
        write_text(folder / "config.toml", settings.to_toml())
        _write_split(folder / "split.parquet", examples, split)
        _write_history(folder, learnt)
    return Trained(
        folder=folder,
        model_folder=folder / "model",
        card=card,
        split=split,
        history=learnt.history,
        counts=part_table(examples.label, split),
        notes=split.notes,
        interrupted=learnt.interrupted,
    )


def split_anew(examples: Examples, settings: TrainSettings) -> Split:
    """As `split_examples`, with nothing to be measured on that the base has learnt from, as far as its folder tells."""
    seen = seen_by(settings.base, examples.table, settings.same_arcsec)
    return split_examples(examples.label, examples.table, settings, seen=seen)


def classes_of(label: NDArray[np.str_]) -> tuple[str, ...]:
    """The classes of the model: ``("real",)`` for real or bogus, otherwise all names in alphabetical order.

    Raises
    ------
    UsageError
        One class only.
    """
    names = tuple(map(str, np.unique(label)))
    if len(names) < 2:
        raise UsageError(f"all {len(label)} examples are {names[0] if names else 'none'}: two classes are needed")
    return (REAL,) if is_binary(names) else names


def part_table(label: NDArray[np.str_], split: Split) -> pd.DataFrame:
    """How many of each class, and how many groups, are in each part."""
    rows = {}
    for part in PARTS:
        here = split.part == part
        counts = {str(name): int((here & (label == name)).sum()) for name in np.unique(label)}
        rows[part] = {**counts, "groups": len(np.unique(split.group[here]))}
    return pd.DataFrame(rows).T


# --- Steps ------------------------------------------------------------------------------------------------------------


def check_room(out: str | Path, overwrite: bool) -> None:
    """Raise `UsageError` where a model is there already that shall not be overwritten."""
    if (Path(out) / "model").exists() and not overwrite:
        raise UsageError(f"{out}: holds a trained model already; another folder, or --overwrite to train it anew")


def _remove_former(folder: Path) -> None:
    """Remove what a former training left beside its model, which `replacing` exchanges."""
    for name in _BESIDE:
        (folder / name).unlink(missing_ok=True)


def check_examples(examples: Examples, settings: TrainSettings) -> tuple[str, ...]:
    """The classes to train on, where the examples are fit for that; raises `UsageError` where they are not."""
    classes = classes_of(examples.label)
    for name in columns_of(settings.features or TERMS) if settings.kind == "forest" else settings.features:
        if name not in examples.table:
            there = [str(c) for c in examples.table if pd.api.types.is_numeric_dtype(examples.table[c])]
            raise UsageError(f"feature {name!r}: no such column; columns of numbers are: {', '.join(there)}")
        if not pd.api.types.is_numeric_dtype(examples.table[name]):
            raise UsageError(f"feature {name!r}: the column holds {examples.table[name].dtype} values, not numbers")
    return classes


def _as_in_base(classes: tuple[str, ...], settings: TrainSettings) -> tuple[str, ...]:
    """In the order of the base where it has the same ones, so that its last layer can go on."""
    known = read_card(find_model(settings.base)).classes if settings.base else ()
    return known if sorted(known) == sorted(classes) else classes


def _write_split(path: Path, examples: Examples, split: Split) -> None:
    ids = examples.table["id"].astype(str) if "id" in examples.table else np.arange(len(examples)).astype(str)
    columns = {"id": ids, "label": examples.label, "part": split.part, "group": split.group}
    columns |= {name: examples.table[name].astype(str) for name in ("source",) if name in examples.table}
    with replacing(path) as temporary:
        pd.DataFrame(columns).to_parquet(temporary, index=False)


def _write_history(folder: Path, learnt: Learnt) -> None:
    if learnt.history.empty:
        return
    from batchproc.training.curves import draw_curves

    write_text(folder / "history.csv", learnt.history.to_csv(index=False))
    write_bytes(folder / "curves.png", draw_curves(learnt.history, learnt.best_epoch))


def _card(
    folder: Path, learnt: Learnt, classes: tuple[str, ...], parts: Mapping[str, Examples], settings: TrainSettings
) -> ModelCard:
    """Without threshold and metrics yet."""
    counts = {f"n_{part}": parts[part].counts() for part in PARTS}
    asked = "Real or bogus" if classes == (REAL,) else f"Which of {', '.join(classes)}"
    prior = "if all classes are equally common" if settings.balance != "none" else "as common as in training"
    return ModelCard(
        name=settings.name,
        version=settings.version,
        description=f"{asked}, by a {settings.kind} trained with batchproc; its scores are probabilities {prior}.",
        licence=settings.licence,
        threshold=0.5,
        default_variant="float",
        input=learnt.input,
        files={v: {"path": name, "sha256": file_hash(folder / name)} for v, name in learnt.files.items()},
        classes=classes,
        training={
            "made_with": f"batchproc {__version__}",
            "grouped_by": settings.group,
            "held_out": list(settings.holdout),
            "seed": settings.seed,
            "interrupted": learnt.interrupted,
            **counts,
            **learnt.notes,
        },
    )


def _measured(
    folder: Path, card: ModelCard, parts: Mapping[str, Examples], split: Split, settings: TrainSettings
) -> ModelCard:
    """The card with a threshold from the validation part and metrics of the test part; written."""
    check_card(card, folder / CARD)
    write_text(folder / CARD, card.to_toml())
    if card.classes == (REAL,):
        valid = parts["valid"]
        scores = _scores(load_model(folder), valid)
        scored = _scored(scores)
        if not _measurable(valid, scores):
            raise UsageError(
                f"the part valid: {scored.sum()} of {len(scored)} examples have a score, and of real and bogus both "
                "are needed to choose the threshold; give more examples that have all features, or a larger valid"
            )
        threshold = threshold_for_completeness(valid.label[scored] == REAL, scores[scored], settings.completeness)
        card = replace(card, threshold=float(np.floor(threshold * 1e6) / 1e6))
    test = parts["test"]
    scores = _scores(load_model(folder), test)
    if _measurable(test, scores):
        group = split.group[split.rows("test")]
        card = replace(card, metrics=(_metrics(card, test, scores, group, settings),))
        card = replace(card, training={**card.training, **_base_metrics(card, test, group, settings)})
    write_text(folder / CARD, card.to_toml())
    return card


def _scores(model: Model, examples: Examples) -> NDArray[np.float32]:
    """As users will have them."""
    names = list(model.card.input.features)
    features = examples.table[names].to_numpy(np.float32, na_value=np.nan) if names else None
    return model.predict(examples.stamps if model.takes_stamps else None, features)


def _measurable(examples: Examples, scores: NDArray[np.float32]) -> bool:
    """Whether two classes are among what has a score."""
    return len(set(examples.label[_scored(scores)])) > 1


def _scored(scores: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Of ``(n,)`` or ``(n, classes)``, the rows that have a score."""
    return np.asarray(np.isfinite(scores).all(axis=tuple(range(1, scores.ndim))))


def _base_metrics(
    card: ModelCard, test: Examples, group: NDArray[np.str_], settings: TrainSettings
) -> dict[str, dict[str, Any]]:
    """What the model that was continued is worth on the same part, if it knows the same classes."""
    if not settings.base or load_model(settings.base).classes != card.classes:
        return {}
    base = load_model(settings.base, variant="float")
    scores = _scores(base, test)
    if not _measurable(test, scores):
        return {}
    found = _metrics(base.card, test, scores, group, settings)
    told = {key: value for key, value in found.items() if key.startswith(("auc_pr", "bogus_removed_at", "macro_f1"))}
    return {"base_on_the_same": told}


def _metrics(
    card: ModelCard, test: Examples, scores: NDArray[np.float32], group: NDArray[np.str_], settings: TrainSettings
) -> dict[str, Any]:
    on = f"held out: {', '.join(settings.holdout)}" if settings.holdout else "the test part, its groups not learnt from"
    if settings.base and record_of(settings.base) is None:
        on += f" here; where {settings.base} had learnt is not known"
    groups = None if len(np.unique(group[_scored(scores)])) < 2 or settings.group == "none" else group
    common: dict[str, Any] = {"groups": groups, "resamples": settings.resamples}
    if card.classes == (REAL,):
        selection = f"{REAL} against {BOGUS}, as labelled"
        found = measure(on, selection, test.label == REAL, scores, threshold=card.threshold, **common)
    else:
        found = measure_classes(on, test.label, scores, classes=card.classes, **common)
    return {"variant": "float", **found}


def _say(table: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[str]:
    """A table of metrics, in lines; beside them those of the model that was continued."""

    def line(name: str, of: Callable[[Mapping[str, Any], str], Any], key: str) -> str:
        said = [(of(t, key), *of(t, f"{key}_interval")) for t in (table, base) if key in t]
        told = [f"{value:.4f} [{low:.4f}, {high:.4f}]" for value, low, high in said]
        return f"  {name:30s} {'   the base: '.join(told)}"

    if "n_real" in table:
        counted = f"{table['n_real']} real, {table['n_bogus']} bogus"
        names = {
            "auc_pr": "AUC-PR at 1:1",
            "bogus_removed_at_99_completeness": "bogus removed, 99 % complete",
            "completeness": f"real kept at {table['threshold']:.4g}",
            **({"completeness_of_all": "  of all real, scored or not"} if table["n_not_scored"] else {}),
            "bogus_removed": f"bogus removed at {table['threshold']:.4g}",
        }
    else:
        counted = ", ".join(f"{number} {name}" for name, number in table["n"].items())
        names = {"macro_f1": "macro F1, in this mixture"}
    lost = f", {table['n_not_scored']} not scored" if table["n_not_scored"] else ""
    yield f"{table['on']}: {counted}{lost}; {table['intervals']}"
    for key, name in names.items():
        yield line(name, lambda t, k: t[k], key)
    for one in table.get("n", ()):
        yield line(f"AUC-PR of {one} at 1:1", lambda t, k, one=one: t[k][one], "auc_pr")  # type: ignore[misc]
