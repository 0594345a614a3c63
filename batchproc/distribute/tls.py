"""Keys of a cluster: those of the site, or new ones that live as long as the run.

A Dask scheduler runs whatever it is sent. On a network it must not take orders from everybody, so scheduler, workers
and driver talk over TLS, and only who has the key gets in.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchproc.distribute.sites import Certificates

__all__ = ["security_of", "temporary_certificates"]


@contextmanager
def temporary_certificates(folder: Path) -> Iterator[Certificates]:
    """New keys in a subfolder that only we can open (mode 0700), and that is gone afterwards.

    A key opens nothing once its scheduler has ended; what a killed driver left is removed by the next one on the same
    machine.
    """
    from distributed.security import Security

    made = Security.temporary()
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"tls-{os.uname().nodename}-"
    for left in folder.glob(f"{prefix}*"):
        if not Path("/proc", left.name.removeprefix(prefix).split("-")[0]).exists():
            shutil.rmtree(left, ignore_errors=True)
    keys = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=folder.resolve()))
    try:
        certificates = Certificates(*(str(keys / f"{name}.pem") for name in ("ca", "cert", "key")))
        for path, text in zip(
            (certificates.ca, certificates.cert, certificates.key),
            (made.tls_ca_file, made.tls_worker_cert, made.tls_worker_key),
            strict=True,
        ):
            Path(path).touch(mode=0o600)
            Path(path).write_text(text)
        yield certificates
    finally:
        shutil.rmtree(keys, ignore_errors=True)


def security_of(certificates: Certificates) -> Any:
    """What Dask makes of certificates; None (its own configuration) where there are none."""
    if not certificates:
        return None
    from distributed.security import Security

    roles: dict[str, str] = {}
    for role in ("client", "scheduler", "worker"):
        roles |= {f"tls_{role}_cert": certificates.cert, f"tls_{role}_key": certificates.key}
    return Security(tls_ca_file=certificates.ca, require_encryption=True, **roles)
