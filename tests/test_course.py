"""The course of a campaign, from the events of its drivers."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from batchproc.report.course import course_section, draw_course
from batchproc.report.times import read_course

BEGUN = datetime(2026, 11, 1, 12, tzinfo=UTC)


def at(seconds: float, event: str, **fields):
    return {"time": (BEGUN + timedelta(seconds=seconds)).isoformat(), "event": event, **fields}


def campaign(images: int = 100):
    """Two drivers, the first one killed; a few failures; a night between them."""
    yield at(0, "run_begun", to_do=2 * images)
    yield at(1, "workers", workers=8)
    for i in range(images):
        yield at(10 + i, "image_done", image_id=str(i))
        if i % 10 == 0:
            yield at(10 + i, "image_failed", image_id=f"f{i}", stage="align", error="AlignError")
    yield at(20, "image_retried", image_id="x")
    yield at(50_000, "run_begun", to_do=images, before=images + len(range(0, images, 10)), command="run")
    yield at(50_001, "workers", workers=16)
    for i in range(images):
        yield at(50_010 + i, "image_done", image_id=f"second {i}")
    yield at(50_200, "image_failed", image_id="y", stage="read", error="ReadError")
    yield at(50_300, "run_ended", reason="finished")


def test_times_count_from_the_first_event() -> None:
    """Images, failures by cause, workers, drivers, and what had to be tried again."""
    course = read_course(campaign())
    assert course is not None
    assert len(course.done) == 200
    assert (course.done[0, 0], course.done[-1, 0]) == (10, 50_109)
    assert standing(course) == (200, {"align: AlignError": 10, "read: ReadError": 1})
    np.testing.assert_array_equal(course.drivers, [[0, 109], [50_000, 50_300]])
    np.testing.assert_array_equal(course.workers[:, 1], [0, 8, 0, 0, 16, 0])
    assert course.workers[2, 0] == 109
    assert course.at_work == 409
    assert course.trouble == {"image_retried": 1}


def standing(course):
    """Images done, and failed by cause, at the end."""
    failed = {cause: changes[:, 1].sum() for cause, changes in course.failed.items()}
    return course.done[:, 1].sum(), {cause: n for cause, n in failed.items() if n}


def test_each_image_counts_once_however_often_it_is_done() -> None:
    """Results taken back and made again, a damaged one within a campaign, events that a killed driver did not write."""
    events = [at(0, "run_begun", before=0, to_do=6, command="run")]
    events += [at(1 + i, "image_done", image_id=str(i)) for i in (0, 1, 1, 2)]
    events += [at(10, "run_begun", before=4, to_do=2, command="run"), at(11, "image_done", image_id="4")]
    events += [at(20, "run_begun", before=0, to_do=6, command="run")]
    events += [at(21 + i, "image_done", image_id=str(i)) for i in range(6)]
    course = read_course(events)
    assert course is not None
    counts = dict(zip(course.done[:, 0], np.cumsum(course.done[:, 1]), strict=True))
    assert course_section(course)["fell"]
    assert counts == {1: 1, 2: 2, 3: 3, 10: 4, 11: 5, 20: 0, 21: 1, 22: 2, 23: 3, 24: 4, 25: 5, 26: 6}


def test_a_failure_stands_until_its_image_fails_otherwise_or_is_done() -> None:
    """Tried again in vain it counts once; a run that goes on after it counts what is done without it."""
    failed = {"image_id": "x", "stage": "align", "error": "AlignError"}
    events = [at(0, "run_begun", before=0, to_do=3, command="run"), at(1, "image_done", image_id="a")]
    events += [at(2, "image_failed", image_id="x", stage="read", error="ReadError")]
    for seconds in (10, 20):
        events += [at(seconds, "run_begun", before=0, to_do=1, command="retry")]
        events += [at(seconds + 1, "image_failed", **failed)]
    course = read_course(events)
    assert course is not None
    assert standing(course) == (1, {"align: AlignError": 1})
    events += [at(30, "run_begun", before=2, to_do=1, command="run"), at(31, "image_done", image_id="b")]
    course = read_course(events)
    assert course is not None
    assert standing(course) == (2, {"align: AlignError": 1})
    events += [at(40, "run_begun", before=0, to_do=1, command="retry"), at(41, "image_done", image_id="x")]
    course = read_course(events)
    assert course is not None
    assert standing(course) == (3, {})


def test_failures_that_were_taken_back_are_not_taken_from_what_is_done() -> None:
    """Of a failed image with another row now the driver tells by doing it."""
    events = [at(0, "run_begun", before=0, to_do=4, command="run")]
    events += [at(1, "image_done", image_id="a"), at(2, "image_done", image_id="b")]
    events += [at(3, "image_failed", image_id=name, stage="read", error="ReadError") for name in "xy"]
    events += [at(10, "run_begun", before=3, to_do=1, command="run"), at(11, "image_done", image_id="x")]
    course = read_course(events)
    assert course is not None
    assert standing(course) == (3, {"read: ReadError": 1})


def test_without_events_there_is_no_course() -> None:
    """Nor where none of them can be dated."""
    assert read_course([]) is None
    assert read_course([{"time": "yesterday", "event": "image_done"}]) is None


def test_the_section_says_it_in_words_and_a_drawing() -> None:
    """When it began, how long there was work, by how many drivers; a curve, causes, workers."""
    course = read_course(campaign())
    assert course is not None
    section = course_section(course)
    assert section["begun"] == "2026-11-01 12:00 UTC"
    assert (section["drivers"], section["at_work"], section["in_all"]) == (2, "6 min 49 s", "13 h 58 min")
    assert not section["fell"]
    assert section["trouble"] == ["1 tried again"]
    for word in ("images done", "images failed", "workers", "align: AlignError", "hours since the run began"):
        assert word in section["svg"]
    assert "#0101" not in section["svg"]


@pytest.mark.parametrize("images", [0, 1, 50_000])
def test_a_drawing_is_small_whatever_the_run(images: int) -> None:
    """Of a long run some points are drawn, of a run that has just begun what there is."""
    course = read_course(campaign(images))
    assert course is not None
    svg = draw_course(course)
    assert len(svg) < 120_000
    assert re.match(r'<svg role="img" aria-label="Images finished over time"', svg)
