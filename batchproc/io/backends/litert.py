"""TFLite files, run by LiteRT (``ai-edge-litert``) or its forerunner ``tflite-runtime``, on the CPU or an Edge TPU."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.backends.batches import Slot, Tensors, check_tensors, in_batches
from batchproc.io.backends.edgetpu import is_compiled
from batchproc.learning.integers import dequantise, quantise

__all__ = ["DELEGATE", "LiteRTBackend", "is_installed", "load_runtime", "require_runtime"]

#: The library that drives an Edge TPU.
DELEGATE = "libedgetpu.so.1"
#: The first that is installed is taken; both have the same interface.
_RUNTIMES = ("ai_edge_litert", "tflite_runtime")


class LiteRTBackend:
    """An interpreter. `run` may be called from several threads: they wait for each other.

    Files with a batch of their own are given that many stamps at a time. Inputs and outputs of 8 bits are converted by
    the scale and zero point of their tensor. With one thread nothing spins; LiteRT has no word for it with several.

    Parameters
    ----------
    file : str
        For messages.
    data : bytes
        The file.
    threads : int
    edgetpu : bool
        Run what `edgetpu_compiler` made on an Edge TPU; otherwise on the CPU.
    """

    def __init__(self, file: str, data: bytes, threads: int, *, edgetpu: bool = False) -> None:
        self.file, self.provider = file, "EdgeTPU" if edgetpu else "LiteRT"
        if is_compiled(data) != edgetpu:
            raise ModelError(
                f"{file}: found a file {'not compiled' if edgetpu else 'compiled'} for the Edge TPU; expected "
                + ("what edgetpu_compiler makes of it" if edgetpu else 'one for the CPU, or device = "edgetpu"')
            )
        runtime = load_runtime(file)
        delegates = [_edgetpu_delegate(runtime)] if edgetpu else None
        try:
            self._interpreter = runtime.Interpreter(
                model_content=data, num_threads=threads, experimental_delegates=delegates
            )
            # An operator compiled for the Edge TPU has no other place to run: without its delegate this fails.
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"{file}: {runtime.__name__} cannot load it: {error}") from error
        # The stamps have four axes, features two; converters do not keep their order.
        self._inputs = sorted(self._interpreter.get_input_details(), key=lambda each: -len(each["shape"]))
        self._output = self._interpreter.get_output_details()[0]
        for each in (*self._inputs, self._output):
            _check_type(file, each)
        self.slots: Sequence[Slot] = [Slot(each["name"], _signature(each)) for each in self._inputs]
        self._rows: int | None = None
        self._lock = Lock()

    def run(self, tensors: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """See `batchproc.io.backends.Backend.run`."""
        check_tensors(self.file, self.slots, tensors)
        with self._lock:
            return in_batches(self._call, tensors, self.slots[0].shape[0])

    def _call(self, tensors: Tensors) -> NDArray[np.float32]:
        try:
            if self.slots[0].shape[0] is None:
                self._resize(tensors)
            for each, tensor in zip(self._inputs, tensors, strict=True):
                self._interpreter.set_tensor(each["index"], _encoded(tensor, each))
            self._interpreter.invoke()
            return _decoded(self._interpreter.get_tensor(self._output["index"]), self._output)
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"{self.file}: cannot be run on {self.provider}: {error}") from error

    def _resize(self, tensors: Tensors) -> None:
        """Make room for as many rows as there are, where that is another number than last time."""
        if len(tensors[0]) == self._rows:
            return
        for each, tensor in zip(self._inputs, tensors, strict=True):
            self._interpreter.resize_tensor_input(each["index"], tensor.shape)
        self._interpreter.allocate_tensors()
        self._rows = len(tensors[0])


def _signature(details: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Shape of a tensor; None where the file leaves it open."""
    return tuple(int(length) if length > 0 else None for length in details["shape_signature"])


def _check_type(file: str, details: Mapping[str, Any]) -> None:
    dtype, (scale, _) = np.dtype(details["dtype"]), details["quantization"]
    if dtype not in (np.float32, np.int8, np.uint8):
        raise ModelError(f"{file}: tensor {details['name']} is {dtype}; expected float32, int8 or uint8")
    if dtype != np.float32 and not scale > 0:
        raise ModelError(f"{file}: tensor {details['name']} is {dtype} without a scale; expected a quantised model")


def _encoded(tensor: NDArray[np.float32], details: Mapping[str, Any]) -> NDArray[Any]:
    """The tensor in the type that the file takes."""
    if details["dtype"] == np.float32:
        return np.ascontiguousarray(tensor, np.float32)
    scale, zero_point = details["quantization"]
    return quantise(tensor, scale, zero_point, details["dtype"])


def _decoded(answer: NDArray[Any], details: Mapping[str, Any]) -> NDArray[np.float32]:
    """The answer as numbers."""
    return answer if details["dtype"] == np.float32 else dequantise(answer, *details["quantization"])


# --- What must be installed -------------------------------------------------------------------------------------------


def is_installed() -> bool:
    """Whether one of the packages is; imports nothing."""
    return any(map(find_spec, _RUNTIMES))


def require_runtime(file: str | Path) -> None:
    """Raise `ModelError` where neither of the packages is installed; imports nothing."""
    if not is_installed():
        raise _no_runtime(file, "neither of them is installed")


def load_runtime(file: str | Path) -> Any:
    """The module with ``Interpreter`` and ``load_delegate``, of the first of the packages that works.

    Raises
    ------
    ModelError
        None does, and why.
    """
    reasons = []
    for name in _RUNTIMES:
        try:
            return import_module(f"{name}.interpreter")
        except (ImportError, AttributeError) as error:  # AttributeError: tflite-runtime with NumPy 2
            reasons.append(str(error))
    raise _no_runtime(file, "; ".join(reasons))


def _no_runtime(file: str | Path, reason: str) -> ModelError:
    return ModelError(
        f"{file}: a TFLite file needs ai-edge-litert or tflite-runtime: {reason}. "
        f"Install it: pip install 'batchproc[litert]'"
    )


def _edgetpu_delegate(runtime: Any) -> Any:
    try:
        ctypes.CDLL(DELEGATE)
    except OSError as error:
        raise ModelError(
            f'device = "edgetpu": the library {DELEGATE} cannot be loaded ({error}). Install the Edge TPU runtime '
            f'(libedgetpu1-std) of coral.ai on this machine, or take device = "cpu"'
        ) from error
    try:
        return runtime.load_delegate(DELEGATE)
    except (ValueError, OSError) as error:
        told = " ".join(str(error).split()) or "no reason given"
        raise ModelError(
            f'device = "edgetpu": {DELEGATE} is there, but no Edge TPU answers ({told}). Plug one in, see that this '
            f'user may open it and no other process does, or take device = "cpu"'
        ) from error
