"""Memory is known before anything starts: told from the sizes of images, and held against what a worker has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from batchproc.distribute.prediction import Prediction, check_memory, predict_image, predict_memory, tile_bytes
from batchproc.errors import UsageError
from batchproc.records import ManifestEntry
from tests.benchmarks.memory import CASES, measured_and_predicted


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0][0]}-{case[1][0]}x{case[2]}-{case[3]:d}")
def test_a_worker_needs_no_more_than_predicted_and_not_much_less(tmp_path_factory, case) -> None:
    """The largest size of a fresh process is 0.7 to 1.0 of the prediction, for small and large images alike."""
    measured, predicted = measured_and_predicted(tmp_path_factory.getbasetemp() / "pairs", case)
    assert 0.7 <= measured / predicted <= 1.0


def test_more_of_anything_needs_more() -> None:
    """Pixels, references, variance planes, tiles under way: none of them is free."""
    little = predict_memory(10**7, [10**7])
    assert predict_memory(2 * 10**7, [10**7]) > little
    assert predict_memory(10**7, [10**8]) > little
    assert predict_memory(10**7, [10**7] * 4) > predict_memory(10**7, [10**7] * 3) > little
    assert predict_memory(10**7, [10**7], variance=True) > little
    assert tile_bytes(1024, 4) == 2 * tile_bytes(1024, 2) > 10**8


def write(path: Path, shape: tuple[int, int], **extensions: tuple[int, int]) -> str:
    """A FITS file of an image of nothing but its shape."""
    hdus = [
        fits.PrimaryHDU(np.zeros(shape, np.float32)),
        *(fits.ImageHDU(np.zeros(s), name=n) for n, s in extensions.items()),
    ]
    fits.HDUList(hdus).writeto(path)
    return str(path)


def test_sizes_come_from_headers(tmp_path: Path) -> None:
    """Every reference counts with its own size, and variance planes where there are some, beside or in the file."""
    new, ref = write(tmp_path / "new.fits", (300, 400)), write(tmp_path / "ref.fits", (500, 600))
    found = predict_image(ManifestEntry("a", new, (ref, ref)))
    assert found == Prediction("a", predict_memory(120_000, [300_000] * 2), (300, 400), ((500, 600), (500, 600)), 1)
    with_variance = predict_memory(120_000, [300_000], variance=True)
    beside = predict_image(ManifestEntry("a", new, (ref,), new_variance="somewhere.fits"))
    assert beside is not None
    assert beside.bytes == with_variance
    inside = predict_image(ManifestEntry("a", new, (write(tmp_path / "v.fits", (500, 600), VARIANCE=(500, 600)),)))
    assert inside is not None
    assert inside.bytes == with_variance


def test_a_file_that_cannot_be_read_predicts_nothing(tmp_path: Path) -> None:
    """What is wrong with it is told by its own task."""
    assert predict_image(ManifestEntry("a", str(tmp_path / "none.fits"), ("x",))) is None


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    """Image, prediction, limit and what to type; nothing is refused where the limit is unknown."""
    large = Prediction("ztf_1", 2 * 10**9, (3080, 3072), ((3080, 3072),), 1)
    check_memory(large, None)
    check_memory(large, 3 * 10**9, 4)
    with pytest.raises(UsageError, match=r"ztf_1 \(3072 x 3080 pixels, 1 reference\) needs about 2 GB") as refused:
        check_memory(large, 10**9, 8)
    assert "0.95 GB: `--workers 3` leaves enough for each" in str(refused.value)
    check_memory(large, 8 * 10**9 // 3, 3)  # what was advised is accepted
    with pytest.raises(UsageError, match="profile whose workers have more memory"):
        check_memory(large, 10**9)
    with pytest.raises(UsageError, match="a machine with more memory"):
        check_memory(large, 10**9, 1)
    check_memory(Prediction(), 1)
