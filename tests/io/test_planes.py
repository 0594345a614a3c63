"""The compiled passes over pixels do what the plain words say, whatever the pixels hold."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from batchproc.io.planes import NONSENSE, finish_pixels, flag_pixels
from batchproc.records import MaskBit

values = st.one_of(
    st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, 9e29, -1e31, 50.0]),
    st.floats(-1e5, 1e5, width=32),
)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
bits = st.sampled_from([0, 1, 2, 4, 5, 8])


@given(st.data(), shapes)
@settings(max_examples=60, deadline=None)
def test_pixels_are_flagged_counted_and_finished(data, shape):
    """What is no number or beyond 1e30 becomes NO_DATA and is filled; saturation is in file units; the gain is last."""
    pixels = data.draw(arrays(np.float32, shape, elements=values))
    given_bits = data.draw(arrays(np.uint8, shape, elements=bits))
    bad = ~(np.abs(pixels) < np.float32(NONSENSE))
    flags = given_bits.copy()
    found = flag_pixels(pixels, flags)
    expected = given_bits | np.where(bad, np.uint8(MaskBit.NO_DATA), np.uint8(0))
    np.testing.assert_array_equal(flags, expected)
    known = pixels[(expected & MaskBit.NO_DATA) == 0]
    assert found[:2] == (np.count_nonzero(bad), np.count_nonzero(pixels == 0))
    assert found[2:] == (known.min(initial=np.inf), known.max(initial=-np.inf))

    finished = pixels.copy()
    finish_pixels(finished, flags, np.float32(7), np.float32(50), np.float32(1.6))
    filled = np.where(bad, np.float32(7), pixels)
    np.testing.assert_array_equal(finished, filled * np.float32(1.6))
    saturated = np.where(filled >= 50, np.uint8(MaskBit.SATURATED), np.uint8(0))
    np.testing.assert_array_equal(flags, expected | saturated)
