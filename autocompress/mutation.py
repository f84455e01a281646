"""New candidates from those of the front: a few parameters changed, and of several the one that promises most."""

from __future__ import annotations

import math
import random
from collections.abc import Container, Mapping, Sequence

import numpy as np

from autocompress.binding import FULL, BoundSpace
from autocompress.pareto import hypervolume
from autocompress.plan import CompressionPlan
from autocompress.space import Value

_CHANGES = 2
"""Mean number of parameters that a mutation changes."""
_MARGIN = 0.1
"""How far behind a front's worst values, in its extents, points still count."""
_NODES = ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6))
"""Standard deviations and weights by which three values stand for a normal distribution."""
_NEIGHBOUR = 0.8
"""Probability that a number moves to the next smaller or larger choice instead of to any other."""


def mutated(
    space: BoundSpace, parents: Sequence[Mapping[str, Value]], rng: random.Random
) -> tuple[dict[str, Value], CompressionPlan]:
    """Return parameters that differ in a few places from a point of the front.

    A point is drawn evenly, crossed over with a second one half of the time (each parameter from either), and a few
    parameters move, mostly to a neighbouring choice. Mutating the archive of non-dominated points is the proposal of
    the Pareto archived evolution strategy (Knowles and Corne 2000, "Approximating the Nondominated Front Using the
    Pareto Archived Evolution Strategy").

    Args:
        space: what can be chosen.
        parents: parameters of the points on the front, at least one.
        rng: the source of all randomness.

    Returns:
        What ``space`` asks for at that place of its tree and nothing else, and its plan. A parameter that the parents
        lack takes its first choice. With one parent, or without crossover, at least one parameter differs from the
        parent's.
    """
    inherited = dict(rng.choice(parents))
    if len(parents) > 1 and rng.random() < 0.5:
        first, second = rng.sample(parents, 2)
        inherited = {n: rng.choice([p[n] for p in (first, second) if n in p]) for n in dict.fromkeys([*first, *second])}
    names = list(_built(space, inherited, frozenset(), rng)[0])
    changed = {name for name in names if rng.random() < _CHANGES / len(names)}
    if names and not changed:
        changed = {rng.choice(names)}
    return _built(space, inherited, changed, rng)


def by_promise(expected: np.ndarray, rivals: np.ndarray, deviations: np.ndarray) -> list[int]:
    """Return the order in which points are expected to add to the hypervolume of a front, the most first.

    Screening offspring by a cheap model before the dear evaluation, and by the hypervolume that is expected of them, is
    that of Emmerich et al. (2006), "Single- and Multiobjective Evolutionary Optimization Assisted by Gaussian Random
    Field Metamodels". The expectation is taken at three nodes (Gauss and Hermite).

    Args:
        expected: ``points x objectives``, to minimise.
        rivals: ``points x objectives`` of the front, at least one.
        deviations: ``objectives``, standard deviations of what comes of a point from what is expected; objectives with
            one vary together.

    Returns:
        Positions of the points. Each objective counts in units of the front's extent.
    """
    least, most = rivals.min(axis=0), rivals.max(axis=0)
    extent = np.where(most > least, most - least, 1.0)
    front, corner = (rivals - least) / extent, [1.0 + _MARGIN] * rivals.shape[1]
    covered = np.zeros(len(expected))
    for node, weight in _NODES if deviations.any() else ((0.0, 1.0),):
        points = (expected + node * deviations - least) / extent
        covered += [weight * hypervolume(np.vstack([front, point]), corner) for point in points]
    return [int(n) for n in np.argsort(-covered, kind="stable")]


def _built(
    space: BoundSpace, inherited: Mapping[str, Value], changed: Container[str], rng: random.Random
) -> tuple[dict[str, Value], CompressionPlan]:
    """Return inherited parameters as far as ``space`` asks for them, those of ``changed`` moved to another choice.

    With the plan that they make.
    """
    params: dict[str, Value] = {}

    def choose(name: str, choices: Sequence[Value]) -> Value:
        # The choice as the space has it: a stored 1.0 that comes back as 1 would read as a count.
        index = choices.index(inherited[name]) if inherited.get(name) in choices else 0
        params[name] = _other(choices, index, rng) if name in changed else choices[index]
        return params[name]

    return params, space.decode(choose)


def _other(choices: Sequence[Value], index: int, rng: random.Random) -> Value:
    order = _ordered(choices)
    if order and rng.random() < _NEIGHBOUR:
        place = order.index(index)
        return choices[rng.choice([order[p] for p in (place - 1, place + 1) if 0 <= p < len(order)])]
    return rng.choice([c for n, c in enumerate(choices) if n != index])


def _ordered(choices: Sequence[Value]) -> list[int]:
    """Return the positions of ``choices`` in rising order, or none if they have no order.

    Full rank comes after all numbers. Counts and fractions together have no order without the model's sizes.
    """
    kinds = {type(c) for c in choices if c != FULL}
    if kinds not in ({int}, {float}):
        return []
    values = [math.inf if c == FULL else float(c) for c in choices]
    return sorted(range(len(choices)), key=values.__getitem__)
