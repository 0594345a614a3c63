"""FITS files, opened with suspicion: what is in them, and one HDU's pixels as a native array.

Whatever is wrong with a file is a `ReadError` that names the file, the HDU, what was found, what was expected and what
to do. Sizes are checked against the header before anything is allocated. What the pixels *mean* (units, masks,
variance) is the business of `images` and its neighbours.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from numpy.typing import NDArray

from batchproc.errors import ReadError

__all__ = ["FitsFile", "Hdu", "Section", "first_line", "open_fits", "quiet", "split_hdu"]

#: One image is one task; 2^30 pixels (32768²) are 4 GiB in float32. More than this is a corrupt header or not a CCD.
MAX_PIXELS = 2**30

#: Rows and columns of an image, each with its beginning and end.
Section = tuple[slice, slice]

_BRACKET = re.compile(r"^(?P<path>.+)\[(?P<hdu>[^\[\]]*)\]$")


def split_hdu(spec: str | Path) -> tuple[Path, int | str | None]:
    """Take ``path[hdu]`` apart.

    Parameters
    ----------
    spec : str or Path
        ``image.fits``, ``image.fits[1]``, ``image.fits[SCI]`` or ``image.fits[SCI,2]`` (EXTNAME, EXTVER). A file that
        really has the brackets in its name is taken as it stands.

    Returns
    -------
    path : Path
    hdu : int, str or None
        HDU number, EXTNAME in upper case (with ``,EXTVER`` if given), or None where none is named.
    """
    text = os.path.expanduser(os.fspath(spec))
    match = _BRACKET.match(text)
    if match is None or os.path.exists(text):
        return Path(text), None
    hdu = match["hdu"].strip().upper().replace(" ", "")
    return Path(match["path"]), int(hdu) if hdu.isdigit() else (hdu or None)


@contextmanager
def quiet() -> Iterator[None]:
    """Astropy's remarks on non-standard headers are not repeated for every image of a survey."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)
        # NumPy: casts of NaN and of huge values, which become NO_DATA here.
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@dataclass(frozen=True)
class Hdu:
    """One header-data unit, its pixels not read.

    Attributes
    ----------
    index : int
    name : str
        EXTNAME in upper case; empty where there is none.
    version : int
        EXTVER.
    header : astropy.io.fits.Header
        Of the image itself, also where it is compressed.
    kind : {"image", "table", "other"}
    shape : tuple of int
        NumPy order, leading axes of length 1 taken off.
    """

    index: int
    name: str
    version: int
    header: Any
    kind: str
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        """How a person would ask for it: ``1 (SCI)``."""
        return f"{self.index} ({self.name})" if self.name else str(self.index)

    @property
    def is_image_2d(self) -> bool:
        """Whether it holds a two-dimensional image (degenerate axes do not count)."""
        return self.kind == "image" and len(self.shape) == 2

    @property
    def cards(self) -> dict[str, Any]:
        """Keywords and their values; comments, blanks, undefined values and unreadable cards are left out."""
        values: dict[str, Any] = {}
        for card in self.header.cards:
            with suppress(Exception):  # a card that astropy cannot parse is as good as absent
                key, value = card.keyword.upper(), card.value
                absent = value is None or isinstance(value, fits.card.Undefined)
                if not absent and key not in ("", "COMMENT", "HISTORY", "CONTINUE"):
                    values[key] = value.strip() if isinstance(value, str) else value
        return values


