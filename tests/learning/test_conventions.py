"""Stamps become such as a model expects: sky under them where there was none, the difference the way round it wants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.learning.conventions import to_convention
from batchproc.learning.inputs import to_tensor


def stamps_of(seed=0, n=6, size=31, sky=0.0, noise=(3.0, 0.7, 3.1)):
    """Noise, and a star in the middle that has changed: up in one stamp, down in the next."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - size // 2
    star = np.exp(-(x**2 + y**2) / 4.0)
    change = np.where(np.arange(n) % 2 == 0, 1.0, -0.6)[:, None, None]
    flux = np.stack([100 * star * (1 + change), 100 * star + 0 * change, 100 * star * change], axis=1)
    stamps = flux + np.array(noise)[:, None, None] * rng.standard_normal((n, 3, size, size))
    stamps[:, :2] += sky
    return stamps.astype(np.float32)


def test_sky_is_given_to_stamps_that_have_none():
    """As much as asked, in units of the noise of new, to new and reference alike; the difference has none anywhere."""
    stamps = stamps_of()
    found = to_convention(stamps, sky=13.0, sign="new-ref")
    np.testing.assert_allclose(np.median(found[:, :2], axis=(2, 3)), 13 * 3.0, rtol=0.05)
    np.testing.assert_array_equal(found[:, 2], stamps[:, 2])
    risen = found[:, :2] - stamps[:, :2]
    assert np.ptp(risen, axis=(2, 3)).max() < 1e-4, "what stands on the sky is what it was"


def test_a_sky_that_is_there_is_left():
    """Of ZTF's packets nothing changes: their scores are the survey's own to the last digit."""
    stamps = stamps_of(sky=150.0)
    np.testing.assert_array_equal(to_convention(stamps, sky=13.0, sign="new-ref"), stamps)


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_the_sign_is_that_of_the_candidate(seed):
    """Turned where it faded, and only there; turned twice is turned once; nobody else's array is changed."""
    stamps = stamps_of(seed)
    before = stamps.copy()
    found = to_convention(stamps, sky=0.0, sign="positive")
    np.testing.assert_array_equal(found[::2], stamps[::2])
    np.testing.assert_array_equal(found[1::2, 2], -stamps[1::2, 2])
    np.testing.assert_array_equal(found[:, :2], stamps[:, :2])
    np.testing.assert_array_equal(to_convention(found, sky=0.0, sign="positive"), found)
    np.testing.assert_array_equal(stamps, before)


@pytest.mark.parametrize("filler", [np.nan, np.inf, -3.4e38, -1e300])
def test_pixels_without_data_stay_so(filler):
    """Whatever a survey marks them with, they count for neither sky nor sign, and what is blank stays blank."""
    stamps = stamps_of().astype(np.float64)
    good = to_convention(stamps, sky=13.0, sign="positive")
    stamps[:, :, :8] = filler
    stamps[:, 2, 15, 16] = filler
    found = to_convention(stamps, sky=13.0, sign="positive")
    usable = np.abs(found) < 1e30
    assert not usable[:, :, :8].any()
    assert usable[:, :, 8:].sum() == good[:, :, 8:].size - len(good)
    np.testing.assert_array_equal(np.sign(found[:, 2, 15, 15]), 1)
    np.testing.assert_allclose(np.median(found[:, 0, 8:], axis=(1, 2)), 13 * 3.0, rtol=0.06)


def test_blank_and_constant_stamps_do_no_harm():
    """No noise, no sky to give."""
    stamps = np.stack([np.full((3, 9, 9), np.nan), np.zeros((3, 9, 9))]).astype(np.float32)
    np.testing.assert_array_equal(to_convention(stamps, sky=13.0, sign="positive"), stamps)


def test_it_comes_before_the_normalisation():
    """Rows over their norm: of a stamp with sky they are flat, as they were when the model learnt."""
    stamps = stamps_of()
    plain, _ = to_tensor(stamps, size=31, normalisation="row-l2")
    lit, _ = to_tensor(stamps, size=31, normalisation="row-l2", sky=13.0, sign="positive")
    assert np.std(plain[:, 0, 0]) > 0.1
    assert np.std(lit[:, 0, 0]) < 0.03
    assert (lit[:, 2, 15, 15] > 0).all()
    with pytest.raises(ValueError, match="unknown sign 'up'; known: new-ref, positive"):
        to_tensor(stamps, size=31, normalisation="row-l2", sign="up")
