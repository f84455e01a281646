"""Seconds by stage: added up, counted when a stage fails, and apart from what they began with."""

from __future__ import annotations

import pytest

from autocompress import stopwatch
from autocompress.stopwatch import WAITING, Stopwatch


class Clock:
    """Stands in for the clock; time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch.time, "perf_counter", clock)
    return clock


def test_seconds_of_a_stage_add_up(clock: Clock) -> None:
    watch = Stopwatch()
    for seconds in (2.0, 3.0):
        with watch("build"):
            clock.now += seconds
        clock.now += 50
    with watch("load"):
        pass
    assert watch.seconds == {"build": 5.0, "load": 0.0}


def test_a_stage_that_fails_is_counted(clock: Clock) -> None:
    watch = Stopwatch()

    def fail() -> None:
        with watch("build"):
            clock.now += 4
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert watch.seconds == {"build": 4.0}


def test_a_stage_within_another_counts_for_both(clock: Clock) -> None:
    watch = Stopwatch()
    with watch("all"):
        clock.now += 1
        with watch("build"):
            clock.now += 2
    assert watch.seconds == {"all": 3.0, "build": 2.0}


def test_it_goes_on_from_seconds_that_it_leaves_alone(clock: Clock) -> None:
    before = {"build": 1.0}
    watch = Stopwatch(before)
    with watch("build"):
        clock.now += 2
    assert (before, watch.seconds) == ({"build": 1.0}, {"build": 3.0})


def test_what_is_waited_in_a_stage_is_told_apart(clock: Clock) -> None:
    waited = 7.0
    watch = Stopwatch({"build": 1.0}, waited=lambda: waited)
    for stage, turn in (("build", 0.0), ("latency", 2.0), ("latency", 0.5)):
        with watch(stage):
            clock.now += 3
            waited += turn
    assert watch.seconds == {"build": 4.0, "latency": 3.5, WAITING: 2.5}
