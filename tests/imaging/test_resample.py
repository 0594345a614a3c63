"""Maps between images, and Lanczos resampling through them."""

import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, map_coordinates

from batchproc.errors import AlignError
from batchproc.imaging.noise import kernel_autocorrelation
from batchproc.imaging.pixelmap import PixelMap
from batchproc.imaging.resample import kernel_polynomials, kernel_table, resample
from batchproc.records import MaskBit
from tests.imaging._stars import render, scatter_stars, sip_wcs, tan_wcs, tpv_wcs

SHAPE = (300, 320)


def rotation(angle_deg, scale=1.0, shift=(0.0, 0.0), centre=(160.0, 150.0)):
    """New → ref about a centre, as an affine matrix."""
    a = np.deg2rad(angle_deg)
    linear = scale * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    return np.column_stack([linear, np.array(centre) + shift - linear @ centre])


def centroid(image, x, y, fwhm, reach=12):
    """Place of an isolated noiseless star (Gaussian-weighted as a PSF fit is, iterated), and its flux (plain sum)."""
    x0, y0 = round(x) - reach, round(y) - reach
    cut = image[y0 : y0 + 2 * reach + 1, x0 : x0 + 2 * reach + 1].astype(np.float64)
    v, u = np.mgrid[: cut.shape[0], : cut.shape[1]]
    cx, cy = x - x0, y - y0
    for _ in range(50):
        w = cut * np.exp(-((u - cx) ** 2 + (v - cy) ** 2) / (2 * (fwhm / 2.3548) ** 2))
        cx, cy = cx + 2 * (w * (u - cx)).sum() / w.sum(), cy + 2 * (w * (v - cy)).sum() / w.sum()
    return cx + x0, cy + y0, cut.sum()


class TestPixelMap:
    @pytest.mark.parametrize("wcs_ref", [tan_wcs, sip_wcs, tpv_wcs])
    @pytest.mark.parametrize("wcs_new", [tan_wcs, sip_wcs, tpv_wcs])
    def test_agrees_with_both_wcs_to_a_thousandth_of_a_pixel(self, wcs_new, wcs_ref):
        """The spline between nodes is as good as the exact transform, for strong distortions too."""
        shape = (2000, 1500)
        new = wcs_new(shape, ra=150.0, dec=65.0, scale_arcsec=1.2)
        ref = wcs_ref((2200, 1700), ra=150.05, dec=65.01, scale_arcsec=1.0, angle_deg=25.0)
        m = PixelMap.from_wcs(new, ref, shape)
        rng = np.random.default_rng(0)
        x, y = rng.uniform(-5, 1505, 2000), rng.uniform(-5, 2005, 2000)
        exact = ref.all_world2pix(*new.all_pix2world(x, y, 0), 0, tolerance=1e-8, maxiter=100)
        assert np.abs(np.array(m(x, y)) - exact).max() < 1e-3

    def test_steps_shrink_for_a_map_with_ripples(self):
        """A distortion on a scale of 60 pixels is followed to a thousandth of a pixel too."""

        def wavy(x, y):
            return x + np.sin(2 * np.pi * y / 200), y + 0.5 * np.cos(2 * np.pi * x / 150)

        m = PixelMap.from_function(wavy, SHAPE)
        x, y = np.random.default_rng(1).uniform(0, 299, (2, 1000))
        assert max(m.step) < 20
        assert np.abs(np.array(m(x, y)) - wavy(x, y)).max() < 1e-3

    def test_inverse_and_jacobian_belong_to_the_map(self):
        """inverse(map(x)) = x, and the Jacobian is the map's slope."""
        m = PixelMap.from_wcs(sip_wcs(SHAPE), tpv_wcs(SHAPE, angle_deg=40, scale_arcsec=0.7), SHAPE)
        x, y = np.random.default_rng(2).uniform(0, 299, (2, 50))
        assert np.allclose(m.inverse(*m(x, y)), (x, y), atol=1e-6)
        h = 1e-3
        numeric = [(np.array(m(x + h * a, y + h * b)) - m(x - h * a, y - h * b)) / (2 * h) for a, b in ((1, 0), (0, 1))]
        assert np.allclose(np.moveaxis(numeric, [0, 1, 2], [2, 1, 0]), m.jacobian(x, y), atol=1e-8)

    def test_a_shift_moves_along_new(self):
        """shifted(dx, dy) asks the old map at (x + dx, y + dy)."""
        m = PixelMap.from_affine(rotation(30, 1.5), SHAPE)
        assert np.allclose(m.shifted(0.5, -0.25)(10, 20), m(10.5, 19.75))

    def test_frames_are_converted(self):
        """A reference in galactic coordinates lands where the sky says."""
        new = tan_wcs(SHAPE, ra=266.0, dec=-29.0)
        centre = SkyCoord(266.0, -29.0, unit="deg").galactic
        ref = WCS(naxis=2)
        ref.wcs.ctype = ["GLON-TAN", "GLAT-TAN"]
        ref.wcs.crval = [centre.l.deg, centre.b.deg]
        ref.wcs.crpix = [151, 151]
        ref.wcs.cdelt = [-1 / 3600, 1 / 3600]
        x, y = PixelMap.from_wcs(new, ref, SHAPE)(np.array([159.5]), np.array([149.5]))
        assert np.allclose((x, y), 150, atol=1e-3)

    def test_points_that_a_distortion_cannot_invert_do_not_spoil_the_rest(self):
        """Where the SIP iteration diverges the map is invalid (no data there); elsewhere it is exact."""
        shape = (600, 600)
        new = tan_wcs((600, 600), scale_arcsec=4.0)
        ref = sip_wcs((150, 150), scale_arcsec=4.0, strength=4.0)
        m = PixelMap.from_wcs(new, ref, shape)
        assert 0.02 < m.valid.mean() < 0.9
        x, y = np.random.default_rng(3).uniform(240, 360, (2, 200))
        exact = ref.all_world2pix(*new.all_pix2world(x, y, 0), 0, maxiter=100, tolerance=1e-8)
        assert np.abs(np.array(m(x, y)) - exact).max() < 1e-3
        out = resample(np.ones((150, 150), np.float32), m, shape)
        assert (out.mask[:30] == MaskBit.NO_DATA).all()
        assert (out.mask[240:360, 240:360] == 0).all()

    def test_opposite_sides_of_the_sky(self):
        """Two WCS without a common horizon are an error that says so."""
        with pytest.raises(AlignError, match="grid points"):
            PixelMap.from_wcs(tan_wcs(SHAPE, dec=60.0), tan_wcs(SHAPE, ra=330.0, dec=-60.0), SHAPE)

    def test_overlap_is_a_fraction_of_new(self):
        """Half of new on ref: 0.5."""
        m = PixelMap.from_affine([[1, 0, 150], [0, 1, 0]], (300, 300))
        assert m.overlap((300, 300)) == pytest.approx(0.5, abs=0.02)


