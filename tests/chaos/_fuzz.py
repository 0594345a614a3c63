"""Broken FITS files by the hundred, the same ones for the same seed.

Each case is a small valid image (plain, gzipped, tile-compressed, multi-extension, with masks and variances, with TAN,
SIP or TPV) to which one bad thing has happened: a card that cannot be, bytes that are not as they were, or a file that
was never an image. Every card of `CARDS` and every file of `ODD` occurs once; the rest of the cases are bytes.
"""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from batchproc.imaging.simulate import Scene, simulate_pair
from batchproc.records import ManifestEntry

__all__ = ["N_CASES", "Case", "good_pair", "write_cases"]

N_CASES = 400
SEED = 20260
SHAPE = (224, 224)
SKY = 400.0

CARDS_OF_A_GOOD_IMAGE = {
    "BUNIT": "adu",
    "GAIN": 1.0,
    "RDNOISE": 5.0,
    "SATURATE": 60000.0,
    "MAGZERO": 27.0,
    "EXPTIME": 60.0,
    "MJD-OBS": 60000.0,
    "FILTER": "r",
}
TAN = {
    "CTYPE1": "RA---TAN",
    "CTYPE2": "DEC--TAN",
    "CRVAL1": 150.0,
    "CRVAL2": 2.0,
    "CRPIX1": 112.5,
    "CRPIX2": 112.5,
    "CD1_1": -1e-4,
    "CD1_2": 0.0,
    "CD2_1": 0.0,
    "CD2_2": 1e-4,
}
SIP = TAN | {
    "CTYPE1": "RA---TAN-SIP",
    "CTYPE2": "DEC--TAN-SIP",
    "A_ORDER": 2,
    "B_ORDER": 2,
    "A_2_0": 1e-6,
    "B_0_2": -1e-6,
}
TPV = TAN | {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", "PV1_1": 1.0, "PV2_1": 1.0, "PV1_4": 1e-5}


@dataclass(frozen=True)
class Case:
    """One broken image in its row of a manifest: as new, or as the reference of a good one.

    Attributes
    ----------
    entry : ManifestEntry
    path : str
        The broken file.
    what : str
        What was done to it.
    """

    entry: ManifestEntry
    path: str
    what: str


def write_cases(folder: Path, numbers: Iterable[int] = range(N_CASES)) -> list[Case]:
    """Write the cases of these numbers (0 to `N_CASES` − 1), each as new and as reference, beside a valid pair.

    The same number is the same bytes.
    """
    new, ref = good_pair(folder)
    cases = []
    for number in numbers:
        for side in ("new", "ref"):
            path, what = _write_case(folder / f"{number:03d}_{side}", side, number)
            paths = (path, (ref,)) if side == "new" else (new, (path,))
            cases.append(Case(ManifestEntry(f"{number:03d}_{side}", *paths), path, what))
    return cases


def good_pair(folder: Path) -> tuple[str, str]:
    """A valid new and its reference."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "good_new.fits", folder / "good_ref.fits"
    for path, side in zip(paths, ("new", "ref"), strict=True):
        path.write_bytes(_base("float32", side).content)
    return str(paths[0]), str(paths[1])


def _write_case(stem: Path, side: str, number: int) -> tuple[str, str]:
    """One file (its path as in a manifest, and what is wrong with it)."""
    rng = np.random.default_rng([SEED, number])
    place = int(
        np.random.default_rng(SEED).permutation(N_CASES)[number]
    )  # any part of the numbers has some of each kind
    if place < len(ODD):
        what, write = ODD[place]
        path = stem.with_suffix(".fits")
        return str(write(path, rng, side) or path), what
    if place < len(ODD) + len(CARDS):
        kinds, key, value = CARDS[place - len(ODD)]
        base = _base(kinds[number % len(kinds)], side)
        content, what = base.with_card(key, value), f"{key} = {value}"
    else:
        base = _base(list(BASES)[number % len(BASES)], side)
        damage = DAMAGES[place % len(DAMAGES)]
        content, what = damage(base, rng), damage.__doc__
    path = stem.with_suffix(base.suffix)
    path.write_bytes(gzip.compress(content, 1, mtime=0) if base.suffix.endswith(".gz") else content)
    return f"{path}{base.hdu}", f"{base.kind}: {what}"


# ---- valid files


@dataclass(frozen=True)
class Base:
    """A valid file: its bytes (before any gzip), and where its image's header and pixels begin."""

    kind: str
    content: bytes
    suffix: str
    hdu: str
    header: int
    data: int
    end: int

    def with_card(self, key: str, value: str) -> bytes:
        """The file with one card of the image's header replaced, or put before its END; nothing is checked."""
        cards = [self.content[at : at + 80] for at in range(self.header, self.data, 80)]
        end = next(n for n, card in enumerate(cards) if card.rstrip() == b"END")
        card = (f"HIERARCH {key} = {value}" if len(key) > 8 else f"{key:8s}= {value:>20s}").encode("latin-1")
        card = card[:80].ljust(80)
        where = next((n for n in range(end) if cards[n].startswith(f"{key:8s}=".encode())), end)
        cards[where : where + (where < end)] = [card]
        block = b"".join(cards[: end + 1 + (where == end)])
        return self.content[: self.header] + block.ljust(-(-len(block) // 2880) * 2880) + self.content[self.data :]


@lru_cache(maxsize=1)
def _pixels() -> dict[str, NDArray[np.float32]]:
    scene = Scene(n_stars=2000, n_galaxies=100, n_transients=5, cosmic_rays=2)
    pair = simulate_pair(SHAPE, 5, scene=scene)
    return {"new": pair.new + pair.sky_new, "ref": pair.ref + pair.sky_ref}


def _header(wcs: dict[str, Any]) -> fits.Header:
    return fits.Header(list((CARDS_OF_A_GOOD_IMAGE | wcs).items()))


def _plain(dtype: Any, wcs: dict[str, Any]) -> Callable[[NDArray], list]:
    return lambda data: [fits.PrimaryHDU(_as(data, dtype), _header(wcs))]


def _as(data: NDArray, dtype: Any) -> NDArray:
    whole = np.issubdtype(dtype, np.integer)
    return (np.clip(np.rint(data), 0, np.iinfo(dtype).max) if whole else data).astype(dtype)


def _compressed(dtype: Any, kind: str, wcs: dict[str, Any], **options: Any) -> Callable[[NDArray], list]:
    return lambda data: [
        fits.PrimaryHDU(),
        fits.CompImageHDU(_as(data, dtype), _header(wcs), compression_type=kind, **options),
    ]


def _extensions(data: NDArray) -> list:
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, 50] = 1
    return [
        fits.PrimaryHDU(header=_header({})),
        fits.ImageHDU(data, fits.Header(list(TAN.items())), name="SCI"),
        fits.ImageHDU(mask, name="MASK"),
        fits.ImageHDU(np.maximum(data, 1) + 25, name="VARIANCE"),
    ]


def _ccds(data: NDArray) -> list:
    images = [fits.ImageHDU(data, fits.Header(list(TAN.items())), name=f"CCD{n}") for n in (1, 2)]
    return [fits.PrimaryHDU(header=_header({})), *images]


#: Kind → its HDUs from pixels, suffix, HDU named in the manifest, number of the HDU that bad things happen to.
BASES: dict[str, tuple[Callable[[NDArray], list], str, str, int]] = {
    "uint16": (_plain(np.uint16, TAN), ".fits", "", 0),
    "float32": (_plain(np.float32, TAN), ".fits", "", 0),
    "sip": (_plain(np.float32, SIP), ".fits", "", 0),
    "tpv": (_plain(np.float32, TPV), ".fits", "", 0),
    "float64": (_plain(np.float64, {}), ".fits", "", 0),
    "gz": (_plain(np.int32, TAN), ".fits.gz", "", 0),
    "rice": (_compressed(np.int32, "RICE_1", SIP), ".fits.fz", "", 1),
    "rice of floats": (_compressed(np.float32, "RICE_1", TPV, quantize_level=16), ".fits.fz", "[1]", 1),
    "gzip tiles": (_compressed(np.float32, "GZIP_2", TAN, quantize_level=0), ".fits.fz", "", 1),
    "extensions": (_extensions, ".fits", "", 1),
    "mask": (_extensions, ".fits", "[SCI]", 2),
    "variance": (_extensions, ".fits", "[SCI]", 3),
    "ccds": (_ccds, ".fits", "[CCD2]", 2),
}
PLAIN = ("uint16", "float32", "sip", "gz", "extensions")
PACKED = ("rice", "rice of floats", "gzip tiles")
ANY = (*PLAIN, *PACKED, "tpv", "ccds")


@cache
def _base(kind: str, side: str) -> Base:
    make, suffix, hdu, target = BASES[kind]
    stream = io.BytesIO()
    hdus = fits.HDUList(make(_pixels()[side]))
    hdus.writeto(stream)
    content = stream.getvalue()
    with fits.open(io.BytesIO(content), disable_image_compression=True) as written:
        info = written[target].fileinfo()
    return Base(kind, content, suffix, hdu, info["hdrLoc"], info["datLoc"], info["datLoc"] + info["datSpan"])


# ---- bytes that are not as they were


def _cut(base: Base, rng: np.random.Generator) -> bytes:
    """cut anywhere"""
    return base.content[: rng.integers(1, len(base.content))]


def _cut_in_header(base: Base, rng: np.random.Generator) -> bytes:
    """cut in the header"""
    return base.content[: rng.integers(base.header + 1, base.data)]


def _cut_in_data(base: Base, rng: np.random.Generator) -> bytes:
    """cut in the pixels"""
    return base.content[: rng.integers(base.data, base.end)]


def _flip(base: Base, rng: np.random.Generator, low: int, high: int, n: int) -> bytes:
    content = bytearray(base.content)
    for at in rng.integers(low, high, n):
        content[at] ^= 1 << rng.integers(8)
    return bytes(content)


def _flip_in_header(base: Base, rng: np.random.Generator) -> bytes:
    """bits flipped in the header"""
    return _flip(base, rng, base.header, base.data, int(rng.integers(1, 12)))


def _flip_in_data(base: Base, rng: np.random.Generator) -> bytes:
    """bits flipped in the pixels"""
    return _flip(base, rng, base.data, base.end, int(rng.integers(1, 200)))


def _random_in_header(base: Base, rng: np.random.Generator) -> bytes:
    """bytes of the header replaced by any"""
    content = bytearray(base.content)
    for at in rng.integers(base.header, base.data, int(rng.integers(1, 6))):
        content[at] = rng.integers(256)
    return bytes(content)


def _random_cards(base: Base, rng: np.random.Generator) -> bytes:
    """whole cards of the header shuffled"""
    cards = [base.content[at : at + 80] for at in range(base.header, base.data, 80)]
    first, second = rng.integers(0, len(cards), 2)
    cards[first], cards[second] = cards[second], cards[first]
    return base.content[: base.header] + b"".join(cards) + base.content[base.data :]


def _digits(base: Base, rng: np.random.Generator) -> bytes:
    """a digit of the header replaced by another"""
    content = bytearray(base.content)
    digits = [at for at in range(base.header, base.data) if chr(content[at]).isdigit() and at % 80 > 9]
    for at in rng.choice(digits, 3):
        content[at] = ord("0") + rng.integers(10)
    return bytes(content)


def _blank(base: Base, rng: np.random.Generator) -> bytes:
    """a run of bytes zeroed, as a lost block of a disk"""
    at, length = rng.integers(base.header, base.end), rng.integers(1, 20_000)
    zeros = bytes(min(int(length), len(base.content) - int(at)))
    return base.content[:at] + zeros + base.content[at + len(zeros) :]


def _shift(base: Base, rng: np.random.Generator) -> bytes:
    """bytes lost in the middle"""
    at = int(rng.integers(base.header, base.end))
    return base.content[:at] + base.content[at + int(rng.integers(1, 3000)) :]


def _insert(base: Base, rng: np.random.Generator) -> bytes:
    """bytes put in, in the middle"""
    at = int(rng.integers(base.header, base.end))
    return base.content[:at] + rng.bytes(int(rng.integers(1, 3000))) + base.content[at:]


def _append(base: Base, rng: np.random.Generator) -> bytes:
    """rubble behind the end"""
    return base.content + rng.bytes(int(rng.integers(1, 9000)))


DAMAGES = (
    _cut,
    _cut_in_header,
    _cut_in_data,
    _flip_in_header,
    _flip_in_data,
    _random_in_header,
    _random_cards,
    _digits,
    _blank,
    _shift,
    _insert,
    _append,
)


# ---- cards that cannot be


def _cards(kinds: tuple[str, ...], key: str, *values: str) -> Iterator[tuple[tuple[str, ...], str, str]]:
    for value in values:
        yield kinds, key, value


HUGE = "1000000000000"
CARDS: list[tuple[tuple[str, ...], str, str]] = [
    *_cards(ANY, "NAXIS", "0", "1", "3", "999", "-2", "'two'"),
    *_cards(ANY, "NAXIS1", "100000", HUGE, "-224", "0", "22.5", "'wide'"),
    *_cards(PLAIN, "NAXIS2", "30000", HUGE, "-1", "0", "223"),
    *_cards(ANY, "BITPIX", "0", "7", "-8", "64", "'16'"),
    *_cards(ANY, "PCOUNT", HUGE, "-1000", "1"),
    *_cards(ANY, "GCOUNT", "0", "1000000"),
    *_cards(PLAIN, "BSCALE", "NaN", "'NaN'", "0.0", "1E300", "-1.0"),
    *_cards(PLAIN, "BZERO", "1E300", "'far'", "Infinity"),
    *_cards(PLAIN, "BLANK", "1.5", "'none'", "400"),
    *_cards(("extensions", "ccds", *PACKED), "XTENSION", "'BOGUS   '", "'TABLE   '", "5"),
    *_cards(("uint16", "gz"), "SIMPLE", "F", "5"),
    *_cards(PACKED, "ZCMPTYPE", "'NONSENSE'", "'PLIO_1'", "'HCOMPRESS_1'", "5"),
    *_cards(PACKED, "ZTILE1", "0", "-7", "100", HUGE, "'x'"),
    *_cards(PACKED, "ZTILE2", "30000", "0"),
    *_cards(PACKED, "ZBITPIX", "8", "7", "64", "-64"),
    *_cards(PACKED, "ZNAXIS", "0", "3", "1000000"),
    *_cards(PACKED, "ZNAXIS1", "100000", "-1", HUGE, "223"),
    *_cards(PACKED, "ZNAXIS2", "30000", "1000000000", "100", "0"),
    *_cards(PACKED, "ZVAL1", "0", "1000000000", "-1"),
    *_cards(("rice of floats",), "ZQUANTIZ", "'SOMEHOW'", "'NO_DITHER'"),
    *_cards(("rice of floats",), "ZDITHER0", "-5", "1000000000"),
    *_cards(PACKED, "TFIELDS", "0", "100000", "-1"),
    *_cards(PACKED, "TFORM1", "'1PB(-1)'", "'1QE(9)'", "'99999999999PB'", "'Z'"),
    *_cards(PACKED, "THEAP", "0", "-80", HUGE),
    *_cards(ANY, "CRPIX1", "1E300", "NaN", "'middle'"),
    *_cards(ANY, "CRVAL2", "1E300", "91.0"),
    *_cards(ANY, "CD1_1", "0.0", "1E300", "NaN", "'x'"),
    *_cards(("sip", "rice"), "A_ORDER", "99", "-1", "1000000000", "'x'", "2.5"),
    *_cards(("sip", "rice"), "A_2_0", "1E300", "NaN", "1.0"),
    *_cards(("tpv", "rice of floats"), "PV1_1", "1E300", "0.0", "'x'"),
    *_cards(("tpv", "rice of floats"), "PV1_99", "1.0"),
    *_cards(ANY, "CTYPE1", "'DEC--TAN'", "'RA---SIN'", "'RA---XXX'", "5"),
    *_cards(ANY, "WCSAXES", "9", "-1", "1000000000"),
    *_cards(ANY, "LONPOLE", "1E300", "NaN"),
    *_cards(ANY, "EQUINOX", "'J2000'", "1E300"),
    *_cards(ANY, "RADESYS", "'NOWHERE'", "5"),
    *_cards(ANY, "CUNIT1", "'parsec'", "'arcsec'"),
    *_cards(ANY, "GAIN", "0.0", "-1.0", "NaN", "'two'", "1E300", "1E-300", "T"),
    *_cards(ANY, "SATURATE", "0.0", "-1.0", "1E-30", "NaN", "100.0"),
    *_cards(ANY, "RDNOISE", "-1.0", "1E300"),
    *_cards(ANY, "BUNIT", "'furlong'", "'electron/s'", "5"),
    *_cards(ANY, "EXPTIME", "0.0", "-60.0", "1E300", "'long'"),
    *_cards(ANY, "MJD-OBS", "1E300", "'yesterday'"),
    *_cards(ANY, "DATE-OBS", "'9999-99-99T99:99:99'", "'0000-00-00'", "5"),
    *_cards(ANY, "MAGZERO", "1E300", "'x'"),
    *_cards(ANY, "FILTER", "1E300", "T", "'" + "r" * 60 + "'"),
    *_cards(ANY, "DATASEC", "'[99999999999999999999:1,1:2]'", "'[a:b]'"),
    *_cards(("extensions", "ccds", *PACKED), "EXTNAME", "5", "'" + "N" * 60 + "'"),
    *_cards(("extensions", "ccds", *PACKED), "EXTVER", "1E300", "'x'"),
    *_cards(("mask",), "NAXIS1", "100", "100000"),
    *_cards(("mask",), "BITPIX", "-32", "16"),
    *_cards(("variance",), "BZERO", "-1E9", "NaN"),
]  # fmt: skip


# ---- files that were never such an image

Write = Callable[[Path, np.random.Generator, str], "str | Path | None"]
ODD: list[tuple[str, Write]] = []


def _odd(what: str) -> Callable[[Write], Write]:
    def put(write: Write) -> Write:
        ODD.append((what, write))
        return write

    return put


def _image(path: Path, data: NDArray, **cards: Any) -> None:
    header = _header(TAN)
    header.update(cards)
    fits.PrimaryHDU(data, header).writeto(path)


def _put(what: str, change: Callable[[NDArray], NDArray]) -> None:
    """An odd file whose pixels are made of a good image's."""

    @_odd(what)
    def write(path: Path, rng: np.random.Generator, side: str) -> None:
        _image(path, change(_pixels()[side].copy()))


def _set(data: NDArray, where: Any, value: float) -> NDArray:
    data[where] = value
    return data


_put("64-bit integers", lambda d: np.rint(d).astype(np.int64))
_put("unsigned 32-bit", lambda d: _as(d, np.uint32))
_put("bytes", lambda d: _as(d, np.uint8))
_put("signed bytes", lambda d: np.clip(d, -128, 127).astype(np.int8))
_put("unsigned 64-bit near the top", lambda d: np.full(d.shape, 2**64 - 2, np.uint64))
_put("doubles beyond single precision", lambda d: d.astype(np.float64) * 1e300)
_put("all NaN", lambda d: np.full_like(d, np.nan))
_put("all infinite", lambda d: np.full_like(d, np.inf))
_put("all zero", lambda d: np.zeros_like(d))
_put("one value", lambda d: np.full_like(d, 7))
_put("one good pixel", lambda d: _set(np.full_like(d, np.nan), (100, 100), 1.0))
_put("NaN as a chessboard", lambda d: _set(d, np.indices(d.shape).sum(0) % 2 == 0, np.nan))
_put("NaN in all but a corner", lambda d: _set(d, np.s_[40:, :], np.nan))
_put("values of 1e29", lambda d: d * np.float32(1e27))
_put("values of 1e-35", lambda d: d * np.float32(1e-37))
_put("negative", lambda d: -d)
_put("noise without a star", lambda d: np.random.default_rng(0).normal(400, 20, d.shape).astype(np.float32))
_put("two values", lambda d: (np.indices(d.shape).sum(0) % 2).astype(np.float32))
_put("a ramp without noise", lambda d: np.indices(d.shape).sum(0).astype(np.float32))
_put("saturated all over", lambda d: d + 70000)
_put("one hot pixel of 1e20", lambda d: _set(d, (100, 100), 1e20))
_put("1 x 1 pixel", lambda d: d[:1, :1])
_put("one row", lambda d: d[:1])
_put("one column", lambda d: d[:, :1])
_put("3 x 3 pixels", lambda d: d[:3, :3])
_put("9 rows", lambda d: d[:9])
_put("40 x 224 pixels", lambda d: d[:, :40])
_put("a cube", lambda d: np.stack([d, d, d]))
_put("four axes", lambda d: np.stack([d, d])[None])
_put("one axis", lambda d: d[0])
_put("a million pixels in a row", lambda d: np.tile(d.ravel(), 20)[None, :1_000_000])
_put("mirrored", lambda d: d[:, ::-1].copy())
_put("another field", lambda d: np.roll(d[::-1], 77, axis=1).copy())


@_odd("a table instead of an image")
def _table(path: Path, rng: np.random.Generator, side: str) -> None:
    fits.BinTableHDU.from_columns([fits.Column("a", "E", array=np.arange(9.0))]).writeto(path)


@_odd("the named HDU is a table")
def _named_table(path: Path, rng: np.random.Generator, side: str) -> str:
    table = fits.BinTableHDU.from_columns([fits.Column("a", "E", array=np.arange(9.0))], name="CAT")
    fits.HDUList([fits.PrimaryHDU(_pixels()[side]), table]).writeto(path)
    return f"{path}[CAT]"


@_odd("an HDU that is not there")
def _absent_hdu(path: Path, rng: np.random.Generator, side: str) -> str:
    _image(path, _pixels()[side])
    return f"{path}[7]"


@_odd("an HDU whose number is no number")
def _huge_hdu(path: Path, rng: np.random.Generator, side: str) -> str:
    _image(path, _pixels()[side])
    return f"{path}[99999999999999999999]"


@_odd("empty HDUs only")
def _empty_hdus(path: Path, rng: np.random.Generator, side: str) -> None:
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(), fits.ImageHDU(name="SCI")]).writeto(path)


