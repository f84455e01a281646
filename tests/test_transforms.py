"""The contract of transforms, for every structural decision and every family, and what is particular to each."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BLOCKS, FAMILIES, HEADS, HIDDEN, LABELS, NEURONS, VOCABULARY, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from autocompress import task, training
from autocompress.anatomy import BlockShape, ModelShape
from autocompress.binding import quantize_decision
from autocompress.config import DataConfig
from autocompress.decisions import (
    DECISIONS,
    Decision,
    DropBlocks,
    LowRank,
    PruneHeads,
    PruneNeurons,
    Quantize,
    Recover,
    Student,
)
from autocompress.errors import PlanError
from autocompress.evaluate import Workshop
from autocompress.model import EncoderModel, understand
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.transforms import apply_plan, check_plan
from autocompress.transforms.depth import drop_order
from autocompress.transforms.factorize import factorized
from autocompress.transforms.importance import Importance, importance
from autocompress.transforms.prune import keep_heads, keep_neurons

SIZE = HIDDEN // HEADS
SHAPE = ModelShape(HIDDEN, (BlockShape(HEADS, SIZE, NEURONS),) * BLOCKS, len(VOCABULARY))

PLANS: dict[str, tuple[tuple[str, Decision], ...]] = {
    "heads": (("block.0.attention", PruneHeads(keep=3)), ("block.2.attention", PruneHeads(keep=1))),
    "neurons": (("block.1.ffn", PruneNeurons(keep=37)), ("block.2.ffn", PruneNeurons(keep=1))),
    "rank of attention": (("block.1.attention", LowRank(rank=5)), ("block.2.attention", LowRank(rank=15))),
    "rank of ffn": (("block.0.ffn", LowRank(rank=1)), ("block.1.ffn", LowRank(rank=21))),
    "drop": ((MODEL_SITE, DropBlocks(blocks=(1,))),),
    "drop all but one": ((MODEL_SITE, DropBlocks(blocks=(0, 2))),),
    "all": (
        (MODEL_SITE, DropBlocks(blocks=(0,))),
        ("block.0.attention", PruneHeads(keep=2)),
        ("block.0.attention", LowRank(rank=9)),
        ("block.1.attention", LowRank(rank=3)),
        ("block.1.ffn", PruneNeurons(keep=17)),
        ("block.1.ffn", LowRank(rank=11)),
        ("block.0.ffn", Quantize(weight_bits=8)),
    ),
}
IN_THE_WORKSHOP = {Student, Recover}
"""Decisions that need training; `TestStudentsAndRecovery` holds them to the same contract."""


def fresh(family: str) -> EncoderModel:
    return understand(make_model(family, labels=LABELS), base="test")


def rows_of(file: Path, family: str) -> task.Split:
    loaded = task.load(DataConfig(source=str(file), search_rows=60))
    return loaded.tokenized(make_tokenizer(family), 16)["train"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def original(family: str) -> EncoderModel:
    return fresh(family)


@pytest.fixture(scope="module")
def untouched(original: EncoderModel) -> dict[str, torch.Tensor]:
    return state_of(original)


@pytest.fixture(scope="module")
def rows(family: str, tiny_csv: Path) -> task.Split:
    return rows_of(tiny_csv, family)


@pytest.fixture(scope="module")
def batches(rows: task.Split) -> list[task.Batch]:
    return list(rows.head(24).in_order_of_length(8))


@pytest.fixture(scope="module")
def scores(original: EncoderModel, untouched: dict[str, torch.Tensor], batches: list[task.Batch]) -> Importance:
    return importance(original, batches)


def logits_of(model: EncoderModel, batch: task.Batch) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.module(**batch.inputs()).logits
    return logits


def state_of(model: EncoderModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def promised_parameters(model: EncoderModel, plan: CompressionPlan) -> int:
    """Return what is left of the model's parameters, from sizes alone."""
    count = model.parameters()
    for drop in plan.of_type(DropBlocks).values():
        count -= sum(p.numel() for n in drop.blocks for p in model.block_list()[n].parameters())
    after = model.shape.after(plan)
    before = model.shape.after(CompressionPlan(tuple((s, d) for s, d in plan if isinstance(d, DropBlocks))))
    hidden = model.shape.hidden
    for old, new in zip(before.blocks, after.blocks, strict=True):
        width = (old.heads - new.heads) * old.head_size
        count -= 4 * hidden * width + 3 * width
        count -= (old.neurons - new.neurons) * (2 * hidden + 1)
    for name, low_rank in plan.of_type(LowRank).items():
        site = after.sites()[name]
        layers = 4 if site.kind == "attention" else 2
        count -= layers * (site.inner * site.outer - low_rank.rank * (site.inner + site.outer))
    return count


