"""Losses: each is held against values computed by hand, gradients of penalties and the order of paddings included."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import LABELS, make_model
from torch import nn

from autocompress import losses


class TestDistillation:
    def test_teacher_and_labels_are_mixed(self) -> None:
        """Hinton et al. 2015: alpha T^2 KL(teacher || student), both softened by T, + (1 - alpha) cross-entropy."""
        logits, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
        found = losses.distillation(logits, torch.tensor([0]), teacher, alpha=0.25, temperature=1.0)
        soft = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
        assert float(found) == pytest.approx(0.25 * soft + 0.75 * -math.log(0.75))

    def test_labels_alone_need_no_teacher(self) -> None:
        logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
        found = losses.distillation(logits, torch.tensor([1, 0]), None, alpha=0.0, temperature=2.0)
        assert float(found) == pytest.approx(-(math.log(0.25) + math.log(0.5)) / 2)


class TestRelations:
    READ = torch.tensor([[True, True, False]])

    def test_one_head_by_hand(self) -> None:
        """Two tokens and padding: rows of softmax(v v^T / sqrt(width)), compared by KL(teacher || student)."""
        root = math.sqrt(2.0)
        mine = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
        theirs = torch.tensor([[[root, root], [root, -root], [7.0, 1.0]]])
        # Products are 1 with itself and 0 with the other; the teacher's are 4 and 0. Both are divided by sqrt(2).
        p, q = (1 / (1 + math.exp(-product / root)) for product in (4.0, 1.0))
        expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        assert float(losses.relations_apart(mine, theirs, self.READ, 1)) == pytest.approx(expected, rel=1e-5)

    def test_heads_are_compared_one_by_one_across_widths(self) -> None:
        """A teacher of width 4 and a model of width 2, each as two relation heads; the mean is over both."""
        mine = torch.tensor([[[1.0, 2.0], [1.0, -2.0], [5.0, 5.0]]])
        theirs = torch.tensor([[[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]]])
        parts = [
            losses.relations_apart(mine[..., n : n + 1], theirs[..., 2 * n : 2 * n + 2], self.READ, 1) for n in (0, 1)
        ]
        found = losses.relations_apart(mine, theirs, self.READ, 2)
        assert float(found) == pytest.approx(float(parts[0] + parts[1]) / 2, rel=1e-5)
        assert float(parts[0]) != pytest.approx(float(parts[1]), rel=0.1)

    @pytest.mark.parametrize(("width", "heads"), [(160, 4), (192, 12), (32, 4), (384, 12), (15, 3)])
    def test_there_are_as_many_relation_heads_as_divide_both(self, width: int, heads: int) -> None:
        """The teacher has 12 heads of 32; 5 heads leave a width of 160, which 12 does not divide but 4 does."""
        mine, theirs = torch.randn(1, 3, width), torch.randn(1, 3, 384)
        assert torch.equal(
            losses.relations_apart(mine, theirs, self.READ, 12), losses.relations_apart(mine, theirs, self.READ, heads)
        )

    def test_padding_counts_nothing_and_gives_finite_gradients(self) -> None:
        mine, theirs = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6)
        read = torch.tensor([[True, True, True, False], [True, True, False, False]])
        losses.relations_apart(mine, theirs, read, 3).backward()
        assert mine.grad is not None
        assert torch.isfinite(mine.grad).all()
        assert not mine.grad[~read].any()
        assert mine.grad[read].abs().sum(dim=-1).min() > 0
        other = torch.where(read[..., None], mine.detach(), 100.0)
        again = torch.where(read[..., None], theirs, -50.0)
        assert torch.equal(losses.relations_apart(other, again, read, 3), losses.relations_apart(mine, theirs, read, 3))

    def test_equals_are_not_apart(self) -> None:
        vectors = torch.randn(1, 3, 8)
        assert float(losses.relations_apart(vectors, vectors, self.READ, 4)) == pytest.approx(0.0, abs=1e-6)


class TestPenalty:
    @pytest.fixture
    def matrices(self) -> list[nn.Parameter]:
        return [nn.Parameter(torch.tensor([[1.0, -2.0]])), nn.Parameter(torch.tensor([[0.5], [-4.0]]))]

    def test_magnitudes_and_squares_add_up(self, matrices: list[nn.Parameter]) -> None:
        for l1, l2, expected in ((1.0, 0.0, 7.5), (0.0, 1.0, 21.25), (0.1, 0.01, 0.75 + 0.2125)):
            assert losses.penalty(matrices, l1=l1, l2=l2).item() == pytest.approx(expected)

    def test_gradients_are_signs_and_twice_the_weights(self, matrices: list[nn.Parameter]) -> None:
        losses.penalty(matrices, l1=0.1, l2=0.01).backward()
        expected = [[[0.1 + 0.02, -0.1 - 0.04]], [[0.1 + 0.01], [-0.1 - 0.08]]]
        for matrix, gradient in zip(matrices, expected, strict=True):
            assert matrix.grad is not None
            assert torch.allclose(matrix.grad, torch.tensor(gradient))


def test_what_parts_return_is_noted_while_it_is_asked_for() -> None:
    module: Any = make_model("bert", labels=LABELS)
    path = "bert.encoder.layer.1.attention.self.query"
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), losses.noted(module, [path]) as found:
        states = module(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
    layer = copy.deepcopy(module.get_submodule(path))
    with torch.no_grad():
        assert torch.allclose(found[path], layer(states[1]), atol=1e-6)
    assert not module.get_submodule(path)._forward_hooks
