"""Accuracy with its interval and latency paired with the reference.

One unpaired median on a busy machine is off by tens of percent. Blocks of runs of candidate and reference are therefore
taken in turn and compared pair by pair; at one thread the clock is the process's CPU time, which other load does not
stretch. What other work does to caches it does not undo: nothing of any search runs beside a block (`slot.py`).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from autocompress import machine, slot
from autocompress.config import TargetConfig
from autocompress.errors import MeasurementError
from autocompress.records import DISTURBED, Z95, Drop
from autocompress.runtimes.base import Session
from autocompress.task import Batch, Split

_MOST_RUNS, _FEWEST_RUNS = 10, 2
"""Runs of a block; the latter where they take long."""
SHORT_S = 0.008
"""Below this, runs need others before them that are not timed."""
_BLOCK_S = _FEWEST_RUNS * SHORT_S
"""Time after which a block has enough runs."""
_ATTEMPTS = 5
"""How often a block is timed by wall clock whose threads waited for a core for more than `DISTURBED` of its time."""
BOOTSTRAP_DRAWS = 2000
WRONG_STOPS = 1e-3
"""Chance that an accuracy pass is ended for a candidate that would have reached the front."""
LOOKS = (1 / 4, 1 / 2)
"""Shares of the rows after which that is decided in one pass."""


@dataclass(frozen=True)
class Accuracy:
    """Share of right predictions with its 95 % Wilson interval, mean cross-entropy, and the predictions' hash."""

    value: float
    low: float
    high: float
    loss: float
    rows: int
    predictions: str

    def fields(self) -> dict[str, Any]:
        """Return the values by the names of the fields that a `Measurement` keeps them in."""
        return {
            "accuracy": self.value,
            "accuracy_low": self.low,
            "accuracy_high": self.high,
            "loss": self.loss,
            "rows": self.rows,
            "predictions": self.predictions,
        }


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
        }


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share (Wilson 1927)."""
    share, z2 = hits / rows, Z95**2
    centre = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = Z95 / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows * rows))
    # Rounding must not leave a share of 0 or 1 outside its own interval.
    return 0.0 if hits == 0 else centre - half, 1.0 if hits == rows else centre + half


def logits_of(session: Session, rows: Split, batches: Iterable[Batch]) -> np.ndarray:
    """Run all ``rows`` through an artefact, in ``batches`` that hold each of them once.

    Returns:
        ``rows x classes``, float32, in row order.

    Raises:
        MeasurementError: if any logit is not finite.
    """
    found: np.ndarray | None = None
    for batch in batches:
        logits = session.run(batch.arrays())
        if found is None:
            found = np.full((len(rows), logits.shape[1]), np.nan, dtype=np.float32)
        found[batch.rows.numpy()] = logits
    if found is None:
        raise MeasurementError("accuracy: there are no rows to score on")
    require_finite(found, len(rows))
    return found


def require_finite(logits: np.ndarray, rows: int) -> None:
    """Raise `MeasurementError` if any of ``logits`` (``rows x classes``) is not finite."""
    bad = int((~np.isfinite(logits)).any(axis=1).sum())
    if bad:
        raise MeasurementError(f"logits: {bad} of {rows} rows are not finite")


def accuracy(logits: np.ndarray, rows: Split) -> Accuracy:
    """Score ``logits`` (``rows x classes``) against the rows' classes."""
    labels = np.array(rows.labels)
    predicted = logits.argmax(axis=1)
    hits = int((predicted == labels).sum())
    loss = float(-_log_probabilities(logits)[np.arange(len(labels)), labels].mean())
    low, high = wilson(hits, len(labels))
    return Accuracy(hits / len(labels), low, high, loss, len(labels), predictions_hash(logits))


