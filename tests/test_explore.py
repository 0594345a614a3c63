"""The lazy difference: the pixels of a run where it is looked at, and nothing computed, read or kept beyond that."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from astropy.io import fits
from astropy.wcs import WCS

from batchproc import difference, explore, simulate
from batchproc.config import Config
from batchproc.errors import PsfError, SubtractError, UsageError
from batchproc.imaging.subtract import plan_tiles, subtract, subtract_tile, tile_border
from batchproc.io.parts import load_part, open_image
from batchproc.recipe import BLOCK, BLOCKS, Recipe, _Sampling
from batchproc.records import MaskBit

FIELDS = ("difference", "score_corr", "flux", "flux_err", "mask")
SMALL = Config.from_dict({"subtract": {"tile": 256}})


@pytest.fixture(autouse=True)
def here():
    """The cluster of other tests is not taken for the place to compute."""
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(scope="module")
def pair():
    """Many tiles of 256, with masked areas on seams and one that covers a whole tile."""
    pair = simulate.simulate_pair((640, 700), seed=5, n_transients=10, n_stars=900, bad_columns=2)
    pair.mask_new[300:420, 310:460] |= np.uint8(MaskBit.NO_DATA)
    pair.mask_ref[250:262, 90:130] |= np.uint8(MaskBit.BAD)
    pair.mask_new[255:270, 100:120] |= np.uint8(MaskBit.BAD)
    return pair


@pytest.fixture(scope="module")
def planes(pair):
    """What `difference` and `subtract` both want."""
    return {
        "variance_new": pair.variance_new,
        "variance_ref": pair.variance_ref,
        "mask_new": pair.mask_new,
        "mask_ref": pair.mask_ref,
    }


@pytest.fixture(scope="module")
def whole(pair, planes):
    """The subtraction of the whole image."""
    return subtract(
        pair.new,
        pair.ref,
        pair.psf_new,
        pair.psf_ref,
        rms_new=np.full(pair.new.shape, pair.sigma_new, np.float32),
        rms_ref=np.full(pair.new.shape, pair.sigma_ref, np.float32),
        flux_ratio=pair.flux_ratio,
        registration_sigma=(0.03, 0.05),
        flux_ratio_error=0.002,
        tile=256,
        **planes,
    )


@pytest.fixture(scope="module")
def recipe(pair, whole):
    return Recipe(
        psf_new=pair.psf_new,
        psf_ref=pair.psf_ref,
        flux_ratio=pair.flux_ratio,
        flux_ratio_error=0.002,
        registration_sigma=(0.03, 0.05),
        residuals=whole.residuals,
        renormalisation=whole.renormalisation,
    )


def lazily(pair, planes, recipe, wrap=lambda array: array, **more):
    """The lazy difference of the pair, its arrays handed in as `wrap` makes them."""
    return difference(
        wrap(pair.new),
        wrap(pair.ref),
        sigma_new=pair.sigma_new,
        sigma_ref=pair.sigma_ref,
        recipe=recipe,
        config=SMALL,
        **{name: wrap(plane) for name, plane in planes.items()},
        **more,
    )


def assert_same(lazy, eager, area=np.s_[:, :]):
    """All fields to the byte; flux and its error may be NaN."""
    found = dask.compute(*(getattr(lazy, name) for name in FIELDS))
    for name, array in zip(FIELDS, found, strict=True):
        expected = np.ascontiguousarray(getattr(eager, name)[area])
        assert array.dtype == expected.dtype == getattr(lazy, name).dtype, name
        assert array.tobytes() == expected.tobytes(), name


def mapped(folder):
    """Makes memory maps of arrays, as opened from files with a header."""
    number = iter(range(100))

    def wrap(array):
        path = folder / f"{next(number)}.dat"
        path.write_bytes(b"header.." + array.tobytes())
        return np.memmap(path, array.dtype, "r", 8, array.shape)

    return wrap


# ---- the same pixels


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_every_pixel_is_that_of_the_whole_subtraction(pair, planes, whole, recipe, scheduler):
    """With what holds for the whole image given, to the byte: on seams, in masked areas, and at the edges."""
    with dask.config.set(scheduler=scheduler):
        assert_same(lazily(pair, planes, recipe), whole.difference)


def test_the_distributed_scheduler_gives_the_same(pair, planes, whole, recipe, tmp_path, dask_executor):
    """A client takes the place of the local schedulers, as with any dask collection; files are read by the workers."""
    lazy = lazily(pair, planes, recipe, mapped(tmp_path))[200:500, 250:600]
    found = dask_executor.client.compute([getattr(lazy, name) for name in FIELDS], sync=True)
    for name, array in zip(FIELDS, found, strict=True):
        assert array.tobytes() == np.ascontiguousarray(getattr(whole.difference, name)[200:500, 250:600]).tobytes()


@pytest.mark.parametrize("kind", ["dask", "zarr", "memmap", "float64"])
def test_any_array_will_do(pair, planes, whole, recipe, tmp_path, kind):
    """In memory or not, chunked otherwise than the tiles or not."""
    number = iter(range(100))
    wrap = {
        "dask": lambda array: da.from_array(array, chunks=(170, 333)),
        "zarr": lambda array: zarr.create_array(tmp_path / f"{next(number)}.zarr", data=array, chunks=(128, 200)),
        "memmap": mapped(tmp_path),
        "float64": lambda array: array.astype(np.float64) if array.dtype == np.float32 else array,
    }[kind]

    area = np.s_[150:480, 200:]
    assert_same(lazily(pair, planes, recipe, wrap)[area], whole.difference, area)


def test_what_is_measured_on_a_small_image_is_what_a_subtraction_measures(pair, planes):
    """An image of no more than nine tiles is its own sample: residuals and width are measured as `subtract` does."""
    cut = {name: plane[:400, :420] for name, plane in planes.items()}
    eager = subtract(
        pair.new[:400, :420],
        pair.ref[:400, :420],
        pair.psf_new,
        pair.psf_ref,
        rms_new=np.full((400, 420), pair.sigma_new, np.float32),
        rms_ref=np.full((400, 420), pair.sigma_ref, np.float32),
        flux_ratio=pair.flux_ratio,
        tile=256,
        **cut,
    )
    assert 4 <= eager.n_tiles <= 9
    lazy = difference(
        pair.new[:400, :420],
        pair.ref[:400, :420],
        psf_new=pair.psf_new,
        psf_ref=pair.psf_ref,
        sigma_new=pair.sigma_new,
        sigma_ref=pair.sigma_ref,
        flux_ratio=pair.flux_ratio,
        config=SMALL,
        **cut,
    )
    assert lazy.recipe.residuals == eager.residuals
    assert lazy.recipe.renormalisation == eager.renormalisation
    assert_same(lazy, eager.difference)


# ---- nothing more than is looked at


class Watched:
    """An array that remembers what was read of it."""

    def __init__(self, array):
        self.array, self.shape, self.read = array, array.shape, []

    def __getitem__(self, area):
        self.read.append(area)
        return self.array[area]


def test_nothing_is_read_before_it_is_looked_at(pair, planes, recipe):
    """With a recipe, making and cutting a difference touches no pixel; a look reads what lies under its tiles."""
    new = Watched(pair.new)
    lazy = lazily(replace(pair, new=new), planes, recipe)
    zoom = lazy[30:60, 40:80]
    assert not new.read
    assert zoom.shape == (30, 40)
    zoom.score_corr.compute()
    (area,) = new.read
    assert area[0].stop <= 256 + 32
    assert area[1].stop <= 256 + 32


def test_a_look_costs_the_tiles_it_touches(pair, planes, recipe, monkeypatch):
    """One tile's pixel, one subtraction; a corner where four meet, four; all fields of a tile together, one."""
    lazy = lazily(pair, planes, recipe)
    tiles = plan_tiles(pair.new.shape, tile_border(pair.psf_new, pair.psf_ref), 256)
    done = []

    def counted(given):
        done.append(given.tile)
        return subtract_tile(given)

    def calls(*arrays):
        done.clear()
        dask.compute(*arrays)
        return len(done)

    monkeypatch.setattr(explore, "subtract_tile", counted)
    assert calls(lazy[5:6, 5:6].flux) == 1
    assert calls(*(getattr(lazy[5:6, 5:6], name) for name in FIELDS)) == 1
    y, x = tiles[0].y1, tiles[0].x1
    assert calls(lazy[y - 1 : y + 1, x - 1 : x + 1].score_corr) == 4
    assert calls(lazy.score_corr) == len(tiles) > 9


