"""Keras files as braai's are written, with random weights; and what such a network answers, in plain float64."""

from __future__ import annotations

import json

import h5py
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def conv(name, filters, **changes):
    config = {"name": name, "filters": filters, "kernel_size": [3, 3], "strides": [1, 1], "padding": "valid"}
    config |= {"data_format": "channels_last", "dilation_rate": [1, 1], "activation": "relu", "use_bias": True}
    return {"class_name": "Conv2D", "config": config | changes}


def pool(name, size):
    config = {"name": name, "pool_size": [size, size], "strides": [size, size], "padding": "valid"}
    return {"class_name": "MaxPooling2D", "config": config | {"data_format": "channels_last"}}


def dense(name, units, activation):
    return {"class_name": "Dense", "config": {"name": name, "units": units, "activation": activation, "use_bias": True}}


def idle(name):
    return {"class_name": "Dropout", "config": {"name": name, "rate": 0.5}}


def braai_layers():
    """The configuration of every layer, the first one with the shape of the input."""
    return [
        conv("conv1", 16, batch_input_shape=[None, 63, 63, 3]),
        conv("conv2", 16),
        pool("pool1", 2),
        idle("dropout1"),
        conv("conv3", 32),
        conv("conv4", 32),
        pool("pool2", 4),
        idle("dropout2"),
        {"class_name": "Flatten", "config": {"name": "flatten", "data_format": "channels_last"}},
        dense("fc_1", 256, "relu"),
        idle("dropout3"),
        dense("fc_out", 1, "sigmoid"),
    ]


SHAPES = {
    "conv1": (3, 3, 3, 16),
    "conv2": (3, 3, 16, 16),
    "conv3": (3, 3, 16, 32),
    "conv4": (3, 3, 32, 32),
    "fc_1": (1152, 256),
    "fc_out": (256, 1),
}


def braai_weights(seed=0):
    """Layer → kernel and bias, such that scores spread over 0 to 1."""
    random = np.random.default_rng(seed)
    made = {}
    for name, shape in SHAPES.items():
        scale = np.sqrt(2 / np.prod(shape[:-1]))
        made[name] = (scale * random.normal(size=shape), 0.02 * random.normal(size=shape[-1]))
    return {name: tuple(a.astype(np.float32) for a in pair) for name, pair in made.items()}


def write_keras(path, layers, weights, *, class_name="Sequential"):
    """What ``model.save(path)`` of Keras 2 leaves."""
    with h5py.File(path, "w") as file:
        config = {"name": "VGG6", "layers": layers}
        file.attrs["model_config"] = json.dumps({"class_name": class_name, "config": config})
        for layer in layers:
            name = layer["config"]["name"]
            group = file.create_group(f"model_weights/{name}")
            arrays = dict(zip(("kernel", "bias"), weights.get(name, ()), strict=False))
            group.attrs["weight_names"] = [f"{name}/{key}:0".encode() for key in arrays]
            for key, array in arrays.items():
                group[f"{name}/{key}:0"] = array
    return path


def answer(weights, tensor):
    """The score of each stamp of a tensor (n, 63, 63, 3), layer by layer, by the definition of each."""

    def convolved(x, name):
        kernel, bias = (a.astype(np.float64) for a in weights[name])
        windows = sliding_window_view(x, (3, 3), axis=(1, 2))  # (n, h, w, c, 3, 3)
        return np.maximum(np.einsum("nhwcij,ijco->nhwo", windows, kernel, optimize=True) + bias, 0)

    def pooled(x, k):
        n, h, w, c = x.shape
        return x[:, : h // k * k, : w // k * k].reshape(n, h // k, k, w // k, k, c).max(axis=(2, 4))

    x = pooled(convolved(convolved(tensor.astype(np.float64), "conv1"), "conv2"), 2)
    x = pooled(convolved(convolved(x, "conv3"), "conv4"), 4)
    x = np.maximum(x.reshape(len(x), -1) @ weights["fc_1"][0].astype(np.float64) + weights["fc_1"][1], 0)
    return 1 / (1 + np.exp(-(x @ weights["fc_out"][0].astype(np.float64) + weights["fc_out"][1])))[:, 0]
