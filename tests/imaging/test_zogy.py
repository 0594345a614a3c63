"""ZOGY's algebra against the paper: identities, noise, photometry, and a plain float64 reference."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.errors import SubtractError
from batchproc.imaging.zogy import fill_masked, interpolate_over, zogy
from tests.imaging._psfs import gaussian, measured, moffat
from tests.imaging._zogy_reference import gradient, reference_zogy, stencil_gradient

SETTING = {"sigma_new": 20.0, "sigma_ref": 9.0, "flux_ratio": 1 / 1.3}
PSF_NEW, PSF_REF = gaussian(3.4), gaussian(2.6)


@pytest.fixture(scope="module")
def blank():
    """D and friends of pure noise, 1024²."""
    rng = np.random.default_rng(0)
    new, ref = rng.normal(0, 20, (1024, 1024)), rng.normal(0, 9, (1024, 1024))
    return zogy(new, ref, PSF_NEW, PSF_REF, **SETTING)


def test_difference_of_noise_is_white_with_unit_variance(blank):
    """D of blank sky has unit variance and no correlation between neighbours; bounds are 4 sampling errors."""
    d = blank.difference
    assert d.std() == pytest.approx(1, abs=0.0028)
    assert abs(np.mean(d[1:] * d[:-1])) < 0.004
    assert abs(np.mean(d[:, 1:] * d[:, :-1])) < 0.004


def test_score_of_noise_has_variance_f_s(blank):
    """Var(S) on blank sky is F_S, and S_corr has unit width."""
    assert blank.score.var() / blank.kernels[0].f_s == pytest.approx(1, abs=0.02)
    assert blank.score_corr.std() == pytest.approx(1, abs=0.01)


def test_psf_of_the_difference_has_unit_sum(blank):
    """P_D sums to one and peaks at its centre."""
    assert blank.psf.sum() == pytest.approx(1, abs=1e-12)
    assert np.unravel_index(blank.psf.argmax(), blank.psf.shape) == tuple(s // 2 for s in blank.psf.shape)


@pytest.mark.parametrize("shape", [(256, 256), (257, 300), (129, 128)])
def test_flux_and_significance_of_a_noiseless_source(shape):
    """α gives back the flux, and S/√F_S is T√F_S, whatever the shape (E41, E42)."""
    new = np.zeros(shape)
    y, x = shape[0] // 2, shape[1] // 2
    new[y - 15 : y + 16, x - 15 : x + 16] = 900 * PSF_NEW
    d = zogy(new, np.zeros(shape), PSF_NEW, PSF_REF, **SETTING)
    assert d.flux[y, x] == pytest.approx(900, rel=1e-5)
    assert d.score_corr[y, x] == pytest.approx(8.444256, rel=1e-5)
    assert d.score_corr[y, x] == pytest.approx(900 * np.sqrt(d.kernels[0].f_s), rel=1e-5)


def test_static_star_vanishes():
    """A star of 10^5 electrons with exact PSFs leaves nothing in D."""
    new, ref = np.zeros((2, 128, 128))
    new[49:80, 49:80] = 1e5 * PSF_NEW
    ref[49:80, 49:80] = 1.3e5 * PSF_REF
    d = zogy(new, ref, PSF_NEW, PSF_REF, **SETTING)
    assert np.abs(d.difference).max() < 0.01  # of the noise; the star itself is 1e4 of it


def test_swapping_the_images_changes_the_sign():
    """D(N, R) = −D(R, N)."""
    rng = np.random.default_rng(3)
    new, ref = rng.normal(0, 20, (64, 65)), rng.normal(0, 9, (64, 65))
    forward = zogy(new, ref, PSF_NEW, PSF_REF, **SETTING)
    backward = zogy(ref, new, PSF_REF, PSF_NEW, sigma_new=9, sigma_ref=20, flux_ratio=1.3)
    np.testing.assert_allclose(forward.difference, -backward.difference, atol=1e-5)


SHAPES = {"gaussian": gaussian, "moffat": moffat, "measured": measured}

#: Where what the PSFs have left, (b² |P_r|² + a² |P_n|²)^½ with a² + b² = 1, is above this, D follows the plain
#: formulas; below, it has only to be white.
STATED_FLOOR = 1e-4


@given(
    ny=st.integers(40, 90),
    nx=st.integers(40, 90),
    kinds=st.tuples(st.sampled_from(sorted(SHAPES)), st.sampled_from(sorted(SHAPES))),
    fwhm_new=st.floats(1.5, 10.0),
    fwhm_ref=st.floats(1.5, 10.0),
    noise_ratio=st.floats(-2.0, 2.0).map(lambda power: 10.0**power),
    flux_ratio=st.floats(0.001, 1000.0),
    unit=st.sampled_from([1e-12, 1.0, 1e9]),
    shift=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    error=st.floats(0, 0.05),
    correlated=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_agrees_with_the_plain_reference(
    ny, nx, kinds, fwhm_new, fwhm_ref, noise_ratio, flux_ratio, unit, shift, error, correlated, seed
):
    """Any shape, PSF, noise and unit: D, S, S_corr, flux and error equal the plain formulas in double precision.

    To a thousandth of the noise, as long as one image is not a hundred times noisier than the other (for its flux).
    D where the PSFs have power.
    """
    sigma_ref = 10 * noise_ratio / flux_ratio
    rng = np.random.default_rng(seed)
    psf_new, psf_ref = SHAPES[kinds[0]](fwhm_new, 25), SHAPES[kinds[1]](fwhm_ref, 25)
    acf = np.outer([0.2, 1, 0.2], [0.1, 1, 0.1]) if correlated else None
    new, ref = unit * rng.normal(0, 10, (ny, nx)), unit * rng.normal(0, sigma_ref, (ny, nx))
    new[ny // 2, nx // 2] += unit * 500
    variance_new = unit**2 * (100 + np.abs(rng.normal(0, 30, (ny, nx))))
    variance_ref = unit**2 * sigma_ref**2 * (1 + np.abs(rng.normal(0, 1, (ny, nx))))
    ours = zogy(
        new,
        ref,
        psf_new,
        psf_ref,
        sigma_new=10.0 * unit,
        sigma_ref=sigma_ref * unit,
        flux_ratio=flux_ratio,
        variance_new=variance_new,
        variance_ref=variance_ref,
        registration_sigma=shift,
        flux_ratio_error=error,
        noise_ref=acf,
    )
    plain = reference_zogy(
        new,
        ref,
        psf_new,
        psf_ref,
        sigma_n=10.0 * unit,
        sigma_r=sigma_ref * unit,
        F_r=1 / flux_ratio,
        V_n=variance_new,
        V_r=variance_ref,
        sig_x=shift[0],
        sig_y=shift[1],
        sig_beta=error,
        acf_r=acf,
        derivative=stencil_gradient,
    )
    pairs = {"score": plain.S, "score_corr": plain.S_corr, "flux": plain.alpha, "flux_err": plain.sigma_alpha}
    for name, expected in pairs.items():
        np.testing.assert_allclose(getattr(ours, name), expected, atol=1e-3 * expected.std(), rtol=1e-4, err_msg=name)
    a, b = np.array([1 / 10, 1 / (flux_ratio * sigma_ref)]) / np.hypot(1 / 10, 1 / (flux_ratio * sigma_ref))
    p, q = (np.abs(np.fft.fft2(psf, s=(ny, nx))) for psf in (psf_new, psf_ref))
    power = np.hypot(a * p, b * q) > STATED_FLOOR
    ours_hat, plain_hat = np.fft.fft2(ours.difference)[power], np.fft.fft2(plain.D)[power]
    np.testing.assert_allclose(ours_hat, plain_hat, atol=2e-3 * np.abs(plain_hat).max())
    np.testing.assert_allclose(ours.kernels[0].f_s, plain.F_S, rtol=1e-6)
    np.testing.assert_allclose(ours.kernels[0].f_d, plain.F_D, rtol=1e-6)


@pytest.mark.parametrize(("fwhm", "bound"), [(1.5, 0.15), (2.0, 0.02), (3.0, 0.002), (5.0, 1e-4)])
def test_the_stencil_is_the_derivative(fwhm, bound):
    """On a source in S the central difference has the power of the exact derivative: 2 % of V_ast at FWHM 2 px."""
    source = np.fft.irfft2(np.abs(np.fft.rfft2(gaussian(fwhm), s=(128, 128))) ** 2, s=(128, 128))
    for ours, exact in zip(stencil_gradient(source), gradient(source), strict=True):
        assert np.sum(ours**2) / np.sum(exact**2) == pytest.approx(1, abs=bound)


@pytest.mark.parametrize("kind", sorted(SHAPES))
@pytest.mark.parametrize(("fwhm_new", "fwhm_ref"), [(1.5, 1.5), (3.4, 2.6), (5.0, 4.5), (10.0, 7.0), (2.0, 9.0)])
def test_difference_is_white_where_the_psfs_have_lost_all_power(kind, fwhm_new, fwhm_ref):
    """D has unit variance in every ring of frequencies, also where |P^| is below what any precision can tell."""
    rng = np.random.default_rng(11)
    new, ref = rng.normal(0, 20, (384, 360)), rng.normal(0, 9, (384, 360))
    d = zogy(new, ref, SHAPES[kind](fwhm_new, 61), SHAPES[kind](fwhm_ref, 61), **SETTING).difference
    assert d.std() == pytest.approx(1, abs=4 / np.sqrt(2 * d.size))
    spectrum = np.abs(np.fft.fft2(d)) ** 2 / d.size
    k = np.hypot(np.fft.fftfreq(384)[:, None], np.fft.fftfreq(360)[None, :])
    for low in np.arange(0, 0.7, 0.1):
        ring = spectrum[(k >= low) & (k < low + 0.1)]
        # Half of the modes are independent, each with the scatter of an exponential.
        assert ring.mean() == pytest.approx(1, abs=4.5 * np.sqrt(2 / ring.size))


def test_a_hot_pixel_stays_compact_where_the_psfs_have_no_power():
    """D of one wild pixel is next to nothing a few PSFs away; in double precision rounding spreads it."""
    new = np.zeros((256, 256))
    new[128, 128] = 1e5
    psfs = gaussian(6.0, 41), gaussian(5.0, 41)
    d = zogy(new, np.zeros_like(new), *psfs, **SETTING).difference
    far = np.ones(d.shape, bool)
    far[128 - 41 : 128 + 42, 128 - 41 : 128 + 42] = False
    assert np.abs(d[far]).max() < 1e-3 * np.abs(d).max()
    double = reference_zogy(new, np.zeros_like(new), *psfs, sigma_n=20, sigma_r=9, F_r=1.3).D
    assert d[far].std() < 0.2 * double[far].std()


def test_correlated_noise_is_whitened():
    """With the autocorrelation of its noise, D is white and Var(S) is F_S; without, they are not."""
    rng = np.random.default_rng(12)
    kernel = np.outer([0.3, 0.9, 0.3], [0.2, 0.95, 0.2])
    kernel /= np.sqrt((kernel**2).sum())
    ref = rng.normal(0, 9, (768, 768))
    new = 20 * np.fft.irfft2(np.fft.rfft2(rng.normal(0, 1, ref.shape)) * np.fft.rfft2(kernel, s=ref.shape), s=ref.shape)
    acf = np.zeros((5, 5))
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            a = kernel[max(dy, 0) : 3 + min(dy, 0), max(dx, 0) : 3 + min(dx, 0)]
            b = kernel[max(-dy, 0) : 3 + min(-dy, 0), max(-dx, 0) : 3 + min(-dx, 0)]
            acf[2 + dy, 2 + dx] = (a * b).sum()
    naive, right = (zogy(new, ref, PSF_NEW, PSF_REF, noise_new=noise, **SETTING) for noise in (None, acf))
    lag = [np.mean(d.difference[:, 1:] * d.difference[:, :-1]) for d in (naive, right)]
    assert lag[0] > 0.05
    assert abs(lag[1]) < 4 / np.sqrt(new.size)
    assert right.difference.std() == pytest.approx(1, abs=4 / np.sqrt(2 * new.size))
    assert right.score_corr.std() == pytest.approx(1, abs=0.015)
    assert naive.score_corr.std() > 1.05


def test_a_fresh_process_repeats_the_bytes():
    """The first call of a process equals its second, and those of another process: no plan touches its data."""
    code = (
        "import hashlib, numpy as np\n"
        "from batchproc import zogy\n"
        "from tests.imaging._psfs import gaussian\n"
        "new, ref = np.random.default_rng(0).normal(0, 20, (2, 256, 256))\n"
        "for _ in range(2):\n"
        "    d = zogy(new, ref, gaussian(3.4), gaussian(2.6), sigma_new=20, sigma_ref=20)\n"
        "    print(hashlib.sha256(b''.join(p.tobytes() for p in (d.difference, d.score_corr, d.flux))).hexdigest())\n"
    )
    lines = [
        line
        for _ in range(2)
        for line in subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
        ).stdout.split()
    ]
    assert len(lines) == 4
    assert len(set(lines)) == 1


@given(roll=st.tuples(st.integers(-40, 40), st.integers(-40, 40)), factor=st.floats(0.01, 100))
@settings(max_examples=10, deadline=None)
def test_rolled_and_scaled_images_roll_and_scale(roll, factor):
    """A cyclic shift of both images shifts the result; a common unit changes only the flux."""
    rng = np.random.default_rng(5)
    new, ref = rng.normal(0, 20, (2, 48, 51))
    base = zogy(new, ref, PSF_NEW, PSF_REF, **SETTING)
    rolled = zogy(np.roll(new, roll, (0, 1)), np.roll(ref, roll, (0, 1)), PSF_NEW, PSF_REF, **SETTING)
    np.testing.assert_allclose(rolled.score_corr, np.roll(base.score_corr, roll, (0, 1)), atol=1e-5)
    scaled = zogy(
        factor * new, factor * ref, PSF_NEW, PSF_REF, sigma_new=20 * factor, sigma_ref=9 * factor, flux_ratio=1 / 1.3
    )
    np.testing.assert_allclose(scaled.score_corr, base.score_corr, atol=1e-5)
    np.testing.assert_allclose(scaled.flux, factor * base.flux, rtol=1e-5, atol=1e-3 * factor)


def test_identical_images_leave_nothing():
    """new − new = 0, exactly where the PSFs are the same."""
    image = np.random.default_rng(6).normal(0, 20, (64, 64))
    d = zogy(image, image, PSF_NEW, PSF_NEW, sigma_new=20, sigma_ref=20)
    assert np.abs(d.difference).max() < 1e-5


def test_inputs_are_not_modified_and_calls_repeat():
    """Two calls give the same bytes and leave their inputs alone (planning an FFT overwrites arrays)."""
    rng = np.random.default_rng(7)
    new, ref = rng.normal(0, 20, (2, 90, 70))
    mask = rng.random((90, 70)) < 0.01
    before = new.copy(), ref.copy(), mask.copy()
    first = zogy(new, ref, PSF_NEW, PSF_REF, mask=mask, **SETTING)
    second = zogy(new, ref, PSF_NEW, PSF_REF, mask=mask, **SETTING)
    assert first.score_corr.tobytes() == second.score_corr.tobytes()
    for array, copy in zip((new, ref, mask), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_score_corr_is_centred_on_the_source_with_registration_noise():
    """The astrometric term does not displace S_corr's peak (backward differences displace it by 0.4 px)."""
    new, ref = np.zeros((2, 96, 96))
    new[33:64, 33:64] = 5000 * PSF_NEW
    d = zogy(new, ref, PSF_NEW, PSF_REF, registration_sigma=(0.3, 0.3), **SETTING)
    peak = d.score_corr[47:50, 47:50]
    np.testing.assert_allclose(peak, peak[::-1, ::-1], rtol=1e-5)
    assert peak.argmax() == 4


