"""Moments of what layers read, and that what is fitted by them comes closer to the whole layer than what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LABELS, make_model, make_tokenizer
from torch import nn

from autocompress import task
from autocompress.config import DataConfig
from autocompress.decisions import Decision, DropBlocks, LowRank, PruneNeurons, Quantize
from autocompress.model import EncoderModel, understand
from autocompress.plan import CompressionPlan
from autocompress.transforms import apply_plan, quantize
from autocompress.transforms.factorize import factorized
from autocompress.transforms.importance import Importance, importance
from autocompress.transforms.moments import Moments, Spread, read_moments, save_moments, take_moments
from autocompress.transforms.quantize import compensated, per_group

NARROW = [Quantize(weight_bits=bits, activation_bits=a, group_size=8) for bits in (4, 3, 2) for a in (16, 8)]

TOKENS, WIDTH, OUT = 400, 24, 10


@pytest.fixture(scope="module", params=[True, False], ids=["bias", "no bias"])
def layer(request: pytest.FixtureRequest) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, OUT, bias=request.param)


@pytest.fixture(scope="module")
def read() -> torch.Tensor:
    """Correlated inputs with a mean, ``tokens x channels``."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) * torch.logspace(0, -2, WIDTH)[:, None]
    return torch.randn(TOKENS, WIDTH, generator=generator) @ mixing + torch.randn(WIDTH, generator=generator)


def moments_of(read: torch.Tensor) -> Moments:
    return Moments(read.mean(dim=0), read.T @ read / len(read))