class FitsFile:
    """An open FITS file; see `open_fits`."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self.path = path
        self._size = size
        self._hdus: dict[int, Hdu] = {}
        try:
            with quiet():
                self._list = fits.open(stream, mode="readonly", memmap=False, lazy_load_hdus=True)
        except Exception as error:
            found = f"a first header that cannot be used ({first_line(error)}{_size_claimed(stream)})"
            raise self.error(found, "a complete FITS header with a size that fits the file") from error

    def error(self, found: str, expected: str, *, hdu: int | str | None = None, do: str = "") -> ReadError:
        """A `ReadError` on this file."""
        where = f"{self.path}" + ("" if hdu is None else f"[{hdu}]")
        do = do or "Fetch the file again, or take its row out of the manifest."
        return ReadError(
            f"{where}: {found}; expected {expected}. {do}", path=str(self.path), hdu=hdu, found=found, expected=expected
        )

    def __getitem__(self, index: int) -> Hdu:
        """HDU number `index`; raises IndexError past the end, `ReadError` where its header is broken."""
        if index not in self._hdus:
            self._hdus[index] = self._describe(index)
        return self._hdus[index]

    def __iter__(self) -> Iterator[Hdu]:
        index = 0
        while True:
            try:
                hdu = self[index]
            except IndexError:
                return
            yield hdu
            index += 1

    def find(self, hdu: int | str) -> Hdu:
        """HDU by number or by ``EXTNAME[,EXTVER]``; raises `ReadError` naming what there is."""
        if isinstance(hdu, int):
            try:
                return self[hdu]
            except IndexError:
                raise self.error(f"HDUs {self.contents()}", f"an HDU {hdu}", hdu=hdu, do="Name one of these.") from None
        name, _, version = hdu.partition(",")
        for candidate in self:
            if candidate.name == name and (not version or str(candidate.version) == version):
                return candidate
        raise self.error(f"HDUs {self.contents()}", f"one called {hdu}", hdu=hdu, do="Name one of these.")

    def contents(self) -> str:
        """The HDUs in words, and whether something unreadable follows them."""
        hdus = list(self)
        words = ", ".join(hdu.label for hdu in hdus)
        with suppress(Exception):  # a damaged HDU does not know its size
            info = self._list[hdus[-1].index].fileinfo()
            rest = self._size - info["datLoc"] - info["datSpan"]
            if rest > 0:
                words += f", then {rest} bytes that are no whole header (a truncated file?)"
        return words

    def pixels(self, hdu: Hdu, section: Section | None = None) -> NDArray[Any]:
        """The pixels of an image HDU, scaled (BSCALE, BZERO; BLANK becomes NaN), in native byte order.

        Parameters
        ----------
        hdu : Hdu
        section : (slice, slice), optional
            Rows and columns; no others are read (of a compressed image, no other tiles are unpacked).

        Returns
        -------
        ndarray (ny, nx)
            Integers where the file has plain integers, floating point otherwise.
        """
        self.require_image(hdu)
        try:
            with quiet():
                raw = self._list[hdu.index]
                data = raw.data if section is None else raw.section[(0,) * (len(raw.shape) - 2) + section]
        except MemoryError:
            raise
        except Exception as error:
            found = f"pixels that cannot be decoded ({first_line(error)})"
            raise self.error(found, "a complete image", hdu=hdu.index) from error
        data = np.asarray(data)
        if section is None:
            data = data.reshape(hdu.shape)
        return data.astype(data.dtype.newbyteorder("="), copy=False)

    def table(self, hdu: Hdu) -> Any:
        """The rows of a table HDU."""
        self._require_whole(hdu)
        try:
            with quiet():
                return self._list[hdu.index].data
        except Exception as error:
            raise self.error(f"a table that cannot be read ({first_line(error)})", "a table", hdu=hdu.index) from error

    def require_image(self, hdu: Hdu) -> None:
        """Raise `ReadError` unless this is a whole 2-D image of a believable size; reads no pixels."""
        if hdu.kind != "image":
            do = "Name an image HDU, as in path[1] or path[SCI]."
            raise self.error(f"a {hdu.kind}", "an image", hdu=hdu.index, do=do)
        if len(hdu.shape) != 2:
            found = f"{len(hdu.shape)} axes of lengths {hdu.shape[::-1]}" if hdu.shape else "no pixels"
            do = "Name another HDU, or cut the cube into 2-D images first."
            raise self.error(found, "a 2-D image (further axes of length 1 are fine)", hdu=hdu.index, do=do)
        if int(np.prod(hdu.shape, dtype=object)) > MAX_PIXELS:
            found = f"NAXIS of {hdu.shape[1]} x {hdu.shape[0]}"
            raise self.error(found, f"at most {MAX_PIXELS} pixels", hdu=hdu.index)
        self._require_whole(hdu)

    def _require_whole(self, hdu: Hdu) -> None:
        try:
            raw = self._list[hdu.index]
            info = raw.fileinfo()
            # The last block of a file may lack its padding. A compressed image's size is that of its table, padded.
            compressed = isinstance(raw, fits.CompImageHDU)
            end = info["datLoc"] + (max(info["datSpan"] - 2879, 0) if compressed else int(raw.size))
        except Exception as error:
            raise self._bad_header(hdu.index, error) from error
        if end > self._size:
            raise self.error(
                f"truncated: {self._size} bytes", f"at least {end}, by the header of this HDU", hdu=hdu.index
            )

    def _bad_header(self, index: int, error: Exception) -> ReadError:
        found = f"a header that cannot be parsed ({first_line(error)})"
        return self.error(found, "a complete FITS header", hdu=index)

    def _describe(self, index: int) -> Hdu:
        # Whatever astropy raises while it parses a header is the header's doing.
        try:
            with quiet():
                raw = self._list[index]
                header = raw.header
                shape = tuple(int(header.get(f"NAXIS{n}", 0)) for n in range(int(header.get("NAXIS", 0)), 0, -1))
                name, version = str(raw.name).strip().upper(), int(raw.ver)
                table = isinstance(raw, fits.BinTableHDU | fits.TableHDU)
                kind = "image" if getattr(raw, "is_image", False) else "table" if table else "other"
        except IndexError:
            raise
        except Exception as error:
            raise self._bad_header(index, error) from error
        while len(shape) > 2 and shape[0] == 1:
            shape = shape[1:]
        return Hdu(index, name, version, header, kind, shape if kind == "image" else ())


@contextmanager
def open_fits(path: Path) -> Iterator[FitsFile]:
    """Open a FITS file, plain, tile-compressed or gzipped, and close it again.

    Raises
    ------
    ReadError
        Missing, not a file, empty, not FITS, a corrupt gzip.
    """
    stream, size = _open_stream(path)
    with stream:
        yield FitsFile(path, stream, size)


def _open_stream(path: Path) -> tuple[BinaryIO, int]:
    def error(found: str, expected: str, do: str) -> ReadError:
        return ReadError(
            f"{path}: {found}; expected {expected}. {do}", path=str(path), hdu=None, found=found, expected=expected
        )

    again = "Fetch the file again, or take its row out of the manifest."
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise error("a folder", "a FITS file", "Name a file in it.")
        stream: BinaryIO = path.open("rb")
    except FileNotFoundError:
        raise error(
            "no such file", "a FITS file", "Correct the path (relative paths start at the manifest's folder)."
        ) from None
    except OSError as cause:
        raise error(f"cannot be opened ({cause.strerror})", "a readable file", "Look at its permissions.") from cause
    try:
        if size == 0:
            raise error("empty (0 bytes)", "a FITS file", again)
        magic = stream.read(9)
        stream.seek(0)
        if magic[:2] == b"\x1f\x8b":
            # gzip cannot be sought in; whole, its checksum is tested too.
            try:
                content = gzip.decompress(stream.read())
            except (EOFError, OSError, zlib.error) as cause:
                raise error(f"a corrupt or cut gzip file ({first_line(cause)})", "a whole one", again) from cause
            stream.close()
            stream, size, magic = io.BytesIO(content), len(content), content[:9]
        if magic != b"SIMPLE  =":
            raise error(f"a file that begins with {magic!r}", "FITS, which begins with b'SIMPLE  ='", again)
    except BaseException:
        stream.close()
        raise
    return stream, size


def _size_claimed(stream: BinaryIO) -> str:
    """The size that the first header claims, where it can be read: absurd sizes are why astropy gives up."""
    try:
        stream.seek(0)
        header = fits.Header.fromfile(stream)
        return f"; it claims {' x '.join(str(header[f'NAXIS{axis + 1}']) for axis in range(header['NAXIS']))} pixels"
    except Exception:
        return ""


def first_line(error: BaseException) -> str:
    """What another library says is wrong, in one line of bounded length."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]
