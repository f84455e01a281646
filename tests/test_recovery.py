"""What a recovery costs, counted by hand, and what it asks of training."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import LABELS, make_model
from torch import nn

from autocompress import model, recovery
from autocompress.config import OF_PICKED_POINTS, RecoveryConfig
from autocompress.decisions import DropBlocks, LowRank, PruneHeads, PruneNeurons, Recover, Student
from autocompress.model import EncoderModel
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.training import TrainingBudget
from autocompress.transforms.prune import keep_blocks
from autocompress.transforms.student import share_blocks

PLAIN = Recover(epochs=1)


@pytest.fixture(scope="module")
def teacher() -> EncoderModel:
    """Of 3 blocks of a width of 32, 4 heads and 64 neurons: 3 x (4 x 32 x 32 + 2 x 32 x 64) multiplications a token."""
    found = model.understand(make_model("bert", labels=LABELS), base="test")
    shape = found.shape
    assert (shape.hidden, len(shape.blocks), shape.blocks[0].heads, shape.blocks[0].neurons) == (32, 3, 4, 64)
    return found


def epochs(teacher: EncoderModel, plan: CompressionPlan, wanted: Recover = PLAIN, *, alpha: float = 0.0) -> float:
    return recovery.affordable_epochs(plan, wanted, teacher, 2.0, alpha=alpha)


def test_labels_alone_of_half_a_model_take_twice_the_passes(teacher: EncoderModel) -> None:
    assert epochs(teacher, CompressionPlan()) == 2.0
    halved = CompressionPlan(
        tuple(
            pair
            for n in range(3)
            for pair in ((f"block.{n}.attention", PruneHeads(keep=2)), (f"block.{n}.ffn", PruneNeurons(keep=32)))
        )
    )
    assert epochs(teacher, halved) == 4.0
    assert epochs(teacher, CompressionPlan(((MODEL_SITE, DropBlocks(blocks=(0, 2))),))) == 6.0
    assert epochs(teacher, CompressionPlan(((MODEL_SITE, Student(blocks=(0, 1), heads=2, neurons=32)),))) == 6.0


def test_factors_cost_what_they_multiply(teacher: EncoderModel) -> None:
    """Rank 8 in place of 32 x 32: 8 x 64 for 1024, in one site of six; 24576 becomes 24576 - 4 x 512."""
    plan = CompressionPlan((("block.1.attention", LowRank(rank=8)),))
    assert epochs(teacher, plan) == 2.18, "2 x 24576 / 22528 is 2.1818; it is rounded down"


def test_a_teacher_costs_its_share(teacher: EncoderModel) -> None:
    """In units of its forward pass, of a model that stays as it is: 6 to spend, 3 a pass."""
    whole = CompressionPlan()
    assert epochs(teacher, whole, alpha=0.5) == 1.66, "its logits are one pass: (6 - 1) / 3"
    for beside in (Recover(epochs=1, hidden=30), Recover(epochs=1, relations=1)):
        assert epochs(teacher, whole, beside) == 1.5, "it runs beside: 6 / 4"
    assert epochs(teacher, whole, Recover(epochs=1, hidden=30, relations=1), alpha=1.0) == 1.25, "5 / 4, run once"


def test_seeds_and_held_rows_cost_their_share(teacher: EncoderModel) -> None:
    whole = CompressionPlan()
    assert epochs(teacher, whole, Recover(epochs=1, seeds=3)) == 0.66
    assert epochs(teacher, whole, Recover(epochs=1, patience=1)) == 1.93, "6 / (0.9 x 3 + 4 x 0.1)"


def test_passes_stay_within_what_a_plan_can_say(teacher: EncoderModel) -> None:
    small = CompressionPlan(((MODEL_SITE, Student(blocks=(0,), heads=1, neurons=1)),))
    assert recovery.affordable_epochs(small, PLAIN, teacher, 100.0, alpha=0.5) == 100.0
    assert recovery.affordable_epochs(CompressionPlan(), PLAIN, teacher, 0.01, alpha=0.5) == 0.01


def test_options_of_picked_points_reach_no_student() -> None:
    """Or a search, which waits for students, would be dearer."""
    asked = RecoveryConfig(hidden=30, relations=2, l1=0.1, l2=0.2, patience=1, seeds=3, alpha=0.7)
    found = recovery.budget_of(asked, Student(blocks=(0,), heads=1, neurons=1, epochs=0.5), precision="float32")
    shared = {"learning_rate": 3e-4, "batch_size": 32, "precision": "float32", "temperature": 2.0, "alpha": 0.7}
    assert found == TrainingBudget(epochs=0.5, **shared)
    narrower = Student(blocks=(0,), heads=1, neurons=1, epochs=0.5, hidden=16)
    assert recovery.budget_of(asked, narrower, precision="float32") == found, "its hidden is a width"
    wanted = Recover(epochs=2, hidden=30, relations=2, l1=0.1, l2=0.2, patience=1, seeds=3)
    own = {"hidden": 30.0, "relations": 2.0, "l1": 0.1, "l2": 0.2, "patience": 1.0}
    assert recovery.budget_of(asked, wanted, precision="float32") == TrainingBudget(epochs=2, **shared, **own)


def test_each_option_of_picked_points_is_part_of_their_plans() -> None:
    assert {f.name for f in dataclasses.fields(Recover)} == {"epochs", *OF_PICKED_POINTS}
    assert set(RecoveryConfig.model_fields) >= OF_PICKED_POINTS


def test_queries_keys_and_values_are_named_for_each_pair_of_blocks(teacher: EncoderModel) -> None:
    found = recovery.example_of(CompressionPlan(((MODEL_SITE, DropBlocks(blocks=(1,))),)), teacher, teacher)
    assert (found.module, found.heads) == (teacher.module, 4)
    blocks = "bert.encoder.layer"
    assert found.blocks == ((f"{blocks}.0", f"{blocks}.1"), (f"{blocks}.1", f"{blocks}.2"))
    roles = [f"attention.self.{role}" for role in ("query", "key", "value")]
    assert found.layers() == tuple(
        (f"{blocks}.{a}.{role}", f"{blocks}.{b}.{role}") for a, b in ((0, 1), (1, 2)) for role in roles
    )


def test_layers_of_blocks_that_are_run_several_times_are_found(teacher: EncoderModel) -> None:
    student = Student(blocks=(0,), heads=4, neurons=teacher.shape.blocks[0].neurons, share=2)
    built = teacher.clone()
    keep_blocks(built, student.blocks)
    share_blocks(built, student.share)
    found = recovery.example_of(CompressionPlan(((MODEL_SITE, student),)), teacher, built)
    assert len(found.layers()) == 3
    for mine, theirs in found.layers():
        assert isinstance(built.module.get_submodule(mine), nn.Linear)
        assert isinstance(teacher.module.get_submodule(theirs), nn.Linear)
    once, twice = (
        recovery.affordable_epochs(
            CompressionPlan(((MODEL_SITE, some),)), Recover(epochs=1), teacher, finetune_epochs=2, alpha=0
        )
        for some in (dataclasses.replace(student, share=1), student)
    )
    assert twice == pytest.approx(once / 2, abs=0.02)
