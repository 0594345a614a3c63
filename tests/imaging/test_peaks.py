"""Peaks are what stands out of its surroundings; fast passes give what the plain ones give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import convolve, gaussian_filter, label, maximum_filter

from batchproc.imaging.peaks import find_basins, local_extrema, pixels_above, smooth_above

few = settings(max_examples=30, deadline=None)
shapes = st.tuples(st.integers(1, 90), st.integers(1, 150))


def field(shape, seed, width=2.0):
    image = gaussian_filter(np.random.default_rng(seed).normal(size=shape), width)
    return (image / max(image.std(), 1e-9)).astype(np.float32)


@few
@given(shape=shapes, seed=st.integers(0, 999), level=st.floats(0.1, 4), dtype=st.sampled_from([np.float32, np.float64]))
def test_pixels_above_are_those_of_the_plain_comparison(shape, seed, level, dtype):
    """Both signs, in the order of the image, without what is not finite."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=shape).astype(dtype)
    spoilt = rng.uniform(size=shape) < 0.05
    image[spoilt] = rng.choice([np.nan, np.inf, -np.inf], np.count_nonzero(spoilt))
    expected = np.flatnonzero((np.abs(image) > level) & np.isfinite(image))
    np.testing.assert_array_equal(pixels_above(image, level), expected)


@few
@given(shape=shapes, seed=st.integers(0, 999), level=st.floats(0.1, 4))
def test_smoothing_is_a_convolution(shape, seed, level):
    """With the 3 × 3 kernel, in units of its own noise; masked pixels are 0, and are never above."""
    rng = np.random.default_rng(seed)
    data = rng.normal(size=shape).astype(np.float32)
    rms = rng.uniform(0.5, 2.0, shape).astype(np.float32)
    mask = (rng.uniform(size=shape) < 0.1).astype(np.uint8)
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16.0
    plain = convolve(np.where(mask, 0, data).astype(np.float64), kernel, mode="constant")
    plain /= np.sqrt(np.sum(kernel**2)) * rms
    pixels, value = smooth_above(data, rms, mask, level)
    found = np.zeros(shape, bool)
    found.ravel()[pixels] = True
    sure = np.abs(plain - level) > 1e-5
    np.testing.assert_array_equal(found[sure], ((plain > level) & (mask == 0))[sure])
    np.testing.assert_allclose(value, plain.ravel()[pixels], atol=1e-5)


@few
@given(shape=shapes, seed=st.integers(0, 999))
def test_local_extrema_are_the_highest_of_nine(shape, seed):
    """Hills and hollows; where values are unlike, those of a maximum filter."""
    image = field(shape, seed)
    pixels = pixels_above(image, 0.5)
    expected = np.zeros(shape, bool)
    for sign in (1, -1):
        expected |= (sign * image == maximum_filter(sign * image, 3, mode="nearest")) & (sign * image > 0.5)
    np.testing.assert_array_equal(local_extrema(image, pixels), expected.ravel()[pixels])


def test_of_two_equal_pixels_one_is_the_peak():
    image = np.zeros((5, 6))
    image[2, 2] = image[2, 3] = image[3, 3] = 4.0
    pixels = pixels_above(image, 1.0)
    assert local_extrema(image, pixels).sum() == 1
    assert len(find_basins(pixels, image.ravel()[pixels], image.shape, prominence=0.1).peak) == 1


def prominences(image, level):
    """The plain definition: how far one must come down from a peak, on the way to a higher one of its island."""
    peaks = []
    tops = (image == maximum_filter(image, 3, mode="nearest")) & (image > level)
    heights = np.unique(image[image > level])[::-1]
    for y, x in zip(*np.nonzero(tops), strict=True):
        saddle = None
        for height in heights[heights <= image[y, x]]:
            islands, _ = label(image >= height, structure=np.ones((3, 3)))
            if image[islands == islands[y, x]].max() > image[y, x]:
                saddle = height
                break
        peaks.append((y * image.shape[1] + x, np.inf if saddle is None else image[y, x] - saddle))
    return dict(peaks)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), least=st.sampled_from([0.05, 0.3, 1.0]))
def test_prominence_is_the_way_down_to_the_saddle(seed, least):
    """Peaks and prominences are those of the plain definition, whatever is asked for; each owns its own pixel."""
    image = field((24, 26), seed, 1.5)
    pixels = pixels_above(np.maximum(image, 0), 0.4)
    basins = find_basins(pixels, image.ravel()[pixels], image.shape, prominence=least)
    expected = {peak: p for peak, p in prominences(image, 0.4).items() if p >= least}
    assert dict(zip(basins.peak.tolist(), basins.prominence, strict=True)) == pytest.approx(expected, abs=1e-6)
    at = np.searchsorted(basins.pixels, basins.peak)
    np.testing.assert_array_equal(basins.owner[at], np.arange(len(basins.peak)))


@few
@given(seed=st.integers(0, 999))
def test_basins_hang_together_and_part_where_the_sign_does(seed):
    """Every pixel belongs to one peak of its own sign and is no higher; the pixels of a peak are one island."""
    image = field((40, 50), seed)
    pixels = pixels_above(image, 0.3)
    value = image.ravel()[pixels]
    basins = find_basins(pixels, value, image.shape, prominence=0.5)
    top = image.ravel()[basins.peak][basins.owner]
    assert (top * value > 0).all()
    assert (np.abs(value) <= np.abs(top)).all()
    for k in range(len(basins.peak)):
        own = np.zeros(image.shape, bool)
        own.ravel()[pixels[basins.owner == k]] = True
        assert label(own, structure=np.ones((3, 3)))[1] == 1


def test_a_bump_is_part_of_the_higher_peak():
    """A small dip makes no second peak, a deep one does, also relative to the height."""
    line = np.array([[0, 9.0, 8.5, 8.8, 7.0, 3.0, 5.0, 0]])
    pixels = pixels_above(line, 1.0)

    def peaks(**more):
        return find_basins(pixels, line.ravel()[pixels], line.shape, **more)

    assert peaks(prominence=0.1).peak.tolist() == [1, 3, 6]
    assert peaks(prominence=1.0).peak.tolist() == [1, 6]
    assert peaks(prominence=0.1, fraction=0.5).peak.tolist() == [1]
    np.testing.assert_array_equal(
        peaks(prominence=1.0).owner, [0, 0, 0, 0, 0, 1]
    )  # the saddle goes to its highest neighbour
