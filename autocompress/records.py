"""What is known of a candidate: its plan and either a measurement or the reason why there is none."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from autocompress.errors import MeasurementError
from autocompress.plan import CompressionPlan

OBJECTIVES: dict[str, tuple[str, str]] = {
    "accuracy": ("accuracy", "maximize"),
    "loss": ("loss", "minimize"),
    "divergence": ("divergence", "minimize"),
    "size_bytes": ("size_bytes", "minimize"),
    "latency": ("latency_ratio", "minimize"),
    "peak_memory": ("peak_memory_bytes", "minimize"),
}
"""Objective by its name in a run file: the field of `Measurement` that it reads, and its direction."""
LATENCY_PROTOCOL = "lower quartiles of runs in pairs of blocks"
"""How latencies are taken; those of another protocol are not to be mixed with them."""
QUALITIES = ("accuracy", "loss", "divergence")
"""Objectives that are taken by running rows through the artefact."""


Z95 = 1.959963984540054
"""The normal distribution lies to 95 % within as many standard deviations."""
DISTURBED = 0.03
"""Share of a block's time by wall clock that its threads may wait for a core without being timed again or marked."""


class Drop(NamedTuple):
    """How much of the reference's accuracy is lost on the same rows, with its 95 % interval; a gain is negative."""

    value: float
    low: float
    high: float

    def fields(self) -> dict[str, Any]:
        """Return the values by the names of the fields that a `Measurement` keeps them in."""
        return {"accuracy_drop": self.value, "accuracy_drop_low": self.low, "accuracy_drop_high": self.high}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The score of one artefact; latencies in milliseconds for one call of the target's batch.

    Args:
        accuracy: share of the search rows that the artefact classifies rightly, with its 95 % Wilson interval.
        accuracy_drop: what that is less than the reference's on the same rows, with the 95 % interval of such a paired
            difference; negative where it is more. None in older records.
        loss: mean cross-entropy on the same rows.
        divergence: mean Kullback-Leibler divergence from the reference's class probabilities on the same rows, in nats;
            None in records of version 0.1.
        rows: number of rows scored.
        size_bytes: bytes of the artefact's model files.
        latency_ms: median; ``latency_p90_ms`` the 90th percentile.
        reference_ms: median of the reference in the same paired runs.
        latency_ratio: lower quartile of the candidate's runs over that of the reference's, below 1 is faster, with its
            95 % bootstrap interval.
        latency_waited: share of the time that threads stood ready without a core while it was taken by wall clock.
        latency_drift: standard deviation, as a share, of ratios of one artefact from one time to another; the interval
            is no narrower than that. 0 where it is not known.
        latency_adjusted: what the ratio and its interval were multiplied by, since the reference was slower or faster
            than its pace while they were taken (`calm.py`).
        predictions: SHA-256 of the predicted classes, in row order.
        peak_memory_bytes: what loading and running it adds to a fresh process's memory, where that is asked for.
        stages: seconds by stage (build, load, latency, accuracy, ...).
        confirmed: whether the latency was taken anew, in a fresh process over several loads, with nothing else running.
        seconds: time spent to build and score.
        fingerprint: machine and runtime that gave the numbers.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    rows: int
    size_bytes: int
    latency_ms: float
    latency_p90_ms: float
    reference_ms: float
    latency_ratio: float
    latency_ratio_low: float
    latency_ratio_high: float
    predictions: str
    accuracy_drop: float | None = None
    accuracy_drop_low: float | None = None
    accuracy_drop_high: float | None = None
    divergence: float | None = None
    peak_memory_bytes: int | None = None
    latency_waited: float = 0.0
    latency_drift: float = 0.0
    latency_adjusted: float = 1.0
    confirmed: bool = False
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)

    @property
    def drop(self) -> Drop | None:
        """What is lost of the reference's accuracy, where that is known."""
        if self.accuracy_drop is None or self.accuracy_drop_low is None or self.accuracy_drop_high is None:
            return None
        return Drop(self.accuracy_drop, self.accuracy_drop_low, self.accuracy_drop_high)

    @property
    def disturbed(self) -> bool:
        """Whether other programs took so much of the cores that the latency says more of them than of the model."""
        return self.latency_waited > DISTURBED

    @property
    def latency_deviation(self) -> float:
        """Standard deviation of the latency ratio's logarithm, by its interval."""
        return math.log(self.latency_ratio_high / self.latency_ratio_low) / (2 * Z95)

    def drifting(self, drift: float) -> Measurement:
        """Return self with an interval that is no narrower than ratios differ from one time to another.

        Args:
            drift: the standard deviation of that, as a share.
        """
        if not drift:
            return self
        half = Z95 * drift
        return dataclasses.replace(
            self,
            latency_ratio_low=min(self.latency_ratio_low, self.latency_ratio * math.exp(-half)),
            latency_ratio_high=max(self.latency_ratio_high, self.latency_ratio * math.exp(half)),
            latency_drift=drift,
        )

    def check(self) -> Measurement:
        """Return self if every number can stand on a front.

        Raises:
            MeasurementError: if one is not finite, an accuracy is outside 0..1, or a size or latency is not > 0.
        """
        for name in ("accuracy", "accuracy_low", "accuracy_high"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise MeasurementError(f"{name}: must be within 0..1, got {value}")
        for name in ("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"):
            drop = getattr(self, name)
            if drop is not None and not (math.isfinite(drop) and -1 <= drop <= 1):
                raise MeasurementError(f"{name}: must be within -1..1, got {drop}")
        if not math.isfinite(self.loss):
            raise MeasurementError(f"loss: must be finite, got {self.loss}")
        if self.divergence is not None and not (math.isfinite(self.divergence) and self.divergence >= 0):
            raise MeasurementError(f"divergence: must be finite and >= 0, got {self.divergence}")
        if self.peak_memory_bytes is not None and self.peak_memory_bytes <= 0:
            raise MeasurementError(f"peak_memory_bytes: must be > 0, got {self.peak_memory_bytes}")
        positive = ("size_bytes", "latency_ms", "latency_p90_ms", "reference_ms")
        for name in (*positive, "latency_ratio", "latency_ratio_low", "latency_ratio_high"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise MeasurementError(f"{name}: must be finite and > 0, got {value}")
        return self

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        return cls.from_plain(json.loads(text))

    @classmethod
    def from_plain(cls, stored: Mapping[str, Any]) -> Measurement:
        """Return what is stored as the values of the fields, of which older records have fewer."""
        # Before latencies were adjusted they were confirmed in the process that had searched, in which small models
        # are slower: that is not what it means now.
        older = {} if "latency_adjusted" in stored else {"confirmed": False}
        return cls(**{**stored, **older})


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """What is known of a candidate whose accuracy pass was ended because it could not reach the front.

    Args:
        reason: in words, with the statistics.
        rows: search rows that were run.
        size_bytes: bytes of the artefact's model files.
        latency: candidate over reference.
        peak_memory: bytes, 0 where it was not asked for.
        stages: seconds by stage.
    """

    reason: str
    rows: int
    size_bytes: float
    latency: float
    peak_memory: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, repr=False)
class Candidate:
    """One evaluated plan of a study.

    Args:
        number: trial number in the study.
        state: ``COMPLETE``, ``FAIL``, or ``PRUNED`` if its accuracy pass was ended early.
        plan: what was done to the model.
        params: the search space's parameters, empty for a plan from elsewhere.
        measurement: the score, None if it failed or was stopped.
        failure: the reason, None if it has one.
        feasible: whether the run file's constraints hold.
        origin: who proposed it: ``uniform`` or ``sensitivity`` (seeds), ``sampler``, ``mutation`` or ``recover``.
        folder: results folder of the study that it belongs to.
        span: when it was asked for and told, in seconds since 1970, None where that is not known.
    """

    number: int
    state: str
    plan: CompressionPlan
    params: dict[str, Any] = field(default_factory=dict)
    measurement: Measurement | None = None
    failure: str | None = None
    feasible: bool = True
    origin: str = "sampler"
    folder: Path | None = field(default=None, compare=False)
    span: tuple[float, float] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        from autocompress.report.tables import candidate_words

        return f"<trial {self.number}: {candidate_words(self)}>"

    def _repr_html_(self) -> str:
        from autocompress.report.notebook import candidate_html

        return candidate_html(self)

    @property
    def usable(self) -> bool:
        """Whether it can stand on a front: complete, and within the constraints."""
        return self.state == "COMPLETE" and self.measurement is not None and self.feasible

    @property
    def score(self) -> Measurement:
        """The measurement of a complete candidate.

        Raises:
            MeasurementError: if the candidate failed.
        """
        if self.measurement is None:
            raise MeasurementError(f"trial {self.number}: has no measurement ({self.failure})")
        return self.measurement


def drift_of(before: Sequence[Measurement], after: Sequence[Measurement]) -> float:
    """Return by how much latencies of one artefact differ from one time to another.

    That is the standard deviation of one time's logarithms of ratios: of the differences between two times, over the
    square root of two. Pairs of blocks of one time tell less: few of them may be alike by chance, and all are of one
    process. What all artefacts differ by alike comes of the way in which they were taken, and is no part of it.

    Args:
        before: at one time.
        after: of the same artefacts, two or more, at another one.
    """
    moved = [math.log(a.latency_ratio / b.latency_ratio) for b, a in zip(before, after, strict=True)]
    return statistics.stdev(moved) / math.sqrt(2)
