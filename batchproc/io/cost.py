"""What a model costs: CPU time a stamp, and memory, measured where nothing else is."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchproc.errors import ModelError
from batchproc.io.models import Model, load_model

__all__ = ["Cost", "measure_cost", "stamps_per_second"]

#: CPU seconds that a speed is measured for, at least, and how many passes over the stamps.
_SECONDS, _PASSES = 0.5, 3
_ENOUGH = 50


@dataclass(frozen=True)
class Cost:
    """Of a model, on one thread.

    Attributes
    ----------
    stamps_per_second : float
        By CPU time, what makes tensors of stamps included.
    memory_mb : float
        Peak of the process above what it held with the packages imported and the stamps read: the runtime's session,
        the weights, and a batch on its way.
    n_stamps : int
        It was measured on.
    batch : int
        To a call.
    variant, provider : str
        What was run, and by what.
    """

    stamps_per_second: float
    memory_mb: float
    n_stamps: int
    batch: int
    variant: str
    provider: str


def stamps_per_second(
    model: Model, stamps: NDArray[np.floating] | None, features: NDArray | None = None, *, batch: int = 256
) -> float:
    """Stamps scored in a second of CPU time, what makes tensors of them included: the best of some passes.

    The best, since whatever else the machine does makes a pass slower, and nothing makes it faster.
    """
    given = stamps if stamps is not None else features
    n = 0 if given is None else len(given)
    if n == 0:
        raise ValueError("no stamps to measure on")
    model.predict(
        None if stamps is None else stamps[:batch], None if features is None else features[:batch], batch=batch
    )
    best, total, passes = np.inf, 0.0, 0
    while passes < _PASSES or (total < _SECONDS and passes < _ENOUGH):
        start = time.process_time()
        model.predict(stamps, features, batch=batch)
        spent = time.process_time() - start
        best, total, passes = min(best, spent), total + spent, passes + 1
    return float(n / max(best, 1e-9))


def measure_cost(
    folder: str | Path,
    stamps: NDArray[np.floating] | None,
    features: NDArray | None = None,
    *,
    variant: str | None = None,
    batch: int = 256,
) -> Cost:
    """Load a model in a process of its own, and score stamps with it on one thread.

    Parameters
    ----------
    folder : path or str
        As of `batchproc.io.models.load_model`.
    stamps : ndarray (n, 3, h, w)
        None for a model of features alone.
    features : ndarray (n, k), optional
    variant : str, optional
    batch : int

    Raises
    ------
    ModelError
        The model cannot be loaded or does not take these, or its process died.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_measure, str(folder), stamps, features, variant, batch).result()
    except BrokenProcessPool as error:
        raise ModelError(f"{folder}: the process that measured it died: not enough memory?") from error
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _measure(folder: str, stamps: Any, features: Any, variant: str | None, batch: int) -> Cost:
    model = load_model(folder, variant=variant)
    if model.takes_stamps:
        model.card.input.prepare(stamps[:1])  # compiles, which is no memory of the model
    _import_runtime(model.file)
    before = _forget_peak()
    model.predict(stamps, features, batch=batch)
    memory = max(_peak_mb() - before, 0.0)
    speed = stamps_per_second(model, stamps if model.takes_stamps else None, features, batch=batch)
    n = len(stamps if model.takes_stamps else features)
    return Cost(speed, memory, n, batch, model.variant, model.provider)


def _import_runtime(file: str) -> None:
    if file.endswith(".onnx"):
        import onnxruntime  # noqa: F401
    else:
        from batchproc.io.backends.litert import load_runtime

        load_runtime(file)


def _forget_peak() -> float:
    """MB that this process holds; its peak is counted from here on, where the system lets it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # no such file, or not allowed: the peak may be one of before
        return _peak_mb()
    return _status_mb("VmRSS")


def _peak_mb() -> float:
    try:
        return _status_mb("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return float(line.split()[1]) / 1024
    raise OSError(f"no {key}")
