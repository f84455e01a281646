"""Samplers: what they see, and that they find fronts. No model is run."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.samplers._tpe import sampler as tpe_module
from optuna.trial import FrozenTrial, TrialState, create_trial

from autocompress.config import SearchConfig
from autocompress.pareto import hypervolume
from autocompress.samplers import TPE_HISTORY, SamplerName, make_sampler

NAMES: tuple[SamplerName, ...] = get_args(SamplerName)
GUIDED: tuple[SamplerName, ...] = ("tpe", "nsga2", "nsga3")
CHOICES = (0, 1, 2)
LAYERS = [f"layer.{n}" for n in range(12)]
Trials = list[FrozenTrial]
Split = Callable[..., tuple[Trials, Trials]]


def scores_of(params: Mapping[str, int]) -> list[float]:
    """Return accuracy (to maximise), size and latency: layers differ in what compressing them costs and saves."""
    levels = [(n, params[name]) for n, name in enumerate(LAYERS)]
    loss = sum((1 + n % 5) * level**2 for n, level in levels)
    size = sum((1 + n % 3) * (2 - level) for n, level in levels)
    latency = sum((1 + n % 4) * (2 - level) for n, level in levels)
    return [-float(loss), float(size), float(latency)]


REFERENCE = [n + 1 for n in (-scores_of(dict.fromkeys(LAYERS, 2))[0], *scores_of(dict.fromkeys(LAYERS, 0))[1:])]


def new_study(name: SamplerName = "tpe", *, seed: int = 0) -> optuna.Study:
    return optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=make_sampler(name, seed=seed))


def ask(study: optuna.Study) -> tuple[optuna.Trial, dict[str, int]]:
    trial = study.ask()
    return trial, {name: trial.suggest_categorical(name, CHOICES) for name in LAYERS}


def searched(study: optuna.Study, count: int) -> list[dict[str, int]]:
    found = []
    for _ in range(count):
        trial, params = ask(study)
        study.tell(trial, scores_of(params))
        found.append(params)
    return found


def finished(params: Mapping[str, int], state: TrialState = TrialState.COMPLETE, **constraints: float) -> FrozenTrial:
    return create_trial(
        state=state,
        params=dict(params),
        distributions={name: CategoricalDistribution(CHOICES) for name in params},
        values=scores_of(params) if state == TrialState.COMPLETE else None,
        system_attrs={f"constraints:{name}": value for name, value in constraints.items()},
    )


def drawn(rng: random.Random) -> dict[str, int]:
    return {name: rng.choice(CHOICES) for name in LAYERS}


def best() -> dict[str, int]:
    """Return parameters whose scores nothing dominates."""
    return dict.fromkeys(LAYERS, 0)


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Trials, Trials]]]:
    """Collect what Optuna's TPE takes for good and for bad."""
    seen: list[tuple[Trials, Trials]] = []
    split: Split = tpe_module._split_trials

    def recorded(*arguments: Any) -> tuple[Trials, Trials]:
        seen.append(split(*arguments))
        return seen[-1]

    monkeypatch.setattr(tpe_module, "_split_trials", recorded)
    yield seen
    assert seen, "TPE looked at no trial"


def numbers(trials: Sequence[FrozenTrial]) -> set[int]:
    return {t.number for t in trials}


# --- all samplers


def test_every_sampler_of_a_run_file_can_be_made() -> None:
    assert get_args(SearchConfig.model_fields["sampler"].annotation) == NAMES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            make_sampler(name, seed=1)


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_the_same_proposals(name: SamplerName) -> None:
    found = [searched(new_study(name, seed=seed), 60) for seed in (3, 3, 4)]
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize("name", GUIDED)
def test_trials_are_judged_by_the_constraints_of_now(name: SamplerName) -> None:
    def limited(trial: FrozenTrial) -> dict[str, float]:
        return {"first": 1.0 if trial.params[LAYERS[0]] == CHOICES[0] else -1.0}

    def kept(sampler: optuna.samplers.BaseSampler) -> int:
        study = optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)
        study.add_trials([finished(drawn(random.Random(n)), first=-1.0) for n in range(100)])
        return sum(params[LAYERS[0]] != CHOICES[0] for params in searched(study, 200)[-60:])

    assert kept(make_sampler(name, seed=0, excesses=limited)) > 5 + kept(make_sampler(name, seed=0))


