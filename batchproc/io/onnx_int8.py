"""The int8 version of an ONNX file, by ONNX Runtime's own tools."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.tflite.write import EXTRA

__all__ = ["quantise_onnx"]


def quantise_onnx(path: str | Path, tensor: NDArray[np.float32]) -> bytes:
    """The int8 version of an ONNX file with one input, calibrated on normalised stamps (static, QDQ).

    Weights are quantised per channel, activations over the smallest and largest number that occurs.
    The last matrix product stays in float, so that scores are not rounded to 256 steps.
    """
    try:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise ModelError(f"to quantise a model, install what that needs: {EXTRA} ({error})") from None

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
            prepared, out = Path(scratch) / "prepared.onnx", Path(scratch) / "int8.onnx"
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
