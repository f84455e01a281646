"""The front, and the rules by which a point is picked from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from helpers_records import make_candidate, make_reference, random_candidates

from autocompress.errors import ConfigError, NoFeasiblePointError
from autocompress.front import Front, Limits, Preference
from autocompress.pareto import costs
from autocompress.records import Candidate
from autocompress.report.tables import trade_words

ALL = ("accuracy", "size_bytes", "latency")


@pytest.mark.parametrize("seed", range(30))
def test_a_front_holds_the_usable_candidates_that_no_other_dominates(seed: int) -> None:
    candidates = random_candidates(seed)
    usable = [c for c in candidates if c.state == "COMPLETE" and c.feasible]
    points = costs(usable, ALL)
    wanted = {tuple(row) for row in points if not np.any(np.all(points <= row, axis=1) & np.any(points < row, axis=1))}
    front = Front.of(candidates, make_reference(), ALL)
    found = [tuple(row) for row in costs(front.points, ALL)]
    assert set(found) == wanted
    assert len(found) == len(wanted) == len(front)
    accuracies = [c.score.accuracy for c in front.points]
    assert accuracies == sorted(accuracies, reverse=True)


@pytest.mark.parametrize("seed", range(30))
def test_the_order_of_candidates_does_not_change_the_front(seed: int) -> None:
    candidates = random_candidates(seed)
    shuffled = [candidates[i] for i in np.random.default_rng(seed).permutation(len(candidates))]
    one, other = (Front.of(c, make_reference(), ALL) for c in (candidates, shuffled))
    assert costs(one.points, ALL).tolist() == costs(other.points, ALL).tolist()


def test_a_front_judges_by_its_objectives_only() -> None:
    slow = make_candidate(0, accuracy=0.85, size_bytes=10_000_000, ratio=0.9)
    fast = make_candidate(1, accuracy=0.84, size_bytes=20_000_000, ratio=0.1)
    assert [c.number for c in Front.of([slow, fast], make_reference(), ALL).points] == [0, 1]
    assert [c.number for c in Front.of([slow, fast], make_reference(), ("accuracy", "size_bytes")).points] == [0]


def test_equal_candidates_stand_on_the_front_once() -> None:
    front = Front.of([make_candidate(4), make_candidate(2), make_candidate(9)], make_reference(), ALL)
    assert [c.number for c in front.points] == [4]


def three_points() -> Front:
    """Return a front of 1: accurate and large, 2: balanced, 3: tiny and fast; the reference has 88 %, 90 MB, 16 ms."""
    return Front.of(
        [
            make_candidate(1, accuracy=0.88, size_bytes=30_000_000, ratio=0.6),
            make_candidate(2, accuracy=0.87, size_bytes=17_000_000, ratio=0.3),
            make_candidate(3, accuracy=0.80, size_bytes=15_000_000, ratio=0.2),
        ],
        make_reference(),
        ALL,
    )


@pytest.mark.parametrize(("prefer", "number"), [("accuracy", 1), ("knee", 2), ("latency", 3), ("size", 3)])
def test_pick_follows_the_preference(prefer: str, number: int) -> None:
    assert three_points().pick(prefer=prefer).number == number


@pytest.mark.parametrize(
    ("limits", "number"),
    [
        ({"max_accuracy_drop": 0.05}, 2),
        ({"max_accuracy_drop": 0.01}, 2),  # 0.88 - 0.87 is a little more than 0.01 in floating point
        ({"max_accuracy_drop": 0.0}, 1),
        ({"max_accuracy_drop": 0.05, "max_size_mb": 30.0}, 2),
        ({"max_size_mb": 15.0}, 3),
    ],
)
def test_pick_keeps_to_the_limits(limits: dict[str, float], number: int) -> None:
    assert three_points().pick(prefer="latency", **limits).number == number


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("prefer", "key"),
    [
        ("latency", lambda c: c.score.latency_ratio),
        ("size", lambda c: c.score.size_bytes),
        ("accuracy", lambda c: -c.score.accuracy),
    ],
)
def test_a_pick_is_the_best_feasible_point(seed: int, prefer: str, key: Callable[[Candidate], float]) -> None:
    front = Front.of(random_candidates(seed), make_reference(), ALL)
    feasible = [c for c in front.points if c.score.size_bytes <= 20_000_000 and c.score.latency_ratio <= 0.7]
    limits = {"max_size_mb": 20, "max_latency_ratio": 0.7}
    if feasible:
        assert key(front.pick(prefer=prefer, **limits)) == min(key(c) for c in feasible)
    else:
        with pytest.raises(NoFeasiblePointError):
            front.pick(prefer=prefer, **limits)


def test_the_knee_does_not_depend_on_units() -> None:
    front = three_points()
    scaled = [
        dataclasses.replace(c, measurement=dataclasses.replace(c.score, size_bytes=c.score.size_bytes // 1000))
        for c in front.points
    ]
    assert Front.of(scaled, make_reference(), ALL).pick().number == front.pick().number


def test_the_knee_of_a_single_point_is_that_point() -> None:
    assert Front.of([make_candidate(5)], make_reference(), ALL).pick().number == 5


def test_infeasible_limits_name_the_nearest_point_and_what_it_misses() -> None:
    with pytest.raises(NoFeasiblePointError) as caught:
        three_points().pick(max_size_mb=14)
    assert str(caught.value) == "pick: no point is feasible; the nearest is trial 3: size in MB 15 (limit 14)"
    assert caught.value.exit_code == 1
    with pytest.raises(NoFeasiblePointError) as caught:
        three_points().pick(max_latency_ms=4.6, max_accuracy_drop=0.015)
    assert str(caught.value) == (
        "pick: no point is feasible; the nearest is trial 2: points of accuracy lost 1 (limit 1.5); "
        "latency in ms 4.8 (limit 4.6)"
    )


def test_picking_from_an_empty_front_says_so() -> None:
    front = Front.of([make_candidate(0, state="FAIL"), make_candidate(1, feasible=False)], make_reference(), ALL)
    assert len(front) == 0
    with pytest.raises(NoFeasiblePointError, match="the front is empty; no candidate completed within the constraints"):
        front.pick()
    with pytest.raises(NoFeasiblePointError, match="trial 0: the front is empty"):
        front.trial(0)


def test_an_unknown_preference_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="prefer must be one of knee, latency, size, accuracy, divergence, got 'speed'"
    ):
        three_points().pick(prefer="speed")


def test_a_trial_is_found_by_its_number() -> None:
    assert three_points().trial(2).number == 2


def test_an_unknown_trial_number_names_the_nearest() -> None:
    with pytest.raises(NoFeasiblePointError) as caught:
        three_points().trial(40)
    assert str(caught.value) == "trial 40: not on the front; the nearest is trial 3 (the front: 1, 2, 3)"


def divergent(candidate: Candidate, divergence: float | None) -> Candidate:
    return dataclasses.replace(candidate, measurement=dataclasses.replace(candidate.score, divergence=divergence))


class TestDivergence:
    def front(self) -> Front:
        points = [divergent(c, n) for c, n in zip(three_points().points, (0.01, 0.05, 0.3), strict=True)]
        beaten = divergent(make_candidate(4, accuracy=0.865, size_bytes=18_000_000, ratio=0.31), 0.02)
        broken = divergent(make_candidate(5, ratio=0.1, feasible=False), 0.0)
        return Front.of(points, make_reference(), ALL, nearby=[points[0], beaten, broken])

    def test_what_no_other_beats_by_it_is_nearby(self) -> None:
        assert [c.number for c in self.front().nearby] == [4], (
            "neither what is on the front nor what breaks a constraint"
        )

    def test_the_least_divergent_is_picked_of_what_is_nearby_too(self) -> None:
        found = self.front().choose(Limits(max_latency_ratio=0.4), "divergence")
        assert found.point.number == 4
        assert found.reason == (
            "the least divergent of the 3 points within the limits (latency ratio 0.31 <= 0.4), of 4 on the front, by "
            "accuracy or by divergence; its latency was timed once, during the search"
        )
        assert self.front().pick(prefer="divergence").number == 1
        timed = dataclasses.replace(found.point, measurement=dataclasses.replace(found.point.score, confirmed=True))
        again = Front.of(self.front().points, make_reference(), ALL, nearby=[timed])
        assert "timed once" not in again.choose(Limits(max_latency_ratio=0.4), "divergence").reason
        assert self.front().pick(prefer="accuracy", max_latency_ratio=0.4).number == 2
        with pytest.raises(NoFeasiblePointError, match="the nearest is trial 3: size in MB 15"):
            self.front().pick(prefer="divergence", max_size_mb=14)

    def test_studies_that_did_not_take_it_say_so(self) -> None:
        with pytest.raises(NoFeasiblePointError, match="of a version that did not take divergences"):
            three_points().pick(prefer="divergence")


class TestReasons:
    def test_the_knee_is_nearest_to_the_best_of_all(self) -> None:
        assert three_points().choose(Limits()).reason == (
            "the knee of the 3 points of the front: nearest to the best accuracy, size and speed, each scaled to their "
            "range"
        )

    def test_limits_are_given_with_what_the_point_has(self) -> None:
        found = three_points().choose(Limits(max_accuracy_drop=0.05, max_size_mb=40), "latency")
        assert found.point.number == 2
        assert found.reason == (
            "the fastest of the 2 points within the limits (points of accuracy lost 1 <= 5, size in MB 17 <= 40), of 3 "
            "on the front"
        )

    def test_where_the_limits_break_none_it_says_so(self) -> None:
        found = three_points().choose(Limits(max_size_mb=1000), "latency")
        assert found.reason.startswith("the fastest of the 3 points of the front, all within the limits (size in MB ")

    def test_where_there_is_no_choice_it_says_so(self) -> None:
        only = three_points().choose(Limits(max_size_mb=15), "accuracy")
        assert only.reason == "the only one of the 3 points of the front within the limits (size in MB 15 <= 15)"
        assert Front.of([make_candidate(5)], make_reference(), ALL).choose(Limits()).reason == (
            "the only point of the front"
        )

    def test_what_is_asked_for_by_its_number_says_where_it_stands(self) -> None:
        front = three_points()
        said = "asked for by its number"
        assert front.asked_for(front.trial(3)).reason == said
        beaten = make_candidate(9, accuracy=0.86, size_bytes=18_000_000, ratio=0.4)
        expected = f"{said}; not on the front, where trial 2 is at least as good in every objective"
        assert front.asked_for(beaten).reason == expected
        assert {near.better for near in front.asked_for(beaten).neighbours} == {"accuracy", "size_bytes", "latency"}
        alike = make_candidate(9, accuracy=0.869, size_bytes=17_000_000, ratio=0.299)
        expected = f"{said}; not on the front, where trial 2 is as fast as far as timings tell, and as good in all else"
        assert alike not in Front.of([*front.points, alike], make_reference(), ALL).points
        assert front.asked_for(alike).reason == expected
        assert front.asked_for(make_candidate(9, feasible=False)).reason == f"{said}; it breaks a constraint"
        failed = front.asked_for(make_candidate(9, state="FAIL"))
        assert (failed.reason, failed.neighbours) == (f"{said}; it has no measurement", ())

    @pytest.mark.parametrize("limit", [float("nan"), -1.0])
    def test_a_limit_that_is_no_size_is_kept_by_none(self, limit: float) -> None:
        with pytest.raises(NoFeasiblePointError, match="the nearest is trial"):
            three_points().choose(Limits(max_size_mb=limit))


class TestNeighbours:
    def test_each_is_better_in_one_thing(self) -> None:
        found = three_points().choose(Limits()).neighbours
        assert [(near.better, near.point.number) for near in found] == [
            ("accuracy", 1),
            ("size_bytes", 3),
            ("latency", 3),
        ]

    def test_what_breaks_a_limit_is_told_as_such(self) -> None:
        found = three_points().choose(Limits(max_accuracy_drop=0.02)).neighbours
        lost = {near.point.number: three_points().reference.accuracy - near.point.score.accuracy for near in found}
        assert {near.point.number: near.beyond for near in found} == {n: drop > 0.02 for n, drop in lost.items()}
        assert {True, False} == {near.beyond for near in found}

    def test_who_is_best_in_something_has_none_there(self) -> None:
        assert [near.better for near in three_points().neighbours(three_points().trial(1))] == ["size_bytes", "latency"]
        only = Front.of([make_candidate(5)], make_reference(), ALL)
        assert only.neighbours(only.trial(5)) == ()

    @pytest.mark.parametrize("seed", range(20))
    def test_none_gives_up_less_for_it(self, seed: int) -> None:
        front = Front.of(random_candidates(seed), make_reference(), ALL)
        rows = costs(front.points, ALL)
        span = np.where(np.ptp(rows, axis=0) > 0, np.ptp(rows, axis=0), 1)
        numbers = [c.number for c in front.points]
        for place, point in enumerate(front.points):
            lost = np.linalg.norm(np.maximum((rows - rows[place]) / span, 0), axis=1)
            found = {near.better: numbers.index(near.point.number) for near in front.neighbours(point)}
            for column, name in enumerate(ALL):
                better = np.flatnonzero(rows[:, column] < rows[place, column])
                assert (name in found) == bool(len(better))
                if len(better):
                    assert found[name] in better
                    assert lost[found[name]] == pytest.approx(lost[better].min())


def test_a_trade_is_said_in_factors_and_points() -> None:
    one, two, three = (c.score for c in three_points().points)
    assert trade_words(two, one) == "+1.0 points of accuracy (within the interval), 2.00x slower, 1.76x larger"
    assert trade_words(one, three) == "-8.0 points of accuracy, 3.00x faster, 2.00x smaller"
    assert trade_words(one, one) == "the same"
    sizes = (10**8, 2 * 10**8)
    small, large = (dataclasses.replace(one, peak_memory_bytes=n, divergence=n / 1e9) for n in sizes)
    assert trade_words(large, small, "peak_memory") == "2.00x less memory"
    assert trade_words(large, small, "divergence") == "divergence 0.1 and not 0.2"
    assert trade_words(large, small, "latency") == "the same"


def test_recommended_are_the_fastest_and_the_smallest_that_lose_little_and_the_knee() -> None:
    points = [
        make_candidate(0, accuracy=0.878, ratio=0.5, size_bytes=10_000_000),
        make_candidate(1, accuracy=0.872, ratio=0.3, size_bytes=20_000_000),
        make_candidate(2, accuracy=0.80, ratio=0.05, size_bytes=1_000_000),
    ]
    front = Front.of(points, make_reference(), ALL)
    found = {name: point.number for names, point in front.recommended() for name in names}
    assert (found["fastest"], found["smallest"]) == (1, 0)
    assert found["knee"] == front.pick(prefer="knee").number
    assert len({point.number for _, point in front.recommended()}) == len(front.recommended()), "each once"


@pytest.mark.parametrize(
    ("objectives", "names"),
    [
        (("accuracy", "size_bytes"), {"smallest", "knee"}),
        (("accuracy", "latency"), {"fastest", "knee"}),
        (("accuracy", "peak_memory"), {"knee"}),
    ],
)
def test_what_nobody_judged_by_is_not_recommended(objectives: tuple[str, ...], names: set[str]) -> None:
    points = [make_candidate(n, accuracy=0.88 - n / 1000, size_bytes=10**7 - n, ratio=0.5 - n / 100) for n in range(3)]
    points = [
        dataclasses.replace(c, measurement=dataclasses.replace(c.score, peak_memory_bytes=c.score.size_bytes))
        for c in points
    ]
    front = Front.of(points, make_reference(), objectives)
    assert {name for found, _ in front.recommended() for name in found} == names


def test_equal_points_are_told_apart_by_what_else_they_have() -> None:
    points = [
        make_candidate(0, accuracy=0.87, ratio=0.5, size_bytes=10_000_000),
        make_candidate(1, accuracy=0.87, ratio=0.3, size_bytes=20_000_000),
        make_candidate(2, accuracy=0.86, ratio=0.3, size_bytes=10_000_000),
    ]
    front = Front.of(points, make_reference(), ALL)
    wishes: tuple[Preference, ...] = ("accuracy", "latency", "size")
    for wish, first in zip(wishes, (1, 1, 0), strict=True):
        assert front.pick(prefer=wish).number == front.ranked(wish)[0].number == first


def test_where_no_point_is_close_only_the_knee_is_recommended() -> None:
    front = Front.of([make_candidate(0, accuracy=0.7)], make_reference(), ALL)
    assert [(names, point.number) for names, point in front.recommended()] == [(["knee"], 0)]
    assert Front.of([], make_reference(), ALL).recommended() == []
