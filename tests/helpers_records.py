"""Candidates with made-up scores, for tests of everything that comes after measuring."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from autocompress.decisions import PruneNeurons, Quantize
from autocompress.front import Front
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate, Measurement

REFERENCE_MS = 16.0
REFERENCE_BYTES = 90_000_000
ROWS = 1000


def wilson(share: float, rows: int = ROWS) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share of ``rows``."""
    z = 1.959964
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    return max(0.0, centre - half), min(1.0, centre + half)


def make_measurement(
    *, accuracy: float = 0.85, size_bytes: int = 20_000_000, ratio: float = 0.5, seconds: float = 6.8
) -> Measurement:
    """Return a score whose intervals are 2 % wide in latency and Wilson's for 1000 rows in accuracy."""
    low, high = wilson(accuracy)
    return Measurement(
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        accuracy_drop=0.88 - accuracy,
        accuracy_drop_low=0.87 - accuracy,
        accuracy_drop_high=0.89 - accuracy,
        loss=0.4,
        rows=ROWS,
        size_bytes=size_bytes,
        latency_ms=ratio * REFERENCE_MS,
        latency_p90_ms=1.1 * ratio * REFERENCE_MS,
        reference_ms=REFERENCE_MS,
        latency_ratio=ratio,
        latency_ratio_low=0.98 * ratio,
        latency_ratio_high=1.02 * ratio,
        predictions="0" * 64,
        seconds=seconds,
        fingerprint={"cpu": "test"},
    )


def make_reference() -> Measurement:
    """Return the score of an uncompressed model: 88 %, 90 MB, 16 ms."""
    return make_measurement(accuracy=0.88, size_bytes=REFERENCE_BYTES, ratio=1.0, seconds=0.0)


def make_candidate(
    number: int,
    *,
    accuracy: float = 0.85,
    size_bytes: int = 20_000_000,
    ratio: float = 0.5,
    state: str = "COMPLETE",
    plan: CompressionPlan | None = None,
    params: dict[str, Any] | None = None,
    failure: str | None = None,
    feasible: bool = True,
    origin: str = "sampler",
    seconds: float = 6.8,
) -> Candidate:
    """Return a candidate; one whose state is not ``COMPLETE`` has a reason in place of a score."""
    if plan is None:
        # The width differs, so that each number has a plan of its own.
        plan = CompressionPlan(
            (
                ("block.0.ffn", PruneNeurons(keep=64 + number)),
                ("block.0.ffn", Quantize(weight_bits=8, activation_bits=8)),
            )
        )
    complete = state == "COMPLETE"
    return Candidate(
        number=number,
        state=state,
        plan=plan,
        params={} if params is None else params,
        measurement=make_measurement(accuracy=accuracy, size_bytes=size_bytes, ratio=ratio, seconds=seconds)
        if complete
        else None,
        failure=None if complete else (failure or "logits: not finite"),
        feasible=feasible,
        origin=origin,
    )


def random_candidates(seed: int) -> list[Candidate]:
    """Return up to 40 candidates, some failed or infeasible, on a grid so coarse that values tie."""
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


SEARCH = [
    make_candidate(0, accuracy=0.875, size_bytes=40_000_000, ratio=0.8),
    make_candidate(1, accuracy=0.872, size_bytes=30_000_000, ratio=0.9),
    make_candidate(2, accuracy=0.83, size_bytes=15_000_000, ratio=0.25),
    make_candidate(3, accuracy=0.80, size_bytes=45_000_000, ratio=0.95),
    make_candidate(4, accuracy=0.86, size_bytes=12_000_000, ratio=0.2, feasible=False),
    make_candidate(5, state="FAIL", failure="logits: not finite"),
]
"""A front of three, a dominated candidate, an infeasible and a failed one."""


def front_of(candidates: list[Candidate]) -> Front:
    return Front.of(candidates, make_reference(), ("accuracy", "size_bytes", "latency"))
