"""The order in which parts are removed where the others make up for it, against least squares one part at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import LABELS, make_model, make_tokenizer
from torch.nn import functional

from autocompress import task
from autocompress.config import DataConfig, RunConfig
from autocompress.decisions import RECONSTRUCTED, PruneHeads, PruneNeurons
from autocompress.evaluate import Workshop
from autocompress.model import EncoderModel, understand
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.task import Batch
from autocompress.transforms import surgery
from autocompress.transforms.importance import READING, importance
from autocompress.transforms.prune import keep_heads, keep_neurons
from autocompress.transforms.surgery import order_of_removal


def eye(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


def test_unrelated_inputs_go_by_their_weights() -> None:
    weight = torch.tensor([[3.0, 0.5, 1.0], [0.0, 0.5, 2.0]])
    assert order_of_removal(weight, eye(3), eye(2), 3).tolist() == [2.0, 0.0, 1.0]


def test_of_two_that_say_the_same_one_goes_first_and_the_other_last() -> None:
    # By their weights the third would go first; either twin can take over what the other one did.
    weight = torch.tensor([[5.0, 5.0, 1.0]])
    gram = torch.tensor([[1.0, 0.999, 0.0], [0.999, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    late = order_of_removal(weight, gram, eye(1), 3)
    assert late[2] == 1
    assert sorted(late[:2].tolist()) == [0.0, 2.0]


def test_what_the_loss_does_not_answer_to_is_worth_little() -> None:
    weight = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert order_of_removal(weight, eye(2), eye(2), 2).tolist() == [1.0, 0.0]
    answered = torch.diag(torch.tensor([1.0, 0.0]))  # damped by 0.05: it is 1.05 x 1 against 0.05 x 4
    assert order_of_removal(weight, eye(2), answered, 2).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("size", [1, 3])
def test_each_removal_is_the_one_that_least_squares_make_the_least_of(size: int) -> None:
    parts, outer = 5, 4
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(outer, parts * size, generator=generator, dtype=torch.float64)
    mixing = torch.randn(parts * size, parts * size, generator=generator, dtype=torch.float64)
    gram = mixing @ mixing.T + 0.1 * eye(parts * size)
    half = torch.randn(outer, outer, generator=generator, dtype=torch.float64)
    slopes = half @ half.T
    damped = slopes + surgery._DAMPING * slopes.diagonal().mean() * eye(outer)

    def cost(kept: list[int]) -> float:
        columns = [part * size + channel for part in kept for channel in range(size)]
        found = torch.zeros_like(weight)
        if columns:
            found[:, columns] = weight @ gram[:, columns] @ torch.linalg.inv(gram[columns][:, columns])
        change = found - weight
        return float(torch.trace(damped @ change @ gram @ change.T))

    left, expected = list(range(parts)), torch.zeros(parts, dtype=torch.float64)
    for turn in range(parts):
        gone = min(left, key=lambda part: cost([other for other in left if other != part]))
        left.remove(gone)
        expected[gone] = turn
    assert torch.equal(order_of_removal(weight, gram, slopes, parts), expected)


@pytest.mark.parametrize("parts", [1, 2, 31, 64, 100])
def test_every_part_has_its_place(parts: int) -> None:
    generator = torch.Generator().manual_seed(parts)
    weight = torch.randn(3, parts, generator=generator)
    mixing = torch.randn(parts, parts, generator=generator, dtype=torch.float64)
    late = order_of_removal(weight, mixing @ mixing.T + eye(parts), torch.zeros(3, 3), parts)
    assert sorted(late.tolist()) == list(range(parts)), "also where all slopes vanish"


@pytest.fixture(scope="module")
def whole() -> EncoderModel:
    return understand(make_model("bert", labels=LABELS), base="bert")


@pytest.fixture(scope="module")
def batches(tiny_csv: Path) -> list[Batch]:
    loaded = task.load(DataConfig(source=str(tiny_csv), search_rows=60))
    return list(loaded.tokenized(make_tokenizer("bert"), 32)["train"].head(48).in_order_of_length(16))


@pytest.mark.parametrize("role", READING)
def test_slopes_are_those_of_the_loss_at_what_the_layer_returns(
    whole: EncoderModel, batches: list[Batch], role: str
) -> None:
    found = importance(whole, batches).slopes
    assert found is not None
    expected, tokens = torch.zeros(()), 0
    for batch in batches:
        given: list[torch.Tensor] = []

        def keep(_: object, __: object, output: torch.Tensor, into: list[torch.Tensor] = given) -> torch.Tensor:
            into.append(output.detach().requires_grad_(True))
            return into[0]

        handle = whole.linear(1, role).register_forward_hook(keep)
        logits = whole.module(**batch.inputs()).logits
        handle.remove()
        [slope] = torch.autograd.grad(functional.cross_entropy(logits, batch.labels, reduction="sum"), given)
        at_tokens = slope[batch.attention_mask.bool()]
        expected, tokens = expected + at_tokens.T @ at_tokens, tokens + len(at_tokens)
    assert torch.allclose(found(1, role), expected / tokens, rtol=1e-3, atol=1e-9)


def test_reconstructed_structures_keep_what_the_others_cannot_make_up_for(
    tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    shop = Workshop(tiny_run(), tmp_path)
    base, scores = shop.base(None)
    plan = CompressionPlan((("block.0.attention", PruneHeads(keep=2)), ("block.1.ffn", PruneNeurons(keep=8))))
    plain, again = shop.structured(plan), shop.structured(plan.with_decision(MODEL_SITE, RECONSTRUCTED))
    heads, neurons = scores.made_up_for(base, 0, "output"), scores.made_up_for(base, 1, "ffn_out")
    assert set(neurons.topk(8).indices.tolist()) != set(scores.neurons[1].topk(8).indices.tolist())
    for built, by_heads, by_neurons in ((plain, scores.heads[0], scores.neurons[1]), (again, heads, neurons)):
        expected = base.clone()
        keep_heads(expected, 0, sorted(by_heads.topk(2).indices.tolist()))
        keep_neurons(expected, 1, sorted(by_neurons.topk(8).indices.tolist()))
        for block, role in ((0, "query"), (1, "ffn_in")):
            assert torch.equal(built.linear(block, role).weight, expected.linear(block, role).weight)
