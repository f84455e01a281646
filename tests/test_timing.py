"""Timing: latency in pairs of blocks, its ratio and its interval."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VOCABULARY

from autocompress import machine, timing
from autocompress.config import TargetConfig
from autocompress.errors import MeasurementError
from autocompress.records import DISTURBED
from autocompress.runtimes.base import Session


class Clock:
    """Time that passes only when a session runs."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Timed(Session):
    """Takes given times in turn, the last one for ever."""

    def __init__(self, clock: Clock, seconds: Callable[[int], float], calls: list[str], name: str) -> None:
        self.clock, self.seconds, self.calls, self.name = clock, seconds, calls, name
        self.runs = 0

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        self.clock.now += self.seconds(self.runs)
        self.runs += 1
        self.calls.append(self.name)
        return np.zeros((1, 2), dtype=np.float32)

    def close(self) -> None:
        """Hold nothing."""


class Adding(Session):
    """Adds up numbers: arithmetic in proportion to how many they are."""

    def __init__(self, count: int) -> None:
        self.numbers = range(count)

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.array([[sum(self.numbers)]], dtype=np.float32)

    def close(self) -> None:
        """Hold nothing."""


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy with another process."""
    command = [sys.executable, "-S", "-c", "print(1, flush=True)\nwhile True: pass"]
    cores = os.sched_getaffinity(0)
    hogs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in cores]
    try:
        for hog, core in zip(hogs, cores, strict=True):
            assert hog.stdout is not None
            assert hog.stdout.readline() == b"1\n"
            os.sched_setaffinity(hog.pid, {core})  # two on one core would leave another one free for a while
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.communicate()


class TestLatency:
    def measure(
        self,
        candidate: Callable[[int], float],
        reference: Callable[[int], float],
        *,
        pairs: int = 40,
        calls: list[str] | None = None,
        seed: int = 0,
    ) -> timing.Latency:
        clock, noted = Clock(), calls if calls is not None else []
        taken = timing.paired_times(
            Timed(clock, candidate, noted, "candidate"),
            Timed(clock, reference, noted, "reference"),
            {"input_ids": np.ones((1, 4), dtype=np.int64)},
            pairs=pairs,
            clock=clock,
        )
        return timing.summarize([taken], seed=seed)

    def test_who_goes_first_alternates_over_all_moments(self) -> None:
        firsts = []
        for before in range(4):
            clock, noted = Clock(), list[str]()
            ours, beside = (Timed(clock, lambda _: 0.02, noted, name) for name in ("candidate", "reference"))
            timing.paired_times(ours, beside, {}, pairs=1, clock=clock, before=before)
            firsts.append(noted[0])
        assert firsts == ["candidate", "reference"] * 2

    def test_constant_times_give_the_exact_ratio(self) -> None:
        found = self.measure(lambda _: 0.003, lambda _: 0.012)
        assert found.p50_ms == pytest.approx(3.0)
        assert found.p90_ms == pytest.approx(3.0)
        assert found.reference_ms == pytest.approx(12.0)
        assert (found.ratio, found.ratio_low, found.ratio_high) == pytest.approx((0.25, 0.25, 0.25))

    def test_the_interval_holds_the_ratio_under_noise(self) -> None:
        hits, widths = 0, []
        for seed in range(40):
            rng = np.random.default_rng(seed)
            found = self.measure(
                lambda _, rng=rng: 0.005 * rng.lognormal(0, 0.1), lambda _, rng=rng: 0.01 * rng.lognormal(0, 0.1)
            )
            assert found.ratio_low <= found.ratio <= found.ratio_high
            hits += found.ratio_low <= 0.5 <= found.ratio_high
            widths.append(found.ratio_high - found.ratio_low)
        # 95 % of 40 is 38; 33 or fewer have a probability below one in a thousand.
        assert hits >= 34
        assert 0.005 < np.mean(widths) < 0.1

    def test_drift_that_both_share_leaves_the_ratio(self) -> None:
        """The machine becomes twice as slow while measuring."""
        found = self.measure(lambda n: 0.0004 * (1 + n / 840), lambda n: 0.0008 * (1 + n / 840))
        assert found.ratio == pytest.approx(0.5, rel=1e-6)

    def test_the_ratio_is_of_lower_quartiles_of_all_runs(self) -> None:
        def pair(candidate: list[float], reference: list[float]) -> timing.Pair:
            return timing.Pair(np.array(candidate) / 1e3, np.array(reference) / 1e3)

        # 1, 1, 2, 9, 9, 9: a quarter of the way is at 1.25; and 1, 3, 4, 4: at 0.75.
        pairs = [pair([1, 1, 9], [1]), pair([2], [4, 4]), pair([9, 9], [3])]
        found = timing.summarize([pairs], seed=0)
        assert found.ratio == pytest.approx(1.25 / 2.5)
        assert found.p50_ms == pytest.approx(5.5)
        assert found.reference_ms == pytest.approx(3.5)
        # Of 27 draws three have the first pair and the second one twice (1 over 4), and one the third alone (9 over 3).
        assert (found.ratio_low, found.ratio_high) == pytest.approx((0.25, 3.0))
        assert timing.summarize([pairs[:2], pairs[2:]], seed=0).ratio == found.ratio

    @pytest.mark.parametrize("pairs", [1, 2, 3, 4, 5])
    def test_few_pairs_that_are_alike_do_not_make_a_ratio_certain(self, pairs: int) -> None:
        found = self.measure(lambda _: 0.003, lambda _: 0.012, pairs=pairs)
        half = 1.96 * math.sqrt(0.05**2 + 0.08**2 / pairs)
        assert (found.ratio_low, found.ratio_high) == pytest.approx((0.25 * (1 - half), 0.25 * (1 + half)), rel=1e-3)
        spread = [pair_of(1.0, candidate) for candidate in (0.1, 0.5)]
        assert timing.summarize([spread], seed=0).ratio_low <= 0.1, "where a bootstrap says more, it counts"

    def test_what_disturbs_half_of_the_runs_leaves_the_ratio(self) -> None:
        """A neighbour on the caches slows a small model by half, and a large one hardly, now and then."""
        rng = np.random.default_rng(0)
        found = self.measure(
            lambda _: 0.001 * (1.5 if rng.random() < 0.6 else 1.0),
            lambda _: 0.002 * (1.05 if rng.random() < 0.6 else 1.0),
        )
        assert found.ratio == pytest.approx(0.5)
        assert found.p50_ms == pytest.approx(1.5)

    def test_a_few_hiccups_leave_the_ratio(self) -> None:
        found = self.measure(lambda n: 0.5 if n % 10 == 7 else 0.001, lambda n: 0.9 if n % 10 == 2 else 0.002)
        assert found.ratio == pytest.approx(0.5)
        assert found.p50_ms == pytest.approx(1.0)

    def test_a_busy_machine_leaves_the_ratio(self) -> None:
        """At one thread, where the clock is the process's own time."""
        with busy_cores():
            taken = timing.paired_times(
                Adding(10_000), Adding(20_000), {}, pairs=60, clock=timing.clock_of(TargetConfig(threads=1))
            )
        found = timing.summarize([taken], seed=0)
        # Now and then it is off by a tenth: two threads of one core share more than time.
        assert found.ratio == pytest.approx(0.5, rel=0.2)
        assert found.ratio_high < 1, "nor is their order in doubt"

    @pytest.mark.parametrize(
        ("waits", "rows", "taken"), [([0.0], 1, 0), ([0.5, 0.001], 2, 1), ([0.5, 0.4, 0.6, 0.3, 0.7], 5, 3)]
    )
    def test_by_wall_clock_a_block_that_waited_for_a_core_is_timed_again(
        self, monkeypatch: pytest.MonkeyPatch, waits: list[float], rows: int, taken: int
    ) -> None:
        """At several threads: the rows follow one that does not count, and the one that waited least is taken."""
        # Asked before and after each row of two runs of 10 ms.
        asked = iter([seconds for share in waits for seconds in (0.0, 0.02 * share)])
        monkeypatch.setattr(machine, "waited_seconds", lambda: next(asked))
        now, runs = [0.0], [0]

        def clock() -> float:
            return now[0]

        class Slow(Adding):
            def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
                runs[0] += 1
                now[0] += 0.01 + 1e-6 * runs[0]
                return super().run(inputs)

        monkeypatch.setattr(timing.time, "perf_counter", clock)
        found = timing.block(Slow(1), {}, clock)
        assert runs[0] == 2 * (1 + rows)
        first = 2 * (1 + taken) + 1
        assert found.seconds == pytest.approx([0.01 + 1e-6 * first, 0.01 + 1e-6 * (first + 1)], abs=1e-9)
        assert found.waited == pytest.approx(waits[taken], rel=0.01)

    def test_by_wall_clock_a_load_that_lasts_is_told(self) -> None:
        """Timing again does not help then, and whoever reads the latency must know."""
        if not Path("/proc/self/schedstat").exists():
            pytest.skip("this kernel does not say")
        clock = timing.clock_of(TargetConfig(threads=2))
        with busy_cores():
            taken = timing.paired_times(Adding(200_000), Adding(400_000), {}, pairs=4, clock=clock)
        assert timing.summarize([taken], seed=0).waited > DISTURBED
        quiet = timing.paired_times(
            Adding(200_000), Adding(400_000), {}, pairs=2, clock=timing.clock_of(TargetConfig(threads=1))
        )
        assert timing.summarize([quiet], seed=0).waited == 0.0, "by CPU time nobody waits"

    def test_waiting_for_a_core_is_seen(self) -> None:
        before, work = machine.waited_seconds(), Adding(200_000)
        with busy_cores():
            for _ in range(20):
                work.run({})
        if not Path("/proc/self/schedstat").exists():
            pytest.skip("this kernel does not say")
        assert machine.waited_seconds() - before > 0.01

    def test_blocks_alternate_and_those_of_short_runs_follow_some_that_do_not_count(self) -> None:
        calls: list[str] = []
        self.measure(lambda _: 0.001, lambda _: 0.001, pairs=3, calls=calls)
        block = 2 * timing.MOST_RUNS
        names = ["candidate", "reference", "reference", "candidate", "candidate", "reference"]
        assert calls == [name for name in names for _ in range(block)]

    def test_blocks_of_long_runs_are_short(self) -> None:
        calls: list[str] = []
        self.measure(lambda _: 0.006, lambda _: 3.0, pairs=1, calls=calls)
        # The third run of 6 ms ends the 16 ms; two there are always, and long ones follow each other anyway.
        assert calls == ["candidate"] * 2 * 3 + ["reference"] * 2

    @pytest.mark.parametrize(("milliseconds", "runs"), [(7.9, 3 + 3), (8.1, 2)])
    def test_runs_that_fill_half_a_block_need_none_before_them(self, milliseconds: float, runs: int) -> None:
        calls: list[str] = []
        found = self.measure(lambda _: milliseconds / 1e3, lambda _: 0.02, pairs=1, calls=calls)
        assert calls == ["candidate"] * runs + ["reference"] * 2
        assert found.ratio == pytest.approx(milliseconds / 20)

    def test_runs_that_warm_up_do_not_count(self) -> None:
        def seconds(n: int) -> float:
            return 9.0 if n == 0 else 0.004 if n <= 4 else 0.001

        found = self.measure(seconds, lambda _: 0.002, pairs=2)
        assert found.p90_ms == pytest.approx(1.0)
        assert found.ratio == pytest.approx(0.5)

    def test_one_seed_gives_one_interval(self) -> None:
        rng = np.random.default_rng(0)
        pairs = [timing.Pair(rng.lognormal(-5, 0.3, 10), rng.lognormal(-5, 0.3, 2)) for _ in range(400)]
        assert timing.summarize([pairs], seed=1) == timing.summarize([pairs], seed=1)
        assert timing.summarize([pairs], seed=1) != timing.summarize([pairs], seed=2)

    @pytest.mark.parametrize("which", ["candidate", "reference"])
    @pytest.mark.parametrize("seconds", [0.0, -0.001])
    def test_runs_that_took_no_time_are_refused(self, which: str, seconds: float) -> None:
        def odd(n: int) -> float:
            return seconds if n == 15 else 0.001

        def even(_: int) -> float:
            return 0.001

        pair = (odd, even) if which == "candidate" else (even, odd)
        with pytest.raises(MeasurementError, match="latency: 1 of 10 runs took no measurable time"):
            self.measure(*pair, pairs=10)


