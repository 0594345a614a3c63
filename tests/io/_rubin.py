"""Alert packets as Rubin's are: records within records, cutouts as FITS files of several HDUs with a WCS.

Names, types and nesting are those of the public schemas ``lsst.v7_1`` and ``lsst.v10_0``, of whose many measurements a
few stand for all; cutouts are written as its pipeline writes them, by `astropy.nddata.CCDData`. No packet of Rubin's
own is at hand.
"""

from __future__ import annotations

import io

import fastavro
import numpy as np
from astropy import units as u
from astropy.nddata import CCDData, VarianceUncertainty
from astropy.wcs import WCS

NAMES = ("cutoutScience", "cutoutTemplate", "cutoutDifference")


def _field(name, kind, nullable=True):
    return {"name": name, "type": ["null", kind], "default": None} if nullable else {"name": name, "type": kind}


def schema_of(version="10_0"):
    """The schema of an alert; before version 10 it has an id of its own."""
    space = f"lsst.v{version}"

    def record(name, fields):
        return {"type": "record", "namespace": space, "name": name, "fields": fields}

    place = [_field(name, "double", False) for name in ("midpointMjdTai", "ra", "dec")]
    source = record(
        "diaSource",
        [
            _field("diaSourceId", "long", False),
            _field("visit", "long", False),
            _field("detector", "int", False),
            *(_field(name, "long") for name in ("diaObjectId", "ssObjectId", "parentDiaSourceId")),
            *place,
            *(_field(name, "float") for name in ("psfFlux", "psfFluxErr", "snr", "reliability")),
            _field("isNegative", "boolean"),
            _field("band", "string"),
        ],
    )
    forced = record("diaForcedSource", [_field("diaForcedSourceId", "long", False), _field("visit", "long", False)])
    obj = record("diaObject", [_field("diaObjectId", "long", False), _field("ra", "double", False)])
    sources = {"type": "array", "items": f"{space}.diaSource"}
    return record(
        "alert",
        [
            _field("diaSourceId" if int(version.split("_")[0]) >= 10 else "alertId", "long", False),
            _field("diaSource", source, False),
            _field("prvDiaSources", sources),
            _field("prvDiaForcedSources", {"type": "array", "items": forced}),
            _field("diaObject", obj),
            *(_field(name, "bytes") for name in ("cutoutDifference", "cutoutScience", "cutoutTemplate")),
        ],
    )


def cutout(pixels, centre=None, *, planes=True):
    """A FITS file: image, variance and PSF, with a WCS whose reference pixel is the source (row, column from 0)."""
    h, w = pixels.shape
    wcs = WCS(naxis=2)
    row, column = centre or (h // 2, w // 2)
    wcs.wcs.crpix = [column + 1, row + 1]
    wcs.wcs.crval = [150.1, 2.2]
    wcs.wcs.cd = [[-5.5e-5, 1e-6], [1e-6, 5.5e-5]]
    more = {"uncertainty": VarianceUncertainty(np.ones_like(pixels)), "psf": np.ones((25, 25))} if planes else {}
    file = io.BytesIO()
    CCDData(pixels, wcs=wcs, unit=u.nJy, meta={"cutMinX": 1717, "cutMinY": 41}, **more).write(file, format="fits")
    return file.getvalue()


def record(number, stamp, *, centre=None, **replaced):
    """One alert; `replaced` are the bytes of cutouts, or None for no cutout, or fields of its diaSource."""
    cutouts = {name: cutout(pixels, centre) for name, pixels in zip(NAMES, stamp, strict=True)}
    cutouts |= {name: replaced.pop(name) for name in NAMES if name in replaced}
    source = {
        "diaSourceId": number,
        "visit": 2024110800263,
        "detector": 94,
        "diaObjectId": 3 * number,
        "midpointMjdTai": 60623.26,
        "ra": 150.1,
        "dec": 2.2,
        "psfFlux": -812.5,
        "psfFluxErr": 61.0,
        "snr": 13.3,
        "reliability": 0.75,
        "isNegative": True,
        "band": "r",
        **replaced,
    }
    before = [{**source, "diaSourceId": number - 1, "reliability": None}]
    ids = {"diaSourceId": number, "alertId": number}
    return {**ids, "diaSource": source, "prvDiaSources": before, "diaObject": {"diaObjectId": 3, "ra": 1.0}, **cutouts}


def packet(*records, version="10_0"):
    """An Avro file."""
    file = io.BytesIO()
    fastavro.writer(file, fastavro.parse_schema(schema_of(version)), records)
    return file.getvalue()


def message(record, version="10_0", number=703):
    """A message of Kafka, as brokers get it: the number of a schema that is somewhere else, and the record."""
    file = io.BytesIO()
    file.write(b"\0" + number.to_bytes(4, "big"))
    fastavro.schemaless_writer(file, fastavro.parse_schema(schema_of(version)), record)
    return file.getvalue()
