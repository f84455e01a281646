"""The workshop: a candidate that cannot reach the front is given up, all others are measured in full."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SPECIAL
from helpers_records import make_candidate

from autocompress import api, recovery, scoring, slot, stand, timing
from autocompress.config import RunConfig
from autocompress.decisions import (
    DropBlocks,
    LowRank,
    MaxTokens,
    PruneHeads,
    PruneNeurons,
    Quantize,
    Recover,
    Student,
    TrimVocabulary,
)
from autocompress.errors import MeasurementError, PlanError, RuntimeBuildError
from autocompress.evaluate import Workshop
from autocompress.gauge import Gauge
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.records import Measurement, Stopped
from autocompress.rows import LOGITS_FILE, read_logits
from autocompress.runtimes import Artifact, get_runtime
from autocompress.runtimes.onnxruntime import ONNXRuntime

pytestmark = pytest.mark.slow

W8A8 = Quantize(weight_bits=8, activation_bits=8)
PLAN = CompressionPlan((("block.0.ffn", W8A8), ("block.1.attention", W8A8)))
HARMFUL = CompressionPlan(((MODEL_SITE, DropBlocks(blocks=(0, 1))), ("block.0.attention", PruneHeads(keep=1))))


@pytest.fixture(scope="module")
def run(tiny_run: Callable[..., RunConfig], bert_headed_folder: Path) -> RunConfig:
    return tiny_run([f"model.id={json.dumps(str(bert_headed_folder))}"])


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing count as disturbed, whatever else this machine does."""
    monkeypatch.setattr(timing, "SLOWED", math.inf)