def pair_of(reference: float, candidate: float = 1.0) -> timing.Pair:
    return timing.Pair(np.full(4, candidate), np.full(2, reference))


def pace_of(*seconds: float) -> timing.Pace:
    pace = timing.Pace()
    for value in seconds:
        pace.note(value)
    return pace


class TestPace:
    """A neighbour slows the reference for seconds; candidates are slowed more, or less."""

    def test_pairs_in_which_the_reference_was_slow_are_left_out(self) -> None:
        quiet, noisy = [pair_of(r) for r in (1.0, 1.05, 1.1)], [pair_of(r, 2.0) for r in (1.2, 1.3, 1.4)]
        found = pace_of(1.0).undisturbed([[quiet[0], noisy[0]], noisy[1:], quiet[1:]])
        assert found == [[quiet[0]], quiet[1:]]

    def test_nothing_is_left_out_where_nothing_was_slow_or_nothing_is_known(self) -> None:
        for pace, last in ((pace_of(1.0), 1.11), (pace_of(), 9.0)):
            moments = [[pair_of(r, 1 + r)] for r in (1.0, 1.03, last)]
            assert pace.undisturbed(moments) == moments
            assert pace.quiet(moments) == 3
        assert pace_of(1.0).undisturbed([]) == []
        by_wall_clock = timing.Pace(threads=2)
        by_wall_clock.note(1.0)
        assert by_wall_clock.quiet([[pair_of(9.0)]]) == 1, "its blocks are timed again at once"

    @pytest.mark.parametrize("slow", [[1.0], [1.0, 1.2], [1.3, 1.0, 1.5], [1.4, 1.0, 1.6, 1.2]])
    def test_of_too_few_undisturbed_ones_the_half_is_taken_that_was_least(self, slow: list[float]) -> None:
        found = pace_of(0.5).undisturbed([[pair_of(r)] for r in slow])
        half = sorted(slow)[: (len(slow) + 1) // 2]
        assert sorted(pair.reference[0] for [pair] in found) == half

    def test_how_fast_the_candidate_was_has_no_part_in_it(self) -> None:
        references, pace = (1.0, 1.05, 1.2, 1.3), pace_of(1.0)
        for times in ((1.0, 1.0, 1.0, 1.0), (9.0, 0.1, 5.0, 2.0)):
            found = pace.undisturbed([[pair_of(*both)] for both in zip(references, times, strict=True)])
            assert [pair.reference[0] for [pair] in found] == [1.0, 1.05]

    def test_a_reference_that_was_slow_on_the_other_side_counts(self) -> None:
        blocks = [timing.Block(np.full(2, seconds)) for seconds in (0.5, 1.0, 1.3)]
        pair = timing.Pair.of(*blocks)
        assert pair.beside == pytest.approx(1.3)
        assert timing.Pair.of(*blocks[:2]).beside == pytest.approx(1.0)
        assert pace_of(1.0).quiet([[pair]]) == 0
        assert timing.summarize([[pair]], seed=0).ratio == pytest.approx(0.5)

    def test_it_is_of_the_latest_blocks_and_not_of_the_luckiest(self) -> None:
        pace = pace_of(*[1.0] * 99, 0.8)
        assert pace.limit == pytest.approx(timing.SLOWED)
        for _ in range(timing._LATEST):  # a clock that was turned down
            pace.note(1.5)
        assert pace.limit == pytest.approx(1.5 * timing.SLOWED)

    def test_disturbed_pairs_are_to_be_taken_anew_but_not_for_ever(self) -> None:
        assert pace_of().missing([], 1, 4) == 1
        pace = pace_of(1.0)
        quiet, slow = pair_of(1.1), pair_of(1.3)
        assert pace.missing([[quiet]], 2, 4) == 1
        assert pace.missing([[slow]], 2, 4) == 2, "the next one and the one that was disturbed"
        assert pace.missing([[quiet] * 4], 4, 4) == 0
        assert pace.missing([[slow] * 3, [quiet]], 4, 4) == 3
        assert pace.missing([[slow] * 7], 4, 4) == 1
        assert pace.missing([[slow] * 8], 4, 4) == 0, "twice as many are enough"

    def test_pace_that_others_set_does_not_move_a_ratio_of_constant_times(self) -> None:
        moments = [[pair_of(0.02, 0.005)] * 2, [pair_of(0.026, 0.009)] * 6]
        assert timing.summarize(pace_of(0.02).undisturbed(moments), seed=0).ratio == pytest.approx(0.25)


class TestInputs:
    def test_they_have_exactly_the_targets_shape(self) -> None:
        target = TargetConfig(batch_size=3, tokens=9)
        names = ("attention_mask", "input_ids", "token_type_ids")
        found = timing.inputs_of(names, target, len(VOCABULARY), seed=0)
        assert tuple(found) == names
        assert all(array.shape == (3, 9) and array.dtype == np.int64 for array in found.values())
        assert found["attention_mask"].all()
        assert not found["token_type_ids"].any()
        assert found["input_ids"].min() >= 5
        assert found["input_ids"].max() < len(VOCABULARY)

    def test_they_follow_the_seed(self) -> None:
        def ids(seed: int) -> Any:
            return timing.inputs_of(("input_ids",), TargetConfig(), 1000, seed)["input_ids"].tolist()

        assert ids(0) == ids(0)
        assert ids(0) != ids(1)

    def test_the_clock_is_cpu_time_at_one_thread(self) -> None:
        assert timing.clock_of(TargetConfig(threads=1)) is time.process_time
        assert timing.clock_of(TargetConfig(threads=2)) is time.perf_counter
