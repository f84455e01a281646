"""The front, and how a point is picked from it: within limits, by what is wanted most, and at whose expense."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from autocompress.errors import ConfigError, NoFeasiblePointError
from autocompress.pareto import costs, nondominated, stands_for, told_apart
from autocompress.records import Candidate, Measurement

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Preference = Literal["knee", "latency", "size", "accuracy", "divergence"]
_ROUNDING = 1e-9
_BEST = {
    "latency": "the fastest",
    "size": "the smallest",
    "accuracy": "the most accurate",
    "divergence": "the least divergent",
}
_KEYS: dict[str, Callable[[Measurement], tuple[float, ...]]] = {
    "latency": lambda score: (score.latency_ratio, -score.accuracy),
    "size": lambda score: (score.size_bytes, -score.accuracy),
    "accuracy": lambda score: (-score.accuracy, score.latency_ratio),
    "divergence": lambda score: (math.inf if score.divergence is None else score.divergence, score.latency_ratio),
}
"""What is least of the best, and what decides between equal ones."""
KNEE, CLOSE = "knee", 0.01
_WISHES: tuple[tuple[str, Preference, float | None], ...] = (
    ("fastest", "latency", CLOSE),
    ("smallest", "size", CLOSE),
    (KNEE, "knee", None),
)
"""What is recommended: its name, what is preferred, and how much accuracy it may lose."""
_JUDGED_BY = {"latency": "latency", "size": "size_bytes"}
"""The objective that a preference is among: of what nobody judged by, the best need not be on the front."""
_NAMES = {"latency": "speed", "size_bytes": "size", "peak_memory": "memory"}
"""What an objective is called where its reader weighs it against others."""


class Limited(NamedTuple):
    """What a point has of something that is limited.

    Args:
        name: with its unit.
        value: the point's.
        limit: the most that it may be.
        least: a smaller limit counts as this where it is told how far one is missed.
    """

    name: str
    value: float
    limit: float
    least: float


@dataclass(frozen=True)
class Limits:
    """What a picked point must keep to; None is no limit.

    Args:
        max_accuracy_drop: against the reference, as a fraction (0.01 is one percentage point).
        max_latency_ms: median latency.
        max_latency_ratio: candidate over reference.
        max_size_mb: megabytes of 1e6 bytes.
    """

    max_accuracy_drop: float | None = None
    max_latency_ms: float | None = None
    max_latency_ratio: float | None = None
    max_size_mb: float | None = None

    def of(self, score: Measurement, reference: Measurement) -> list[Limited]:
        """Return, for each limit that is set, what the point has."""
        drop = None if self.max_accuracy_drop is None else 100 * self.max_accuracy_drop
        every = (
            ("points of accuracy lost", 100 * (reference.accuracy - score.accuracy), drop, 0.1),
            ("latency in ms", score.latency_ms, self.max_latency_ms, 1e-3),
            ("latency ratio", score.latency_ratio, self.max_latency_ratio, 1e-3),
            ("size in MB", score.size_bytes / 1e6, self.max_size_mb, 1e-3),
        )
        return [Limited(name, value, limit, least) for name, value, limit, least in every if limit is not None]

    def excess(self, score: Measurement, reference: Measurement) -> float:
        """Return by how much the limit that is missed most is exceeded, relative to it; not above 0 keeps to all."""
        found = (
            # Relative, so that milliseconds and megabytes can be compared.
            (of.value - of.limit) / max(abs(of.limit), of.least) - _ROUNDING
            for of in self.of(score, reference)
        )
        return max(found, default=0.0)


@dataclass(frozen=True)
class Neighbour:
    """A point of the front that one would take instead to have more of one thing.

    Args:
        better: the objective that it is better in.
        point: the point.
        beyond: whether it breaks a limit that was given.
    """

    better: str
    point: Candidate
    beyond: bool = False


@dataclass(frozen=True)
class Choice:
    """A point that was picked.

    Args:
        point: the point.
        reason: why this one, in words.
        neighbours: what lies next to it, at most one for each objective.
    """

    point: Candidate
    reason: str
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True, repr=False)
class Front:
    """The candidates that no other dominates, in order of falling accuracy, with the reference they are held against.

    Args:
        points: feasible, complete and non-dominated candidates that their latencies tell apart (`pareto.told_apart`).
        reference: score of the uncompressed model in the same runtime.
        objectives: names of the objectives that dominance was judged by.
        nearby: candidates that would be on a front of divergence in place of quality, and are not on this one. What
            is most accurate among many was lucky, too; what diverges least may keep more on rows that nobody saw.
    """

    points: tuple[Candidate, ...]
    reference: Measurement
    objectives: tuple[str, ...]
    nearby: tuple[Candidate, ...] = ()

    @classmethod
    def of(
        cls,
        candidates: Iterable[Candidate],
        reference: Measurement,
        objectives: Sequence[str],
        *,
        nearby: Iterable[Candidate] = (),
    ) -> Front:
        """Build the front of ``candidates``; failed and infeasible ones stand neither on it nor nearby."""
        usable = [c for c in candidates if c.usable]
        mask = nondominated(costs(usable, objectives))
        points = told_apart([c for c, kept in zip(usable, mask, strict=True) if kept], objectives)
        points.sort(key=lambda c: (-c.score.accuracy, c.score.latency_ratio, c.number))
        numbers = {c.number for c in points}
        others = tuple(c for c in nearby if c.usable and c.number not in numbers)
        return cls(tuple(points), reference, tuple(objectives), others)

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
        """Return the point that keeps to all limits and is best by ``prefer``; see `choose`, which says why."""
        return self.choose(Limits(max_accuracy_drop, max_latency_ms, max_latency_ratio, max_size_mb), prefer).point

    def choose(self, limits: Limits, prefer: Preference = "knee") -> Choice:
        """Return the point that keeps to all limits and is best by ``prefer``, why, and what its neighbours trade.

        Args:
            limits: that it must keep to.
            prefer: ``knee`` is nearest to the best value of every objective, each scaled to the range of the points
                that keep to the limits. ``divergence`` is least from the uncompressed model's predictions, of what is
                nearby, too.

        Raises:
            ConfigError: if ``prefer`` is none of these.
            NoFeasiblePointError: if no point keeps to the limits; names the one that misses them least.
        """
        if prefer not in get_args(Preference):
            raise ConfigError(f"pick: prefer must be one of {', '.join(get_args(Preference))}, got {prefer!r}")
        if not self.points:
            raise NoFeasiblePointError("pick: the front is empty; no candidate completed within the constraints")
        offered = list(self.points)
        if prefer == "divergence":
            offered = [c for c in (*self.points, *self.nearby) if c.score.divergence is not None]
            if not offered:
                raise NoFeasiblePointError("pick: the study is of a version that did not take divergences")
        feasible = [c for c in offered if limits.excess(c.score, self.reference) <= 0]
        if not feasible:
            nearest = min(offered, key=lambda c: limits.excess(c.score, self.reference))
            found = limits.of(nearest.score, self.reference)
            missed = "; ".join(f"{of.name} {of.value:.4g} (limit {of.limit:g})" for of in found)
            raise NoFeasiblePointError(f"pick: no point is feasible; the nearest is trial {nearest.number}: {missed}")
        point = self._best(feasible, prefer)
        reason = self._reason(point, feasible, len(offered), prefer, limits)
        return Choice(point, reason, self.neighbours(point, limits))

    def ranked(self, prefer: Preference) -> list[Candidate]:
        """Return the points, the best by ``prefer`` first, which is not ``knee``: that depends on what is offered."""
        return sorted(self.points, key=lambda c: _KEYS[prefer](c.score))

    def _best(self, among: Sequence[Candidate], prefer: Preference) -> Candidate:
        if prefer != "knee":
            return min(among, key=lambda c: _KEYS[prefer](c.score))
        scaled = _scaled(costs(among, self.objectives))
        return among[int(np.argmin(np.linalg.norm(scaled, axis=1)))]

    def _reason(
        self, point: Candidate, among: Sequence[Candidate], offered: int, prefer: Preference, limits: Limits
    ) -> str:
        if offered == len(self) == 1:
            return "the only point of the front"
        front = "the front, by accuracy or by divergence" if prefer == "divergence" and self.nearby else "the front"
        whom = f"the {offered} points of {front}"
        if found := limits.of(point.score, self.reference):
            kept = ", ".join(f"{of.name} {of.value:.3g} <= {of.limit:g}" for of in found)
            if len(among) == 1:
                return f"the only one of {whom} within the limits ({kept})"
            within = f"within the limits ({kept})"
            fewer = len(among) < offered
            whom = f"the {len(among)} points {within}, of {offered} on {front}" if fewer else f"{whom}, all {within}"
        if prefer != "knee":
            careful = point.score.confirmed or point in self.points
            once = "" if careful else "; its latency was timed once, during the search"
            return f"{_BEST[prefer]} of {whom}{once}"
        names = [_NAMES.get(name, name) for name in self.objectives]
        together = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
        return f"the knee of {whom}: nearest to the best {together}, each scaled to their range"

    def neighbours(self, point: Candidate, limits: Limits | None = None) -> tuple[Neighbour, ...]:
        """Return, for each objective in which some point is better, the one that gives up least of the others for it.

        What is given up is the distance in all other objectives in which it is worse, each scaled to the front's range;
        of those that give up as much, the one that gains most. What breaks ``limits`` is told, and says so.
        """
        limits = limits or Limits()
        others = [c for c in self.points if c.number != point.number]
        if not others:
            return ()
        scaled = _scaled(costs([point, *others], self.objectives))
        worse = scaled[1:] - scaled[0]
        found = []
        for column, name in enumerate(self.objectives):
            better = np.flatnonzero(worse[:, column] < 0)
            if len(better):
                lost = np.linalg.norm(np.maximum(worse[better], 0), axis=1)
                order = np.lexsort((worse[better, column], lost.round(9)))
                near = others[better[order[0]]]
                found.append(Neighbour(name, near, limits.excess(near.score, self.reference) > 0))
        return tuple(found)

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

    def recommended(self) -> list[tuple[list[str], Candidate]]:
        """Return the points to look at first, each with what it is.

        These are the fastest and the smallest that lose at most `CLOSE` of accuracy, where these are objectives, and
        the knee; one point may be several of them.
        """
        found: dict[int, tuple[list[str], Candidate]] = {}
        for name, prefer, drop in _WISHES:
            if _JUDGED_BY.get(prefer, self.objectives[0]) not in self.objectives:
                continue
            try:
                point = self.pick(prefer=prefer, max_accuracy_drop=drop)
            except NoFeasiblePointError:
                continue
            found.setdefault(point.number, ([], point))[0].append(name)
        return list(found.values())

    def asked_for(self, candidate: Candidate) -> Choice:
        """Return a candidate that was named by its number as a choice, which says if it is off the front."""
        reason = "asked for by its number"
        if candidate.measurement is None:
            return Choice(candidate, f"{reason}; it has no measurement", ())
        if not candidate.feasible:
            reason += "; it breaks a constraint"
        elif all(point.number != candidate.number for point in self.points):
            no_worse = (costs(self.points, self.objectives) <= costs([candidate], self.objectives)).all(axis=1)
            reason += "; not on the front"
            if no_worse.any():
                number = self.points[int(no_worse.argmax())].number
                reason += f", where trial {number} is at least as good in every objective"
            elif (by := stands_for(candidate, self.points, self.objectives)) is not None:
                reason += f", where trial {by.number} is as fast as far as timings tell, and as good in all else"
        return Choice(candidate, reason, self.neighbours(candidate))

    def to_frame(self) -> pd.DataFrame:
        """Return one row a point, with the columns of ``pareto.csv``."""
        from autocompress.report.tables import frame

        return frame(self.points)

    def __repr__(self) -> str:
        best = ", ".join(f"{wished(names)} {point!r}" for names, point in self.recommended())
        return f"<front of {len(self)} points: {best}>" if self.points else "<front without a point>"

    def _repr_html_(self) -> str:
        from autocompress.report.notebook import front_html

        return front_html(self)

    def plot(self, over: Literal["latency", "size"] = "latency") -> go.Figure:
        """Return the front as a plotly figure: accuracy over latency, with size as marker area, or over size."""
        from autocompress.report.figures import front_figure

        return front_figure(self, (), over=over)


def wished(names: Sequence[str]) -> str:
    """Say what a recommended point is, with what it may lose."""
    return " and ".join(name if name == KNEE else f"{name} within {CLOSE:.0%}" for name in names)


def _scaled(points: np.ndarray) -> np.ndarray:
    """Return ``points x objectives`` from 0 at the best to 1 at the worst of each."""
    span = np.ptp(points, axis=0)
    scaled: np.ndarray = (points - points.min(axis=0)) / np.where(span > 0, span, 1.0)
    return scaled
