"""What a search evaluates next: seeds first, then changed points of the front by turns with the sampler's proposals."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.trial import TrialState

from autocompress.binding import BoundSpace
from autocompress.mutation import by_promise, mutated
from autocompress.plan import CompressionPlan
from autocompress.seeds import sensitivity_ladder, uniform_ladder

if TYPE_CHECKING:
    from autocompress.study import Study

_RANDOM_DRAWS = 500
_MUTATIONS = 16
"""Changed points of the front of which the one that promises most is evaluated."""
_TAKEN_FOR = 64
"""Trials in flight for each of which one more of them is taken: to screen them takes time that many workers wait."""
_SENSITIVITY_SHARE = 0.2
"""Part of a search's candidates that may be allocated from sensitivities before the sampler begins."""


class Proposals:
    """Puts into an Optuna study's queue what its next trial is to be, or leaves that to its sampler.

    Args:
        study: read for what is known.
        trials: the Optuna study that it keeps its candidates in.
        space: to choose from.
    """

    def __init__(self, study: Study, trials: optuna.Study, space: BoundSpace) -> None:
        self._of = study
        self._trials = trials
        self._space = space
        self._seeds = self._make_seeds() if study.run.search.seeds else iter(())
        self._mutations: list[dict[str, Any]] = []
        self._rng = random.Random(f"{study.seed}:{len(trials.get_trials(deepcopy=False))}")  # noqa: S311

    def _make_seeds(self) -> Iterator[tuple[str, dict[str, Any]] | None]:
        """Yield origin and parameters of each seed; None while too little is measured to allocate the next one."""
        yield from (("uniform", params) for params in uniform_ladder(self._space))
        if self._of.predictor is not None:
            while not self._of.learn():
                yield None
            most = int(_SENSITIVITY_SHARE * self._of.run.search.trials)
            ladder = sensitivity_ladder(self._space, self._of.predictor, self._of.reference.size_bytes)
            for params in itertools.islice(ladder, most):
                yield "sensitivity", params
                self._of.learn()

    def passed_over(self, plan: CompressionPlan, trial: optuna.Trial) -> str | None:
        """Return why a proposal is not worth measuring; seeds always are."""
        seeded = trial.user_attrs.get("origin") in ("uniform", "sensitivity")
        if self._of.predictor is None or not self._of.run.search.skip_behind or seeded or not self._of.learn():
            return None
        return self._of.predictor.behind(plan, self._of.rivals(), self._of.told)

    def enqueue_next(self) -> None:
        """Enqueue the next seed of an unknown plan or a mutation, unless trials wait, or leave it to the sampler.

        Trials wait where a killed driver had begun them.
        """
        if self._trials.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return
        for seed in self._seeds:
            if seed is None:
                break
            origin, params = seed
            if self._space.plan(params).plan_id not in self._of.known:
                self._trials.enqueue_trial(params, user_attrs={"origin": origin})
                return
        search = self._of.run.search
        if search.sampler == "tpe" and self._rng.random() < search.mutation_share:
            changed = self._mutation()
            if changed is not None:
                self._trials.enqueue_trial(changed, user_attrs={"origin": "mutation"})

    def _mutation(self) -> dict[str, Any] | None:
        """Return the parameters of a changed point of the front, the most promising of several, or None."""
        if not self._mutations:
            self._mutations = self._screened()[: 1 + self._of.in_flight // _TAKEN_FOR]
        return self._mutations.pop(0) if self._mutations else None

    def _screened(self) -> list[dict[str, Any]]:
        """Return parameters of changed points of the front, as far as anything is known the most promising first."""
        parents = [dict(c.params) for c in self._of.told_front() if c.params]
        options: dict[str, tuple[dict[str, Any], CompressionPlan]] = {}
        for _ in range(_MUTATIONS if parents else 0):
            params, plan = mutated(self._space, parents, self._rng)
            if plan.plan_id not in self._of.known:
                options[plan.plan_id] = (params, plan)
        chosen = list(options.values())
        if self._of.predictor is not None and len(chosen) > 1 and self._of.learn():
            guessed = [self._of.predictor.expected(plan, self._of.told) for _, plan in chosen]
            known = [n for n, costs in enumerate(guessed) if costs is not None]
            if known:
                order = by_promise(np.array([guessed[n] for n in known]), np.array(self._of.rivals()))
                return [chosen[known[n]][0] for n in order]
        return [params for params, _ in chosen]

    def enqueue_unknown(self) -> bool:
        """Enqueue random parameters of a plan that is not known yet; False if none was found."""
        for _ in range(_RANDOM_DRAWS):
            params: dict[str, Any] = {}

            def choose(name: str, choices: Sequence[Any], into: dict[str, Any] = params) -> Any:
                into[name] = self._rng.choice(choices)
                return into[name]

            if self._space.decode(choose).plan_id not in self._of.known:
                self._trials.enqueue_trial(params)
                return True
        return False
