"""Numbers become 8-bit integers and back as the formula says, held against the same in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.learning.integers import activation_steps, dequantise, quantise, weight_scales

TYPES = (np.int8, np.uint8)


@settings(deadline=None, max_examples=50)
@given(
    dtype=st.sampled_from(TYPES),
    scale=st.floats(1e-6, 1e3),
    zero=st.integers(-128, 127),
    spread=st.floats(0, 300),
    seed=st.integers(0, 1000),
)
def test_the_nearest_integer_within_the_range(dtype, scale, zero, spread, seed):
    """That of float64, but where a number lies halfway between two within the precision of float32."""
    limits = np.iinfo(dtype)
    zero = zero if dtype is np.int8 else zero + 128
    values = np.random.default_rng(seed).normal(0, spread * scale, (40, 5)).astype(np.float32)
    before = values.copy()
    found = quantise(values, scale, zero, dtype)
    exact = values.astype(np.float64) / np.float64(scale)
    expected = np.clip(np.rint(exact) + zero, limits.min, limits.max)
    halfway = np.abs(exact - np.floor(exact) - 0.5) < 1e-6 * np.maximum(np.abs(exact), 1)
    np.testing.assert_array_equal(found[~halfway], expected[~halfway])
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found.dtype, found.shape) == (np.dtype(dtype), values.shape)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize(("dtype", "zero"), [(np.int8, -5), (np.uint8, 128)])
def test_there_and_back_is_exact_for_every_integer(dtype, zero):
    """All 256 of them; the numbers are those of float64 within float32."""
    limits = np.iinfo(dtype)
    integers = np.arange(limits.min, limits.max + 1).astype(dtype)
    scale = 0.0371
    values = dequantise(integers, scale, zero)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, scale * (integers.astype(np.float64) - zero), rtol=2e-7)
    np.testing.assert_array_equal(quantise(values, scale, zero, dtype), integers)


def test_halves_go_to_the_even_integer_and_the_ends_hold():
    """As rint does; nothing wraps around."""
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30], np.float32)
    assert quantise(values, 1.0, 0).tolist() == [0, 2, 2, 0, -2, 127, -128]
    assert quantise(values[::2], 1.0, 0).tolist() == [0, 2, -2, -128], "not contiguous"


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_must_be_positive(scale):
    """A tensor that is not quantised has the scale 0."""
    with pytest.raises(ValueError, match="must be positive"):
        quantise(np.zeros(3, np.float32), scale, 0)
    with pytest.raises(ValueError, match="must be positive"):
        dequantise(np.zeros(3, np.int8), scale, 0)


@settings(deadline=None, max_examples=200)
@given(a=st.floats(-1e6, 1e6, width=32), b=st.floats(-1e6, 1e6, width=32))
def test_steps_of_activations_span_what_was_seen(a, b):
    """From the least to the largest within half a step, and 0 is a whole number of steps."""
    low, high = min(a, b), max(a, b)
    scale, zero = activation_steps(low, high)
    assert -128 <= zero <= 127
    assert scale > 0
    least, most = scale * (-128 - zero), scale * (127 - zero)
    assert least <= 0 <= most
    assert least - 0.51 * scale <= min(low, 0)
    assert most + 0.51 * scale >= max(high, 0)
    assert most - least <= 1.001 * max(max(high, 0) - min(low, 0), 1e-35) or low == high == 0


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 1000),
    weight=st.floats(1e-20, 1e6),
    bias=st.floats(0, 1e6),
    scale_in=st.floats(1e-6, 1e3),
    axis=st.sampled_from([0, 3, None]),
)
def test_scales_of_weights_hold_weights_and_biases(seed, weight, bias, scale_in, axis):
    """Weights within 127 steps, biases within 31 bits; a scale for each channel, no finer than they need."""
    random = np.random.default_rng(seed)
    weights = (weight * random.normal(size=(4, 2, 2, 4))).astype(np.float32)
    weights[(slice(None),) * (axis or 0) + (1,)] = 0
    offsets = (bias * random.normal(size=4)).astype(np.float32)
    scales = weight_scales(weights, offsets, scale_in, axis)
    assert scales.shape == ((4,) if axis is not None else (1,))
    assert (scales > 0).all()
    spread = [-1 if k == axis else 1 for k in range(4)]
    assert np.abs(weights / scales.reshape(spread).astype(np.float64)).max() <= 127.01
    assert np.abs(offsets / (scale_in * scales.astype(np.float64))).max() < 2**31 - 1