@_odd("300 HDUs of one name")
def _many_hdus(path: Path, rng: np.random.Generator, side: str) -> None:
    images = [fits.ImageHDU(np.ones((2, 2), np.int16), name="SCI") for _ in range(300)]
    fits.HDUList([fits.PrimaryHDU(), *images]).writeto(path)


@_odd("two HDUs of the name that is asked for")
def _twice(path: Path, rng: np.random.Generator, side: str) -> str:
    header = _header(TAN)
    images = [fits.ImageHDU(_pixels()[side], header, name="SCI") for _ in range(2)]
    fits.HDUList([fits.PrimaryHDU(), *images]).writeto(path)
    return f"{path}[SCI]"


@_odd("a mask that is a table")
def _mask_table(path: Path, rng: np.random.Generator, side: str) -> None:
    mask = fits.BinTableHDU.from_columns([fits.Column("a", "E", array=np.arange(9.0))], name="MASK")
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(_pixels()[side], _header(TAN), name="SCI"), mask]).writeto(path)


def _planes(path: Path, side: str, **planes: NDArray) -> None:
    image = fits.ImageHDU(_pixels()[side], _header(TAN), name="SCI")
    fits.HDUList([fits.PrimaryHDU(), image, *(fits.ImageHDU(v, name=k) for k, v in planes.items())]).writeto(path)