def test_the_contract_covers_every_structural_decision() -> None:
    covered = {type(decision) for plan in PLANS.values() for _, decision in plan}
    assert covered | IN_THE_WORKSHOP >= {decision for decision in DECISIONS.values() if decision.structural}


class TestContract:
    @pytest.fixture(params=PLANS)
    def plan(self, request: pytest.FixtureRequest) -> CompressionPlan:
        return CompressionPlan(PLANS[request.param])

    @pytest.fixture
    def changed(self, original: EncoderModel, plan: CompressionPlan, scores: Importance) -> EncoderModel:
        model = original.clone()
        apply_plan(model, plan, scores)
        return model

    def test_the_shape_is_what_the_plan_leaves(
        self, original: EncoderModel, changed: EncoderModel, plan: CompressionPlan
    ) -> None:
        assert changed.shape == original.shape.after(plan)
        assert len(changed.block_list()) == len(changed.shape.blocks)
        for number, block in enumerate(changed.shape.blocks):
            sizes = {"attention": block.heads * block.head_size, "ffn": block.neurons}
            for kind, inner in sizes.items():
                low_rank = plan.of_type(LowRank).get(f"block.{number}.{kind}")
                for path in changed.layout.linears(f"block.{number}.{kind}"):
                    self._check(changed.module.get_submodule(path), {inner, HIDDEN}, low_rank)

    @staticmethod
    def _check(layer: nn.Module, widths: set[int], low_rank: LowRank | None) -> None:
        if low_rank is None:
            assert isinstance(layer, nn.Linear)
            assert {layer.in_features, layer.out_features} == widths == set(layer.weight.shape)
        else:
            assert isinstance(layer, nn.Sequential)
            first, second = layer
            assert first.weight.shape[0] == second.weight.shape[1] == low_rank.rank
            assert {first.weight.shape[1], second.weight.shape[0]} == widths

    def test_the_parameters_are_those_promised(
        self, original: EncoderModel, changed: EncoderModel, plan: CompressionPlan
    ) -> None:
        assert changed.parameters() == promised_parameters(original, plan)
        assert changed.parameters() < original.parameters()

    def test_padding_does_not_matter(self, changed: EncoderModel, rows: task.Split) -> None:
        order = sorted(range(len(rows)), key=lambda row: len(rows.input_ids[row]))
        short, long = order[0], order[-1]
        assert len(rows.input_ids[short]) < len(rows.input_ids[long])
        together = logits_of(changed, rows.batch([short, long]))
        assert torch.isfinite(together).all()
        for position, row in enumerate((short, long)):
            assert torch.allclose(together[position], logits_of(changed, rows.batch([row]))[0], atol=1e-5)

    def test_the_logits_change(
        self, original: EncoderModel, changed: EncoderModel, batches: Sequence[task.Batch]
    ) -> None:
        """A transform that did nothing would pass much of the above."""
        assert not torch.allclose(logits_of(original, batches[0]), logits_of(changed, batches[0]), atol=1e-4)

    def test_the_plan_survives_json(
        self, original: EncoderModel, changed: EncoderModel, plan: CompressionPlan, scores: Importance
    ) -> None:
        again = CompressionPlan.from_json(plan.to_json())
        assert again == plan
        assert again.plan_id == plan.plan_id
        model = original.clone()
        apply_plan(model, again, scores)
        assert same_state(state_of(model), state_of(changed))

    def test_weights_survive_a_file(
        self,
        original: EncoderModel,
        changed: EncoderModel,
        plan: CompressionPlan,
        scores: Importance,
        batches: Sequence[task.Batch],
        tmp_path: Path,
    ) -> None:
        save_file(changed.module.state_dict(), tmp_path / "weights.safetensors")
        model = original.clone()
        apply_plan(model, plan, scores)
        for parameter in model.module.parameters():
            nn.init.zeros_(parameter)
        model.module.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
        assert torch.equal(logits_of(model, batches[0]), logits_of(changed, batches[0]))

    def test_the_original_is_left_alone(
        self, original: EncoderModel, untouched: dict[str, torch.Tensor], changed: EncoderModel
    ) -> None:
        assert dataclasses.replace(original.shape, table_width=0) == SHAPE
        assert same_state(state_of(original), untouched)

    def test_the_result_can_be_trained(self, changed: EncoderModel, rows: task.Split) -> None:
        before = state_of(changed)
        budget = training.TrainingBudget(epochs=1, learning_rate=1e-3, batch_size=8, precision="float32")
        training.finetune(changed.module, rows.head(8), budget, seed=0, progress=lambda _: None)
        after = changed.module.state_dict()
        blocks = [name for name in before if name.startswith(changed.layout.blocks) and name.endswith("weight")]
        assert blocks
        assert all(not torch.equal(before[name], after[name]) for name in blocks)


