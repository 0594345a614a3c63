"""A simulated night is made of files that a survey could have written, and its truth is true."""

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits

from batchproc.errors import ReadError
from batchproc.imaging.simulate import Scene, simulate_pair
from batchproc.io.images import read_new, read_refs
from batchproc.io.manifest import read_manifest
from batchproc.io.night import simulate_night


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    folder = tmp_path_factory.mktemp("night")
    simulate_night(folder, n_images=5, size=(256, 280), seed=3, n_transients=6, broken=True)
    return folder


@pytest.fixture(scope="module")
def entries(night):
    return {entry.image_id: entry for entry in read_manifest(night / "manifest.csv")}


def test_the_manifest_lists_each_image_and_the_broken_ones(entries):
    """Two CCDs an exposure, then the truncated and the empty image."""
    assert list(entries) == ["e001_c1", "e001_c2", "e002_c1", "e002_c2", "e003_c1", "truncated", "all_nan"]


@pytest.mark.parametrize("image_id", ["e001_c2", "e002_c1", "e003_c1"])
def test_every_format_reads_back_in_electrons(entries, image_id):
    """Plain 16-bit, Rice-compressed and multi-extension files give the same kind of exposure, with header and mask."""
    new, (ref,) = read_new(entries[image_id]), read_refs(entries[image_id])
    assert new.shape == (256, 280)
    assert ref.shape == (304, 328)
    level, noise = np.median(new.data), 1.4826 * np.median(np.abs(new.data - np.median(new.data)))
    assert noise == pytest.approx(np.sqrt(level + 25), rel=0.1)
    level, noise = np.median(ref.data), 1.4826 * np.median(np.abs(ref.data - np.median(ref.data)))
    assert noise == pytest.approx(np.sqrt(level + 25 * 4), rel=0.1)  # electrons of all four exposures
    assert new.gain in (1.6, 1.9)
    assert new.saturation == pytest.approx(6e4)
    assert np.isfinite(new.zero_point)
    assert new.meta["filter"] in ("g", "r", "i")
    assert 0 < (new.mask != 0).mean() < 0.05
    assert new.wcs is not None


def test_truth_has_the_sky_position_of_its_pixel(night, entries):
    """RA and Dec of the truth are those that the header's WCS gives, so that catalogues can be compared on the sky."""
    truth = pd.read_parquet(night / "truth.parquet")
    assert len(truth) == 5 * 6
    for image_id in ("e001_c1", "e003_c1"):
        rows = truth[truth["image_id"] == image_id]
        sky = read_new(entries[image_id]).wcs.pixel_to_world(rows["x"].to_numpy(), rows["y"].to_numpy())
        np.testing.assert_allclose(sky.ra.deg, rows["ra"], atol=1e-8)
        np.testing.assert_allclose(sky.dec.deg, rows["dec"], atol=1e-8)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A night of lonely bright stars and transients, without galaxies or artefacts."""
    folder = tmp_path_factory.mktemp("quiet")
    scene = Scene(flux_ratio=1.0, n_stars=60, n_galaxies=0, star_flux=(1e5, 2e5), transient_snr=(150, 300))
    simulate_night(folder, n_images=1, size=300, seed=1, n_transients=10, scene=scene)
    return folder


def centroid(image, x, y, half=8):
    cell = image[y - half : y + half + 1, x - half : x + half + 1]
    rows, columns = np.mgrid[-half : half + 1, -half : half + 1]
    return x + (cell * columns).sum() / cell.sum(), y + (cell * rows).sum() / cell.sum(), cell.sum()


def test_both_images_show_the_same_sky(quiet):
    """Stars of new lie in ref where both WCS say, but for the quarter of a pixel that the header of ref is wrong by."""
    (entry,) = read_manifest(quiet / "manifest.csv")
    new, (ref,) = read_new(entry), read_refs(entry)
    image, reference = (e.data.astype(float) - np.median(e.data) for e in (new, ref))
    image[:20] = image[-20:] = image[:, :20] = image[:, -20:] = 0
    y, x = np.unravel_index(np.argmax(image), image.shape)
    cx, cy, flux = centroid(image, x, y)
    xr, yr = ref.wcs.all_world2pix(*new.wcs.all_pix2world(cx, cy, 0), 0)
    found_x, found_y, flux_ref = centroid(reference, round(float(xr)), round(float(yr)))
    assert (found_x - xr, found_y - yr) == pytest.approx((-0.25, 0.15), abs=0.08)
    # Four exposures of that transparency.
    assert 4 / 1.1 * 0.95 < flux_ref / flux < 4 / 0.8 * 1.05


def test_the_weather_comes_on_top_of_what_is_asked_for(tmp_path, monkeypatch):
    """A night through clouds of two magnitudes, with long stars and a sloping sky, has these in every exposure."""
    asked = Scene(flux_ratio=0.16, axis_ratio=0.5, theta=90.0, sky_slope=0.5, sky_new=2000.0, n_stars=20, n_galaxies=0)
    seen = []

    def spy(*args, scene, **others):
        seen.append(scene)
        return simulate_pair(*args, scene=scene, **others)

    monkeypatch.setattr("batchproc.io.night.simulate_pair", spy)
    simulate_night(tmp_path / "night", n_images=5, size=128, n_transients=1, scene=asked)
    assert len({scene.flux_ratio for scene in seen}) == 3  # exposures
    for scene in seen:
        assert 0.8 <= scene.flux_ratio / 0.16 <= 1.1
        assert 0.88 <= scene.axis_ratio / 0.5 <= 1.0
        assert 0 <= scene.theta - 90 <= 180
        assert abs(scene.sky_slope - 0.5) <= 0.05
        assert 0.8 <= scene.sky_new / 2000 <= 1.5


def test_a_flux_of_the_truth_is_in_the_image(quiet):
    """Around a new transient, the image holds its flux above the sky, in units of the file, at its place."""
    (entry,) = read_manifest(quiet / "manifest.csv")
    new = read_new(entry)
    image = (new.data - np.median(new.data)) / new.gain
    truth = pd.read_parquet(quiet / "truth.parquet").query("kind == 'new' and not masked")
    found = np.array([centroid(image, round(row.x), round(row.y)) for row in truth.itertuples()])
    assert np.median(np.abs(found[:, 2] / truth["flux"] - 1)) < 0.08
    assert np.median(np.hypot(found[:, 0] - truth["x"], found[:, 1] - truth["y"])) < 0.3


def test_broken_images_are_refused(entries):
    """The truncated and the all-NaN image raise what the run records as failures."""
    for image_id in ("truncated", "all_nan"):
        with pytest.raises(ReadError):
            read_new(entries[image_id])


def test_a_seed_makes_one_night(night, tmp_path):
    """The same seed writes the same pixels and truth."""
    simulate_night(tmp_path, n_images=1, size=(256, 280), seed=3, n_transients=6)
    again = fits.getdata(tmp_path / "images/e001_c1.fits")
    np.testing.assert_array_equal(again, fits.getdata(night / "images/e001_c1.fits"))
    first = pd.read_parquet(night / "truth.parquet").iloc[:6]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "truth.parquet"), first)