@pytest.mark.parametrize("name", GUIDED)
def test_a_sampler_finds_a_better_front_than_chance(name: SamplerName) -> None:
    def volume(found: list[dict[str, int]]) -> float:
        costs = np.array([scores_of(params) for params in found], dtype=float) * [-1, 1, 1]
        return hypervolume(costs, REFERENCE)

    def total(of: SamplerName) -> float:
        return sum(volume(searched(new_study(of, seed=seed), 200)) for seed in (1, 2))

    assert total(name) > 1.03 * total("random")


@pytest.mark.parametrize("name", NAMES)
def test_stopped_and_failed_trials_do_not_end_a_search(name: SamplerName) -> None:
    study = new_study(name)
    for n in range(130):
        trial, params = ask(study)
        if n % 4 == 3:
            study.tell(trial, state=TrialState.PRUNED if n % 8 == 3 else TrialState.FAIL)
        else:
            trial.set_constraint("size", params["layer.0"] - 1)
            study.tell(trial, scores_of(params))
    states = Counter(t.state.name for t in study.get_trials())
    assert states == {"COMPLETE": 98, "PRUNED": 16, "FAIL": 16}


@pytest.mark.parametrize("name", GUIDED)
def test_constraints_steer(name: SamplerName) -> None:
    def share(constrained: bool) -> float:
        study = new_study(name, seed=5)
        for _ in range(200):
            trial, params = ask(study)
            # What scores best in accuracy is not allowed.
            trial.set_constraint("depth", 6 - params["layer.4"] * 3 if constrained else 0)
            study.tell(trial, scores_of(params))
        return sum(t.params["layer.4"] == 2 for t in study.get_trials()[-60:]) / 60

    assert share(True) > share(False) + 0.2


@pytest.mark.parametrize("name", GUIDED)
def test_a_point_without_parameters_does_not_disturb(name: SamplerName) -> None:
    study = new_study(name)
    searched(study, 60)
    study.add_trial(finished({}, TrialState.FAIL))
    study.add_trial(create_trial(values=[1.0, 1.0, 1.0]))
    trial = study.get_trials()[-1]
    assert sorted(study.sampler.infer_relative_search_space(study, trial)) == sorted(LAYERS)
    searched(study, 2)


@pytest.mark.parametrize("name", GUIDED)
def test_parameters_are_those_that_optuna_finds_in_all_trials(name: SamplerName) -> None:
    """Also when trials with other parameters come later, or only among those that were stopped."""
    study, (ours, its) = new_study(name), (make_sampler(name, seed=0) for _ in range(2))
    rng, trial = random.Random(0), study.ask()
    for left_out, state in (
        (LAYERS[:1], TrialState.COMPLETE),
        (LAYERS[2:4], TrialState.PRUNED),
        ([], TrialState.COMPLETE),
        (LAYERS[:1], TrialState.COMPLETE),
        (LAYERS[7:9], TrialState.COMPLETE),
        (LAYERS[5:], TrialState.FAIL),
    ):
        for _ in range(5):
            params = {layer: value for layer, value in drawn(rng).items() if layer not in left_out}
            values = [rng.random() for _ in range(3)] if state == TrialState.COMPLETE else None
            choices = {layer: CategoricalDistribution(CHOICES) for layer in params}
            study.add_trial(create_trial(state=state, params=params, distributions=choices, values=values))
        found = ours.infer_relative_search_space(study, trial)
        ours._seen = None  # type: ignore[attr-defined]
        study._thread_local.cached_all_trials = None  # Optuna's own keeps them until the next proposal
        assert found == its._inner.infer_relative_search_space(study, trial)  # type: ignore[attr-defined]
    assert found and all(layer in LAYERS for layer in found)


# --- what TPE sees


