"""From facts to HTML: what goes into ``templates/report.html``, in the words and numbers that a reader sees."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from batchproc.report import figures
from batchproc.report.course import course_section
from batchproc.report.facts import HISTOGRAM_EDGES, MATCH_PIX, REAL, Candidate, Facts, Truth
from batchproc.report.focal import focal_section
from batchproc.report.stamps import triplet_png

__all__ = ["render"]

_MOST_FAILURES = 60
_MOST_IMAGES = 80
_MOST_TRACEBACKS = 3

#: Columns of the table of images: column, heading, format.
_IMAGE_COLUMNS = (
    ("filter", "filter", "{}"),
    ("n_candidates", "candidates", "{:,.0f}"),
    ("fwhm_new", "FWHM new", "{:.2f}"),
    ("fwhm_ref", "FWHM ref", "{:.2f}"),
    ("n_psf_stars_new", "PSF stars new", "{:.0f}"),
    ("n_psf_stars_ref", "PSF stars ref", "{:.0f}"),
    ("registration_rms_x", "reg. x (pix)", "{:.3f}"),
    ("registration_rms_y", "reg. y (pix)", "{:.3f}"),
    ("flux_ratio", "flux ratio", "{:.3f}"),
    ("renormalisation", "S_corr width", "{:.3f}"),
    ("masked_fraction", "masked", "{:.1%}"),
    ("seconds", "seconds", "{:.1f}"),
    ("peak_memory_mb", "MiB", "{:,.0f}"),
)
#: Columns in which a stray image is marked.
_WATCHED = ("n_candidates", "fwhm_new", "fwhm_ref", "registration_rms_x", "registration_rms_y", "renormalisation")


def render(facts: Facts) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("batchproc"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["n"] = lambda value: f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    template = environment.get_template("report.html")
    return template.render(
        facts=facts,
        verdict=_verdict(facts),
        tiles=_tiles(facts),
        best=[_card(c) for c in facts.best],
        aside=[_card(c) for c in facts.aside],
        filters=_filters(facts),
        flags=_flag_counts(facts),
        sky=_sky(facts),
        truth=_truth(facts.truth),
        images=_image_table(facts.images),
        failures=_failures(facts),
        focal=None if facts.focal_planes is None else focal_section(facts.focal_planes),
        course=None if facts.course is None else course_section(facts.course),
        cost=_cost(facts.images),
        real=REAL,
        match=MATCH_PIX,
        svg=_drawings(facts),
    )


def _drawings(facts: Facts) -> dict[str, str]:
    truth = facts.truth
    return {
        "sky": figures.sky_noise(facts),
        "complete": figures.completeness(truth, facts.threshold, with_scores=facts.score is not None) if truth else "",
        "positions": figures.positions(truth) if truth else "",
        "scores": figures.scores(facts),
        "significance": figures.significance(facts),
        "quality": figures.quality(facts.images),
        "steps": figures.steps(facts.images),
    }


def _verdict(facts: Facts) -> str:
    """The run in one sentence."""
    done, failed = len(facts.images), sum(r.status == "failed" for r in facts.failures)
    bugs, missing = len(facts.failures) - failed, facts.n_images - done - len(facts.failures)
    parts = [f"{done} of {facts.n_images} image{'s' * (facts.n_images != 1)} done"]
    parts += [f"{failed} failed"] * bool(failed)
    parts += [f"{bugs} stopped by a bug"] * bool(bugs)
    parts += [f"{missing} not tried yet"] * bool(missing)
    sentence = ", ".join(parts) + ". "
    count = len(facts.catalogue)
    if count == 0:
        return sentence + ("No candidates above the threshold." if done else "Nothing could be searched.")
    sentence += f"{count:,} candidate{'s' * (count != 1)} above {facts.threshold:g} σ"
    clean = int((facts.catalogue["flags"] == 0).sum())
    if facts.score is None:
        return sentence + f", {clean:,} of them unflagged."
    return sentence + f", {int((facts.scores >= REAL).sum()):,} of them likely real (score {REAL:g} or more)."


def _tiles(facts: Facts) -> list[dict[str, str]]:
    """The headline numbers."""
    images, catalogue = facts.images, facts.catalogue
    tiles = [
        {"value": f"{len(images)}/{facts.n_images}", "label": "images done"},
        {"value": f"{len(catalogue):,}", "label": "candidates"},
    ]
    if facts.score is not None:
        tiles.append({"value": f"{int((facts.scores >= REAL).sum()):,}", "label": "likely real"})
    elif len(catalogue):
        tiles.append({"value": f"{int((catalogue['flags'] == 0).sum()):,}", "label": "unflagged"})
    if facts.failures:
        tiles.append({"value": f"{len(facts.failures):,}", "label": "failed", "tone": "warn"})
    if facts.truth is not None and len(facts.truth.table):
        found = facts.truth.table["found"]
        tiles.append({"value": f"{found.sum()}/{len(found)}", "label": "known transients found"})
    if facts.histogram is not None:
        tiles.append({"value": f"{_width(facts):.3f}", "label": "width of S_corr on blank sky"})
    if len(images):
        # The median, as of the CPU time: the first image of each process pays for compiling, once.
        tiles.append({"value": f"{images['seconds'].median():.1f} s", "label": "per image, median"})
    return tiles


def _card(candidate: Candidate) -> dict[str, Any]:
    """A triplet of a gallery."""
    row = candidate.row
    signal = row["flux"] / row["flux_err"] if row["flux_err"] else np.nan
    name = f"{row['filter']} =" if 0 < len(row["filter"]) <= 3 else "mag"
    brightness = f"{name} {row['mag']:.2f}" if np.isfinite(row["mag"]) else f"flux {row['flux']:.4g}"
    sky = f"{row['ra']:.5f} {row['dec']:+.5f}" if np.isfinite(row["ra"]) else ""
    kind = "brightened" if row["scorr"] > 0 else "faded"
    score = f", score {candidate.score:.2f}" if np.isfinite(candidate.score) else ""
    return {
        "id": row["candidate_id"],
        "image": triplet_png(candidate.stamp),
        "alt": (
            f"New image, reference and difference of candidate {row['candidate_id']}: "
            f"{kind}, {row['scorr']:+.1f} sigma{score}"
        ),
        "score": f"{candidate.score:.2f}" if np.isfinite(candidate.score) else "",
        "likely": candidate.score >= REAL,
        "scorr": _signed(row["scorr"]) + " σ",
        "signal": _signed(signal),
        "brightness": brightness,
        "sky": sky,
        "flags": candidate.flags,
        "known": bool(candidate.known),
    }


def _signed(value: float) -> str:
    """One digit, with a typographer's minus."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _filters(facts: Facts) -> list[dict[str, Any]]:
    """A row a filter."""
    if facts.images.empty:
        return []
    catalogue = facts.catalogue.assign(score=facts.scores)
    catalogue = catalogue.assign(filter=catalogue["filter"].replace("", "unknown"))
    rows = []
    for name, images in facts.images.groupby("filter", sort=True):
        mine = catalogue[catalogue["filter"] == name]
        rows.append(
            {
                "name": name,
                "images": len(images),
                "candidates": len(mine),
                "per_image": len(mine) / len(images),
                "positive": int((mine["scorr"] > 0).sum()),
                "negative": int((mine["scorr"] < 0).sum()),
                "clean": int((mine["flags"] == 0).sum()),
                "real": int((mine["score"] >= REAL).sum()),
                "fwhm_new": _median(images, "fwhm_new"),
                "fwhm_ref": _median(images, "fwhm_ref"),
                "faintest": _faintest(mine),
            }
        )
    return rows