def drop(logits: np.ndarray, reference: np.ndarray, rows: Split) -> Drop:
    """Hold ``logits`` against those of the ``reference`` (both ``rows x classes``) on the same rows.

    Most rows are classified alike, which two intervals of their own know nothing of. This is the adjusted Wald interval
    for paired rows (Bonett and Price 2012, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions
    Based on Paired Data"): from the rows that one of both alone gets right, one more of each and two more in all.
    """
    labels = np.array(rows.labels)
    right, expected = logits.argmax(axis=1) == labels, reference.argmax(axis=1) == labels
    lost, gained = int((expected & ~right).sum()), int((right & ~expected).sum())
    more = len(labels) + 2
    lost_share, gained_share = (lost + 1) / more, (gained + 1) / more
    centre = lost_share - gained_share
    half = Z95 * math.sqrt((lost_share + gained_share - centre**2) / more)
    return Drop((lost - gained) / len(labels), max(-1.0, centre - half), min(1.0, centre + half))


def divergence(logits: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean Kullback-Leibler divergence of ``logits`` from ``reference`` (``rows x classes``), in nats."""
    return float(divergences(logits, reference).mean())


def divergences(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return that of each row, ``rows``."""
    wanted = _log_probabilities(reference)
    # A divergence is not negative; rounding can make a tiny one so.
    terms = (np.exp(wanted) * (wanted - _log_probabilities(logits))).sum(axis=1)
    return np.asarray(np.maximum(0.0, terms))


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


@dataclass(frozen=True)
class Bound:
    """The cost that a candidate must undercut to stand on the front, and when it is known that it cannot.

    Args:
        guide: ``accuracy``, ``loss`` or ``divergence``.
        cost: of the best point that is not beaten in any other objective; accuracies are negative.
    """

    guide: str
    cost: float

    def out_of_reach(self, logits: np.ndarray, done: Sequence[int], rows: Split, reference: np.ndarray) -> str | None:
        """Return the reason why a candidate cannot undercut the cost, judged by a random part of the rows, or None.

        Losses and divergences of single rows are not negative, so that the sum so far bounds the mean from below: no
        candidate is stopped wrongly. Hits are drawn without replacement: the chance that one which reaches the front
        shows as few as were seen is hypergeometric, and it is stopped where that is below ``WRONG_STOPS`` over the
        number of looks.

        Args:
            logits: ``rows x classes``; only the rows in ``done`` are read.
            done: rows that were run, a random part.
            rows: the split.
            reference: the uncompressed model's logits.
        """
        labels, seen = np.array(rows.labels)[list(done)], logits[list(done)]
        if self.guide == "accuracy":
            hits = int((seen.argmax(axis=1) == labels).sum())
            needed = math.floor(-self.cost * len(rows) + 1e-9) + 1
            chance = _hypergeometric(hits, len(rows), needed, len(done))
            if chance >= WRONG_STOPS / len(LOOKS):
                return None
            return f"{hits} hits in {len(done)} of {len(rows)} rows; the front needs {needed} (chance {chance:.1e})"
        if self.guide == "loss":
            parts = -_log_probabilities(seen)[np.arange(len(done)), labels]
        else:
            parts = divergences(seen, reference[list(done)])
        least = float(parts.sum()) / len(rows)
        if least < self.cost:
            return None
        return f"{self.guide} at least {least:.3g} after {len(done)} of {len(rows)} rows; the front has {self.cost:.3g}"


def _hypergeometric(hits: int, rows: int, good: int, drawn: int) -> float:
    """Return the chance of at most ``hits`` good ones among ``drawn`` of ``rows`` of which ``good`` are good."""
    if good > rows:
        return 0.0
    ways = sum(math.comb(good, k) * math.comb(rows - good, drawn - k) for k in range(min(hits, drawn) + 1))
    return float(ways / math.comb(rows, drawn))


def predictions_hash(logits: np.ndarray) -> str:
    """Return the SHA-256 of the predicted classes of ``logits`` (``rows x classes``), in row order."""
    return hashlib.sha256(logits.argmax(axis=1).astype("<i4").tobytes()).hexdigest()


def timing_inputs(names: tuple[str, ...], target: TargetConfig, vocabulary: int, seed: int) -> dict[str, np.ndarray]:
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


def _quietest_row(session: Session, inputs: Mapping[str, np.ndarray], clock: Callable[[], float]) -> Block:
    rows: list[Block] = []
    for _ in range(_ATTEMPTS):
        before = machine.waited_seconds()
        times = _row(session, inputs, clock)
        rows.append(Block(times, (machine.waited_seconds() - before) / float(times.sum() or 1.0)))
        if rows[-1].waited <= DISTURBED:
            break
    return min(rows, key=lambda row: row.waited)


def _row(session: Session, inputs: Mapping[str, np.ndarray], clock: Callable[[], float]) -> np.ndarray:
    times: list[float] = []
    # By the shortest: one may have been disturbed.
    while len(times) < _FEWEST_RUNS or (len(times) < _MOST_RUNS and len(times) * min(times) < _BLOCK_S):
        start = clock()
        session.run(inputs)
        times.append(clock() - start)
    return np.array(times)


@dataclass(frozen=True)
class Pair:
    """Seconds of each run of the candidate and of the reference, in blocks that follow each other.

    With the larger share of a block that threads stood ready without a core.
    """

    candidate: np.ndarray
    reference: np.ndarray
    waited: float = 0.0

    @classmethod
    def of(cls, candidate: Block, reference: Block) -> Pair:
        return cls(candidate.seconds, reference.seconds, max(candidate.waited, reference.waited))


def paired_times(
    candidate: Session, reference: Session, inputs: Mapping[str, np.ndarray], *, pairs: int, clock: Callable[[], float]
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

    Raises:
        MeasurementError: if a run took no measurable time.
    """
    found = []
    with slot.timing():
        for number in range(pairs):
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
    found = Block(_row(session, inputs, clock))
    if clock is time.perf_counter:
        found = _quietest_row(session, inputs, clock)
    elif len(found.seconds) > _FEWEST_RUNS:
        found = Block(_row(session, inputs, clock))
    if not (found.seconds > 0).all():
        untimed = int((found.seconds <= 0).sum())
        raise MeasurementError(f"latency: {untimed} of {found.seconds.size} runs took no measurable time")
    return found


def summarize(moments: Sequence[Sequence[Pair]], *, seed: int) -> Latency:
    """Turn times into quantiles and a ratio with its interval.

    What disturbs a run makes it longer, never shorter, and small models more than large ones: which quarter of the runs
    is the fastest depends on that far less than which half is. The ratio is of these lower quartiles.

    The interval comes from a two-stage bootstrap, moments first and then pairs within each (Davison and Hinkley 1997,
    "Bootstrap Methods and their Application", section 3.8): pairs of one moment share the state of the machine.

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
    drawn_runs = runs[:, pairs.reshape(BOOTSTRAP_DRAWS, -1)].reshape(2, BOOTSTRAP_DRAWS, -1)
    candidates, references = lower_quartiles(drawn_runs)
    low, high = np.quantile(candidates / references, (0.025, 0.975))
    p50, p90 = np.quantile(np.concatenate([pair.candidate for pair in taken]), (0.5, 0.9)) * 1e3
    reference = float(np.median(np.concatenate([pair.reference for pair in taken]))) * 1e3
    candidate, beside = lower_quartiles(runs.reshape(2, -1))
    ratio = float(candidate / beside)
    waited = float(np.median([pair.waited for pair in taken]))
    # A few draws of few moments may all lie on one side of the ratio of all.
    return Latency(float(p50), float(p90), reference, ratio, min(ratio, float(low)), max(ratio, float(high)), waited)


def runs_of(pairs: Sequence[Pair]) -> np.ndarray:
    """Return the seconds of all runs, ``2 x pairs x runs of a block``: of the candidate, and of the reference.

    NaN stands where a block has fewer runs than the longest one.
    """
    runs = np.full((2, len(pairs), _MOST_RUNS), np.nan)
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
