"""Latency, paired with the reference's.

One unpaired median on a busy machine is off by tens of percent. Blocks of runs of candidate and reference are therefore
taken in turn; at one thread the clock is the process's CPU time, which other load does not stretch. What other work
does to caches it does not undo: nothing of any search runs beside a block (`slot.py`), and what other users of the
machine do shows in the reference: pairs in which it was slow are taken anew and left out.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from autocompress import machine, slot
from autocompress.config import TargetConfig
from autocompress.errors import MeasurementError
from autocompress.records import DISTURBED, Z95
from autocompress.runtimes.base import Session

MOST_RUNS, _FEWEST_RUNS = 10, 2
"""Runs of a block; the latter where they take long."""
SHORT_S = 0.008
"""Below this, runs need others before them that are not timed."""
RUNS_OF_A_PAIR = 2 * 2 * MOST_RUNS
"""Of the candidate and the reference at one thread, and as many that are not timed."""
_BLOCK_S = _FEWEST_RUNS * SHORT_S
"""Time after which a block has enough runs."""
_ATTEMPTS = 5
"""How often a block is timed by wall clock whose threads waited for a core for more than `DISTURBED` of its time."""
SLOWED = 1.12
"""Times its pace that a block of the reference takes from which on something disturbed it.

A neighbour on the same core makes it slower for seconds at a time, and small models by more than the reference.
"""
ANEW = 2
"""As many times the pairs that are wanted are taken at most, where some are disturbed."""
_LEAST_QUIET = 2
"""Pairs without which the others are not left out: one may itself be off."""
_LATEST, _PACE = 200, 0.05
"""Blocks of the reference that its pace is looked for among, as a machine's clock changes, too, and stays so; and the
share of them that are faster: the fastest of many is so by chance."""
_OF_MOMENTS, _OF_PAIRS = 0.05, 0.08
"""Relative standard deviations of latency ratios from one moment to another, and of pairs within one: what explains
those of 2 rounds of 1 and of 2 pairs between processes in ``results/benchmarks/latency-estimators.json``."""
_TELLING = 6
"""Pairs below which a bootstrap cannot tell how far the ratio may be off: all of them may be alike by chance, and are
of one process, where its memory came to lie as it did."""
_DRAWN_AT_ONCE = 200_000
"""Pairs that are put together at once: each is twenty numbers, and there may be ten thousand in each of all draws."""
BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True)
class Latency:
    """Paired timing; milliseconds per call, in the median and at the 90th percentile.

    ``ratio`` is the lower quartile of the candidate's runs over the reference's, with a 95 % bootstrap interval.
    ``waited`` is the share of the time that threads stood ready without a core, where the clock is the wall's.
    """

    p50_ms: float
    p90_ms: float
    reference_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    waited: float

    def fields(self) -> dict[str, Any]:
        """Return the values by the names of the fields that a `Measurement` keeps them in."""
        return {
            "latency_ms": self.p50_ms,
            "latency_p90_ms": self.p90_ms,
            "reference_ms": self.reference_ms,
            "latency_ratio": self.ratio,
            "latency_ratio_low": self.ratio_low,
            "latency_ratio_high": self.ratio_high,
            "latency_waited": self.waited,
            "latency_drift": 0.0,
            "latency_adjusted": 1.0,
        }


def inputs_of(names: tuple[str, ...], target: TargetConfig, vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    """Return inputs of exactly the target's shape, without padding; token ids are random."""
    shape = (target.batch_size, target.tokens)
    ids = np.random.default_rng(seed).integers(min(5, vocabulary - 1), vocabulary, shape, dtype=np.int64)
    known = {
        "input_ids": ids,
        "attention_mask": np.ones(shape, dtype=np.int64),
        "token_type_ids": np.zeros(shape, dtype=np.int64),
    }
    return {name: known[name] for name in names}


def clock_of(target: TargetConfig) -> Callable[[], float]:
    """Return the clock for a target: CPU time at one thread, wall time (in an exclusive slot) at more."""
    return time.process_time if target.threads == 1 else time.perf_counter


class Block(NamedTuple):
    """Seconds of runs in a row, and the share of them that threads stood ready without a core."""

    seconds: np.ndarray
    waited: float = 0.0

    @property
    def typical(self) -> float:
        """The lower quartile of its runs."""
        return float(np.quantile(self.seconds, 0.25))


def _quietest_row(session: Session, inputs: Mapping[str, np.ndarray], clock: Callable[[], float]) -> Block:
    rows: list[Block] = []
    for _ in range(_ATTEMPTS):
        before = machine.waited_seconds()
        times = row(session, inputs, clock)
        rows.append(Block(times, (machine.waited_seconds() - before) / float(times.sum() or 1.0)))
        if rows[-1].waited <= DISTURBED:
            break
    return min(rows, key=lambda each: each.waited)