def _median(table: pd.DataFrame, column: str) -> str:
    return f"{table[column].median():.2f}" if column in table and table[column].notna().any() else "–"


def _faintest(candidates: pd.DataFrame) -> str:
    """Median magnitude of the detections near the threshold."""
    near = candidates[(candidates["scorr"].abs() < 7) & (candidates["flags"] == 0) & candidates["mag"].notna()]
    return f"{near['mag'].median():.2f}" if len(near) >= 5 else "–"


def _flag_counts(facts: Facts) -> list[dict[str, Any]]:
    """How often each flag was set."""
    from batchproc.records import Flag

    flags = facts.catalogue["flags"].to_numpy()
    counts = [
        {"name": (flag.name or "").lower().replace("_", " "), "count": int(np.sum(flags & flag != 0))} for flag in Flag
    ]
    return sorted((c for c in counts if c["count"]), key=lambda c: -int(str(c["count"])))


def _width(facts: Facts) -> float:
    """Robust width of blank-sky S_corr, from the quartile-like points of its histogram."""
    assert facts.histogram is not None
    cumulative = np.concatenate([[0], np.cumsum(facts.histogram)]) / max(facts.histogram.sum(), 1)
    low, high = np.interp([0.158655, 0.841345], cumulative, HISTOGRAM_EDGES)
    return float(high - low) / 2


