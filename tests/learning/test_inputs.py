"""Stamps become tensors here and nowhere else; each recipe against a plain version of itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.learning.inputs import NO_DATA_LIMIT, NORMALISATIONS, crop_or_pad, to_tensor


def stamps_of(n=4, h=41, w=41, seed=0, sky=(100.0, 50.0, 0.0), noise=(5.0, 3.0, 6.0)):
    random = np.random.default_rng(seed)
    shape = (n, 3, h, w)
    return (random.normal(size=shape) * np.reshape(noise, (3, 1, 1)) + np.reshape(sky, (3, 1, 1))).astype(np.float32)


@settings(deadline=None, max_examples=25)
@given(h=st.integers(1, 40), w=st.integers(1, 40), size=st.integers(1, 40))
def test_the_candidate_stays_in_the_middle(h, w, size):
    """Pixel (h // 2, w // 2) lands on (size // 2, size // 2), its neighbours around it, NaN where there was none."""
    stamps = np.arange(h * w, dtype=np.float32).reshape(1, 1, h, w)
    endless = np.pad(stamps[0, 0], size, constant_values=np.nan)
    y, x = h // 2 + size - size // 2, w // 2 + size - size // 2
    np.testing.assert_array_equal(crop_or_pad(stamps, size)[0, 0], endless[y : y + size, x : x + size])


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_input_does_not_depend_on_the_size_of_the_stamp(normalisation):
    """The same candidate cut larger gives the same tensor; the stamps themselves are left alone."""
    stamps = stamps_of(h=63, w=63)
    before = stamps.copy()
    whole, _ = to_tensor(stamps, size=31, normalisation=normalisation)
    smaller, _ = to_tensor(stamps[:, :, 12:51, 12:51], size=31, normalisation=normalisation)
    np.testing.assert_array_equal(whole, smaller)
    np.testing.assert_array_equal(stamps, before)


@pytest.mark.parametrize("normalisation", sorted(set(NORMALISATIONS) - {"ztf-row-l2"}))
@pytest.mark.parametrize("filler", [np.nan, np.inf, -np.inf, -3.4028235e38, 1e300])
def test_pixels_without_data_become_empty_sky_and_spoil_nothing(normalisation, filler):
    """Whatever a survey fills blank pixels with (−3.4e38 included), the tensor is the same, and finite."""
    stamps = stamps_of().astype(np.float64)
    stamps[1, :, :5] = np.nan
    stamps[2, 0, 20, 20] = np.nan
    expected, _ = to_tensor(stamps, size=41, normalisation=normalisation)
    stamps[np.isnan(stamps)] = filler
    found, scored = to_tensor(stamps, size=41, normalisation=normalisation)
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(found).all()
    assert (found[1, :, :5] == 0).all()
    assert scored.all()


def test_too_little_data_in_any_channel_is_not_scored():
    """Half of each channel by default; a channel without a single pixel never, whatever is allowed."""
    stamps = stamps_of(5)
    stamps[0, 1, :, :21] = np.nan  # just over half
    stamps[1, 2, :, :20] = np.nan  # just under
    stamps[2, 0] = np.nan
    stamps[3] = np.inf
    tensor, scored = to_tensor(stamps, size=41, normalisation="noise-log")
    assert scored.tolist() == [False, True, False, False, True]
    assert (tensor[~scored] == 0).all()
    assert to_tensor(stamps, size=41, normalisation="none", min_finite=0)[1].tolist() == [
        True,
        True,
        False,
        False,
        True,
    ]


def plain_row_l2(image):
    """One channel, in float64: each row over its norm; a row of zeros stays zero."""
    rows = np.nan_to_num(image.astype(np.float64))
    return np.array([row / (np.linalg.norm(row) or 1.0) for row in rows])


def plain_image_l2(image):
    """One channel, in float64, over its norm."""
    values = np.nan_to_num(image.astype(np.float64))
    return values / (np.linalg.norm(values) or 1.0)


def plain_min_max(image):
    """One channel, in float64, from 0 to 1; nothing where it is constant or blank."""
    values = image.astype(np.float64)
    values = values - np.nanmin(values)
    return np.nan_to_num(values / (np.nanmax(values) or 1.0))


PLAIN = {
    "none": lambda image: np.nan_to_num(image.astype(np.float64)),
    "row-l2": plain_row_l2,
    "ztf-row-l2": plain_row_l2,
    "image-l2": plain_image_l2,
    "min-max": plain_min_max,
}


@pytest.mark.parametrize("name", PLAIN)
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-12, 1.0, 3e4, 1e12]),
    blank=st.floats(0, 0.4),
    size=st.integers(3, 24),
)
def test_recipes_match_their_definition(name, seed, scale, blank, size):
    """Stamp by stamp and channel by channel in plain NumPy, for bright and faint pixels, blank ones among them."""
    random = np.random.default_rng(seed)
    stamps = (scale * random.normal(10.0, 3.0, (3, 3, size, size))).astype(np.float32)
    stamps[random.random(stamps.shape) < blank] = np.nan
    stamps[0, 0, 1] = 0
    stamps[1, 1] = np.float32(scale)
    tensor, scored = to_tensor(stamps, size=size, normalisation=name, min_finite=0)
    assert np.isfinite(tensor).all()
    for i, c in np.ndindex(3, 3):
        if scored[i]:
            np.testing.assert_allclose(tensor[i, c], PLAIN[name](stamps[i, c]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("filler", [-3.4028235e38, np.inf, 1e300])
def test_ztf_rows_with_filled_pixels_are_empty(filler):
    """As in float32, where their norm is infinite; NaN leaves the rest of its row alone, and the stamp is scored."""
    stamps = stamps_of().astype(np.float64)
    stamps[1, 1, 5, 7] = np.nan
    stamps[1, 1, 9, 7] = filler
    found, scored = to_tensor(stamps, size=41, normalisation="ztf-row-l2")
    usual, _ = to_tensor(stamps, size=41, normalisation="row-l2")
    assert scored.all()
    assert (found[1, 1, 9] == 0).all()
    usual[1, 1, 9] = 0
    np.testing.assert_array_equal(found, usual)


@settings(deadline=None, max_examples=25)
@given(factor=st.floats(1e-6, 1e6), name=st.sampled_from(["row-l2", "ztf-row-l2", "image-l2", "min-max"]))
def test_recipes_that_normalise_know_no_units(factor, name):
    """Counts or electrons: the same tensor, between −1 and 1, with norms and ranges of one."""
    stamps = stamps_of(2)
    plain, _ = to_tensor(stamps, size=31, normalisation=name)
    changed, _ = to_tensor(stamps * np.float32(factor), size=31, normalisation=name)
    np.testing.assert_allclose(changed, plain, atol=2e-6)
    assert np.abs(plain).max() <= 1
    if name == "min-max":
        assert (plain.min(axis=(2, 3)) == 0).all()
        assert (plain.max(axis=(2, 3)) == 1).all()
    else:
        axes = (2, 3) if name == "image-l2" else 3
        np.testing.assert_allclose(np.sum(np.square(plain, dtype=np.float64), axis=axes), 1.0, rtol=1e-5)


def test_pixels_that_overflow_when_squared_are_still_normalised():
    """A float32 norm of these would be infinite, and the stamp empty."""
    tensor, _ = to_tensor(np.full((1, 3, 5, 5), 1e25), size=5, normalisation="image-l2")
    np.testing.assert_allclose(tensor, 0.2, rtol=1e-6)


@settings(deadline=None, max_examples=40)
@given(h=st.integers(1, 20), w=st.integers(1, 20), name=st.sampled_from(sorted(PLAIN)))
def test_truncated_stamps_are_padded_as_the_card_says(h, w, name):
    """Bottom and right for stamps that are not square, with a value that stands after normalising; others centred."""
    size = 12
    stamps = stamps_of(2, h, w)
    how = {"size": size, "normalisation": name, "min_finite": 0}
    tensor, _ = to_tensor(stamps, truncated="corner", padding=1e-9, **how)
    if h == w:
        expected, _ = to_tensor(stamps, padding=1e-9, **how)
    else:
        top, left = max(0, h // 2 - size // 2), max(0, w // 2 - size // 2)
        kept = stamps[:, :, top : top + size, left : left + size]
        whole = np.full((2, 3, size, size), np.nan, np.float32)
        whole[:, :, : kept.shape[2], : kept.shape[3]] = kept
        expected, _ = to_tensor(whole, **how)
        expected[:, :, kept.shape[2] :] = expected[:, :, :, kept.shape[3] :] = 1e-9
    np.testing.assert_array_equal(tensor, expected)


def test_stamps_that_are_not_scored_are_not_padded():
    """Zeros throughout, whatever the card says of padding."""
    stamps = stamps_of(2, 8, 12)
    stamps[0] = np.nan
    tensor, scored = to_tensor(stamps, size=12, normalisation="none", truncated="corner", padding=1e-9, layout="NHWC")
    assert scored.tolist() == [False, True]
    assert (tensor[0] == 0).all()
    assert (tensor[1, 8:] == np.float32(1e-9)).all()


def test_lsst_takes_its_channels_in_its_order():
    """Difference, science, template, as they are."""
    stamps = stamps_of()
    tensor, _ = to_tensor(stamps, size=41, normalisation="none", channels=("difference", "new", "ref"))
    np.testing.assert_array_equal(tensor, stamps[:, [2, 0, 1]])


def plain_noise_log(stamp, wide=None):
    """The slow meaning of the recipe "noise-log", for one stamp without blanks; or of what is `wide` around it."""
    sky, noise = [], []
    for image in stamp.astype(np.float64):
        inside = np.ones(image.shape, bool)
        for _ in range(30):
            mean, sigma = image[inside].mean(), image[inside].std()
            inside = np.abs(image - mean) < 3 * sigma
        sky.append(mean)
        noise.append(sigma)
    scale = [np.hypot(noise[0], noise[1])] * 2 + [noise[2]]
    out = []
    for image, level, sigma in zip(stamp if wide is None else wide, sky, scale, strict=True):
        v = (image - level) / sigma * (1 if wide is None else 3)
        mantissa, exponent = np.frexp(1 + np.abs(v))  # mantissa in [0.5, 1)
        out.append(np.sign(v) * (exponent - 1 + 2 * mantissa - 1))
    return np.array(out)


def test_noise_log_matches_its_definition():
    """Clipped sky and noise, one scale for new and reference, and the logarithm by pieces."""
    stamps = stamps_of()
    y, x = np.mgrid[:41, :41] - 20
    star = 5e4 * np.exp(-(x**2 + y**2) / 8)
    stamps[1, :2] += star.astype(np.float32)
    stamps[2, [0, 2]] -= star.astype(np.float32)
    tensor, _ = to_tensor(stamps, size=41, normalisation="noise-log")
    for stamp, found in zip(stamps, tensor, strict=True):
        np.testing.assert_allclose(found, plain_noise_log(stamp), atol=2e-3)


def plain_means(square):
    """Of the pixels with data among 3 × 3 around every second one, in float64; NaN where there are none."""
    n = len(square) // 2
    out = np.full((n, n), np.nan)
    for j, i in np.ndindex(n, n):
        nine = square[2 * j : 2 * j + 3, 2 * i : 2 * i + 3].astype(np.float64)
        if np.isfinite(nine).any():
            out[j, i] = np.nanmean(nine)
    return out


@settings(deadline=None, max_examples=25)
@given(side=st.integers(12, 36), size=st.sampled_from([9, 12, 15]), blank=st.floats(0, 0.6), seed=st.integers(0, 9999))
def test_the_second_scale_shows_what_is_around(side, size, blank, seed):
    """Twice as far, in means that leave blank pixels out, by the sky and noise of the middle; the first is as ever."""
    random = np.random.default_rng(seed)
    stamps = stamps_of(3, side, side, seed)
    around = np.pad(np.zeros((size, size), bool), 40, constant_values=True)
    far = crop_or_pad(around[None, None].astype(np.float32), side)[0, 0] == 1
    stamps[(random.random(stamps.shape) < blank) & far] = random.choice([np.nan, np.inf, -3.4e38])
    first, scored = to_tensor(stamps, size=size, normalisation="noise-log")
    both, same = to_tensor(stamps, size=size, normalisation="noise-log", scales=(1, 2))
    np.testing.assert_array_equal(both[:, :3], first)
    np.testing.assert_array_equal(same, scored)
    squares = crop_or_pad(stamps, 2 * size + 1)
    squares[~(np.abs(squares) < NO_DATA_LIMIT)] = np.nan
    middles = crop_or_pad(stamps, size)
    for k in np.flatnonzero(scored & np.isfinite(middles).all(axis=(1, 2, 3))):
        wide = np.nan_to_num(plain_noise_log(middles[k], np.array([plain_means(c) for c in squares[k]])))
        np.testing.assert_allclose(both[k, 3:], wide, atol=5e-3)
    turned, _ = to_tensor(stamps, size=size, normalisation="noise-log", scales=(1, 2), layout="NHWC", channels=("ref",))
    np.testing.assert_array_equal(turned, both[:, [1, 4]].transpose(0, 2, 3, 1))


def test_both_scales_turn_with_the_sky():
    """A stamp that is turned or mirrored gives a tensor that is, to the last pixel: they have one middle."""
    stamps = stamps_of(4, 63, 63)
    made, _ = to_tensor(stamps, size=31, normalisation="noise-log", scales=(1, 2))
    for turn in (lambda a: np.rot90(a, 1, (2, 3)), lambda a: a[..., ::-1]):
        found, _ = to_tensor(np.ascontiguousarray(turn(stamps)), size=31, normalisation="noise-log", scales=(1, 2))
        np.testing.assert_allclose(found, turn(made), atol=1e-4)


def test_scales_that_do_not_go_are_refused():
    """Other sizes, other recipes, padding."""
    for how in ({"scales": (2,)}, {"scales": (1, 2), "normalisation": "min-max"}, {"scales": (1, 2), "padding": 1.0}):
        with pytest.raises(ValueError, match="the latter with noise-log and without padding"):
            to_tensor(stamps_of(), **({"size": 9, "normalisation": "noise-log"} | how))


@settings(deadline=None, max_examples=40)
@given(
    h=st.integers(1, 24),
    w=st.integers(1, 24),
    size=st.integers(1, 24),
    blank=st.floats(0, 0.7),
    truncated=st.sampled_from(["centre", "corner"]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_noise_log_in_one_pass_is_the_recipe_after_the_steps_one_by_one(h, w, size, blank, truncated, dtype, seed):
    """Crop, blank, scale, order and layout: the same bits, whatever is blank, cut off or larger than the stamp."""
    random = np.random.default_rng(seed)
    stamps = stamps_of(5, h, w, seed).astype(dtype)
    stamps[random.random(stamps.shape) < blank] = random.choice([np.nan, np.inf, -3.4028235e38])
    how = {"size": size, "truncated": truncated, "min_finite": 0.4}
    plain = crop_or_pad(stamps, size, truncated=truncated)
    plain[~(np.abs(plain) < NO_DATA_LIMIT)] = np.nan
    enough = np.isfinite(plain).sum(axis=(2, 3)).min(axis=1) >= max(1.0, 0.4 * size * size)
    expected = np.where(enough[:, None, None, None], NORMALISATIONS["noise-log"](plain), 0)
    found, scored = to_tensor(stamps, normalisation="noise-log", **how)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scored, enough)
    turned = {"channels": ("difference", "new"), "layout": "NHWC", "padding": 2.0}
    found, _ = to_tensor(stamps, normalisation="noise-log", **turned, **how)
    inside = crop_or_pad(np.zeros((1, 1, h, w)), size, truncated=truncated)[0, 0] == 0
    np.testing.assert_array_equal(found[:, inside], expected[:, [2, 0]].transpose(0, 2, 3, 1)[:, inside])
    assert (found[enough][:, ~inside] == 2).all()
    assert (found[~enough] == 0).all()


@settings(deadline=None, max_examples=20)
@given(gain=st.floats(1e-4, 1e4), pedestal=st.floats(-100, 100))
def test_noise_log_knows_no_units_and_no_pedestal(gain, pedestal):
    """Other units, or a sky left in, and a model sees the same."""
    stamps = stamps_of(2)
    plain, _ = to_tensor(stamps, size=31, normalisation="noise-log")
    changed, _ = to_tensor((stamps + np.float32(pedestal)) * np.float32(gain), size=31, normalisation="noise-log")
    np.testing.assert_allclose(changed, plain, atol=5e-3)


def test_noise_log_is_linear_in_the_noise_and_logarithmic_above():
    """The identity up to one sigma, within 0.09 of log2(1 + |v|) everywhere, odd and rising."""
    size = 101
    random = np.random.default_rng(1)
    stamps = random.normal(size=(1, 3, size, size)).astype(np.float32)
    v = np.concatenate([-np.geomspace(1e-3, 1e5, 50)[::-1], np.geomspace(1e-3, 1e5, 50)])
    stamps[0, 2, 0, : len(v)] = v
    tensor, _ = to_tensor(stamps, size=size, normalisation="noise-log")
    sky, sigma = stamps[0, 2, 1:].mean(), stamps[0, 2, 1:].std()
    seen, w = tensor[0, 2, 0, : len(v)], (v - sky) / sigma
    assert (np.diff(seen) > 0).all()
    np.testing.assert_allclose(
        seen, np.sign(w) * np.log2(1 + np.abs(w)), atol=0.15
    )  # 0.09, and clipped sigma is 1 % less
    np.testing.assert_allclose(seen[np.abs(w) < 0.9], w[np.abs(w) < 0.9], atol=0.05)


def test_stamps_without_noise_are_finite():
    """A constant channel has no noise to divide by; it is empty, not infinite."""
    tensor, scored = to_tensor(np.full((1, 3, 31, 31), 7.0), size=31, normalisation="noise-log")
    assert scored.all()
    assert (tensor == 0).all()


def test_layout_and_channels_follow_the_card():
    """NHWC is NCHW with the channels last; channels come in the order asked for."""
    stamps = stamps_of()
    first, _ = to_tensor(stamps, size=21, normalisation="image-l2")
    last, _ = to_tensor(stamps, size=21, normalisation="image-l2", layout="NHWC")
    turned, _ = to_tensor(stamps, size=21, normalisation="image-l2", channels=("difference", "new", "ref"))
    np.testing.assert_array_equal(last, first.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(turned, first[:, [2, 0, 1]])


def test_no_stamps_give_no_rows():
    """An image without candidates is no special case."""
    tensor, scored = to_tensor(np.empty((0, 3, 63, 63), np.float32), size=31, normalisation="noise-log")
    assert tensor.shape == (0, 3, 31, 31)
    assert scored.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalisation": "zscale"}, "unknown normalisation 'zscale'; known: none, row-l2"),
        ({"layout": "CHWN"}, "unknown layout"),
        ({"truncated": "left"}, "unknown place of truncated stamps 'left'; known: centre, corner"),
        ({"channels": ("new", "template", "difference")}, "unknown channel 'template'"),
    ],
)
def test_unknown_names_are_refused(change, message):
    """With the names that there are."""
    with pytest.raises(ValueError, match=message):
        to_tensor(stamps_of(), **({"size": 31, "normalisation": "none"} | change))


@pytest.mark.parametrize("normalisation", ["noise-log", "image-l2"])
@pytest.mark.parametrize("kind", [">f4", "f2", ">i2", "f8", "longdouble"])
def test_any_type_of_number_will_do(normalisation, kind):
    """FITS is big-endian, archives are of half precision or integers: the same tensor as of these values in float32."""
    stamps = np.nan_to_num(50 * stamps_of()).astype(kind)
    tensor, scored = to_tensor(stamps, size=31, normalisation=normalisation)
    expected, _ = to_tensor(stamps.astype(np.float32), size=31, normalisation=normalisation)
    assert scored.all()
    np.testing.assert_allclose(tensor, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["complex64", "U3", object])
def test_what_is_no_number_is_refused(kind):
    """Rather than by whatever comes upon it."""
    with pytest.raises(ValueError, match="expected real numbers"):
        to_tensor(np.zeros((2, 3, 63, 63)).astype(kind), size=31, normalisation="noise-log")


def test_channels_last_are_refused():
    """(n, h, w, 3) is not taken for something else."""
    with pytest.raises(ValueError, match=r"expected \(n, 3, h, w\)"):
        to_tensor(np.zeros((2, 63, 63, 3)), size=31, normalisation="none")