def _put_plane(what: str, name: str, make: Callable[[NDArray], NDArray]) -> None:
    """An odd file whose image is good, with such a plane beside it."""

    @_odd(what)
    def write(path: Path, rng: np.random.Generator, side: str) -> None:
        _planes(path, side, **{name: make(_pixels()[side])})


_put_plane("a mask of another shape", "MASK", lambda d: np.zeros((9, 9), np.uint8))
_put_plane("a mask of NaN", "MASK", lambda d: np.full_like(d, np.nan))
_put_plane("a mask of everything", "MASK", lambda d: np.ones(d.shape, np.int16))
_put_plane("a mask of 1e30", "DQ", lambda d: np.full(d.shape, 1e30))
_put_plane("a mask that is a cube", "MASK", lambda d: np.zeros((2, *d.shape), np.uint8))
_put_plane("a variance of zero", "VARIANCE", lambda d: np.zeros_like(d))
_put_plane("a variance below zero", "VARIANCE", lambda d: -np.abs(d))
_put_plane("a variance of NaN", "VARIANCE", lambda d: np.full_like(d, np.nan))
_put_plane("a variance of 1e29", "VARIANCE", lambda d: np.full_like(d, 1e29))
_put_plane("a weight of infinity", "WEIGHT", lambda d: np.full_like(d, np.inf))