@pytest.fixture
def disturbed(monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    """Have what is slow count as disturbed, and be timed anew at once."""
    monkeypatch.setattr(timing, "SLOWED", 1.12)
    monkeypatch.setattr(stand, "APART_S", 0.0)


@pytest.fixture(scope="module")
def shop(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = Workshop(run, tmp_path_factory.mktemp("artefacts"))
    workshop.score(workshop.build(CompressionPlan(), workshop.reference_folder))
    return workshop


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have rounds taken in this process, where they can be watched."""

    class Here:
        def __init__(self, gauge: Gauge) -> None:
            self._stand = gauge.stand

        def rounds(self, artefacts: Any, count: int, *, patience_s: float, pace_ms: float, **told: Any) -> Any:
            return self._stand.rounds(artefacts, count, **told)

    monkeypatch.setattr(Gauge, "apart", property(Here))


@pytest.fixture(scope="module")
def measured(shop: Workshop) -> Measurement:
    return shop.evaluate(PLAN)


def with_guide(shop: Workshop, *overrides: str) -> Workshop:
    """Return a workshop on the same folder with another run file."""
    run = RunConfig.from_mapping(shop.run.model_dump(mode="json", by_alias=True), overrides=overrides)
    return Workshop(run, shop.artefacts)


def test_the_reference_diverges_from_itself_by_nothing(shop: Workshop) -> None:
    found = shop.score(Artifact.open(shop.reference_folder))
    assert found.divergence == 0.0
    assert found.peak_memory_bytes is None, "nobody asked"
    assert set(found.stages) == {"load", "latency", "accuracy", "waiting"}


def test_a_measurement_is_whole(shop: Workshop, measured: Measurement) -> None:
    logits = read_logits(shop.artefacts / PLAN.plan_id)
    reference = read_logits(shop.reference_folder)
    scored = scoring.accuracy(logits, shop.splits["search"])
    assert (measured.accuracy, measured.loss, measured.rows) == (scored.value, scored.loss, 60)
    assert measured.divergence == scoring.divergence(logits, reference) > 0
    assert measured.size_bytes == Artifact.open(shop.artefacts / PLAN.plan_id).size_bytes
    assert set(measured.stages) == {"build", "load", "latency", "accuracy", "waiting"}
    assert measured.seconds == pytest.approx(sum(measured.stages.values()))
    assert not measured.confirmed


def test_parts_hold_each_row_once(shop: Workshop) -> None:
    for split in ("search", "test"):
        parts = [[int(row) for batch in part for row in batch.rows] for part in shop.parts(split)]
        assert sorted(row for part in parts for row in part) == list(range(len(shop.splits[split])))
        ends = [sum(map(len, parts[: n + 1])) / len(shop.splits[split]) for n in range(len(scoring.LOOKS))]
        assert ends == pytest.approx(scoring.LOOKS, abs=0.5 / len(shop.splits[split]))
        # A random part: in the order of the file the rows' classes would alternate.
        assert sorted(parts[0]) != list(range(len(parts[0])))
    again = with_guide(shop)
    assert [b.rows.tolist() for b in again.batches("search")] == [b.rows.tolist() for b in shop.batches("search")]


def costs_of(measured: Measurement, quality: float) -> list[float]:
    """Return a point that nothing but its quality tells from one much smaller and faster."""
    return [quality, 1.0, 1e-9]


def test_graphs_of_what_is_used_once_are_let_go(shop: Workshop, run: RunConfig) -> None:
    own = Workshop(run, shop.artefacts)
    teacher, _ = own.base(None)
    kept = tuple(range(len(teacher.shape.blocks)))
    for name in ("once", "and again", "and again and again"):
        other = teacher.clone()
        other.base = name
        own._template(other, kept)
        own._template(teacher, kept)
    assert {base for base, _ in own._templates} == {teacher.base, "and again and again"}


# What a candidate cannot reach, by guide: perfect by the one, better than anything by the others.
PERFECT = {"accuracy": -1.0, "loss": 0.0, "divergence": 0.0}


@pytest.mark.parametrize("guide", PERFECT)
def test_what_cannot_reach_the_front_is_given_up(shop: Workshop, guide: str) -> None:
    other = with_guide(shop, f"search.guide={guide}")
    found = other.attempt(HARMFUL, [costs_of(None, PERFECT[guide])])  # type: ignore[arg-type]
    assert isinstance(found, Stopped)
    assert 0 < found.rows < 60
    assert found.size_bytes > 1
    assert found.latency > 1e-9
    assert found.peak_memory == 0.0
    assert "of 60 rows; the front " in found.reason
    assert not (shop.artefacts / HARMFUL.plan_id).exists()
    assert not [path for path in shop.artefacts.iterdir() if path.name.startswith(".")]
    assert isinstance(shop.attempt(HARMFUL), Measurement), "without a front nothing is given up"


def test_what_reaches_the_front_is_measured_as_without_one(shop: Workshop, measured: Measurement) -> None:
    rows = 60
    for front in (
        [],
        # It has one hit more than this point, which is smaller and faster.
        [[-(measured.accuracy - 1 / rows), 1.0, 1e-9]],
        # These are perfect, but larger or slower.
        [[-1.0, 1.01 * measured.size_bytes, 1e-9], [-1.0, 1.0, 1e9]],
    ):
        found = shop.attempt(PLAN, front)
        assert isinstance(found, Measurement)
        assert (found.accuracy, found.predictions, found.loss) == (
            measured.accuracy,
            measured.predictions,
            measured.loss,
        )
        assert found.divergence == measured.divergence
        assert (shop.artefacts / PLAN.plan_id / LOGITS_FILE).exists()


@pytest.mark.parametrize("guide", ["loss", "divergence"])
def test_a_guide_stops_nothing_that_gets_below(shop: Workshop, measured: Measurement, guide: str) -> None:
    other = with_guide(shop, f"search.guide={guide}")
    value = getattr(measured, guide)
    assert isinstance(other.attempt(PLAN, [[value * 1.000001, 1.0, 1e-9]]), Measurement)
    assert isinstance(other.attempt(PLAN, [[value * 0.2, 1.0, 1e-9]]), Stopped)


def test_two_qualities_stop_nothing(shop: Workshop) -> None:
    other = with_guide(shop, "objectives=[accuracy, loss, latency]")
    assert isinstance(other.attempt(HARMFUL, [[-1.0, 0.0, 1e-9]]), Measurement)


def test_objectives_are_read_in_their_order(shop: Workshop) -> None:
    other = with_guide(shop, "objectives=[latency, size_bytes, divergence]")
    assert isinstance(other.attempt(HARMFUL, [[1e-9, 1.0, 0.0]]), Stopped)
    assert isinstance(other.attempt(HARMFUL, [[1e9, 1.0, 0.0], [1e-9, 1e12, 0.0]]), Measurement)


def test_memory_is_measured_where_it_counts(shop: Workshop, measured: Measurement) -> None:
    for override in ("objectives=[accuracy, latency, peak_memory]", "constraints.max_memory_mb=900"):
        other = with_guide(shop, override)
        found = other.attempt(PLAN, [])
        assert isinstance(found, Measurement)
        assert found.peak_memory_bytes is not None
        assert found.peak_memory_bytes > 0
        assert "memory" in found.stages
    stopped = with_guide(shop, "objectives=[accuracy, latency, peak_memory]").attempt(HARMFUL, [[-1.0, 1e-9, 1.0]])
    assert isinstance(stopped, Stopped)
    assert stopped.peak_memory > 1


@pytest.mark.usefixtures("disturbed")
@pytest.mark.parametrize(("reference", "stops"), [(1.0, True), (1.3, False)])
def test_nobody_is_given_up_for_a_latency_that_was_disturbed(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, reference: float, stops: bool
) -> None:
    own = with_guide(shop)
    own.gauge.stand.pace.note(1.0)
    pair = timing.Pair(np.full(4, 0.5 * reference), np.full(2, reference))
    monkeypatch.setattr(own.gauge.stand, "pairs", lambda *_, **__: [pair])
    # Perfect, smaller, and faster by more than single pairs differ.
    found = own.attempt(HARMFUL, [[-1.0, 1.0, 0.35]])
    assert isinstance(found, Stopped) == stops
    assert isinstance(own.attempt(HARMFUL, [[-1.0, 1.0, 0.45]]), Measurement), "by less than they do"


def test_what_a_worker_waits_for_others_is_not_counted_as_its_work(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(0.0, 100.0)
    monkeypatch.setattr(slot, "waited", lambda: next(seconds))
    found = shop.evaluate(PLAN)
    assert found.stages["waiting"] >= 400
    assert all(found.stages[stage] < 0 for stage in ("build", "load", "latency", "accuracy")), "of each stage"
    assert found.seconds < 100


def test_an_artefact_that_is_gone_is_made_again_as_it_was_or_not_at_all(shop: Workshop, measured: Measurement) -> None:
    candidate = dataclasses.replace(make_candidate(0, plan=PLAN), measurement=measured)
    folder = shop.artefacts / PLAN.plan_id
    shop.build(PLAN, folder)
    assert shop.kept(candidate) is measured, "it is there"
    shutil.rmtree(folder)
    assert shop.kept(candidate).predictions == measured.predictions
    assert folder.is_dir()
    for changed in ({"predictions": "0" * 64}, {"size_bytes": measured.size_bytes + 1}):
        other = dataclasses.replace(candidate, measurement=dataclasses.replace(measured, **changed))
        shutil.rmtree(folder, ignore_errors=True)
        with pytest.raises(MeasurementError, match="its artefact is gone, and what is built from its plan now"):
            shop.kept(other)
        assert not folder.exists()


def test_logits_that_are_not_finite_fail_at_the_first_part(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
            return np.full((len(inputs["input_ids"]), 2), np.nan, dtype=np.float32)

        def close(self) -> None:
            pass

    monkeypatch.setattr(shop.runtime, "load", lambda *_: Broken())
    first = len(shop.parts("search")[0][0].labels)
    with pytest.raises(MeasurementError, match=f"logits: {first} of {first} rows are not finite"):
        shop.attempt(HARMFUL)
    assert not (shop.artefacts / HARMFUL.plan_id).exists()


def test_a_confirmed_latency_changes_nothing_else(shop: Workshop, measured: Measurement) -> None:
    shop.evaluate(PLAN)
    said: list[str] = []
    found, again = shop.confirmed([(PLAN, measured), (PLAN, measured)], pairs=12, progress=said.append)
    rounds = [line for line in said if "once more" not in line]
    assert len(rounds) == 12, "as many rounds over all points"
    assert found.confirmed
    assert again.confirmed
    latencies = {f.name for f in dataclasses.fields(Measurement) if "latency" in f.name or f.name == "reference_ms"}
    for field in dataclasses.fields(Measurement):
        if field.name not in {*latencies, "confirmed"}:
            assert getattr(found, field.name) == getattr(measured, field.name)
    assert found.latency_ratio_low <= found.latency_ratio <= found.latency_ratio_high
    assert math.isfinite(found.latency_ms)
    assert found.latency_ms != measured.latency_ms


@pytest.mark.usefixtures("here")
def test_confirmed_latencies_come_from_several_loads(
    shop: Workshop, measured: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.evaluate(PLAN)
    loaded: list[str] = []
    load = shop.runtime.load

    def noted(artifact: Artifact, target: Any) -> Any:
        loaded.append(artifact.folder.name)
        return load(artifact, target)

    monkeypatch.setattr(shop.runtime, "load", noted)
    shop.confirmed([(PLAN, measured), (PLAN, measured)], pairs=7, quiet=lambda: loaded.append("quiet"))
    point = PLAN.plan_id
    assert sorted(loaded[:3]) == sorted(["reference", point, point])
    assert loaded[3:] == ["quiet", "reference", point, point, "reference"], "one after the other, between rounds"


@pytest.mark.usefixtures("here")
def test_artefacts_that_fill_the_memory_are_confirmed_in_parts(
    shop: Workshop, measured: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    size_bytes = shop.evaluate(PLAN).size_bytes
    for room, parts in ((3 * size_bytes, ["1 to 3"]), (2 * size_bytes, ["1 to 2", "3 to 3"]), (1, ["1", "2", "3"])):
        said: list[str] = []
        monkeypatch.setattr(stand, "_AT_ONCE_BYTES", room)
        found = shop.confirmed([(PLAN, measured)] * 3, pairs=2, progress=said.append)
        assert len(found) == 3
        assert all(m.confirmed for m in found)
        assert len(said) == 2 * len(parts)
        assert all(f"points {part}" in line for part, line in zip(parts, said[::2], strict=True))


@pytest.mark.usefixtures("disturbed", "here")
@pytest.mark.parametrize("slow", [0, 3, 100])
def test_rounds_that_were_disturbed_are_timed_once_more(
    shop: Workshop, measured: Measurement, monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    """By others on the machine, which a reference shows that is slow; after some rounds they leave."""
    blocks = itertools.count()

    def block(session: object, inputs: object, clock: object) -> timing.Block:
        turn, place = divmod(next(blocks), 3)  # the reference, the candidate, and the reference again
        disturbed, of_candidate = 1 <= turn < 1 + slow, place == 1
        seconds = 0.9 if of_candidate else 1.3 + 0.01 * turn
        return timing.Block(np.full(4, seconds if disturbed else 0.5 if of_candidate else 1.0))

    shop.evaluate(PLAN)
    monkeypatch.setattr(timing, "block", block)
    monkeypatch.setattr(shop.gauge.stand, "pace", timing.Pace())
    said: list[str] = []
    [found] = shop.confirmed([(PLAN, measured)], pairs=4, progress=said.append)
    assert len(said) == next(blocks) / 3 == min(8, 4 + slow)
    assert [line for line in said if "once more" in line] == said[4:]
    if slow < 100:
        assert found.latency_ratio == 0.5, "of those alone that were not disturbed"
        assert found.latency_ratio_high < 0.6, "and no wider than so few pairs are off by themselves"
    else:
        # One of four was quiet: lower quartiles lie between it and the next one.
        expected = (0.25 * 0.5 + 0.75 * 0.9) / (0.25 * 1.0 + 0.75 * 1.31)
        assert found.latency_ratio == pytest.approx(expected), "of the half that was least"


@pytest.mark.usefixtures("disturbed", "here")
def test_points_that_were_not_disturbed_are_done(
    shop: Workshop, measured: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of seven, in groups of four beside the same reference, the second group is disturbed in the first round."""
    numbers: list[int] = []

    def block(session: object, inputs: object, clock: object) -> timing.Block:
        numbers.append(len(numbers))
        return timing.Block(np.full(4, 1.3 if 6 <= numbers[-1] < 11 else 1.0))  # a reference on each side of a group

    shop.evaluate(PLAN)
    monkeypatch.setattr(timing, "block", block)
    monkeypatch.setattr(shop.gauge.stand, "pace", timing.Pace())
    said: list[str] = []
    found = shop.confirmed([(PLAN, measured)] * 7, pairs=2, progress=said.append)
    assert len(numbers) == 2 * (6 + 5) + 5
    assert [line.split(": ")[1] for line in said[2:]] == ["those of 3 that were disturbed, once more"]
    assert {each.latency_ratio for each in found} == {1.0}


@pytest.mark.usefixtures("disturbed")
def test_pairs_that_were_disturbed_are_taken_at_the_next_moment(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunConfig.from_mapping(shop.run.model_dump(mode="json", by_alias=True), overrides=["search.latency_pairs=4"])
    own = Workshop(run, shop.artefacts)
    own.gauge.stand.pace.note(1.0)
    asked: list[tuple[int, int]] = []

    def pairs(session: object, artifact: object, count: int, *, before: int) -> list[timing.Pair]:
        asked.append((count, before))
        slow = len(asked) <= 2
        return [timing.Pair(np.full(4, 0.9 if slow else 0.5), np.full(2, 1.3 if slow else 1.0))] * count

    monkeypatch.setattr(own.gauge.stand, "pairs", pairs)
    found = own.evaluate(PLAN)
    assert asked == [(1, 0), (2, 0), (3, 0), (1, 3)], "until four of them were not disturbed"
    assert found.latency_ratio == 0.5


A_STUDENT = {
    "relu": Student(blocks=(0, 2), heads=2, neurons=32, epochs=0.1, activation="relu"),
    "narrow": Student(blocks=(0, 2), heads=2, neurons=32, epochs=0.1, hidden=16),
    "shared": Student(blocks=(1,), heads=2, neurons=32, epochs=0.1, share=3),
    "all": Student(blocks=(1,), heads=2, neurons=32, epochs=0.1, activation="relu", hidden=16, share=2),
}


class TestStitched:
    """That what is stitched from pieces is the model which the plan makes, and that pieces are made once."""

    @pytest.mark.parametrize(
        "decisions",
        [
            (("block.2.attention", PruneHeads(keep=2)), ("block.0.ffn", LowRank(rank=6))),
            ((MODEL_SITE, DropBlocks(blocks=(1,))), ("block.1.attention", PruneHeads(keep=1))),
            ((MODEL_SITE, Student(blocks=(0, 2), heads=2, neurons=32, epochs=0.1)),),
            (
                (MODEL_SITE, Student(blocks=(0, 2), heads=2, neurons=32, epochs=0.1)),
                (MODEL_SITE, DropBlocks(blocks=(0,))),
                ("block.0.ffn", LowRank(rank=3)),
            ),
            ((MODEL_SITE, A_STUDENT["relu"]), ("block.1.ffn", PruneNeurons(keep=9))),
            (
                (MODEL_SITE, A_STUDENT["narrow"]),
                (MODEL_SITE, DropBlocks(blocks=(1,))),
                ("block.0.attention", PruneHeads(keep=1)),
            ),
            (
                (MODEL_SITE, A_STUDENT["shared"]),
                ("block.0.attention", PruneHeads(keep=1)),
                ("block.0.ffn", LowRank(rank=5)),
            ),
            ((MODEL_SITE, A_STUDENT["all"]), (MODEL_SITE, Recover(epochs=0.1)), ("block.0.ffn", PruneNeurons(keep=9))),
            (
                (MODEL_SITE, A_STUDENT["shared"]),
                (MODEL_SITE, Recover(epochs=0.1, hidden=30)),
                ("block.0.ffn", LowRank(rank=5)),
            ),
        ],
        ids=[
            *("structure", "dropped", "student", "student, dropped", "relu", "narrow, dropped", "shared"),
            *("all, recovered", "shared, recovered block by block"),
        ],
    )
    def test_it_is_the_model_of_the_plan(self, shop: Workshop, tmp_path: Path, decisions: Any) -> None:
        import torch

        plan = CompressionPlan(tuple(decisions))
        session = shop.runtime.load(shop.build(plan, tmp_path / "built"), shop.run.target)
        built = shop.structured(plan)
        batch = shop.splits["search"].batch([0, 7, 20, 33])
        with torch.no_grad():
            expected = built.module(**batch.inputs()).logits.numpy()
        assert np.allclose(session.run(batch.arrays()), expected, atol=1e-4)

    def test_what_is_pruned_and_factorised_first_is_as_after_preparing(self, run: RunConfig, tmp_path: Path) -> None:
        """Factors are fitted to what layers of the base read, also where a piece is the first to ask for that."""
        plan = CompressionPlan((("block.1.ffn", PruneNeurons(keep=32)), ("block.1.ffn", LowRank(rank=6))))
        built = []
        for name in ("prepared", "not prepared"):
            overrides = [f"storage.bank={json.dumps(str(tmp_path / name))}"]
            settings = run.model_dump(mode="json", by_alias=True)
            workshop = Workshop(RunConfig.from_mapping(settings, overrides=overrides), tmp_path / name / "artefacts")
            if name == "prepared":
                workshop.prepare(plan)
            artifact = workshop.build(plan, tmp_path / name / "built")
            # The weights; the graph beside them is named by a number that counts up.
            built.append((artifact.folder / "model.bin").read_bytes())
        assert built[0] == built[1]

    def test_a_block_that_is_left_does_the_work_of_those_after_it(self, shop: Workshop) -> None:
        def counterparts(*decisions: Any) -> list[tuple[int, int]]:
            plan = CompressionPlan(tuple((MODEL_SITE, d) for d in decisions))
            return recovery.counterparts(plan, len(shop.teacher.shape.blocks))

        student = Student(blocks=(0, 2), heads=2, neurons=32, epochs=0.1)
        assert counterparts() == [(0, 0), (1, 1), (2, 2)]
        assert counterparts(DropBlocks(blocks=(1,))) == [(0, 1), (2, 2)]
        assert counterparts(DropBlocks(blocks=(0,))) == [(1, 1), (2, 2)]
        assert counterparts(DropBlocks(blocks=(2,))) == [(0, 0), (1, 2)]
        assert counterparts(student) == [(0, 1), (2, 2)]
        assert counterparts(student, DropBlocks(blocks=(0,))) == [(2, 2)]
        assert counterparts(A_STUDENT["shared"]) == [(1, 2)]

    def test_a_recovered_model_can_be_trimmed_and_cut(self, shop: Workshop, tmp_path: Path) -> None:
        recovered = CompressionPlan(
            ((MODEL_SITE, Recover(epochs=0.1)), ("block.0.ffn", PruneNeurons(keep=32)), ("block.0.ffn", W8A8))
        )
        cut = recovered.with_decision(MODEL_SITE, MaxTokens(tokens=6))
        trimmed = cut.with_decision("embeddings", TrimVocabulary(keep=30))
        base, short, small = (shop.build(plan, tmp_path / str(n)) for n, plan in enumerate((recovered, cut, trimmed)))
        rows = shop.splits["search"].batch(range(20)).arrays()
        first = {name: array[:, :6] for name, array in rows.items()}
        logits = [shop.runtime.load(artifact, shop.run.target).run(rows) for artifact in (short, small)]
        assert np.allclose(logits[0], shop.runtime.load(base, shop.run.target).run(first), atol=1e-4)
        assert not np.allclose(logits[0], logits[1], atol=1e-3)
        assert small.size_bytes < short.size_bytes

    def test_special_tokens_are_kept_before_any_work(self, shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shop, "stitched", lambda _: pytest.fail("there was work"))
        special = len(SPECIAL)
        shop.check(CompressionPlan((("embeddings", TrimVocabulary(keep=special)),)))
        with pytest.raises(PlanError, match=rf"keep must be >= {special}, which are special tokens, got {special - 1}"):
            shop.build(CompressionPlan((("embeddings", TrimVocabulary(keep=special - 1)),)), shop.artefacts / "none")
        assert shop.base(None)[1].tokens.needed == special  # type: ignore[union-attr]

    def test_students_that_stand_in_are_told_apart_by_their_blocks(self, shop: Workshop) -> None:
        bases = []
        for blocks in ((0, 1), (1, 2)):
            student = Student(blocks=blocks, heads=2, neurons=32)
            shop.adopt(student, shop.cut(student))
            bases.append(shop.base(student)[0])
        assert bases[0].base != bases[1].base
        assert not torch.equal(bases[0].linear(0, "query").weight, bases[1].linear(0, "query").weight)

    def test_pieces_and_templates_are_made_once(
        self, shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from autocompress import bases

        made: list[str] = []
        make = bases.make_piece

        def counted(model: Any, site: str, *rest: Any) -> Any:
            made.append(site)
            return make(model, site, *rest)

        monkeypatch.setattr(bases, "make_piece", counted)
        first = CompressionPlan((("block.0.ffn", LowRank(rank=5)), ("block.1.ffn", LowRank(rank=5))))
        shop.build(first, tmp_path / "first")
        assert sorted(made) == ["block.0.ffn", "block.1.ffn"]
        shop.build(first.with_decision("head", W8A8), tmp_path / "second")
        assert sorted(made) == ["block.0.ffn", "block.1.ffn", "head"]
        # Another process finds them in the bank, and so does a plan in which the block has another number.
        shifted = CompressionPlan(((MODEL_SITE, DropBlocks(blocks=(0,))), ("block.0.ffn", LowRank(rank=5))))
        with_guide(shop).build(shifted, tmp_path / "third")
        assert len(made) == 3
        # And so does a search in another space, even if that lets more blocks go.
        other = with_guide(shop, "space=encoder-pruning")
        assert shop.drop_order(None) == (2, 1, 0), "as no block may go"
        assert sorted(other.drop_order(None)) == [0, 1, 2]
        other.build(first, tmp_path / "fourth")
        assert len(made) == 3

    @pytest.mark.parametrize("name", A_STUDENT)
    def test_a_student_of_another_architecture_is_scored_as_its_size_was_counted(
        self, shop: Workshop, name: str
    ) -> None:
        sites = shop.teacher.shape.of_student(A_STUDENT[name]).sites()
        eight = (
            (site, dataclasses.replace(W8A8, activation_bits=16 if s.kind == "embedding" else 8))
            for site, s in sites.items()
        )
        plan = CompressionPlan(((MODEL_SITE, A_STUDENT[name]), *eight))
        measured = shop.evaluate(plan)
        assert measured.rows == 60
        folder = shop.artefacts / plan.plan_id
        assert Artifact.open(folder).plan == plan
        # The weights' file holds what was counted, but for normalisations, positions and the alignment of constants.
        counted = shop.predictor.size_bytes(plan)
        assert counted < (folder / "model.bin").stat().st_size < 1.25 * counted + 3000
        assert shop.needs_training(plan) is False


def test_a_students_key_is_that_of_before_other_architectures(shop: Workshop) -> None:
    student = Student(blocks=(0, 2), heads=2, neurons=32, epochs=0.1)
    made_from = shop._distilled_from(student.to_dict(), shop._budget(student), shop.run.seed)
    assert made_from["what"] == {"type": "Student", "blocks": (0, 2), "heads": 2, "neurons": 32, "epochs": 0.1}


def test_a_bank_that_knows_a_model_of_single_texts_serves_pairs_too(
    tiny_run: Callable[..., RunConfig], bert_headed_folder: Path, tiny_pairs_csv: Path, tmp_path: Path
) -> None:
    """In either order: what a graph reads depends on the task, and not on the model alone."""
    table = pd.read_csv(tiny_pairs_csv)
    table["label"] = table["label"].map({"same": "positive", "different": "negative"})
    table.to_csv(source := tmp_path / "pairs.csv", index=False)
    for place, order in enumerate((["first", "pair"], ["pair", "first"])):
        bank = f"storage.bank={json.dumps(str(tmp_path / f'bank-{place}'))}"
        for task in order:
            data = [f"data.source={json.dumps(str(source))}", "data.text=first", "data.search_rows=20"]
            overrides = [f"model.id={json.dumps(str(bert_headed_folder))}", bank, *data]
            run = tiny_run([*overrides, *(["data.text_pair=second"] if task == "pair" else [])])
            workshop = Workshop(run, tmp_path / f"{place}-{task}")
            built = workshop.build(CompressionPlan(), workshop.reference_folder)
            assert ("token_type_ids" in built.inputs) == (task == "pair")
            assert workshop.score(built).rows >= 20


def test_a_model_that_the_runtimes_files_cannot_hold_is_refused_before_it_is_trained(
    tiny_run: Callable[..., RunConfig], bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run([f"model.id={json.dumps(str(bert_folder))}", "target.runtime=onnxruntime"])
    monkeypatch.setattr(ONNXRuntime, "most_parameters", 1000)
    monkeypatch.setattr(Workshop, "_finetune", lambda *_: pytest.fail("there was work"))
    said = r"onnxruntime: its files hold up to 0 million parameters, and the model has \d+ million; use another runtime"
    with pytest.raises(RuntimeBuildError, match=said):
        api.validate(run)
    with pytest.raises(RuntimeBuildError, match=said):
        Workshop(run, tmp_path).loaded(bert_folder)


def test_what_another_runtime_rounds_together_is_followed(
    tiny_run: Callable[..., RunConfig], bert_headed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rounds what it multiplies by 4 bits in groups of 16 columns, the other in those that share a step: of 32."""
    onnx = pytest.importorskip("onnx")
    plan = CompressionPlan(
        (
            ("block.0.ffn", Quantize(weight_bits=4, group_size=32)),
            ("embeddings", Quantize(weight_bits=4, group_size=32)),
        )
    )
    run = tiny_run([f"model.id={json.dumps(str(bert_headed_folder))}", "target.runtime=onnxruntime"])
    other = get_runtime("openvino")
    monkeypatch.setattr(other, "rounded_together", lambda weight: 16 if weight.bits == 4 else 0)
    logits, together = [], []
    for follows in (None, other):
        workshop = Workshop(run, tmp_path / str(follows is None))
        workshop.follows = follows
        artifact = workshop.build(plan, workshop.artefacts / "point")
        nodes = onnx.load(artifact.folder / "model.onnx").graph.node
        blocks = {
            kind: [a.i for n in nodes if n.op_type == kind for a in n.attribute if a.name == "block_size"]
            for kind in ("MatMulNBits", "GatherBlockQuantized")
        }
        assert set(blocks["GatherBlockQuantized"]) == {32}, "nothing is multiplied there"
        together.append(set(blocks["MatMulNBits"]))
        logits.append(workshop.logits(artifact, "search"))
    assert together == [{32}, {16}]
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.1 * np.abs(logits[0]).max(), (
        "the same numbers, rounded otherwise"
    )