def test_what_waits_for_a_file_is_small(tmp_path):
    """A part of a memory map or of a FITS file travels as a name and its corners, however large the file."""
    path = tmp_path / "big.dat"
    big = np.memmap(path, np.float32, "w+", 0, (20_000, 20_000))  # sparse: no block of it is written
    fits_path = tmp_path / "a.fits"
    fits.PrimaryHDU(np.ones((50, 60), np.float32), fits.Header({"GAIN": 1.0})).writeto(fits_path)
    area = np.s_[0:1000, 0:1000]
    assert len(pickle.dumps(open_image(big).cut(area))) < 1000
    assert len(pickle.dumps(open_image(fits_path).cut(area))) < 1000
    moved = open_image(big[5000:]).cut(area)  # no map of its own: taken as an array
    assert isinstance(moved[0], np.ndarray)


# ---- places


@pytest.fixture(scope="module")
def sip_wcs():
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = "RA---TAN", "DEC--TAN"
    wcs.wcs.crval, wcs.wcs.crpix, wcs.wcs.cdelt = (150.0, 2.0), (300.0, 280.0), (-3e-4, 3e-4)
    return wcs


def test_cuts_of_cuts_know_where_they_are(pair, planes, recipe, sip_wcs):
    """Pixel coordinates and sky positions of a cut are those of the whole, cut again and again."""
    lazy = lazily(pair, planes, recipe, wcs=sip_wcs)
    cut = lazy[100:400, 50:500][20:, 30:-7]
    assert (cut.y0, cut.x0) == (120, 80)
    assert cut.shape == (280, 413)
    assert (cut.y[0], cut.y[-1], cut.x[0], cut.x[-1]) == (120, 399, 80, 492)
    there = cut.wcs.pixel_to_world_values(11.0, 7.0)
    np.testing.assert_allclose(there, sip_wcs.pixel_to_world_values(91.0, 127.0), rtol=0, atol=1e-10)
    assert lazy[5:5, :].shape == (0, 700)