def _put_cards(what: str, **cards: Any) -> None:
    """An odd file with a good image whose header has these cards too."""

    @_odd(what)
    def write(path: Path, rng: np.random.Generator, side: str) -> None:
        _image(path, _pixels()[side], **cards)


_put_cards("amplifiers that are shifted by infinity", DATASECA="[1:112,1:224]", DATASECB="[113:224,1:224]",
           LTV1="Infinity", SATURATA=5e4, SATURATB=6e4, GAINA=1.0, GAINB=-1.0)  # fmt: skip
_put_cards("amplifiers of all the sky", DATASECA="[1:99999999999,1:99999999999]", DATASECB="[0:0,0:0]")
_put_cards("a pixel scale of nothing", CD1_1=1e-30, CD2_2=1e-30)
_put_cards("axes of the sky that are one axis", CD1_1=1e-4, CD1_2=1e-4, CD2_1=1e-4, CD2_2=1e-4)


@_odd("a mask whose header names its bits wrongly")
def _mask_bits(path: Path, rng: np.random.Generator, side: str) -> None:
    mask = fits.ImageHDU(np.zeros(SHAPE, np.int32), name="MASK")
    mask.header["MP_SAT"], mask.header["MP_BAD"], mask.header["HIERARCH MP_NO_DATA"] = "x", -3, 1e300
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(_pixels()[side], _header(TAN), name="IMAGE"), mask]).writeto(path)


