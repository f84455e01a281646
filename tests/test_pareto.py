"""Dominance against brute force, hypervolume against slicing, and the rules by which a point is picked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from helpers_records import make_candidate, make_reference

from autocompress.errors import ConfigError, NoFeasiblePointError
from autocompress.pareto import Front, costs, hypervolume, nondominated
from autocompress.records import Candidate

ALL = ("accuracy", "size_bytes", "latency")


def dominated_by_some(points: np.ndarray, row: int) -> bool:
    others = np.all(points <= points[row], axis=1) & np.any(points < points[row], axis=1)
    return bool(others.any())


def random_points(seed: int) -> np.ndarray:
    """Return up to 60 points in 2 or 3 objectives; every other seed on a coarse grid, so that values tie."""
    rng = np.random.default_rng(seed)
    points = rng.random((rng.integers(1, 61), rng.integers(2, 4)))
    return np.round(points * 4) if seed % 2 else points


@pytest.mark.parametrize("seed", range(60))
def test_nondominated_agrees_with_brute_force(seed: int) -> None:
    points = random_points(seed)
    mask = nondominated(points)
    assert mask.shape == (len(points),)
    for row, kept in enumerate(mask):
        first = not any(np.array_equal(points[row], earlier) for earlier in points[:row])
        assert kept == (first and not dominated_by_some(points, row))


@pytest.mark.parametrize("seed", range(20))
def test_every_point_is_on_the_front_or_beaten_by_one_that_is(seed: int) -> None:
    points = random_points(seed)
    front = points[nondominated(points)]
    for point in points:
        assert np.any(np.all(front <= point, axis=1))


def test_no_points_have_no_front_and_no_volume() -> None:
    assert nondominated(np.zeros((0, 3))).shape == (0,)
    assert hypervolume(np.zeros((0, 3)), (1, 1, 1)) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_hypervolume_in_two_objectives_is_the_area_of_the_staircase(seed: int) -> None:
    points = np.random.default_rng(seed).random((15, 2)) * 1.3
    edges = np.unique(np.append(points[:, 0], 1.0))
    area = 0.0
    for left, right in itertools.pairwise(edges):
        if right <= 1:
            lowest = points[points[:, 0] <= left, 1].min()
            area += (right - left) * max(0.0, 1 - lowest)
    assert hypervolume(points, (1, 1)) == pytest.approx(area)


def test_hypervolume_in_three_objectives_counts_overlap_once() -> None:
    points = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.9, 0.9, 0.9], [2.0, 0.0, 0.0]])
    # Two boxes of 1/4 that share 1/8; the third lies within them and the last beyond the reference.
    assert hypervolume(points, (1, 1, 1)) == pytest.approx(0.25 + 0.25 - 0.125)


@pytest.mark.parametrize("seed", range(10))
def test_another_point_never_lowers_the_hypervolume(seed: int) -> None:
    points = np.random.default_rng(seed).random((20, 3))
    volumes = [hypervolume(points[:count], (1, 1, 1)) for count in range(1, 21)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(volumes))


def test_costs_are_all_to_be_minimised() -> None:
    candidate = make_candidate(0, accuracy=0.8, size_bytes=123, ratio=0.25)
    assert costs([candidate], ALL).tolist() == [[-0.8, 123.0, 0.25]]
    assert costs([candidate], ("latency", "accuracy")).tolist() == [[0.25, -0.8]]
    assert costs([], ALL).shape == (0, 3)


def random_candidates(seed: int) -> list[Candidate]:
    rng = np.random.default_rng(seed)
    return [
        make_candidate(
            number,
            accuracy=round(float(rng.uniform(0.6, 0.9)), 2),
            size_bytes=int(rng.integers(10, 30)) * 1_000_000,
            ratio=round(float(rng.uniform(0.1, 1.0)), 1),
            state="COMPLETE" if rng.random() < 0.8 else "FAIL",
            feasible=bool(rng.random() < 0.8),
        )
        for number in range(int(rng.integers(1, 40)))
    ]


@pytest.mark.parametrize("seed", range(30))
def test_a_front_holds_the_usable_candidates_that_no_other_dominates(seed: int) -> None:
    candidates = random_candidates(seed)
    usable = [c for c in candidates if c.state == "COMPLETE" and c.feasible]
    points = costs(usable, ALL)
    wanted = {tuple(points[row]) for row in range(len(usable)) if not dominated_by_some(points, row)}
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
        "pick: no point is feasible; the nearest is trial 2: accuracy drop 0.01 (limit 0.015); "
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
    with pytest.raises(ConfigError, match="prefer must be one of knee, latency, size, accuracy, got 'speed'"):
        three_points().pick(prefer="speed")


def test_a_trial_is_found_by_its_number() -> None:
    assert three_points().trial(2).number == 2


def test_an_unknown_trial_number_names_the_nearest() -> None:
    with pytest.raises(NoFeasiblePointError) as caught:
        three_points().trial(40)
    assert str(caught.value) == "trial 40: not on the front; the nearest is trial 3 (the front: 1, 2, 3)"
