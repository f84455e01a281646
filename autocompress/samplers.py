"""Who proposes the next candidate: Optuna's samplers over what they need of a study, and mutation of the front.

`study.py` asks the sampler made here and, for a share of the proposals, changes a point of the front by `mutated`.
TPE is the multi-objective one of Ozaki et al. (2022), "Multiobjective Tree-Structured Parzen Estimator"; NSGA-II and
NSGA-III are those of Deb et al. (2002) and of Deb and Jain (2014).
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autocompress.binding import FULL, BoundSpace
from autocompress.pareto import hypervolume
from autocompress.space import Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SamplerName = Literal["tpe", "nsga2", "nsga3", "random"]

TPE_HISTORY = 300
"""Finished trials that TPE sees: its time for a proposal grows with them, most where nearly all are non-dominated."""
_CHANGES = 2
"""Mean number of parameters that a mutation changes."""
_MARGIN = 0.1
"""How far behind a front's worst values, in its extents, points still count."""
_NEIGHBOUR = 0.8
"""Probability that a number moves to the next smaller or larger choice instead of to any other."""


def make_sampler(name: SamplerName, *, seed: int) -> BaseSampler:
    """Return Optuna's sampler of that name, made for a study of thousands of trials."""
    with warnings.catch_warnings():
        # Optuna says on stderr that NSGA-III and TPE's ``group`` are experimental; its version is pinned.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if name == "nsga2":
            return _Viewing(optuna.samplers.NSGAIISampler(seed=seed), most=None)
        if name == "nsga3":
            return _Viewing(optuna.samplers.NSGAIIISampler(seed=seed), most=None)
        tpe = optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
    return _Viewing(tpe, most=TPE_HISTORY)


class _View:
    """A study as a sampler sees it: everything is the study's own but the trials."""

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        self._viewed = study
        self._trials = trials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._viewed, name)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        """Answer the one question that Optuna's samplers ask about trials."""
        found = [t for t in self._trials if states is None or t.state in states]
        return copy.deepcopy(found) if deepcopy else found


