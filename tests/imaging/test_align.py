"""A reference, or several, brought onto the grid of new."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from batchproc.config import AlignConfig
from batchproc.errors import AlignError
from batchproc.imaging.align import align
from batchproc.imaging.join import PSF_STEP, JoinedPsf, MappedPsf, star_flux_ratio
from batchproc.imaging.pixelmap import PixelMap
from batchproc.imaging.resample import resample
from batchproc.imaging.starlist import detect_stars, match_stars
from batchproc.imaging.zogy import zogy
from batchproc.records import Exposure, MaskBit, PsfLike
from tests.imaging._psfs import ConstantPsf, gaussian
from tests.imaging._stars import expose, render, scatter_stars, sip_wcs, tan_wcs, tpv_wcs

SHAPE = (512, 560)
SHAPE_REF = (700, 760)


def sky_stars(wcs, n=120, seed=1, shape=SHAPE, margin=-120, **kwargs):
    """Stars over new and its surroundings: positions on the sky, fluxes, and positions on new."""
    wide = shape[0] - 2 * margin, shape[1] - 2 * margin
    x, y, flux = scatter_stars(n, wide, seed, apart=18, **kwargs)
    x, y = x + margin, y + margin
    return wcs.all_pix2world(x, y, 0), flux, (x, y)


def image_of(places, flux, wcs, shape, fwhm, seed, *, scale=1.0, **kwargs):
    """An exposure of these stars through a WCS."""
    x, y = wcs.all_world2pix(*places, 0, maxiter=100, tolerance=1e-8, quiet=True)
    near = (x > -30) & (y > -30) & (x < shape[1] + 30) & (y < shape[0] + 30)
    return expose(render(shape, x[near], y[near], flux[near] * scale, fwhm), seed, wcs=wcs, **kwargs)


@pytest.fixture(scope="module")
def pair():
    """SIP against TPV, turned by 3 degrees, of another pixel scale; the true places on new."""
    wcs_new = sip_wcs(SHAPE)
    wcs_ref = tpv_wcs(SHAPE_REF, angle_deg=3.0, scale_arcsec=0.85, ra=150.003)
    sky, flux, xy = sky_stars(wcs_new)
    new = image_of(sky, flux, wcs_new, SHAPE, 3.2, 1)
    ref = image_of(sky, flux, wcs_ref, SHAPE_REF, 3.4, 2, scale=1.5, sky=250.0)
    return new, ref, np.column_stack(xy), flux


def offsets(exposure, xy):
    """Measured minus true places of the 40 brightest good stars."""
    data = exposure.data - np.median(exposure.data[exposure.mask == 0])
    data[exposure.mask != 0] = 0
    stars = detect_stars(data, exposure.mask)[:40]
    i, j = match_stars(stars.xy, xy, 3.0)
    return stars.xy[i] - xy[j]


class TestByWcs:
    def test_sip_onto_tpv(self, pair):
        """Stars of the aligned reference are where new has them, with the flux they had."""
        new, ref, xy, _ = pair
        a = align(new, [ref])
        assert a.method == "wcs"
        assert a.interpolated
        assert a.n_matches > 40
        assert max(a.rms_x, a.rms_y) < 0.05
        d = offsets(a.ref, xy)
        assert len(d) > 30
        assert np.abs(np.median(d, axis=0)).max() < 0.02
        assert a.ref.shape == SHAPE
        assert a.ref.wcs is new.wcs
        assert np.isfinite(a.ref.data).all()

    def test_inputs_are_left_alone(self, pair):
        """Neither image is written to."""
        new, ref, *_ = pair
        before = [x.data.copy() for x in (new, ref)]
        align(new, [ref])
        assert all(np.array_equal(a, x.data) for a, x in zip(before, (new, ref), strict=True))

    def test_same_input_same_bytes(self, pair):
        """Twice the same; by star patterns too, whose search is random."""
        new, ref, *_ = pair
        for r in (ref, replace(ref, wcs=None)):
            one, two = align(new, [r]), align(new, [r])
            assert one.ref.data.tobytes() == two.ref.data.tobytes()

    def test_a_wcs_that_is_bent_is_straightened(self, pair):
        """A distortion of half a pixel that the WCS does not know is found in the stars and taken out."""
        new, ref, xy, _ = pair
        bent = ref.wcs.deepcopy()
        bent.wcs.pc = bent.wcs.get_pc() @ np.array([[1.001, 0.0005], [-0.0008, 0.9985]])
        bent.wcs.crpix += [0.4, -0.3]
        bent.wcs.set()
        a = align(new, [replace(ref, wcs=bent)])
        assert a.method == "wcs"
        assert a.registration.significant
        assert 0.3 < a.registration.size < 1.5
        assert np.abs(np.median(offsets(a.ref, xy), axis=0)).max() < 0.02
        assert np.percentile(np.hypot(*offsets(a.ref, xy).T), 80) < 0.1
        raw = align(new, [replace(ref, wcs=bent)], AlignConfig(refine=False))
        assert np.hypot(raw.rms_x, raw.rms_y) == pytest.approx(a.registration.size, rel=0.1)

    def test_a_large_reference_is_cut_first(self, pair):
        """A reference of a hundred times the area gives the same as its relevant part."""
        new, ref, xy, _ = pair
        data = np.full((2000, 2500), 250, np.float32)
        data[700:1400, 900:1660] = ref.data
        wcs = ref.wcs.deepcopy()
        wcs.wcs.crpix += [900, 700]
        wcs.wcs.set()
        a = align(new, [replace(ref, data=data, mask=np.zeros(data.shape, np.uint8), wcs=wcs)])
        assert np.abs(np.median(offsets(a.ref, xy), axis=0)).max() < 0.02

    def test_saturation_follows_the_area(self, pair):
        """A level in electrons per pixel is that of the new pixels."""
        new, ref, *_ = pair
        a = align(new, [replace(ref, saturation=50000.0)])
        assert a.ref.saturation == pytest.approx(50000 / 0.85**2, rel=0.02)


class TestSameGrid:
    def test_nothing_is_interpolated(self, pair):
        """The same WCS and shape, and stars that agree: the reference itself."""
        new, *_ = pair
        other = replace(new, data=new.data + np.random.default_rng(0).normal(0, 5, SHAPE).astype(np.float32))
        a = align(new, [other])
        assert not a.interpolated
        assert a.ref.data is other.data
        assert a.noise is None
        assert a.method == "wcs"

    def test_a_wrong_shift_is_corrected_all_the_same(self, pair):
        """The same WCS, but the stars are half a pixel off: interpolated, once."""
        new, _, xy, flux = pair
        moved = expose(render(SHAPE, xy[:, 0] + 0.5, xy[:, 1], flux, 3.2), 9, wcs=new.wcs)
        a = align(new, [moved])
        assert a.interpolated
        assert a.registration(250, 250)[0] == pytest.approx(0.5, abs=0.02)
        assert np.abs(np.median(offsets(a.ref, xy), axis=0)).max() < 0.02

    def test_without_wcs_the_same_shape_is_taken_for_the_same_grid(self, pair):
        """As plain arrays that were aligned before; the stars have the last word."""
        new, *_ = pair
        plain = replace(new, wcs=None)
        a = align(plain, [plain])
        assert not a.interpolated
        assert a.method == "stars"


class TestByStars:
    @pytest.mark.parametrize("wrong", ["shifted", "turned", "none", "mirrored"])
    def test_patterns_take_over_where_the_wcs_is_wrong(self, pair, wrong):
        """Tens of pixels off, turned, absent, or the image mirrored: aligned to the same accuracy."""
        new, ref, xy, _ = pair
        wcs = ref.wcs.deepcopy()
        if wrong == "shifted":
            wcs.wcs.crpix += [35, -20]
        elif wrong == "turned":
            wcs.wcs.pc = wcs.wcs.get_pc() @ np.array([[0.98, -0.17], [0.17, 0.98]])
        wcs.wcs.set()
        ref = replace(ref, wcs=None if wrong in ("none", "mirrored") else wcs)
        if wrong == "mirrored":
            ref = replace(ref, data=ref.data[:, ::-1])
        a = align(new, [ref])
        assert a.method == "stars"
        assert max(a.rms_x, a.rms_y) < 0.1
        assert np.abs(np.median(offsets(a.ref, xy), axis=0)).max() < 0.03


class TestErrors:
    def test_another_field(self, pair):
        """No overlap: the centres of both, in the message."""
        new, ref, *_ = pair
        far = ref.wcs.deepcopy()
        far.wcs.crval = [151.0, 20.0]
        far.wcs.set()
        with pytest.raises(AlignError, match=r"no overlap: 0 % of seed1 .*RA 150\.\d+.*RA 151\.") as info:
            align(new, [replace(ref, wcs=far)])
        assert info.value.metadata["overlap_percent"] == 0

    def test_other_stars(self, pair):
        """A reference that shows other stars: how many match, and how many are needed."""
        new, ref, *_ = pair
        sky, flux, _ = sky_stars(new.wcs, n=40, seed=77)
        with pytest.raises(AlignError, match=r"stars match .*at least 8 are needed") as info:
            align(new, [image_of(sky, flux, ref.wcs, SHAPE_REF, 3.4, 2)])
        assert info.value.metadata["found"] < info.value.metadata["needed"] == 8

    def test_no_stars_in_new(self, pair):
        """Blank sky."""
        _, ref, *_ = pair
        with pytest.raises(AlignError, match="0 usable stars, at least 3"):
            align(expose(np.zeros(SHAPE), 3, wcs=tan_wcs(SHAPE)), [ref])

    def test_all_masked(self, pair):
        """Nothing to see in new, or in ref."""
        new, ref, *_ = pair
        with pytest.raises(AlignError, match="masked all over"):
            align(replace(new, mask=np.ones(SHAPE, np.uint8)), [ref])
        with pytest.raises(AlignError, match="0 stars match"):
            align(new, [replace(ref, mask=np.ones(SHAPE_REF, np.uint8))])

    def test_no_wcs_and_no_patterns(self, pair):
        """Different shapes, nothing to go by."""
        new, *_ = pair
        x, y, flux = scatter_stars(20, (300, 300), 5, apart=20)
        other = expose(render((300, 300), x, y, flux, 3.0), 5)
        with pytest.raises(AlignError, match="no WCS in common"):
            align(new, [other])

    def test_no_reference(self, pair):
        """An empty list."""
        with pytest.raises(AlignError, match="no reference given"):
            align(pair[0], [])


class TestFewStars:
    def field(self, n, seed=1, off=(0.6, -0.4)):
        shape = (256, 256)
        x, y, flux = scatter_stars(n, shape, seed, margin=25, apart=25, faintest=2e4)
        w = tan_wcs(shape)
        new = expose(render(shape, x, y, flux, 4.0), 1, wcs=w)
        ref = expose(render(shape, x + off[0], y + off[1], flux, 4.5), 2, wcs=w)
        return new, ref

    @pytest.mark.parametrize("n", [3, 5, 10])
    def test_a_handful_that_agrees_gives_a_shift(self, n):
        """256 x 256 with hardly a star and a good WCS: a constant shift, with an error to go with it."""
        a = align(*(lambda f: (f[0], [f[1]]))(self.field(n)))
        assert a.registration.degree == 0
        assert a.registration(128, 128) == pytest.approx((0.6, -0.4), abs=0.03)
        assert 0 < a.rms_x < 0.1
        assert a.n_matches == n

    def test_a_handful_that_disagrees_does_not(self):
        """Three of ten stars near each other by chance are no alignment."""
        new, _ = self.field(12)
        _, ref = self.field(12, seed=3)
        with pytest.raises(AlignError, match="at least 8 are needed"):
            align(new, [ref])


class TestPsf:
    def test_a_mapped_psf_is_the_psf_of_mapped_stars(self):
        """An elongated PSF, turned, shrunk and moved: the stamp agrees with a star that was resampled."""
        size = 41
        stamp = render((size, size), [20], [20], 1.0, 5.0, elongation=1.5)
        stamp /= stamp.sum()
        a = np.deg2rad(30)
        matrix = [[1.4 * np.cos(a), -1.4 * np.sin(a), 80], [1.4 * np.sin(a), 1.4 * np.cos(a), 40]]
        m = PixelMap.from_affine(matrix, (200, 200))
        psf = MappedPsf(ConstantPsf(stamp, 5.0), m)
        assert isinstance(psf, PsfLike)
        xr, yr = (float(v) for v in m(100, 90))
        star = resample(render((400, 400), [xr], [yr], 1.0, 5.0, elongation=1.5), m, (200, 200)).data
        h = psf.size // 2
        assert psf.size % 2 == 1
        assert psf.at(100, 90).sum() == pytest.approx(1)
        assert np.abs(psf.at(100, 90) - star[90 - h : 91 + h, 100 - h : 101 + h]).max() < 0.01 * star.max()
        assert psf.fwhm == pytest.approx(5 / 1.4, rel=1e-3)

    def test_the_identity_leaves_a_psf_alone(self):
        """Same grid, same stamp."""
        psf = MappedPsf(ConstantPsf(gaussian(3.0, 25), 3.0), PixelMap.from_affine([[1, 0, 0], [0, 1, 0]], SHAPE))
        assert psf.size == 25
        assert np.allclose(psf.at(30, 40), gaussian(3.0, 25), atol=1e-7)

    def test_align_carries_it(self, pair):
        """A reference with a PSF still has one, for new's grid."""
        new, ref, *_ = pair
        a = align(new, [replace(ref, psf=ConstantPsf(gaussian(3.4, 31), 3.4))])
        assert a.ref.psf.fwhm == pytest.approx(3.4 * 0.85, rel=0.02)
        assert np.allclose(a.ref.psf.at(200, 200), gaussian(3.4 * 0.85, a.ref.psf.size), atol=0.003)


