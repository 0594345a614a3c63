"""Real 2-D Fourier transforms through pyFFTW: planned once per process, on scratch arrays, in double precision.

What a plan computes depends, in its last bits, on how FFTW chose it. Two ways repeat exactly: FFTW's estimate (the
default), and *wisdom* measured once and then frozen (`measure_wisdom`, kept in the run folder and imported by every
worker). Both are used here, and nothing else, so that bytes repeat.
"""

from __future__ import annotations

import base64
import json
import threading

import numpy as np
import pyfftw
from numpy.typing import NDArray

_plans = threading.local()
_planner = threading.Lock()
#: Counts changes of wisdom: plans made before one are not used after it.
_generation = 0

__all__ = ["Fft", "get_fft", "import_wisdom", "measure_wisdom"]


class Fft:
    """Forward and backward transform of one shape.

    Parameters
    ----------
    shape : (int, int)
        Shape (ny, nx) of the real array; any size, odd ones too.
    threads : int
    measure : bool
        Let FFTW measure (seconds) unless it has wisdom already. Otherwise: wisdom where there is some, or its estimate.
    """

    def __init__(self, shape: tuple[int, int], threads: int = 1, measure: bool = False) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        # Planning overwrites its arrays, so these are scratch and stay ours: data is copied in.
        self._real = pyfftw.zeros_aligned(self.shape, dtype="float64")
        self._half = pyfftw.zeros_aligned((self.shape[0], self.shape[1] // 2 + 1), dtype="complex128")
        self._forward = self._plan(self._real, self._half, "FFTW_FORWARD", threads, measure)
        self._backward = self._plan(self._half, self._real, "FFTW_BACKWARD", threads, measure)

    @staticmethod
    def _plan(source: NDArray, target: NDArray, direction: str, threads: int, measure: bool) -> pyfftw.FFTW:
        def plan(*flags: str) -> pyfftw.FFTW:
            flags += ("FFTW_DESTROY_INPUT",)
            with _planner:  # FFTW executes in parallel, but plans one at a time
                return pyfftw.FFTW(source, target, axes=(0, 1), direction=direction, flags=flags, threads=threads)

        if measure:
            return plan("FFTW_MEASURE")
        try:
            return plan("FFTW_MEASURE", "FFTW_WISDOM_ONLY")
        except RuntimeError:  # no wisdom for this shape
            return plan("FFTW_ESTIMATE")

    def rfft2(self, array: NDArray) -> NDArray[np.complex128]:
        """Equivalent to ``numpy.fft.rfft2(array)``."""
        self._real[:] = array
        self._forward.execute()
        return self._half.copy()

    def irfft2(self, spectrum: NDArray) -> NDArray[np.float64]:
        """Equivalent to ``numpy.fft.irfft2(spectrum, s=shape)``."""
        self._half[:] = spectrum
        self._backward.execute()
        return self._real / (self.shape[0] * self.shape[1])


def get_fft(shape: tuple[int, int]) -> Fft:
    """The transform of this shape on ``pyfftw.config.NUM_THREADS`` threads; a plan for each caller's own thread."""
    cache: dict[tuple[int, ...], Fft] = _plans.__dict__.setdefault("cache", {})
    if _plans.__dict__.get("generation") != _generation:
        cache.clear()
        _plans.generation = _generation
    key = (int(shape[0]), int(shape[1]), int(pyfftw.config.NUM_THREADS))
    if key not in cache:
        if len(cache) >= 16:
            cache.pop(next(iter(cache)))
        cache[key] = Fft(key[:2], key[2])
    return cache[key]


def measure_wisdom(shapes: list[tuple[int, int]]) -> str:
    """Measure plans for these shapes (seconds) and return FFTW's wisdom as text for `import_wisdom`."""
    for shape in shapes:
        Fft(shape, pyfftw.config.NUM_THREADS, measure=True)
    _forget_plans()
    return json.dumps([base64.b64encode(part).decode() for part in pyfftw.export_wisdom()])


def import_wisdom(text: str) -> None:
    """Take over wisdom from `measure_wisdom`; transforms planned from now on follow it.

    Raises
    ------
    ValueError
        When the text is not wisdom of this FFTW.
    """
    parts = tuple(base64.b64decode(part) for part in json.loads(text))
    pyfftw.forget_wisdom()
    if not pyfftw.import_wisdom(parts)[0]:
        raise ValueError("FFTW does not accept this wisdom: it was made by another version or precision")
    _forget_plans()


def _forget_plans() -> None:
    global _generation
    _generation += 1
