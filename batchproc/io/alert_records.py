"""What one record of an alert packet says, of ZTF or of Rubin: who it is, what was measured, and its stamp.

Both have a science, a template and a difference cutout. The difference of a stamp is science − template: a source that
has become fainter is negative in it. ZTF cuts that of such a source from template − science, which is undone here.

=============  ==========================================  =======================================================
what           ZTF (schema 3 and 4)                        Rubin (``lsst.v7_0`` and later)
=============  ==========================================  =======================================================
alert          ``candid``                                  ``diaSourceId``
object         ``objectId``                                ``diaSource.diaObjectId``, or else ``ssObjectId``
measurements   ``candidate``                               ``diaSource``
own score      ``candidate.drb``                           ``diaSource.reliability``
cutout         record with gzipped FITS, 63 × 63           FITS of several HDUs (image, variance, PSF), 30 × 30 or as
                                                           large as the source
cut off        at the bottom and right                     all around: the source is at the WCS's reference pixel
unit           counts of the image                         nJy
=============  ==========================================  =======================================================
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from batchproc.learning.inputs import overlap

__all__ = ["CUTOUTS", "RUBIN", "STAMP_SIZE", "ZTF", "Record", "read_record"]

ZTF, RUBIN = "ZTF", "LSST"
#: Side of the stamps: that of ZTF's cutouts, unless the edge of an image truncates them.
STAMP_SIZE = 63
#: Fields with the cutouts, in the order of the pipeline: new, ref, difference.
CUTOUTS = ("cutoutScience", "cutoutTemplate", "cutoutDifference")
#: What ZTF's ``isdiffpos`` says of a source that has become fainter.
_FAINTER = ("f", "0", False)
#: A whole cutout has some 20 kB unpacked, Rubin's largest some 1 MB: what is much larger is not unpacked.
_MOST_CUTOUT = {ZTF: 1 << 20, RUBIN: 1 << 23}

Stamp = NDArray[np.float32]


@dataclass(frozen=True)
class Record:
    """One alert; of one that cannot be read, only what is wrong with it."""

    problems: tuple[str, ...]
    survey: str = ""
    candid: int = -1
    object_id: str = ""
    candidate: Mapping[str, Any] | None = None
    stamp: Stamp | None = None


def read_record(record: Any) -> Record:
    """An alert of a record as fastavro gives it; what is wrong with it is in its problems."""
    if isinstance(record, dict):
        if isinstance(record.get("candid"), int) and isinstance(record.get("candidate"), dict):
            about = record["candidate"]
            return _record(record, ZTF, record["candid"], str(record.get("objectId") or ""), about)
        about = record.get("diaSource")
        if isinstance(about, dict) and isinstance(about.get("diaSourceId"), int):
            obj = about.get("diaObjectId") or about.get("ssObjectId") or ""
            return _record(record, RUBIN, about["diaSourceId"], str(obj), about)
    fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    return Record((f"not a ZTF alert: it needs candid and candidate; nor one of Rubin: diaSource; found {fields}",))


def _record(
    record: Mapping[str, Any], survey: str, candid: int, object_id: str, candidate: Mapping[str, Any]
) -> Record:
    stamp = np.full((len(CUTOUTS), STAMP_SIZE, STAMP_SIZE), np.nan, np.float32)
    problems = []
    for out, name in zip(stamp, CUTOUTS, strict=True):
        problem = _put(record.get(name), out, survey)
        if problem:
            problems.append(f"{name}: {problem}")
    if survey == ZTF and candidate.get("isdiffpos") in _FAINTER:
        np.negative(stamp[-1], out=stamp[-1])
    return Record(tuple(problems), survey, candid, object_id, candidate, stamp)


def _put(field: Any, out: Stamp, survey: str) -> str:
    """Write a cutout's pixels to its plane of a stamp, as far as they can be had; returns what is wrong with them."""
    packed = field.get("stampData") if isinstance(field, dict) else field
    if not packed or not isinstance(packed, bytes):
        return "none in the packet"
    try:
        content = _unpacked(packed, survey)
        pixels, centre = _plain_pixels(content) or _pixels(content)
    except Exception as error:  # torn FITS raise nearly anything
        return f"not a {'gzipped ' if survey == ZTF else ''}FITS image ({error})"
    if survey == ZTF:
        return _put_in_the_corner(pixels, out)
    _put_in_the_middle(pixels, centre, out)
    return "" if np.isfinite(pixels).any() else "no pixel holds data"


def _put_in_the_corner(pixels: Stamp, out: Stamp) -> str:
    h, w = pixels.shape
    if max(h, w) > STAMP_SIZE:
        return f"{h} × {w} pixels; expected {STAMP_SIZE} × {STAMP_SIZE}"
    out[:h, :w] = pixels
    if not np.isfinite(pixels).any():
        return "no pixel holds data"
    truncated = (h, w) != (STAMP_SIZE, STAMP_SIZE)
    return f"truncated to {h} × {w} pixels, blank at the bottom and right" if truncated else ""


