"""Simulated images obey the physics that they claim."""

import numpy as np
import pytest
from astropy.wcs import WCS, Sip
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc import simulate
from batchproc.imaging.render import GALAXY, ParametricPsf, shifted_stamp
from batchproc.records import MaskBit, PsfLike

offsets = st.floats(-0.5, 0.5)


def moments(image):
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    total = image.sum()
    cx, cy = (image * x).sum() / total, (image * y).sum() / total
    return cx, cy, (image * (x - cx) ** 2).sum() / total, (image * (y - cy) ** 2).sum() / total


@settings(max_examples=25, deadline=None)
@given(st.floats(2.0, 6.0), st.floats(0.5, 1.0), st.floats(0, 180), offsets, offsets)
def test_psf_stamps_have_unit_sum_and_lie_where_asked(fwhm, axis_ratio, theta, dx, dy):
    """Any Gaussian or Moffat stamp sums to one; a Gaussian's centroid and width are the requested ones."""
    gauss = simulate.gaussian_psf(fwhm, axis_ratio=axis_ratio, theta=theta, dx=dx, dy=dy)
    moffat = simulate.moffat_psf(fwhm, 3.0, axis_ratio=axis_ratio, theta=theta, dx=dx, dy=dy)
    assert gauss.sum() == pytest.approx(1, abs=1e-12)
    assert moffat.sum() == pytest.approx(1, abs=1e-12)
    cx, cy, xx, yy = moments(gauss)
    half = gauss.shape[0] // 2
    assert (cx - half, cy - half) == pytest.approx((dx, dy), abs=0.01)
    assert xx + yy == pytest.approx((fwhm / 2.3548) ** 2 * (axis_ratio + 1 / axis_ratio), rel=0.01)


def test_moffat_falls_to_half_at_half_its_fwhm():
    """The FWHM of a Moffat stamp is its full width at half maximum, along each axis."""
    psf = simulate.moffat_psf(8.0, 2.5, 65, axis_ratio=0.64, theta=0.0)
    middle = psf[32]
    assert middle[32 + 5] == pytest.approx(middle[32] / 2, rel=1e-6)  # major axis: 8 / sqrt(0.64) = 10
    column = psf[:, 32]
    assert np.interp(3.2, np.arange(33), column[32:]) == pytest.approx(column[32] / 2, rel=0.02)


def test_parametric_psf_is_a_psflike_that_varies():
    """The FWHM grows by the stated fraction to the corner, every stamp keeps its unit sum."""
    psf = ParametricPsf(3.0, beta=None, variation=0.2, shape=(400, 400))
    assert isinstance(psf, PsfLike)
    centre, corner = psf.at(199.5, 199.5), psf.at(399.5, 399.5)
    assert corner.sum() == pytest.approx(1, abs=1e-12)
    _, _, xx, yy = moments(centre)
    assert np.sqrt((xx + yy) / 2) * 2.3548 == pytest.approx(3.0, rel=0.01)
    _, _, xx, yy = moments(corner)
    _, _, xy0, _ = moments(corner.T)
    assert xx * yy > 0
    assert xy0 == pytest.approx(yy)
    assert corner.max() < centre.max() / 1.3


@settings(max_examples=15, deadline=None)
@given(st.floats(20, 43), st.floats(20, 43), st.floats(-1e4, 1e5))
def test_sources_carry_their_flux_to_their_place(x, y, flux):
    """A rendered source has the asked flux and centroid, whichever way its PSF is given; the input stays as it was."""
    image = np.zeros((64, 65))
    gauss = ParametricPsf(3.0, beta=None)
    rendered = [simulate.add_sources(image, x, y, flux, p) for p in (gauss, gauss.at(0, 0), gauss.at)]
    assert not image.any()
    for r in rendered:
        assert r.sum() == pytest.approx(flux, rel=1e-4, abs=1e-6)
        if abs(flux) > 1:
            assert moments(r)[:2] == pytest.approx((x, y), abs=2e-3)
    np.testing.assert_allclose(rendered[1], rendered[0], atol=abs(flux) * 1e-4)