class _Viewing(BaseSampler):
    """Delegates to a sampler that sees a part of the study only.

    Hidden are trials without parameters, such as recovered points: they would take places among TPE's good trials and
    leave NSGA, which searches what all trials have in common, nothing to cross over.

    Args:
        inner: the sampler that proposes.
        most: finished trials that it sees; None for all.
    """

    def __init__(self, inner: BaseSampler, *, most: int | None) -> None:
        self._inner = inner
        self._most = most
        self._view: tuple[int, optuna.Study] | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        self._view = None  # the first call for each new trial
        found = _one_of_each(self._of(study, trial)._get_trials(deepcopy=False))
        return self._inner.infer_relative_search_space(cast("optuna.Study", _View(study, found)), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(self._of(study, trial), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(self._of(study, trial), trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self._inner.reseed_rng()

    def _of(self, study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
        """Return the view for ``trial``, taken once, since reading and ranking a large study costs time."""
        if self._view is None or self._view[0] != trial.number:
            trials = [t for t in study.get_trials(deepcopy=False) if t.params or not t.state.is_finished()]
            if self._most is not None:
                trials = _history(trials, study.directions, self._most)
            self._view = trial.number, cast("optuna.Study", _View(study, trials))
        return self._view[1]


def _one_of_each(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the latest trial of each state and set of parameters.

    A parameter has the same choices throughout a study, so that these have what all trials have in common; to compare
    the choices of thousands takes Optuna a second.
    """
    return sorted({(t.state, frozenset(t.params)): t for t in trials}.values(), key=lambda t: t.number)


def _history(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection], most: int) -> list[FrozenTrial]:
    """Return what TPE is to see: all unfinished trials and at most ``most`` finished ones.

    Half of these are the best (least violated constraints first, then by rank of non-domination), the other half the
    most recent. TPE calls the best tenth of what it sees good, so no good one is missed, and of the others it weighs
    the old ones down anyway.
    """
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    finished = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if len(finished) > most:
        kept = {t.number for t in _best_first(complete, directions)[: most // 2]}
        others = [t.number for t in finished if t.number not in kept]
        kept.update(others[len(kept) - most :])
        finished = [t for t in finished if t.number in kept]
    unfinished = [t for t in trials if not t.state.is_finished()]
    return sorted([*map(_as_bad_if_pruned, finished), *unfinished], key=lambda t: t.number)


def _best_first(complete: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
    if not complete:
        return []
    import moocore

    signs = [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in directions]
    # Optuna's ranks take seconds for thousands of trials.
    ranks = moocore.pareto_rank(np.array([t.values for t in complete], dtype=float) * signs)
    violated = [sum(v for v in t.constraints.values() if v > 0) for t in complete]
    order = sorted(range(len(complete)), key=lambda n: (violated[n], ranks[n], -complete[n].number))
    return [complete[n] for n in order]


def _as_bad_if_pruned(trial: FrozenTrial) -> FrozenTrial:
    """Return a stopped trial as one that still runs, which TPE's constant liar always counts as bad.

    As it is, TPE would take it for good before any that violates a constraint, or if few are complete.
    """
    if trial.state != TrialState.PRUNED:
        return trial
    running = copy.copy(trial)
    running.state = TrialState.RUNNING
    # Without what TPE had drawn for parameters that the trial then did not have.
    running.system_attrs = {}
    return running


def mutated(space: BoundSpace, parents: Sequence[Mapping[str, Value]], rng: random.Random) -> dict[str, Value]:
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
        What ``space`` asks for at that place of its tree and nothing else. A parameter that the parents lack takes its
        first choice. With one parent, or without crossover, at least one parameter differs from the parent's.
    """
    inherited = dict(rng.choice(parents))
    if len(parents) > 1 and rng.random() < 0.5:
        first, second = rng.sample(parents, 2)
        inherited = {n: rng.choice([p[n] for p in (first, second) if n in p]) for n in dict.fromkeys([*first, *second])}
    names = list(_built(space, inherited, frozenset(), rng))
    changed = {name for name in names if rng.random() < _CHANGES / len(names)}
    if names and not changed:
        changed = {rng.choice(names)}
    return _built(space, inherited, changed, rng)


def most_promising(expected: np.ndarray, rivals: np.ndarray) -> int:
    """Return which of several points is expected to add most to the hypervolume of a front.

    Screening offspring by a cheap model before the dear evaluation is that of Emmerich et al. (2006), "Single- and
    Multiobjective Evolutionary Optimization Assisted by Gaussian Random Field Metamodels".

    Args:
        expected: ``points x objectives``, to minimise.
        rivals: ``points x objectives`` of the front, at least one.

    Returns:
        Position of the first point with the largest gain, each objective in units of the front's extent.
    """
    least, most = rivals.min(axis=0), rivals.max(axis=0)
    extent = np.where(most > least, most - least, 1.0)
    front, corner = (rivals - least) / extent, [1.0 + _MARGIN] * rivals.shape[1]
    points = (expected - least) / extent
    covered = [hypervolume(np.vstack([front, point]), corner) for point in points]
    return int(np.argmax(covered))


def _built(
    space: BoundSpace, inherited: Mapping[str, Value], changed: Container[str], rng: random.Random
) -> dict[str, Value]:
    """Return inherited parameters as far as ``space`` asks for them, those of ``changed`` moved to another choice."""
    params: dict[str, Value] = {}

    def choose(name: str, choices: Sequence[Value]) -> Value:
        # The choice as the space has it: a stored 1.0 that comes back as 1 would read as a count.
        index = choices.index(inherited[name]) if inherited.get(name) in choices else 0
        params[name] = _other(choices, index, rng) if name in changed else choices[index]
        return params[name]

    space.decode(choose)
    return params


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
