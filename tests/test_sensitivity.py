"""Sensitivities rank single decisions as exact divergences do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, LABELS, make_model
from helpers_plans import counts_of, ranks
from torch.nn import functional

from autocompress import model, slot, task
from autocompress import sensitivity as module
from autocompress.binding import bind
from autocompress.config import DataConfig
from autocompress.decisions import Decision, LowRank, MaxTokens, PruneHeads, PruneNeurons, Quantize, TrimVocabulary
from autocompress.model import EncoderModel, understand
from autocompress.pieces import Piece, make_piece, unpacked
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.sensitivity import Sensitivity
from autocompress.space import SearchSpace
from autocompress.transforms import apply_plan
from autocompress.transforms.depth import drop_order
from autocompress.transforms.importance import Importance, importance
from autocompress.transforms.moments import take_moments
from autocompress.transforms.quantize import observe

W16, W4 = Quantize(weight_bits=16), Quantize(weight_bits=4, group_size=8)


@dataclasses.dataclass
class Given:
    """The tiny trained classifier with what sensitivities are measured from."""

    model: EncoderModel
    scores: Importance
    batches: list[task.Batch]

    def measure(self, site: str, *decisions: Decision, seed: int = 0) -> Sensitivity:
        return Sensitivity.measure(self.model, self.scores, {site: decisions}, self.batches, self.piece, seed=seed)

    def piece(self, site: str, decision: Decision) -> Piece:
        return make_piece(self.model, site, (decision,), self.scores, observe(self.model, self.batches))

    def cost(self, site: str, decision: Decision) -> float:
        """Return the one divergence that is measured for one decision."""
        [[(_, found)]] = self.measure(site, decision).curves.values()
        return found

    def exact(self, site: str, decision: Decision) -> float:
        """Return the mean divergence (nats) of the model that the single decision leads to."""
        changed = self.model.clone()
        if isinstance(decision, MaxTokens):
            before = self.log_p(self.model)
            after = self.log_p(self.model, decision.tokens)
            return float((before.exp() * (before - after)).sum(dim=1).mean())
        if decision.structural:
            apply_plan(changed, CompressionPlan(((site, decision),)), self.scores)
        else:
            for path, layer in unpacked(self.model, site, self.piece(site, decision)).items():
                changed.module.get_parameter(f"{path}.weight").data.copy_(torch.from_numpy(layer.weight))
        before, after = self.log_p(self.model), self.log_p(changed)
        return float((before.exp() * (before - after)).sum(dim=1).mean())

    def log_p(self, of: EncoderModel, tokens: int | None = None) -> torch.Tensor:
        inputs = [{name: t[:, :tokens] for name, t in batch.inputs().items()} for batch in self.batches]
        with torch.no_grad():
            logits = torch.cat([of.module(**given).logits for given in inputs])
        return functional.log_softmax(logits.double(), dim=1)


@pytest.fixture(scope="module")
def given(bert_headed_folder: Path, tiny_csv: Path) -> Given:
    loaded = model.load(bert_headed_folder, labels=LABELS)
    rows = task.load(DataConfig(source=str(tiny_csv), search_rows=60)).tokenized(
        model.load_tokenizer(bert_headed_folder), 16
    )
    batches = list(rows["train"].head(32).in_order_of_length(16))
    scores = importance(loaded, batches, counts=counts_of(loaded.shape.vocabulary, batches))
    return Given(loaded, scores, batches)


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


def test_single_decisions_are_ordered_as_by_what_they_do(given: Given) -> None:
    options = bind(SearchSpace.load("encoder-joint"), given.model.shape, tokens=64).options(given.model.shape)
    pairs = [(site, decision) for site, decisions in options.items() for decision in decisions]
    assert len(pairs) > 30
    estimated = [given.cost(site, decision) for site, decision in pairs]
    exact = [given.exact(site, decision) for site, decision in pairs]
    spearman = float(np.corrcoef(ranks(estimated), ranks(exact))[0, 1])
    assert spearman > 0.7
    # Nats, not just an order; large changes are beyond what a second order can say.
    factors = [mine / true for mine, true in zip(estimated, exact, strict=True) if true > 1e-9]
    assert 0.5 < float(np.median(factors)) < 2


def test_what_is_cut_off_is_measured(given: Given) -> None:
    for tokens in (3, 6, 9):
        cut = MaxTokens(tokens=tokens)
        assert given.cost(MODEL_SITE, cut) == pytest.approx(given.exact(MODEL_SITE, cut), rel=1e-4, abs=1e-8)
    assert given.cost(MODEL_SITE, MaxTokens(tokens=16)) == 0
    assert given.measure(MODEL_SITE, MaxTokens(tokens=3), MaxTokens(tokens=6)).at(MODEL_SITE, "tokens", 3) > 0


def test_fewer_rows_cost_more(given: Given) -> None:
    few, more, most = (given.cost("embeddings", TrimVocabulary(keep=keep)) for keep in (30, 80, 140))
    assert few > more > most >= 0


def test_whoever_wants_to_time_waits_for_a_batch_at_most(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    observed = observe(given.model, given.batches)
    turns: list[int] = []  # runs of the model in each
    at_work = False

    @contextmanager
    def working() -> Iterator[None]:
        nonlocal at_work
        assert not at_work
        at_work = True
        turns.append(0)
        yield
        at_work = False

    def note(*_: object) -> None:
        assert at_work, "beside who times"
        turns[-1] += 1

    monkeypatch.setattr(slot, "working", working)
    handle = given.model.module.register_forward_pre_hook(note)
    try:
        importance(given.model, given.batches, counts=counts_of(given.model.shape.vocabulary, given.batches))
        drop_order(given.model, given.batches, 1)
        take_moments(given.model, given.batches)
        options = {"block.0.ffn": (PruneNeurons(keep=16), W4), MODEL_SITE: (MaxTokens(tokens=6),)}

        def piece(site: str, decision: Decision) -> Piece:
            assert at_work, "beside who times"
            return make_piece(given.model, site, (decision,), given.scores, observed)

        Sensitivity.measure(given.model, given.scores, options, given.batches, piece, seed=0)
    finally:
        handle.remove()
    runs = {count: turns.count(count) for count in sorted(set(turns))}
    # Whole and cut, a batch is run twice in a turn.
    assert runs.keys() == {0, 1, 2}
    assert runs[2] == len(given.batches)
    assert runs[1] == (1 + 1 + len(given.model.shape.blocks) + 1 + 1) * len(given.batches)


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


def test_half_precision_and_parts_of_the_rows_tell_the_same(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "block.0.attention": (PruneHeads(keep=2), LowRank(rank=4), W4),
        "block.1.ffn": (PruneNeurons(keep=32),),
        "embeddings": (TrimVocabulary(keep=80), W4),
        "head": (W4,),
    }
    of = (given.model, given.scores, options, given.batches, given.piece)
    whole = Sensitivity.measure(*of, seed=0)
    monkeypatch.setattr(module, "_HELD_BYTES", 1)
    halved = Sensitivity.measure(*of, seed=0, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert whole.curves.keys() == halved.curves.keys()
    for key, points in whole.curves.items():
        for (level, found), (same, again) in zip(points, halved.curves[key], strict=True):
            assert level == same
            assert again == pytest.approx(found, rel=0.1), key


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
    options = bind(SearchSpace.load("encoder-small"), of.shape, tokens=64).options(of.shape)
    given = Given(of, importance(of, batches, counts=counts_of(of.shape.vocabulary, batches)), batches)
    found = Sensitivity.measure(of, given.scores, options, batches, given.piece, seed=0)
    assert {site for site, _ in found.curves} == set(options)
    assert all(np.isfinite(y) and y >= 0 for points in found.curves.values() for _, y in points)
    assert found.at("embeddings", "bits", 4) > found.at("embeddings", "bits", 16) > 0


def test_what_cannot_be_carried_out_is_left_out(given: Given) -> None:
    # Building such a plan fails that candidate only; measuring sensitivities must not fail the search.
    of = understand(make_model("electra", labels=LABELS, embedding_size=16), base="test")
    batches = [given.batches[0]]
    options = bind(SearchSpace.load("encoder-small"), of.shape, tokens=64).options(of.shape)
    given = Given(of, importance(of, batches, counts=counts_of(of.shape.vocabulary, batches)), batches)
    found = Sensitivity.measure(of, given.scores, options, batches, given.piece, seed=0)
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
