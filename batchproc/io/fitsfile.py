"""FITS files, opened with suspicion: what is in them, and one HDU's pixels as a native array.

Whatever is wrong with a file is a `ReadError` that names the file, the HDU, what was found, what was expected and what
to do. Sizes are checked against the header before anything is allocated. Where it was the disk that failed and not the
file that is broken, the system's error is the `ReadError`'s cause: another attempt may succeed. What the pixels *mean*
(units, masks, variance) is the business of `images` and its neighbours.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import stat
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

#: What may follow the last HDU of a gzipped file; more than this is not unpacked.
MAX_RUBBLE = 2**24
_BLOCK = 2880
_AGAIN = "Fetch the file again, or take its row out of the manifest."

_WHOLE_NUMBER = re.compile(rb"[A-Z0-9 ]{8}= *([+-]?[0-9]{1,18}) *(/|$)")
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
        self._stream = stream
        self._size = size
        self._hdus: dict[int, Hdu] = {}
        try:
            with quiet():
                self._list = fits.open(stream, mode="readonly", memmap=False, lazy_load_hdus=True)
        except Exception as error:
            found = f"a first header that cannot be used ({first_line(error)}{_size_claimed(stream)})"
            raise self.error(found, "a complete FITS header with a size that fits the file") from self._cause(error)

    def error(self, found: str, expected: str, *, hdu: int | str | None = None, do: str = "") -> ReadError:
        """A `ReadError` on this file."""
        where = f"{self.path}" + ("" if hdu is None else f"[{hdu}]")
        do = do or _AGAIN
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
                self._require_nothing_after(index - 1)
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
        """The HDUs in words."""
        return ", ".join(hdu.label for hdu in self)

    def _require_nothing_after(self, last: int) -> None:
        """Raise `ReadError` where an extension follows that cannot be read: it may have been the mask of an image.

        Other bytes may follow; some programs leave them behind.
        """
        try:
            info = self._list[last].fileinfo()
            end = info["datLoc"] + info["datSpan"]
            if self._size <= end:
                return
            self._stream.seek(end - _BLOCK)  # the padding, where bytes may be lost too
            hidden = b"XTENSION=" in self._stream.read(MAX_RUBBLE)
        except Exception as error:
            raise self._bad_header(last, error) from self._cause(error)
        if hidden or self._failure is not None:
            found = f"{self._size - end} bytes of an extension after HDU {last} that cannot be read"
            raise self.error(found, "whole HDUs (is the file truncated, or are bytes lost?)") from self._failure

    @property
    def _failure(self) -> OSError | None:
        """What the disk said when it could not be read; astropy may take that for the end of the file."""
        return getattr(getattr(self._stream, "raw", None), "failure", None)

    def _cause(self, error: Exception) -> Exception:
        return self._failure or error

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
            raise self.error(found, "a complete image", hdu=hdu.index) from self._cause(error)
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
            found = f"a table that cannot be read ({first_line(error)})"
            raise self.error(found, "a table", hdu=hdu.index) from self._cause(error)

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
            raise self._bad_header(hdu.index, error) from self._cause(error)
        if end > self._size:
            raise self.error(
                f"truncated: {self._size} bytes", f"at least {end}, by the header of this HDU", hdu=hdu.index
            )
        if compressed:
            self._require_all_tiles(hdu, raw)

    def _require_all_tiles(self, hdu: Hdu, image: Any) -> None:
        """Raise `ReadError` unless a compressed image has the tiles that its header claims: no fewer, and no more."""
        try:
            with quiet():
                tile, found = image.tile_shape, len(image.compressed_data)
            claimed = (
                math.prod(-(-n // side) for n, side in zip(image.shape, tile, strict=True)) if min(tile) > 0 else 0
            )
        except Exception as error:
            raise self._bad_header(hdu.index, error) from self._cause(error)
        if found != claimed:
            expected = f"{claimed}, as its header claims ({' x '.join(map(str, tile[::-1]))} pixels each)"
            raise self.error(f"{found} compressed tiles", expected, hdu=hdu.index)

    def _bad_header(self, index: int, error: Exception) -> ReadError:
        found = f"a header that cannot be parsed ({first_line(error)})"
        return self.error(found, "a complete FITS header", hdu=index)

    def _describe(self, index: int) -> Hdu:
        # Whatever astropy raises while it parses a header is the header's doing.
        try:
            with quiet():
                raw = self._list[index]
                header = raw.header
                compressed = isinstance(raw, fits.CompImageHDU)
                if index and not compressed and header.cards[0].keyword != "XTENSION":
                    raise IndexError(index)  # rubble that astropy takes for an HDU
                shape = tuple(int(header.get(f"NAXIS{n}", 0)) for n in range(int(header.get("NAXIS", 0)), 0, -1))
                name, version = str(raw.name).strip().upper(), int(raw.ver)
                table = isinstance(raw, fits.BinTableHDU | fits.TableHDU)
                kind = "image" if getattr(raw, "is_image", False) else "table" if table else "other"
        except IndexError:
            raise
        except Exception as error:
            raise self._bad_header(index, error) from self._cause(error)
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


class _Disk(io.RawIOBase):
    """A file on a disk that remembers how it failed, whoever swallows the error."""

    failure: OSError | None = None

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def readinto(self, buffer: Any) -> int | None:
        try:
            return self._file.readinto(buffer)
        except OSError as error:
            self.failure = error
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_stream(path: Path) -> tuple[BinaryIO, int]:
    def error(found: str, expected: str, do: str = _AGAIN) -> ReadError:
        return ReadError(
            f"{path}: {found}; expected {expected}. {do}", path=str(path), hdu=None, found=found, expected=expected
        )

    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise error("a folder", "a FITS file", "Name a file in it.")
        if not stat.S_ISREG(status.st_mode):  # to open a pipe is to wait for whoever writes to it
            raise error("a pipe, a socket or a device", "a FITS file", "Write what comes out of it to a file.")
        stream: BinaryIO = io.BufferedReader(_Disk(path))
    except FileNotFoundError:
        raise error(
            ReadError.NO_FILE, "a FITS file", "Correct the path (relative paths start at the manifest's folder)."
        ) from None
    except OSError as cause:
        raise error(f"cannot be opened ({cause.strerror})", "a readable file", "Look at its permissions.") from cause
    except ValueError as cause:
        raise error(f"a name that no file can have ({cause})", "a path", "Correct the path.") from cause
    try:
        if status.st_size == 0:
            raise error("empty (0 bytes)", "a FITS file")
        size, magic = status.st_size, stream.read(9)
        stream.seek(0)
        if magic[:2] == b"\x1f\x8b":
            with stream:
                stream, size = _unpacked(stream)
            magic = stream.read(9)
            stream.seek(0)
        if magic != b"SIMPLE  =":
            raise error(f"a file that begins with {magic!r}", "FITS, which begins with b'SIMPLE  ='")
    except BaseException as cause:
        stream.close()
        if isinstance(cause, EOFError | OSError | zlib.error):
            raise error(f"a corrupt or cut gzip file ({first_line(cause)})", "a whole one") from cause
        raise
    return stream, size


def _unpacked(stream: BinaryIO) -> tuple[BinaryIO, int]:
    """The HDUs of a gzipped file (it cannot be sought in), to its end, where the checksum is tested.

    No more is unpacked than the headers claim, and a little: a few megabytes of gzip can be gigabytes of nothing.
    """
    content = io.BytesIO()
    with gzip.GzipFile(fileobj=stream) as unpacked:
        header = _header_blocks(unpacked)
        while header.startswith((b"SIMPLE", b"XTENSION")):
            content.write(header)
            _copy(unpacked, content, _data_size(header))
            header = _header_blocks(unpacked)
        content.write(header)
        _copy(unpacked, content, MAX_RUBBLE)
        if unpacked.read(1):
            raise EOFError(f"it goes on for more than {MAX_RUBBLE >> 20} MB behind the last HDU, which is not the end")
    size = content.tell()
    content.seek(0)
    return content, size


def _header_blocks(stream: Any) -> bytes:
    """Blocks up to the one with an END card, or to the end of the stream."""
    header = bytearray()
    while len(header) < MAX_RUBBLE:
        block = stream.read(_BLOCK)
        header += block
        if len(block) < _BLOCK or any(block[at : at + 80].rstrip() == b"END" for at in range(0, _BLOCK, 80)):
            break
    return bytes(header)


def _data_size(header: bytes) -> int:
    """Bytes that a header claims for its data, padding included; 0 where it claims nothing that could be true."""
    cards = (header[at : at + 80] for at in range(0, len(header), 80))
    numbers = {card[:8].strip(): int(match[1]) for card in cards if (match := _WHOLE_NUMBER.match(card))}
    axes = [numbers.get(f"NAXIS{axis + 1}".encode(), 0) for axis in range(min(numbers.get(b"NAXIS", 0), 999))]
    values = numbers.get(b"GCOUNT", 1) * (numbers.get(b"PCOUNT", 0) + math.prod(axes) * bool(axes))
    size = abs(numbers.get(b"BITPIX", 0)) // 8 * values
    return -(-size // _BLOCK) * _BLOCK if values >= 0 and size <= 8 * MAX_PIXELS else 0


def _copy(source: Any, target: BinaryIO, size: int) -> None:
    while size > 0 and (piece := source.read(min(size, 2**22))):
        target.write(piece)
        size -= len(piece)


def _size_claimed(stream: BinaryIO) -> str:
    """The size that the first header claims, where it can be read: absurd sizes are why astropy gives up."""
    try:
        stream.seek(0)
        header = fits.Header.fromfile(stream)
        lengths = [str(header[f"NAXIS{axis + 1}"]) for axis in range(header["NAXIS"])]
        return f"; it claims {' x '.join(lengths)} pixels" if lengths else ""
    except Exception:
        return ""


def first_line(error: BaseException) -> str:
    """What another library says is wrong, in one line of bounded length."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]
