"""How much memory an image will need, told from its size before anything is started.

The numbers are measured (``tests/benchmarks/memory.py`` measures them again, in fresh processes that do what a worker
does): a process that has imported everything, and bytes a pixel in the two steps that take the most. Aligning holds
every reference with its sky taken off, and each once more on the grid of new; subtracting holds new, one reference, and
six planes of results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from batchproc.distribute.clusters import Where, expected_workers, worker_memory
from batchproc.errors import BatchprocError, UsageError
from batchproc.io.fitsfile import open_fits
from batchproc.io.inspection import ImageInfo, inspect_image
from batchproc.records import ManifestEntry

__all__ = ["Fit", "Prediction", "check_memory", "fit", "predict_image", "predict_memory", "tile_bytes"]

_PROCESS = 432e6  # Python, NumPy, Numba's code, Dask, Arrow, Zarr, FFTW's plans: before the first pixel
_TILE = 72  # bytes a pixel of a frame: four planes, eight spectra, six results

_SUBTRACTING = 68.0  # a pixel of new
_SUBTRACTING_VARIANCE = 10.0  # more, where the variances are given

_NEW, _REF, _LAYER, _JOINED, _AT_WORK = 5.0, 9.0, 15.0, 9.0, 4.0  # aligning: a pixel; the last one of the largest image
_VARIANCE, _VARIANCE_AT_WORK = 4.0, 8.0  # more for each of new, references, layers; and for the largest image

_MARGIN = 1.08  # stars, candidates, and memory that the C library does not give back

#: A worker is ended by its nanny at this fraction of its limit.
_USABLE = 0.95


@dataclass(frozen=True)
class Prediction:
    """What the image needs that needs the most of those looked at.

    Attributes
    ----------
    image_id : str
        Empty where no image could be read.
    bytes : int
        Of the worker process, at its largest; 0 where no image could be read.
    shape : tuple of int
        (ny, nx) of new.
    refs : tuple of tuple of int
        (ny, nx) of each reference.
    looked_at : int
        Images whose headers were read.
    """

    image_id: str = ""
    bytes: int = 0
    shape: tuple[int, int] = (0, 0)
    refs: tuple[tuple[int, int], ...] = ()
    looked_at: int = 0

    @property
    def pixels(self) -> int:
        """Of new."""
        return math.prod(self.shape)


def predict_memory(new: int, refs: Sequence[int], *, variance: bool = False) -> int:
    """Largest size of a worker process while it works on one image, in bytes; not less than what is measured.

    Parameters
    ----------
    new : int
        Pixels of new.
    refs : sequence of int
        Pixels of each reference.
    variance : bool
        The images come with variance planes.
    """
    k, v = len(refs), float(variance)
    subtracting = new * (_SUBTRACTING + v * _SUBTRACTING_VARIANCE)
    aligning = (
        new * (_NEW + v * _VARIANCE + k * (_LAYER + v * _VARIANCE) + _JOINED)
        + sum(refs) * (_REF + v * _VARIANCE)
        + max([new, *refs]) * (_AT_WORK + v * _VARIANCE_AT_WORK)
    )
    return int(_MARGIN * (_PROCESS + max(subtracting, aligning)))


def predict_image(entry: ManifestEntry) -> Prediction | None:
    """The `Prediction` for an image, from the headers of its files; None where they cannot be read."""
    try:
        infos = [inspect_image(path) for path in (entry.new, *entry.ref)]
        variance = bool(entry.new_variance or any(entry.ref_variance)) or any(map(_has_variance, infos))
    except (BatchprocError, OSError):  # the image's own task will say what is wrong
        return None
    new, *refs = (info.shape for info in infos)
    needed = predict_memory(math.prod(new), [math.prod(ref) for ref in refs], variance=variance)
    return Prediction(entry.image_id, needed, new, tuple(refs), 1)


def tile_bytes(tile: int, tiles: int) -> int:
    """Memory of so many tiles of this side, pixels, that are under way at a time where they are spread.

    One after the other they fit into what aligning has left.
    """
    return tiles * tile**2 * _TILE


@dataclass(frozen=True)
class Fit:
    """What an image needs, and what a worker may have.

    Attributes
    ----------
    need : Prediction
    limit : int or None
        Bytes of a worker; None where nobody knows.
    workers : int or None
        That share the memory of one machine; None where a profile gives each its own.
    """

    need: Prediction
    limit: int | None
    workers: int | None

    def check(self) -> None:
        """`check_memory` of these."""
        check_memory(self.need, self.limit, self.workers)


def check_memory(prediction: Prediction, worker_memory: int | None, workers: int | None = None) -> None:
    """Refuse what a worker cannot do.

    Parameters
    ----------
    prediction : Prediction
    worker_memory : int, optional
        Bytes that a worker may have; None: nobody knows, and nothing is refused.
    workers : int, optional
        That share the memory of one machine, where fewer of them would have more each.

    Raises
    ------
    UsageError
        With image, prediction, limit, and what to type.
    """
    if worker_memory is None or prediction.bytes <= _USABLE * worker_memory:
        return
    ny, nx = prediction.shape
    n = len(prediction.refs)
    fit = int(worker_memory * (workers or 1) * _USABLE / prediction.bytes)
    if workers is None:
        advice = "use a profile whose workers have more memory (memory = ..., or fewer workers to a job)"
    elif fit:
        advice = f"`--workers {fit}` leaves enough for each"
    else:
        advice = "use a machine with more memory, or cut the image"
    raise UsageError(
        f"image {prediction.image_id} ({nx} x {ny} pixels, {n} reference{'s' * (n != 1)}) needs about "
        f"{prediction.bytes / 1e9:.2g} GB, and a worker may have {_USABLE * worker_memory / 1e9:.2g} GB: {advice}"
    )


def fit(need: Prediction, where: Where, *, images: int, threads: int, large: int | None = None, tiles: int = 0) -> Fit:
    """How an image fits into the workers there will be, known before anything is started.

    Parameters
    ----------
    need : Prediction
    where : Where
    images, threads, large : int
        As `tasks`, `threads` and `large` of `batchproc.distribute.clusters.worker_memory`.
    tiles : int
        Bytes of tiles under way, where they are spread: beyond the image's own.
    """
    workers = 1 if where.cluster == "serial" else expected_workers(where, threads)
    if need.bytes:
        need = replace(need, bytes=need.bytes + tiles)
    share = min(workers, large or images) if where.cluster in ("serial", "local") else None
    return Fit(need, worker_memory(where, threads, images, large), share)


def _has_variance(info: ImageInfo) -> bool:
    """Whether the file holds a plane of variances, weights or sigmas."""
    extensions = info.profile.extensions
    names = {*extensions.variance, *extensions.weight, *extensions.sigma}
    if not names:
        return False
    with open_fits(Path(info.path)) as file:
        return any(hdu.is_image_2d and hdu.name in names for hdu in file)
