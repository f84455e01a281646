"""Who proposes the next candidate: Optuna's samplers, made for studies of thousands of trials and hundreds of workers.

TPE is the multi-objective one of Ozaki et al. (2022), "Multiobjective Tree-Structured Parzen Estimator"; NSGA-II and
NSGA-III are those of Deb et al. (2002) and of Deb and Jain (2014).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.samplers._tpe import sampler as tpe
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator

SamplerName = Literal["tpe", "nsga2", "nsga3", "random"]

TPE_HISTORY = 300
"""Finished trials that TPE sees: its time for a proposal grows with them, most where nearly all are non-dominated."""
_STARTUP = 10
"""Finished trials without which TPE has nothing to learn from."""
_ANEW = 8
"""Part of the trials in flight, as its denominator, that may come and go before TPE looks at the study again."""


Excesses = Callable[[FrozenTrial], Mapping[str, float]]
"""Says by how much a complete trial exceeds each constraint as it is now."""


def make_sampler(name: SamplerName, *, seed: int, excesses: Excesses | None = None) -> BaseSampler:
    """Return Optuna's sampler of that name, made for a study of thousands of trials.

    Args:
        name: of the sampler.
        seed: of what it draws.
        excesses: by which complete trials are judged in place of the constraints that were written with them.
    """
    with warnings.catch_warnings():
        # Optuna says on stderr that NSGA-III and TPE's ``group`` are experimental; its version is pinned.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if name == "nsga2":
            return _Viewing(optuna.samplers.NSGAIISampler(seed=seed), excesses)
        if name == "nsga3":
            return _Viewing(optuna.samplers.NSGAIIISampler(seed=seed), excesses)
        return _ViewingTPE(_KeepingTPE(seed=seed), excesses)


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


@dataclass(frozen=True)
class _Look:
    """What a sampler saw of a study.

    Args:
        view: the trials.
        space: the parameters that are proposed together.
        last: number of the last trial that is proposed from it.
    """

    view: optuna.Study
    space: dict[str, BaseDistribution]
    last: int


class _Viewing(BaseSampler):
    """Delegates to a sampler that sees a part of the study only.

    Hidden are trials without parameters, such as recovered points: they would take places among TPE's good trials and
    leave NSGA, which searches what all trials have in common, nothing to cross over. Constraints are shown as they are
    now: a search may go on with others than those that its first trials were told with.

    Args:
        inner: the sampler that proposes.
        excesses: judges complete trials.
    """

    def __init__(self, inner: BaseSampler, excesses: Excesses | None) -> None:
        self._inner = inner
        self._excesses = excesses
        self._judged: dict[int, FrozenTrial] = {}
        self._seen: _Look | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._looked(study, trial).space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(self._looked(study, trial).view, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(self._looked(study, trial).view, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self._inner.reseed_rng()

    def _looked(self, study: optuna.Study, trial: FrozenTrial) -> _Look:
        """Return the look for ``trial``, taken once, since reading and ranking a large study costs time."""
        if self._seen is None or trial.number > self._seen.last:
            every = study.get_trials(deepcopy=False)
            shown = [self._as_judged(t) for t in every if t.params or not t.state.is_finished()]
            self._seen = self._look(study, trial, shown)
        return self._seen

    def _as_judged(self, trial: FrozenTrial) -> FrozenTrial:
        """Return a complete trial with the constraints that it is judged by now."""
        if self._excesses is None or trial.state != TrialState.COMPLETE:
            return trial
        if trial.number not in self._judged:
            if (now := dict(self._excesses(trial))) != trial.constraints:
                kept = {key: value for key, value in trial.system_attrs.items() if not key.startswith("constraints")}
                trial = copy.copy(trial)
                trial.system_attrs = kept
                for name, excess in now.items():
                    trial.set_constraint(name, excess)
            self._judged[trial.number] = trial
        return self._judged[trial.number]

    def _look(self, study: optuna.Study, trial: FrozenTrial, shown: list[FrozenTrial]) -> _Look:
        view = cast("optuna.Study", _View(study, shown))
        return _Look(view, self._space(study, trial, shown), trial.number)

    def _space(
        self, study: optuna.Study, trial: FrozenTrial, shown: Sequence[FrozenTrial]
    ) -> dict[str, BaseDistribution]:
        view = _View(study, _one_of_each(shown))
        return self._inner.infer_relative_search_space(cast("optuna.Study", view), trial)


class _ViewingTPE(_Viewing):
    """Shows TPE the best and the latest trials, the good ones as complete and all others as running.

    TPE's constant liar takes what runs for bad. It looks again once a part of what is in flight has come and gone: the
    more workers, the more candidates must be proposed in a second, and the less one of them matters.
    """

    def __init__(self, inner: _KeepingTPE, excesses: Excesses | None) -> None:
        super().__init__(inner, excesses)
        self._keeping = inner
        self._violated: dict[int, float] = {}
        """How far complete trials are from what is allowed, by number."""

    def _look(self, study: optuna.Study, trial: FrozenTrial, shown: list[FrozenTrial]) -> _Look:
        self._keeping.forget()
        history = self._history([t for t in shown if t.number != trial.number], study.directions)
        finished = sum(t.state == TrialState.COMPLETE for t in history)
        # Stopped ones would be good before any that violates a constraint, or if few are complete.
        told = [_as_running(t) if t.state == TrialState.PRUNED else t for t in history]
        good, bad = tpe._split_trials(study, told, self._keeping.good(finished))
        view = _View(study, sorted([*good, *map(_as_running, bad)], key=lambda t: t.number))
        in_flight = sum(not t.state.is_finished() for t in shown)
        last = trial.number + in_flight // _ANEW
        return _Look(cast("optuna.Study", view), self._space(study, trial, history), last)

    def _history(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
        """Return what TPE is to see: all unfinished trials and the best and the latest of the finished ones.

        Half of these are the best (least violated constraints first, then by rank of non-domination), the other half
        the most recent. TPE calls the best tenth of what it sees good, so no good one is missed, and of the others it
        weighs the old ones down anyway.
        """
        finished = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        if len(finished) > TPE_HISTORY:
            kept = {t.number for t in self._best_first(finished, directions)[: TPE_HISTORY // 2]}
            others = [t.number for t in finished if t.number not in kept]
            kept.update(others[len(kept) - TPE_HISTORY :])
            finished = [t for t in finished if t.number in kept]
        unfinished = [t for t in trials if not t.state.is_finished()]
        return [*finished, *unfinished]

    def _best_first(self, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
        complete = [t for t in trials if t.state == TrialState.COMPLETE]
        if not complete:
            return []
        import moocore

        signs = [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in directions]
        # Optuna's ranks take seconds for thousands of trials.
        ranks = moocore.pareto_rank(np.array([t.values for t in complete], dtype=float) * signs)
        for trial in complete:
            if trial.number not in self._violated:
                self._violated[trial.number] = sum(v for v in trial.constraints.values() if v > 0)
        order = sorted(
            range(len(complete)),
            key=lambda n: (self._violated[complete[n].number], ranks[n], -complete[n].number),
        )
        return [complete[n] for n in order]


class _KeepingTPE(optuna.samplers.TPESampler):
    """Optuna's TPE where it is known which trials are good, which keeps the densities that it fits to them.

    As it is, it splits the trials and fits two densities for each group of parameters at each proposal.
    """

    def __init__(self, seed: int) -> None:
        # There is a complete trial as soon as there is enough to learn from.
        super().__init__(multivariate=True, group=True, constant_liar=True, seed=seed, n_startup_trials=1)
        self._gamma = int  # all that are complete are good (`_ViewingTPE`)
        self.forget()

    def forget(self) -> None:
        """Fit to the trials anew."""
        self._fitted: dict[tuple[object, ...], _ParzenEstimator] = {}

    def good(self, finished: int) -> int:
        """Return how many of ``finished`` trials are called good."""
        return tpe.default_gamma_multiobjective(finished) if finished >= _STARTUP else 0

    def _build_parzen_estimator(
        self,
        study: optuna.Study,
        search_space: dict[str, BaseDistribution],
        trials: list[FrozenTrial],
        handle_below: bool,
    ) -> _ParzenEstimator:
        key = (handle_below, *search_space)
        if key not in self._fitted:
            self._fitted[key] = super()._build_parzen_estimator(study, search_space, trials, handle_below)
        return self._fitted[key]


def _one_of_each(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the latest trial of each state and set of parameters.

    A parameter has the same choices throughout a study, so that these have what all trials have in common; to compare
    the choices of thousands takes Optuna a second.
    """
    return sorted({(t.state, frozenset(t.params)): t for t in trials}.values(), key=lambda t: t.number)


def _as_running(trial: FrozenTrial) -> FrozenTrial:
    """Return a finished trial as one that still runs."""
    if not trial.state.is_finished():
        return trial
    running = copy.copy(trial)
    running.state = TrialState.RUNNING
    # Without what TPE had drawn for parameters that the trial then did not have.
    running.system_attrs = {}
    return running