def test_sources_shed_light_across_the_edge():
    """Half of a source on the border line falls on the image; one far outside leaves nothing."""
    psf = ParametricPsf(3.0, beta=None)
    on_edge = simulate.add_sources(np.zeros((50, 50)), -0.5, 25, 1000.0, psf)
    assert on_edge.sum() == pytest.approx(500, rel=1e-3)
    assert not simulate.add_sources(np.zeros((50, 50)), [-100, 500], [25, 900], 1000.0, psf.at(0, 0)).any()


def test_galaxies_keep_flux_place_and_shape():
    """A Sérsic galaxy seen through a PSF has its flux, its centroid and an elongation along its angle."""
    galaxy = np.array([(60.3, 59.8, 1e4, 4.0, 1.0, 0.5, 0.0)], dtype=GALAXY)
    image = simulate.add_galaxies(np.zeros((121, 121)), galaxy, 2.5)
    cx, cy, xx, yy = moments(image)
    assert image.sum() == pytest.approx(1e4, rel=1e-6)
    assert (cx, cy) == pytest.approx((60.3, 59.8), abs=0.03)
    assert xx > 1.5 * yy


def test_shifting_a_stamp_equals_evaluating_its_profile():
    """For a well-sampled profile the Fourier shift is exact."""
    stamp = shifted_stamp(simulate.gaussian_psf(3.5), 0.37, -0.21)
    np.testing.assert_allclose(stamp, simulate.gaussian_psf(3.5, dx=0.37, dy=-0.21), atol=1e-5)


@pytest.fixture(scope="module")
def pair():
    return simulate.simulate_pair((300, 280), seed=5, n_transients=12)


def test_the_same_seed_gives_the_same_bytes(pair):
    """Two runs with one seed agree in every byte; another seed shows another sky."""
    again = simulate.simulate_pair((300, 280), seed=5, n_transients=12)
    assert again.new.tobytes() == pair.new.tobytes()
    assert again.ref.tobytes() == pair.ref.tobytes()
    assert again.truth.tobytes() == pair.truth.tobytes()
    other = simulate.simulate_pair((300, 280), seed=6, n_transients=12)
    assert other.new.tobytes() != pair.new.tobytes()


def test_noise_is_what_the_variance_says():
    """Without sources, the pixels scatter by the stated sigma; the coadd's noise falls with the root of its depth."""
    empty = simulate.simulate_pair((400, 400), seed=1, n_stars=0, n_galaxies=0, n_transients=0, depth=9)
    for data, sigma, variance in (
        (empty.new, empty.sigma_new, empty.variance_new),
        (empty.ref, empty.sigma_ref, empty.variance_ref),
    ):
        assert np.std(data) == pytest.approx(sigma, rel=0.006)
        assert abs(np.mean(data)) < 5 * sigma / 400
        assert variance.mean() == pytest.approx(sigma**2, rel=1e-3)
    assert empty.sigma_ref == pytest.approx(np.sqrt((300 + 25) / 9))


def test_pixels_scatter_about_the_truth_by_their_variance():
    """Where stars are bright too, chi-square against the expected light is one per pixel."""
    pair = simulate.simulate_pair((300, 280), seed=5, n_stars=1000, star_flux=(5e3, 2e5))
    bright = pair.variance_new > 1.5 * pair.sigma_new**2
    assert bright.sum() > 300
    light = pair.variance_new - pair.scene.sky_new - pair.scene.read_noise**2  # expected electrons above the sky
    good = bright & ~pair.mask
    chi2 = np.mean((pair.new - light)[good] ** 2 / pair.variance_new[good])
    assert chi2 == pytest.approx(1, abs=5 * np.sqrt(2 / good.sum()))


def test_truth_says_which_image_holds_the_light(pair):
    """The difference of the expected images has each transient's flux at its place, in electrons of new."""
    assert set(pair.truth["kind"]) == {"new", "vanished", "variable"}
    one_seeing = simulate.simulate_pair((300, 280), seed=5, n_transients=12, fwhm_new=3.0, fwhm_ref=3.0)
    light_new = one_seeing.variance_new.astype(float) - one_seeing.scene.sky_new - 25
    light_ref = (one_seeing.variance_ref.astype(float) * 4 - one_seeing.scene.sky_ref - 25) * one_seeing.flux_ratio
    change = light_new - light_ref
    for row in one_seeing.truth:
        x, y = round(row["x"]), round(row["y"])
        assert change[y - 12 : y + 13, x - 12 : x + 13].sum() == pytest.approx(row["flux"], rel=0.03, abs=20)
        assert (row["flux"] < 0) >= (row["kind"] == "vanished")


