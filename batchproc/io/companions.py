"""Which files belong to an image: its mask, variance, weight map or rms map, told by their names."""

from __future__ import annotations

import re
from pathlib import Path

from batchproc.io.profiles import Companions, load_profile

__all__ = ["PLANES", "companion_names", "find_companions"]

#: Kinds of planes, in the order in which they are preferred.
PLANES = ("mask", "variance", "weight", "sigma")

_SUFFIXES = re.compile(r"(?P<kind>\.(fits?|fts))?(?P<packed>\.(fz|gz))?$", re.IGNORECASE)


def companion_names(name: str, companions: Companions, kind: str) -> list[str]:
    """File names that the plane of an image may have, the likeliest first.

    Parameters
    ----------
    name : str
        File name of the image.
    companions : Companions
        Those of its profile; those of the generic profile come after them.
    kind : {"mask", "variance", "weight", "sigma"}

    Returns
    -------
    list of str
        For each name as the image is compressed, then compressed otherwise.
    """
    names: list[str] = []
    for mine, its in (*getattr(companions, kind), *getattr(load_profile("generic").companions, kind)):
        stem, suffix, packed = _split(name)
        if mine:
            if mine not in name:
                continue
            stem, suffix, packed = _split(name.replace(mine, its))
        else:
            stem += its
        names += [f"{stem}{suffix}{ending}" for ending in dict.fromkeys((packed, "", ".fz", ".gz"))]
    return [other for other in dict.fromkeys(names) if other != name]


def find_companions(path: Path, companions: Companions, kind: str, folder: frozenset[str]) -> list[Path]:
    """Files of these names among those of the image's folder (`folder`: the names of the files in it)."""
    return [path.with_name(name) for name in companion_names(path.name, companions, kind) if name in folder]


def _split(name: str) -> tuple[str, str, str]:
    found = _SUFFIXES.search(name)
    assert found is not None  # both groups may be empty
    return name[: found.start()], found["kind"] or "", found["packed"] or ""
