"""Who is tried when: every image ends once, nobody is blamed for another, and counts survive the driver."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from batchproc.distribute.attempts import Attempts, Mishap
from tests import _runs

MISHAPS = list(Mishap)


def drain(attempts: Attempts, became, *, size=1, now=0.0):
    """Try until all have ended; `became(entry, trial)` is None for an end, or a mishap. Returns trials and ends."""
    trials, ended = [], {}
    while not attempts.finished:
        trial = attempts.take(now, size)
        if trial is None:
            now += attempts.wait_s(now) or 0.0
            continue
        trials.append(trial)
        for entry in trial.entries:
            mishap = became(entry, trial)
            if mishap is None:
                attempts.end(entry.image_id)
                ended[entry.image_id] = "done"
            elif attempts.mishap(entry, mishap, now):
                ended[entry.image_id] = mishap
    return trials, ended


def test_images_go_out_in_order_and_together():
    """As many to a trial as are asked for; the last trial has the rest."""
    trials, ended = drain(Attempts(_runs.entries(*"abcde")), lambda entry, trial: None, size=2)
    assert [[entry.image_id for entry in trial.entries] for trial in trials] == [["a", "b"], ["c", "d"], ["e"]]
    assert set(ended.values()) == {"done"}


def test_what_is_lost_together_comes_again_one_by_one():
    """A worker that is lost with several images is no mark against any of them."""
    attempts = Attempts(_runs.entries(*"abc"))
    together = attempts.take(0.0, 3)
    for entry in together.entries:
        assert not attempts.mishap(entry, Mishap.LOST, 0.0)
    assert attempts.record() == {}
    trials, _ = drain(attempts, lambda entry, trial: None, size=3)
    assert [len(trial.entries) for trial in trials] == [1, 1, 1]
    assert not any(trial.alone for trial in trials)


def test_an_image_that_kills_is_tried_alone_and_given_up_after_three_deaths():
    """Twice in the stream, which may be anybody's fault; then three times alone, which is its own."""

    def became(entry, trial):
        return Mishap.CRASHED if trial.alone else Mishap.LOST

    trials, ended = drain(Attempts(_runs.entries("a")), became)
    assert [trial.alone for trial in trials] == [False, False, True, True, True]
    assert ended == {"a": Mishap.CRASHED}


def test_lost_nodes_blame_nobody():
    """An image whose worker is lost nine times though it was alone, and then is done, is done."""
    times = iter(range(100))
    trials, ended = drain(Attempts(_runs.entries("a")), lambda e, t: Mishap.LOST if next(times) < 11 else None)
    assert ended == {"a": "done"}
    assert len(trials) == 12


def test_a_limit_is_exceeded_twice_before_it_counts():
    """Once in the stream and once alone, or twice alone."""
    trials, ended = drain(Attempts(_runs.entries("a")), lambda e, t: Mishap.OVERRAN)
    assert [trial.alone for trial in trials] == [False, True]
    assert ended == {"a": Mishap.OVERRAN}
    hanging = drain(Attempts(_runs.entries("a")), lambda e, t: Mishap.OVERRAN if t.alone else Mishap.LOST)
    assert [trial.alone for trial in hanging[0]] == [False, False, True, True]


def test_errors_that_heal_wait_longer_each_time():
    """Ten seconds, forty, 160; the fourth is the end. Others go on meanwhile."""
    attempts = Attempts(_runs.entries("a", "b"))
    now, waits = 0.0, []
    while True:
        (entry,) = attempts.take(now).entries
        if entry.image_id == "b":
            attempts.end("b")
            continue
        if attempts.mishap(entry, Mishap.TRANSIENT, now):
            break
        if not waits:
            assert attempts.take(now).entries[0].image_id == "b"
            attempts.end("b")
        assert attempts.take(now) is None
        waits.append(attempts.wait_s(now))
        now += waits[-1]
    assert waits == [10.0, 40.0, 160.0]
    assert attempts.finished


def test_counts_survive_the_driver():
    """What one driver has learnt of an image, the next one begins with."""
    first = Attempts(_runs.entries("a", "b"))
    for _ in range(2):
        first.mishap(first.take(0.0).entries[0], Mishap.LOST, 0.0)
    record = json.loads(json.dumps(first.record()))
    assert record.keys() == {"a"}
    second = Attempts(_runs.entries("c", "a", "b"), Attempts.recorded(record))
    trials, _ = drain(second, lambda entry, trial: None, size=3)
    assert {tuple(e.image_id for e in trial.entries): trial.alone for trial in trials} == {
        ("c", "b"): False,
        ("a",): True,
    }
    assert second.record() == {}


@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(st.sampled_from([None, None, None, *MISHAPS]), max_size=200),
    st.randoms(use_true_random=False),
)
def test_every_image_ends_once_and_is_nowhere_twice(n, size, window, luck, random):
    """Whatever happens, in whatever order: one end an image, one place at a time, and no end without its reasons."""
    attempts = Attempts(_runs.entries(*(f"i{k}" for k in range(n))))
    luck = iter(luck)
    under_way, ended, seen = [], {}, {}
    now = 0.0
    while not attempts.finished:
        while len(under_way) < window and (trial := attempts.take(now, size)) is not None:
            assert len(trial.entries) <= size
            assert not trial.alone or len(trial.entries) == 1
            for entry in trial.entries:
                assert entry.image_id not in ended
                assert all(entry not in other.entries for other in under_way)
            under_way.append(trial)
        assert attempts.under_way == sum(len(trial.entries) for trial in under_way)
        if not under_way:
            now += attempts.wait_s(now) or 0.0
            continue
        trial = under_way.pop(random.randrange(len(under_way)))
        for entry in trial.entries:
            mishap = next(luck, None)
            if mishap is Mishap.CRASHED and not trial.alone:
                mishap = Mishap.LOST
            if mishap is None:
                attempts.end(entry.image_id)
                ended[entry.image_id] = "done"
                continue
            seen.setdefault(entry.image_id, []).append((mishap, trial.alone))
            if attempts.mishap(entry, mishap, now):
                ended[entry.image_id] = mishap
    assert len(ended) == n
    for image_id, end in ended.items():
        happened = seen.get(image_id, [])
        if end == "done":
            continue
        crashes = happened.count((Mishap.CRASHED, True))
        overran = sum(mishap is Mishap.OVERRAN for mishap, _ in happened)
        transient = sum(mishap is Mishap.TRANSIENT for mishap, _ in happened)
        assert crashes >= 3 or overran >= 2 or transient >= 4 or happened.count((Mishap.LOST, True)) >= 10
    assert attempts.record() == {}