@pytest.mark.parametrize("area", [np.s_[5], np.s_[::2, :], np.s_[:, :, :], np.s_[[1, 2], :], "flux"])
def test_only_rectangles_can_be_cut(pair, planes, recipe, area):
    """A WCS goes with a rectangle, not with a stride or a list."""
    with pytest.raises(UsageError, match="rectangle"):
        lazily(pair, planes, recipe)[area]


def test_an_xarray_dataset_is_as_lazy_and_knows_its_place(pair, planes, whole, recipe, sip_wcs):
    """Coordinates count pixels of new, and the header in its attributes is for these, however it is cut."""
    xarray = pytest.importorskip("xarray")
    lazy = lazily(pair, planes, recipe, wcs=sip_wcs)
    dataset = lazy[100:, 50:].to_xarray()
    assert isinstance(dataset, xarray.Dataset)
    assert set(dataset.data_vars) == set(FIELDS)
    cut = dataset.sel(y=slice(200, 240), x=slice(300, 350))
    assert cut.score_corr.chunks is not None
    np.testing.assert_array_equal(cut.score_corr.values, whole.difference.score_corr[200:241, 300:351])
    wcs = WCS(fits.Header.fromstring(cut.attrs["wcs"], sep="\n"))
    there = wcs.pixel_to_world_values(cut.x[3], cut.y[4])
    np.testing.assert_allclose(there, sip_wcs.pixel_to_world_values(303, 204), rtol=0, atol=1e-9)


