"""The textbook formulas that compression rests on, each with its source and numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BLOCKS, FAMILIES, HIDDEN, LABELS, make_model, make_tokenizer
from torch import nn

from autocompress import task, training
from autocompress.anatomy import columns_of
from autocompress.config import DataConfig
from autocompress.decisions import PruneHeads, PruneNeurons, Quantize
from autocompress.model import understand
from autocompress.plan import CompressionPlan
from autocompress.task import Split
from autocompress.training import Example, TrainingBudget
from autocompress.transforms import apply_plan, quantize
from autocompress.transforms.factorize import factorized
from autocompress.transforms.importance import importance
from autocompress.transforms.moments import Moments
from autocompress.transforms.quantize import ActivationRange, Activations, compensated, per_channel, per_group


class TestAsymmetricQuantisation:
    """Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", eq. 1: r = S (q - Z), with S = (max - min) / 255, and Z an integer so that 0 is met exactly."""

    @pytest.mark.parametrize(
        ("seen", "grid"),
        [
            # S = 5.1 / 255 = 0.02, Z = 1 / 0.02 = 50: both ends are on the grid as they are.
            ((-1.0, 4.1), (-1.0, 4.1)),
            # S = 2.55 / 255 = 0.01, Z = round(30.3) = 30: the grid ends at -30 S and (255 - 30) S.
            ((-0.303, 2.247), (-0.30, 2.25)),
            # 0 belongs to every range: S = 2.55 / 255, Z = 0.
            ((0.5, 2.55), (0.0, 2.55)),
            # S = 5.1 / 255, Z = 255.
            ((-5.1, -2.0), (-5.1, 0.0)),
        ],
    )
    def test_the_grid_holds_zero(self, seen: tuple[float, float], grid: tuple[float, float]) -> None:
        found = ActivationRange.around(*seen)
        assert (found.low, found.high) == pytest.approx(grid, abs=1e-9)

    def test_ends_are_means_of_what_rows_reach(self) -> None:
        """The same, section 3.1, averages the ranges of activations over what is read, against outliers."""
        # Two rows, of two tokens and of one: smallest -2 and -1, largest 3 and 1.2. Means: -1.5 and 2.1.
        read = np.array([[-2.0, 1.0], [0.5, 3.0], [-1.0, 1.2]], dtype=np.float32)
        found = Activations({"layer": read}, {"layer": "layer"}, np.array([0, 2]), tokens=3).span(read)
        # S = 3.6 / 255, Z = round(1.5 * 255 / 3.6) = round(106.25) = 106: from -106 S to 149 S.
        assert (found.low, found.high) == pytest.approx((-106 * 3.6 / 255, 149 * 3.6 / 255), abs=1e-6)


