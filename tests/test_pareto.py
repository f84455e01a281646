"""Dominance against brute force, and hypervolume against slicing."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
from helpers_records import make_candidate, make_reference, random_candidates

from autocompress.errors import ConfigError
from autocompress.pareto import (
    Unbeaten,
    contenders,
    costs,
    hypervolume,
    nondominated,
    stands_for,
    told_apart,
    volume,
    volume_curve,
)
from autocompress.records import Z95, Candidate

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


# A model half as good as it can be in each of the three: accuracy between 60 % and 100 %, 45 of 90 MB, half the time.
HALFWAY = {"accuracy": 0.8, "size_bytes": 45_000_000, "ratio": 0.5}


def test_one_candidate_covers_the_box_between_itself_and_the_reference_point() -> None:
    assert volume([make_candidate(0, **HALFWAY)], make_reference(), 0.6) == pytest.approx(1 / 8)


def test_two_candidates_cover_what_they_share_once() -> None:
    wide = make_candidate(0, accuracy=0.8, size_bytes=45_000_000, ratio=0.25)
    deep = make_candidate(1, accuracy=0.9, size_bytes=45_000_000, ratio=0.5)
    # 3/4 x 1/2 x 1/2 and 1/2 x 1/2 x 3/4, of which 1/2 x 1/2 x 1/2 in common.
    assert volume([wide, deep], make_reference(), 0.6) == pytest.approx(3 / 16 + 3 / 16 - 1 / 8)


def test_a_perfect_model_nearly_fills_the_box() -> None:
    perfect = make_candidate(0, accuracy=1.0, size_bytes=1, ratio=1e-9)
    assert volume([perfect], make_reference(), 0.6) == pytest.approx(1)


@pytest.mark.parametrize(
    "worse",
    [
        pytest.param({"accuracy": 0.6}, id="guesses"),
        pytest.param({"accuracy": 0.3}, id="worse than guessing"),
        pytest.param({"size_bytes": 90_000_000}, id="as large as the reference"),
        pytest.param({"ratio": 1.0}, id="as slow as the reference"),
        pytest.param({"ratio": 1.4}, id="slower"),
        pytest.param({"feasible": False}, id="infeasible"),
        pytest.param({"state": "FAIL"}, id="failed"),
    ],
)
def test_what_is_no_better_than_the_reference_point_covers_nothing(worse: dict[str, object]) -> None:
    other = make_candidate(0, **(HALFWAY | worse))
    assert volume([other], make_reference(), 0.6) == 0.0
    both = [make_candidate(1, accuracy=0.7, size_bytes=45_000_000, ratio=0.5), other]
    assert volume_curve(both, make_reference(), 0.6) == pytest.approx([1 / 16, 1 / 16])


def test_a_candidate_that_is_not_complete_covers_nothing() -> None:
    unfinished = dataclasses.replace(make_candidate(0, **HALFWAY), state="RUNNING")
    assert volume([unfinished], make_reference(), 0.6) == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_the_volume_is_the_share_of_random_points_that_some_candidate_beats(seed: int) -> None:
    candidates = random_candidates(seed)
    drawn = np.random.default_rng(seed).random((20_000, 3))
    beaten = np.zeros(len(drawn), dtype=bool)
    for c in candidates:
        if c.state == "COMPLETE" and c.feasible:
            better = (c.score.accuracy >= 0.5 + 0.5 * drawn[:, 0]) & (c.score.size_bytes <= 90e6 * drawn[:, 1])
            beaten |= better & (c.score.latency_ratio <= drawn[:, 2])
    # Four standard deviations of a share of 20,000.
    assert volume(candidates, make_reference(), 0.5) == pytest.approx(beaten.mean(), abs=0.0145)


@pytest.mark.parametrize("seed", range(20))
def test_the_curve_is_the_volume_after_each_candidate(seed: int) -> None:
    candidates = random_candidates(seed)
    curve = volume_curve(candidates, make_reference(), 0.5)
    wanted = [volume(candidates[: n + 1], make_reference(), 0.5) for n in range(len(candidates))]
    assert curve == pytest.approx(wanted, abs=1e-12)
    assert all(a <= b for a, b in itertools.pairwise(curve)), "exactly, without rounding"


def test_no_candidate_has_no_volume() -> None:
    assert volume([], make_reference(), 0.5) == 0.0
    assert volume_curve([], make_reference(), 0.5) == []


def test_candidates_may_come_from_an_iterator() -> None:
    assert volume_curve(iter([make_candidate(0, **HALFWAY)]), make_reference(), 0.6) == pytest.approx([1 / 8])
    assert volume(iter([make_candidate(0, **HALFWAY)]), make_reference(), 0.6) == pytest.approx(1 / 8)


def test_rows_of_one_class_leave_nothing_to_gain() -> None:
    perfect = make_candidate(0, accuracy=1.0, ratio=0.1)
    assert volume([perfect], make_reference(), 1.0) == 0.0
    assert volume_curve([perfect], make_reference(), 1.0) == [0.0]


@pytest.mark.parametrize("majority", [-0.1, 1.1, float("nan")])
def test_a_majority_that_is_no_share_is_refused(majority: float) -> None:
    with pytest.raises(ConfigError, match="majority must be a share of the scored rows"):
        volume([make_candidate(0)], make_reference(), majority)
    with pytest.raises(ConfigError, match="majority"):
        volume_curve([make_candidate(0)], make_reference(), majority)


def test_the_curve_of_two_thousand_candidates_that_all_improve_takes_no_time() -> None:
    # Every one on the front: the worst case, in which every volume is computed anew.
    candidates = [
        make_candidate(n, accuracy=0.5 + 0.0002 * n, size_bytes=20_000_000 + 10_000 * n, ratio=0.9 - 0.0002 * (n % 50))
        for n in range(2000)
    ]
    start = time.perf_counter()
    curve = volume_curve(candidates, make_reference(), 0.4)
    assert time.perf_counter() - start < 3, "about 0.3 s on an idle core"
    assert curve[-1] == pytest.approx(volume(candidates, make_reference(), 0.4))


def deviating(number: int, ratio: float, deviation: float, *, accuracy: float = 0.8) -> Candidate:
    """Return a candidate whose latency has a standard deviation."""
    candidate = make_candidate(number, accuracy=accuracy, ratio=ratio)
    low, high = (ratio * math.exp(sign * Z95 * deviation) for sign in (-1, 1))
    score = dataclasses.replace(candidate.score, latency_ratio_low=low, latency_ratio_high=high)
    return dataclasses.replace(candidate, measurement=score)


@pytest.mark.parametrize("seed", range(20))
def test_of_points_that_timings_cannot_tell_apart_one_stands_for_the_others(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = [
        make_candidate(
            n,
            accuracy=round(float(rng.uniform(0.6, 0.9)), 2),
            size_bytes=int(rng.integers(10, 20)) * 1_000_000,
            ratio=float(rng.uniform(0.3, 0.36)),  # with standard deviations of 1 %
        )
        for n in range(60)
    ]
    points = costs(drawn, ALL)
    front = [c for c, kept in zip(drawn, nondominated(points), strict=True) if kept]
    stay = told_apart(front, ALL)
    apart = math.hypot(*2 * [drawn[0].score.latency_deviation])
    assert apart == pytest.approx(0.0144, abs=0.0001)

    def stand_for(candidate: Candidate) -> list[int]:
        own = costs([candidate], ALL)[0]
        as_good = np.all(costs(stay, ALL)[:, :2] <= own[:2], axis=1)
        as_fast = np.log(costs(stay, ALL)[:, 2] / own[2]) < apart
        return [c.number for c, stands in zip(stay, as_good & as_fast, strict=True) if stands]

    left_out = {c.number for c in front} - {c.number for c in stay}
    for candidate in front:
        found = stand_for(candidate)
        assert found if candidate.number in left_out else found == [candidate.number]
        by = stands_for(candidate, [c for c in stay if c is not candidate], ALL)
        assert (by is not None and by.number in found) == (candidate.number in left_out)
    assert [c.number for c in stay] == [c.number for c in front if c.number not in left_out], "in the same order"
    assert told_apart(front, ALL[:2]) == front, "nobody asked for latency"
    for objectives, among in ((ALL[:2], stay), (ALL, [])):
        assert stands_for(front[0], among, objectives) is None


def test_points_stand_for_others_only_within_what_timings_tell() -> None:
    # Each is a little faster than the one before, and a little less accurate: the first stands for the second alone.
    chain = [make_candidate(n, accuracy=0.8 - 0.01 * n, ratio=0.5 * 0.99**n) for n in range(6)]
    assert [c.number for c in told_apart(chain, ALL)] == [0, 2, 4]
    assert [c.number for c in told_apart(chain[::-1], ALL)] == [4, 2, 0]


class TestContenders:
    """The front's latencies have a standard deviation of 1 %, and none has what lacks less than its own."""

    FRONT = (make_candidate(0, accuracy=0.8, ratio=0.3), make_candidate(1, accuracy=0.9, ratio=0.5))

    def test_with_a_standard_deviation_less_they_would_be_faster_than_what_stands_for_them(self) -> None:
        others = [
            deviating(2, 0.32, 0.06),
            deviating(3, 0.297, 0.02),
            deviating(4, 0.303, 0.005),
            deviating(5, 0.6, 0.1, accuracy=0.85),
            deviating(6, 0.48, 0.1, accuracy=0.9),
            deviating(7, 0.55, 0.09, accuracy=0.9),
            deviating(8, 0.303, 0.03),
        ]
        found = contenders(self.FRONT, [*self.FRONT, *others], ALL)
        assert [c.number for c in found] == [6, 3, 8], "who has the least to gain comes first"

    def test_what_was_timed_with_care_does_not_count_nor_what_is_infeasible_or_failed(self) -> None:
        near = deviating(2, 0.297, 0.02)
        careful = dataclasses.replace(near, measurement=dataclasses.replace(near.score, confirmed=True))
        infeasible = dataclasses.replace(near, number=3, feasible=False)
        assert contenders(self.FRONT, [near], ALL) == [near]
        assert contenders(self.FRONT, [careful, infeasible, make_candidate(4, state="FAIL")], ALL) == []

    def test_without_latency_or_a_front_there_are_none(self) -> None:
        other = deviating(2, 0.297, 0.02)
        assert contenders(self.FRONT, [other], ("accuracy", "size_bytes")) == []
        assert contenders((), [other], ALL) == []


def test_who_lacks_an_objective_is_not_judged_by_it() -> None:
    known = {c.number: c for c in random_candidates(3) if c.usable}
    told = {
        number: dataclasses.replace(c, measurement=dataclasses.replace(c.score, divergence=number / 100))
        for number, c in known.items()
        if number % 2
    }
    names = ("divergence", "size_bytes", "latency")
    among = Unbeaten(names).among({**known, **told})
    mask = nondominated(costs(list(told.values()), names))
    assert among == [c for c, kept in zip(told.values(), mask, strict=True) if kept]
    assert among
