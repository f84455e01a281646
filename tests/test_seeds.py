"""Allocated plans: what the space can express, what the prices ask for, and the same again. Nothing is measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from autocompress import strict_yaml
from autocompress.anatomy import BlockShape, ModelShape
from autocompress.binding import NO_STUDENT, BoundSpace, bind
from autocompress.config import validated
from autocompress.decisions import (
    Decision,
    DropBlocks,
    LowRank,
    MaxTokens,
    PruneHeads,
    PruneNeurons,
    Quantize,
    Student,
    TrimVocabulary,
)
from autocompress.forecast import count_plans
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.products import Sizes, products_of
from autocompress.seeds import allocate, count_uniform, sensitivity_ladder, uniform_ladder
from autocompress.space import SearchSpace, Value, shipped_spaces

SHAPE = ModelShape(hidden=64, blocks=(BlockShape(heads=4, head_size=16, neurons=256),) * 4, vocabulary=1000)
SIZES = Sizes(tables=((1000, 64),), head=((2, 64),))
JOINT = bind(
    validated(
        SearchSpace,
        strict_yaml.parse(
            """
schema: 1
name: test
students:
  half: {blocks: 1.0, heads: 0.5, neurons: 0.5, epochs: 1}
  shallow: {blocks: 0.5, epochs: 1}
drop_blocks: {at_most: 1}
rules:
  - match: block.*.attention
    heads: {choices: [1.0, 0.75, 0.5], tie: 3}
    rank: {choices: [full, 0.75, 0.5], tie: 2}
    bits: {choices: [8, 4, 16], tie: 2}
  - match: block.*.ffn
    neurons: {choices: [1.0, 0.75, 0.5], tie: 3}
    rank: {choices: [full, 0.75, 0.5], tie: 2}
    bits: {choices: [8, 4, 16], tie: 2}
  - {match: embeddings, bits: [8, 4, 16]}
  - {match: head, bits: [8, 16]}
""",
            "test.yaml",
        ),
        "test.yaml",
    ),
    SHAPE,
    tokens=64,
)


def harm_of(decision: Decision) -> float:
    """Return what a decision loses; nothing only where it leaves everything as it is."""
    if isinstance(decision, Quantize):
        return {16: 0.0, 8: 0.01, 4: 0.1, 3: 0.2, 2: 0.5}[decision.weight_bits]
    if isinstance(decision, PruneHeads):
        return 0.04 * (4 - decision.keep)
    if isinstance(decision, PruneNeurons):
        return 0.1 * (1 - decision.keep / 256)
    if isinstance(decision, LowRank):
        return 0.3 / decision.rank
    if isinstance(decision, MaxTokens):
        return 0.4 * (1 - decision.tokens / 64)
    if isinstance(decision, TrimVocabulary):
        return 0.2 * (1 - decision.keep / 1000)
    assert isinstance(decision, (DropBlocks, Student))
    return 0.5


@dataclass
class FakePredictor:
    """Counts sizes, takes latency for multiplications, and adds up made-up losses."""

    asked: list[CompressionPlan] = field(default_factory=list)

    def size_bytes(self, plan: CompressionPlan) -> float:
        return sum(p.outer * p.inner * p.bits / 8 for p in products_of(plan, SHAPE, SIZES))

    def latency(self, plan: CompressionPlan) -> float:
        products = [p for p in products_of(plan, SHAPE, SIZES) if p.kind in ("attention", "ffn")]
        speed = {32: 1.0, 16: 1.0, 4: 0.9, 3: 0.9, 2: 0.9}
        work = (p.outer * p.inner * (0.4 if p.integers else speed[p.bits]) for p in products)
        return sum(work) / (4 * 3 * 64 * 256)

    def cost(self, plan: CompressionPlan) -> float:
        self.asked.append(plan)
        return sum(harm_of(decision) for _, decision in plan)


REFERENCE_BYTES = int(FakePredictor().size_bytes(CompressionPlan()))


def allocated(space: BoundSpace, *, base: str = NO_STUDENT, price: float, share: float) -> dict[str, Value]:
    predictor: Any = FakePredictor()
    return allocate(space, predictor, REFERENCE_BYTES, base=base, price=price, share=share)


def objective(plan: CompressionPlan, price: float, share: float) -> float:
    predictor = FakePredictor()
    size = predictor.size_bytes(plan) / REFERENCE_BYTES
    return predictor.cost(plan) + price * (share * predictor.latency(plan) + (1 - share) * size)


def test_a_ladder_knows_numbers_as_it_knows_shares() -> None:
    def ladder(heads: str, neurons: str) -> list[CompressionPlan]:
        rules = f"""
schema: 1
name: test
rules:
  - {{match: block.*.attention, heads: {{choices: {heads}, tie: all}}}}
  - {{match: block.*.ffn, neurons: {{choices: {neurons}, tie: all}}}}
