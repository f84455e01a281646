"""Mutation: what a changed point of the front is, and which one promises most. No model is run."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from autocompress import strict_yaml
from autocompress.anatomy import BlockShape, ModelShape
from autocompress.binding import BoundSpace, bind
from autocompress.config import validated
from autocompress.mutation import by_promise, mutated
from autocompress.pareto import hypervolume
from autocompress.seeds import uniform_ladder
from autocompress.space import SearchSpace, Value, shipped_spaces

SHAPE = ModelShape(hidden=64, blocks=(BlockShape(heads=4, head_size=16, neurons=256),) * 4, vocabulary=1000)


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
            child, plan = mutated(space, parents, rng)
        else:
            parent = rng.choice(parents)
            child, plan = mutated(space, [parent], rng)
            assert child != parent
            changes.append(sum(child[p] != parent[p] for p in child.keys() & parent.keys()))
        assert space.plan(child) == plan
        assert asked(space, child) == child
    assert 1 <= np.mean(changes) <= 3


def test_one_seed_gives_the_same_mutations() -> None:
    space = bound("encoder-joint")
    parents = list(uniform_ladder(space))
    found = [[mutated(space, parents, rng)[0] for _ in range(20)] for rng in map(random.Random, (1, 1, 2))]
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
    grown = [child for _ in range(200) if (child := mutated(space, [parent], rng)[0])["student"] == "full"]
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
    return Counter(mutated(space, [parent], rng)[0][name] for _ in range(1000))


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
    children = [mutated(space, parents, rng)[0] for _ in range(400)]
    crossed = sum({8, 16} <= set(child.values()) and list(child.values()).count(4) <= 1 for child in children)
    assert 150 < crossed < 350
    assert crossed > sum({8, 16} <= set(mutated(space, parents[:1], rng)[0].values()) for _ in range(400))


def test_stored_numbers_become_the_choices_of_the_space() -> None:
    space = space_of(
        "rules: [{match: block.*.ffn, neurons: {choices: [1.0, 0.5], tie: none}, bits: {choices: [8, 4], tie: none}}]"
    )
    params: dict[str, Value] = {f"ffn.neurons.{n}": 1 for n in range(4)}
    child = mutated(space, [params], random.Random(0))[0]
    assert {type(child[name]) for name in params} == {float}
    space.plan(child)


def test_a_space_without_choices_has_one_child() -> None:
    assert mutated(space_of("rules: [{match: head, bits: [8]}]"), [{}], random.Random(0))[0] == {}


CERTAIN = np.zeros(2)
"""Deviations of predictions that are exact."""


def test_the_most_promising_point_adds_most_to_the_front() -> None:
    rivals = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    options = np.array([[0.6, 0.6], [0.4, 0.45], [0.1, 0.2], [5.0, 5.0]])
    assert by_promise(options, rivals, CERTAIN) == [2, 1, 0, 3]
    assert by_promise(options[[0, 3, 1]], rivals, CERTAIN)[0] == 2
    units = np.array([1e6, 1e-3])
    assert by_promise(options * units, rivals * units, CERTAIN)[0] == 2, "whatever the units are"


def test_what_may_come_out_better_promises_something() -> None:
    """By the mean over a normal distribution, which many draws agree with."""
    rivals = np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    # Both are a little behind; the second has room for more where the first objective comes out better.
    options, deviations = np.array([[0.56, 0.51], [0.1, 1.01]]), np.array([0.1, 0.0])
    assert by_promise(options[[0, 1]], rivals, CERTAIN) == [0, 1], "neither adds anything, and the first comes first"
    drawn = np.random.default_rng(0).normal(size=(4000, 1)) * deviations
    gains = [
        np.mean([hypervolume(np.vstack([rivals, option + each]), (1.1, 1.1)) for each in drawn]) for option in options
    ]
    assert by_promise(options, rivals, deviations) == list(np.argsort(-np.array(gains)))
    assert by_promise(options[::-1], rivals, deviations) == list(np.argsort(-np.array(gains[::-1])))


def test_promises_need_no_front_of_several_points() -> None:
    rivals = np.array([[0.5, 0.5]])
    assert by_promise(np.array([[0.6, 0.7], [0.4, 0.4]]), rivals, CERTAIN) == [1, 0]