def _sky(facts: Facts) -> dict[str, Any] | None:
    if facts.histogram is None or facts.histogram.sum() == 0:
        return None
    beyond = np.abs(HISTOGRAM_EDGES[:-1] + 0.125) > facts.threshold
    return {
        "pixels": int(facts.histogram.sum()),
        "width": f"{_width(facts):.3f}",
        "beyond": int(facts.histogram[beyond].sum()),
        "renormalisation": _median(facts.images, "renormalisation"),
    }


def _truth(truth: Truth | None) -> dict[str, Any] | None:
    if truth is None:
        return None
    table, found = truth.table, truth.table[truth.table["found"]]
    bright = table[table["snr"] >= 8]

    def share(part: pd.Series) -> str:
        return f"{int(part.sum())} of {len(part)}" + (f" ({part.mean():.1%})" if len(part) else "")

    return {
        "total": len(table),
        "all": share(table["found"]),
        "bright": share(bright["found"]),
        "clean": share(bright["clean"]),
        "real": share(bright["real"]),
        "masked": truth.n_masked,
        "elsewhere": truth.n_elsewhere,
        "false": truth.n_false,
        "false_clean": truth.n_false_clean,
        "false_real": truth.n_false_real,
        "flux": f"{found['flux_ratio'].median():.3f}" if len(found) else "–",
        "shift": f"{found['dx'].median():+.3f}, {found['dy'].median():+.3f}" if len(found) else "–",
        "scatter": f"{1.4826 * np.median(np.abs(found[['dx', 'dy']])):.3f}" if len(found) else "–",
    }


def _image_table(images: pd.DataFrame) -> dict[str, Any]:
    """The images, or of many those that stand out."""
    columns = [c for c in _IMAGE_COLUMNS if c[0] in images]
    strays = pd.DataFrame({c: _strays(images[c]) for c in _WATCHED if c in images}, index=images.index, dtype=bool)
    shown = images
    if len(images) > _MOST_IMAGES:
        order = strays.sum(axis=1).sort_values(ascending=False, kind="stable").index[:_MOST_IMAGES]
        shown = images.loc[sorted(order)]
    rows = []
    for index, row in shown.iterrows():
        cells = [
            {"text": _format(row[name], pattern), "stray": name in strays and bool(strays.at[index, name])}
            for name, _, pattern in columns
        ]
        rows.append({"id": row["image_id"], "cells": cells})
    return {"headings": [heading for _, heading, _ in columns], "rows": rows, "left_out": len(images) - len(shown)}


def _strays(values: pd.Series) -> pd.Series:
    """Values far from the others': beyond six robust sigma, and by more than a tenth."""
    numbers = pd.to_numeric(values, errors="coerce")
    middle = numbers.median()
    spread = 1.4826 * (numbers - middle).abs().median()
    away = (numbers - middle).abs()
    return (away > 6 * spread) & (away > 0.1 * abs(middle)) & (len(values) >= 5)


def _format(value: Any, pattern: str) -> str:
    missing = value is None or (isinstance(value, float) and np.isnan(value))
    return "–" if missing else pattern.format(value)


def _failures(facts: Facts) -> dict[str, Any]:
    kinds = Counter((r.stage, r.error) for r in facts.failures)
    examples = {(r.stage, r.error): r.message for r in reversed(facts.failures)}
    return {
        "count": len(facts.failures),
        "bugs": sum(r.status == "bug" for r in facts.failures),
        "kinds": [
            {"stage": stage, "error": error, "count": count, "message": examples[stage, error]}
            for (stage, error), count in kinds.most_common(20)
        ],
        "rows": facts.failures[:_MOST_FAILURES],
        "left_out": max(0, len(facts.failures) - _MOST_FAILURES),
        "tracebacks": [r for r in facts.failures if r.status == "bug" and r.traceback][:_MOST_TRACEBACKS],
    }


def _cost(images: pd.DataFrame) -> dict[str, str] | None:
    if images.empty:
        return None
    # The median: the first image of each process pays for compiling, once.
    cpu = float(images["cpu_seconds"].median())
    mpix = float(images["mpix"].mean()) if images["mpix"].notna().any() else np.nan
    return {
        "cpu": f"{cpu:.1f} s",
        "per_mpix": f"{cpu / mpix:.2f} s" if mpix > 0 else "–",
        "per_core_hour": f"{3600 / cpu:,.0f}" if cpu > 0 else "–",
        "total": f"{images['cpu_seconds'].sum() / 3600:.2f} h",
        "memory": f"{images['peak_memory_mb'].median():,.0f} MiB",
        "most": f"{images['peak_memory_mb'].max():,.0f} MiB",
    }
