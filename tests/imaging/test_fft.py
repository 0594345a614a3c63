"""pyFFTW against numpy, and the ways in which bytes must repeat."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.imaging.fft import get_fft, import_wisdom, measure_wisdom


def rfft2(array):
    fft = get_fft(array.shape)
    real = fft.real()
    real[:] = array
    return fft.forward(real, fft.half())


def irfft2(spectrum, shape):
    fft = get_fft(shape)
    half = fft.half()
    half[:] = spectrum
    return fft.backward(half, fft.real()) / (shape[0] * shape[1])


@given(ny=st.integers(1, 70), nx=st.integers(2, 70), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_transforms_agree_with_numpy(ny, nx, seed):
    """Any shape, odd ones too, to the rounding of single precision; and the way back."""
    array = np.random.default_rng(seed).normal(size=(ny, nx))
    expected = np.fft.rfft2(array)
    np.testing.assert_allclose(rfft2(array), expected, atol=2e-6 * np.sqrt(ny * nx))
    np.testing.assert_allclose(irfft2(expected, (ny, nx)), array, atol=2e-6)


@pytest.mark.parametrize("side", [256, 672, 1024])
def test_the_frozen_plans_agree_with_numpy(side):
    """The sides of tiles, which take plans from frozen wisdom."""
    array = np.random.default_rng(side).normal(size=(side, side))
    np.testing.assert_allclose(rfft2(array), np.fft.rfft2(array), atol=1e-6 * side)


def test_scratch_arrays_are_kept_by_name():
    """The same name gives the same memory, another name or none another."""
    fft = get_fft((32, 32))
    assert fft.real("a") is fft.real("a")
    assert fft.real("a") is not fft.real("b")
    assert fft.real() is not fft.real()
    assert fft.half("a").dtype == np.complex64


def test_threads_do_not_share_plans():
    """Many threads at once give what one gives."""
    arrays = [np.random.default_rng(i).normal(size=(128, 128)) for i in range(16)]
    alone = [rfft2(a) for a in arrays]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(rfft2, arrays))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_frozen_wisdom_makes_processes_agree_to_the_last_bit():
    """Processes that import the same wisdom compute the same bytes."""
    wisdom = measure_wisdom([(96, 96)])
    code = (
        "import sys, hashlib, numpy as np\n"
        "from batchproc.imaging.fft import get_fft, import_wisdom\n"
        "import_wisdom(sys.stdin.read())\n"
        "fft = get_fft((96, 96))\n"
        "real = fft.real()\n"
        "real[:] = np.random.default_rng(0).normal(size=(96, 96))\n"
        "print(hashlib.sha256(fft.forward(real, fft.half()).tobytes()).hexdigest())\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], input=wisdom, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_foreign_wisdom_is_refused():
    """Text that is no wisdom is an error, not a silent estimate."""
    with pytest.raises(ValueError, match="wisdom"):
        import_wisdom('["bm8=", "bm8=", "bm8="]')