# ---- what is not given is measured


def test_everything_is_measured_where_nothing_is_given():
    """Two exposures with their sky: PSFs, flux ratio, sky and noise come from the images; S_corr has unit width, and
    transients the flux they have.
    """
    pair = simulate.simulate_pair((900, 1000), seed=8, n_transients=25, transient_snr=(15, 60), psf_variation=0.02)
    lazy = difference(*pair.exposures())
    assert lazy.recipe.flux_ratio == pytest.approx(pair.flux_ratio, rel=0.01)
    assert lazy.recipe.psf_new.fwhm == pytest.approx(pair.psf_new.fwhm, rel=0.03)
    assert lazy.recipe.renormalisation == pytest.approx(1, abs=0.04)
    score, flux, flux_err = dask.compute(lazy.score_corr, lazy.flux, lazy.flux_err)
    blank = np.ones(score.shape, bool)
    rows, columns = pair.truth["y"].round().astype(int), pair.truth["x"].round().astype(int)
    for y, x in zip(rows, columns, strict=True):
        blank[max(y - 12, 0) : y + 13, max(x - 12, 0) : x + 13] = False
    low, high = np.percentile(score[blank & (pair.mask == 0)], [15.865, 84.135])
    assert (high - low) / 2 == pytest.approx(1, abs=0.02)
    seen = ~pair.mask[rows, columns]
    pull = (flux[rows, columns] - pair.truth["flux"])[seen] / flux_err[rows, columns][seen]
    assert np.count_nonzero(seen) > 15
    assert abs(np.median(pull)) < 1.0
    assert np.median(np.abs(score[rows, columns][seen]) / pair.truth["snr_local"][seen]) == pytest.approx(1, abs=0.1)


def test_correlated_noise_of_a_reference_is_measured():
    """Of a reference whose pixels were interpolated: S_corr needs next to no renormalisation, and D is white."""
    pair = simulate.simulate_pair((900, 900), seed=4, n_transients=0, n_stars=300)
    new, ref = pair.exposures()
    smooth = (ref.data[:, :-1] + ref.data[:, 1:]) / 2
    lazy = difference(
        replace(new, data=new.data[:, :-1], mask=new.mask[:, :-1]),
        replace(ref, data=smooth, mask=ref.mask[:, :-1] | ref.mask[:, 1:]),
    )
    assert lazy.recipe.noise_new is None
    assert lazy.recipe.noise_ref.acf[3, 4] == pytest.approx(0.5, abs=0.03)
    assert lazy.recipe.renormalisation == pytest.approx(1, abs=0.03)
    image = lazy.difference.compute()
    image[(lazy.mask.compute() != 0) | (np.abs(image) > 4)] = 0
    assert np.mean(image[:, 1:] * image[:, :-1]) == pytest.approx(0, abs=0.02)