class TestNoise:
    def test_variance_and_noise_make_s_corr_of_unit_width(self):
        """White reference noise that was interpolated at half a pixel: with the autocorrelation that `Aligned` tells,
        S_corr is as wide as it should be; without it, it is 9 % too wide."""
        rng = np.random.default_rng(0)
        x, y, flux = scatter_stars(60, SHAPE, 4, apart=25, margin=10)
        w = tan_wcs(SHAPE)
        clean = render(SHAPE, x, y, flux, 3.4)
        new = expose(clean, 1, wcs=w)
        ref = Exposure(
            data=(render(SHAPE, x + 0.5, y + 0.5, flux, 2.6) + 100 + rng.normal(0, 20, SHAPE)).astype(np.float32),
            variance=np.full(SHAPE, 400, np.float32),
            mask=np.zeros(SHAPE, np.uint8),
            wcs=w,
        )
        a = align(new, [ref])
        assert a.interpolated
        inner = np.s_[20:-20, 20:-20]
        assert np.median(a.ref.variance[inner]) == pytest.approx(400, rel=0.02)
        assert a.noise.sum() == pytest.approx(1 / 0.62, rel=0.05)
        shift = [[1, 0, 0.5], [0, 1, 0.5]]
        blank = resample(rng.normal(0, 20, SHAPE), PixelMap.from_affine(shift, SHAPE), SHAPE).data
        white = rng.normal(0, 20, SHAPE)
        widths = {
            told: zogy(
                white,
                blank,
                gaussian(3.4),
                gaussian(2.6),
                sigma_new=20.0,
                sigma_ref=float(blank[inner].std()),
                noise_ref=a.noise if told else None,
            )
            .score_corr[inner]
            .std()
            for told in (True, False)
        }
        assert widths[True] == pytest.approx(1, abs=0.03)
        assert widths[False] > 1.05


