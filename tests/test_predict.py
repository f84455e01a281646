"""Predictions: sensitivities rank like exact divergences, products are those of the model, and nothing is passed over
that may still reach the front."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LABELS, make_model
from helpers_records import make_candidate, make_measurement
from torch import nn
from torch.nn import functional

from autocompress import model, task
from autocompress.anatomy import BlockShape, ModelShape
from autocompress.binding import BoundSpace, bind
from autocompress.config import DataConfig, RunConfig
from autocompress.errors import PlanError
from autocompress.evaluate import Workshop
from autocompress.model import EncoderModel, understand
from autocompress.pieces import stand_ins
from autocompress.plan import (
    MODEL_SITE,
    CompressionPlan,
    Decision,
    DropBlocks,
    LowRank,
    PruneHeads,
    PruneNeurons,
    Quantize,
    Recover,
    Student,
)
from autocompress.predict import Predictor, Product, Sensitivity, Sizes, _nonnegative, products_of
from autocompress.records import Candidate
from autocompress.space import SearchSpace, shipped_spaces
from autocompress.transforms import apply_plan
from autocompress.transforms.prune import Importance, importance, keep_blocks, keep_heads, keep_neurons

ENOUGH = 12
"""Measured candidates from which on predictions are made."""
W16, W4 = Quantize(weight_bits=16), Quantize(weight_bits=4, group_size=8)


def random_plans(space: BoundSpace, count: int, seed: int) -> list[CompressionPlan]:
    rng = random.Random(seed)
    found: dict[str, CompressionPlan] = {}
    while len(found) < count:
        plan = space.decode(lambda _, choices: rng.choice(choices))
        found.setdefault(plan.plan_id, plan)
    return list(found.values())


# --- sensitivity


@dataclasses.dataclass
class Given:
    """The tiny trained classifier with what sensitivities are measured from."""

    model: EncoderModel
    scores: Importance
    batches: list[task.Batch]

    def measure(self, site: str, *decisions: Decision, seed: int = 0) -> Sensitivity:
        return Sensitivity.measure(self.model, self.scores, {site: decisions}, self.batches, seed=seed)

    def cost(self, site: str, decision: Decision) -> float:
        """Return the one divergence that is measured for one decision."""
        [[(_, found)]] = self.measure(site, decision).curves.values()
        return found

    def exact(self, site: str, decision: Decision) -> float:
        """Return the mean divergence (nats) of the model that the single decision leads to."""
        changed = self.model.clone()
        if decision.structural:
            apply_plan(changed, CompressionPlan(((site, decision),)), self.scores)
        else:
            for path, weight in stand_ins(self.model, site, decision, self.scores).items():
                changed.module.get_parameter(f"{path}.weight").data.copy_(torch.from_numpy(weight))
        before, after = self.log_p(self.model), self.log_p(changed)
        return float((before.exp() * (before - after)).sum(dim=1).mean())

    def log_p(self, of: EncoderModel) -> torch.Tensor:
        with torch.no_grad():
            logits = torch.cat([of.module(**batch.inputs()).logits for batch in self.batches])
        return functional.log_softmax(logits.double(), dim=1)


@pytest.fixture(scope="module")
def given(bert_headed_folder: Path, tiny_csv: Path) -> Given:
    loaded = model.load(bert_headed_folder, labels=LABELS)
    rows = task.load(DataConfig(source=str(tiny_csv), search_rows=60)).tokenized(
        model.load_tokenizer(bert_headed_folder), 16
    )
    batches = list(rows["train"].head(32).in_order_of_length(16))
    return Given(loaded, importance(loaded, batches), batches)


@pytest.mark.parametrize(
    ("site", "decision"), [("block.1.attention", PruneHeads(keep=4)), ("block.0.ffn", PruneNeurons(keep=64))]
)
def test_keeping_everything_costs_nothing(given: Given, site: str, decision: Decision) -> None:
    assert given.cost(site, decision) == 0.0


@pytest.mark.parametrize("site", ["embeddings", "block.0.attention", "block.1.ffn", "head"])
def test_half_precision_costs_next_to_nothing(given: Given, site: str) -> None:
    assert 0 <= given.cost(site, W16) < 1e-8
    assert given.cost(site, W16) < 0.01 * given.cost(site, W4)


def test_stronger_pruning_costs_more(given: Given) -> None:
    for kind, prune, keeps in (
        ("attention", PruneHeads, (4, 3, 2, 1)),
        ("ffn", PruneNeurons, (64, 48, 32, 16, 4)),
    ):
        totals = [sum(given.cost(f"block.{n}.{kind}", prune(keep=keep)) for n in range(3)) for keep in keeps]
        assert totals == sorted(totals)
        assert 0 == totals[0] < totals[1] < totals[-1]


def ranks(values: Sequence[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def test_single_decisions_are_ordered_as_by_what_they_do(given: Given) -> None:
    options = bind(SearchSpace.load("encoder-joint"), given.model.shape).options(given.model.shape)
    pairs = [(site, decision) for site, decisions in options.items() for decision in decisions]
    assert len(pairs) > 30
    estimated = [given.cost(site, decision) for site, decision in pairs]
    exact = [given.exact(site, decision) for site, decision in pairs]
    spearman = float(np.corrcoef(ranks(estimated), ranks(exact))[0, 1])
    assert spearman > 0.7
    # Nats, not just an order; large changes are beyond what a second order can say.
    factors = [mine / true for mine, true in zip(estimated, exact, strict=True) if true > 1e-9]
    assert 0.5 < float(np.median(factors)) < 2


def test_measuring_leaves_the_model_as_it_was(given: Given) -> None:
    module = given.model.module
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    shape, drawn = given.model.shape, torch.get_rng_state()
    layers = dict(module.named_modules())
    given.measure("block.1.attention", PruneHeads(keep=1), LowRank(rank=4), W4)
    assert given.model.shape == shape
    assert dict(module.named_modules()) == layers
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == trained
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers.values())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not module.training


def test_one_seed_gives_the_same_sensitivity_and_others_nearly(given: Given) -> None:
    one, again = (given.measure("block.0.attention", PruneHeads(keep=2), seed=3) for _ in range(2))
    assert one == again
    found = [given.measure("embeddings", W4, seed=seed).at("embeddings", "bits", 4) for seed in range(6)]
    assert max(found) < 3 * min(found)


def test_sensitivity_survives_json(given: Given) -> None:
    measured = given.measure("block.0.ffn", PruneNeurons(keep=32), LowRank(rank=8), W4, W16)
    assert set(measured.curves) == {("block.0.ffn", axis) for axis in ("keep", "rank", "bits")}
    assert Sensitivity.from_json(measured.to_json()) == measured
    assert json.loads(measured.to_json())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_measured(family: str, given: Given) -> None:
    # ELECTRA's tables have a width of their own.
    sizes = {"embedding_size": 64} if family == "electra" else {}
    of = understand(make_model(family, labels=LABELS, **sizes), base="test")
    batches = [given.batches[0]]
    options = bind(SearchSpace.load("encoder-small"), of.shape).options(of.shape)
    found = Sensitivity.measure(of, importance(of, batches), options, batches, seed=0)
    assert {site for site, _ in found.curves} == set(options)
    assert all(np.isfinite(y) and y >= 0 for points in found.curves.values() for _, y in points)
    assert found.at("embeddings", "bits", 4) > found.at("embeddings", "bits", 16) > 0


def test_what_cannot_be_carried_out_is_left_out(given: Given) -> None:
    # Building such a plan fails that candidate only; measuring sensitivities must not fail the search.
    of = understand(make_model("electra", labels=LABELS, embedding_size=16), base="test")
    batches = [given.batches[0]]
    options = bind(SearchSpace.load("encoder-small"), of.shape).options(of.shape)
    found = Sensitivity.measure(of, importance(of, batches), options, batches, seed=0)
    assert found.at("embeddings", "bits", 16) < found.at("embeddings", "bits", 8)


CURVES = Sensitivity(
    {
        ("block.0.ffn", "keep"): ((0.25, 0.8), (0.5, 0.4), (0.75, 0.1)),
        ("block.0.ffn", "bits"): ((4.0, 0.3), (8.0, 0.02), (16.0, 0.001)),
    }
)


@pytest.mark.parametrize(
    ("level", "cost"), [(1.0, 0.0), (0.75, 0.1), (0.5, 0.4), (0.625, 0.25), (0.875, 0.05), (0.25, 0.8), (0.1, 0.8)]
)
def test_between_measured_shares_it_is_in_proportion(level: float, cost: float) -> None:
    assert CURVES.at("block.0.ffn", "keep", level) == pytest.approx(cost)


def test_bits_are_looked_up() -> None:
    assert [CURVES.at("block.0.ffn", "bits", bits) for bits in (4, 8, 16)] == [0.3, 0.02, 0.001]


def test_what_was_not_measured_costs_nothing() -> None:
    assert CURVES.at("block.1.ffn", "keep", 0.5) == CURVES.at("head", "bits", 8) == 0.0


# --- products


def carried_out(of: EncoderModel, plan: CompressionPlan, seed: int) -> EncoderModel:
    """Return the model that ``plan`` makes of ``of``; what is kept is drawn, nothing is distilled."""
    built = of.clone()
    for student in plan.of_type(Student).values():
        keep_blocks(built, student.blocks)
        for number in range(len(student.blocks)):
            keep_heads(built, number, list(range(student.heads)))
            keep_neurons(built, number, list(range(student.neurons)))
    generator = torch.Generator().manual_seed(seed)
    blocks = built.shape.blocks
    scores = Importance(
        tuple(torch.rand(b.heads, generator=generator) for b in blocks),
        tuple(torch.rand(b.neurons, generator=generator) for b in blocks),
        tuple(range(len(blocks))),
    )
    apply_plan(built, CompressionPlan(tuple((s, d) for s, d in plan if not isinstance(d, Student))), scores)
    return built


def matrices(of: EncoderModel) -> tuple[list[tuple[int, int]], int]:
    """Return the sorted shapes of all linear layers and embeddings, and their parameters with biases."""
    layers = [m for m in of.module.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    shapes = [(layer.weight.shape[0], layer.weight.shape[1]) for layer in layers]
    return sorted(shapes), sum(p.numel() for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("name", shipped_spaces())
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_those_of_the_model(family: str, name: str) -> None:
    of = understand(make_model(family, labels=LABELS), base="test")
    space, sizes = bind(SearchSpace.load(name), of.shape), Sizes.of(of)
    for number, plan in enumerate([CompressionPlan(), *random_plans(space, 5 if name != "encoder-students" else 4, 1)]):
        products = products_of(plan, of.shape, sizes)
        shapes, parameters = matrices(carried_out(of, plan, number))
        assert sorted((p.outer, p.inner) for p in products) == shapes, plan.words()
        assert sum(p.outer * p.inner + p.outer * p.bias for p in products) == parameters, plan.words()


def test_products_carry_the_bits_of_their_site() -> None:
    shape = ModelShape(hidden=32, blocks=(BlockShape(heads=4, head_size=8, neurons=64),) * 3)
    plan = CompressionPlan(
        (
            (MODEL_SITE, DropBlocks(blocks=(1,))),
            ("embeddings", Quantize(weight_bits=8)),
            ("block.1.ffn", LowRank(rank=6)),
            ("block.1.ffn", W4),
        )
    )
    products = products_of(plan, shape, Sizes(tables=((100, 32),), head=((32, 32), (2, 32))))
    assert products[0] == Product("embedding", 100, 32, 8, bias=False)
    ffn = [p for p in products if p.kind == "ffn"]
    assert ffn == [
        *[Product("ffn", 64, 32, 32), Product("ffn", 32, 64, 32)],
        *[Product("ffn", 6, 32, 4, 8, bias=False), Product("ffn", 64, 6, 4, 8)],
        *[Product("ffn", 6, 64, 4, 8, bias=False), Product("ffn", 32, 6, 4, 8)],
    ]
    assert [p.kind for p in products].count("attention") == 8
    assert [(p.kind, p.bits) for p in products[-2:]] == [("head", 32)] * 2


# --- sizes of artefacts


@pytest.mark.slow
@pytest.mark.parametrize(
    "runtime",
    [
        "openvino",
        "onnxruntime",
    ],
)
def test_sizes_are_predicted_within_one_percent(
    tiny_run: Callable[..., RunConfig], bert_headed_folder: Path, tmp_path: Path, runtime: str
) -> None:
    overrides = [f"model.id={json.dumps(str(bert_headed_folder))}", f"target.runtime={runtime}"]
    shop = Workshop(tiny_run(overrides), tmp_path)
    candidates: list[Candidate] = []

    for plan in random_plans(shop.space, 60, seed=5):
        try:
            size = shop.build(plan, tmp_path / "built").size_bytes
        except PlanError:  # groups too small for the runtime's kernels: the model is a tiny one
            continue
        score = dataclasses.replace(make_measurement(accuracy=0.8), size_bytes=size)
        candidates.append(dataclasses.replace(make_candidate(len(candidates), plan=plan), measurement=score))
    learned, new = candidates[:20], candidates[20:]
    assert len(new) >= 10
    assert max(c.score.size_bytes for c in candidates) > 1.3 * min(c.score.size_bytes for c in candidates)
    shop.predictor.learn(learned)
    assert shop.predictor.ready
    errors = [shop.predictor.size_bytes(c.plan) / c.score.size_bytes - 1 for c in new]
    assert max(map(abs, errors)) < 0.01, errors


# --- learning


SHAPE = ModelShape(hidden=64, blocks=(BlockShape(heads=4, head_size=16, neurons=256),) * 3)
SIZES = Sizes(tables=((2000, 64),), head=((64, 64), (2, 64)))
SPACE = bind(SearchSpace.load("encoder-small"), SHAPE)
TOLD = ("divergence", "size_bytes", "latency")


def sensitivity_of(student: Student | None) -> Sensitivity:
    """Return sensitivities that differ by site, and are higher for a student."""
    scale = 0.01 if student is None else 0.02
    shape = SHAPE if student is None else SHAPE.of_student(student)
    curves: dict[tuple[str, str], tuple[tuple[float, float], ...]] = {}
    for number, site in enumerate(shape.sites()):
        harm = scale * (1 + number)
        curves[site, "bits"] = ((4.0, 2 * harm), (8.0, 0.1 * harm), (16.0, 0.0))
        for axis in ("keep", "rank"):
            curves[site, axis] = ((0.25, 3 * harm), (0.5, 1.5 * harm), (0.75, 0.5 * harm))
    return Sensitivity(curves)


def make_predictor() -> Predictor:
    return Predictor(SHAPE, SIZES, lambda p: p.outer * p.inner * p.bits / 8, sensitivity_of, "divergence")


PREDICTOR = make_predictor()
"""For counting only; learns nothing."""


def measured(number: int, plan: CompressionPlan, *, noise: float = 0.0) -> Candidate:
    """Return a candidate whose score follows from its products and sensitivities, but for noise."""
    rng = random.Random(f"{number} {plan.plan_id}")
    products = products_of(plan, SHAPE, SIZES)
    speed = {32: 1.0, 16: 1.1, 8: 0.5, 4: 0.8}
    work = sum(p.outer * p.inner * speed[p.bits] for p in products if p.kind in ("attention", "ffn"))
    full = sum(
        p.outer * p.inner for p in products_of(CompressionPlan(), SHAPE, SIZES) if p.kind in ("attention", "ffn")
    )
    ratio = (0.1 + 0.9 * work / full) * (1 + noise * rng.gauss(0, 1))
    size = PREDICTOR.size_bytes(plan) + 3000 + 100 * len(products)
    divergence = max(0.0, 0.01 + 0.5 * PREDICTOR.harm(plan) * (1 + noise * rng.gauss(0, 1)))
    score = dataclasses.replace(make_measurement(ratio=ratio), size_bytes=round(size), divergence=divergence)
    return dataclasses.replace(make_candidate(number, plan=plan), measurement=score)


def many(count: int, *, seed: int = 0, noise: float = 0.01) -> list[Candidate]:
    return [measured(number, plan, noise=noise) for number, plan in enumerate(random_plans(SPACE, count, seed))]


def told_costs(candidate: Candidate) -> list[float]:
    score = candidate.score
    assert score.divergence is not None
    return [score.divergence, score.size_bytes, score.latency_ratio]


@pytest.fixture(scope="module")
def learned() -> Predictor:
    predictor = make_predictor()
    predictor.learn(many(80))
    return predictor


def test_it_is_ready_from_twelve_measured_candidates_on() -> None:
    predictor = make_predictor()
    for count in (0, 1, ENOUGH - 1):
        predictor.learn(many(count))
        assert not predictor.ready
    failed = [make_candidate(100 + n, state="FAIL") for n in range(ENOUGH)]
    predictor.learn([*many(ENOUGH - 1), *failed])
    assert not predictor.ready
    recovered = [dataclasses.replace(c, plan=c.plan.with_decision(MODEL_SITE, Recover(epochs=1))) for c in many(ENOUGH)]
    predictor.learn(recovered)
    assert not predictor.ready, "weights of recovered points are others"
    predictor.learn(many(ENOUGH))
    assert predictor.ready


def test_what_it_learned_holds_for_other_plans(learned: Predictor) -> None:
    others = [measured(n, plan) for n, plan in enumerate(random_plans(SPACE, 40, seed=9))]
    sizes = [learned.size_bytes(c.plan) / c.score.size_bytes - 1 for c in others]
    latencies = [learned.latency(c.plan) / c.score.latency_ratio - 1 for c in others]
    assert max(map(abs, sizes)) < 0.01
    assert float(np.mean(np.abs(latencies))) < 0.05
    costs = [learned.cost(c.plan) for c in others]
    exact = [told_costs(c)[0] for c in others]
    assert float(np.corrcoef(ranks(costs), ranks(exact))[0, 1]) > 0.9


def test_latencies_stay_above_nothing(learned: Predictor) -> None:
    smallest = SPACE.decode(lambda name, choices: choices[-1])
    assert learned.latency(smallest) > 0
    assert learned.latency(smallest) < learned.latency(CompressionPlan())


def test_accuracies_are_predicted_as_costs() -> None:
    predictor = Predictor(SHAPE, SIZES, PREDICTOR.weight_bytes, sensitivity_of, "accuracy")
    plans = random_plans(SPACE, 40, seed=2)

    def with_accuracy(number: int, plan: CompressionPlan) -> Candidate:
        score = make_measurement(accuracy=0.95 - 0.1 * PREDICTOR.harm(plan))
        return dataclasses.replace(make_candidate(number, plan=plan), measurement=score)

    predictor.learn([with_accuracy(n, plan) for n, plan in enumerate(plans)])
    assert predictor.cost(CompressionPlan()) == pytest.approx(-0.95, abs=0.03)
    by_harm = sorted(plans, key=PREDICTOR.harm)
    assert predictor.cost(by_harm[0]) < predictor.cost(by_harm[-1])


def test_harm_counts_sites_by_their_number_in_the_base() -> None:
    prune = PruneNeurons(keep=128)
    dropped = CompressionPlan(((MODEL_SITE, DropBlocks(blocks=(0,))), ("block.1.ffn", prune)))
    assert PREDICTOR.harm(dropped) == PREDICTOR.harm(CompressionPlan((("block.2.ffn", prune),)))
    assert PREDICTOR.harm(CompressionPlan((("block.1.ffn", prune),))) < PREDICTOR.harm(dropped)
    assert PREDICTOR.harm(CompressionPlan()) == 0


def test_expected_costs_come_in_the_order_that_is_told(learned: Predictor) -> None:
    plan = random_plans(SPACE, 1, seed=3)[0]
    assert make_predictor().expected(plan, TOLD) is None, "nothing is measured yet"
    found = learned.expected(plan, TOLD)
    assert found is not None
    by_name = {"size_bytes": learned.size_bytes(plan), "latency": learned.latency(plan), "loss": learned.cost(plan)}
    by_name["divergence"] = by_name["loss"]
    assert found == [by_name[name] for name in TOLD]
    assert learned.expected(plan, TOLD[::-1]) == found[::-1]
    assert learned.expected(plan, [*TOLD, "peak_memory"]) is None, "nobody predicts memory"
    unknown = Student(blocks=(0,), heads=1, neurons=32, epochs=1.0)
    assert learned.expected(CompressionPlan(((MODEL_SITE, unknown),)), TOLD) is None, "it would have to be distilled"


# --- passing over


def test_nothing_is_passed_over_before_it_is_ready() -> None:
    predictor = make_predictor()
    unbeatable = [[0.0, 1.0, 1e-6]]
    for plan in random_plans(SPACE, 20, seed=4):
        assert predictor.behind(plan, unbeatable, TOLD) is None


def test_what_is_far_behind_is_passed_over_with_words(learned: Predictor) -> None:
    plan = max(random_plans(SPACE, 30, seed=4), key=PREDICTOR.harm)
    found = learned.behind(plan, [[0.0, 1.0, 1e-6]], TOLD)
    assert found is not None
    for name in TOLD:
        assert f"{name} " in found
    assert learned.behind(plan, [], TOLD) is None


def test_what_may_be_best_at_one_objective_is_not_passed_over(learned: Predictor) -> None:
    plan = max(random_plans(SPACE, 30, seed=4), key=PREDICTOR.harm)
    cost, size, latency = learned.cost(plan), learned.size_bytes(plan), learned.latency(plan)
    assert learned.behind(plan, [[cost, 1.0, 1e-6]], TOLD) is None, "as good as the guide is predicted"
    assert learned.behind(plan, [[0.0, size, 1e-6]], TOLD) is None
    assert learned.behind(plan, [[0.0, 1.0, latency]], TOLD) is None
    # Several points that are each worse at something do not add up.
    assert learned.behind(plan, [[cost, 1.0, 1e-6], [0.0, size, 1e-6], [0.0, 1.0, latency]], TOLD) is None
    assert learned.behind(plan, [[cost, 1.0, 1e-6], [0.0, 1.0, 1e-6]], TOLD) is not None


def test_objectives_are_read_in_their_order(learned: Predictor) -> None:
    plan = max(random_plans(SPACE, 30, seed=4), key=PREDICTOR.harm)
    latency = learned.latency(plan)
    assert learned.behind(plan, [[1e-6, 0.0]], ("latency", "divergence")) is not None
    assert learned.behind(plan, [[latency, 0.0]], ("latency", "divergence")) is None


def test_what_cannot_be_predicted_lets_nothing_be_passed_over(learned: Predictor) -> None:
    plan = max(random_plans(SPACE, 30, seed=4), key=PREDICTOR.harm)
    assert learned.behind(plan, [[0.0, 1.0, 1e-6, 0.0]], (*TOLD, "peak_memory")) is None


def test_points_of_the_front_would_not_have_been_passed_over(learned: Predictor) -> None:
    candidates = many(80)
    costs = [told_costs(c) for c in candidates]
    front = [
        n
        for n, cost in enumerate(costs)
        if not any(m != n and all(a <= b for a, b in zip(other, cost, strict=True)) for m, other in enumerate(costs))
    ]
    assert len(front) > 5
    for n in front:
        others = [costs[m] for m in front if m != n]
        assert learned.behind(candidates[n].plan, others, TOLD) is None
    passed = [learned.behind(c.plan, [costs[n] for n in front], TOLD) is not None for c in candidates]
    assert sum(passed) > 0


# --- errors


def test_errors_are_those_of_predictions_made_before(learned: Predictor) -> None:
    predictor = make_predictor()
    plans = random_plans(SPACE, 40, seed=11)
    first = [measured(n, plan) for n, plan in enumerate(plans[:30])]
    for candidate in first[: ENOUGH - 1]:
        predictor.note(candidate)
    assert predictor.errors == {}, "nothing was predicted"
    predictor.learn(first)
    surprise = measured(31, plans[31])
    size, ratio = 2 * surprise.score.size_bytes, 3 * surprise.score.latency_ratio
    surprise = dataclasses.replace(
        surprise, measurement=dataclasses.replace(surprise.score, size_bytes=size, latency_ratio=ratio)
    )
    expected = {
        "size": [predictor.size_bytes(surprise.plan) / size - 1],
        "latency": [predictor.latency(surprise.plan) / ratio - 1],
    }
    predictor.note(surprise)
    assert predictor.errors == expected
    assert predictor.errors["size"] == [pytest.approx(-0.5, abs=0.01)]
    assert predictor.errors["latency"] == [pytest.approx(-2 / 3, abs=0.1)]
    predictor.learn([*first, surprise])
    assert predictor.errors == expected, "what is known afterwards changes nothing"
    predictor.note(make_candidate(50, state="PRUNED"))
    assert predictor.errors == expected, "nothing was measured"
    predictor.note(measured(32, plans[32]))
    assert [len(found) for found in predictor.errors.values()] == [2, 2]


# --- least squares


def problems() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for rows, columns in ((12, 1), (20, 3), (30, 6), (15, 8)):
        inputs = rng.normal(size=(rows, columns))
        yield inputs, inputs @ rng.normal(size=columns) + 0.1 * rng.normal(size=rows)
        yield np.abs(inputs), np.abs(inputs) @ np.abs(rng.normal(size=columns)) + 0.1 * rng.normal(size=rows)


def residual(inputs: np.ndarray, outputs: np.ndarray, weights: np.ndarray) -> float:
    return float(np.square(outputs - inputs @ weights).sum())


def best_of_all_subsets(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Return the non-negative least-squares weights: the best unconstrained fit of a subset that is not negative."""
    count = inputs.shape[1]
    best = np.zeros(count)
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            fitted, *_ = np.linalg.lstsq(inputs[:, chosen], outputs, rcond=None)
            weights = np.zeros(count)
            weights[list(chosen)] = fitted
            if (fitted >= 0).all() and residual(inputs, outputs, weights) < residual(inputs, outputs, best):
                best = weights
    return best


def test_nonnegative_weights_are_the_best_of_all_subsets() -> None:
    for inputs, outputs in problems():
        found = _nonnegative(inputs, outputs)
        assert (found >= 0).all()
        assert found == pytest.approx(best_of_all_subsets(inputs, outputs), abs=1e-5)


def test_nonnegative_weights_are_scipys() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    for inputs, outputs in problems():
        expected, _ = optimize.nnls(inputs, outputs)
        assert _nonnegative(inputs, outputs) == pytest.approx(expected, abs=1e-5)


def test_a_column_of_zeros_has_no_weight() -> None:
    inputs = np.column_stack([np.zeros(10), np.arange(10.0)])
    assert _nonnegative(inputs, 2 * np.arange(10.0)) == pytest.approx([0, 2])
