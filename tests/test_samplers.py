"""Samplers and mutation: what they see, that proposals are valid, and that they find fronts. No model is run."""

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

from autocompress import strict_yaml
from autocompress.anatomy import BlockShape, ModelShape
from autocompress.binding import BoundSpace, bind
from autocompress.config import SearchConfig, validated
from autocompress.pareto import hypervolume
from autocompress.samplers import TPE_HISTORY, SamplerName, make_sampler, most_promising, mutated
from autocompress.seeds import uniform_ladder
from autocompress.space import SearchSpace, Value, shipped_spaces

SHAPE = ModelShape(hidden=64, blocks=(BlockShape(heads=4, head_size=16, neurons=256),) * 4, vocabulary=1000)
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
        its._view = None  # type: ignore[attr-defined]
        everything = its._of(study, trial)  # type: ignore[attr-defined]
        assert found == its._inner.infer_relative_search_space(everything, trial)  # type: ignore[attr-defined]
    assert found and all(layer in LAYERS for layer in found)


# --- what TPE sees


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


# --- mutation


def bound(name: str) -> BoundSpace:
    return bind(SearchSpace.load(name), SHAPE, tokens=64)


def space_of(text: str) -> BoundSpace:
    parsed = strict_yaml.parse(f"schema: 1\nname: test\n{text}", "test.yaml")
    return bind(validated(SearchSpace, parsed, "test.yaml"), SHAPE, tokens=64)


def asked(space: BoundSpace, params: Mapping[str, Value]) -> dict[str, Value]:
    """Return ``params`` as ``space`` asks for them, and that only."""
    found: dict[str, Value] = {}

    def choose(name: str, choices: Sequence[Value]) -> Value:
        found[name] = choices[choices.index(params[name])]
        return found[name]

    space.decode(choose)
    return found


def random_params(space: BoundSpace, rng: random.Random) -> dict[str, Value]:
    found: dict[str, Value] = {}

    def choose(name: str, choices: Sequence[Value]) -> Value:
        found[name] = rng.choice(choices)
        return found[name]

    space.decode(choose)
    return found


@pytest.mark.parametrize("name", shipped_spaces())
def test_mutations_are_valid_and_differ_from_their_parent(name: str) -> None:
    space, rng = bound(name), random.Random(7)
    parents = [*(asked(space, p) for p in uniform_ladder(space)), *(random_params(space, rng) for _ in range(20))]
    changes = []
    for n in range(500):
        if n % 2:
            child = mutated(space, parents, rng)
        else:
            parent = rng.choice(parents)
            child = mutated(space, [parent], rng)
            assert child != parent
            changes.append(sum(child[p] != parent[p] for p in child.keys() & parent.keys()))
        space.plan(child)
        assert asked(space, child) == child
    assert 1 <= np.mean(changes) <= 3


def test_one_seed_gives_the_same_mutations() -> None:
    space = bound("encoder-joint")
    parents = list(uniform_ladder(space))
    found = [[mutated(space, parents, rng) for _ in range(20)] for rng in map(random.Random, (1, 1, 2))]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_change_of_the_tree_takes_what_still_fits() -> None:
    space = space_of(
        "students: {shallow: {blocks: [0, 2], epochs: 1}}\ndrop_blocks: {at_most: 2}\n"
        "rules: [{match: block.*.ffn, bits: {choices: [8, 4, 16], tie: none}}]"
    )
    parent: dict[str, Value] = {"student": "shallow", "drop_blocks_1": 1, "ffn.bits.0": 4}
    assert asked(space, parent) == parent
    rng = random.Random(0)
    grown = [child for _ in range(200) if (child := mutated(space, [parent], rng))["student"] == "full"]
    # The parent had no such parameters: the first choices are 0 blocks and 8 bits.
    assert {
        "student": "full",
        "drop_blocks": 0,
        "ffn.bits.0": 4,
        "ffn.bits.1": 8,
        "ffn.bits.2": 8,
        "ffn.bits.3": 8,
    } in grown
    assert not any("drop_blocks_1" in child for child in grown)


