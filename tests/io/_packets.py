"""Alert packets as ZTF's are, of any pixels; and what is wrong with some."""

from __future__ import annotations

import gzip
import io
import tarfile

import fastavro
import numpy as np
from astropy.io import fits

CUTOUT = {
    "type": "record",
    "name": "cutout",
    "fields": [{"name": "fileName", "type": "string"}, {"name": "stampData", "type": "bytes"}],
}
CANDIDATE = {
    "type": "record",
    "name": "candidate",
    "fields": [
        {"name": "ra", "type": "double"},
        {"name": "fid", "type": "int"},
        {"name": "drb", "type": ["null", "float"], "default": None},
        {"name": "drbversion", "type": ["null", "string"], "default": None},
        {"name": "isdiffpos", "type": ["null", "string"], "default": None},
    ],
}
SCHEMA = {
    "type": "record",
    "name": "alert",
    "fields": [
        {"name": "objectId", "type": "string"},
        {"name": "candid", "type": "long"},
        {"name": "candidate", "type": CANDIDATE},
        {"name": "cutoutScience", "type": ["null", CUTOUT], "default": None},
        {"name": "cutoutTemplate", "type": ["null", "cutout"], "default": None},
        {"name": "cutoutDifference", "type": ["null", "cutout"], "default": None},
    ],
}
NAMES = ("cutoutScience", "cutoutTemplate", "cutoutDifference")


def fits_bytes(pixels, **cards):
    """A FITS file of one image, and more cards in its header, whether they make sense or not."""
    file = io.BytesIO()
    fits.PrimaryHDU(np.asarray(pixels)).writeto(file)
    header, rest = file.getvalue()[:2880], file.getvalue()[2880:]
    more = "".join(f"{key:8}= {value!r:>20}".ljust(80) for key, value in cards.items())
    return (header.rstrip().removesuffix(b"END") + more.encode() + b"END").ljust(2880) + rest


def cutout(pixels, *, simple=b"SIMPLE  =  T"):
    """As in a packet: gzipped, and with a first card that is not where FITS wants it."""
    content = fits_bytes(pixels, BUNIT="DN")
    return gzip.compress(simple.ljust(80) + content[80:] if simple else content, mtime=0)


def record(candid, stamp, *, drb=None, isdiffpos="t", **replaced):
    """One alert; `replaced` are the bytes of cutouts, or None for no cutout."""
    cutouts = {name: cutout(pixels) for name, pixels in zip(NAMES, stamp, strict=True)} | replaced
    fields = {key: None if data is None else {"fileName": key, "stampData": data} for key, data in cutouts.items()}
    version = None if drb is None else "d6_m7"
    candidate = {"ra": 10.0 + candid, "fid": 1, "drb": drb, "drbversion": version, "isdiffpos": isdiffpos}
    return {"objectId": f"ZTF{candid}", "candid": candid, "candidate": candidate} | fields


def packet(*records, schema=SCHEMA):
    """The bytes of an Avro file."""
    file = io.BytesIO()
    fastavro.writer(file, schema, records, codec="null")
    return file.getvalue()


def stamp_of(seed=0, h=63, w=63):
    """A triplet of noise."""
    return np.random.default_rng(seed).normal(0.0, 2.0, (3, h, w)).astype(np.float32)


def write_night(folder, n=5):
    """A folder of alerts, the fourth of them with a score."""
    folder.mkdir()
    for k in range(n):
        (folder / f"{k}.avro").write_bytes(packet(record(k, stamp_of(k), drb=0.25 if k == 3 else None)))
    return folder


def tarball(folder, name="night.tar.gz"):
    """The files of a folder in a tarball beside it, in the order of their names."""
    path = folder.parent / name
    with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, f"inner/{file.name}")
    return path
