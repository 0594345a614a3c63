"""A teacher's answer is kept beside what the student sees of the same stamp; stamps are varied, not destroyed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchproc.io.cards import InputCard
from batchproc.learning.noise_log import sky_and_noise
from batchproc.training.taught import Taught, teach, variations

CARD = InputCard(size=15, normalisation="noise-log", scales=(1, 2))


@dataclass
class Teacher:
    """Answers how bright the middle of the difference is, and nothing to one stamp in seven."""

    seen: list = field(default_factory=list)

    def predict(self, stamps):
        self.seen.append(stamps)
        middle = np.abs(stamps[:, 2, 15, 15])
        score = (middle / (1 + middle)).astype(np.float32)
        score[::7] = np.nan
        return score


def stamps_of(n=40, seed=0, size=31):
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - size // 2
    star = np.exp(-(x**2 + y**2) / 4.0)
    stamps = random.normal(50.0, 3.0, (n, 3, size, size))
    stamps[:, 2] += random.uniform(0, 300, n)[:, None, None] * star
    return stamps.astype(np.float32)


def test_a_student_sees_what_the_teacher_was_asked_about():
    """Of each row: the tensor is that of the stamp that was scored; what has no score is left out."""
    teacher = Teacher()
    taught = teach(teacher, CARD, stamps_of(), np.full(40, 9.0), 300, seed=3)
    seen = np.concatenate(teacher.seen)
    tensor, judged = CARD.prepare(seen)
    expected = Teacher().predict(seen)
    kept = judged & np.isfinite(expected)
    assert 150 < kept.sum() < 300
    assert len(taught) == kept.sum()
    np.testing.assert_array_equal(taught.score, expected[kept])
    # A sky, which the teacher sees and the student does not, is gone with the normalisation.
    np.testing.assert_allclose(taught.tensor, tensor[kept], atol=0.02)


def test_the_teacher_sees_a_sky():
    """That of a reference as deep as this; its own rule for stamps without is for references noisier than any sky."""
    teacher = Teacher()
    teach(teacher, CARD, stamps_of(), np.full(40, 9.0), 200, seed=3)
    for stamp in np.concatenate(teacher.seen):
        sky, noise = sky_and_noise(stamp[1].ravel())
        assert sky > (5 * noise if noise < 10 else 50)


def test_the_same_seed_asks_the_same(tmp_path):
    """And what is stored is what was asked."""
    one, same, other = (teach(Teacher(), CARD, stamps_of(), np.full(40, 9.0), 80, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.tensor, same.tensor)
    assert one.tensor.shape != other.tensor.shape or (one.tensor != other.tensor).any()
    one.save(tmp_path / "taught.npz")
    np.testing.assert_array_equal(Taught.load(tmp_path / "taught.npz").tensor, one.tensor)
    np.testing.assert_array_equal(Taught.load(tmp_path / "taught.npz").score, one.score)


def test_what_is_significant_is_asked_about_more_often():
    """Three times as often as the noise, of which there is much more."""
    stamps = stamps_of()
    stamps[20:, 2] += 1e6 * np.eye(31, dtype=np.float32)  # to be told apart by
    teacher = Teacher()
    teach(teacher, CARD, stamps, np.where(np.arange(40) < 20, 4.0, -20.0), 4000, seed=0)
    seen = np.concatenate(teacher.seen)
    bright = (np.nanmax(np.abs(seen[:, 2]), axis=(1, 2)) > 1e4).mean()
    assert 0.65 < bright < 0.85


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_variations_are_stamps(seed):
    """As many, of the same shape, the middle with data; those that they are made of stay as they are."""
    random = np.random.default_rng(seed)
    stamps, others = (random.standard_normal((30, 3, 31, 31)).astype(np.float32) for _ in range(2))
    before = stamps.copy()
    made = np.stack(list(variations(stamps, others, random)))
    assert made.shape == stamps.shape
    assert made.dtype == np.float32
    assert np.isfinite(made[:, :, 13:18, 13:18]).all()
    np.testing.assert_array_equal(stamps, before)


def test_what_is_cut_off_is_a_corner_or_a_side():
    """In one of five; without data in all channels alike, and one rectangle from the edge, as an image's end is."""
    random = np.random.default_rng(0)
    stamps = random.standard_normal((400, 3, 31, 31)).astype(np.float32)
    made = np.stack(list(variations(stamps, stamps, random)))
    blank = np.isnan(made)
    assert 0.15 < blank.any(axis=(1, 2, 3)).mean() < 0.25
    for one in blank[blank.any(axis=(1, 2, 3))]:
        assert (one == one[0]).all()
        rows, columns = np.flatnonzero(one[0].any(axis=1)), np.flatnonzero(one[0].any(axis=0))
        assert one[0].sum() == len(rows) * len(columns)
        assert {rows[0], 30 - rows[-1], columns[0], 30 - columns[-1]} >= {0}