def test_stars_are_fainter_in_the_reference_by_the_flux_ratio():
    """Total light above the sky differs by F_new / F_ref."""
    quiet = simulate.simulate_pair(
        (300, 280), seed=5, n_transients=0, fwhm_new=3.0, fwhm_ref=3.0, n_stars=1000, star_flux=(5e3, 2e5)
    )
    ratio = quiet.new.sum(dtype=float) / quiet.ref.sum(dtype=float)
    assert ratio == pytest.approx(1.3, rel=0.02)


def test_expected_snr_is_that_of_the_paper():
    """T = 900 with Gaussian PSFs of FWHM 3.4 and 2.6, sigma 20 and 9, F 1 and 1.3: S/√F_S = 8.44425658."""
    psf_new, psf_ref = simulate.gaussian_psf(3.4, 31), simulate.gaussian_psf(2.6, 31)
    snr = simulate.expected_snr(
        [900.0, -1800.0], psf_new=psf_new, psf_ref=psf_ref, sigma_new=20, sigma_ref=9, flux_ratio=1 / 1.3
    )
    assert snr == pytest.approx([8.44425658, 2 * 8.44425658], rel=2e-5)  # the paper's grid is finer than the stamps'


def test_the_reference_may_show_a_part_only():
    """Transients far off the reference, whose noise there is that of blank sky: a pair all the same."""
    pair = simulate.simulate_pair((200, 200), seed=1, n_transients=5, to_ref=lambda x, y: (x + 900, y), n_stars=50)
    assert np.isfinite(pair.truth["snr_local"]).all()
    assert (pair.truth["snr_local"] > 0).all()


def test_source_noise_lowers_the_expected_snr(pair):
    """On top of other light a transient stands out less; flat variance planes change nothing."""
    assert np.all(pair.truth["snr_local"] < pair.truth["snr"])
    keywords = {
        "psf_new": pair.psf_new,
        "psf_ref": pair.psf_ref,
        "sigma_new": pair.sigma_new,
        "sigma_ref": pair.sigma_ref,
        "flux_ratio": pair.flux_ratio,
    }
    flat = simulate.expected_snr(
        pair.truth["flux"],
        pair.truth["x"],
        pair.truth["y"],
        variance_new=np.full((300, 280), pair.sigma_new**2),
        variance_ref=np.full((300, 280), pair.sigma_ref**2),
        **keywords,
    )
    np.testing.assert_allclose(flat, pair.truth["snr"], rtol=1e-6)


def test_charge_above_the_full_well_bleeds_along_columns():
    """A saturated star stays at the full well, grows along y, keeps its charge, and is masked there."""
    image = simulate.add_sources(np.zeros((201, 101)), 50, 100, 2e6, ParametricPsf(3.0, beta=None))
    data, mask = simulate.expose(image, np.random.default_rng(0), read_noise=0.0, saturation=3e4)
    assert data.max() == 3e4
    assert data.sum(dtype=float) == pytest.approx(2e6, rel=0.01)
    full_rows, full_columns = np.nonzero(mask & MaskBit.SATURATED)
    assert np.ptp(full_rows) > 3 * np.ptp(full_columns)


def test_artefacts_are_where_they_are_listed():
    """Cosmic rays, hot pixels, bad columns and a trail: each shows in the image at its listed place."""
    dirty = simulate.simulate_pair(
        (200, 200),
        seed=3,
        n_stars=0,
        n_galaxies=0,
        n_transients=0,
        cosmic_rays=5,
        hot_pixels=3,
        bad_columns=2,
        satellite_trail=8.0,
    )
    kinds, counts = np.unique(dirty.artefacts["kind"], return_counts=True)
    assert dict(zip(kinds, counts, strict=True)).keys() == {"bad_column", "cosmic_ray", "hot_pixel", "trail"}
    for row in dirty.artefacts:
        image, sigma = (dirty.new, dirty.sigma_new) if row["image"] == "new" else (dirty.ref, dirty.sigma_ref)
        column = round(row["x"])
        if row["kind"] == "bad_column":
            mask = dirty.mask_new if row["image"] == "new" else dirty.mask_ref
            assert np.all(mask[:, column] & MaskBit.BAD)
        else:
            y = round(row["y"])
            around = image[max(y - 3, 0) : y + 4, max(column - 3, 0) : column + 4]
            assert around.max() > 5 * sigma