class TestSeveral:
    @pytest.fixture(scope="class")
    def bricks(self):
        """New on the seam of two bricks of other scale, depth and flux unit, each turned its own way."""
        wcs_new = tan_wcs(SHAPE)
        sky, flux, xy = sky_stars(wcs_new, n=150)
        new = image_of(sky, flux, wcs_new, SHAPE, 3.2, 1)
        refs = []
        for k, (middle, angle, scale, level) in enumerate(((671, 2.0, 1.0, 300.0), (44, -1.0, 2.0, 900.0))):
            # The first covers new up to x = 360, the second from 240 on.
            w = tan_wcs(SHAPE_REF, angle_deg=angle, scale_arcsec=0.9, centre=(middle, 350))
            refs.append(image_of(sky, flux, w, SHAPE_REF, 3.0 + 0.4 * k, 10 + k, scale=scale, sky=level))
        return new, refs, np.column_stack(xy), flux

    def test_two_bricks_become_one(self, bricks):
        """Every pixel covered, one flux system (the first one's), sky gone, noise that follows the weights."""
        new, refs, xy, flux = bricks
        a = align(new, refs)
        assert a.n_refs == 2
        assert a.overlap > 0.99
        assert np.abs(np.median(offsets(a.ref, xy), axis=0)).max() < 0.02
        assert abs(np.median(a.ref.data)) < 2
        good = np.zeros(SHAPE, np.uint8)
        for side in (xy[:, 0] < 200, xy[:, 0] > 360):
            x, y = xy[side].T
            truth = render(SHAPE, *xy.T, flux, 3.2).astype(np.float32)
            assert star_flux_ratio(a.ref.data, a.ref.mask, truth, good, x, y, 7.0) == pytest.approx(1, abs=0.02)

    def test_order_sets_the_flux_system_only(self, bricks):
        """The other way round: all fluxes twice as large."""
        new, refs, *_ = bricks
        one, two = align(new, refs), align(new, refs[::-1])
        bright = (one.ref.data > 500) & (one.ref.mask == 0) & (two.ref.mask == 0)
        assert np.median(two.ref.data[bright] / one.ref.data[bright]) == pytest.approx(2, rel=0.02)

    def test_zero_points_rule(self, bricks):
        """Where both have one, no star is asked: ref 2 with 0.753 mag more is twice as bright."""
        new, refs, *_ = bricks
        zp = [replace(refs[0], zero_point=25.0), replace(refs[1], zero_point=25.0 + 2.5 * np.log10(2))]
        one, two = align(new, refs), align(new, zp)
        good = (one.ref.mask == 0) & (two.ref.mask == 0) & (one.ref.data > 1000)
        assert np.median(two.ref.data[good] / one.ref.data[good]) == pytest.approx(1, abs=0.02)

    def test_noise_is_lower_where_they_overlap(self, bricks):
        """Inverse-variance weights: the variance of the sum is the inverse of the sum of inverses."""
        new, refs, *_ = bricks
        with_variance = [
            replace(r, variance=np.full(SHAPE_REF, v, np.float32)) for r, v in zip(refs, (300, 900), strict=True)
        ]
        a = align(new, with_variance)
        left, both, right = (
            np.median(a.ref.variance[100:400, s]) for s in (np.s_[20:60], np.s_[250:300], np.s_[500:540])
        )
        assert both < 0.8 * min(left, right)
        blank = np.abs(a.ref.data) < 60
        for s, expected in ((np.s_[20:60], left), (np.s_[250:300], both), (np.s_[500:540], right)):
            values = a.ref.data[50:450, s][blank[50:450, s]]
            measured = (np.diff(np.percentile(values, [15.87, 84.13]))[0] / 2) ** 2
            assert measured * a.noise.sum() == pytest.approx(expected, rel=0.15)

    def test_a_hole_in_one_is_filled_by_the_other(self, bricks):
        """Masked in one reference only: no mask, and no trace of what was there."""
        new, refs, *_ = bricks
        plain = align(new, refs)
        x, y = PixelMap.from_wcs(new.wcs, refs[0].wcs, SHAPE)(280, 250)
        box = np.s_[round(float(y)) - 10 : round(float(y)) + 10, round(float(x)) - 10 : round(float(x)) + 10]
        data, mask = refs[0].data.copy(), refs[0].mask.copy()
        data[box], mask[box] = 1e6, MaskBit.BAD
        a = align(new, [replace(refs[0], data=data, mask=mask), refs[1]])
        around = np.s_[235:265, 265:295]
        assert not a.ref.mask[around].any()
        assert np.abs(a.ref.data - plain.ref.data)[around].max() < 300

    def test_psfs_are_joined_by_weight(self, bricks):
        """Left the first one's, right the other's, between them a mixture of unit sum."""
        new, refs, *_ = bricks
        a = align(new, [replace(r, psf=ConstantPsf(gaussian(f, 31), f)) for r, f in zip(refs, (3.0, 3.4), strict=True)])
        assert isinstance(a.ref.psf, JoinedPsf)
        left, both, right = (a.ref.psf.at(x, 250) for x in (30, 280, 530))
        assert left.max() > both.max() > right.max()
        assert both.sum() == pytest.approx(1)
        assert np.allclose(left, gaussian(2.7, a.ref.psf.size), atol=0.004)
        assert a.ref.psf.weights.shape == (2, -(-SHAPE[0] // PSF_STEP), -(-SHAPE[1] // PSF_STEP))

    def test_a_brick_elsewhere_is_left_out(self, bricks):
        """A generous list of references does no harm."""
        new, refs, *_ = bricks
        far = refs[1].wcs.deepcopy()
        far.wcs.crval = [152.0, 25.0]
        far.wcs.set()
        a = align(new, [*refs, replace(refs[1], wcs=far)])
        assert a.n_refs == 2

    def test_a_sliver_without_stars_borrows_the_registration(self, bricks):
        """A brick that shows a strip of new with hardly a star is placed by its WCS and its neighbour's word."""
        new, refs, *_ = bricks
        strip = replace(refs[1], mask=refs[1].mask | np.uint8(MaskBit.NO_DATA))
        mask = strip.mask.copy()
        mask[:, 345:] = 0  # new beyond x = 550
        known = [replace(r, zero_point=zp) for r, zp in ((refs[0], 25.0), (replace(strip, mask=mask), 25.753))]
        one, two, neither = align(new, refs[:1]), align(new, known), align(new, [refs[0], replace(strip, mask=mask)])
        assert (two.n_refs, neither.n_refs) == (2, 1)
        assert two.overlap > one.overlap + 0.01
        # Without a zero point or stars its flux scale is unknown: it is left out.
        assert neither.overlap == pytest.approx(one.overlap, abs=0.01)


def real(path):
    root = os.environ.get("BATCHPROC_TEST_DATA")
    if not root or not (Path(root) / path).exists():
        pytest.skip(f"needs {path} under BATCHPROC_TEST_DATA")
    return Path(root) / path


def read(path, *, gain=None, saturation=np.inf):
    with fits.open(path) as hdus:
        hdu = hdus[0] if hdus[0].data is not None else hdus[1]
        data, header = hdu.data.astype(np.float32), hdu.header
    gain = gain or header["GAIN"]
    mask = np.where(np.isfinite(data), 0, MaskBit.NO_DATA) | np.where(data >= saturation, MaskBit.SATURATED, 0)
    return Exposure(
        data=np.nan_to_num(data) * np.float32(gain),
        variance=None,
        mask=mask.astype(np.uint8),
        gain=gain,
        saturation=saturation * gain,
        wcs=WCS(header),
        meta={"path": str(path)},
    )


@pytest.mark.realdata
class TestRealImages:
    def test_goto(self):
        """Same WCS, stars up to 0.3 px apart: a curved correction is called for; 0.01 and 0.03 px are left."""
        new, ref = (read(real(f"images/goto/epoch{k}.fits"), gain=1.0, saturation=50000.0) for k in (2, 1))
        a = align(new, [ref])
        assert a.method == "wcs"
        assert a.n_matches > 250
        assert a.registration.degree >= 2
        assert a.rms_x < 0.02
        assert a.rms_y < 0.05
        assert a.overlap > 0.998
        again = align(new, [a.ref])
        assert again.registration.size < 0.03

    def test_decam_coadd_rotated(self):
        """A quarter of a real coadd against a copy turned by 1.2 degrees: with its WCS and without."""
        whole = read(real("images/decam_coadd/coadd.fits.fz"), gain=52.4, saturation=30296.0)
        part = np.s_[1000:2600, 1000:2600]
        wcs = whole.wcs.deepcopy()
        wcs.wcs.crpix -= 1000
        ref = replace(whole, data=whole.data[part], mask=whole.mask[part], wcs=wcs)
        a = np.deg2rad(1.2)
        turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        offset = np.array([800, 800]) - turn @ [800, 800] + [3.3, -7.7]
        m = PixelMap.from_affine(np.column_stack([turn, offset]), ref.shape)
        turned = resample(ref.data, m, ref.shape, mask=ref.mask)
        wcs_new = wcs.deepcopy()
        wcs_new.wcs.crpix = np.linalg.inv(turn) @ (wcs.wcs.crpix - 1 - offset) + 1
        wcs_new.wcs.cd = wcs.pixel_scale_matrix @ turn
        noise = np.random.default_rng(0).normal(0, 90, ref.shape).astype(np.float32)
        new = replace(ref, data=turned.data + noise, mask=turned.mask, wcs=wcs_new)
        by_wcs = align(new, [ref])
        by_stars = align(replace(new, wcs=None), [ref])
        assert by_wcs.method == "wcs"
        assert by_stars.method == "stars"
        for found in (by_wcs, by_stars):
            assert found.n_matches > 80
            assert max(found.rms_x, found.rms_y) < 0.03
        inner = (by_wcs.ref.mask | by_stars.ref.mask) == 0
        assert np.abs(by_wcs.ref.data - by_stars.ref.data)[inner].max() < 0.02 * ref.data.max()

    @pytest.mark.parametrize("letter", "abcde")
    def test_decam_epochs(self, letter):
        """Eight sources, five of them good: half a pixel is found and said to be good to 0.3 px or better."""
        new, ref = (read(real(f"images/decam_epochs/DEC-OBS{k}{letter}.mini.fits"), gain=4.0) for k in ("18", "04"))
        a = align(new, [ref])
        assert a.n_matches >= 3
        assert a.registration.degree == 0
        assert 0.2 < a.registration.size < 1.0
        assert 0.03 < np.hypot(a.rms_x, a.rms_y) < 0.35