def row(session: Session, inputs: Mapping[str, np.ndarray], clock: Callable[[], float]) -> np.ndarray:
    """Return seconds of runs one after the other, as many as a block has."""
    times: list[float] = []
    # By the shortest: one may have been disturbed.
    while len(times) < _FEWEST_RUNS or (len(times) < MOST_RUNS and len(times) * min(times) < _BLOCK_S):
        start = clock()
        session.run(inputs)
        times.append(clock() - start)
    return np.array(times)


@dataclass(frozen=True)
class Pair:
    """Seconds of each run of the candidate and of the reference, in blocks that follow each other.

    With the larger share of a block that threads stood ready without a core, and, where the reference was timed on the
    other side of the candidate, too, what a run took there.
    """

    candidate: np.ndarray
    reference: np.ndarray
    waited: float = 0.0
    other_side: float = 0.0

    @classmethod
    def of(cls, candidate: Block, reference: Block, other_side: Block | None = None) -> Pair:
        waited = max(candidate.waited, reference.waited)
        return cls(candidate.seconds, reference.seconds, waited, 0.0 if other_side is None else other_side.typical)

    def plain(self) -> list[Any]:
        """Return self as plain data."""
        return [self.candidate.tolist(), self.reference.tolist(), self.waited, self.other_side]

    @classmethod
    def from_plain(cls, found: Sequence[Any]) -> Pair:
        candidate, reference, waited, other_side = found
        return cls(np.array(candidate), np.array(reference), waited, other_side)

    @cached_property
    def beside(self) -> float:
        """Seconds of a run of the reference where it was slower."""
        return max(self.other_side, float(np.quantile(self.reference, 0.25)))