def test_the_reference_may_lie_on_a_grid_of_its_own():
    """With a map, each star of ref is at its mapped place; what is expected of the transients stays the same."""

    def to_ref(x, y):
        return 0.9998 * x - 0.02 * y + 12, 0.02 * x + 0.9998 * y + 7

    keywords = {"n_stars": 0, "n_galaxies": 0, "star_flux": (5e3, 1e5), "n_transients": 10}
    plain = simulate.simulate_pair((200, 220), seed=4, **keywords)
    mapped = simulate.simulate_pair((200, 220), seed=4, to_ref=to_ref, shape_ref=(230, 250), **keywords)
    assert mapped.ref.shape == (230, 250)
    np.testing.assert_array_equal(mapped.new, plain.new)
    np.testing.assert_allclose(mapped.truth["snr_local"], plain.truth["snr_local"], rtol=0.02)
    for lost in mapped.truth[mapped.truth["kind"] == "vanished"]:
        x, y = (round(float(v)) for v in to_ref(lost["x"], lost["y"]))
        light = mapped.variance_ref[y - 8 : y + 9, x - 8 : x + 9] * 4.0 - 325
        mx, my, _, _ = moments(light)
        assert (mx + x - 8, my + y - 8) == pytest.approx(to_ref(lost["x"], lost["y"]), abs=0.1)
        assert light.sum() == pytest.approx(-lost["flux"] / 1.3, rel=0.1)


def test_registration_jitter_moves_the_reference_only():
    """New is the same with and without jitter in its stars' places; ref is displaced."""
    quiet = simulate.simulate_pair((200, 200), seed=4, n_transients=0)
    moved = simulate.simulate_pair((200, 200), seed=4, n_transients=0, registration_jitter=0.3)
    np.testing.assert_array_equal(quiet.variance_new, moved.variance_new)
    assert np.abs(quiet.variance_ref - moved.variance_ref).max() > 10


def test_exposures_hold_the_sky(pair):
    """As exposures, the pair has its sky again, and its PSF only when asked."""
    new, ref = pair.exposures()
    assert np.median(new.data) == pytest.approx(400, rel=0.02)
    assert new.psf is None
    assert ref.read_noise == pytest.approx(2.5)
    assert pair.exposures(known_psf=True)[1].psf is pair.psf_ref


def test_injected_flux_has_poisson_noise_and_leaves_the_input_alone():
    """Over many injections the flux scatters by its square root (in electrons), and the mean is unbiased."""
    image = np.full((600, 600), 7.0, dtype=">f4")
    y, x = (grid.ravel() + 0.3 for grid in np.mgrid[20:600:40, 20:600:40])
    flux, gain = 500.0, 4.0
    out = simulate.inject(image, simulate.gaussian_psf(3.0), x, y, np.full(len(x), flux), gain=gain, rng=1)
    assert np.all(image == 7)
    assert out.dtype == np.float32
    cells = (out - 7.0).reshape(15, 40, 15, 40).sum(axis=(1, 3)).ravel()
    assert np.mean(cells) == pytest.approx(flux, abs=5 * np.sqrt(flux / gain / len(cells)))
    assert np.std(cells) == pytest.approx(np.sqrt(flux / gain), rel=0.2)
    assert np.array_equal(out, simulate.inject(image, simulate.gaussian_psf(3.0), x, y, flux, gain=gain, rng=1))
    gone = simulate.inject(image, 3.0, 100.0, 100.0, -50.0)
    assert gone.sum(dtype=float) - 7.0 * image.size == pytest.approx(-50, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.floats(5, 20))
def test_positions_keep_their_distances(seed, n, separation):
    """Chosen places stay off edges, masks, each other and what is to be avoided."""
    mask = np.zeros((300, 260), bool)
    mask[:, 100:140] = True
    avoid = np.array([[50.0, 50.0], [200.0, 200.0]])
    x, y = simulate.choose_positions((300, 260), n, seed, margin=25, min_separation=separation, mask=mask, avoid=avoid)
    assert len(x) == n
    assert x.min() >= 25
    assert x.max() <= 260 - 1 - 25
    assert not mask[np.rint(y).astype(int), np.rint(x).astype(int)].any()
    everything = np.concatenate([np.stack([x, y], axis=1), avoid])
    distances = np.hypot(*(everything[:, None] - everything[None]).transpose(2, 0, 1))
    distances[-2:, -2:] = np.inf
    np.fill_diagonal(distances, np.inf)
    assert distances.min() >= separation


