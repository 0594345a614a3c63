"""What another network answers to stamps as they might be: for a student to learn what it cannot learn from truth.

A network that people have taught a survey's artefacts knows some that no simulation has. Asked about very many stamps,
varied far beyond what is likely, it gives away the function that it is, not only its answers to what simulations hold
(Beyer et al. 2022, arXiv:2106.05237). None of the survey's own images is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from batchproc.io.atomic import replacing
from batchproc.io.cards import InputCard
from batchproc.io.models import Model
from batchproc.learning.noise_log import sky_and_noise

__all__ = ["Taught", "teach", "variations"]

Stamps = NDArray[np.float32]

#: Sky of a coadd over its own noise: that of ZTF's references is 20 to 160.
_SKY_OF_REF = 60.0
#: Pixels of more noises than this are no more than bright.
_LIMIT = 1e5
_CHUNK = 1024


@dataclass(frozen=True)
class Taught:
    """Stamps as a student sees them, and what its teacher answered.

    Attributes
    ----------
    tensor : ndarray (n, c, size, size) float16
        As the student's card prepares them, channels first.
    score : ndarray (n,) float32
        The teacher's probability of being real.
    """

    tensor: NDArray[np.float16]
    score: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.score)

    def save(self, path: Path) -> None:
        """Write ``.npz``; `load` gives the same back."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, tensor=self.tensor, score=self.score)

    @classmethod
    def load(cls, path: Path) -> Taught:
        """Read what `save` wrote."""
        with np.load(path) as stored:
            return cls(stored["tensor"], stored["score"])


def teach(teacher: Model, card: InputCard, stamps: Stamps, scorr: NDArray[np.floating], n: int, *, seed: int) -> Taught:
    """Ask a network of one class about variations of stamps.

    Parameters
    ----------
    teacher : Model
    card : InputCard
        What the student wants to see.
    stamps : ndarray (m, 3, h, w)
        New, reference, difference, at least as large as the teacher's.
    scorr : ndarray (m,)
        Their significance: what is above 5 in either direction is asked about three times as often.
    n : int
        Variations; those that neither can judge are left out.
    seed : int
    """
    random, card = np.random.default_rng(seed), replace(card, layout="NCHW")
    often = np.where(np.abs(scorr) > 5.0, 1.0, 1 / 3)
    tensor = np.empty((n, card.depth, card.size, card.size), np.float16)
    score = np.empty(n, np.float32)
    filled = 0
    for start in range(0, n, _CHUNK):
        chosen = random.choice(len(stamps), (2, min(_CHUNK, n - start)), p=often / often.sum())
        varied = np.stack(list(variations(_in_noise(stamps[chosen[0]]), _in_noise(stamps[chosen[1]]), random)))
        answers = teacher.predict(_with_sky(varied))
        seen, judged = card.prepare(varied)
        judged &= np.isfinite(answers)
        more = slice(filled, filled + int(judged.sum()))
        tensor[more], score[more] = seen[judged], answers[judged]
        filled = more.stop
    return Taught(tensor[:filled], score[:filled])


def variations(stamps: Stamps, others: Stamps, random: np.random.Generator) -> Iterator[Stamps]:
    """Of each stamp in units of its noise, one that might be: turned, mixed with another, shallower, spoilt, cut off.

    Parameters
    ----------
    stamps, others : ndarray (n, 3, h, w)
        Without sky; new and reference in units of new's noise, the difference of its own.
    random : Generator
    """
    for stamp, other in zip(stamps, others, strict=True):
        varied = _mixed(_turned(stamp, random), _turned(other, random), random)
        if random.uniform() < 0.35:
            _make_shallower(varied, random)
        if random.uniform() < 0.1:
            varied[2] = np.roll(varied[2], random.integers(-2, 3, 2), (0, 1))
        if random.uniform() < 0.15:
            _spoil_the_middle(varied, random)
        if random.uniform() < 0.15:
            _smooth(varied, random)
        if random.uniform() < 0.2:
            _cut_off(varied, random)
        if random.uniform() < 0.15:
            noise = np.array([1.0, 0.05])[:, None, None] * random.standard_normal(varied[:2].shape)
            varied[:2] = varied[:2] * np.exp(random.uniform(-1.5, 1.5)) + noise
        varied[2] *= random.choice([-1, 1])
        yield varied


