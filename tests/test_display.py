"""What a person sees while a run is at work."""

from __future__ import annotations

import io
import re

import pytest

from batchproc import display
from batchproc.display import Pace, bar, duration, pace, show, size


class Terminal(io.StringIO):
    """Standard error that is, or is not, a terminal."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        """As it was said."""
        return self._tty


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds on the clock of `show`, for the test to move on."""
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def work(clock: list[float], seconds: list[float]):
    """Items that take so long."""
    for i, s in enumerate(seconds):
        clock[0] += s
        yield i


def test_the_pace_is_that_of_the_last_minutes() -> None:
    """A campaign that was fast for a week and is slow now has the rate of now."""
    recent = Pace(window=600, start=0.0)
    now = 0.0
    for _ in range(200_000):
        now += 1
        recent.add(5, now)
    assert recent.rate(now) == pytest.approx(5, rel=0.01)
    for _ in range(200):
        now += 10
        recent.add(1, now)
    assert recent.rate(now) == pytest.approx(0.1, rel=0.05)
    assert len(recent._recent) < 700


def test_a_few_long_images_have_a_pace_too() -> None:
    """Where ten minutes see less than ten images, the last ten count; a stall shows."""
    recent = Pace(window=600, start=0.0)
    for i in range(1, 31):
        recent.add(1, i * 900.0)
    assert recent.rate(30 * 900.0) == pytest.approx(1 / 900, rel=0.01)
    assert recent.rate(40 * 900.0) < 0.6 / 900


def test_the_warming_up_is_soon_forgotten() -> None:
    """Compiling for a minute before the first image says nothing of the ten thousand that follow."""
    recent = Pace(start=0.0)
    for i in range(30):
        recent.add(1, 60.0 + i)
    assert recent.rate(89.0) == pytest.approx(1)


def test_the_pace_of_a_burst_is_finite() -> None:
    """Nothing finished is a rate of 0; all in one moment is a number."""
    recent = Pace(start=0.0)
    assert recent.rate(0.0) == 0
    recent.add(100, 0.0)
    assert recent.rate(10.0) == 10


def test_lines_say_how_far_how_fast_and_how_long_still(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a terminal: plain lines; what was done before counts as done and not as fast."""
    err = Terminal(False)
    monkeypatch.setattr("sys.stderr", err)
    items = show(work(clock, [2.0] * 50), 1050, "images", before=1000, note=lambda: "3 failed")
    assert list(items) == list(range(50))
    lines = err.getvalue().splitlines()
    assert lines[0] == "1005/1050 images, 30 a minute, 1 min 30 s left (3 failed)"
    assert lines[-1] == "1050/1050 images, 30 a minute in 1 min 40 s (3 failed)"
    assert "\r" not in err.getvalue()


def test_weeks_do_not_fill_a_log(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines come every ten seconds at first and every ten minutes after hours, with the time of day."""
    err = Terminal(False)
    monkeypatch.setattr("sys.stderr", err)
    week = 7 * 86400
    for _ in show(work(clock, [60.0] * (week // 60)), week // 60 + 1, "images"):
        pass
    lines = err.getvalue().splitlines()
    assert 900 < len(lines) < 1200
    assert re.match(r"\d\d-\d\d \d\d:\d\d \d+/10081 images, 1 a minute, ", lines[-1])


def test_a_terminal_has_a_bar(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal one line is drawn again and again, with rate, time left and failures."""
    err = Terminal(True)
    monkeypatch.setattr("sys.stderr", err)
    for _ in show(work(clock, [2.0] * 50), 1100, "images", before=1000, note=lambda: "3 failed"):
        pass
    last = err.getvalue().replace("\x1b[A", "").split("\r")[-1]
    assert "1050/1100 images" in last
    assert "30 a minute, 1 min 40 s left, 3 failed" in last


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is shown where nothing was asked for or nothing is left to do."""
    assert list(show(range(3), 3, "images", quiet=True)) == [0, 1, 2]
    assert list(show(range(0), 7, "images", before=7)) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.25, "3.2 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (9e5, "10 d 10 h")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    """Two units at most."""
    assert duration(seconds) == text


def test_numbers_are_readable() -> None:
    """Sizes, rates, and bars."""
    assert size(1.23e9) == "1.23 GB"
    assert pace(12.3) == "12.3 a second"
    assert pace(0.5) == "30 a minute"
    assert pace(0.001) == "3.6 an hour"
    assert bar(0.5, 4) == "[##..]"
    assert bar(0, 4) == "[....]"
    assert bar(2, 4) == "[####]"
