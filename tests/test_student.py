"""What students begin as: their architectures hold what they say, and all that is scored of them is right."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BLOCKS, FAMILIES, HEADS, HIDDEN, LABELS, NEURONS, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from autocompress import task, training
from autocompress.anatomy import BlockShape, ModelShape
from autocompress.config import DataConfig
from autocompress.decisions import ACTIVATIONS, PruneNeurons, Student
from autocompress.errors import ModelError
from autocompress.model import EncoderModel, understand
from autocompress.pieces import Piece
from autocompress.sensitivity import Sensitivity
from autocompress.transforms.depth import drop_order
from autocompress.transforms.importance import Importance, importance
from autocompress.transforms.moments import take_moments
from autocompress.transforms.quantize import observe
from autocompress.transforms.student import (
    Repeated,
    begun,
    channel_scores,
    keep_channels,
    replace_activation,
    share_blocks,
)

SIZE = HIDDEN // HEADS
WHOLE = {"heads": HEADS, "neurons": NEURONS}
STUDENTS = {
    "relu": Student(blocks=(0, 1, 2), activation="relu", **WHOLE),
    "narrow": Student(blocks=(0, 1, 2), hidden=20, **WHOLE),
    "narrowest": Student(blocks=(1,), heads=1, neurons=3, hidden=2),
    "shared": Student(blocks=(1,), share=3, **WHOLE),
    "all": Student(blocks=(2,), heads=3, neurons=37, activation="relu", hidden=13, share=2),
}


def fresh(family: str, **overrides: Any) -> EncoderModel:
    return understand(make_model(family, labels=LABELS, **overrides), base="test")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def teacher(family: str) -> EncoderModel:
    return fresh(family)


@pytest.fixture(scope="module")
def rows(family: str, tiny_csv: Path) -> task.Split:
    loaded = task.load(DataConfig(source=str(tiny_csv), search_rows=60))
    return loaded.tokenized(make_tokenizer(family), 16)["train"]


@pytest.fixture(scope="module")
def batches(rows: task.Split) -> list[task.Batch]:
    return list(rows.head(24).in_order_of_length(8))


@pytest.fixture(scope="module")
def scores(teacher: EncoderModel, batches: list[task.Batch]) -> Importance:
    return importance(teacher, batches)


@pytest.fixture(scope="module")
def channels(teacher: EncoderModel, batches: list[task.Batch]) -> torch.Tensor:
    return channel_scores(teacher, batches)


def logits_of(model: EncoderModel, batch: task.Batch) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.module(**batch.inputs()).logits
    return logits


def norms_of(model: EncoderModel, width: int) -> list[nn.LayerNorm]:
    found = [module for module in model.module.modules() if isinstance(module, nn.LayerNorm)]
    return [norm for norm in found if norm.normalized_shape == (width,)]


def matrices(model: EncoderModel) -> int:
    """Return the parameters of a student's blocks, from its shape alone."""
    shape = model.shape
    count = 0
    for block in shape.blocks:
        inner = block.heads * block.head_size
        count += 4 * inner * shape.hidden + 3 * inner + shape.hidden
        count += 2 * block.neurons * shape.hidden + block.neurons + shape.hidden
        count += 4 * shape.hidden  # two normalisations
    return count