class TestGeometry:
    @pytest.mark.parametrize("order", [2, 3, 4])
    def test_identity_returns_the_input_to_the_last_bit(self, order):
        """Nothing is interpolated where pixels coincide."""
        data = np.random.default_rng(0).normal(1000, 30, SHAPE).astype(np.float32)
        out = resample(data, PixelMap.from_affine([[1, 0, 0], [0, 1, 0]], SHAPE), SHAPE, order=order)
        assert np.array_equal(out.data, data)
        assert not out.mask.any()

    def test_input_is_left_alone_and_any_byte_order_will_do(self):
        """Big-endian integers as FITS has them; the array is not written to."""
        data = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(">i2")
        before = data.copy()
        m = PixelMap.from_affine(rotation(1), SHAPE)
        out = resample(data, m, SHAPE)
        assert np.array_equal(data, before)
        assert np.array_equal(out.data, resample(data.astype(np.float32), m, SHAPE).data)

    @pytest.mark.parametrize("fwhm", [2.5, 5.0])
    @pytest.mark.parametrize("name", ["shift", "rotated", "finer", "coarser", "distorted"])
    def test_stars_keep_flux_and_place(self, name, fwhm):
        """Flux to 0.1 % (0.2 % under a strong distortion) and place to 0.01 px, between any well-sampled grids."""
        maps = {
            "shift": PixelMap.from_affine(rotation(0, 1, (0.37, -0.62)), SHAPE),
            "rotated": PixelMap.from_affine(rotation(33.0), SHAPE),
            "finer": PixelMap.from_affine(rotation(5.0, 2.0), SHAPE),
            "coarser": PixelMap.from_affine(rotation(5.0, 0.7), SHAPE),
            "distorted": PixelMap.from_wcs(sip_wcs(SHAPE), tpv_wcs(SHAPE, angle_deg=3), SHAPE),
        }
        m = maps[name]
        x, y, flux = scatter_stars(15, SHAPE, 5, margin=50, apart=30)
        xr, yr = m(x, y)
        shape_ref, offset = (900, 900), 300
        scale = np.sqrt(m.area)
        ref = render(shape_ref, xr + offset, yr + offset, flux, fwhm * max(scale, 1.0))
        out = resample(ref, m.cropped(-offset, -offset), SHAPE)
        for xi, yi, fi in zip(x, y, flux, strict=True):
            cx, cy, total = centroid(out.data, xi, yi, fwhm * max(1.0, 1 / scale))
            assert np.hypot(cx - xi, cy - yi) < 0.01
            assert total == pytest.approx(fi, rel=2e-3 if name == "distorted" else 1e-3)

    def test_fine_pixels_do_not_alias(self):
        """A sharp star on a reference of half the pixel size keeps its flux at every sub-pixel place."""
        m = PixelMap.from_affine(rotation(0, 2.0, (0.1, 0.3)), SHAPE)
        fluxes = []
        for phase in np.arange(0, 2, 0.25):
            ref = render((640, 640), [300 + phase], [310 + phase / 2], 1e4, 2.0)
            fluxes.append(resample(ref, m, SHAPE).data.sum(dtype=np.float64))
        assert np.ptp(fluxes) / 1e4 < 2e-3
        assert np.mean(fluxes) == pytest.approx(1e4, rel=2e-3)

    def test_a_constant_becomes_the_constant_times_the_area(self):
        """Unit-sum weights: surface brightness has no ripple."""
        out = resample(np.full((700, 700), 7.0), PixelMap.from_affine(rotation(20, 1.3, (200, 200)), SHAPE), SHAPE)
        assert not out.mask.any()
        assert np.allclose(out.data, 7 * 1.69, rtol=1e-5)

    def test_agrees_with_a_quintic_spline(self):
        """scipy's interpolation, which shares no code and no kernel, sees the same stars within 0.3 % of the peak."""
        x, y, flux = scatter_stars(20, SHAPE, 8)
        ref = render(SHAPE, x, y, flux, 3.5)
        m = PixelMap.from_affine(rotation(7.0, 1.0, (0.3, 0.4)), SHAPE)
        out = resample(ref, m, SHAPE, order=4)
        v, u = np.mgrid[: SHAPE[0], : SHAPE[1]]
        xr, yr = m(u, v)
        oracle = map_coordinates(ref, [yr, xr], order=5)
        inside = (out.mask == 0) & (xr > 6) & (yr > 6) & (xr < SHAPE[1] - 7) & (yr < SHAPE[0] - 7)
        assert np.abs(out.data - oracle)[inside].max() < 3e-3 * ref.max()

    def test_is_the_formula_of_its_docstring(self):
        """The plain sum over the kernel, pixel by pixel."""
        rng = np.random.default_rng(3)
        data = rng.normal(size=(60, 60)).astype(np.float32)
        m = PixelMap.from_affine(rotation(10, 1.4, (20, 20), (10, 10)), (20, 20))
        out = resample(data, m, (20, 20))
        sx, sy = m.scales
        k = np.arange(60)
        for x, y in ((10, 10), (12, 7), (15, 18)):
            xr, yr = m(x, y)
            wx, wy = (np.sinc(u) * np.sinc(u / 3) * (abs(u) < 3) for u in ((k - xr) / sx, (k - yr) / sy))
            w = wy[:, None] * wx
            expected = (w * data).sum() / w.sum() * abs(np.linalg.det(m.jacobian(x, y)))
            assert out.data[y, x] == pytest.approx(expected, abs=0.02)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(2, 4), st.floats(1.0, 4.0))
    def test_kernel_rows_have_unit_sum_and_mirror(self, order, scale):
        """Weights at phase p are those at 1 - p reversed."""
        table = kernel_table(order, scale)
        assert np.allclose(table.sum(axis=1), 1)
        assert np.allclose(table, table[::-1, ::-1], atol=1e-12)


