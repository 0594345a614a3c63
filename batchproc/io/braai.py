"""braai, ZTF's real/bogus network, from its Keras weights: ``batchproc models add braai d6_m7.h5``.

The network, VGG6, and its training are those of Duev et al. 2019 (doi:10.1093/mnras/stz2357). Its versions differ in
weights and in how stamps are normalised: d6_m7 made the ``drb`` of ZTF's alert packets, d6_m9 did not.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from batchproc.errors import ModelError
from batchproc.io.cards import CARD, InputCard, ModelCard
from batchproc.io.keras import read_sequential
from batchproc.io.keras_to_onnx import to_onnx
from batchproc.io.model_checks import add_model
from batchproc.io.models import file_hash
from batchproc.io.tflite.files import LAYOUT, can_write, float_file

__all__ = ["NETWORK", "VERSIONS", "add_braai", "write_braai"]

SIZE = 63
#: Of the noise of new, where stamps have lost theirs: most of ZTF's have 5 to 30 times as much sky as noise.
SKY = 13.0
SOURCE = "Duev et al. 2019, MNRAS 489, 3582, doi:10.1093/mnras/stz2357"
#: What the file must hold.
NETWORK = (
    f"input {SIZE}×{SIZE}×3",
    "Conv2D filters=16 kernel_size=3×3 activation=relu, weights 3×3×3×16 16",
    "Conv2D filters=16 kernel_size=3×3 activation=relu, weights 3×3×16×16 16",
    "MaxPooling2D pool_size=2×2 strides=2×2",
    "Conv2D filters=32 kernel_size=3×3 activation=relu, weights 3×3×16×32 32",
    "Conv2D filters=32 kernel_size=3×3 activation=relu, weights 3×3×32×32 32",
    "MaxPooling2D pool_size=4×4 strides=4×4",
    "Flatten",
    "Dense units=256 activation=relu, weights 1152×256 256",
    "Dense units=1 activation=sigmoid, weights 256×1 1",
)
#: SHA-256 of published weights → version, the normalisation it was trained with.
VERSIONS = {
    "66a699da0c0f7ece4e4046e358cfd5a78bd3eabf0117921a09c6fdd640635110": ("d6_m7", "ztf-row-l2"),
    "24f97a6a37cf90da2697a657644049caf8c7f2bf382b60c64aa88dba0828ceaa": ("d6_m9", "image-l2"),
}
#: Normalisations that weights of one's own may have been trained with.
NORMALISATIONS = tuple(normalisation for _, normalisation in VERSIONS.values())
_ROLES = {"d6_m7": "; its score is the drb of ZTF's alert packets", "d6_m9": "; not the drb of ZTF's alert packets"}


def add_braai(weights: str | Path, name: str | None = None, *, normalisation: str | None = None) -> Path:
    """Make a model of braai's weights and add it to the user's folder of models; returns the model's path.

    In ONNX, and where ai-edge-litert is installed in TFLite too (the variant ``float-tflite``).

    Parameters
    ----------
    weights : str or Path
        ``d6_m7.h5``, ``braai_d6_m9.h5``, or weights of the same network that were trained further.
    name : str, optional
        What the model shall be called; by default ``braai-d6_m7``, ``braai-d6_m9``, and ``braai-own`` for others.
    normalisation : {"ztf-row-l2", "image-l2"}, optional
        For weights that are not among the published ones, and only for those: how its training stamps were normalised.

    Raises
    ------
    ModelError
        A package that is missing, a file that cannot be read or holds another network, a normalisation that is missing
        or not the one of these weights, or a name that is taken.
    """
    with TemporaryDirectory() as scratch:
        write_braai(weights, Path(scratch), normalisation=normalisation)
        return add_model(Path(scratch), name)


def write_braai(weights: str | Path, folder: Path, *, normalisation: str | None = None) -> None:
    """Write the model of braai's weights into an empty folder; as `add_braai`, which adds it where runs find it."""
    layers = read_sequential(weights, NETWORK)
    trained_with = _normalisation(weights, normalisation)
    (folder / "model.onnx").write_bytes(to_onnx(layers, (SIZE, SIZE, 3)))
    files = {"float": {"path": "model.onnx", "sha256": file_hash(folder / "model.onnx")}}
    if can_write():
        (folder / "model.tflite").write_bytes(float_file(folder / "model.onnx", LAYOUT))
        files["float-tflite"] = {"path": "model.tflite", "sha256": file_hash(folder / "model.tflite")}
    card = _card(file_hash(weights), trained_with, files)
    (folder / CARD).write_text(card.to_toml(), encoding="utf-8")


def _normalisation(weights: str | Path, given: str | None) -> str:
    """The normalisation that goes with a file of weights: known of published ones, given for others."""
    version, known = VERSIONS.get(file_hash(weights), (None, None))
    if known is not None:
        if given not in (None, known):
            raise ModelError(f"{weights}: braai {version} was trained with {known}, not {given}")
        return known
    if given is None:
        published = ", ".join(version for version, _ in VERSIONS.values())
        raise ModelError(
            f"{weights}: braai's network, but not the weights of a published version ({published}). Say how its "
            f"training stamps were normalised: --normalisation {' or --normalisation '.join(NORMALISATIONS)}"
        )
    if given not in NORMALISATIONS:
        raise ModelError(f"braai was never trained with {given!r}; known: {', '.join(NORMALISATIONS)}")
    return given


def _card(weights_hash: str, normalisation: str, files: dict[str, dict[str, str]]) -> ModelCard:
    published, _ = VERSIONS.get(weights_hash, (None, None))
    version = published or f"sha256 {weights_hash[:12]}"
    return ModelCard(
        name=f"braai-{published or 'own'}",
        version=version,
        description=f"Real or bogus, by ZTF's network braai (VGG6), {version}{_ROLES.get(version, '')}.",
        licence="MIT" if published else "MIT (the network); not known (these weights)",
        threshold=0.5,
        default_variant="float",
        input=InputCard(
            size=SIZE,
            normalisation=normalisation,
            layout=LAYOUT,
            # ZTF scores what the edge of an image has left of a stamp; a quarter is what a corner leaves.
            min_finite=0.25,
            truncated="corner",
            padding=1e-9,
            sky=SKY,
            sign="positive",
        ),
        files=files,
        meant_for={"survey": "ZTF", "pixel_scale_arcsec": (1.0, 1.02)},
        training={"source": SOURCE, "weights_sha256": weights_hash},
    )
