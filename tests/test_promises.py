"""The README's measured promises against their bounds; minutes: ``pytest -m slow -s tests/test_promises.py``."""

import pytest

from tests._real import images
from tests.benchmarks import promises

pytestmark = pytest.mark.slow


def show(numbers):
    for key, value in numbers.items():
        print(f"{key:42s} {value}")
    return numbers


def test_known_psf():
    """With PSF, noise and flux ratio known, the algebra meets theory over 50 Mpix."""
    numbers = show(promises.known_psf())
    assert numbers["Mpix"] >= 50
    assert numbers["S_corr width before renormalisation"] == pytest.approx(1, abs=0.01)
    assert numbers["S_corr width, largest departure"] < 0.02
    assert numbers["median flux / true"] == pytest.approx(1, abs=0.01)
    assert abs(numbers["mean offset x (px)"]) < 0.02
    assert abs(numbers["mean offset y (px)"]) < 0.02
    assert numbers["scatter / bound"] < 1.25
    assert numbers["completeness"] >= 0.99
    assert numbers["false per Mpix"] < 2 * numbers["false per Mpix, pure noise"]


def test_measured_psf():
    """With everything measured from the images, nearly the same."""
    numbers = show(promises.measured_psf())
    assert numbers["Mpix"] >= 50
    assert numbers["median flux / true"] == pytest.approx(1, abs=0.02)
    assert numbers["completeness"] >= 0.98
    assert numbers["false per Mpix"] <= 2


@pytest.mark.realdata
def test_goto_pair():
    """On the real GOTO pair: at least 58 of 60 found, little else, without masking more than 3 % of the image."""
    images()
    numbers = show(promises.goto())
    assert numbers["found"] >= 58
    assert numbers["masked %"] <= 3
    assert numbers["false, unexplained"] <= 30