class Pace:
    """How fast the reference is where nothing disturbs it, by its latest blocks, and which pairs were disturbed.

    As long as no block is known, none was.

    Args:
        threads: of the target. At several, blocks that others disturbed are timed again at once, see `block`, and this
            says of none that it was.
    """

    def __init__(self, threads: int = 1) -> None:
        self._tells = threads == 1
        self._latest: deque[float] = deque(maxlen=_LATEST)

    def note(self, seconds: float) -> None:
        """Take in what a run of the reference took in a block."""
        if self._tells:
            self._latest.append(seconds)

    @property
    def limit(self) -> float:
        """Seconds of a run of the reference from which on it was disturbed."""
        if not self._latest:
            return math.inf
        return SLOWED * sorted(self._latest)[int(_PACE * len(self._latest))]

    def quiet(self, moments: Sequence[Sequence[Pair]]) -> int:
        """Return how many pairs were not disturbed."""
        limit = self.limit
        return sum(pair.beside <= limit for moment in moments for pair in moment)

    def missing(self, moments: Sequence[Sequence[Pair]], due: int, wanted: int) -> int:
        """Return how many pairs are to be taken for ``due`` of them to be undisturbed, as far as they may be.

        Args:
            moments: pairs that were taken.
            due: how many were to be taken until now.
            wanted: how many are in the end; at most `ANEW` times as many are taken.
        """
        return max(0, min(due - self.quiet(moments), ANEW * wanted - sum(map(len, moments))))

    def undisturbed(self, moments: Sequence[Sequence[Pair]]) -> list[list[Pair]]:
        """Return the pairs that were not disturbed; where there are too few of them, the half that was least.

        The reference's speed alone decides; the candidate's is not looked at.
        """
        taken, limit = sorted(pair.beside for moment in moments for pair in moment), self.limit
        if taken and sum(seconds <= limit for seconds in taken) < min(_LEAST_QUIET, len(taken)):
            limit = taken[(len(taken) - 1) // 2]
        kept = [[pair for pair in moment if pair.beside <= limit] for moment in moments]
        return [moment for moment in kept if moment]


def paired_times(
    candidate: Session,
    reference: Session,
    inputs: Mapping[str, np.ndarray],
    *,
    pairs: int,
    clock: Callable[[], float],
    before: int = 0,
) -> list[Pair]:
    """Time blocks of runs, of the candidate and the reference in turn; who goes first alternates.

    A run after one of another model finds its weights and its code out of the caches. A small model loses more by that
    than a large one, and how much depends on the order of runs and on what else the machine does: each block of short
    runs therefore follows as many that are not timed.

    Args:
        candidate: a loaded artefact that is `ready`.
        reference: the uncompressed model in the same runtime, ready, too.
        inputs: of the target's shape, for both.
        pairs: of blocks.
        clock: seconds.
        before: how many pairs were taken at other moments, so that who goes first alternates over all of them.

    Raises:
        MeasurementError: if a run took no measurable time.
    """
    found = []
    with slot.timing():
        for number in range(before, before + pairs):
            if number % 2 == 0:
                first = block(candidate, inputs, clock)
                found.append(Pair.of(first, block(reference, inputs, clock)))
            else:
                first = block(reference, inputs, clock)
                found.append(Pair.of(block(candidate, inputs, clock), first))
    return found


def ready(session: Session, inputs: Mapping[str, np.ndarray]) -> Session:
    """Run a loaded artefact once, for which it may have to prepare itself for the inputs' shape, and return it."""
    session.run(inputs)
    return session


def block(session: Session, inputs: Mapping[str, np.ndarray], clock: Callable[[], float]) -> Block:
    """Time runs in a row, after such a row that is not timed.

    Where by CPU time two runs fill a block, there is none: with and without, the ratios to the demo's reference, which
    is so slow, are the same (``benchmarks/latency_estimators.py``).

    By wall clock, what other programs took of the cores would count: a row whose threads stood ready without a core is
    timed again, a few times, and of all of them the one that waited least is taken.

    Raises:
        MeasurementError: if a run took no measurable time.
    """
    found = Block(row(session, inputs, clock))
    if clock is time.perf_counter:
        found = _quietest_row(session, inputs, clock)
    elif len(found.seconds) > _FEWEST_RUNS:
        found = Block(row(session, inputs, clock))
    if not (found.seconds > 0).all():
        untimed = int((found.seconds <= 0).sum())
        raise MeasurementError(f"latency: {untimed} of {found.seconds.size} runs took no measurable time")
    return found


def summarize(moments: Sequence[Sequence[Pair]], *, seed: int) -> Latency:
    """Turn times into quantiles and a ratio with its interval.

    What disturbs a run makes it longer, never shorter, and small models more than large ones: which quarter of the runs
    is the fastest depends on that far less than which half is. The ratio is of these lower quartiles.

    The interval comes from a two-stage bootstrap, moments first and then pairs within each (Davison and Hinkley 1997,
    "Bootstrap Methods and their Application", section 3.8): pairs of one moment share the state of the machine. Of
    fewer than six pairs it is at least as wide as such ratios differ from one process to another.

    Args:
        moments: pairs of blocks that were taken at different moments.
        seed: of the draws.
    """
    taken = [pair for moment in moments for pair in moment]
    runs = runs_of(taken)
    rng = np.random.default_rng(seed)
    sizes = np.array([len(moment) for moment in moments])
    drawn = rng.integers(0, len(moments), (BOOTSTRAP_DRAWS, len(moments)))
    within = rng.random((BOOTSTRAP_DRAWS, len(moments), math.ceil(sizes.mean()))) * sizes[drawn][:, :, None]
    pairs = (np.cumsum(sizes) - sizes)[drawn][:, :, None] + within.astype(np.int64)
    parts = np.array_split(pairs.reshape(BOOTSTRAP_DRAWS, -1), -(-pairs.size // _DRAWN_AT_ONCE))
    candidates, references = np.concatenate([lower_quartiles(runs[:, p].reshape(2, len(p), -1)) for p in parts], axis=1)
    low, high = np.quantile(candidates / references, (0.025, 0.975))
    p50, p90 = np.quantile(np.concatenate([pair.candidate for pair in taken]), (0.5, 0.9)) * 1e3
    reference = float(np.median(np.concatenate([pair.reference for pair in taken]))) * 1e3
    candidate, beside = lower_quartiles(runs.reshape(2, -1))
    ratio = float(candidate / beside)
    if len(taken) < _TELLING:
        half = Z95 * math.sqrt(_OF_MOMENTS**2 / len(moments) + _OF_PAIRS**2 / len(taken))
        low, high = min(low, ratio * (1 - half)), max(high, ratio * (1 + half))
    waited = float(np.median([pair.waited for pair in taken]))
    # A few draws of few moments may all lie on one side of the ratio of all.
    return Latency(float(p50), float(p90), reference, ratio, min(ratio, float(low)), max(ratio, float(high)), waited)


def runs_of(pairs: Sequence[Pair]) -> np.ndarray:
    """Return the seconds of all runs, ``2 x pairs x runs of a block``: of the candidate, and of the reference.

    NaN stands where a block has fewer runs than the longest one.
    """
    runs = np.full((2, len(pairs), MOST_RUNS), np.nan)
    for number, pair in enumerate(pairs):
        for of_model, seconds in zip(runs, (pair.candidate, pair.reference), strict=True):
            of_model[number, : seconds.size] = seconds
    return runs


def lower_quartiles(runs: np.ndarray) -> np.ndarray:
    """Return the lower quartile along the last axis, leaving out what is NaN."""
    ordered = np.sort(runs, axis=-1)  # NaN comes last
    place = 0.25 * (np.isfinite(runs).sum(axis=-1, keepdims=True) - 1)
    below = np.floor(place).astype(np.int64)
    first, second = (np.take_along_axis(ordered, at, axis=-1) for at in (below, np.ceil(place).astype(np.int64)))
    return np.asarray((first + (place - below) * (second - first))[..., 0])