def _put_in_the_middle(pixels: Stamp, centre: tuple[float, float] | None, out: Stamp) -> None:
    """With the source's pixel on the middle one; what is left over is cut off, what is lacking stays blank."""
    h, w = pixels.shape
    middle = [h // 2, w // 2]
    for axis, (place, length) in enumerate(zip(centre or (np.nan, np.nan), (h, w), strict=True)):
        if -0.5 <= place <= length - 0.5:  # False for NaN
            middle[axis] = min(max(round(place), 0), length - 1)
    half = STAMP_SIZE // 2
    rows, columns = (overlap(m - half, length, STAMP_SIZE) for m, length in zip(middle, (h, w), strict=True))
    out[rows[0], columns[0]] = pixels[rows[1], columns[1]]


def _unpacked(packed: bytes, survey: str) -> bytes:
    """What was gzipped, or was not, unless it is much more than a cutout is."""
    most = _MOST_CUTOUT[survey]
    if survey == RUBIN and packed[:2] != b"\x1f\x8b":
        if len(packed) > most:
            raise ValueError(f"more than {most / 1e6:.0f} MB")
        return packed
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    content = unpacker.decompress(packed, most)
    if not unpacker.eof:
        raise ValueError(f"torn, or more than {most / 1e6:.0f} MB")
    return content


#: Cards of nearly every cutout; none but these says what the bytes behind the header mean.
_PLAIN_CARDS = {b"SIMPLE", b"BITPIX", b"NAXIS", b"NAXIS1", b"NAXIS2", b"END", b""}
_PLAIN_CARDS |= {b"EXTEND", b"BUNIT", b"DSNRMS", b"SSNRMS", b"DSDIFF", b"CUTMINX", b"CUTMINY"}
_PLAIN_CARDS |= {b"WCSAXES", b"LONPOLE", b"LATPOLE", b"RADESYS", b"EQUINOX", b"MJDREF", b"MJDREFI", b"MJDREFF"}
_PLAIN_CARDS |= {f"{name}{axis}".encode() for name in ("CRPIX", "CRVAL", "CTYPE", "CUNIT", "CDELT") for axis in (1, 2)}
_PLAIN_CARDS |= {f"{name}{i}_{j}".encode() for name in ("CD", "PC") for i in (1, 2) for j in (1, 2)}
_CARD, _BLOCK, _MOST_BLOCKS = 80, 2880, 8

#: Pixels, and the row and column of the source where a WCS says it: counted from 0, at the pixels' centres.
Pixels = tuple[Stamp, tuple[float, float] | None]


def _plain_pixels(content: bytes) -> Pixels | None:
    """What `_pixels` gives, some ten times as fast, for FITS as plain as nearly all cutouts; None for others."""
    cards: dict[bytes, bytes] = {}
    n_blocks = 0
    while b"END" not in cards:
        start = n_blocks * _BLOCK
        if n_blocks == _MOST_BLOCKS or len(content) < start + _BLOCK:
            return None
        block = range(start, start + _BLOCK, _CARD)
        cards |= {content[k : k + 8].rstrip(): content[k + 10 : k + 30] for k in block}
        n_blocks += 1
    if not set(cards) <= _PLAIN_CARDS:
        return None
    try:
        kind, axes, w, h = (int(cards[key]) for key in (b"BITPIX", b"NAXIS", b"NAXIS1", b"NAXIS2"))
        places = [float(cards[key]) - 1 for key in (b"CRPIX2", b"CRPIX1") if key in cards]
    except (KeyError, ValueError):
        return None
    if (kind, axes) != (-32, 2) or min(h, w) < 1 or len(content) < n_blocks * _BLOCK + 4 * h * w:
        return None
    pixels = np.frombuffer(content, ">f4", h * w, n_blocks * _BLOCK).reshape(h, w).astype(np.float32)
    return pixels, ((places[0], places[1]) if len(places) == 2 else None)


def _pixels(content: bytes) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what astropy repairs by itself
        # ZTF's cutouts begin with a blank card in place of SIMPLE.
        with fits.open(io.BytesIO(content), memmap=False, ignore_missing_simple=True) as hdus:
            data, header = hdus[0].data, hdus[0].header
            if data is None or data.ndim != 2 or data.dtype.kind not in "fiu":
                raise ValueError("its first HDU has no image of two axes")
            places = [header.get(key) for key in ("CRPIX2", "CRPIX1")]
            known = all(isinstance(place, int | float) for place in places)
            return np.array(data, np.float32), ((places[0] - 1, places[1] - 1) if known else None)