class TestContract:
    @pytest.fixture(params=STUDENTS)
    def student(self, request: pytest.FixtureRequest) -> Student:
        return STUDENTS[request.param]

    @pytest.fixture
    def built(
        self, teacher: EncoderModel, student: Student, scores: Importance, channels: torch.Tensor
    ) -> EncoderModel:
        return begun(teacher, student, scores, channels)

    def test_the_shape_is_what_the_student_says(
        self, teacher: EncoderModel, built: EncoderModel, student: Student
    ) -> None:
        assert built.shape == teacher.shape.of_student(student)
        assert len(built.block_list()) == len(student.blocks)
        for number in range(len(student.blocks)):
            inner = student.heads * SIZE
            for role, sizes in {
                **dict.fromkeys(("query", "key", "value"), (inner, built.shape.hidden)),
                "output": (built.shape.hidden, inner),
                "ffn_in": (student.neurons, built.shape.hidden),
                "ffn_out": (built.shape.hidden, student.neurons),
            }.items():
                assert tuple(built.linear(number, role).weight.shape) == sizes

    def test_each_stored_block_has_the_parameters_of_its_shape(self, built: EncoderModel) -> None:
        assert sum(p.numel() for p in built.block_list().parameters()) == matrices(built)

    def test_padding_does_not_matter(self, built: EncoderModel, rows: task.Split) -> None:
        order = sorted(range(len(rows)), key=lambda row: len(rows.input_ids[row]))
        together = logits_of(built, rows.batch([order[0], order[-1]]))
        assert torch.isfinite(together).all()
        for position, row in enumerate((order[0], order[-1])):
            assert torch.allclose(together[position], logits_of(built, rows.batch([row]))[0], atol=1e-5)

    def test_the_logits_change(self, teacher: EncoderModel, built: EncoderModel, batches: Sequence[task.Batch]) -> None:
        assert not torch.allclose(logits_of(teacher, batches[0]), logits_of(built, batches[0]), atol=1e-4)

    def test_weights_survive_a_file(
        self,
        teacher: EncoderModel,
        built: EncoderModel,
        student: Student,
        scores: Importance,
        channels: torch.Tensor,
        batches: Sequence[task.Batch],
        tmp_path: Path,
    ) -> None:
        save_file(built.module.state_dict(), tmp_path / "weights.safetensors")
        again = begun(teacher, student, scores, channels)
        for parameter in again.module.parameters():
            nn.init.zeros_(parameter)
        again.module.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
        assert torch.equal(logits_of(again, batches[0]), logits_of(built, batches[0]))

    def test_the_teacher_is_left_alone(self, family: str, teacher: EncoderModel, built: EncoderModel) -> None:
        blocks = (BlockShape(HEADS, SIZE, NEURONS),) * BLOCKS
        table = HIDDEN // 2 if family == "electra" else 0
        assert teacher.shape == ModelShape(HIDDEN, blocks, teacher.shape.vocabulary, table_width=table)
        assert teacher.module.config.hidden_size == HIDDEN
        before, after = (model.module.state_dict() for model in (fresh(family), teacher))
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_it_is_distilled_in_all_its_blocks(self, built: EncoderModel, rows: task.Split) -> None:
        before = {name: tensor.clone() for name, tensor in built.module.state_dict().items()}
        budget = training.TrainingBudget(epochs=1, learning_rate=1e-3, batch_size=8, precision="float32")
        wanted = torch.tensor([[3.0, -3.0]]).repeat(8, 1)
        training.distill(built.module, wanted, rows.head(8), budget, seed=0, progress=lambda _: None)
        after = built.module.state_dict()
        assert list(before) == list(after)
        weights = [name for name in before if name.startswith(built.layout.blocks) and name.endswith("weight")]
        moved = [name for name in weights if not torch.equal(before[name], after[name])]
        assert moved == weights if built.shape.hidden > 2 else moved  # two channels that are normalised have one sign


class TestActivation:
    def test_it_is_replaced_in_every_block(self, teacher: EncoderModel, batches: Sequence[task.Batch]) -> None:
        model = teacher.clone()
        replace_activation(model, "relu")
        kinds = [type(module).__name__ for module in model.block_list().modules()]
        assert kinds.count("ReLU") == BLOCKS
        assert not [kind for kind in kinds if "GELU" in kind]
        # What the second layer of the FFN reads is what the first one returns, cut off at zero.
        seen: dict[str, torch.Tensor] = {}
        model.linear(1, "ffn_in").register_forward_hook(lambda _, given, out: seen.__setitem__("in", out))
        model.linear(1, "ffn_out").register_forward_pre_hook(lambda _, given: seen.__setitem__("out", given[0]))
        logits_of(model, batches[0])
        assert torch.equal(seen["out"], seen["in"].clamp(min=0))
        assert (seen["out"] == 0).any()

    def test_every_name_has_its_module(self, teacher: EncoderModel) -> None:
        for name in ACTIVATIONS:
            model = teacher.clone()
            replace_activation(model, name)
            assert model.shape.activation == name

    def test_a_block_with_none_or_two_is_refused(self, teacher: EncoderModel) -> None:
        model = teacher.clone()
        model.block_list()[1].another = nn.Tanh()
        with pytest.raises(ModelError, match=r"cannot be replaced: expected one in a block, found .*another"):
            replace_activation(model, "relu")
        other = teacher.clone()
        for path, module in list(other.block_list()[0].named_modules()):
            if "GELU" in type(module).__name__:
                other.replace(f"{other.layout.blocks}.0.{path}", nn.Identity())
        with pytest.raises(ModelError, match="expected one in a block, found none"):
            replace_activation(other, "relu")

    def test_the_models_own_is_known_by_its_name(self) -> None:
        assert fresh("bert").shape.activation == "gelu"
        assert fresh("bert", hidden_act="relu").shape.activation == "relu"
        assert fresh("distilbert", activation="relu").shape.activation == "relu"


