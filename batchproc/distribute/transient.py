"""Which errors may heal by themselves: a file server that does not answer, a connection that broke."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from batchproc.errors import StorageError, TransientError

__all__ = ["is_transient"]

_NAMES = (
    "EIO ESTALE ETIMEDOUT EAGAIN EINTR EBUSY ENOLCK ENFILE ECONNRESET ECONNREFUSED ECONNABORTED ENOTCONN EPIPE "
    "ENETUNREACH ENETDOWN ENETRESET EHOSTUNREACH EHOSTDOWN EREMOTEIO ECOMM"
)
_NUMBERS = {getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name)}  # not every system has all


def is_transient(error: BaseException) -> bool:
    """Whether an error, or what caused it, may be gone when the same is tried again.

    >>> is_transient(OSError(errno.ESTALE, "stale file handle")), is_transient(FileNotFoundError())
    (True, False)
    """
    if isinstance(error, StorageError):
        return False
    return any(
        isinstance(cause, (TransientError, ConnectionError, TimeoutError))
        or (isinstance(cause, OSError) and cause.errno in _NUMBERS)
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
