"""The correlation of noise: measured on blank sky, predicted for a kernel, and as a spectrum."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from batchproc.imaging.noise import (
    FLOOR,
    kernel_autocorrelation,
    measure_autocorrelation,
    noise_autocorrelation,
    noise_power,
)
from batchproc.imaging.pixelmap import PixelMap
from batchproc.imaging.resample import resample
from tests.imaging._psfs import gaussian
from tests.imaging._stars import render, scatter_stars

SHAPE = (800, 820)
HALF = [[1, 0, 0.5], [0, 1, 0.5]]
TURNED = [[0.9998, -0.02, 17.3], [0.02, 0.9998, 1.2]]
FINER = [[0.95, -0.7, 590], [0.7, 0.95, 3]]


def white(shape, seed, sigma=7.0):
    return np.random.default_rng(seed).normal(0, sigma, shape).astype(np.float32)


def resampled(matrix, seed=1):
    """White noise through the resampling that a map calls for."""
    pixel_map = PixelMap.from_affine(matrix, SHAPE)
    return resample(white((1400, 1400), seed), pixel_map, SHAPE), pixel_map


def periodogram(images):
    """Mean power of noise images, 1 on average over the full plane."""
    power = np.mean([np.abs(np.fft.fft2(image)) ** 2 for image in images], axis=0)
    return (power / power.mean())[:, : power.shape[1] // 2 + 1]


class TestMeasured:
    def test_white_noise_is_white(self):
        """Hardly a lag of 24 in each of six images is not exactly zero."""
        lags = [np.count_nonzero(noise_autocorrelation(white(SHAPE, seed), None, 7.0)) - 1 for seed in range(6)]
        assert sum(lags) <= 4

    @pytest.mark.parametrize("matrix", [HALF, TURNED, FINER], ids=["half a pixel", "turned", "finer"])
    def test_it_is_what_the_kernel_makes_of_white_noise(self, matrix):
        """Each lag agrees with the prediction within the error that is stated, and no worse than that."""
        image, pixel_map = resampled(matrix)
        sigma = image.data[image.mask == 0].std()
        found = measure_autocorrelation(image.data, image.mask, sigma)
        expected = kernel_autocorrelation(pixel_map)
        significant = (found.values != 0) & (found.values != 1)
        assert significant.sum() >= 8
        pulls = (found.values - expected)[significant] / found.error
        assert np.sqrt(np.mean(pulls**2)) < 1.8
        assert np.abs(found.values - expected)[~significant].max() < 6 * found.error

    def test_its_error_is_that_of_the_number_of_pixels(self):
        """1 / root of the number of blank pixels for white noise, and more where noise is correlated: lags that noise
        does not reach pass for significant (3 sigma) as rarely as they should."""
        for seed in range(4):
            measured = measure_autocorrelation(white((400, 400), seed), None, 7.0)
            assert measured.error == pytest.approx(1 / np.sqrt(measured.n_pixels), rel=0.15)
        far = np.hypot(*np.mgrid[-7:8, -7:8]) > 5
        found = [
            measure_autocorrelation(gaussian_filter(white((400, 400), seed), 0.8), None, 1.0, 7) for seed in range(12)
        ]
        assert np.mean([1 / np.sqrt(m.n_pixels) / m.error for m in found]) < 0.8
        assert np.mean([(m.values[far] != 0).mean() for m in found]) < 0.012

    def test_sources_masks_and_gradients_do_not_matter(self):
        """Stars of all brightnesses, a bad region of huge values, NaN, a slope of the sky: the same within errors."""
        image, pixel_map = resampled(HALF)
        x, y, flux = scatter_stars(300, SHAPE, 3, faintest=300, brightest=1e6)
        data = image.data + render(SHAPE, x, y, flux, 3.4) + np.linspace(-3, 3, SHAPE[1])
        mask = image.mask.copy()
        data[200:260, 300:500], mask[200:260, 300:500] = 1e6, 1
        data[500:520, 100:120] = np.nan
        found = measure_autocorrelation(data.astype(np.float32), mask, image.data.std())
        assert np.abs(found.values - kernel_autocorrelation(pixel_map)).max() < 6 * found.error

    def test_the_scale_of_the_noise_does_not_matter(self):
        """An rms that varies across the image, or another unit: the same correlation."""
        image = resampled(TURNED)[0].data
        ramp = np.linspace(1, 3, SHAPE[0], dtype=np.float32)[:, None] * np.ones(SHAPE, np.float32)
        plain = noise_autocorrelation(image, None, 1.0)
        assert np.allclose(noise_autocorrelation(image * ramp, None, ramp), plain, atol=1e-4)
        assert np.allclose(noise_autocorrelation(1e-6 * image, None, 1e-6), plain, atol=1e-4)

    def test_it_is_point_symmetric_with_its_mirror_images_in_place(self):
        """values[L + dy, L + dx] belongs to the lag (dy, dx): a diagonal smear shows on its own diagonal only."""
        noise = white(SHAPE, 5)
        noise = noise + np.roll(noise, (1, 1), axis=(0, 1))
        acf = noise_autocorrelation(noise, None, noise.std(), 4)
        assert acf.shape == (9, 9)
        assert acf[4, 4] == 1
        assert (acf == acf[::-1, ::-1]).all()
        assert acf[5, 5] == pytest.approx(0.5, abs=0.01)
        assert abs(acf[5, 3]) < 0.01

    @pytest.mark.parametrize("n", [10, 60])
    def test_where_there_is_nothing_to_measure_noise_is_white(self, n):
        """A tiny image, or one that is masked all over."""
        for data, mask in ((white((n, n), 0), None), (white((300, 300), 0), np.ones((300, 300), np.uint8))):
            found = measure_autocorrelation(data, mask, 7.0)
            assert found.values.sum() == 1
            assert np.isnan(found.error)

    def test_faint_sources_are_told_from_noise_by_their_shape(self):
        """Sources below the noise, a few per beam, correlate as the PSF does: left out where the PSF is known."""
        x, y, _ = scatter_stars(20_000, SHAPE, 4)
        sources = render(SHAPE, x, y, 60, 4.0)
        sources -= sources.mean()
        noise = white(SHAPE, 6)
        share = sources.var() / (sources.var() + noise.var())
        data = (noise + sources).astype(np.float32)
        blind = measure_autocorrelation(data, None, data.std())
        told = measure_autocorrelation(data, None, data.std(), psf=gaussian(4.0))
        assert 0.02 < share < 0.1
        assert blind.values.sum() > 1.3
        assert told.sources == pytest.approx(share, rel=0.3)
        assert abs(told.values.sum() - 1) < 0.3 * (blind.values.sum() - 1)

    def test_noise_is_not_taken_for_faint_sources(self):
        """What the kernel makes of white noise is all noise, also where a PSF is given."""
        image, _ = resampled(HALF)
        blind = noise_autocorrelation(image.data, None, image.data.std())
        told = measure_autocorrelation(image.data, None, image.data.std(), psf=gaussian(3.4))
        assert abs(told.sources) < 0.01
        assert np.abs(told.values - blind).max() < 0.01


class TestKernel:
    def test_the_identity_and_whole_pixels_leave_noise_white(self):
        """Nothing is interpolated, nothing is correlated."""
        for shift in (0, 7):
            acf = kernel_autocorrelation(PixelMap.from_affine([[1, 0, shift], [0, 1, -shift]], SHAPE))
            assert acf[3, 3] == 1
            assert np.abs(acf).sum() == pytest.approx(1, abs=1e-6)

    def test_half_a_pixel_by_hand(self):
        """A shift along x by half a pixel: the correlation of the six weights with themselves, along x alone."""
        u = np.arange(6) - 2.5
        w = np.sinc(u) * np.sinc(u / 3)
        w /= w.sum()
        by_hand = np.correlate(w, w, "full")[5:9] / np.sum(w**2)
        acf = kernel_autocorrelation(PixelMap.from_affine([[1, 0, 0.5], [0, 1, 0]], SHAPE))
        assert np.allclose(acf[3, 3:], by_hand, atol=0.01)
        assert np.abs(acf[4:]).max() < 1e-6


class TestPower:
    @pytest.mark.parametrize("shape", [(64, 64), (65, 48), (48, 63)])
    def test_it_is_the_transform_of_the_autocorrelation(self, shape):
        """As NumPy has it, of mean 1 over the full plane; as `rfft2` orders it."""
        acf = noise_autocorrelation(gaussian_filter(white(SHAPE, 2), 0.5), None, 4.0)
        frame = np.zeros(shape)
        frame[:7, :7] = acf
        expected = np.fft.rfft2(np.roll(frame, (-3, -3), axis=(0, 1))).real
        assert expected.min() > FLOOR
        power = noise_power(acf, shape)
        assert power.dtype == np.float32
        assert power.shape == (shape[0], shape[1] // 2 + 1)
        assert np.allclose(power, expected, rtol=1e-4)

    def test_it_is_the_periodogram_of_the_noise(self):
        """Resampled noise, cut into frames: their mean power, smoothed, is the spectrum."""
        image, pixel_map = resampled(HALF)
        frames = [image.data[y : y + 128, x : x + 128] for y in range(8, 660, 64) for x in range(8, 660, 64)]
        window = np.hanning(128)[:, None] * np.hanning(128)
        measured = gaussian_filter(periodogram([window * frame for frame in frames]), 3)
        power = noise_power(kernel_autocorrelation(pixel_map), (128, 128))
        inner = np.s_[10:54, 10:54]
        assert np.abs(measured[inner] - power[inner]).max() < 0.15
        assert np.abs(measured[inner] - power[inner]).mean() < 0.04

    def test_it_is_positive_whatever_comes_in(self):
        """Truncated and noisy correlations may have a negative transform; the spectrum stays positive, of mean 1."""
        acf = np.zeros((7, 7))
        acf[3, 3], acf[3, 2], acf[3, 4] = 1, 0.9, 0.9
        power = noise_power(acf, (32, 33))
        assert power.min() > 0
        full = np.concatenate([power, power[:, 1:]], axis=1)
        assert full.mean() == pytest.approx(1, rel=1e-5)

    def test_white_noise_has_a_flat_spectrum(self):
        """A delta function gives exactly 1 everywhere, also for a single zero lag."""
        for size in (1, 7):
            acf = np.zeros((size, size))
            acf[size // 2, size // 2] = 1
            assert (noise_power(acf, (30, 31)) == 1).all()