def moves(text: str, parent: dict[str, Value], name: str) -> Counter[Value]:
    space, rng = space_of(text), random.Random(0)
    return Counter(mutated(space, [parent], rng)[name] for _ in range(1000))


def test_numbers_move_mostly_to_a_neighbour() -> None:
    rules = "rules: [{match: embeddings, bits: [8, 4, 16]}]"
    found = moves(rules, {"embedding.bits.0": 4}, "embedding.bits.0")
    assert set(found) == {8, 16}
    assert 0.85 < found[8] / 1000 < 0.95
    found = moves(rules, {"embedding.bits.0": 8}, "embedding.bits.0")
    assert 0.4 < found[4] / 1000 < 0.6
    found = moves(
        "rules: [{match: block.*.ffn, rank: {choices: [full, 0.5, 0.25, 0.75], tie: all}}]",
        {"ffn.rank.0": "full"},
        "ffn.rank.0",
    )
    assert set(found) == {0.25, 0.5, 0.75}
    assert found[0.75] > 800


@pytest.mark.parametrize(
    ("text", "parent", "others"),
    [
        (
            "students: {a: {blocks: 0.5, epochs: 1}, b: {heads: 0.5, epochs: 1}, c: {neurons: 0.5, epochs: 1}}",
            {"student": "a"},
            {"full", "b", "c"},
        ),
        (
            "rules: [{match: block.*.ffn, neurons: {choices: [1.0, 0.5, 64, 32], tie: all}}]",
            {"ffn.neurons.0": 0.5},
            {1.0, 64, 32},
        ),
    ],
)
def test_what_has_no_order_moves_anywhere(text: str, parent: dict[str, Value], others: set[Value]) -> None:
    found = moves(text, parent, next(iter(parent)))
    assert set(found) == others
    assert min(found.values()) > 250


def test_a_child_of_two_takes_each_value_from_either() -> None:
    space = space_of("rules: [{match: block.*.ffn, bits: {choices: [8, 4, 16], tie: none}}]")
    names = [f"ffn.bits.{n}" for n in range(4)]
    parents: list[dict[str, Value]] = [dict.fromkeys(names, 8), dict.fromkeys(names, 16)]
    rng = random.Random(0)
    children = [mutated(space, parents, rng) for _ in range(400)]
    crossed = sum({8, 16} <= set(child.values()) and list(child.values()).count(4) <= 1 for child in children)
    assert 150 < crossed < 350
    assert crossed > sum({8, 16} <= set(mutated(space, parents[:1], rng).values()) for _ in range(400))


def test_stored_numbers_become_the_choices_of_the_space() -> None:
    space = space_of(
        "rules: [{match: block.*.ffn, neurons: {choices: [1.0, 0.5], tie: none}, bits: {choices: [8, 4], tie: none}}]"
    )
    params: dict[str, Value] = {f"ffn.neurons.{n}": 1 for n in range(4)}
    child = mutated(space, [params], random.Random(0))
    assert {type(child[name]) for name in params} == {float}
    space.plan(child)


def test_a_space_without_choices_has_one_child() -> None:
    assert mutated(space_of("rules: [{match: head, bits: [8]}]"), [{}], random.Random(0)) == {}


def test_the_most_promising_point_adds_most_to_the_front() -> None:
    rivals = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    options = np.array([[0.6, 0.6], [0.4, 0.45], [0.1, 0.2], [5.0, 5.0]])
    assert most_promising(options, rivals) == 2
    assert most_promising(options[[0, 3, 1]], rivals) == 2
    units = np.array([1e6, 1e-3])
    assert most_promising(options * units, rivals * units) == 2, "whatever the units are"


def test_promises_need_no_front_of_several_points() -> None:
    rivals = np.array([[0.5, 0.5]])
    assert most_promising(np.array([[0.6, 0.7], [0.4, 0.4]]), rivals) == 1
