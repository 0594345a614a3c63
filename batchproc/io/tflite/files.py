"""TFLite files of an ONNX file: in float, and in integers calibrated on real stamps."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from batchproc.io.tflite.integers import in_integers
from batchproc.io.tflite.lower import lower
from batchproc.io.tflite.ranges import observed_ranges
from batchproc.io.tflite.write import to_bytes

__all__ = ["LAYOUT", "can_write", "float_file", "integer_file"]

#: Order of the axes of the inputs of what is made here.
LAYOUT = "NHWC"


def can_write() -> bool:
    """Whether what is needed to write TFLite is installed; imports nothing."""
    return all(map(find_spec, ("onnx", "flatbuffers", "ai_edge_litert")))


def float_file(path: str | Path, layout: str) -> bytes:
    """The network of an ONNX file as TFLite in float, for any number of stamps.

    Parameters
    ----------
    path : str or Path
    layout : {"NCHW", "NHWC"}
        Of the ONNX file's stamps. Those of the result are NHWC.

    Raises
    ------
    ModelError
        An operator that cannot be written (it is named), a file that cannot be read, or packages that are missing.
    """
    return to_bytes(lower(path, layout))


def integer_file(
    path: str | Path,
    layout: str,
    tensors: Sequence[NDArray[np.float32]],
    *,
    batch: int | None = None,
    dense_per_channel: bool = True,
) -> bytes:
    """The same in 8-bit integers from input to output.

    Parameters
    ----------
    path, layout
        As for `float_file`.
    tensors : sequence of ndarray (n, …) float32
        Prepared stamps to calibrate on, channels last, in the order of the file's inputs.
    batch : int, optional
        Stamps that it takes at a time; None: any number.
    dense_per_channel : bool
        Dense layers have a scale for each output, as convolutions have; otherwise one.

    Raises
    ------
    ModelError
        As `float_file`, or a network that integers cannot hold.
    """
    graph = lower(path, layout)
    whole = in_integers(graph, observed_ranges(graph, tensors), dense_per_channel=dense_per_channel)
    return to_bytes(whole, batch)
