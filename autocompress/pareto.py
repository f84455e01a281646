"""Dominance, the front, the volume it covers, and the rules by which a point is picked from it.

Fronts and hypervolumes are computed by moocore (Lopez-Ibanez et al.), which does thousands of points in milliseconds.
The hypervolume as a measure of a whole search is Zitzler and Thiele's, "Multiobjective Evolutionary Algorithms: A
Comparative Case Study and the Strength Pareto Approach", IEEE Transactions on Evolutionary Computation 3 (4), 1999.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from autocompress.errors import ConfigError, NoFeasiblePointError
from autocompress.records import OBJECTIVES, Candidate, Measurement

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Preference = Literal["knee", "latency", "size", "accuracy"]


def costs(candidates: Iterable[Candidate], objectives: Sequence[str]) -> np.ndarray:
    """Return objectives as costs to minimise.

    Returns:
        ``candidates x objectives``, float64; objectives to maximise are negated.
    """
    rows = []
    for candidate in candidates:
        row = []
        for name in objectives:
            field, direction = OBJECTIVES[name]
            value = float(getattr(candidate.score, field))
            row.append(-value if direction == "maximize" else value)
        rows.append(row)
    return np.array(rows, dtype=float).reshape(len(rows), len(objectives))


def nondominated(points: np.ndarray) -> np.ndarray:
    """Return which rows no other row dominates; of equal rows the first one.

    Args:
        points: ``points x objectives``, to minimise.

    Returns:
        ``points``, bool.
    """
    if len(points) == 0:
        return np.zeros(0, dtype=bool)
    import moocore

    return np.asarray(moocore.is_nondominated(points, maximise=False, keep_weakly=False), dtype=bool)


class Unbeaten:
    """The candidates that none beats, kept up to date as others come: who was beaten once stays beaten."""

    def __init__(self, objectives: Sequence[str]) -> None:
        self._objectives = objectives
        self._found: list[Candidate] = []
        self._seen = 0

    def among(self, candidates: Mapping[int, Candidate]) -> list[Candidate]:
        """Return those of ``candidates``, which were added at the end since the last call, by number."""
        if self._seen != len(candidates):
            latest = itertools.islice(candidates.values(), self._seen, None)
            usable = self._found + [c for c in latest if c.measurement is not None and c.feasible]
            usable.sort(key=lambda c: c.number)  # of equal ones the first is kept
            kept = nondominated(costs(usable, self._objectives))
            self._found = [c for c, on_it in zip(usable, kept, strict=True) if on_it]
            self._seen = len(candidates)
        return self._found


def contenders(front: Sequence[Candidate], others: Iterable[Candidate], objectives: Sequence[str]) -> list[Candidate]:
    """Return those of ``others`` that may belong on a front, as their latencies were timed once, at one moment.

    They would be on it if their latency were at the low end of its interval. Who has the least to gain comes first.
    """
    if "latency" not in objectives or not front:
        return []
    column, points = list(objectives).index("latency"), costs(front, objectives)
    on_it, found = {candidate.number for candidate in front}, []
    for candidate in others:
        usable = candidate.measurement is not None and candidate.feasible and candidate.number not in on_it
        if not usable or candidate.score.confirmed:
            continue
        own = costs([candidate], objectives)[0]
        no_worse = np.delete(points, column, axis=1) <= np.delete(own, column)
        limit = float(points[no_worse.all(axis=1), column].min(initial=np.inf))
        if candidate.score.latency_ratio_low < limit <= own[column]:
            found.append((own[column] / limit, candidate.number, candidate))
    return [candidate for *_, candidate in sorted(found)]


def nondominated_ranks(points: np.ndarray) -> np.ndarray:
    """Return each row's rank: 0 on the front, 1 on the front of what is left without it, and so on.

    Args:
        points: ``points x objectives``, to minimise.
    """
    if len(points) == 0:
        return np.zeros(0, dtype=int)
    import moocore

    return np.asarray(moocore.pareto_rank(points), dtype=int)


def hypervolume(points: np.ndarray, reference: Sequence[float]) -> float:
    """Return the volume that ``points`` (``points x objectives``, to minimise) dominate below ``reference``."""
    inside = points[np.all(points < np.asarray(reference), axis=1)] if len(points) else points
    if len(inside) == 0:
        return 0.0
    import moocore

    return float(moocore.hypervolume(inside, ref=np.asarray(reference, dtype=float)))


def volume(candidates: Iterable[Candidate], reference: Measurement, majority: float) -> float:
    """Return the share of the box between a useless and a perfect model that ``candidates`` cover together.

    The three edges of the box are accuracy, size and latency ratio, whatever the objectives of the search were, so that
    searches with different objectives can be held against each other. Its worst corner has the accuracy ``majority``
    and the size and latency of the uncompressed model; its best, at volume 1, accuracy 1 at no size and no latency.

    Args:
        candidates: only complete and feasible ones count, and only if they are better than the worst corner in all
            three.
        reference: score of the uncompressed model in the same runtime.
        majority: share of the scored rows that have the most frequent class, the accuracy of always guessing it.

    Returns:
        Volume within 0..1.

    Raises:
        ConfigError: if ``majority`` is not within 0..1.
    """
    return hypervolume(_losses([c for c in candidates if _usable(c)], reference, majority), (1.0, 1.0, 1.0))


def volume_curve(candidates: Iterable[Candidate], reference: Measurement, majority: float) -> list[float]:
    """Return `volume` after each candidate in their order, with those that do not count; arguments as there.

    Raises:
        ConfigError: if ``majority`` is not within 0..1.
    """
    tried = list(candidates)
    losses = iter(_losses([c for c in tried if _usable(c)], reference, majority))
    front = np.zeros((0, 3))
    curve: list[float] = []
    covered = 0.0
    for candidate in tried:
        if _usable(candidate):
            point = next(losses)
            if np.all(point < 1.0) and not np.any(np.all(front <= point, axis=1)):
                front = np.vstack([front[~np.all(front >= point, axis=1)], point])
                # Another point never lowers a volume; rounding may.
                covered = max(covered, hypervolume(front, (1.0, 1.0, 1.0)))
        curve.append(covered)
    return curve


def _usable(candidate: Candidate) -> bool:
    return candidate.state == "COMPLETE" and candidate.measurement is not None and candidate.feasible


def _losses(candidates: Sequence[Candidate], reference: Measurement, majority: float) -> np.ndarray:
    """Return ``candidates x (accuracy, size, latency)`` as distance from the best corner in lengths of the box's edges.

    0 is the best corner and 1 the worst.
    """
    if not 0 <= majority <= 1:
        raise ConfigError(f"volume: majority must be a share of the scored rows within 0..1, got {majority}")
    rows = np.array([(c.score.accuracy, c.score.size_bytes, c.score.latency_ratio) for c in candidates], dtype=float)
    losses = rows.reshape(len(candidates), 3)
    # With rows of one class only nothing is better than guessing it: the box is flat and its volume 0.
    losses[:, 0] = (1 - losses[:, 0]) / (1 - majority) if majority < 1 else 1.0
    losses[:, 1] /= reference.size_bytes
    return losses


@dataclass(frozen=True)
class Front:
    """The candidates that no other dominates, in order of falling accuracy, with the reference they are held against.

    Args:
        points: feasible, complete and non-dominated candidates.
        reference: score of the uncompressed model in the same runtime.
        objectives: names of the objectives that dominance was judged by.
    """

    points: tuple[Candidate, ...]
    reference: Measurement
    objectives: tuple[str, ...]

    @classmethod
    def of(cls, candidates: Iterable[Candidate], reference: Measurement, objectives: Sequence[str]) -> Front:
        """Build the front of ``candidates``; failed and infeasible ones never stand on it."""
        usable = [c for c in candidates if _usable(c)]
        mask = nondominated(costs(usable, objectives))
        points = [c for c, kept in zip(usable, mask, strict=True) if kept]
        points.sort(key=lambda c: (-c.score.accuracy, c.score.latency_ratio, c.number))
        return cls(tuple(points), reference, tuple(objectives))

    def __len__(self) -> int:
        return len(self.points)

    def pick(
        self,
        *,
        prefer: Preference = "knee",
        max_accuracy_drop: float | None = None,
        max_latency_ms: float | None = None,
        max_latency_ratio: float | None = None,
        max_size_mb: float | None = None,
    ) -> Candidate:
        """Return the point that satisfies all limits and is best by ``prefer``.

        Args:
            prefer: ``knee`` is nearest to the best value of every objective, each scaled to the range of the points
                that satisfy the limits.
            max_accuracy_drop: against the reference, as a fraction (0.01 is one percentage point).
            max_latency_ms: median latency.
            max_latency_ratio: candidate over reference.
            max_size_mb: megabytes of 1e6 bytes.

        Raises:
            ConfigError: if ``prefer`` is none of these.
            NoFeasiblePointError: if no point satisfies the limits; names the one that misses them least.
        """
        if prefer not in get_args(Preference):
            raise ConfigError(f"pick: prefer must be one of {', '.join(get_args(Preference))}, got {prefer!r}")
        if not self.points:
            raise NoFeasiblePointError("pick: the front is empty; no candidate completed within the constraints")
        limits: list[tuple[str, float | None, Callable[[Measurement], float]]] = [
            ("accuracy drop", max_accuracy_drop, lambda m: self.reference.accuracy - m.accuracy),
            ("latency in ms", max_latency_ms, lambda m: m.latency_ms),
            ("latency ratio", max_latency_ratio, lambda m: m.latency_ratio),
            ("size in MB", max_size_mb, lambda m: m.size_bytes / 1e6),
        ]
        active = [(name, limit, value) for name, limit, value in limits if limit is not None]

        def excess(candidate: Candidate) -> float:
            # Relative to the limit, so that milliseconds and megabytes can be compared; 1e-9 forgives rounding.
            return max(
                [(value(candidate.score) - limit) / max(abs(limit), 1e-3) for _, limit, value in active], default=0.0
            )

        feasible = [c for c in self.points if excess(c) <= 1e-9]
        if not feasible:
            nearest = min(self.points, key=excess)
            missed = "; ".join(f"{name} {value(nearest.score):.4g} (limit {limit:g})" for name, limit, value in active)
            raise NoFeasiblePointError(f"pick: no point is feasible; the nearest is trial {nearest.number}: {missed}")
        if prefer == "latency":
            return min(feasible, key=lambda c: (c.score.latency_ratio, -c.score.accuracy))
        if prefer == "size":
            return min(feasible, key=lambda c: (c.score.size_bytes, -c.score.accuracy))
        if prefer == "accuracy":
            return max(feasible, key=lambda c: (c.score.accuracy, -c.score.latency_ratio))
        return feasible[self._knee(feasible)]

    def trial(self, number: int) -> Candidate:
        """Return the point with this trial number.

        Raises:
            NoFeasiblePointError: if it is not on the front; names the nearest number that is.
        """
        for point in self.points:
            if point.number == number:
                return point
        if not self.points:
            raise NoFeasiblePointError(f"trial {number}: the front is empty")
        nearest = min(self.points, key=lambda c: abs(c.number - number))
        known = ", ".join(str(c.number) for c in sorted(self.points, key=lambda c: c.number))
        raise NoFeasiblePointError(
            f"trial {number}: not on the front; the nearest is trial {nearest.number} (the front: {known})"
        )

    def _knee(self, candidates: Sequence[Candidate]) -> int:
        points = costs(candidates, self.objectives)
        span = np.ptp(points, axis=0)
        scaled = (points - points.min(axis=0)) / np.where(span > 0, span, 1.0)
        return int(np.argmin(np.linalg.norm(scaled, axis=1)))

    def to_frame(self) -> pd.DataFrame:
        """Return one row a point, with the columns of ``pareto.csv``."""
        from autocompress.report.tables import frame

        return frame(self.points)

    def plot(self) -> go.Figure:
        """Return the front as a plotly figure: accuracy over latency, size as marker area."""
        from autocompress.report.figures import front_figure

        return front_figure(self, ())