"""
        space = validated(SearchSpace, strict_yaml.parse(rules, "test.yaml"), "test.yaml")
        bound = bind(space, SHAPE, tokens=64)
        return [bound.plan(params) for params in uniform_ladder(bound)]

    shares = ladder("[1.0, 0.5]", "[1.0, 0.5]")
    assert len(shares) == 2
    assert ladder("[4, 2]", "[256, 128]") == ladder("[4, 2]", "[1.0, 0.5]") == shares


def neighbours(space: BoundSpace, params: dict[str, Value]) -> Iterator[tuple[str, CompressionPlan]]:
    """Yield every plan that one changed parameter leads to, with that parameter; the base stays."""
    offered: dict[str, Sequence[Value]] = {}

    def choose(name: str, choices: Sequence[Value]) -> Value:
        offered[name] = choices
        return params[name]

    space.decode(choose)
    for name, choices in offered.items():
        if name == "student":
            continue
        for value in choices:
            if value == params[name]:
                continue

            def other(asked: str, offered: Sequence[Value], name: str = name, value: Value = value) -> Value:
                kept = params.get(asked, offered[0])
                return value if asked == name else kept if kept in offered else offered[0]

            yield name, space.decode(other)


@pytest.mark.parametrize(("price", "share"), itertools.product((0.0, 0.03, 1.0, 1e6), (0.0, 0.5, 1.0)))
@pytest.mark.parametrize("base", [NO_STUDENT, "half", "shallow"])
def test_the_space_can_express_what_is_allocated(base: str, price: float, share: float) -> None:
    params = allocated(JOINT, base=base, price=price, share=share)
    plan = JOINT.plan(params)
    assert params["student"] == base
    assert (plan.of_type(Student).get(MODEL_SITE) is None) == (base == NO_STUDENT)
    # Complete and in the space's own values, as a sampler would have them.
    assert JOINT.plan(JOINT.parameters(plan)) == plan
    asked: dict[str, Value] = {}

    def choose(name: str, choices: Sequence[Value]) -> Value:
        asked[name] = params[name]
        assert type(params[name]) in {type(c) for c in choices if c == params[name]}
        return params[name]

    assert JOINT.decode(choose) == plan
    assert asked == params


@pytest.mark.parametrize("name", shipped_spaces())
def test_every_shipped_space_can_be_allocated(name: str) -> None:
    space = bind(SearchSpace.load(name), SHAPE, tokens=64)
    for base in (NO_STUDENT, *space.students):
        params = allocated(space, base=base, price=0.3, share=0.5)
        assert ("student" in params) == bool(space.students)
        assert space.plan(params).of_type(Student) == ({MODEL_SITE: space.students[base]} if base != NO_STUDENT else {})


def test_at_no_price_everything_is_kept() -> None:
    plan = JOINT.plan(allocated(JOINT, price=0.0, share=0.5))
    assert FakePredictor().cost(plan) == 0
    assert [d for _, d in plan if not isinstance(d, Quantize)] == []
    assert {d.weight_bits for d in plan.of_type(Quantize).values()} == {16}
    student = JOINT.plan(allocated(JOINT, base="half", price=0.0, share=0.5))
    assert FakePredictor().cost(student) == harm_of(JOINT.students["half"]), "what the student cannot help losing"


def test_at_a_huge_price_of_size_no_change_makes_it_smaller() -> None:
    predictor = FakePredictor()
    for base in (NO_STUDENT, *JOINT.students):
        params = allocated(JOINT, base=base, price=1e9, share=0.0)
        size = predictor.size_bytes(JOINT.plan(params))
        others = list(neighbours(JOINT, params))
        assert len(others) > 10
        assert size <= min(predictor.size_bytes(plan) for _, plan in others)
        assert size < 0.1 * REFERENCE_BYTES
        assert {d.weight_bits for site, d in JOINT.plan(params).of_type(Quantize).items() if site != "head"} == {4}


def test_at_a_huge_price_of_latency_no_change_makes_it_faster() -> None:
    predictor = FakePredictor()
    params = allocated(JOINT, price=1e9, share=1.0)
    plan = JOINT.plan(params)
    assert predictor.latency(plan) <= min(predictor.latency(other) for _, other in neighbours(JOINT, params))
    bits = {d.weight_bits for site, d in plan.of_type(Quantize).items() if site.startswith("block.")}
    assert bits == {8}, "what is fastest is not what is smallest"


@pytest.mark.parametrize(("price", "share"), itertools.product((0.03, 0.1, 0.3, 1.0), (0.1, 0.5, 0.9)))
def test_no_single_change_pays(price: float, share: float) -> None:
    for base in (NO_STUDENT, *JOINT.students):
        params = allocated(JOINT, base=base, price=price, share=share)
        paid = objective(JOINT.plan(params), price, share)
        for name, plan in neighbours(JOINT, params):
            assert paid <= objective(plan, price, share) + 1e-12, name


def test_a_higher_price_buys_less_size() -> None:
    predictor = FakePredictor()
    plans = [JOINT.plan(allocated(JOINT, price=price, share=0.1)) for price in (0.0, 0.3, 3.0, 1e6)]
    sizes = [predictor.size_bytes(plan) for plan in plans]
    costs = [predictor.cost(plan) for plan in plans]
    assert sizes == sorted(sizes, reverse=True)
    assert costs == sorted(costs)
    assert len(set(sizes)) == 4


def test_parameters_that_another_choice_took_away_are_left_out() -> None:
    # A shallow student of one block has no second group, and no block to lose.
    text = {
        "schema": 1,
        "name": "test",
        "students": {"flat": {"blocks": [0], "epochs": 1}},
        "drop_blocks": {"at_most": 3},
        "rules": [{"match": "block.*.ffn", "bits": [16, 8]}],
    }
    space = bind(validated(SearchSpace, text, "test"), SHAPE, tokens=64)
    assert set(allocated(space, base="flat", price=1.0, share=0.5)) == {"student", "ffn.bits.0"}
    params = allocated(space, base=NO_STUDENT, price=1e6, share=0.0)
    assert params == {"student": NO_STUDENT, "drop_blocks": 3, "ffn.bits.0": 8}
    assert len(space.plan(params).of_type(Quantize)) == 1


def test_the_ladder_has_each_base_at_each_price() -> None:
    predictor: Any = FakePredictor()
    rungs = list(sensitivity_ladder(JOINT, predictor, REFERENCE_BYTES))
    bases = [rung["student"] for rung in rungs]
    assert len(set(bases)) == 3
    assert bases == [NO_STUDENT, "half", "shallow"] * (len(rungs) // 3)
    plans = {JOINT.plan(rung).plan_id for rung in rungs}
    assert len(plans) > len(rungs) // 3, "prices and shares lead to different plans"
    assert list(sensitivity_ladder(JOINT, predictor, REFERENCE_BYTES)) == rungs


def test_the_ladder_of_a_space_without_students_has_no_base() -> None:
    predictor: Any = FakePredictor()
    space = bind(SearchSpace.load("encoder-bits"), SHAPE, tokens=64)
    for rung in sensitivity_ladder(space, predictor, REFERENCE_BYTES):
        assert "student" not in rung
        space.plan(rung)


def test_each_rung_asks_what_is_known_by_then() -> None:
    fake = FakePredictor()
    predictor: Any = fake
    ladder = sensitivity_ladder(JOINT, predictor, REFERENCE_BYTES)
    assert fake.asked == []
    next(ladder)
    count = len(fake.asked)
    assert count > 0
    next(ladder)
    assert len(fake.asked) > count


@pytest.mark.parametrize(("at_most", "expected"), [(0, [0]), (1, [0, 1]), (3, [0, 1, 2, 3])])
def test_the_uniform_ladder_has_every_depth(at_most: int, expected: list[int]) -> None:
    found = SearchSpace.load("encoder-small").model_dump(mode="json", by_alias=True, exclude_none=True)
    found |= {"drop_blocks": {"at_most": at_most}}
    space = bind(validated(SearchSpace, found, "test.yaml"), SHAPE, tokens=64)
    dropped = {
        len(drop.blocks) if (drop := space.plan(params).of_type(DropBlocks).get(MODEL_SITE)) is not None else 0
        for params in uniform_ladder(space)
    }
    assert sorted(dropped) == expected


def test_the_ladder_has_every_number_of_bits_that_layers_may_have() -> None:
    text = {
        "schema": 1,
        "name": "test",
        "rules": [
            {"match": "block.*.ffn", "bits": {"choices": [16, 8, "w3a8", 3, 2], "tie": "all"}},
            {"match": "embeddings", "bits": [8, 4]},
        ],
    }
    space = bind(validated(SearchSpace, text, "test"), SHAPE, tokens=64)
    found = {params["ffn.bits.0"] for params in uniform_ladder(space)}
    assert found == {16, 8, "w3a8", 3, 2}


def test_plans_are_counted_without_asking_which_blocks_go() -> None:
    """To tell the order of a student's blocks it has to be distilled, which the first candidates need not wait for."""
    asked: list[str] = []

    def order(name: str) -> tuple[int, ...]:
        asked.append(name)
        return tuple(range(4 if name == NO_STUDENT else len(JOINT.shape.of_student(JOINT.students[name]).blocks)))

    space = bind(JOINT.space, JOINT.shape, tokens=JOINT.tokens, drop_order=order)
    count = count_uniform(space)
    assert count_plans(space)[0] > count
    assert not asked
    assert count == len(list(uniform_ladder(space))) > 10
    assert asked