class TestNoise:
    @pytest.mark.parametrize("angle", [0.0, 2.0])
    @pytest.mark.parametrize("scale", [0.8, 1.0, 2.0])
    def test_variance_is_predicted(self, angle, scale):
        """Measured scatter of sums over 10 x 10 pixels, over many draws of white noise whose level varies, against the
        sums of the variance."""
        m = PixelMap.from_affine(rotation(angle, scale, (0.3, 0.5), (20, 20)), (40, 40))
        rng = np.random.default_rng(4)
        sigma = np.sqrt(np.linspace(4, 9, 200))[:, None] * np.ones(200)
        wide = m.cropped(-80, -80)

        def sums(plane):
            return plane.reshape(4, 10, 4, 10).sum(axis=(1, 3))

        draws = np.array([sums(resample(rng.normal(size=(200, 200)) * sigma, wide, (40, 40)).data) for _ in range(400)])
        out = resample(np.zeros((200, 200)), wide, (40, 40), variance=sigma**2)
        ratio = draws.var(axis=0) / sums(out.variance)
        # At the edges of a sum, neighbours that belong together are parted: a few per cent.
        assert ratio.mean() == pytest.approx(1, abs=0.05)
        assert ratio.std() < 1.4 * np.sqrt(2 / 400)

    def test_a_number_stands_for_the_same_variance_everywhere(self):
        """variance=4 is variance=full(4)."""
        m = PixelMap.from_wcs(tan_wcs(SHAPE), sip_wcs(SHAPE, angle_deg=2, scale_arcsec=0.9), SHAPE)
        data = np.zeros(SHAPE)
        plane = resample(data, m, SHAPE, variance=np.full(SHAPE, 4.0)).variance
        inside = plane > 0
        number = resample(data, m, SHAPE, variance=4.0).variance
        assert np.allclose(number[inside], plane[inside], rtol=2e-3)

    @pytest.mark.parametrize("scale", [0.8, 1.0, 2.0])
    def test_pixels_by_themselves_are_quieter(self, scale):
        """By the sum of the correlations of the kernel: the variance that is told is that of the pixels times it."""
        m = PixelMap.from_affine(rotation(0.4, scale, (50.5, 50.5), (0, 0)), (256, 256))
        out = resample(np.random.default_rng(5).normal(size=(700, 700)), m, (256, 256), variance=1.0)
        inside = out.mask == 0
        white = float(out.data[inside].var()) * kernel_autocorrelation(m, max_lag=6).sum()
        assert np.mean(out.variance[inside]) == pytest.approx(white, rel=0.03)
        assert white == pytest.approx(m.area, rel=0.03)

    def test_polynomials_are_the_table(self):
        """What the resampling evaluates agrees with the tabulated kernel, and is exact on the grid."""
        for order, scale in ((2, 1.0), (3, 1.0), (4, 1.0), (3, 1.05), (3, 2.3)):
            table, taps = kernel_table(order, scale), kernel_polynomials(order, scale)
            phase = np.linspace(0, 1, len(table))
            weights = np.polynomial.polynomial.polyval(phase, taps.T.astype(np.float64)).T
            assert np.abs(weights - table).max() < (1e-6 if scale == 1 else 1e-4)
            assert np.abs(weights.sum(axis=1) - 1).max() < 1e-5
            assert np.array_equal(taps[:, 0], table[0].astype(np.float32))

    def test_rows_done_together_are_the_pixels_done_one_by_one(self):
        """A shift takes the fast way along rows. The same places along columns, by a map that swaps the axes, take the
        slow one."""
        data = np.random.default_rng(1).normal(100, 5, SHAPE).astype(np.float32)
        straight = PixelMap.from_affine([[1, 0, 3.3], [0, 1, 5.4]], (200, 200))
        swapped = PixelMap.from_affine([[0, 1, 5.4], [1, 0, 3.3]], (200, 200))
        one, two = (
            resample(plane, m, (200, 200), variance=plane**2)
            for plane, m in ((data, straight), (data.T.copy(), swapped))
        )
        assert np.allclose(one.data, two.data, rtol=1e-5)
        assert np.allclose(one.variance, two.variance, rtol=1e-5)

    def test_whole_pixels_are_copied(self):
        """A shift by whole pixels in either direction, beyond the edges too: the same bits, masks and variances."""
        data = np.random.default_rng(0).normal(1000, 30, SHAPE).astype(np.float32)
        data[40, 50] = np.nan
        mask = (np.random.default_rng(1).random(SHAPE) < 0.01).astype(np.uint8)
        m = PixelMap.from_affine([[1, 0, 12], [0, 1, -7]], SHAPE)
        out = resample(data, m, SHAPE, mask=mask, variance=data**2)
        near, far = np.s_[7:, :-12], np.s_[:-7, 12:]
        finite = np.isfinite(data)
        assert np.array_equal(out.data[near], np.where(finite, data, 0)[far])
        assert np.array_equal(out.mask[near], (mask | np.where(finite, 0, MaskBit.NO_DATA | MaskBit.BAD))[far])
        assert (out.mask[:7] == MaskBit.NO_DATA).all()
        assert (out.data[:, -12:] == 0).all()
        assert np.isfinite(out.variance).all()