def test_proposals_are_those_of_optunas_tpe() -> None:
    """What is split and fitted once gives what Optuna finds by splitting and fitting for each group of parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        its = optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=0)
    studies = [new_study(), optuna.create_study(directions=new_study().directions, sampler=its)]
    for n in range(80):
        asked = [ask(study) for study in studies]
        assert asked[0][1] == asked[1][1], n
        for study, (trial, params) in zip(studies, asked, strict=True):
            if n % 13 != 12:  # the others stay in flight
                trial.set_constraint("size", params["layer.0"] - 1)
                study.tell(trial, scores_of(params))


def test_tpe_looks_anew_once_a_part_of_what_is_in_flight_changed() -> None:
    study = new_study()
    searched(study, 40)
    for _ in range(40):
        ask(study)
    proposed, looks = [], []
    for _ in range(12):
        proposed.append(ask(study)[1])
        looks.append(study.sampler._seen)  # type: ignore[attr-defined]
    assert len({id(look) for look in looks}) in (2, 3), "one for a proposal and the five after it"
    assert len({tuple(params.values()) for params in proposed}) > 5, "each is drawn for itself"


def test_tpe_sees_the_best_and_the_most_recent_trials(splits: list[tuple[Trials, Trials]]) -> None:
    rng = random.Random(0)
    study = new_study()
    study.add_trials([finished(best()), *(finished(drawn(rng)) for _ in range(2 * TPE_HISTORY))])
    study.add_trials([finished(drawn(rng), TrialState.PRUNED) for _ in range(5)])
    study.add_trials([finished(drawn(rng), TrialState.FAIL) for _ in range(5)])
    running, _ = ask(study)
    splits.clear()
    ask(study)
    good, bad = splits[-1]
    seen = numbers(good) | numbers(bad)
    front = numbers(study.best_trials)
    last = 2 * TPE_HISTORY + 5
    assert len(seen) == TPE_HISTORY + 1
    assert running.number in numbers(bad)
    assert 0 in front
    assert front <= seen
    assert set(range(last - TPE_HISTORY // 2 + 1, last + 1)) <= seen
    assert seen <= {*range(last + 1), running.number}


def test_tpe_sees_all_of_a_small_study(splits: list[tuple[Trials, Trials]]) -> None:
    study = new_study()
    searched(study, 40)
    splits.clear()
    ask(study)
    good, bad = splits[-1]
    assert sorted(t.number for t in [*good, *bad]) == list(range(40))
    assert len(good) == 4


def test_good_trials_are_the_same_however_much_history_there_is(splits: list[tuple[Trials, Trials]]) -> None:
    rng = random.Random(1)
    study = new_study()
    study.add_trials([finished({**best(), name: 1}) for name in LAYERS])
    study.add_trials([finished({**drawn(rng), "layer.3": 2, "layer.4": 2}) for _ in range(3 * TPE_HISTORY)])
    ask(study)
    good, _ = splits[-1]
    assert len(good) == TPE_HISTORY // 10
    assert numbers(good) <= numbers(study.best_trials)


@pytest.mark.parametrize("count", [40, 2 * TPE_HISTORY])
def test_what_violates_a_constraint_is_bad_however_well_it_scores(
    splits: list[tuple[Trials, Trials]], count: int
) -> None:
    rng = random.Random(2)
    study = new_study()
    study.add_trials([finished(drawn(rng), size=-1.0, drop=0.0) for _ in range(count // 2)])
    study.add_trials([finished(best(), size=1.0, drop=-1.0) for _ in range(count // 2)])
    ask(study)
    good, bad = splits[-1]
    assert max(numbers(good)) < count // 2 <= max(numbers(bad))


def test_the_least_violation_is_good_as_long_as_nothing_is_feasible(splits: list[tuple[Trials, Trials]]) -> None:
    rng = random.Random(3)
    count = 2 * TPE_HISTORY
    study = new_study()
    study.add_trials([finished(drawn(rng), size=float(n + 1)) for n in range(count)])
    ask(study)
    assert numbers(splits[-1][0]) == set(range(TPE_HISTORY // 10))


def test_stopped_trials_are_bad_even_where_hardly_any_is_complete(splits: list[tuple[Trials, Trials]]) -> None:
    rng = random.Random(4)
    study = new_study()
    study.add_trials([finished(drawn(rng)) for _ in range(10)])
    study.add_trials([finished(drawn(rng), size=1.0) for _ in range(3)])
    study.add_trials([finished(drawn(rng), TrialState.PRUNED) for _ in range(300)])
    ask(study)
    good, bad = splits[-1]
    assert max(numbers(good)) < 13
    assert sum(n >= 13 for n in numbers(bad)) >= TPE_HISTORY // 2
    assert Counter(t.state.name for t in study.get_trials())["PRUNED"] == 300
