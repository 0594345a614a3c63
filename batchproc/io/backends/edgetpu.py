"""Whether a TFLite file is one for the Edge TPU: compiled for it, or one that its compiler would take whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchproc.errors import ModelError

__all__ = ["Verdict", "inspect", "is_compiled"]

#: What edgetpu_compiler makes of the operators that it takes.
COMPILED = "edgetpu-custom-op"
# fmt: off
#: Operators that it takes, as LiteRT spells them: https://coral.ai/docs/edgetpu/models-intro/#supported-operations
OPERATORS = frozenset({
    "ADD", "AVERAGE_POOL_2D", "CONCATENATION", "CONV_2D", "DEPTHWISE_CONV_2D", "EXPAND_DIMS", "FULLY_CONNECTED",
    "L2_NORMALIZATION", "LOGISTIC", "LSTM", "MAXIMUM", "MAX_POOL_2D", "MEAN", "MINIMUM", "MUL", "PACK", "PAD",
    "PRELU", "QUANTIZE", "REDUCE_MAX", "REDUCE_MIN", "RELU", "RELU6", "RELU_N1_TO_1", "RESHAPE",
    "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "RSQRT", "SLICE", "SOFTMAX", "SPACE_TO_DEPTH", "SPLIT",
    "SQUARED_DIFFERENCE", "SQUEEZE", "STRIDED_SLICE", "SUB", "SUM", "TANH", "TRANSPOSE", "TRANSPOSE_CONV",
    "UNIDIRECTIONAL_SEQUENCE_LSTM",
})
# fmt: on
#: Activations and weights; int32 is for biases, shapes and axes.
_TYPES = (np.int8, np.uint8, np.int32)


@dataclass(frozen=True)
class Verdict:
    """What was found in a TFLite file."""

    compiled: bool
    """It is what edgetpu_compiler writes."""
    operators: tuple[str, ...]
    """In their order; of a compiled file, those that stay on the CPU."""
    problems: tuple[str, ...]
    """Why the compiler would not take it whole; none: it would."""

    def __str__(self) -> str:
        names = ", ".join(dict.fromkeys(self.operators))
        if self.compiled:
            return f"compiled for the Edge TPU, {names + ' left' if names else 'nothing left'} to the CPU"
        if self.problems:
            return f"not for the Edge TPU: {'; '.join(self.problems)}"
        return (
            f"all of 8 bits, batch 1, {len(self.operators)} operators that the Edge TPU has ({names}), not compiled yet"
        )


def is_compiled(data: bytes) -> bool:
    """Whether a TFLite file has been through edgetpu_compiler."""
    return COMPILED.encode() in data


def inspect(file: str, data: bytes, runtime: Any) -> Verdict:
    """Read a TFLite file's operators, types and batch.

    The limits that the Edge TPU sets to single operators (fused activations, axes, sizes) are not looked at: the
    compiler tells which of them it leaves to the CPU.

    Parameters
    ----------
    file : str
        For messages.
    data : bytes
        The file.
    runtime : module
        With ``Interpreter``: `batchproc.io.backends.litert.load_runtime`.

    Raises
    ------
    ModelError
        No TFLite file.
    """
    try:
        interpreter = runtime.Interpreter(model_content=data)  # not allocated: it shows the file as it is
        steps = interpreter._get_ops_details()
        inputs = interpreter.get_input_details()
        types = {t["index"]: np.dtype(t["dtype"]) for t in interpreter.get_tensor_details()}
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{file}: not a TFLite file that can be read: {error}") from error
    compiled = is_compiled(data)
    operators = tuple(step["op_name"] for step in steps if step["op_name"] != COMPILED)
    problems = () if compiled else (*_wrong_types(steps, types), *_wrong_operators(operators), *_wrong_batches(inputs))
    return Verdict(compiled, operators, problems)


def _wrong_types(steps: Sequence[Any], types: dict[int, np.dtype[Any]]) -> Iterator[str]:
    wrong: dict[str, list[str]] = {}
    for step in steps:
        for index in (*step["inputs"], *step["outputs"]):
            if index in types and types[index] not in _TYPES:
                wrong.setdefault(str(types[index]), []).append(step["op_name"])
    for name, operators in wrong.items():
        yield f"tensors of {name} in {', '.join(dict.fromkeys(operators))}, expected int8 throughout"


def _wrong_operators(operators: Sequence[str]) -> Iterator[str]:
    wrong = dict.fromkeys(name for name in operators if name not in OPERATORS)
    if wrong:
        yield f"operators that it does not have: {', '.join(wrong)}"


def _wrong_batches(inputs: Sequence[Any]) -> Iterator[str]:
    for each in inputs:
        batch = int(each["shape_signature"][0])
        if batch != 1:
            yield f"input {each['name']} has {f'a batch of {batch}' if batch > 0 else 'an open batch'}, expected 1"