def test_masked_pixels_do_not_spread():
    """NaN under the mask reaches nothing else, and masked pixels are 0 in S_corr and NaN in flux."""
    rng = np.random.default_rng(8)
    new, ref = rng.normal(0, 20, (96, 96)), rng.normal(0, 9, (96, 96))
    clean = zogy(new, ref, PSF_NEW, PSF_REF, **SETTING)
    mask = np.zeros((96, 96), bool)
    mask[40:43, 50:52] = True
    dirty = new.copy()
    dirty[mask] = np.nan
    d = zogy(dirty, ref, PSF_NEW, PSF_REF, mask=mask, **SETTING)
    assert np.isfinite(d.score_corr).all()
    assert (d.score_corr[mask] == 0).all()
    assert np.isnan(d.flux[mask]).all()
    far = np.ones((96, 96), bool)
    far[8:75, 18:84] = False
    assert np.abs(d.score_corr - clean.score_corr)[far].max() < 1e-3


def test_filling_takes_the_other_image_where_it_is_good():
    """A pixel bad in one image alone takes the scaled value of the other."""
    new, ref = np.full((9, 9), 20.0), np.full((9, 9), 10.0)
    bad_new, bad_ref = np.zeros((2, 9, 9), bool)
    bad_new[2, 2] = bad_ref[6, 6] = True
    new[2, 2] = ref[6, 6] = np.nan
    filled_new, filled_ref = fill_masked(new, ref, bad_new, bad_ref, 2.0)
    assert filled_new[2, 2] == 20.0
    assert filled_ref[6, 6] == 10.0
    assert np.isnan(new[2, 2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ref": np.zeros((5, 5))}, "shape"),
        ({"psf_new": np.ones((4, 4)) / 16}, "odd"),
        ({"psf_ref": np.ones((5, 5))}, "unit sum"),
        ({"psf_ref": np.ones((99, 99)) / 99**2}, "larger"),
        ({"sigma_new": 0.0}, "positive"),
        ({"sigma_ref": np.ones(3)}, "one positive"),
        ({"variance_new": np.full((64, 64), -1.0)}, "variance_new is not positive"),
        ({"registration_sigma": 0.1}, "a pair"),
        ({"mask": np.ones((64, 64), bool)}, "no good pixel"),
        ({"new": np.full((64, 64), np.nan)}, "not finite"),
    ],
)
def test_unusable_input_is_refused_with_its_name(change, words):
    """Each mistake has a message that names it."""
    arguments = {
        "new": np.zeros((64, 64)),
        "ref": np.zeros((64, 64)),
        "psf_new": PSF_NEW,
        "psf_ref": PSF_REF,
        **SETTING,
    } | change
    with pytest.raises(SubtractError, match=words):
        zogy(**arguments)


