"""Models on disk: folders with a card, found by name, checked before they are trusted.

A model is a folder with ``card.toml`` (`ModelCard`) and one file a variant (``model.onnx`` in float,
``model_int8.tflite`` quantised). The card says what the model wants to see, how good it is on which images, and the
SHA-256 of each file; a file that is not the one described is refused. What runs a file, and where, is in
`batchproc.io.backends`.

>>> model = load_model("realbogus")                                  # doctest: +SKIP
>>> model.predict(stamps)            # (n, 3, h, w) un-normalised → (n,) float32, NaN: not scored   # doctest: +SKIP

Models are looked for in the package, then in the user's folder: ``$BATCHPROC_MODELS``, or
``~/.local/share/batchproc/models``.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchproc.errors import ModelError
from batchproc.io.backends import CPU, Backend, check_installed, open_backend, provider_for, read_bytes
from batchproc.io.cards import CARD, InputCard, ModelCard, read_card
from batchproc.io.prepared import Prepared
from batchproc.learning.inputs import CHANNELS

__all__ = [
    "CPU",
    "InputCard",
    "Model",
    "ModelCard",
    "file_hash",
    "find_model",
    "list_models",
    "load_model",
    "models_folder",
    "read_card",
    "refuse_bundled",
    "show_model",
    "unfit",
    "verified_file",
]

_BUNDLED = Path(__file__).parent.parent / "models"


@dataclass(frozen=True)
class Model:
    """A model ready to score stamps. Picklable: it holds no backend; each process makes its own, once.

    Attributes
    ----------
    card : ModelCard
    file : str
        The ``.onnx`` or ``.tflite`` file.
    variant : str
        The variant in use: ``float``, ``int8``.
    hash : str
        SHA-256 of the file.
    threads : int
    provider : str
        What computes: a name of ONNX Runtime's, `backends.LITERT` or `backends.EDGETPU`; it is verified that this one
        is in use.
    """

    card: ModelCard
    file: str
    variant: str
    hash: str
    threads: int = 1
    provider: str = CPU

    @property
    def name(self) -> str:
        """Name on the card."""
        return self.card.name

    @property
    def version(self) -> str:
        """Version on the card."""
        return self.card.version

    @property
    def normalisation(self) -> str:
        """Name of the recipe that stamps are prepared by."""
        return self.card.input.normalisation

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what it tells apart; one for real/bogus."""
        return self.card.classes

    @property
    def takes_stamps(self) -> bool:
        """Whether it looks at pixels; otherwise at features alone."""
        return bool(self.card.input.channels)

    @property
    def threshold(self) -> float:
        """Scores at or above it are taken for real."""
        return self.card.threshold

    @property
    def fingerprint(self) -> str:
        """Digest of all that its scores depend on: the file, what the card has it shown, and the names of its answers.

        What stands on the card as by default is left out, so that scores stay its own when cards learn to say more.
        """
        wanted = asdict(self.card.input_of(self.variant))
        said = {field.name: wanted[field.name] for field in fields(InputCard) if wanted[field.name] != field.default}
        return hashlib.sha256(json.dumps([self.hash, said, self.classes], sort_keys=True).encode()).hexdigest()

    def open(self) -> None:
        """Make its backend in this process, where it is not made yet; raises `ModelError` where it cannot be had."""
        open_backend(self.file, self.hash, self.threads, self.provider)

    def predict(self, stamps: Any, features: ArrayLike | None = None, *, batch: int = 256) -> NDArray[np.float32]:
        """Score stamps.

        Parameters
        ----------
        stamps : array_like (n, 3, h, w)
            New, reference, difference as the pipeline cuts them, un-normalised; NaN where there is no data. Read
            `batch` rows at a time, so a lazy array (``open_stamps(RUN)``) never has to fit into memory. Not looked at,
            and may be None, for a model of features alone (`takes_stamps`). A `Prepared` is taken whole, and keeps
            the tensors made of it for the next model.
        features : array_like (n, k), optional
            The catalogue columns named on the card, for models that take any.
        batch : int
            Stamps to a call of the model.

        Returns
        -------
        ndarray (n,) float32, or (n, classes) where there are several
            Probabilities. NaN: not scored, for too little of the stamp holds data, or a feature is missing.

        Raises
        ------
        ModelError
            Stamps or features that do not fit the card, or a backend that cannot be had as asked.
        """
        n: int | None = None
        if self.takes_stamps:
            stamps = stamps if hasattr(stamps, "shape") else np.asarray(stamps)
            self._check_stamps(stamps)
            n = stamps.shape[0]
        table = self._check_features(features, n)
        n = len(np.asarray(table)) if n is None else n
        scores = np.full((n, len(self.classes)), np.nan, np.float32)
        backend = open_backend(self.file, self.hash, self.threads, self.provider)
        whole = isinstance(stamps, Prepared)
        for start in range(0, n, max(n, 1) if whole else batch):
            rows = slice(start, n if whole else start + batch)
            some = None
            if self.takes_stamps:
                some = stamps if whole else Prepared(np.asarray(stamps[rows]))
            scores[rows] = self._score(backend, some, None if table is None else table[rows])
        return scores[:, 0] if len(self.classes) == 1 else scores

    def _score(
        self, backend: Backend, stamps: Prepared | None, features: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        given, usable = [], []
        if stamps is not None:
            tensor, scored = stamps.tensor(self.card.input_of(self.variant))
            given, usable = [tensor], [scored]
        if features is not None:
            complete = np.asarray(np.all(np.isfinite(features), axis=1))
            given.append(np.where(complete[:, None], features, np.float32(0.0)))
            usable.append(complete)
        n = len(given[0])
        out = backend.run(given)
        if out.size != n * len(self.classes):
            raise ModelError(
                f"{self.file}: answered {out.shape} to {n} stamps; expected ({n}, {len(self.classes)}) for the "
                f"classes on its card: {', '.join(self.classes)}"
            )
        return np.where(np.all(usable, axis=0)[:, None], out.reshape(n, -1), np.float32(np.nan))

    def _check_stamps(self, stamps: Any) -> None:
        shape, kind = stamps.shape, getattr(stamps, "dtype", np.dtype(np.float32))
        if kind.kind not in "fiub":
            raise ModelError(f"model {self.name}: stamps of type {kind}; expected real numbers, such as float32")
        if len(shape) != 4 or shape[1] != len(CHANNELS):
            raise ModelError(
                f"model {self.name}: stamps of shape {shape}; expected (n, {len(CHANNELS)}, h, w) with "
                f"{', '.join(CHANNELS)} (stamps with the channels last: stamps.transpose(0, 3, 1, 2))"
            )
        size, least = self.card.input.size, self.card.input.min_finite
        if min(shape[2], size) * min(shape[3], size) < least * size * size:
            raise ModelError(
                f"model {self.name}: stamps of {shape[2]} × {shape[3]} pixels; it looks at {size} × {size}, of which "
                f"at least {least:.0%} must hold data. Cut larger stamps (cutouts.size), or take another model"
            )

    def _check_features(self, features: ArrayLike | None, n: int | None) -> NDArray[np.float32] | None:
        """As float32; `n` rows of them, or any number for None."""
        names = self.card.input.features
        if not names:
            if features is not None:
                raise ModelError(f"model {self.name} takes no features; leave them out")
            return None
        rows = "n" if n is None else n
        if features is None:
            raise ModelError(
                f"model {self.name} needs the features {', '.join(names)}: an array ({rows}, {len(names)})"
            )
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and not scored
            table = np.asarray(features).astype(np.float32)
        if table.ndim != 2 or table.shape != (len(table) if n is None else n, len(names)):
            raise ModelError(
                f"model {self.name}: features of shape {table.shape}; expected ({rows}, {len(names)}): "
                f"{', '.join(names)}"
            )
        return table


# --- Finding and loading ----------------------------------------------------------------------------------------------


def models_folder() -> Path:
    """The user's folder of models: ``$BATCHPROC_MODELS``, or ``batchproc/models`` where the system keeps user data."""
    chosen = os.environ.get("BATCHPROC_MODELS")
    if chosen:
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "batchproc" / "models"


def list_models() -> dict[str, Path]:
    """Every model that can be loaded by name → its folder; the bundled ones first."""
    found: dict[str, Path] = {}
    for place in (_BUNDLED, models_folder()):
        if place.is_dir():
            for card in sorted(place.glob(f"*/{CARD}")):
                found.setdefault(card.parent.name, card.parent)
    return found


def refuse_bundled(name: str) -> None:
    """Raise `ModelError` for the name of a model that comes with batchproc: its folder is not the user's to change."""
    if name in (card.parent.name for card in _BUNDLED.glob(f"*/{CARD}")):
        raise ModelError(
            f"model {name} comes with batchproc, and its folder is not written to. Make a copy of your own, and take "
            f"that:\n  batchproc models add {name} --name my-{name}"
        )


def find_model(name_or_path: str | Path) -> Path:
    """Folder of a model; raises `ModelError` naming those that there are."""
    known = list_models()
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    path = Path(name_or_path)
    if (path / CARD).is_file():
        return path
    if path.is_dir():
        raise ModelError(f"{path}: no {CARD} in this folder; a model is a folder with a card and the files it names")
    names = ", ".join(known) or "none"
    raise ModelError(
        f"no model {str(name_or_path)!r}: neither a known name (known: {names}) nor a folder with a {CARD}. "
        f"Add one with: batchproc models add FOLDER"
    )


def load_model(
    name_or_path: str | Path,
    threads: int = 1,
    *,
    variant: str | None = None,
    device: str = "cpu",
    provider: str | None = None,
) -> Model:
    """A model by name, or from its folder.

    Parameters
    ----------
    name_or_path : str or Path
        A name that `list_models` knows, or a model folder.
    threads : int
        Threads that it may use, in each process.
    variant : str, optional
        ``float``, ``int8`` or another on the card. By default the card's default, or the first on the card that runs on
        the device where that one does not.
    device : {"cpu", "gpu", "edgetpu"}
        What runs it. If that cannot be had, it is an error, here or where scoring begins, never a silent fall back to
        the CPU: GPUs run ``.onnx``, Edge TPUs a ``.tflite`` that is compiled for them.
    provider : str, optional
        An execution provider of ONNX Runtime by its name, in place of a device.

    Raises
    ------
    ModelError
        No such model, a card that is not understood, a file that is missing, not the one on the card, or not for the
        device, or packages that are missing or in each other's way.
    """
    folder = find_model(name_or_path)
    card = read_card(folder)
    chosen = variant or (card.default_variant if provider else _variant_for(folder, card, device))
    path, found = verified_file(folder, card, chosen)
    computes = provider or provider_for(path, device)
    if computes is None:
        raise unfit(folder, card, device)
    check_installed(path)
    return Model(card, str(path.resolve()), chosen, found, threads, computes)


def verified_file(folder: Path, card: ModelCard, variant: str) -> tuple[Path, str]:
    """The file of a variant and its hash, which is the one on the card."""
    if variant not in card.files:
        raise ModelError(f"{folder / CARD}: no variant {variant!r}; there are: {', '.join(card.files)}")
    path, expected = folder / card.files[variant]["path"], card.files[variant]["sha256"]
    found = file_hash(path)
    if found != expected:
        raise ModelError(
            f"{path}: SHA-256 {found[:16]}…, the card says {expected[:16]}…: not the file that was described. "
            f"Restore it, or write a new card"
        )
    return path, found


def _variant_for(folder: Path, card: ModelCard, device: str) -> str:
    """The default variant, or the first on the card that runs on the device."""
    for variant in (card.default_variant, *card.files):
        if provider_for(folder / card.files[variant]["path"], device):
            return variant
    raise unfit(folder, card, device)


def unfit(folder: Path, card: ModelCard, device: str) -> ModelError:
    """What to raise where no variant on the card runs on a device."""
    wanted = {
        "cpu": "an .onnx file, or a .tflite file that is not compiled for the Edge TPU",
        "gpu": "an .onnx file",
        "edgetpu": f"a .tflite file from edgetpu_compiler (batchproc models check {folder} --device edgetpu says more)",
    }
    there = ", ".join(f"{variant} ({file['path']})" for variant, file in card.files.items())
    return ModelError(
        f"{folder / CARD}: device = {device!r}: found {there}; expected {wanted.get(device, 'cpu, gpu or edgetpu')}. "
        f"Put such a variant on the card, or take another device"
    )


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file; raises `ModelError` where there is none."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def show_model(name_or_path: str | Path) -> str:
    """The card of a model as text, and where it lies."""
    folder = find_model(name_or_path)
    return f"# {folder}\n{read_card(folder).to_toml()}"
