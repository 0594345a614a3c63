"""Real 2-D Fourier transforms in single precision through pyFFTW, planned once per process and thread.

What a plan computes depends, in its last bits, on how FFTW chose it. Two ways repeat exactly: FFTW's estimate, and
*wisdom* measured once and then frozen. Frozen wisdom for the sides of tiles is part of the package, because measured
plans take half the time of estimated ones; where FFTW does not accept it (another build, another processor) the
estimate takes over. A run keeps a copy of its wisdom and every worker imports that, so that bytes repeat.

``python -m batchproc.imaging.fft`` measures the wisdom of the package afresh.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyfftw
from numpy.typing import NDArray

__all__ = ["SIDES", "Fft", "frozen_wisdom", "get_fft", "import_wisdom", "measure_wisdom"]

#: Sides of square tiles: multiples of 32 (rows stay aligned) whose prime factors FFTW is quick with.
SIDES = (
    *(256, 288, 320, 384, 448, 480, 512, 576, 640, 672, 768, 800, 864, 896, 960, 1024),
    *(1120, 1152, 1280, 1344, 1440, 1536, 1792, 1920, 2048),
)

_BUNDLED = Path(__file__).with_name("fftw_wisdom.json")
_plans = threading.local()
_planner = threading.Lock()
#: Counts changes of wisdom: plans made before one are not used after it. 0: none has been imported yet.
_generation = 0
_bundled_is_good = True


class Fft:
    """Forward and backward transform of one shape, between arrays from `real` and `half`.

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
        # Planning overwrites its arrays, so these are scratch.
        real, half = self.real(), self.half()
        self._forward = self._plan(real, half, "FFTW_FORWARD", threads, measure)
        self._backward = self._plan(half, real, "FFTW_BACKWARD", threads, measure)
        self._scratch: dict[tuple[str, str], NDArray] = {}

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

    def real(self, name: str | None = None) -> NDArray[np.float32]:
        """An array ``(ny, nx)`` to transform; with a name, the scratch array of that name, whatever it holds."""
        return self._array(name, self.shape, "float32")

    def half(self, name: str | None = None) -> NDArray[np.complex64]:
        """A half spectrum ``(ny, nx // 2 + 1)``; with a name, the scratch array of that name, whatever it holds."""
        return self._array(name, (self.shape[0], self.shape[1] // 2 + 1), "complex64")

    def _array(self, name: str | None, shape: tuple[int, int], dtype: str) -> NDArray:
        if name is None:
            return pyfftw.zeros_aligned(shape, dtype=dtype)
        key = name, dtype
        if key not in self._scratch:
            self._scratch[key] = pyfftw.zeros_aligned(shape, dtype=dtype)
        return self._scratch[key]

    def forward(self, real: NDArray[np.float32], half: NDArray[np.complex64]) -> NDArray[np.complex64]:
        """``half[:] = numpy.fft.rfft2(real)``; `real` is used up."""
        self._forward.update_arrays(real, half)
        self._forward.execute()
        return half

    def backward(self, half: NDArray[np.complex64], real: NDArray[np.float32]) -> NDArray[np.float32]:
        """``real[:] = numpy.fft.irfft2(half, s=shape) * ny * nx``: not normalised; `half` is used up."""
        self._backward.update_arrays(half, real)
        self._backward.execute()
        return real


def get_fft(shape: tuple[int, int]) -> Fft:
    """The transform of this shape on ``pyfftw.config.NUM_THREADS`` threads; a plan for each caller's own thread."""
    if _generation == 0:
        _import_bundled()
    cache: dict[tuple[int, ...], Fft] = _plans.__dict__.setdefault("cache", {})
    if _plans.__dict__.get("generation") != _generation:
        cache.clear()
        _plans.generation = _generation
    key = (int(shape[0]), int(shape[1]), int(pyfftw.config.NUM_THREADS))
    if key not in cache:
        if len(cache) >= 4:  # each keeps its scratch arrays
            cache.pop(next(iter(cache)))
        cache[key] = Fft(key[:2], key[2])
    return cache[key]


def frozen_wisdom() -> str:
    """The package's wisdom as text for `import_wisdom`; empty where this FFTW does not accept it."""
    if _generation == 0:
        _import_bundled()
    return _BUNDLED.read_text() if _bundled_is_good else ""


def measure_wisdom(shapes: Iterable[tuple[int, int]]) -> str:
    """Measure plans for these shapes (about a second each) and return FFTW's wisdom as text for `import_wisdom`."""
    for shape in shapes:
        Fft(shape, measure=True)
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
    with _planner:
        pyfftw.forget_wisdom()
        accepted = pyfftw.import_wisdom(parts)
    _forget_plans()
    if not accepted[1]:  # double, single, long double: all is single here
        raise ValueError("FFTW does not accept this wisdom: it was made by another version or precision")


def _import_bundled() -> None:
    global _bundled_is_good
    try:
        import_wisdom(_BUNDLED.read_text())
    except ValueError:  # another build of FFTW: its estimates are slower, and right
        _bundled_is_good = False
        _forget_plans()


def _forget_plans() -> None:
    global _generation
    _generation += 1


if __name__ == "__main__":
    pyfftw.forget_wisdom()
    _BUNDLED.write_text(measure_wisdom([(side, side) for side in SIDES]) + "\n")
