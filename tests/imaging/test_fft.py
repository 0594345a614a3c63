"""pyFFTW against numpy, and the ways in which bytes must repeat."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.imaging.fft import get_fft, import_wisdom, measure_wisdom


@given(ny=st.integers(1, 70), nx=st.integers(2, 70), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_transforms_agree_with_numpy(ny, nx, seed):
    """Any shape, odd ones too; and the way back is exact to rounding."""
    array = np.random.default_rng(seed).normal(size=(ny, nx))
    fft = get_fft((ny, nx))
    np.testing.assert_allclose(fft.rfft2(array), np.fft.rfft2(array), atol=1e-10)
    np.testing.assert_allclose(fft.irfft2(fft.rfft2(array)), array, atol=1e-12)


def test_inputs_survive_and_results_are_new():
    """Neither direction touches what it is given, and results do not share memory."""
    fft = get_fft((32, 32))
    array = np.arange(1024.0).reshape(32, 32)
    first = fft.rfft2(array)
    kept = first.copy()
    fft.irfft2(first)
    second = fft.rfft2(array)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first, second)
    assert first is not second


def test_threads_do_not_share_plans():
    """Many threads at once give what one gives."""
    arrays = [np.random.default_rng(i).normal(size=(128, 128)) for i in range(16)]
    alone = [get_fft((128, 128)).rfft2(a) for a in arrays]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda a: get_fft((128, 128)).rfft2(a), arrays))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_frozen_wisdom_makes_processes_agree_to_the_last_bit():
    """Processes that import the same wisdom compute the same bytes."""
    wisdom = measure_wisdom([(96, 96)])
    code = (
        "import sys, hashlib, numpy as np\n"
        "from batchproc.imaging.fft import get_fft, import_wisdom\n"
        "import_wisdom(sys.stdin.read())\n"
        "a = np.random.default_rng(0).normal(size=(96, 96))\n"
        "print(hashlib.sha256(get_fft((96, 96)).rfft2(a).tobytes()).hexdigest())\n"
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
