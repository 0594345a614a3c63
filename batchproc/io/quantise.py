"""Static int8 versions of models, and how far they agree with float.

Needs the package ``onnx`` (extra ``train``); to run a quantised model needs nothing.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.atomic import write_bytes, write_text
from batchproc.io.cards import CARD, ModelCard, read_card
from batchproc.io.models import Model, file_hash, find_model, load_model

__all__ = ["Agreement", "agreement", "quantise_model"]

#: Stamps needed at least: activations are given the range that they took on these.
FEWEST_STAMPS = 64
FILE = "model_int8.onnx"


@dataclass(frozen=True)
class Agreement:
    """Scores of a quantised model against those of the float one, on the same stamps."""

    n_stamps: int
    largest_difference: float
    mean_difference: float
    """Of the absolute values."""
    lost: int
    """At or above the threshold in float, below it quantised."""
    gained: int
    """The reverse."""


def agreement(reference: NDArray[np.float32], scores: NDArray[np.float32], threshold: float) -> Agreement:
    """Compare two sets of scores; stamps that either did not score are left out."""
    both = np.isfinite(reference) & np.isfinite(scores)
    a, b = reference[both], scores[both]
    difference = np.abs(a - b)
    return Agreement(
        n_stamps=len(a),
        largest_difference=float(difference.max(initial=0.0)),
        mean_difference=float(difference.mean()) if len(a) else float("nan"),
        lost=int(np.sum((a >= threshold) & (b < threshold))),
        gained=int(np.sum((a < threshold) & (b >= threshold))),
    )


def quantise_model(name_or_path: str | Path, stamps: NDArray[np.floating], *, tolerance: float = 0.01) -> Agreement:
    """Add an int8 variant to a model folder, calibrated on stamps, and write its agreement with float on the card.

    Weights are quantised per channel, activations over the smallest and largest value that occurs. The default variant
    stays what it is: which one is faster, and whether it is as accurate, has to be measured.

    Parameters
    ----------
    name_or_path : str or Path
        A model with a float variant; its folder must be writable.
    stamps : ndarray (n, 3, h, w)
        Real ones, un-normalised, of the kind that it will see.
    tolerance : float
        Largest acceptable mean difference of the scores; beyond it nothing is written.

    Raises
    ------
    ModelError
        ``onnx`` is not installed, too few stamps, or scores that differ by more than the tolerance.
    """
    folder = find_model(name_or_path)
    card = read_card(folder)
    if not card.files.get("float", {}).get("path", "").endswith(".onnx"):
        there = ", ".join(f"{variant} ({file['path']})" for variant, file in card.files.items())
        raise ModelError(f"{folder / CARD}: no float variant in ONNX to start from; there are: {there}")
    exact = load_model(folder, variant="float")
    reference = exact.predict(stamps)
    tensor = _calibration(card, stamps)
    data = quantise_onnx(Path(exact.file), tensor)
    with TemporaryDirectory(dir=folder) as scratch:
        trial = Path(scratch) / FILE
        trial.write_bytes(data)
        files = {**card.files, "int8": {**card.files["float"], "path": FILE, "sha256": file_hash(trial)}}
        card = replace(card, files=files)
        scores = Model(card, str(trial), "int8", file_hash(trial)).predict(stamps)
    found = agreement(reference, scores, card.threshold)
    if not found.mean_difference <= tolerance:
        raise ModelError(
            f"model {card.name}: int8 differs from float by {found.mean_difference:.4f} on average over "
            f"{found.n_stamps} stamps (at most {found.largest_difference:.3f}); allowed: {tolerance}. Nothing written"
        )
    write_bytes(folder / FILE, data)
    notes = {"method": "static, QDQ, int8 per channel, uint8 activations by minimum and maximum", **asdict(found)}
    write_text(folder / CARD, replace(card, quantisation=notes).to_toml())
    return found


def _calibration(card: ModelCard, stamps: NDArray[np.floating]) -> NDArray[np.float32]:
    tensor, scored = card.input_of("float").prepare(stamps)
    if scored.sum() < FEWEST_STAMPS:
        raise ModelError(
            f"model {card.name}: {scored.sum()} usable stamps to calibrate on; at least {FEWEST_STAMPS} are needed, "
            f"some hundreds are better"
        )
    return tensor[scored]


def quantise_onnx(path: Path, tensor: NDArray[np.float32]) -> bytes:
    """The int8 version of an ONNX file with one input, calibrated on normalised stamps.

    The last matrix product stays in float, so that scores are not rounded to 256 steps.
    """
    try:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise ModelError(
            f"to quantise a model, install what that needs: pip install 'batchproc[train]' ({error})"
        ) from None

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands out the stamps in batches."""

        def __init__(self, name: str) -> None:
            self._batches: Iterator[NDArray[np.float32]] = (tensor[k : k + 64] for k in range(0, len(tensor), 64))
            self._name = name

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self._batches, None)
            return None if batch is None else {self._name: batch}

    model = onnx.load(path)
    graph = model.graph
    for k, node in enumerate(graph.node):
        node.name = node.name or f"node{k}"  # to except one without a name is to except all of them
    products = [node.name for node in graph.node if node.op_type in ("Gemm", "MatMul")]
    with TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)  # it recommends, on the root logger, what was done the line before
        try:
            prepared, out = Path(scratch) / "prepared.onnx", Path(scratch) / FILE
            quant_pre_process(model, str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(out),
                Reader(graph.input[0].name),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                # 7 bits a weight: without VNNI, x86 adds pairs of products in 16 bits, which 8 would overflow. So
                # every CPU gives the same answer.
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=products[-1:],
            )
        finally:
            logging.root.setLevel(level)
        return out.read_bytes()
