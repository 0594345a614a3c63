"""ONNX files, run by ONNX Runtime on the CPU, CUDA or another of its providers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.backends.batches import Slot, Tensors, check_tensors, in_batches

__all__ = ["OnnxBackend", "refuse_two_runtimes"]

_NUMBERS = ("tensor(float)", "tensor(double)", "tensor(float16)")
_CPU = "CPUExecutionProvider"
#: Of a few integers each, and left to the CPU on purpose by every provider.
_ON_SHAPES = frozenset(
    {
        *("Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Mul", "Range"),
        *("ReduceProd", "Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
    }
)
_FOR_CUDA = "pip uninstall onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"


class OnnxBackend:
    """A session of ONNX Runtime. Its `run` may be called from several threads.

    Parameters
    ----------
    file : str
        For messages.
    data : bytes
        The file.
    threads : int
    provider : str
        ONNX Runtime's name of what must compute; it is verified.
    """

    def __init__(self, file: str, data: bytes, threads: int, provider: str) -> None:
        self.file, self.provider = file, provider
        self.session = _session(file, data, threads, provider)
        self.slots: Sequence[Slot] = [
            Slot(i.name, tuple(_length(k) for k in i.shape)) for i in self.session.get_inputs()
        ]
        first = self.session.get_outputs()[0]
        if first.type not in _NUMBERS:
            raise ModelError(
                f"{file}: its first output {first.name} is {first.type}; expected {' or '.join(_NUMBERS)}, the "
                f"probabilities. Write the file without labels and ZipMap, the probabilities first"
            )

    def run(self, tensors: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """See `batchproc.io.backends.Backend.run`."""
        check_tensors(self.file, self.slots, tensors)
        return in_batches(self._call, tensors, self.slots[0].shape[0])

    def _call(self, tensors: Tensors) -> NDArray[np.float32]:
        given = {slot.name: tensor for slot, tensor in zip(self.slots, tensors, strict=True)}
        try:
            return np.asarray(self.session.run(None, given)[0], dtype=np.float32)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ModelError(f"{self.file}: ONNX Runtime cannot run it on {self.provider}: {error}") from error


def _length(axis: Any) -> int | None:
    """Of an axis; None for one that only has a name."""
    return axis if isinstance(axis, int) and axis > 0 else None


def _session(file: str, data: bytes, threads: int, provider: str) -> Any:
    import onnxruntime

    there = onnxruntime.get_available_providers()
    if provider not in there:
        advice = _FOR_CUDA if provider == "CUDAExecutionProvider" else "install the package that brings it"
        raise ModelError(f"provider {provider} is not in this ONNX Runtime (it has {', '.join(there)}). {advice}")
    session = _strict(data, threads, provider)
    if session is None:
        try:
            session = onnxruntime.InferenceSession(data, _options(threads), providers=[provider])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ModelError(f"{file}: ONNX Runtime cannot load it: {error}") from error
        used = session.get_providers()[0]
        if used != provider:
            raise ModelError(
                f"{file}: asked for {provider}, ONNX Runtime uses {used}: the device or its libraries cannot be used. "
                f"See what `nvidia-smi` says on this machine and which CUDA and cuDNN this onnxruntime-gpu wants, or "
                f'take device = "cpu"'
            )
        elsewhere = {} if provider == _CPU else _left_to_cpu(file, data, threads, provider)
        if elsewhere:
            told = ", ".join(f"{count} × {name}" for name, count in sorted(elsewhere.items()))
            raise ModelError(
                f"{file}: asked for {provider}, which has no kernel for some of its operators: ONNX Runtime would run "
                f'{told} on the CPU. Take device = "cpu", or write the model with operators that {provider} has'
            )
    session.disable_fallback()  # nor where a run fails
    return session


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # A thread that spins while it waits takes a core from the worker next to it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only; they are raised
    return options


def _strict(data: bytes, threads: int, provider: str) -> Any:
    """A session that leaves no node to the CPU; None where there is none, or the CPU is what is asked for."""
    import onnxruntime

    if provider == _CPU:
        return None
    strict = _options(threads)
    strict.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    strict.log_severity_level = 4  # what it says is looked into below
    try:
        session = onnxruntime.InferenceSession(data, strict, providers=[provider])
    except Exception:  # ONNX Runtime's exceptions share no base class
        return None
    return session if session.get_providers()[0] == provider else None


def _left_to_cpu(file: str, data: bytes, threads: int, provider: str) -> Counter[str]:
    """How many of which operators the CPU computes for a provider that lacks them, not counting those on shapes."""
    import onnxruntime

    with TemporaryDirectory() as folder:
        watched = _options(threads)
        watched.enable_profiling = True
        watched.profile_file_prefix = f"{folder}/nodes"
        try:
            session = onnxruntime.InferenceSession(data, watched, providers=[provider])
            given = {i.name: np.zeros([_length(k) or 1 for k in i.shape], np.float32) for i in session.get_inputs()}
            session.run(None, given)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ModelError(f"{file}: ONNX Runtime cannot run it on {provider}: {error}") from error
    nodes = {
        event["name"]: event["args"] for event in events if event.get("cat") == "Node" and "provider" in event["args"]
    }
    return Counter(
        node["op_name"] for node in nodes.values() if node["provider"] == _CPU and node["op_name"] not in _ON_SHAPES
    )


def refuse_two_runtimes() -> None:
    """Raise `ModelError` where ``onnxruntime`` and ``onnxruntime-gpu`` are both installed.

    They write the same files, so what is found there is the one that came last, or a mixture.
    """
    found = {name: _version(name) for name in ("onnxruntime", "onnxruntime-gpu")}
    if all(found.values()):
        raise ModelError(
            f"found {' and '.join(f'{name} {number}' for name, number in found.items())} in one environment; "
            f"expected one of them: they overwrite each other's files. For a GPU:\n"
            f"  pip uninstall onnxruntime onnxruntime-gpu\n  pip install onnxruntime-gpu"
        )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