class TestNothingToDo:
    def test_an_empty_plan_gives_the_same_bits(
        self, original: EncoderModel, scores: Importance, batches: Sequence[task.Batch]
    ) -> None:
        model = original.clone()
        apply_plan(model, CompressionPlan(), scores)
        assert model.shape == original.shape
        assert torch.equal(logits_of(model, batches[0]), logits_of(original, batches[0]))

    def test_keeping_everything_gives_the_same_bits(
        self, original: EncoderModel, scores: Importance, batches: Sequence[task.Batch]
    ) -> None:
        keep = [(f"block.{n}.attention", PruneHeads(keep=HEADS)) for n in range(BLOCKS)]
        model = original.clone()
        apply_plan(
            model,
            CompressionPlan((*keep, *((f"block.{n}.ffn", PruneNeurons(keep=NEURONS)) for n in range(BLOCKS)))),
            scores,
        )
        assert model.shape == original.shape
        assert same_state(state_of(model), state_of(original))
        assert torch.equal(logits_of(model, batches[0]), logits_of(original, batches[0]))

    def test_what_the_runtime_does_leaves_the_module_alone(self, original: EncoderModel, scores: Importance) -> None:
        model = original.clone()
        apply_plan(model, CompressionPlan((("block.0.ffn", Quantize(weight_bits=4, group_size=16)),)), scores)
        assert same_state(state_of(model), state_of(original))