def _in_noise(stamps: Stamps) -> Stamps:
    """Without sky; new and reference in units of new's noise, the difference of its own."""
    out = np.empty_like(stamps)
    for stamp, made in zip(stamps, out, strict=True):
        sky, noise = np.transpose([sky_and_noise(channel.ravel()) for channel in stamp])
        made[:] = (stamp - sky[:, None, None]) / np.maximum(noise[[0, 0, 2]], 1e-30)[:, None, None]
    return np.clip(out, -_LIMIT, _LIMIT)


def _with_sky(stamps: Stamps) -> Stamps:
    """As much under new and reference as an exposure like this reference would have."""
    out = stamps.copy()
    for stamp in out:
        noise = sky_and_noise(stamp[1].ravel())[1]
        stamp[:2] += np.float32(np.clip(_SKY_OF_REF * noise, 0.2, 60.0))
    return out


def _turned(stamp: Stamps, random: np.random.Generator) -> Stamps:
    turned = np.rot90(stamp, int(random.integers(4)), (-2, -1))
    return np.array(turned[..., ::-1] if random.integers(2) else turned)


def _mixed(stamp: Stamps, other: Stamps, random: np.random.Generator) -> Stamps:
    """As it is, mostly; or with the difference of another; or both at once."""
    how = random.uniform()
    if how < 0.1:
        stamp[2] = other[2]
    elif how < 0.2:
        share = random.uniform(0.2, 0.8)
        stamp[:] = (share * stamp + (1 - share) * other) / np.hypot(share, 1 - share)
    return stamp


def _make_shallower(stamp: Stamps, random: np.random.Generator) -> None:
    """More noise in new, and half of the time in the difference."""
    more = np.exp(random.uniform(np.log(0.5), np.log(15)))
    stamp[0] += more * random.standard_normal(stamp[0].shape)
    stamp[:2] /= np.float32(np.hypot(1, more))
    if random.uniform() < 0.5:
        stamp[2] = random.uniform(0.3, 1) * stamp[2] + 0.6 * random.standard_normal(stamp[2].shape)


def _spoil_the_middle(stamp: Stamps, random: np.random.Generator) -> None:
    """Bright and dark pixels, pairs of them, and blots: what a star leaves that is not there twice alike."""
    middle = stamp.shape[1] // 2
    for _ in range(random.integers(1, 4)):
        row, column = middle + random.integers(-4, 5, 2)
        size = random.choice([-1, 1]) * np.exp(random.uniform(np.log(3), np.log(40)))
        light = np.zeros(stamp.shape[1:])
        light[row, column] = size
        if random.uniform() < 0.5:
            light[row + random.integers(-1, 2), column + random.integers(-1, 2)] = -size * random.uniform(0.3, 1)
        if random.uniform() < 0.5:
            light = gaussian_filter(light, random.uniform(0.4, 1.2)) * random.uniform(2, 6)
        stamp[2] += light
        if random.uniform() < 0.2:
            stamp[random.integers(2)] += light


def _smooth(stamp: Stamps, random: np.random.Generator) -> None:
    """One of the channels; of a difference the noise stays 1."""
    c = random.integers(3)
    stamp[c] = gaussian_filter(np.nan_to_num(stamp[c]), random.uniform(0.3, 1.0))
    if c == 2:
        stamp[2] /= max(sky_and_noise(stamp[2].ravel())[1], 1e-6)


def _cut_off(stamp: Stamps, random: np.random.Generator) -> None:
    """A corner or a side without data, at most to the two pixels around the middle one."""
    size = stamp.shape[1]
    height, width = random.integers(4, size // 2 - 1, 2)
    rows = slice(0, height) if random.integers(2) else slice(size - height, size)
    columns = slice(0, width) if random.integers(2) else slice(size - width, size)
    how = random.uniform()
    if how < 0.4:
        columns = slice(0, size)
    elif how < 0.7:
        rows = slice(0, size)
    stamp[:, rows, columns] = np.nan