def test_a_sample_stands_for_an_image(monkeypatch):
    """Of an image larger than the sample only blocks are read for PSFs and flux ratio, and they tell the same."""
    from batchproc import recipe as module

    pair = simulate.simulate_pair((1300, 1300), seed=9, n_stars=900, n_transients=0)
    new, ref = pair.exposures()
    everything = difference(new, ref, config=SMALL).recipe
    monkeypatch.setattr(module, "BLOCK", 256)
    sampled = difference(new, ref, config=SMALL).recipe
    assert sampled.flux_ratio == pytest.approx(everything.flux_ratio, rel=0.01)
    assert sampled.renormalisation == pytest.approx(everything.renormalisation, abs=0.02)
    for x, y in ((100, 100), (650, 650), (1250, 300)):
        a, b = everything.psf_new.at(x, y), sampled.psf_new.at(x, y)
        middle = min(a.shape[0], b.shape[0]) // 2
        a, b = (p[p.shape[0] // 2 - middle :][:, p.shape[0] // 2 - middle :] for p in (a, b))
        n = 2 * middle + 1
        assert np.abs(a[:n, :n] - b[:n, :n]).max() < 0.03 * a.max()


@pytest.mark.parametrize("length", [1, 500, BLOCK * BLOCKS, BLOCK * BLOCKS + 1, 12_000])
def test_a_sample_lies_within_the_image(length):
    """Its blocks do not overlap, reach both ends, and every place of the image has one in the sample."""
    sampling = _Sampling.of(length)
    taken = np.zeros(length, int)
    for at, where in sampling.pieces():
        taken[where] += 1
        assert at.stop - at.start == where.stop - where.start
        assert np.array_equal(np.interp(np.arange(at.start, at.stop), *sampling.to_image()), np.arange(length)[where])
    assert taken.max() == 1
    assert taken[0] == taken[-1] == 1
    assert taken.sum() == sampling.size == min(length, BLOCK * BLOCKS)
    assert sampling.whole == (length <= BLOCK * BLOCKS)
    place = np.interp(np.arange(length), *sampling.to_sample())
    assert (np.diff(place) > 0).all()
    assert (place[0], place[-1]) == (0, sampling.size - 1)


def test_a_fits_file_is_read_by_section(tmp_path, pair, planes, recipe, whole, sip_wcs):
    """Plain or compressed, with its own mask plane, gain and WCS: the pixels of the image read whole."""
    cards = sip_wcs.to_header()
    cards.extend([("GAIN", 2.0), ("BUNIT", "adu")])
    for name, data, mask in (("new", pair.new, pair.mask_new), ("ref", pair.ref, pair.mask_ref)):
        image = fits.ImageHDU(data / 2, cards, name="SCI")
        fits.HDUList([fits.PrimaryHDU(), image, fits.ImageHDU(mask.astype(np.int16), name="MASK")]).writeto(
            tmp_path / f"{name}.fits"
        )
    lazy = difference(
        tmp_path / "new.fits[SCI]",
        tmp_path / "ref.fits[SCI]",
        sigma_new=pair.sigma_new,
        sigma_ref=pair.sigma_ref,
        recipe=recipe,
        config=SMALL,
        **planes,
    )
    area = np.s_[100:300, 200:350]
    np.testing.assert_array_equal(lazy[area].score_corr.compute(), whole.difference.score_corr[area])
    there = lazy[area].wcs.pixel_to_world_values(0, 0)
    np.testing.assert_allclose(there, sip_wcs.pixel_to_world_values(200, 100), rtol=0, atol=1e-9)
    own = load_part(open_image(tmp_path / "new.fits[SCI]").cut(area))
    assert ((own.mask != 0) == (pair.mask_new[area] != 0)).all()


# ---- what cannot be


def test_images_on_two_grids_are_refused(pair, sip_wcs):
    """By shape, and by WCS where both have one; the error says how to bring them together."""
    with pytest.raises(SubtractError, match=r"batchproc\.align"):
        difference(pair.new, pair.ref[1:])
    new, ref = pair.exposures()
    moved = sip_wcs.deepcopy()
    moved.wcs.crpix += 0.5
    with pytest.raises(SubtractError, match=r"0\.71 pixels apart"):
        difference(replace(new, wcs=sip_wcs), replace(ref, wcs=moved))


def test_planes_of_another_shape_are_refused(pair):
    """The error names the plane and both shapes."""
    with pytest.raises(UsageError, match=r"mask has shape \(639, 700\), the image \(640, 700\)"):
        difference(pair.new, pair.ref, mask_new=pair.mask_new[1:])
    with pytest.raises(UsageError, match="two dimensions"):
        difference(pair.new[0], pair.ref[0])


def test_too_few_stars_for_a_psf_are_an_error_that_says_what_to_give():
    """An empty field cannot tell its PSF."""
    noise = np.random.default_rng(1).normal(100, 5, (300, 300)).astype(np.float32)
    with pytest.raises(PsfError, match="give psf_new"):
        difference(noise, noise)


def test_masks_of_any_kind(pair):
    """Booleans, and numbers that are no bits of ours, are bad; what is not finite has no data."""
    mask = np.zeros((20, 20), np.int32)
    mask[1, 1], mask[2, 2], mask[3, 3] = 256, int(MaskBit.SATURATED), 16
    data = np.ones((20, 20))
    data[4, 4], data[5, 5] = np.nan, np.inf
    part = load_part(open_image(data, mask=mask).cut(np.s_[0:20, 0:20]))
    bits = [int(part.mask[i, i]) for i in range(6)]
    assert bits == [0, MaskBit.BAD, MaskBit.SATURATED, MaskBit.BAD, MaskBit.NO_DATA, MaskBit.NO_DATA]
    assert np.isfinite(part.data).all()
    assert load_part(open_image(data, mask=mask > 0).cut(np.s_[0:20, 0:20])).mask[1, 1] == MaskBit.BAD
    unknown = np.where(mask > 0, np.nan, 0)
    assert load_part(open_image(data, mask=unknown).cut(np.s_[0:20, 0:20])).mask[1, 1] == MaskBit.BAD


def test_what_a_masked_array_hides_has_no_data():
    """What lies under its mask is never seen."""
    data = np.ma.array(np.ones((20, 20)), mask=False)
    data[3, 4] = 1e9
    data.mask[3, 4] = True
    for image in (data, da.from_array(data, chunks=10, asarray=False)):
        part = load_part(dask.compute(*open_image(image).cut(np.s_[0:20, 0:20])))
        assert part.mask[3, 4] == MaskBit.NO_DATA
        assert np.count_nonzero(part.mask) == 1
        assert part.data.max() == 1


_BOUNDED = """
import sys
import numpy as np
import dask
from batchproc import difference
from batchproc.imaging.psf_model import PsfModel

def peak_mb():  # of this program alone: getrusage tells the larger one of its parent and itself
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

side = int(sys.argv[1])
new, ref = (np.memmap(path, np.float32, "r", 0, (side, side)) for path in sys.argv[2:])
y, x = np.mgrid[-10:11, -10:11]
psf = PsfModel.from_array(np.exp(-(x**2 + y**2) / 2 / 1.6**2))
with dask.config.set(scheduler="threads", num_workers=2):
    difference(new[:1500, :1500], ref[:1500, :1500], psf_new=psf, psf_ref=psf,
               sigma_new=10.0, sigma_ref=5.0, flux_ratio=1.0).score_corr.std().compute()
    before = peak_mb()
    d = difference(new, ref, psf_new=psf, psf_ref=psf, sigma_new=10.0, sigma_ref=5.0, flux_ratio=1.0)
    print(float(d.score_corr.std().compute()))
print(peak_mb() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path):
    """The width of S_corr over 12,000² pixels, two files of 576 MB, takes less than 300 MB more than a small image
    does, though all five planes of the result would be 2.4 GB.
    """
    side, rng = 12_000, np.random.default_rng(1)
    for name, sigma in (("new", 10.0), ("ref", 5.0)):
        with (tmp_path / name).open("wb") as file:
            for _ in range(0, side, 500):
                file.write(rng.normal(0, sigma, (500, side)).astype(np.float32).tobytes())
    command = [sys.executable, "-c", _BOUNDED, str(side), str(tmp_path / "new"), str(tmp_path / "ref")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    width, extra_mb = map(float, result.stdout.split())
    print(f"S_corr is {width:.4f} wide; {extra_mb:.0f} MB more than for 1500² pixels")
    assert width == pytest.approx(1, abs=0.01)
    assert 0 < extra_mb < 300
