"""Predictions: sizes are exact, latencies and costs near, and nothing is passed over that may reach the front."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers_plans import random_plans, ranks
from helpers_records import make_candidate, make_measurement

from autocompress import predict
from autocompress.anatomy import BlockShape, ModelShape
from autocompress.binding import bind
from autocompress.config import RunConfig
from autocompress.decisions import (
    RECONSTRUCTED,
    DropBlocks,
    LowRank,
    PruneNeurons,
    Quantize,
    Recover,
    Student,
    TrimVocabulary,
)
from autocompress.errors import PlanError
from autocompress.evaluate import Workshop
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.predict import Predictor
from autocompress.products import Sizes, products_of
from autocompress.records import Candidate
from autocompress.sensitivity import Sensitivity
from autocompress.space import SearchSpace

ENOUGH = 12
"""Measured candidates from which on predictions are made."""


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


SHAPE = ModelShape(hidden=64, blocks=(BlockShape(heads=4, head_size=16, neurons=256),) * 3, vocabulary=1000)
SIZES = Sizes(tables=((2000, 64),), head=((64, 64), (2, 64)))
SPACE = bind(SearchSpace.load("encoder-small"), SHAPE, tokens=64)
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
    return Predictor(SHAPE, SIZES, lambda p: p.outer * p.inner * p.bits / 8, sensitivity_of, "divergence", 64)


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


def test_fits_are_made_of_the_latest_and_of_those_timed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "_LEARNED_FROM", 40)
    *old, anew = many(41)
    anew = dataclasses.replace(anew, measurement=dataclasses.replace(anew.score, confirmed=True))
    new = many(39, seed=1)
    capped, exact = make_predictor(), make_predictor()
    capped.learn([anew, *old, *new])
    exact.learn([*new, anew])
    for plan in random_plans(SPACE, 5, seed=3):
        assert capped.expected(plan, TOLD) == exact.expected(plan, TOLD)
    exact.learn(old)
    assert capped.expected(plan, TOLD) != exact.expected(plan, TOLD)


def test_what_a_reconstruction_makes_up_for_is_learned() -> None:
    def better(candidate: Candidate) -> float:
        """Return the divergence with most of what was pruned made up for, and nothing of what was done besides."""
        assert candidate.score.divergence is not None
        return candidate.score.divergence - 0.3 * PREDICTOR.harm(candidate.plan.structural().without(LowRank))

    predictor, plain = make_predictor(), many(60, noise=0.0)
    fitted = []
    for candidate in plain[::2]:
        plan = candidate.plan.with_decision(MODEL_SITE, RECONSTRUCTED)
        score = dataclasses.replace(candidate.score, divergence=better(candidate))
        fitted.append(dataclasses.replace(candidate, plan=plan, measurement=score))
    predictor.learn([*plain, *fitted])
    errors = []
    for candidate in plain[1::2]:
        again = candidate.plan.with_decision(MODEL_SITE, RECONSTRUCTED)
        errors.append(abs(predictor.cost(again) - better(candidate)))
        assert predictor.size_bytes(again) == predictor.size_bytes(candidate.plan)
        assert predictor.latency(again) == predictor.latency(candidate.plan)
    assert float(np.mean(errors)) < 0.15 * float(np.std([better(candidate) for candidate in plain])), errors


@pytest.mark.parametrize("axis", ["table", "vocabulary", "head"])
def test_what_looking_up_and_the_head_take_is_learned(axis: str) -> None:
    """Of plans that are alike in everything else."""

    def changed(plan: CompressionPlan, number: int) -> tuple[CompressionPlan, float]:
        if axis == "table":
            bits = (16, 8, 4, 3, 2)[number % 5]
            return plan.with_decision("embeddings", Quantize(weight_bits=bits, group_size=32 if bits < 8 else 0)), bits
        if axis == "vocabulary" and number % 2:
            return plan.with_decision("embeddings", TrimVocabulary(keep=512)), 8.0
        if axis == "head":
            head = Quantize(weight_bits=8, activation_bits=8 if number % 2 else 16)
            return plan.with_decision("head", head), 8.0 * (number % 2)
        return plan, 0.0

    found = []
    for number, candidate in enumerate(many(100, noise=0.0)):
        in_blocks = CompressionPlan(tuple((s, d) for s, d in candidate.plan if s not in ("embeddings", "head")))
        plan, slower = changed(in_blocks, number)
        base = measured(number, plan).score.latency_ratio
        score = dataclasses.replace(candidate.score, latency_ratio=base + 0.02 * slower)
        found.append(dataclasses.replace(candidate, plan=plan, measurement=score))
    predictor = make_predictor()
    predictor.learn(found[:80])
    errors = [predictor.latency(c.plan) / c.score.latency_ratio - 1 for c in found[80:]]
    assert max(map(abs, errors)) < 0.04, errors


def test_a_shape_that_its_kernel_does_not_like_is_learned() -> None:
    slow = 192  # neurons

    def timed(candidate: Candidate) -> Candidate:
        blocks = SHAPE.after(candidate.plan).blocks
        ratio = candidate.score.latency_ratio * (1 + 0.1 * sum(block.neurons == slow for block in blocks))
        score = dataclasses.replace(candidate.score, latency_ratio=ratio)
        return dataclasses.replace(candidate, measurement=score)

    found = [timed(c) for c in many(200)]
    assert sum(any(b.neurons == slow for b in SHAPE.after(c.plan).blocks) for c in found) > 20
    predictor = make_predictor()
    predictor.learn(found[:150])
    off = lambda: np.mean([abs(predictor.latency(c.plan) / c.score.latency_ratio - 1) for c in found[150:]])  # noqa: E731
    with_effects = off()
    predictor._effects.clear()
    assert with_effects < 0.75 * off()


def test_latencies_stay_above_nothing(learned: Predictor) -> None:
    smallest = SPACE.decode(lambda name, choices: choices[-1])
    assert learned.latency(smallest) > 0
    assert learned.latency(smallest) < learned.latency(CompressionPlan())


def test_accuracies_are_predicted_as_costs() -> None:
    predictor = Predictor(SHAPE, SIZES, PREDICTOR.weight_bytes, sensitivity_of, "accuracy", 64)
    plans = random_plans(SPACE, 40, seed=2)

    def with_accuracy(number: int, plan: CompressionPlan) -> Candidate:
        score = make_measurement(accuracy=0.95 - 0.1 * PREDICTOR.harm(plan))
        return dataclasses.replace(make_candidate(number, plan=plan), measurement=score)

    predictor.learn([with_accuracy(n, plan) for n, plan in enumerate(plans)])
    assert predictor.cost(CompressionPlan()) == pytest.approx(-0.95, abs=0.03)
    by_harm = sorted(plans, key=PREDICTOR.harm)
    assert predictor.cost(by_harm[0]) < predictor.cost(by_harm[-1])


def test_accuracies_are_settled_as_far_as_they_were_moved_by_chance() -> None:
    """Plans differ from the fit by 1 point, and what was measured from that by 2, as its interval says."""
    predictor = Predictor(SHAPE, SIZES, PREDICTOR.weight_bytes, sensitivity_of, "accuracy", 64)
    rng = np.random.default_rng(0)
    true, candidates = [], []
    for number, plan in enumerate(random_plans(SPACE, 300, seed=2)):
        true.append(0.9 - 0.1 * PREDICTOR.harm(plan) + rng.normal(0, 0.01))
        accuracy = true[-1] + rng.normal(0, 0.02)
        drop = 0.9 - accuracy
        interval = {"accuracy_drop_low": drop - 1.96 * 0.02, "accuracy_drop_high": drop + 1.96 * 0.02}
        score = dataclasses.replace(make_measurement(), accuracy=accuracy, accuracy_drop=drop, **interval)
        candidates.append(dataclasses.replace(make_candidate(number, plan=plan), measurement=score))
    predictor.learn(candidates)
    assert predictor.guide_deviation == pytest.approx(0.01, abs=0.005)
    settled = [-predictor.settled[c.number] for c in candidates]
    off = [float(np.std(np.array(found) - true)) for found in (settled, [c.score.accuracy for c in candidates])]
    assert off[0] < 0.6 * off[1]
    best = max(candidates, key=lambda c: c.score.accuracy)
    assert -predictor.settled[best.number] < best.score.accuracy - 0.02, "the best was lucky"


def test_what_has_no_interval_is_settled_as_it_is(learned: Predictor) -> None:
    candidate = many(80)[3]
    assert learned.settled[candidate.number] == pytest.approx(candidate.score.divergence)


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


def test_what_is_shared_is_stored_once_and_run_as_often() -> None:
    """Work and nodes grow with the runs, stored bytes do not; a cheaper activation is work of its own kind."""
    once = Student(blocks=(0,), heads=4, neurons=256)
    described = {
        name: PREDICTOR._features(CompressionPlan(((MODEL_SITE, student),)))
        for name, student in {
            "once": once,
            "thrice": dataclasses.replace(once, share=3),
            "relu": dataclasses.replace(once, activation="relu"),
            "three": dataclasses.replace(once, blocks=(0, 1, 2)),
            "narrow": dataclasses.replace(once, hidden=16),
        }.items()
    }
    assert described["thrice"].counted == described["once"].counted < described["three"].counted
    assert np.array_equal(described["thrice"].work, described["three"].work)
    assert np.array_equal(described["thrice"].extras, described["three"].extras)
    moved = described["relu"].work - described["once"].work
    assert sorted(moved[moved != 0]) == [-0.256, 0.256]
    assert described["relu"].counted == described["once"].counted
    # 2000 and 64 x 64 and 2 x 64, and what reads or writes 64 channels in the block: a quarter of all widths is left.
    weights = 2000 * 16 + 16 * 16 + 2 * 16 + 4 * 64 * 16 + 2 * 256 * 16
    biases = 16 + 2 + 3 * 64 + 16 + 256 + 16
    assert described["narrow"].counted == 4 * (weights + biases)