class TestChannels:
    def test_another_order_of_all_channels_is_the_same_model(
        self, teacher: EncoderModel, batches: Sequence[task.Batch]
    ) -> None:
        model = teacher.clone()
        order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(4)).tolist()
        keep_channels(model, order)
        assert model.shape == teacher.shape
        assert torch.equal(model.linear(1, "query").weight, teacher.linear(1, "query").weight[:, order])
        for batch in batches:
            assert torch.allclose(logits_of(model, batch), logits_of(teacher, batch), atol=1e-5)

    def test_nothing_is_left_as_wide_as_before(self, teacher: EncoderModel) -> None:
        model = teacher.clone()
        places = len(norms_of(model, HIDDEN))
        keep_channels(model, [1, 4, 30])
        assert not norms_of(model, HIDDEN)
        assert len(norms_of(model, 3)) == places
        sizes = {parameter.shape[-1] for name, parameter in model.module.named_parameters() if "bias" not in name}
        # Heads stay together as wide as they were, and the tables of ELECTRA, which has a layer after them.
        assert sizes <= {3, HIDDEN, NEURONS, HIDDEN // 2}
        outside = [model.module.get_parameter(f"{path}.weight") for path in model.layout.head]
        assert all(HIDDEN not in weight.shape for weight in outside)
        assert outside[-1].shape[0] == len(LABELS)
        for path, parameter in model.module.named_parameters():
            if "embeddings.word" in path and parameter.shape[-1] == 3:
                assert torch.equal(parameter, teacher.module.get_parameter(path)[:, [1, 4, 30]])

    def test_the_channels_of_a_student_are_the_most_important_ones(
        self, teacher: EncoderModel, scores: Importance
    ) -> None:
        wanted = [3, 11, 12, 29]
        channels = torch.zeros(HIDDEN).double()
        channels[wanted] = torch.tensor([1.0, 4.0, 2.0, 3.0]).double()
        built = begun(teacher, Student(blocks=(2,), hidden=4, **WHOLE), scores, channels)
        assert torch.equal(built.linear(0, "ffn_in").weight, teacher.linear(2, "ffn_in").weight[:, wanted])
        assert torch.equal(built.linear(0, "output").weight, teacher.linear(2, "output").weight[wanted])
        assert torch.equal(built.linear(0, "output").bias, teacher.linear(2, "output").bias[wanted])

    def test_the_score_is_the_squared_gradient_of_a_gate(
        self, teacher: EncoderModel, batches: Sequence[task.Batch], channels: torch.Tensor
    ) -> None:
        """Kwon et al. 2022, eq. 5-7, with one real gate at all places and one row at a time."""
        gate = torch.ones(HIDDEN, requires_grad=True)
        handles = [n.register_forward_hook(lambda _, given, out: out * gate) for n in norms_of(teacher, HIDDEN)]
        expected = torch.zeros(HIDDEN).double()
        for batch in batches:
            for row in range(len(batch.rows)):
                one = {name: value[row : row + 1] for name, value in batch.inputs().items()}
                loss = functional.cross_entropy(teacher.module(**one).logits, batch.labels[row : row + 1])
                expected += torch.autograd.grad(loss, gate)[0].double().square()
        for handle in handles:
            handle.remove()
        assert torch.allclose(channels, expected, rtol=1e-3, atol=1e-9)

    def test_scoring_leaves_the_model_as_it_is(self, teacher: EncoderModel, batches: Sequence[task.Batch]) -> None:
        model = teacher.clone()
        frozen = next(model.module.parameters())
        frozen.requires_grad_(False)
        channel_scores(model, batches)
        assert [p.requires_grad for p in model.module.parameters()].count(False) == 1
        assert all(p.grad is None for p in model.module.parameters())
        assert not any(m._forward_hooks for m in model.module.modules())

    def test_a_head_that_answers_to_nothing_leaves_it_to_the_tables(self, batches: Sequence[task.Batch]) -> None:
        model = fresh("bert")
        nn.init.zeros_(model.module.get_parameter(f"{model.layout.head[-1]}.weight"))
        table = model.module.get_parameter(f"{model.layout.embeddings[0]}.weight")
        with torch.no_grad():
            table[:, 7] *= 9
        assert int(channel_scores(model, batches).argmax()) == 7

    def test_a_model_whose_stream_is_not_understood_is_refused(self, scores: Importance) -> None:
        model = fresh("bert")
        shift = nn.Parameter(torch.arange(HIDDEN) / 9.0)
        model.block_list()[0].register_forward_hook(lambda _, given, out: out + shift)
        with pytest.raises(ModelError, match="cannot be made narrower: another order of its 32 channels changes"):
            begun(model, STUDENTS["narrow"], scores, torch.ones(HIDDEN).double())


class Unrolled:
    """A model of shared blocks, and one that has a copy of the block for each run."""

    def __init__(self, family: str, runs: int = 2) -> None:
        self.teacher = fresh(family)
        self.shared = self.teacher.clone()
        share_blocks(self.shared, runs)
        self.copies = self.teacher.clone()
        blocks = [copy.deepcopy(block) for block in self.copies.block_list() for _ in range(runs)]
        self.copies.replace(self.copies.layout.blocks, nn.ModuleList(blocks))
        shape = self.teacher.shape
        several = tuple(block for block in shape.blocks for _ in range(runs))
        self.copies.shape = ModelShape(shape.hidden, several, shape.vocabulary)
        self.runs = runs

    def of(self, block: int) -> list[int]:
        """Return the copies that a shared block stands for."""
        return [block * self.runs + run for run in range(self.runs)]


def no_piece(site: str, decision: object) -> Piece:
    raise AssertionError(f"{site}: {decision} is not left to the runtime")


class TestSharing:
    @pytest.fixture(scope="class")
    def given(self, family: str) -> Unrolled:
        return Unrolled(family)

    def test_it_computes_what_copies_would(self, given: Unrolled, batches: Sequence[task.Batch]) -> None:
        for batch in batches:
            assert torch.equal(logits_of(given.shared, batch), logits_of(given.copies, batch))
        assert given.shared.parameters() == given.teacher.parameters()
        assert given.shared.shape.runs == 2
        assert all(isinstance(block, Repeated) for block in given.shared.block_list())

    def test_a_part_is_as_important_as_one_gate_in_all_runs(
        self, given: Unrolled, batches: Sequence[task.Batch]
    ) -> None:
        """Kwon et al. 2022, eq. 5-7: a gate on a shared head stands in each of its runs."""
        gates = [torch.ones(HEADS, requires_grad=True), torch.ones(NEURONS, requires_grad=True)]
        handles = []
        for number in given.of(1):
            for role, gate, width in (("output", gates[0], SIZE), ("ffn_out", gates[1], 1)):
                layer = given.copies.linear(number, role)
                handles.append(
                    layer.register_forward_pre_hook(
                        lambda _, values, gate=gate, width=width: (values[0] * gate.repeat_interleave(width),)
                    )
                )
        heads, neurons = torch.zeros(HEADS).double(), torch.zeros(NEURONS).double()
        for batch in batches:
            for row in range(len(batch.rows)):
                one = {name: value[row : row + 1] for name, value in batch.inputs().items()}
                loss = functional.cross_entropy(given.copies.module(**one).logits, batch.labels[row : row + 1])
                of_heads, of_neurons = torch.autograd.grad(loss, gates)
                heads += of_heads.double().square()
                neurons += of_neurons.double().square()
        for handle in handles:
            handle.remove()
        found = importance(given.shared, batches)
        assert torch.allclose(found.heads[1], heads, rtol=1e-3, atol=1e-9)
        assert torch.allclose(found.neurons[1], neurons, rtol=1e-3, atol=1e-9)
        assert len(found.heads) == BLOCKS
        assert sorted(drop_order(given.shared, batches, 1)) == list(range(BLOCKS))

    def test_moments_are_those_over_all_runs(self, given: Unrolled, batches: Sequence[task.Batch]) -> None:
        shared, copies = take_moments(given.shared, batches), take_moments(given.copies, batches)
        for role in ("query", "output", "ffn_in", "ffn_out"):
            runs = [copies[number][role] for number in given.of(2)]
            assert torch.allclose(shared[2][role].mean, sum(m.mean for m in runs) / 2, atol=1e-5)
            assert torch.allclose(shared[2][role].second, sum(m.second for m in runs) / 2, atol=1e-4)

    def test_what_a_layer_reads_is_kept_run_by_run(self, given: Unrolled, batches: Sequence[task.Batch]) -> None:
        shared, copies = observe(given.shared, batches), observe(given.copies, batches)
        for role in ("query", "key", "ffn_out"):
            values = shared.read_by(given.shared.layout.path(0, role))
            runs = [copies.read_by(given.copies.layout.path(number, role)) for number in given.of(0)]
            assert np.array_equal(values, np.concatenate(runs))
            # Of each row the smallest and the largest value of any run, in the mean over rows.
            spans = list(itertools.pairwise([*copies.starts.tolist(), len(runs[0])]))
            low = np.mean([min(run[a:b].min() for run in runs) for a, b in spans])
            high = np.mean([max(run[a:b].max() for run in runs) for a, b in spans])
            span = shared.span(values)
            step = (span.high - span.low) / 255
            assert abs(span.low - min(low, 0)) <= step
            assert abs(span.high - max(high, 0)) <= step
        one = given.shared.layout.head[-1]
        assert shared.span(shared.read_by(one)) == copies.span(copies.read_by(one))

    def test_a_decision_moves_the_predictions_in_every_run(
        self, given: Unrolled, batches: Sequence[task.Batch], scores: Importance
    ) -> None:
        """To first order what it does in the runs adds up; alone, a run would be half of it at the most."""
        cut = PruneNeurons(keep=NEURONS - 1)
        small = list(batches[:1])
        found = Sensitivity.measure(given.shared, scores, {"block.1.ffn": [cut]}, small, no_piece, seed=0)
        several = Importance(
            tuple(scores.heads[n // 2] for n in range(2 * BLOCKS)),
            tuple(scores.neurons[n // 2] for n in range(2 * BLOCKS)),
        )
        flows = _moved(given.copies, several, given.of(1), cut, small)
        [[(_, divergence)]] = found.curves.values()
        assert divergence == pytest.approx(flows, rel=1e-4)


def _note(caught: dict[int, tuple[torch.Tensor, torch.Tensor]], block: int) -> Callable[..., None]:
    return lambda _, given, out: caught.__setitem__(block, (given[0].detach(), out))


def _moved(
    model: EncoderModel, scores: Importance, blocks: Sequence[int], decision: PruneNeurons, batches: list[task.Batch]
) -> float:
    """Return half the mean square of what silencing the same neuron in all ``blocks`` moves, to first order."""
    total, rows = 0.0, 0
    for number, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(number)
        caught: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        handles = [model.linear(block, "ffn_out").register_forward_hook(_note(caught, block)) for block in blocks]
        log_p = functional.log_softmax(model.module(**batch.inputs()).logits, dim=-1)
        signs = torch.randint(0, 2, log_p.shape, generator=generator) * 2.0 - 1.0
        signed = (signs * (0.5 * log_p.detach()).exp() * log_p).sum()
        slopes = torch.autograd.grad(signed, [caught[block][1] for block in blocks])
        for handle in handles:
            handle.remove()
        moved = torch.zeros(len(batch.labels))
        for block, slope in zip(blocks, slopes, strict=True):
            gone = sorted(set(range(NEURONS)) - set(scores.best_neurons(block, decision.keep)))
            weight = model.linear(block, "ffn_out").weight.detach()[:, gone]
            moved -= (caught[block][0][..., gone] @ weight.T * slope).flatten(1).sum(dim=1)
        total += 0.5 * float(moved.square().sum())
        rows += len(batch.labels)
    return total / rows