class TestSymmetricQuantisation:
    """Wu et al. 2020, "Integer Quantization for Deep Learning Inference", section 3.1.2: s = max|w| / (2^(b-1) - 1),
    q = round(w / s), one s a channel at 8 bits and one a group of inputs at 4, where s may be negative."""

    def test_per_channel(self) -> None:
        weight = np.array([[1.27, -0.5, 0.004], [-2.54, 0.034, 0.054]], dtype=np.float32)
        found = per_channel(weight)
        # s = 1.27 / 127 = 0.01 and 2.54 / 127 = 0.02; in these steps: 127, -50, 0.4 and -127, 1.7, 2.7.
        assert found.values.tolist() == [[127, -50, 0], [-127, 2, 3]]
        assert found.scales is not None
        assert found.scales[:, 0] == pytest.approx([0.01, 0.02])
        assert found.restored() == pytest.approx(np.array([[1.27, -0.5, 0.0], [-2.54, 0.04, 0.06]]), abs=1e-6)

    def test_per_group(self) -> None:
        # The largest magnitude becomes -7: s = 0.7 / -7 = -0.1 for the first four inputs and -28 / -7 = 4 for the
        # others; all are whole steps, and steps are stored in half precision.
        weight = np.array([[0.7, 0.3, -0.2, 0.1, -28.0, 4.0, 0.0, 12.0]], dtype=np.float32)
        found = per_group(weight, Quantize(weight_bits=4, group_size=4))
        assert found.values.tolist() == [[[-7, -3, 2, -1], [-7, 1, 0, 3]]]
        assert found.restored() == pytest.approx(weight, rel=1e-3)

    def test_whole_steps(self) -> None:
        """Lin et al. 2024, "QServe", section 4.1: steps of groups are integers times one unit a channel."""
        # The unit is 6 / (63 x 2): 63 of them reach 127 with the lowest value, -2. The first group's step is
        # 6 / -2 = -3 = -63 units, and 3 is -1 step; the second one's 2 / -2 = -1 = -21 units.
        weight = np.array([[6.0, 3.0, -3.0, 0.0, 2.0, 1.0, -1.0, 0.0]], dtype=np.float32)
        found = per_group(weight, Quantize(weight_bits=2, activation_bits=8, group_size=4))
        assert found.values.tolist() == [[[-2, -1, 1, 0], [-2, -1, 1, 0]]]
        assert found.multiples is not None
        assert found.scales is not None
        assert found.multiples[0, :, 0].tolist() == [-63, -21]
        assert found.scales[0, 0, 0] == pytest.approx(6 / 126)
        assert found.restored() == pytest.approx(weight, abs=1e-5)

    def test_a_clipped_grid_is_taken_where_it_is_nearer(self) -> None:
        """Banner et al. 2019, "Post Training 4-bit Quantization of Convolutional Networks for Rapid-Deployment": what
        is lost by cutting the ends off can be less than what finer steps bring."""
        # s = -1: 8 is -8 steps, 6.44 becomes 6 three times, squared error 3 x 0.1936 = 0.58. s = -8/7: 6.44 becomes 6
        # steps = 6.857, 3 x 0.174 = 0.52. s = -0.92: 6.44 is -7 steps, 8 is cut to -8 steps, 7.36: 0.64^2 = 0.41.
        # s = -0.84: 8 is cut to 6.72, alone 1.64.
        found = per_group(np.array([[8.0, 6.44, 6.44, 6.44]], dtype=np.float32), Quantize(weight_bits=4, group_size=4))
        assert found.values.tolist() == [[[-8, -7, -7, -7]]]
        assert found.restored() == pytest.approx(np.array([[7.36, 6.44, 6.44, 6.44]]), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_removed_is_what_a_mask_silences(family: str, tiny_csv: Path) -> None:
    """Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 2.2: a head that is removed is one whose
    gate is 0. Kwon et al. 2022, section 3, have gates on heads and on neurons of the feed-forward network."""
    model = understand(make_model(family, labels=LABELS), base="test")
    rows = task.load(DataConfig(source=str(tiny_csv), search_rows=60)).tokenized(make_tokenizer(family), 16)["train"]
    batch = rows.batch(range(8))
    scores = importance(model, [batch])
    heads, neurons = (3, 1, 2), (40, 7, 64)
    plan = [(f"block.{n}.attention", PruneHeads(keep=heads[n])) for n in range(BLOCKS)]
    pruned, masked = model.clone(), model.clone()
    apply_plan(
        pruned,
        CompressionPlan((*plan, *((f"block.{n}.ffn", PruneNeurons(keep=neurons[n])) for n in range(BLOCKS)))),
        scores,
    )

    def silence(path: str, kept: Sequence[int], width: int) -> None:
        gate = torch.zeros(width).index_fill(0, torch.tensor(kept), 1.0)
        masked.module.get_submodule(path).register_forward_pre_hook(lambda _, given: (given[0] * gate, *given[1:]))

    for n, block in enumerate(model.shape.blocks):
        channels = columns_of(scores.best_heads(n, heads[n]), block.head_size)
        silence(model.layout.path(n, "output"), channels, HIDDEN)
        silence(model.layout.path(n, "ffn_out"), scores.best_neurons(n, neurons[n]), block.neurons)
    with torch.no_grad():
        full, small, gated = (m.module(**batch.inputs()).logits for m in (model, pruned, masked))
    assert torch.allclose(small, gated, atol=1e-5)
    assert not torch.allclose(small, full, atol=1e-2)


def layer_of(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    return layer


def product_of(pair: nn.Sequential) -> torch.Tensor:
    return (pair[1].weight @ pair[0].weight).detach()


class TestTruncatedSVD:
    def test_the_error_is_the_singular_values_that_are_left_out(self) -> None:
        """Eckart & Young 1936: of all matrices of rank r, U_r S_r V_r^T is nearest, at the norm of what is left out."""
        # W W^T = [[16, 12], [12, 34]] has eigenvalues 40 and 10, the first along u = (1, 2) / sqrt 5.
        # u u^T W = [[1, 2], [2, 4]] W / 5 = [[2, -2], [4, -4]], and the rest, [[2, 2], [-1, -1]], has norm sqrt 10.
        weight = [[4.0, 0.0], [3.0, -5.0]]
        found = product_of(factorized(layer_of(weight), 1))
        assert torch.allclose(found, torch.tensor([[2.0, -2.0], [4.0, -4.0]]), atol=1e-5)
        assert float((torch.tensor(weight) - found).norm()) == pytest.approx(math.sqrt(10), rel=1e-5)

    def test_the_metric_of_the_inputs_decides_what_is_left_out(self) -> None:
        """Wang et al. 2024, "SVD-LLM", section 3.1: with L L^T = E[x x^T], the error E|(W - W')x|^2 of the truncated
        decomposition of W L is the sum of the squared singular values that are left out."""
        # W = diag(3, 2), E[x x^T] = diag(1, 9): by weights alone 3 is kept, and 2^2 x 9 = 36 lost. W L = diag(3, 6):
        # 2 is kept, and 3^2 x 1 = 9 lost.
        layer, second = layer_of([[3.0, 0.0], [0.0, 2.0]]), torch.diag(torch.tensor([1.0, 9.0]))
        lost = {}
        for read in (None, Moments(torch.zeros(2), second)):
            apart = layer.weight.detach() - product_of(factorized(layer, 1, read))
            lost[read is None] = float((apart @ second @ apart.T).trace())
        assert lost == pytest.approx({True: 36.0, False: 9.0}, rel=1e-5)

    def test_for_the_identity_it_is_principal_component_analysis(self) -> None:
        """Pearson 1901: the best projection of x is that on the first eigenvectors of its covariance."""
        # [[2.5, 1.5], [1.5, 2.5]] has eigenvalue 4 along (1, 1) and 1 along (1, -1): P = [[1, 1], [1, 1]] / 2, and 1
        # is lost. The mean m = (1, 2) is kept by the bias: (I - P) m = (-1/2, 1/2).
        covariance, mean = torch.tensor([[2.5, 1.5], [1.5, 2.5]]), torch.tensor([1.0, 2.0])
        layer = layer_of([[1.0, 0.0], [0.0, 1.0]], bias=[0.0, 0.0])
        pair = factorized(layer, 1, Moments(mean, covariance + torch.outer(mean, mean)))
        apart = torch.eye(2) - product_of(pair)
        assert torch.allclose(apart, torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), atol=1e-5)
        assert float((apart @ covariance @ apart.T).trace()) == pytest.approx(1.0, rel=1e-5)
        assert torch.allclose(pair[1].bias.detach(), torch.tensor([-0.5, 0.5]), atol=1e-5)


def test_gptq_on_two_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frantar et al. 2023, "GPTQ", eq. 2: what rounding w_0 changes in the output is best made up for by moving
    w_1 by (w_0 - q_0) H_01 / H_11, which is what -(w_0 - q_0) / [H^-1]_00 x [H^-1]_01 comes to for two weights."""
    # Without a search of steps s = 3.5 / -7 = -1/2. w_0 = 1.3 is -2.6 steps, q_0 = -3 steps = 1.5, and w_1 moves by
    # -0.2 x 1.5 to 3.2, which is -6.4 steps: q_1 = -6. On its own 3.5 would be -7. The second row is on the grid:
    # nothing is to be made up for.
    monkeypatch.setattr(quantize, "_CLIPS", ())
    monkeypatch.setattr(quantize, "_PASSES", 0)
    weight = np.array([[1.3, 3.5], [1.5, 3.5]], dtype=np.float32)
    gram = np.array([[4.0, 1.5], [1.5, 1.0]])
    decision = Quantize(weight_bits=4, group_size=2)
    found, plain = compensated(weight, decision, gram), per_group(weight, decision)
    assert plain.values.tolist() == [[[-3, -7]], [[-3, -7]]]
    assert found.values.tolist() == [[[-3, -6]], [[-3, -7]]]
    # With errors e = (-0.2, 0) and (-0.2, 0.5), e H e^T is 4 x 0.04 = 0.16 and 0.16 - 2 x 1.5 x 0.1 + 0.25 = 0.11.
    lost = [float((w := weight - packed.restored())[0] @ gram @ w[0]) for packed in (plain, found)]
    assert lost == pytest.approx([0.16, 0.11], abs=1e-6)


class Said(nn.Module):
    """A model that says what it was told to, whatever it reads."""

    def __init__(self, logits: torch.Tensor, between: torch.Tensor) -> None:
        super().__init__()
        self.block, self.logits, self.between = nn.Identity(), logits, between

    def forward(self, **_: torch.Tensor) -> Any:
        self.block(self.between)
        return SimpleNamespace(logits=self.logits)


class TestDistillation:
    # Two texts, of two tokens and of one, of the classes 1 and 0.
    ROWS = Split(input_ids=((2, 3), (2,)), token_type_ids=None, labels=(1, 0))
    TEACHER = torch.tensor([[0.0, 2 * math.log(3)], [0.0, 2 * math.log(3)]])
    STUDENT = torch.tensor([[0.0, 0.0], [0.0, 2 * math.log(3)]])
    # Labels: softmax(0, 0)_1 = 1/2, and softmax(0, ln 9)_0 = 1 / (1 + 9): the mean of ln 2 and ln 10.
    HARD = math.log(20) / 2

    @pytest.fixture
    def loss(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
        def of(between: torch.Tensor, **weights: float) -> float:
            captured: list[Callable[..., torch.Tensor]] = []
            monkeypatch.setattr(training, "_train", lambda *given, **_: captured.append(given[3]))
            budget = TrainingBudget(epochs=1, learning_rate=1e-3, batch_size=2, precision="float32", **weights)
            student = Said(self.STUDENT, torch.zeros_like(between))
            example = Example(Said(self.TEACHER, between), (("block", "block"),))
            training.distill(student, self.TEACHER, self.ROWS, budget, example=example, seed=0, progress=lambda _: None)
            return float(captured[0](self.ROWS.batch([0, 1])))

        return of

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    def test_logits_at_a_temperature(self, loss: Callable[..., float], alpha: float) -> None:
        """Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2: alpha T^2 KL(p || q) of
        softmax(z / T), + (1 - alpha) cross-entropy with the labels at T = 1."""
        # T = 2: p = softmax(0, ln 3) = (1/4, 3/4), q = (1/2, 1/2): KL = 1/4 ln 1/2 + 3/4 ln 3/2 = 3/4 ln 3 - ln 2. The
        # second student is its teacher: KL = 0. The mean over both rows is half of the first.
        soft = (0.75 * math.log(3) - math.log(2)) / 2
        expected = alpha * 2**2 * soft + (1 - alpha) * self.HARD
        assert loss(torch.zeros(2, 2, 2), temperature=2.0, alpha=alpha) == pytest.approx(expected, rel=1e-5)

    def test_hidden_states(self, loss: Callable[..., float]) -> None:
        """Jiao et al. 2020, "TinyBERT", eq. 8: the mean squared difference of hidden states, here of true tokens only,
        with the identity in place of the learnt map."""
        # Differences of the three tokens: (1, 2), (3, 0), (0, 2); squares 1 + 4 + 9 + 4 = 18 over 6 numbers are 3. What
        # stands at the padding of the second text does not count.
        between = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 2.0], [100.0, 100.0]]])
        assert loss(between, alpha=0.0, hidden=0.5) == pytest.approx(self.HARD + 0.5 * 3, rel=1e-5)
