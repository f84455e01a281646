"""Dominance, and the volume that candidates cover.

Fronts and hypervolumes are computed by moocore (Lopez-Ibanez et al.), which does thousands of points in milliseconds.
The hypervolume as a measure of a whole search is Zitzler and Thiele's, "Multiobjective Evolutionary Algorithms: A
Comparative Case Study and the Strength Pareto Approach", IEEE Transactions on Evolutionary Computation 3 (4), 1999.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from autocompress.errors import ConfigError
from autocompress.records import OBJECTIVES, Candidate, Measurement


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


def tells(candidate: Candidate, objectives: Sequence[str]) -> bool:
    """Return whether a candidate is usable and all objectives were measured; older versions took fewer."""
    return candidate.usable and all(getattr(candidate.score, OBJECTIVES[name][0]) is not None for name in objectives)


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
    """The candidates that none beats, kept up to date as others come: who was beaten once stays beaten.

    Args:
        objectives: that they are compared in.
        without: origin of candidates that are not looked at.
    """

    def __init__(self, objectives: Sequence[str], *, without: str | None = None) -> None:
        self._objectives = objectives
        self._without = without
        self._found: list[Candidate] = []
        self._seen = 0

    def among(self, candidates: Mapping[int, Candidate]) -> list[Candidate]:
        """Return those of ``candidates``, which were added at the end since the last call, by number."""
        if self._seen != len(candidates):
            latest = itertools.islice(candidates.values(), self._seen, None)
            found = self._found + [c for c in latest if c.origin != self._without and tells(c, self._objectives)]
            found.sort(key=lambda c: c.number)  # of equal ones the first is kept
            kept = nondominated(costs(found, self._objectives))
            self._found = [c for c, on_it in zip(found, kept, strict=True) if on_it]
            self._seen = len(candidates)
        return self._found


def told_apart(front: Sequence[Candidate], objectives: Sequence[str]) -> list[Candidate]:
    """Return those of a front that another one does not stand for, as far as timings can tell the two apart.

    One stands for another that it is no worse than in all but latency, if that is faster by less than a standard
    deviation of their difference: timed once more, either may be the faster one. Who is left out has one that stands
    for it among those that stay: they are an epsilon-approximate Pareto set (Laumanns, Thiele, Deb and Zitzler 2002,
    "Combining Convergence and Diversity in Evolutionary Multiobjective Optimization"), with an epsilon for each pair.

    Args:
        front: candidates of which none dominates another.
        objectives: that they were compared in.
    """
    if "latency" not in objectives or not front:
        return list(front)
    field = _Field(front, objectives)
    stays = np.zeros(len(front), dtype=bool)
    for n in np.argsort(-field.latencies, kind="stable"):  # the slowest first: the only ones to stand for the others
        stays[n] = (field.lacking(front[n])[stays] <= 0).all()
    return [candidate for candidate, kept in zip(front, stays, strict=True) if kept]


def stands_for(candidate: Candidate, front: Sequence[Candidate], objectives: Sequence[str]) -> Candidate | None:
    """Return the point of a front that stands for a candidate most clearly, see `told_apart`; None if none does."""
    if "latency" not in objectives or not front:
        return None
    lacking = _Field(front, objectives).lacking(candidate)
    return front[int(lacking.argmax())] if lacking.max() > 0 else None


def contenders(front: Sequence[Candidate], others: Iterable[Candidate], objectives: Sequence[str]) -> list[Candidate]:
    """Return those of ``others`` that may belong on a front, as their latencies were timed once, at one moment.

    If their latency were a standard deviation lower, they would be faster than all that stand for them. As many again
    would be at the low end of the interval, to be timed as long as others and hardly ever to be on the front. Who has
    the least to gain comes first.
    """
    if "latency" not in objectives or not front:
        return []
    field, on_it, found = _Field(front, objectives), {candidate.number for candidate in front}, []
    for candidate in others:
        if not candidate.usable or candidate.number in on_it or candidate.score.confirmed:
            continue
        lacking = float(field.lacking(candidate, apart=False).max())
        if lacking <= candidate.score.latency_deviation:
            found.append((lacking, candidate.number, candidate))
    return [candidate for *_, candidate in sorted(found)]


class _Field:
    """Points that others are compared with, latency, which is never twice the same, apart from all else."""

    def __init__(self, points: Sequence[Candidate], objectives: Sequence[str]) -> None:
        self._rest = [name for name in objectives if name != "latency"]
        self._others = costs(points, self._rest)
        self.latencies = np.log([point.score.latency_ratio for point in points])
        self._deviations = np.array([point.score.latency_deviation for point in points])

    def lacking(self, candidate: Candidate, *, apart: bool = True) -> np.ndarray:
        """Return by how much the logarithm of a candidate's latency must fall until each point does not stand for it.

        Args:
            candidate: the candidate.
            apart: whether it must be told apart from the point, or be as fast at least.

        Returns:
            ``points``; minus infinity where the candidate is better in anything else.
        """
        no_worse = (self._others <= costs([candidate], self._rest)).all(axis=1)
        margin = np.hypot(self._deviations, candidate.score.latency_deviation) if apart else 0.0
        return np.where(no_worse, math.log(candidate.score.latency_ratio) + margin - self.latencies, -math.inf)


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
    return hypervolume(_losses([c for c in candidates if c.usable], reference, majority), (1.0, 1.0, 1.0))


def volume_curve(candidates: Iterable[Candidate], reference: Measurement, majority: float) -> list[float]:
    """Return `volume` after each candidate in their order, with those that do not count; arguments as there.

    Raises:
        ConfigError: if ``majority`` is not within 0..1.
    """
    tried = list(candidates)
    losses = iter(_losses([c for c in tried if c.usable], reference, majority))
    front = np.zeros((0, 3))
    curve: list[float] = []
    covered = 0.0
    for candidate in tried:
        if candidate.usable:
            point = next(losses)
            if np.all(point < 1.0) and not np.any(np.all(front <= point, axis=1)):
                front = np.vstack([front[~np.all(front >= point, axis=1)], point])
                # Another point never lowers a volume; rounding may.
                covered = max(covered, hypervolume(front, (1.0, 1.0, 1.0)))
        curve.append(covered)
    return curve


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