def test_bad_pixels_are_means_of_the_good_ones_around_them():
    """Single ones, columns, edges and areas, against the plain sums; deeper than 32 pixels there is nothing."""
    rng = np.random.default_rng(5)
    data = rng.normal(100, 10, (110, 90))
    bad = rng.random(data.shape) < 0.02
    bad[:, 30] = bad[-5:] = bad[30:, 50:] = True
    rows, columns = np.nonzero(bad)
    expected = np.zeros(rows.size)
    for n, (row, column) in enumerate(zip(rows, columns, strict=True)):
        for sigma in (1, 2, 4, 8):
            y, x = (np.arange(max(at - 4 * sigma, 0), at + 4 * sigma + 1) for at in (row, column))
            y, x = y[y < data.shape[0]], x[x < data.shape[1]]
            weight = np.exp(-0.5 * np.add.outer((y - row) ** 2, (x - column) ** 2) / sigma**2) * ~bad[np.ix_(y, x)]
            if weight.sum() > 0.02 * np.pi * sigma**2:
                expected[n] = (weight * data[np.ix_(y, x)]).sum() / weight.sum()
                break
    data[bad] = np.nan
    found = interpolate_over(data, bad, rows, columns)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (found == 0).any()
    assert np.count_nonzero(found) > 2000
