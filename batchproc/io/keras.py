"""Networks in Keras' HDF5 files, read without Keras: layers, their settings and their weights.

For sequential models as ``model.save("x.h5")`` of Keras 1 and 2 wrote them. Nothing in a file is ever executed, and no
array is read before it is clear that the network is the one expected. What to make of the layers is left to
`batchproc.io.keras_to_onnx`. Needs the package ``h5py`` (extra ``import``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError

__all__ = ["EXTRA", "Layer", "read_sequential"]

EXTRA = "pip install 'batchproc[import]'"

#: Layers that change nothing once a network is trained.
_IDLE = ("Dropout", "InputLayer")
#: Settings that tell what a layer computes, and the values that go without saying.
_SETTINGS: dict[str, dict[str, Any]] = {
    "Conv2D": {
        "filters": None,
        "kernel_size": None,
        "activation": "linear",
        "strides": [1, 1],
        "padding": "valid",
        "data_format": "channels_last",
        "dilation_rate": [1, 1],
        "groups": 1,
        "use_bias": True,
    },
    "MaxPooling2D": {"pool_size": None, "strides": None, "padding": "valid", "data_format": "channels_last"},
    "Flatten": {"data_format": "channels_last"},
    "Dense": {"units": None, "activation": "linear", "use_bias": True},
}


@dataclass(frozen=True)
class Layer:
    """One layer that computes something.

    Attributes
    ----------
    kind : str
        Keras' name of its class: ``Conv2D``.
    settings : mapping
        As in the file.
    weights : tuple of ndarray
        Of ``Conv2D`` the kernel (rows, columns, channels in, channels out) and the bias; of ``Dense`` the kernel
        (in, out) and the bias; none of others.
    """

    kind: str
    settings: Mapping[str, Any]
    weights: tuple[NDArray[np.float32], ...]


def read_sequential(path: str | Path, expected: Sequence[str]) -> list[Layer]:
    """The layers of a network that must be a certain one.

    Parameters
    ----------
    path : str or Path
    expected : sequence of str
        What it must be: a line for the input and one for each layer, dropout left out, as errors quote them:
        ``"input 63×63×3"``, ``"Conv2D filters=16 kernel_size=3×3 activation=relu, weights 3×3×3×16 16"``.

    Raises
    ------
    ModelError
        h5py is not installed, a file that cannot be read or is no Keras model, another network (with the first line
        that differs, found and expected), or weights that are not finite.
    """
    try:
        import h5py
    except ImportError as error:
        raise ModelError(f"to read Keras' weights, install what that needs: {EXTRA} ({error})") from None
    if Path(path).is_dir():
        raise ModelError(f"{path}: a folder; expected the HDF5 file that model.save('x.h5') writes")
    try:
        with h5py.File(path, "r") as file:
            return _read(file, path, expected)
    except (OSError, RuntimeError) as error:  # h5py raises both of torn files
        raise ModelError(f"{path}: cannot be read as HDF5, which a Keras .h5 is ({error})") from error


def _read(file: Any, path: str | Path, expected: Sequence[str]) -> list[Layer]:
    try:
        shape, configs = _architecture(file.attrs["model_config"])
        computing = [c for c in configs if c["class_name"] not in _IDLE]
        arrays = [_arrays(file["model_weights"], str(c["config"]["name"])) for c in computing]
        found = [f"input {_times(shape)}", *(_line(c, a) for c, a in zip(computing, arrays, strict=True))]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(
            f"{path}: not a sequential Keras model with its weights, as model.save('x.h5') writes it "
            f"({type(error).__name__}: {error})"
        ) from error
    _compare(path, found, expected)
    layers = [
        Layer(c["class_name"], c["config"], tuple(np.asarray(array[()], np.float32) for array in a))
        for c, a in zip(computing, arrays, strict=True)
    ]
    for layer in layers:
        if not all(np.isfinite(weights).all() for weights in layer.weights):
            raise ModelError(f"{path}: layer {layer.settings['name']} has weights that are not finite")
    return layers


def _architecture(text: str | bytes) -> tuple[list[int], list[dict[str, Any]]]:
    """Shape of the input without the number of stamps, and the configuration of each layer."""
    model = json.loads(text)
    if model["class_name"] != "Sequential":
        raise ValueError(f"its class is {model['class_name']}")
    config = model["config"]
    layers = config["layers"] if isinstance(config, dict) else config  # a bare list until Keras 2.2.3
    first = layers[0]["config"]
    return list(first.get("batch_input_shape") or first["batch_shape"])[1:], layers


def _arrays(weights: Any, name: str) -> list[Any]:
    """The arrays of one layer in Keras' order, not read yet."""
    names = weights[name].attrs["weight_names"]
    return [weights[name][key.decode() if isinstance(key, bytes) else key] for key in names]


def _line(config: Mapping[str, Any], arrays: Sequence[Any]) -> str:
    """What a layer is, in a line; settings that go without saying are left out."""
    kind, settings = config["class_name"], config["config"]
    told = [
        f"{key}={_times(settings.get(key, default))}"
        for key, default in _SETTINGS.get(kind, {}).items()
        if settings.get(key, default) != default
    ]
    shapes = " ".join(_times(array.shape) for array in arrays)
    return " ".join([kind, *told]) + (f", weights {shapes}" if shapes else "")


def _times(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _compare(path: str | Path, found: Sequence[str], expected: Sequence[str]) -> None:
    for k, (a, b) in enumerate(zip_longest(found, expected, fillvalue="nothing")):
        if a != b:
            where = f"layer {k} of {len(found) - 1} that compute" if k else "the input"
            raise ModelError(f"{path}: another network than expected. {where}: found {a}; expected {b}")