def test_positions_beside_galaxies_and_no_room():
    """The asked fraction lies beside galaxies; too many for the field is an error that says how many fit."""
    galaxies = np.array([[60.0, 60.0], [150.0, 150.0], [60.0, 150.0]])
    x, y = simulate.choose_positions((210, 210), 4, 1, near=galaxies, near_fraction=0.5, near_radius=2.0)
    beside = np.hypot(x[:, None] - galaxies[:, 0], y[:, None] - galaxies[:, 1]).min(axis=1) < 10
    assert beside.sum() >= 2
    with pytest.raises(ValueError, match=r"room for \d+ of 500"):
        simulate.choose_positions((100, 100), 500, 0)


def star_wcs(sip):
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN-SIP", "DEC--TAN-SIP"] if sip else ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix = [150.0, -30.0], [120.0, 90.0]
    wcs.wcs.cd = np.array([[-2.0, 0.1], [0.12, 2.0]]) / 3600
    if sip:
        a, b = np.zeros((2, 4, 4))
        a[2, 0], a[1, 1], b[0, 2], b[1, 2] = 2e-5, -1e-5, 3e-5, 1e-8
        wcs.sip = Sip(a, b, None, None, wcs.wcs.crpix)
    wcs.wcs.set()
    return wcs


@pytest.mark.parametrize("sip", [False, True])
def test_epoch_stars_keep_their_place_on_the_sky(sip):
    """A star of the reference is found in the epoch where the matrix says, and at the same RA and Dec."""
    x, y = np.array([70.3, 130.8, 100.0]), np.array([80.1, 60.4, 140.6])
    reference = simulate.add_sources(np.zeros((200, 220)), x, y, 1e6, ParametricPsf(3.0, beta=None))
    epoch = simulate.make_epoch(
        reference, fwhm_ref=3.0, fwhm_new=4.5, sky=10.0, read_noise=0.1, flux_ratio=0.5, shift=(3.3, -2.6), rotation=1.5
    )
    linear, offset = epoch.matrix[:, :2], epoch.matrix[:, 2]
    places = np.linalg.solve(linear, np.stack([x, y]) - offset[:, None])
    for cx, cy in places.T:
        column, row = int(np.rint(cx)), int(np.rint(cy))
        cell = epoch.data[row - 14 : row + 15, column - 14 : column + 15].astype(float) - 10
        mx, my, xx, yy = moments(cell)
        assert (mx + column - 14, my + row - 14) == pytest.approx((cx, cy), abs=0.03)
        assert cell.sum() == pytest.approx(5e5, rel=0.01)
        assert np.sqrt((xx + yy) / 2) * 2.3548 == pytest.approx(4.5, rel=0.03)
    wcs = star_wcs(sip)
    moved = simulate.transform_wcs(wcs, epoch.matrix)
    np.testing.assert_allclose(
        moved.all_pix2world(places.T, 0), wcs.all_pix2world(np.stack([x, y], axis=1), 0), atol=1e-9
    )


def test_epoch_marks_what_the_reference_does_not_have():
    """Beyond the edge and around NaN there is no data; sharper seeing than the reference's is refused."""
    reference = np.zeros((80, 90))
    reference[40, 45] = np.nan
    epoch = simulate.make_epoch(reference, fwhm_ref=2.0, fwhm_new=3.0, sky=100.0, shift=(10.0, 0.0))
    assert np.all(epoch.mask[:, -9:] & MaskBit.NO_DATA)
    assert epoch.mask[40, 35] & MaskBit.NO_DATA
    assert np.all(np.isfinite(epoch.data))
    assert np.std(epoch.data[epoch.mask == 0]) == pytest.approx(np.sqrt(125), rel=0.05)
    with pytest.raises(ValueError, match="sharper"):
        simulate.make_epoch(reference, fwhm_ref=3.0, fwhm_new=2.0, sky=100.0)
