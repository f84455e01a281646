"""Latency ratios as they are where nothing disturbs the machine, whatever it does while they are taken.

What else runs on a machine, often on the same core in another one's name, slows everything for seconds or minutes, but
not everything alike: a small compressed model spends its time elsewhere than its large reference does, and the ratio
of the two moves although they are timed in turn. How much of the reference's slowness a candidate is spared is told by
latencies of a front, each of which is taken twice. With that the reference's speed corrects the ratio, as a control
variate (Lavenberg and Welch 1981, "A Perspective on the Use of Control Variables to Increase the Efficiency of Monte
Carlo Simulations").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.records import Measurement

_FAST = 0.25
"""Share of the times of a reference that are faster than the pace that a machine is said to have."""
_SPARED, _SURE = 0.5, 0.25
"""What is supposed of any machine, and its standard deviation. Between sharing all and being spared all, half is never
wrong by more than half."""
_OTHER_CLOCK = 1.25
"""Times the pace beyond which nothing disturbs: the machine's clock is another one, and slows all models alike."""


@dataclass(frozen=True)
class Calm:
    """How fast a machine is, and how candidates suffer where it is slower.

    Where the reference takes ``t`` times its pace, a candidate of the latency ratio ``r`` takes
    ``t ** (1 - spared * (1 - r))`` times what it takes otherwise: the reference itself ``t``, a very small model
    ``t ** (1 - spared)``.

    Args:
        reference_ms: the reference's pace, of a run.
        spared: 0, where all models are slowed alike, to 1, where only the reference is.
    """

    reference_ms: float
    spared: float

    def adjust(self, measured: Measurement) -> Measurement:
        """Return a measurement with the latency ratio that it has where the reference keeps its pace.

        The median and the 90th percentile stay as they were seen. On another clock the ratio does, too. What it was
        adjusted by before is taken back first.
        """
        slower, seen = measured.reference_ms / self.reference_ms, measured.latency_ratio / measured.latency_adjusted
        same = 1 / _OTHER_CLOCK <= slower <= _OTHER_CLOCK
        factor = slower ** (self.spared * max(0.0, 1 - seen)) if same else 1.0
        anew = factor / measured.latency_adjusted
        return dataclasses.replace(
            measured,
            latency_ratio=anew * measured.latency_ratio,
            latency_ratio_low=anew * measured.latency_ratio_low,
            latency_ratio_high=anew * measured.latency_ratio_high,
            latency_adjusted=factor,
        )


def calm_of(before: Sequence[Measurement], after: Sequence[Measurement]) -> Calm:
    """Return what latencies that were taken at two times, each perhaps in its own way, tell of the machine.

    Args:
        before: at one time.
        after: of the same artefacts at another one.
    """
    pace = float(np.quantile([m.reference_ms for m in (*before, *after)], _FAST))
    first, latest = (np.log([[m.latency_ratio, m.reference_ms] for m in taken]) for taken in (before, after))
    same_clock = np.abs(first - latest)[:, 1] <= np.log(_OTHER_CLOCK)
    if not same_clock.any():
        return Calm(pace, _SPARED)
    first, latest = first[same_clock], latest[same_clock]
    # What large or small models all differ by is the way in which they were taken. What is left is by how much slower
    # the reference was for each.
    (ratio, reference), small = (first - latest).T, np.maximum(0.0, 1 - np.exp(latest[:, 0]))
    alike = np.stack([np.ones_like(small), small], axis=1)
    moved, slowed = (_beyond(alike, values) for values in (ratio, -small * reference))
    power = float(slowed @ slowed)
    alone = float(slowed @ moved) / power if power > 0 else _SPARED
    noise = float(np.square(moved - alone * slowed).sum()) / max(1, len(moved) - 3)
    # Bayes, with a normal prior: few points, or such that the machine treated alike, leave what is supposed.
    weight = noise / _SURE**2
    spared = (power * alone + weight * _SPARED) / (power + weight) if power + weight > 0 else _SPARED
    return Calm(pace, min(1.0, max(0.0, spared)))


def _beyond(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return what ``known`` (``points x effects``) leaves of ``values``, by least squares."""
    return np.asarray(values - known @ np.linalg.lstsq(known, values, rcond=None)[0])
