"""Windows are what padding and slicing give; rounding is exact, bounded, and keeps what is not a number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from batchproc.imaging.cutouts import cut, round_to_noise, windows

few = settings(max_examples=60, deadline=None)


@few
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    half=st.integers(0, 7),
    centres=st.lists(st.tuples(st.integers(-9, 20), st.integers(-9, 20)), max_size=5),
)
def test_windows_equal_the_plain_meaning(shape, half, centres):
    """A window is a slice of the padded image, wherever its centre lies."""
    image = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    pad = half + 30
    padded = np.pad(image, pad, constant_values=-1)
    found = windows(image, [c[0] for c in centres], [c[1] for c in centres], half, -1)
    assert found.shape == (len(centres), 2 * half + 1, 2 * half + 1)
    for window, (i, j) in zip(found, centres, strict=True):
        expected = padded[j + pad - half : j + pad + half + 1, i + pad - half : i + pad + half + 1]
        np.testing.assert_array_equal(window, expected)


@pytest.mark.parametrize("position", [(0, 0), (19.4, 14.3), (-0.4, 15), (3.6, 14)])
def test_stamps_are_centred_on_the_nearest_pixel_and_nan_outside(position):
    """The central pixel is the one nearest to the position; what lies off the image is NaN in all three channels."""
    x, y = position
    rng = np.random.default_rng(1)
    planes = [rng.normal(size=(16, 20)) for _ in range(3)]
    before = [p.copy() for p in planes]
    stamps = cut(*planes, [x], [y], 9)
    assert stamps.shape == (1, 3, 9, 9)
    assert stamps.dtype == np.float32
    i, j = round(x), round(y)
    for channel, plane in enumerate(planes):
        assert stamps[0, channel, 4, 4] == np.float32(plane[j, i])
    rows, columns = np.mgrid[j - 4 : j + 5, i - 4 : i + 5]
    outside = (rows < 0) | (rows >= 16) | (columns < 0) | (columns >= 20)
    np.testing.assert_array_equal(np.isnan(stamps[0]), np.broadcast_to(outside, (3, 9, 9)))
    for plane, old in zip(planes, before, strict=True):
        np.testing.assert_array_equal(plane, old)


def test_no_data_and_nan_stay_nan():
    """Where there is no data in the mask, all channels are NaN; a plane's own NaN stays in its channel."""
    new = np.ones((11, 11), np.float32)
    ref, difference = new.copy(), new.copy()
    ref[5, 6] = np.nan
    no_data = np.zeros((11, 11), bool)
    no_data[4, 4] = True
    stamp = cut(new, ref, difference, [5], [5], 5, no_data=no_data)[0]
    assert np.isnan(stamp[:, 1, 1]).all()
    assert np.isnan(stamp[:, 2, 3]).tolist() == [False, True, False]
    assert np.isnan(stamp).sum() == 4


def test_no_positions_give_no_stamps():
    image = np.zeros((9, 9), np.float32)
    assert cut(image, image, image, [], [], 5).shape == (0, 3, 5, 5)


def test_wrong_sizes_are_refused():
    image = np.zeros((9, 9), np.float32)
    with pytest.raises(ValueError, match="odd"):
        cut(image, image, image, [4], [4], 4)
    with pytest.raises(ValueError, match="one grid"):
        cut(image, image, image[:5], [4], [4], 3)


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


@few
@given(
    stamps=arrays(np.float32, (2, 3, 2, 2), elements=floats),
    sigma=arrays(np.float64, (2, 3), elements=st.floats(0, 1e30)),
    fraction=st.sampled_from([0.0, 1 / 16, 0.1, 0.5]),
)
def test_rounding_is_exact_bounded_and_keeps_what_is_not_a_number(stamps, sigma, fraction):
    """Every finite value moves by at most half a step onto an exact multiple of a power of two; the rest stays."""
    before = stamps.copy()
    rounded = round_to_noise(stamps, sigma, fraction)
    np.testing.assert_array_equal(stamps, before)
    assert rounded.dtype == np.float32
    finite = np.isfinite(stamps)
    np.testing.assert_array_equal(rounded[~finite], stamps[~finite])
    for n, c in np.ndindex(2, 3):
        limit = sigma[n, c] * fraction
        good = finite[n, c]
        old, new = stamps[n, c][good].astype(np.float64), rounded[n, c][good].astype(np.float64)
        if limit < 2.0**-126 or limit >= 2.0**104:
            np.testing.assert_array_equal(old, new)
            continue
        step = 2.0 ** np.floor(np.log2(limit))
        assert step <= limit < 2 * step
        assert np.all(np.abs(new - old) <= step / 2)
        assert np.all(new / step == np.round(new / step))


@few
@given(stamps=arrays(np.float32, (1, 1, 3, 3), elements=floats), sigma=st.floats(1e-3, 1e3))
def test_rounding_twice_changes_nothing(stamps, sigma):
    once = round_to_noise(stamps, [[sigma]], 1 / 16)
    np.testing.assert_array_equal(round_to_noise(once, [[sigma]], 1 / 16), once)


def test_unusable_noise_leaves_stamps_exact():
    """A channel whose noise is unknown is not rounded."""
    stamps = np.random.default_rng(2).normal(size=(1, 3, 4, 4)).astype(np.float32)
    rounded = round_to_noise(stamps, [[np.nan, 0.0, np.inf]], 1 / 16)
    np.testing.assert_array_equal(rounded, stamps)


def test_rounding_costs_no_signal():
    """At a sixteenth of the noise the variance grows by less than 0.1 %."""
    stamps = np.random.default_rng(3).normal(0, 7, size=(4, 3, 63, 63)).astype(np.float32)
    rounded = round_to_noise(stamps, 7.0, 1 / 16)
    assert abs(rounded.std() / stamps.std() - 1) < 5e-4
    assert np.unique(rounded).size < 300
