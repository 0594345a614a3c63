"""The noise of sources, on blocks and run by run, is what filters over the whole image give."""

import numpy as np
import pytest
from scipy import ndimage

from batchproc.imaging.psf import PsfModel
from batchproc.imaging.variance import source_variance
from batchproc.records import MaskBit

from ._starfield import moffat, stamp, star_field


def plain(data, sky, fwhm, gain=1.0):
    """The formula of the docstring, in double precision; odd sides are filled up with zeros."""
    image = np.nan_to_num(data.astype(np.float64), nan=0, posinf=0, neginf=0)
    ny, nx = image.shape
    even = np.pad(image, ((0, ny % 2), (0, nx % 2)))
    sigma = fwhm / 2.3548
    blocks = even.reshape(even.shape[0] // 2, 2, -1, 2).mean((1, 3))
    width = np.sqrt(max(sigma**2 - 0.25, 0)) / 2
    score = ndimage.gaussian_filter(blocks, width, mode="constant", truncate=3) / np.sqrt(sky[::2, ::2])
    sample = score[:: max(1, score.shape[0] // 256), :: max(1, score.shape[1] // 256)]
    noise = max(1.4826 * np.median(np.abs(sample - np.median(sample))), 1 / (4 * np.sqrt(np.pi) * max(width, 0.5)))
    found = ndimage.maximum_filter((score > 4 * noise).astype(int), 2 * int(np.ceil(fwhm / 2)) + 1) > 0
    found = found.repeat(2, 0).repeat(2, 1)[:ny, :nx]
    # Padded, for the second smoothing meets what the first has spread over the edges.
    padded = np.pad(image, 20)
    once = ndimage.gaussian_filter(padded, 0.35 * sigma, mode="constant", truncate=3)
    light = 2 * once - ndimage.gaussian_filter(once, 0.35 * sigma, mode="constant", truncate=3)
    return np.where(found, sky + np.maximum(light[20:-20, 20:-20], 0) / gain, sky)


@pytest.mark.parametrize(("fwhm", "shape"), [(1.6, (150, 150)), (3.5, (149, 151)), (8.0, (150, 133))])
def test_the_fast_variance_is_the_plain_one(fwhm, shape):
    """Any width of the PSF, odd sides, stars at the edges, NaN and infinities: equal within float32."""
    field = star_field(moffat(fwhm), n=160, n_stars=25, flux=(500, 2e5), separation=5, margin=1, seed=3)
    data = field.flat[: shape[0], : shape[1]].copy()
    data[40:44, 50] = [np.nan, np.inf, -np.inf, np.nan]
    sky = np.linspace(400, 450, shape[1], dtype=np.float32) * np.ones((shape[0], 1), np.float32)
    psf = PsfModel.from_array(stamp(moffat(fwhm), 41))
    found, expected = source_variance(data, sky, psf, gain=2.0), plain(data, sky, psf.fwhm, gain=2.0)
    assert found.dtype == np.float32
    assert np.mean(found > sky) > 0.05
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_what_a_masked_pixel_holds_lights_nothing_up_around_it():
    """Hot pixels that are masked, of any height, leave the variance of their neighbours that of the sky.

    Saturated ones shine: the star around them does.
    """
    rng = np.random.default_rng(0)
    data, sky = rng.normal(0, 20, (120, 121)).astype(np.float32), np.full((120, 121), 400, np.float32)
    mask = np.zeros(data.shape, np.uint8)
    rows, columns = rng.integers(2, 118, (2, 40))
    mask[rows, columns] = MaskBit.BAD | MaskBit.SATURATED
    psf = PsfModel.from_array(stamp(moffat(3.5), 41))
    quiet = np.where(mask != 0, np.float32(0), data)
    expected = source_variance(quiet, sky, psf)
    assert expected.max() < 600
    for value in (65_000, -1e30, 1e30):
        data[mask != 0] = value
        np.testing.assert_array_equal(source_variance(data, sky, psf, mask=mask), expected)
    data[mask != 0] = 60_000
    mask[mask != 0] = MaskBit.SATURATED
    np.testing.assert_array_equal(source_variance(data, sky, psf, mask=mask), source_variance(data, sky, psf))
    assert source_variance(data, sky, psf, mask=mask).max() > 30_000
