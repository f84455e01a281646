"""Latency ratios as they are where nothing disturbs the machine."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from helpers_records import make_measurement

from autocompress.calm import Calm, calm_of
from autocompress.records import Measurement

PACE_MS = 16.0
CALM = Calm(PACE_MS, spared=0.6)


def taken(ratio: float, slower: float, *, spared: float, noise: float = 0.0) -> Measurement:
    """Return what is seen of a candidate of a ratio while the reference takes so many times its pace."""
    seen = ratio * slower ** -(spared * (1 - ratio)) * math.exp(noise)
    return dataclasses.replace(
        make_measurement(),
        reference_ms=slower * PACE_MS,
        latency_ratio=seen,
        latency_ratio_low=0.9 * seen,
        latency_ratio_high=1.1 * seen,
    )


def twice(
    rng: np.random.Generator,
    count: int,
    *,
    spared: float,
    noise: float = 0.0,
    states: float = 0.05,
    offset: float = 0.0,
) -> tuple[list[Measurement], list[Measurement]]:
    """Return latencies of candidates, taken at two times, at each of which the reference is as slow as it is."""
    ratios, slower = rng.uniform(0.02, 0.9, count), np.exp(rng.normal(0.05, states, (2, count)))
    noises = rng.normal(0, noise, (2, count)) if noise else np.zeros((2, count))
    before = [
        taken(r, s, spared=spared, noise=n + offset) for r, s, n in zip(ratios, slower[0], noises[0], strict=True)
    ]
    return before, [taken(r, s, spared=spared, noise=n) for r, s, n in zip(ratios, slower[1], noises[1], strict=True)]


class TestAdjusting:
    @pytest.mark.parametrize("ratio", [0.02, 0.4, 0.95])
    @pytest.mark.parametrize("slower", [0.95, 1.0, 1.1, 1.2])
    def test_it_takes_out_what_the_machine_did(self, ratio: float, slower: float) -> None:
        found = CALM.adjust(taken(ratio, slower, spared=0.6))
        assert found.latency_ratio == pytest.approx(ratio, rel=0.02), "the exponent is by the ratio that is seen"
        assert found.latency_ratio_low == pytest.approx(0.9 * found.latency_ratio)
        assert found.latency_ratio_high == pytest.approx(1.1 * found.latency_ratio)

    def test_it_tells_by_how_much_and_leaves_what_was_seen(self) -> None:
        seen = taken(0.3, 1.1, spared=0.6)
        found = CALM.adjust(seen)
        assert found.latency_adjusted == pytest.approx(1.1 ** (0.6 * (1 - seen.latency_ratio)))
        assert found.latency_ratio == pytest.approx(seen.latency_ratio * found.latency_adjusted)
        assert (found.latency_ms, found.latency_p90_ms, found.reference_ms) == (
            seen.latency_ms,
            seen.latency_p90_ms,
            seen.reference_ms,
        )
        found.check()

    def test_the_reference_and_what_is_slower_are_as_they_are(self) -> None:
        for ratio in (1.0, 1.4):
            assert CALM.adjust(taken(ratio, 1.1, spared=0.0)).latency_ratio == ratio

    def test_what_was_adjusted_before_is_not_adjusted_twice(self) -> None:
        seen = taken(0.3, 1.1, spared=0.6)
        once = CALM.adjust(seen)
        assert CALM.adjust(once).latency_ratio == pytest.approx(once.latency_ratio)
        other = Calm(0.98 * PACE_MS, spared=0.2)
        again, expected = other.adjust(once), other.adjust(seen)
        for name in ("latency_ratio", "latency_ratio_low", "latency_ratio_high", "latency_adjusted"):
            assert getattr(again, name) == pytest.approx(getattr(expected, name))

    @pytest.mark.parametrize("slower", [0.7, 1.4])
    def test_another_clock_slows_all_alike(self, slower: float) -> None:
        seen = taken(0.3, slower, spared=0.0)
        assert CALM.adjust(seen) == seen


class TestFinding:
    @pytest.mark.parametrize("spared", [0.0, 0.3, 0.6, 1.0])
    def test_two_times_tell_what_candidates_are_spared(self, spared: float) -> None:
        found = calm_of(*twice(np.random.default_rng(0), 60, spared=spared, noise=0.02))
        assert found.spared == pytest.approx(spared, abs=0.2)

    def test_what_all_differ_by_alike_is_no_part_of_it(self) -> None:
        rng = np.random.default_rng(1)
        assert calm_of(*twice(rng, 60, spared=0.3, noise=0.01, offset=0.05)).spared == pytest.approx(0.3, abs=0.15)
        # Such as a process in which small models run slower, at a time at which the reference did.
        before, after = twice(rng, 60, spared=0.3, noise=0.01)
        slowed = [
            dataclasses.replace(
                m,
                latency_ratio=m.latency_ratio * math.exp(0.05 * (1 - m.latency_ratio)),
                reference_ms=1.05 * m.reference_ms,
            )
            for m in before
        ]
        assert calm_of(slowed, after).spared == pytest.approx(0.3, abs=0.15)

    def test_another_clock_tells_nothing(self) -> None:
        before, after = twice(np.random.default_rng(4), 40, spared=0.8, noise=0.01)
        slow = [dataclasses.replace(m, reference_ms=1.8 * m.reference_ms) for m in before[:10]]
        assert calm_of([*slow, *before[10:]], after).spared == calm_of(before[10:], after[10:]).spared
        everything = [dataclasses.replace(m, reference_ms=2.0 * m.reference_ms) for m in before]
        assert calm_of(everything, after).spared == 0.5

    def test_what_tells_little_leaves_what_is_supposed(self) -> None:
        for seed in range(5):
            rng = np.random.default_rng(seed)
            assert calm_of(*twice(rng, 5, spared=1.0, noise=0.1, states=0.01)).spared == pytest.approx(0.5, abs=0.15)
        alike = [taken(0.3, 1.0, spared=0.5)] * 5
        assert calm_of(alike, alike).spared == 0.5

    def test_it_is_a_share(self) -> None:
        for spared, end in ((-2.0, 0.0), (3.0, 1.0)):
            assert calm_of(*twice(np.random.default_rng(2), 60, spared=spared)).spared == end

    def test_the_pace_is_that_of_the_fastest_quarter(self) -> None:
        slower = [1.0, 1.0, 1.02, 1.1, 1.1, 1.2, 1.2, 1.2]
        each = [taken(0.3, s, spared=0.5) for s in slower]
        assert calm_of(each[::2], each[1::2]).reference_ms == pytest.approx(np.quantile(slower, 0.25) * PACE_MS)

    def test_adjusted_ratios_differ_less_from_one_time_to_another(self) -> None:
        before, after = twice(np.random.default_rng(3), 60, spared=0.6, noise=0.01)
        calm = calm_of(before, after)

        def apart(first: list[Measurement], second: list[Measurement]) -> float:
            logs = [np.log([m.latency_ratio for m in each]) for each in (first, second)]
            return float(np.std(logs[0] - logs[1]))

        assert apart([calm.adjust(m) for m in before], [calm.adjust(m) for m in after]) < 0.6 * apart(before, after)
