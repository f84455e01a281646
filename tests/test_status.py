"""What is said of how far a search is."""

from __future__ import annotations

from typing import Any

from helpers_records import front_of, make_candidate

from autocompress.status import SearchStatus


def status(**changes: Any) -> SearchStatus:
    front = front_of([make_candidate(n, accuracy=0.80 + n / 100, ratio=0.2 + n / 10) for n in range(5)])
    known = {"done": 12, "total": 40, "failed": 1, "stopped": 3, "front": front, "gain": 1.234, "seconds_each": 2.5}
    return SearchStatus(**{**known, **changes})


def test_a_status_says_everything_on_one_line() -> None:
    assert status().words() == (
        "12/40 candidates, 1 failed, 3 stopped early, 5 on the front, hypervolume 1.23x the uniform plans', "
        "2.5 s each, 70 s left"
    )


def test_a_status_without_uniform_plans_says_nothing_of_them() -> None:
    words = status(gain=None).words()
    assert "hypervolume" not in words
    assert words.startswith("12/40 candidates, 1 failed, 3 stopped early, 5 on the front, 2.5 s each")
    assert "\n" not in words


def test_what_is_left_is_at_the_present_speed() -> None:
    assert status().seconds_left == 28 * 2.5
    assert status(done=40).seconds_left == 0


def test_what_comes_after_the_last_candidate_stands_in_place_of_the_time_that_is_left() -> None:
    words = status(done=40, stage="timing the front anew").words()
    assert words.endswith("hypervolume 1.23x the uniform plans', timing the front anew")


def test_training_that_is_to_come_is_said_beside_the_time_that_is_left() -> None:
    assert status(untrained=1).words().endswith("70 s left, training of a student apart")
    assert status(untrained=3).words().endswith("70 s left, training of 3 students apart")
