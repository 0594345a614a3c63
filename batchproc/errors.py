"""What can go wrong, as one tree.

::

    BatchprocError
    ├── UsageError                    the user asked for something impossible      exit code 2
    │   ├── ConfigError               unknown key, wrong type, value out of range
    │   ├── ManifestError             a manifest that cannot be used
    │   └── RunMismatchError          RUN was begun with other inputs or settings
    ├── ExposureError                 one image cannot be processed; the campaign goes on    exit code 1
    │   ├── ReadError                 missing, truncated, empty, not FITS, all NaN
    │   │   └── RawFrameError         an uncalibrated frame
    │   ├── AlignError                no overlap, too few matches, no usable WCS
    │   ├── PsfError                  too few stars, a PSF that cannot be used
    │   ├── SubtractError             nothing left to subtract
    │   ├── TransientError            may heal by itself: tried again before it counts
    │   ├── TimeLimitError            takes longer than an image may
    │   ├── MemoryLimitError          takes more memory than a worker has
    │   └── CrashError                ends the process that works on it, also when that has nothing else to do
    ├── ModelError                    a model that cannot be loaded or does not fit its input
    ├── StorageError                  the run folder cannot be written (full, read-only)        exit code 3
    ├── DamagedRunError               something that was stored is torn, missing or altered     exit code 3
    └── ClusterError                  no workers any more, or no scheduler                      exit code 3

Anything else that escapes from a task is a bug (exit code 3) and is recorded with its traceback.
"""

from __future__ import annotations

from typing import Any


class BatchprocError(Exception):
    """Root of everything batchproc raises on purpose."""


class UsageError(BatchprocError):
    """The request itself cannot be carried out; nothing was started."""


class ConfigError(UsageError):
    """A configuration key, type or value that is not understood."""


class ManifestError(UsageError):
    """A manifest that cannot be used."""


class RunMismatchError(UsageError):
    """A run folder that was begun with other inputs or settings."""


class ModelError(BatchprocError):
    """A model that cannot be loaded, or input that does not fit it."""


class StorageError(BatchprocError):
    """The run folder cannot be written: full, over its quota, read-only. No image is to blame; the campaign stops."""


class DamagedRunError(BatchprocError):
    """Something in a run folder is torn, missing or altered; ``batchproc verify RUN --repair`` tells what."""


class ClusterError(BatchprocError):
    """The workers, or the scheduler, are gone for good. What was done is kept; the campaign stops."""


class ExposureError(BatchprocError):
    """A foreseen failure of one image.

    Parameters
    ----------
    message : str
        What was found, what was expected, and what to do next.
    **metadata
        The same numbers as data (``found=3, needed=5, path=…``); they become columns of ``failures.parquet``.

    Attributes
    ----------
    stage : str
        The step of the flow in which it happened; a class attribute, which ``metadata['stage']`` overrides.
    metadata : dict
    """

    stage = "process"

    def __init__(self, message: str, **metadata: Any) -> None:
        super().__init__(message)
        self.stage = str(metadata.pop("stage", type(self).stage))
        self.metadata = metadata

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions with keyword arguments do not survive pickling by themselves, and these travel between processes.
        return _rebuild, (type(self), str(self), {"stage": self.stage, **self.metadata})


def _rebuild(cls: type[ExposureError], message: str, metadata: dict[str, Any]) -> ExposureError:
    return cls(message, **metadata)


class ReadError(ExposureError):
    """A file that cannot be read as an image."""

    stage = "read"

    #: What is ``found`` where there is no file, with its ``path``.
    NO_FILE = "no such file"


class RawFrameError(ReadError):
    """A raw, uncalibrated frame, which must not be subtracted."""


class AlignError(ExposureError):
    """The reference cannot be brought onto the grid of the new image."""

    stage = "align"


class PsfError(ExposureError):
    """No usable PSF."""

    stage = "psf"


class SubtractError(ExposureError):
    """Nothing to subtract."""

    stage = "subtract"


class TransientError(ExposureError):
    """What may heal by itself: a file server that does not answer. The image is tried again a few times."""


class TimeLimitError(ExposureError):
    """The image takes longer than ``time_limit``."""


class MemoryLimitError(ExposureError):
    """The image takes more memory than a worker has."""


class CrashError(ExposureError):
    """The image ends the process that works on it, also when that has nothing else to do: a crash in a library."""
