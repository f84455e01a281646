"""What a search evaluates next: seeds first, then changed points of the front by turns with the sampler's proposals."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.trial import TrialState

from autocompress.binding import BoundSpace
from autocompress.ledger import excesses
from autocompress.mutation import by_promise, mutated
from autocompress.pareto import costs, nondominated, tells
from autocompress.plan import CompressionPlan
from autocompress.records import QUALITIES
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
            # Those of an earlier command count, too, and what is known by now is none of them.
            most = int(_SENSITIVITY_SHARE * self._of.run.search.trials)
            most -= sum(c.origin == "sensitivity" for c in self._of.candidates())
            ladder = sensitivity_ladder(self._space, self._of.predictor, self._of.reference.size_bytes)
            for params in ladder if most > 0 else ():
                plan = self._space.plan(params)
                if plan.plan_id in self._of.known:
                    continue
                if self._too_much(plan) is not None:
                    yield None  # to allocate the next one takes time, too
                    continue
                yield "sensitivity", params
                self._of.learn()
                if not (most := most - 1):
                    return

    def _too_much(self, plan: CompressionPlan) -> str | None:
        """Return the constraint that a plan is predicted to break even if it does well."""
        predictor, constraints = self._of.predictor, self._of.run.constraints
        if predictor is None or not self._of.run.search.skip_behind or (hoped := predictor.hoped(plan)) is None:
            return None
        reference = self._of.reference
        best = dataclasses.replace(
            reference,
            accuracy=-hoped["accuracy"] if "accuracy" in hoped else 1.0,
            size_bytes=int(hoped["size_bytes"]),
            latency_ratio=hoped["latency"],
            latency_ms=hoped["latency"] * reference.latency_ms,
            peak_memory_bytes=1,  # is not predicted
        )
        broken = (name for name, excess in excesses(best, constraints, reference).items() if excess > 0)
        return next((f"predicted to break max_{name} even if it does well" for name in broken), None)

    def passed_over(self, plan: CompressionPlan, trial: optuna.Trial) -> str | None:
        """Return why a proposal is not worth measuring; seeds always are."""
        seeded = trial.user_attrs.get("origin") in ("uniform", "sensitivity")
        if self._of.predictor is None or not self._of.run.search.skip_behind or seeded or not self._of.learn():
            return None
        return self._too_much(plan) or self._of.predictor.behind(plan, self._of.rivals(), self._of.told)

    def enqueue_next(self, *, again: bool = False) -> None:
        """Enqueue the next seed of an unknown plan or a mutation, unless trials wait, or leave it to the sampler.

        Trials wait where a killed driver had begun them.

        Args:
            again: whether the sampler had its turns and came up with nothing that is new and worth measuring.
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
        if search.sampler == "tpe" and search.mutation_share and (again or self._rng.random() < search.mutation_share):
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
        chosen = [(params, plan) for params, plan in options.values() if self._too_much(plan) is None]
        if self._of.predictor is not None and len(chosen) > 1 and self._of.learn():
            told = self._of.told
            guessed = [self._of.predictor.expected(plan, told) for _, plan in chosen]
            known = [n for n, costs in enumerate(guessed) if costs is not None]
            if known:
                rivals, deviations = self._settled_rivals()
                expected = np.array([guessed[n] for n in known])
                order = by_promise(_in_logarithms(expected, told), _in_logarithms(rivals, told), deviations)
                return [chosen[known[n]][0] for n in order]
        return [params for params, _ in chosen]

    def _settled_rivals(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what predictions are held against: a front without what chance made of it, and how far they are off.

        As ``points x objectives``, and ``objectives``, of what the sampler is told.
        """
        predictor, told = self._of.predictor, self._of.told
        assert predictor is not None
        guide = np.array([name == predictor.guide for name in told])
        candidates = [c for c in self._of.candidates() if c.origin != "recover" and tells(c, told)]
        found = costs(candidates, told)
        for cost, candidate in zip(found, candidates, strict=True):  # of the eldest of very many it learned nothing
            cost[guide] = predictor.settled.get(candidate.number, cost[guide])
        return found[nondominated(found)], np.where(guide, predictor.guide_deviation, 0.0)

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


def _in_logarithms(points: np.ndarray, objectives: Sequence[str]) -> np.ndarray:
    """Return costs with all but qualities as logarithms: half of a small size tells as much as half of a large one.

    Without, the extent of the front is that of its largest models, and among the small ones nothing promises much.
    """
    return np.column_stack(
        [points[:, n] if name in QUALITIES else np.log(points[:, n]) for n, name in enumerate(objectives)]
    )