REFUSED: dict[str, tuple[tuple[tuple[str, Decision], ...], str]] = {
    "heads": ((("block.1.attention", PruneHeads(keep=5)),), r"block\.1\.attention: keep must be <= 4 heads, got 5"),
    "neurons": ((("block.1.ffn", PruneNeurons(keep=65)),), r"block\.1\.ffn: keep must be <= 64 neurons, got 65"),
    "rank that saves nothing": (
        (("block.0.attention", LowRank(rank=16)),),
        r"block\.0\.attention: rank must be <= 15 to save anything at 32 x 32, got 16",
    ),
    "rank beyond the dimension": (
        (("block.0.ffn", LowRank(rank=33)),),
        r"block\.0\.ffn: rank must be <= 21 to save anything at 64 x 32, got 33",
    ),
    "rank after pruning": (
        (("block.0.attention", PruneHeads(keep=1)), ("block.0.attention", LowRank(rank=7))),
        "rank must be <= 6 to save anything at 8 x 32, got 7",
    ),
    "rank of the head": ((("head", LowRank(rank=1)),), "head: a rank belongs to attention and ffn sites, not to head"),
    "rank of embeddings": ((("embeddings", LowRank(rank=1)),), "a rank belongs to attention and ffn sites"),
    "heads of an ffn": ((("block.0.ffn", PruneHeads(keep=1)),), "pruning heads belongs to attention sites, not to ffn"),
    "neurons of an attention": (
        (("block.0.attention", PruneNeurons(keep=1)),),
        "pruning neurons belongs to ffn sites, not to attention",
    ),
    "an unknown block": (
        (("block.3.ffn", PruneNeurons(keep=1)),),
        r"block\.3\.ffn: no such site; the model has embeddings, block\.0\.attention, .*, head",
    ),
    "an unknown name": ((("pooler", Quantize(weight_bits=8)),), "pooler: no such site"),
    "a block that is not there": (((MODEL_SITE, DropBlocks(blocks=(3,))),), "blocks to drop must be < 3 and leave one"),
    "all blocks": (((MODEL_SITE, DropBlocks(blocks=(0, 1, 2))),), "must be < 3 and leave one, got .0, 1, 2."),
    "a block that was dropped": (
        ((MODEL_SITE, DropBlocks(blocks=(0,))), ("block.2.ffn", PruneNeurons(keep=1))),
        r"block\.2\.ffn: no such site",
    ),
    "groups that do not fill a row": (
        (("block.0.ffn", Quantize(weight_bits=4, group_size=24)),),
        r"block\.0\.ffn: group_size must divide the input width 64, got 24",
    ),
    "groups that do not fill a pruned row": (
        (("block.0.attention", PruneHeads(keep=3)), ("block.0.attention", Quantize(weight_bits=4, group_size=16))),
        "group_size must divide the input width 24, got 16",
    ),
    "groups that do not fill a factor": (
        (("block.0.ffn", LowRank(rank=20)), ("block.0.ffn", Quantize(weight_bits=4, group_size=16))),
        "group_size must divide the input width 20, got 16",
    ),
    "a student of blocks that are not there": (
        ((MODEL_SITE, Student(blocks=(0, 3), heads=1, neurons=1)),),
        r"student blocks must be < 3, got \(0, 3\)",
    ),
    "a student of too many heads": (
        ((MODEL_SITE, Student(blocks=(0,), heads=5, neurons=1)),),
        "keeps at most 4 heads and 64 neurons, got 5 and 1",
    ),
    "a student of too many neurons": (
        ((MODEL_SITE, Student(blocks=(0,), heads=1, neurons=65)),),
        "keeps at most 4 heads and 64 neurons, got 1 and 65",
    ),
    "a student as wide as the model": (
        ((MODEL_SITE, Student(blocks=(0,), heads=1, neurons=1, hidden=32)),),
        r"Student\.hidden must be < 32, or 0 for all of them, got 32",
    ),
    "a student of the model's activation": (
        ((MODEL_SITE, Student(blocks=(0,), heads=1, neurons=1, activation="relu")),),
        r"Student\.activation: relu is what the model has; leave it empty",
    ),
    "a student that runs more blocks than the model": (
        ((MODEL_SITE, Student(blocks=(0, 2), heads=1, neurons=1, share=2)),),
        "runs at most 3 blocks, got 2 blocks x 2 times",
    ),
    "a block that is not stored": (
        (
            (MODEL_SITE, Student(blocks=(0,), heads=1, neurons=8, share=3)),
            ("block.1.ffn", PruneNeurons(keep=3)),
        ),
        r"block\.1\.ffn: no such site",
    ),
    "all blocks of a student that runs them twice": (
        ((MODEL_SITE, Student(blocks=(0,), heads=1, neurons=1, share=2)), (MODEL_SITE, DropBlocks(blocks=(0,)))),
        "must be < 1 and leave one",
    ),
    "groups that do not fill a narrower row": (
        (
            (MODEL_SITE, Student(blocks=(0,), heads=4, neurons=64, hidden=24)),
            ("block.0.ffn", Quantize(weight_bits=4, group_size=16)),
        ),
        "group_size must divide the input width 24, got 16",
    ),
    "a rank that saves nothing in a narrower layer": (
        ((MODEL_SITE, Student(blocks=(0,), heads=4, neurons=64, hidden=16)), ("block.0.ffn", LowRank(rank=13))),
        "rank must be <= 12 to save anything at 64 x 16, got 13",
    ),
    "a narrower student drawn to the model's blocks": (
        (
            (MODEL_SITE, Student(blocks=(0,), heads=1, neurons=1, hidden=16)),
            (MODEL_SITE, Recover(epochs=1, hidden=30)),
        ),
        r"Recover\.hidden must be 0 where the student is 16 wide, .* which are 32 wide",
    ),
    "more than the student has": (
        ((MODEL_SITE, Student(blocks=(0,), heads=2, neurons=8)), ("block.0.attention", PruneHeads(keep=3))),
        "keep must be <= 2 heads, got 3",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("site", ["embeddings", "head"])
    def test_groups_have_to_fill_tables_that_are_narrower_than_the_blocks(self, site: str) -> None:
        """ELECTRA's are half as wide here, and a layer of the head reads them."""
        groups = {group: CompressionPlan(((site, Quantize(weight_bits=4, group_size=group)),)) for group in (16, 32)}
        shape = fresh("electra").shape
        check_plan(groups[16], shape)
        check_plan(groups[32], SHAPE)
        with pytest.raises(PlanError, match=rf"{site}: group_size must divide the input width 16, got 32"):
            check_plan(groups[32], shape)
        assert quantize_decision(4, shape.sites()[site]).group_size == 16

    @pytest.mark.parametrize("case", REFUSED)
    def test_what_cannot_be_done_is_refused(self, case: str) -> None:
        decisions, why = REFUSED[case]
        # A model that has the cheaper activation already, for the students that ask for it.
        has = [d.activation for _, d in decisions if isinstance(d, Student) and d.activation]
        shape = dataclasses.replace(SHAPE, activation=has[0]) if has else SHAPE
        with pytest.raises(PlanError, match=why) as caught:
            check_plan(CompressionPlan(decisions), shape)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "decisions",
        [
            (("block.0.attention", PruneHeads(keep=1)), ("block.0.attention", LowRank(rank=6))),
            (("block.0.ffn", LowRank(rank=21)),),
            (("block.0.attention", PruneHeads(keep=2)), ("block.0.attention", Quantize(weight_bits=4, group_size=16))),
            (("block.0.ffn", LowRank(rank=16)), ("block.0.ffn", Quantize(weight_bits=4, group_size=16))),
            ((MODEL_SITE, DropBlocks(blocks=(0, 1))), ("block.0.ffn", PruneNeurons(keep=64))),
            ((MODEL_SITE, Student(blocks=(0, 2), heads=4, neurons=64)), ("block.1.attention", PruneHeads(keep=4))),
            ((MODEL_SITE, Student(blocks=(0, 1, 2), heads=4, neurons=64, activation="relu")),),
            ((MODEL_SITE, Student(blocks=(0, 1, 2), heads=4, neurons=64, hidden=31)),),
            ((MODEL_SITE, Student(blocks=(0, 1, 2), heads=4, neurons=64, hidden=1)),),
            ((MODEL_SITE, Student(blocks=(1,), heads=4, neurons=64, share=3)),),
            ((MODEL_SITE, Student(blocks=(0,), heads=4, neurons=64, hidden=16)), ("block.0.ffn", LowRank(rank=12))),
            (
                (MODEL_SITE, Student(blocks=(0,), heads=4, neurons=64, activation="relu", share=3)),
                (MODEL_SITE, Recover(epochs=1, hidden=30)),
            ),
            ((MODEL_SITE, Student(blocks=(0,), heads=4, neurons=64, hidden=16)), (MODEL_SITE, Recover(epochs=1))),
        ],
    )
    def test_the_ends_of_the_ranges_are_accepted(self, decisions: tuple[tuple[str, Decision], ...]) -> None:
        check_plan(CompressionPlan(decisions), SHAPE)

    @pytest.mark.parametrize("case", [case for case, (d, _) in REFUSED.items() if not isinstance(d[0][1], Student)])
    def test_a_refused_plan_leaves_the_model_unchanged(self, case: str) -> None:
        decisions, _ = REFUSED[case]
        # What could be done comes first in the order of application.
        drops = any(isinstance(decision, DropBlocks) for _, decision in decisions)
        plan = CompressionPlan((*(() if drops else ((MODEL_SITE, DropBlocks(blocks=(2,))),)), *decisions))
        model = fresh("bert")
        before, shape = state_of(model), model.shape
        scores = importance_by_order(model)
        with pytest.raises(PlanError):
            apply_plan(model, plan, scores)
        assert model.shape == shape
        assert model.module.config.num_hidden_layers == BLOCKS
        assert same_state(state_of(model), before)


def importance_by_order(model: EncoderModel) -> Importance:
    """Return scores by which the first parts are the least important."""
    return Importance(
        tuple(torch.arange(block.heads).double() for block in model.shape.blocks),
        tuple(torch.arange(block.neurons).double() for block in model.shape.blocks),
    )


def silence(model: EncoderModel, block: int, *, heads: Sequence[int] = (), neurons: Sequence[int] = ()) -> None:
    """Cut parts off from the output of their layer."""
    with torch.no_grad():
        for head in heads:
            model.linear(block, "output").weight[:, head * SIZE : (head + 1) * SIZE] = 0
        model.linear(block, "ffn_out").weight[:, list(neurons)] = 0


class TestPruning:
    def test_removing_what_is_silenced_changes_nothing(
        self, original: EncoderModel, batches: Sequence[task.Batch]
    ) -> None:
        silenced = original.clone()
        removed = original.clone()
        for block, heads, neurons in ((0, [0, 2], [0, 63, 5]), (2, [3], list(range(1, NEURONS)))):
            silence(silenced, block, heads=heads, neurons=neurons)
            keep_heads(removed, block, [h for h in range(HEADS) if h not in heads])
            keep_neurons(removed, block, [n for n in range(NEURONS) if n not in neurons])
        for batch in batches:
            expected = logits_of(silenced, batch)
            assert torch.allclose(logits_of(removed, batch), expected, atol=1e-5)
            assert not torch.allclose(logits_of(original, batch), expected, atol=1e-4)

    def test_useless_parts_are_the_least_important(self, original: EncoderModel, batches: Sequence[task.Batch]) -> None:
        model = original.clone()
        silence(model, 0, heads=[2], neurons=[7, 40])
        silence(model, 2, heads=[0], neurons=[63])
        found = importance(model, batches)
        assert found.best_heads(0, HEADS - 1) == [0, 1, 3]
        assert found.best_heads(2, HEADS - 1) == [1, 2, 3]
        assert found.best_neurons(0, NEURONS - 2) == [n for n in range(NEURONS) if n not in (7, 40)]
        assert found.best_neurons(2, NEURONS - 1) == list(range(NEURONS - 1))
        assert float(found.heads[0][2]) == 0
        assert len(found.heads) == len(found.neurons) == BLOCKS

    def test_pruning_takes_what_is_least_important(self, original: EncoderModel, batches: Sequence[task.Batch]) -> None:
        model = original.clone()
        silence(model, 1, heads=[1], neurons=range(20, 30))
        pruned = model.clone()
        plan = CompressionPlan((("block.1.attention", PruneHeads(keep=3)), ("block.1.ffn", PruneNeurons(keep=54))))
        apply_plan(pruned, plan, importance(model, batches))
        assert torch.allclose(logits_of(pruned, batches[0]), logits_of(model, batches[0]), atol=1e-5)

    def test_scores_count_in_the_model_before_blocks_are_dropped(
        self, original: EncoderModel, batches: Sequence[task.Batch]
    ) -> None:
        model = original.clone()
        silence(model, 2, heads=[0], neurons=[1])
        scores = importance(model, batches)
        drop = (MODEL_SITE, DropBlocks(blocks=(0,)))
        dropped, pruned = model.clone(), model.clone()
        apply_plan(dropped, CompressionPlan((drop,)), scores)
        site = ("block.1.attention", PruneHeads(keep=3)), ("block.1.ffn", PruneNeurons(keep=63))
        apply_plan(pruned, CompressionPlan((drop, *site)), scores)
        assert pruned.parameters() < dropped.parameters()
        assert torch.allclose(logits_of(pruned, batches[0]), logits_of(dropped, batches[0]), atol=1e-5)

    def test_the_score_is_the_squared_gradient_of_a_gate(
        self, original: EncoderModel, batches: Sequence[task.Batch], scores: Importance
    ) -> None:
        """Kwon et al. 2022, eq. 5-7, with a real gate and one row at a time."""
        gates = {"output": torch.ones(HEADS, requires_grad=True), "ffn_out": torch.ones(NEURONS, requires_grad=True)}
        heads, neurons = torch.zeros(HEADS).double(), torch.zeros(NEURONS).double()

        def gated(role: str) -> Callable[..., Any]:
            width = SIZE if role == "output" else 1
            return lambda _, values: (values[0] * gates[role].repeat_interleave(width),)

        handles = [original.linear(1, role).register_forward_pre_hook(gated(role)) for role in gates]
        for batch in batches:
            for row in range(len(batch.rows)):
                one = {name: value[row : row + 1] for name, value in batch.inputs().items()}
                loss = functional.cross_entropy(original.module(**one).logits, batch.labels[row : row + 1])
                of_heads, of_neurons = torch.autograd.grad(loss, list(gates.values()))
                heads += of_heads.double().square()
                neurons += of_neurons.double().square()
        for handle in handles:
            handle.remove()
        assert torch.allclose(scores.heads[1], heads, rtol=1e-3, atol=1e-9)
        assert torch.allclose(scores.neurons[1], neurons, rtol=1e-3, atol=1e-9)

    def test_magnitude_takes_over_where_gradients_vanish(
        self, original: EncoderModel, batches: Sequence[task.Batch]
    ) -> None:
        model = original.clone()
        final = model.module.get_submodule(model.layout.head[-1])
        with torch.no_grad():
            final.weight.zero_()
            model.linear(1, "output").weight[:, 2 * SIZE : 3 * SIZE] *= 0.01
            model.linear(1, "ffn_out").weight[:, 9] *= 0.01
        found = importance(model, batches)
        weight = model.linear(1, "output").weight.detach()
        expected = torch.stack([weight[:, h * SIZE : (h + 1) * SIZE].norm() for h in range(HEADS)])
        assert torch.allclose(found.heads[1].float(), expected, rtol=1e-5)
        assert found.best_heads(1, 3) == [0, 1, 3]
        assert found.best_neurons(1, NEURONS - 1) == [n for n in range(NEURONS) if n != 9]

    def test_scoring_leaves_the_model_as_it_is(self, family: str, batches: Sequence[task.Batch]) -> None:
        model = fresh(family)
        before = state_of(model)
        blocks = model.block_list()
        wanted = next(p for p in model.module.parameters())
        wanted.requires_grad_(False)
        importance(model, batches)
        drop_order(model, batches, 2)
        assert same_state(state_of(model), before)
        assert model.block_list() is blocks
        assert [p.requires_grad for p in model.module.parameters()].count(False) == 1
        assert not wanted.requires_grad
        assert all(p.grad is None for p in model.module.parameters())
        assert not any(m._forward_pre_hooks for m in model.module.modules())

    def test_scores_do_not_depend_on_batches(
        self, original: EncoderModel, rows: task.Split, scores: Importance
    ) -> None:
        found = importance(original, list(rows.head(24).in_order_of_length(5)))
        for one, other in zip((*found.heads, *found.neurons), (*scores.heads, *scores.neurons), strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-9)


class TestDropOrder:
    def divergences(
        self, model: EncoderModel, batches: Sequence[task.Batch], choices: Sequence[tuple[int, ...]]
    ) -> list[float]:
        found = []
        for blocks in choices:
            less = model.clone()
            apply_plan(less, CompressionPlan(((MODEL_SITE, DropBlocks(blocks=blocks)),)), importance_by_order(model))
            total = 0.0
            for batch in batches:
                full, left = (logits_of(m, batch).double().softmax(dim=-1) for m in (model, less))
                total += float((full * (full / left).log()).sum())
            found.append(total)
        return found

    def test_blocks_go_by_what_their_loss_does(self, original: EncoderModel, batches: Sequence[task.Batch]) -> None:
        alone = self.divergences(original, batches, [(n,) for n in range(BLOCKS)])
        first = min(range(BLOCKS), key=alone.__getitem__)
        one = drop_order(original, batches, 1)
        assert one == (first, *sorted((n for n in range(BLOCKS) if n != first), key=alone.__getitem__))
        rest = [n for n in range(BLOCKS) if n != first]
        both = self.divergences(original, batches, [tuple(sorted((first, n))) for n in rest])
        second = rest[min(range(len(rest)), key=both.__getitem__)]
        assert drop_order(original, batches, 2)[:2] == (first, second)

    def test_without_drops_the_last_block_goes_first(
        self, original: EncoderModel, batches: Sequence[task.Batch]
    ) -> None:
        assert drop_order(original, batches, 0) == tuple(reversed(range(BLOCKS)))

    @pytest.mark.parametrize("drops", [0, 1, 2, 3, 99])
    def test_every_block_has_its_place(self, original: EncoderModel, batches: Sequence[task.Batch], drops: int) -> None:
        order = drop_order(original, batches[:1], drops)
        assert sorted(order) == list(range(BLOCKS))

    def test_a_block_that_does_nothing_goes_first(self, tiny_csv: Path) -> None:
        model = fresh("bert")
        block = model.block_list()[1]
        with torch.no_grad():
            for dense in (block.attention.output.dense, block.output.dense):
                dense.weight.zero_()
                dense.bias.zero_()
            for norm in (
                block.attention.output.LayerNorm,
                block.output.LayerNorm,
                model.block_list()[0].output.LayerNorm,
            ):
                norm.weight.fill_(1)
                norm.bias.zero_()
        batches = list(rows_of(tiny_csv, "bert").head(16).in_order_of_length(8))
        assert drop_order(model, batches, 1)[0] == 1
        less = model.clone()
        apply_plan(less, CompressionPlan(((MODEL_SITE, DropBlocks(blocks=(1,))),)), importance_by_order(model))
        assert torch.allclose(logits_of(less, batches[0]), logits_of(model, batches[0]), atol=1e-4)


class TestFactorization:
    @pytest.fixture(params=[(48, 20), (20, 48), (24, 24)], ids=["tall", "wide", "square"])
    def layer(self, request: pytest.FixtureRequest) -> nn.Linear:
        torch.manual_seed(3)
        out, width = request.param
        return nn.Linear(width, out)

    def test_full_rank_reproduces_the_layer(self, layer: nn.Linear) -> None:
        pair = factorized(layer, min(layer.weight.shape))
        x = torch.randn(5, layer.in_features)
        assert torch.allclose(pair(x), layer(x), atol=1e-5)

    @pytest.mark.parametrize("rank", [1, 7, 19])
    def test_the_error_is_that_of_the_singular_values_left_out(self, layer: nn.Linear, rank: int) -> None:
        pair = factorized(layer, rank)
        product = (pair[1].weight @ pair[0].weight).detach().double()
        weight = layer.weight.detach().double()
        values = torch.linalg.svdvals(weight)
        assert float((weight - product).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-5)
        assert float(torch.linalg.matrix_norm(weight - product, 2)) == pytest.approx(float(values[rank]), rel=1e-5)
        assert torch.allclose(torch.linalg.svdvals(product)[:rank], values[:rank], rtol=1e-5)

    def test_shapes_and_bias(self, layer: nn.Linear) -> None:
        first, second = factorized(layer, 6)
        assert tuple(first.weight.shape) == (6, layer.in_features)
        assert tuple(second.weight.shape) == (layer.out_features, 6)
        assert first.bias is None
        assert torch.equal(second.bias, layer.bias)
        assert second.bias.data_ptr() != layer.bias.data_ptr()
        plain = nn.Linear(8, 6, bias=False)
        assert factorized(plain, 2)[1].bias is None

    def test_both_factors_share_the_singular_values(self, layer: nn.Linear) -> None:
        """So that neither factor is far larger than the other, which quantising them would feel."""
        first, second = factorized(layer, 6)
        assert torch.allclose(
            first.weight.norm(dim=1).sort().values, second.weight.norm(dim=0).sort().values, rtol=1e-4
        )

    @pytest.mark.parametrize("weight", [torch.zeros(12, 8), torch.ones(8, 12), torch.eye(12)[:, :3] @ torch.ones(3, 8)])
    def test_a_weight_of_less_rank_stays_finite(self, weight: torch.Tensor) -> None:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(weight)
        first, second = factorized(layer, 4)
        assert torch.isfinite(first.weight).all()
        assert torch.isfinite(second.weight).all()
        assert torch.allclose(second.weight @ first.weight, weight, atol=1e-5)

    def test_the_layers_given_are_left_alone(self, layer: nn.Linear) -> None:
        before = copy.deepcopy(layer)
        factorized(layer, 3)
        assert torch.equal(layer.weight, before.weight)


class TestStudentsAndRecovery:
    @pytest.fixture
    def workshop(self, tiny_run: Callable[..., Any], tmp_path: Path, bert_headed_folder: Path) -> Workshop:
        run = tiny_run([f"model.id={bert_headed_folder}", "data.max_train_rows=40", "recovery.learning_rate=0.001"])
        return Workshop(run, tmp_path / "artefacts")

    def test_a_student_has_its_shape_and_is_trained(self, workshop: Workshop) -> None:
        student = Student(blocks=(0, 2), heads=2, neurons=20)
        plan = CompressionPlan(((MODEL_SITE, student), ("block.1.ffn", PruneNeurons(keep=9))))
        workshop.check(plan)
        built = workshop.structured(plan)
        assert built.shape == workshop.teacher.shape.after(plan)
        removed = 2 * (4 * HIDDEN * SIZE + 3 * SIZE) + (NEURONS - 20) * (2 * HIDDEN + 1)
        block = sum(p.numel() for p in workshop.teacher.block_list()[0].parameters())
        expected = workshop.teacher.parameters() - block - 2 * removed - 11 * (2 * HIDDEN + 1)
        assert built.parameters() == expected
        base, scores = workshop.base(student)
        assert len(scores.heads) == 2
        assert base.base != workshop.teacher.base
        teacher_scores = workshop.base(None)[1]
        assert teacher_scores.best_heads(1, 2) != teacher_scores.best_heads(2, 2), (
            "or the last block would prove little"
        )
        for number, block in enumerate(student.blocks):
            kept = teacher_scores.best_heads(block, 2)
            parts = {
                "query": [h * SIZE + i for h in kept for i in range(SIZE)],
                "ffn_in": teacher_scores.best_neurons(block, 20),
            }
            for role, rows in parts.items():
                started = workshop.teacher.linear(block, role).weight[rows]
                ended = base.linear(number, role).weight
                assert not torch.equal(started, ended)
                # One epoch of two steps moves a weight by about twice the learning rate.
                assert torch.allclose(started, ended, atol=0.01), f"{role} of block {block} is where it starts"

    def test_recovery_trains_and_keeps_the_shape(self, workshop: Workshop) -> None:
        pruned = CompressionPlan((("block.0.ffn", PruneNeurons(keep=8)),))
        plan = pruned.with_decision(MODEL_SITE, Recover(epochs=1))
        before, after = workshop.structured(pruned), workshop.structured(plan)
        assert after.shape == before.shape == workshop.teacher.shape.after(plan)
        assert after.parameters() == before.parameters()
        assert not torch.equal(after.linear(0, "query").weight, before.linear(0, "query").weight)
        again = workshop.structured(plan)
        assert torch.equal(after.linear(0, "query").weight, again.linear(0, "query").weight)


def test_weights_that_are_not_finite_are_not_factorised() -> None:
    model = understand(make_model("bert", labels=LABELS), base="test")
    path = model.layout.linears("block.0.ffn")[0]
    model.module.get_parameter(f"{path}.weight").data[0, 0] = torch.nan
    with pytest.raises(PlanError, match=r"block\.0\.ffn: cannot be factorised, its weights are not finite"):
        apply_plan(model, CompressionPlan((("block.0.ffn", LowRank(rank=4)),)), importance(model, []))