class TestBadPixels:
    def test_nan_never_spreads(self):
        """NaN, infinities and masked values of any size leave all else as it was within the noise of a filled pixel."""
        rng = np.random.default_rng(6)
        clean = rng.normal(100, 1, SHAPE).astype(np.float32)
        data, mask = clean.copy(), np.zeros(SHAPE, np.uint8)
        data[50, 60], data[100:110, 100] = np.nan, np.inf
        data[200, 200], mask[200, 200] = 1e30, MaskBit.COSMIC_RAY
        data[20:80, 250:300] = np.nan
        m = PixelMap.from_affine(rotation(3.0, 1.0, (0.4, 0.2)), SHAPE)
        out, expected = (
            resample(data, m, SHAPE, mask=mask, variance=np.where(np.isfinite(data), 1, np.nan)),
            resample(clean, m, SHAPE),
        )
        assert np.isfinite(out.data).all()
        assert np.isfinite(out.variance).all()
        good = out.mask == 0
        assert np.abs(out.data - expected.data)[good].max() < 1.0

    @pytest.mark.parametrize("order", [2, 3, 4])
    @pytest.mark.parametrize("bit", [MaskBit.BAD, MaskBit.SATURATED, MaskBit.NO_DATA, MaskBit.COSMIC_RAY])
    def test_a_bit_stays_within_the_kernel(self, order, bit):
        """A masked pixel marks the pixel that it falls on, and none farther than the kernel reaches."""
        mask = np.zeros(SHAPE, np.uint8)
        mask[150, 160] = bit
        m = PixelMap.from_affine(rotation(10.0, 1.0, (0.3, 0.1)), SHAPE)
        out = resample(np.ones(SHAPE), m, SHAPE, mask=mask)
        x, y = (float(c) for c in m.inverse(160, 150))
        inner = np.zeros(SHAPE, bool)
        inner[30:-30, 30:-30] = True
        ys, xs = np.nonzero((out.mask == bit) & inner)
        assert out.mask[round(y), round(x)] == bit
        assert np.hypot(xs - x, ys - y).max() < order * np.sqrt(2)
        assert set(np.unique(out.mask[inner])) == {0, bit}

    def test_a_lone_bad_pixel_costs_few(self):
        """Half a per cent of bad pixels must not mask a tenth of the image."""
        mask = (np.random.default_rng(7).random(SHAPE) < 0.005).astype(np.uint8)
        out = resample(np.ones(SHAPE), PixelMap.from_affine(rotation(2.0), SHAPE), SHAPE, mask=mask)
        inner = out.mask[20:-20, 20:-20]
        assert (inner != 0).mean() < 0.05

    def test_a_bleeding_column_does_not_ring(self):
        """What is masked is replaced before it can ring: pixels beside a saturated trail keep the sky."""
        data = np.full(SHAPE, 100.0)
        data[:, 150:153] = 65535
        mask = np.where(data > 1000, MaskBit.SATURATED, 0).astype(np.uint8)
        m = PixelMap.from_affine([[1, 0, 0.5], [0, 1, 0.5]], SHAPE)
        out = resample(data, m, SHAPE, mask=mask)
        good = (out.mask == 0)[5:-5, 5:-5]
        assert np.allclose(out.data[5:-5, 5:-5][good], 100, rtol=1e-4)
        assert (~good).sum(axis=1).max() <= 11

    def test_outside_is_no_data_and_zero(self):
        """Pixels whose centre lies beyond the reference."""
        out = resample(np.ones((100, 100)), PixelMap.from_affine([[1, 0, -50], [0, 1, -20]], (150, 200)), (150, 200))
        inside = np.zeros((150, 200), bool)
        inside[20:120, 50:150] = True
        assert np.array_equal(out.mask == 0, inside)
        assert (out.data[~inside] == 0).all()
        assert (out.mask[~inside] == MaskBit.NO_DATA).all()

    def test_an_edge_costs_about_a_pixel(self):
        """At half-pixel shifts the outermost pixels would be extrapolated: they are NO_DATA, and only they."""
        out = resample(np.ones(SHAPE), PixelMap.from_affine([[1, 0, 0.5], [0, 1, 0.5]], SHAPE), SHAPE)
        good = out.mask == 0
        assert good[1:-2, 1:-2].all()
        assert not good[-1].any()

    def test_masks_grow_no_holes(self):
        """Every pixel of the result that lies within a large masked area is masked."""
        mask = np.zeros(SHAPE, np.uint8)
        mask[100:150, 120:170] = MaskBit.BAD
        m = PixelMap.from_affine(rotation(0, 1, (0.5, 0.5)), SHAPE)
        out = resample(np.ones(SHAPE), m, SHAPE, mask=mask)
        marked = (out.mask & MaskBit.BAD) != 0
        core = np.zeros(SHAPE, bool)
        core[100:149, 120:169] = True
        assert marked[core].all()
        assert not (marked & ~binary_dilation(core, np.ones((3, 3)), iterations=3)).any()