def error(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return float((wanted - found).square().mean())


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_factors_fitted_to_the_input_return_what_is_nearer(layer: nn.Linear, read: torch.Tensor, rank: int) -> None:
    wanted = layer(read).detach()
    plain, fitted = factorized(layer, rank), factorized(layer, rank, moments_of(read))
    assert [f.weight.shape for f in fitted] == [p.weight.shape for p in plain]
    assert error(wanted, fitted(read).detach()) < error(wanted, plain(read).detach())


@pytest.mark.parametrize("decision", NARROW, ids=Quantize.words)
def test_rounding_errors_are_made_up_for(layer: nn.Linear, read: torch.Tensor, decision: Quantize) -> None:
    weight = layer.weight.detach().numpy()
    wanted = read @ layer.weight.detach().T
    gram = moments_of(read).gram(centred=False).numpy()
    plain, fitted = per_group(weight, decision), compensated(weight, decision, gram)
    assert fitted.values.min() >= -(2 ** (decision.weight_bits - 1))
    assert fitted.values.max() <= 2 ** (decision.weight_bits - 1) - 1
    assert fitted.values.shape == plain.values.shape
    assert fitted.scales is not None
    if decision.whole_steps:
        assert fitted.multiples is not None
        assert np.abs(fitted.values.astype(int) * fitted.multiples).max() <= 127
    else:
        assert np.array_equal(fitted.scales, fitted.scales.astype(np.float16)), "as they are stored"
    before, after = (error(wanted, read @ torch.from_numpy(p.restored()).T) for p in (plain, fitted))
    assert after < 0.7 * before


@pytest.mark.parametrize("decision", NARROW, ids=Quantize.words)
def test_choosing_values_anew_makes_no_error_larger(
    layer: nn.Linear, read: torch.Tensor, monkeypatch: pytest.MonkeyPatch, decision: Quantize
) -> None:
    weight, gram = layer.weight.detach().numpy(), moments_of(read).gram(centred=False).numpy()

    def lost(passes: int) -> float:
        monkeypatch.setattr(quantize, "_PASSES", passes)
        apart = weight - compensated(weight, decision, gram).restored()
        return float(np.trace(apart @ gram @ apart.T))

    errors = [lost(passes) for passes in (0, 1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.99 * errors[0]


def test_one_weight_makes_up_for_another_by_hand() -> None:
    """Two inputs that are nearly the same and a step of 1: what 0.4 loses when it becomes 0, its neighbour takes.

    The first group holds the largest weight, 7, so that its step is 1; rounded by itself, 0.4 becomes 0 twice.
    """
    weight = np.array([[7.0, 0.4, 0.4, 0.4]], dtype=np.float32)
    gram = np.eye(4)
    gram[1:, 1:] = 0.99 + 0.01 * np.eye(3)
    decision = Quantize(weight_bits=4, group_size=4)
    assert per_group(weight, decision).restored().sum() == pytest.approx(7.0, rel=0.2)
    found = compensated(weight, decision, gram).restored()
    assert found[0, 1:].sum() == pytest.approx(1.2, abs=0.3)


@pytest.mark.parametrize("decision", NARROW, ids=Quantize.words)
def test_without_correlations_there_is_nothing_to_make_up_for(
    monkeypatch: pytest.MonkeyPatch, decision: Quantize
) -> None:
    monkeypatch.setattr(quantize, "_PASSES", 0)
    weight = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    found, plain = compensated(weight, decision, np.eye(16)), per_group(weight, decision)
    assert np.array_equal(found.values, plain.values)


@pytest.mark.parametrize("decision", NARROW, ids=Quantize.words)
def test_weights_next_to_nothing_stay_finite(decision: Quantize) -> None:
    weight = np.full((2, 16), 1e-12, dtype=np.float32)
    weight[0] = 0.0
    found = compensated(weight, decision, np.eye(16)).restored()
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> EncoderModel:
    return understand(make_model(request.param, labels=LABELS), base="test")


@pytest.fixture(scope="module")
def batches(model: EncoderModel, tiny_csv: Path) -> list[task.Batch]:
    family = model.module.config.model_type  # type: ignore[union-attr]
    rows = task.load(DataConfig(source=str(tiny_csv), search_rows=60)).tokenized(make_tokenizer(str(family)), 16)
    return list(rows["train"].head(24).in_order_of_length(8))


def test_moments_leave_out_padding_and_do_not_depend_on_the_batches(
    model: EncoderModel, batches: list[task.Batch], tmp_path: Path
) -> None:
    found = take_moments(model, batches)
    inputs: list[torch.Tensor] = []
    handle = model.linear(1, "ffn_out").register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        for batch in batches:
            for row in range(len(batch.labels)):
                length = int(batch.attention_mask[row].sum())
                alone = {name: tensor[row : row + 1, :length] for name, tensor in batch.inputs().items()}
                model.module(**alone)
    handle.remove()
    tokens = torch.cat([value.reshape(-1, value.shape[-1]) for value in inputs])
    assert torch.allclose(found[1]["ffn_out"].mean, tokens.mean(dim=0), atol=1e-5)
    assert torch.allclose(found[1]["ffn_out"].second, tokens.T @ tokens / len(tokens), atol=1e-4)
    save_moments(found, tmp_path)
    assert torch.equal(read_moments(tmp_path, 1, "ffn_out").second, found[1]["ffn_out"].second)
    assert torch.equal(read_moments(tmp_path, 0, "query").mean, found[0]["query"].mean)


@pytest.mark.parametrize(
    "decisions",
    [
        (("block.1.attention", LowRank(rank=8)),),
        (("block.1.ffn", LowRank(rank=8)),),
        (("block.1.ffn", PruneNeurons(keep=40)), ("block.1.ffn", LowRank(rank=8))),
    ],
)
def test_a_fitted_model_stays_nearer(
    model: EncoderModel, batches: list[task.Batch], decisions: tuple[tuple[str, Decision], ...]
) -> None:
    """In what the changed site returns, on the rows that it is fitted to, as if it were pruned only."""
    scores = importance(model, batches)
    moments = take_moments(model, batches)
    known = Importance(scores.heads, scores.neurons, lambda block, role: moments[block][role])
    pruned = tuple((site, d) for site, d in decisions if not isinstance(d, LowRank))
    role = "output" if decisions[0][0].endswith("attention") else "ffn_out"
    outputs = []
    for plan, given in ((pruned, scores), (decisions, scores), (decisions, known)):
        changed = model.clone()
        apply_plan(changed, CompressionPlan(plan), given)
        last = changed.module.get_submodule(changed.layout.path(1, role))
        kept: list[torch.Tensor] = []
        handle = last.register_forward_hook(lambda _, __, found, into=kept: into.append(found))
        with torch.no_grad():
            for batch in batches:
                changed.module(**batch.inputs())
        handle.remove()
        outputs.append(
            torch.cat([k[b.attention_mask.bool()] for k, b in zip(kept, batches, strict=True)]).flatten(0, -2)
        )
    whole, plain, fitted = outputs
    assert error(whole, fitted) < error(whole, plain)


def test_moments_follow_their_block_where_others_are_dropped(model: EncoderModel, batches: list[task.Batch]) -> None:
    scores, asked = importance(model, batches), []

    def moments(block: int, role: str) -> Moments:
        asked.append((block, role))
        width = model.linear(block, role).in_features
        return Moments(torch.zeros(width), torch.eye(width))

    known = Importance(scores.heads, scores.neurons, moments)
    plan = CompressionPlan((("model", DropBlocks(blocks=(0,))), ("block.1.ffn", LowRank(rank=8))))
    apply_plan(model.clone(), plan, known)
    assert asked == [(2, "ffn_in"), (2, "ffn_out")]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_lies_far_from_nothing_keeps_its_spread(precision: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = 300 + torch.randn(4000, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    found = Spread()
    for part in values.split(500):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            away = found.add(part)
        assert torch.equal(away, part - values[:500].mean(dim=0))
    exact = torch.cov(values.double().T, correction=0)
    assert torch.allclose(found.mean(), values.double().mean(dim=0), rtol=1e-6)
    assert (found.covariance() - exact).abs().max() < 1e-3 * exact.diagonal().max()
    assert torch.linalg.eigvalsh(found.covariance()).min() > 0
    second = (values.double().T @ values.double() / len(values)).float()
    assert torch.allclose(found.moments().second, second, rtol=1e-5)