@_odd("a handful of tiles that claim to be 30000 x 30000 pixels")
def _few_tiles(path: Path, rng: np.random.Generator, side: str) -> None:
    base = _base("rice", side)
    wide = replace(base, content=base.with_card("ZNAXIS1", "30000"))
    path.write_bytes(wide.with_card("ZNAXIS2", "30000"))


@_odd("no bytes")
def _no_bytes(path: Path, rng: np.random.Generator, side: str) -> None:
    path.touch()


@_odd("text")
def _text(path: Path, rng: np.random.Generator, side: str) -> None:
    path.write_text("<html><body>404 Not Found</body></html>\n" * 99)


@_odd("random bytes")
def _random(path: Path, rng: np.random.Generator, side: str) -> None:
    path.write_bytes(rng.bytes(100_000))


@_odd("FITS in its first card only")
def _first_card(path: Path, rng: np.random.Generator, side: str) -> None:
    path.write_bytes(b"SIMPLE  =                    T".ljust(80) + rng.bytes(50_000))


@_odd("a header without end")
def _endless(path: Path, rng: np.random.Generator, side: str) -> None:
    path.write_bytes(b"SIMPLE  =                    T".ljust(80) + b"COMMENT on and on".ljust(80) * 30_000)


@_odd("twenty thousand cards")
def _many_cards(path: Path, rng: np.random.Generator, side: str) -> None:
    base = _base("float32", side)
    more = b"".join(f"K{n:07d}= {n:20d}".encode().ljust(80) for n in range(20_016))
    end = base.content.index(b"END".ljust(80), base.header)
    header = base.content[:end] + more + b"END".ljust(80)
    path.write_bytes(header.ljust(-(-len(header) // 2880) * 2880) + base.content[base.data :])


@_odd("a folder")
def _folder(path: Path, rng: np.random.Generator, side: str) -> None:
    path.mkdir()


@_odd("a pipe that nobody writes to")
def _pipe(path: Path, rng: np.random.Generator, side: str) -> None:
    os.mkfifo(path)


@_odd("a device without end")
def _device(path: Path, rng: np.random.Generator, side: str) -> None:
    path.symlink_to("/dev/zero")


@_odd("a link to itself")
def _loop(path: Path, rng: np.random.Generator, side: str) -> None:
    path.symlink_to(path)


@_odd("a link to nothing")
def _dangling(path: Path, rng: np.random.Generator, side: str) -> None:
    path.symlink_to(path.with_name("nothing"))


@_odd("a name too long for any disk")
def _long_name(path: Path, rng: np.random.Generator, side: str) -> str:
    return str(path.with_name("n" * 300 + ".fits"))


@_odd("a NUL in its name")
def _nul(path: Path, rng: np.random.Generator, side: str) -> str:
    return f"{path}\0.fits"


@_odd("a gzip of text")
def _gzip_text(path: Path, rng: np.random.Generator, side: str) -> None:
    path.write_bytes(gzip.compress(b"nothing of use\n" * 1000))


@_odd("a gzip in a gzip")
def _gzip_gzip(path: Path, rng: np.random.Generator, side: str) -> None:
    path.write_bytes(gzip.compress(gzip.compress(_base("float32", side).content)))


@_odd("a gzip that unpacks to gigabytes")
def _bomb(path: Path, rng: np.random.Generator, side: str) -> None:
    head = _base("gz", side).content
    zeros = gzip.compress(bytes(64 * 2**20), 9)
    path.write_bytes(gzip.compress(head, 9) + zeros * 64)  # members follow one another: 4 GiB in 4 MB


@_odd("a gzip with a wrong checksum")
def _gzip_checksum(path: Path, rng: np.random.Generator, side: str) -> None:
    content = bytearray(gzip.compress(_base("gz", side).content))
    content[-6] ^= 1
    path.write_bytes(content)


@_odd("a hole of 40 GB with a header that fits it")
def _hole(path: Path, rng: np.random.Generator, side: str) -> None:
    _image(path, np.zeros((1, 1), np.float32))
    base = path.read_bytes()
    header = base.replace(b"NAXIS1  =                    1", b"NAXIS1  =               100000")
    path.write_bytes(header.replace(b"NAXIS2  =                    1", b"NAXIS2  =               100000"))
    os.truncate(path, 2880 * 2 + 40_000_000_000)
