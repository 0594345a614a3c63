"""What runs a model's file: ONNX Runtime or LiteRT behind one face, on the device that was asked for and no other.

The suffix of a file says which of them it is: ``.onnx`` or ``.tflite``. A backend belongs to a process, is made once in
it (`open_backend`), and takes float32 tensors in the order stamps, features; fixed batches and 8-bit inputs and outputs
are its own business. Neither package is imported before a file of its kind is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.backends.batches import Slot
from batchproc.io.backends.edgetpu import is_compiled

__all__ = [
    "CPU",
    "CUDA",
    "EDGETPU",
    "LITERT",
    "Backend",
    "check_installed",
    "lacks_runtime",
    "open_backend",
    "provider_for",
    "read_bytes",
]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
LITERT = "LiteRT"
EDGETPU = "EdgeTPU"

#: Suffix and device (`ClassifyConfig.device`) → what computes.
_PROVIDERS = {
    (".onnx", "cpu"): CPU,
    (".onnx", "gpu"): CUDA,
    (".tflite", "cpu"): LITERT,
    (".tflite", "edgetpu"): EDGETPU,
}


class Backend(Protocol):
    """A model's file, ready to run in this process."""

    provider: str
    """What computes: `CPU`, `CUDA` or another provider of ONNX Runtime, `LITERT`, `EDGETPU`."""
    slots: Sequence[Slot]
    """Its inputs, as the file has them."""

    def run(self, tensors: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Answer to tensors of n rows each (the stamps, then the features where it takes any): n rows, float32.

        Raises
        ------
        ModelError
            Tensors that do not fit the file, or a run that fails.
        """
        ...


def provider_for(path: str | Path, device: str) -> str | None:
    """What computes a file on a device (``cpu``, ``gpu``, ``edgetpu``); None where it does not run there.

    A TFLite file that `edgetpu_compiler` has compiled runs on the Edge TPU alone, and one that it has not, on the CPU.
    """
    suffix = Path(path).suffix
    provider = _PROVIDERS.get((suffix, device))
    if suffix == ".tflite" and provider and is_compiled(read_bytes(path)) != (provider == EDGETPU):
        return None
    return provider


def check_installed(path: str | Path) -> None:
    """Raise `ModelError` where this Python cannot run such a file: two ONNX Runtimes in one place, or no LiteRT."""
    if Path(path).suffix == ".onnx":
        from batchproc.io.backends.onnx import refuse_two_runtimes

        refuse_two_runtimes()
    else:
        from batchproc.io.backends.litert import require_runtime

        require_runtime(path)


def lacks_runtime(path: str | Path) -> bool:
    """Whether it is a TFLite file, and this Python has nothing that runs one; imports nothing."""
    from batchproc.io.backends.litert import is_installed

    return Path(path).suffix == ".tflite" and not is_installed()


@lru_cache(maxsize=64)  # models that take turns batch by batch must not put each other out
def open_backend(file: str, expected: str, threads: int, provider: str) -> Backend:
    """What runs a file in this process, made once.

    Parameters
    ----------
    file : str
    expected : str
        SHA-256 that the file must have.
    threads : int
        That it may use.
    provider : str
        What must compute. If it cannot be had, that is an error, never a fall back to something else.

    Raises
    ------
    ModelError
        A file that has changed or cannot be loaded, a package, library or device that is not there.
    """
    data = read_bytes(file)
    if hashlib.sha256(data).hexdigest() != expected:
        raise ModelError(f"{file}: has changed since the model was loaded")
    check_installed(file)
    if Path(file).suffix == ".onnx":
        from batchproc.io.backends.onnx import OnnxBackend

        return OnnxBackend(file, data, threads, provider)
    from batchproc.io.backends.litert import LiteRTBackend

    if provider not in (LITERT, EDGETPU):
        raise ModelError(f"{file}: asked for {provider}; expected {LITERT} or {EDGETPU}, which run TFLite files")
    return LiteRTBackend(file, data, threads, edgetpu=provider == EDGETPU)


def read_bytes(path: str | Path) -> bytes:
    """A file whole; raises `ModelError` where there is none."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
