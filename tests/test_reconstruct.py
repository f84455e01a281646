"""Reconstruction: least squares by hand, what it must leave alone, and that it comes nearer to the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import BLOCKS, FAMILIES, HEADS, HIDDEN, LABELS, NEURONS, VOCABULARY, make_model, make_tokenizer
from safetensors.torch import load_file
from torch import nn

from autocompress import reconstruct as module
from autocompress import recovery, task
from autocompress.config import DataConfig, RunConfig
from autocompress.decisions import (
    RECONSTRUCTED,
    Decision,
    DropBlocks,
    LowRank,
    PruneHeads,
    PruneNeurons,
    Quantize,
    Recover,
    Student,
)
from autocompress.errors import ConfigError, ModelError, PlanError
from autocompress.evaluate import Workshop
from autocompress.model import EncoderModel, understand
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.reconstruct import Wanted, read_sums, reconstruct, save_sums, sums_in
from autocompress.task import Batch
from autocompress.transforms import apply_plan
from autocompress.transforms.importance import importance
from autocompress.transforms.moments import take_moments

PLANS: dict[str, tuple[tuple[str, Decision], ...]] = {
    "heads": tuple((f"block.{n}.attention", PruneHeads(keep=2)) for n in range(3)),
    "neurons": tuple((f"block.{n}.ffn", PruneNeurons(keep=16)) for n in range(3)),
    "rank": (("block.0.attention", LowRank(rank=4)), ("block.1.ffn", LowRank(rank=4))),
    "blocks": ((MODEL_SITE, DropBlocks(blocks=(1,))),),
    "the first block": ((MODEL_SITE, DropBlocks(blocks=(0,))), ("block.1.ffn", PruneNeurons(keep=24))),
}


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_what_least_squares_lead_to(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr(module, "RIDGE", 1e-12)
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(50, 6, generator=generator) + 2
    wanted = torch.randn(50, 3, generator=generator)
    layer = nn.Linear(6, 3, bias=bias)
    sums = module._Sums(layer)
    missing = wanted - layer(read).detach()
    for part in (slice(0, 20), slice(20, 50)):
        sums.count(read[part], missing[part])
    sums.fit()
    with_ones = torch.cat([read, torch.ones(50, 1)], dim=1) if bias else read
    expected = torch.linalg.lstsq(with_ones, wanted).solution
    assert torch.allclose(layer.weight.T, expected[:6], atol=1e-4)
    assert not bias or torch.allclose(layer.bias, expected[6], atol=1e-4)


def test_the_pull_is_towards_the_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # One input of variance 1 about its mean, one output that should be twice the input: half way there at a pull of 1.
    monkeypatch.setattr(module, "RIDGE", 1.0)
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(0.0)
    sums = module._Sums(layer)
    sums.count(torch.tensor([[4.0], [6.0]]), torch.tensor([[4.0], [6.0]]))
    sums.fit()
    assert layer.weight.item() == pytest.approx(1.5)
    assert layer.bias.item() == pytest.approx(10 - 1.5 * 5), "right in the mean"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(family: str) -> EncoderModel:
    return understand(make_model(family, labels=LABELS), base=family)


@pytest.fixture(scope="module")
def batches(family: str, tiny_csv: Path) -> list[Batch]:
    loaded = task.load(DataConfig(source=str(tiny_csv), search_rows=60))
    return list(loaded.tokenized(make_tokenizer(family), 32)["train"].head(64).in_order_of_length(16))


def pruned(whole: EncoderModel, batches: Sequence[Batch], plan: CompressionPlan) -> EncoderModel:
    built = whole.clone()
    apply_plan(built, plan, importance(whole, batches))
    return built


def wanted_of(whole: EncoderModel, batches: Sequence[Batch]) -> Wanted:
    found = list(sums_in(whole, batches))
    return lambda block, role: found[block][role]


def fit(built: EncoderModel, whole: EncoderModel, plan: CompressionPlan, batches: Sequence[Batch]) -> None:
    blocks = recovery.counterparts(plan, len(whole.shape.blocks))
    reconstruct(built, wanted_of(whole, batches), blocks, batches)


def end_of(model: EncoderModel, batches: Sequence[Batch]) -> torch.Tensor:
    """Return what leaves the last block, ``tokens x hidden``, without padding."""
    found: list[torch.Tensor] = []
    handle = model.block_list()[-1].register_forward_hook(
        lambda _, __, output: found.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad():
        for batch in batches:
            model.module(**batch.inputs())
    handle.remove()
    return torch.cat([each[batch.attention_mask.bool()] for each, batch in zip(found, batches, strict=True)])


@pytest.mark.parametrize("name", PLANS)
def test_the_end_of_the_last_block_comes_nearer(whole: EncoderModel, batches: list[Batch], name: str) -> None:
    plan = CompressionPlan(PLANS[name])
    built = pruned(whole, batches, plan)
    wanted, before = end_of(whole, batches), end_of(built, batches)
    shapes = {key: value.shape for key, value in built.module.state_dict().items()}
    fit(built, whole, plan, batches)
    after = end_of(built, batches)
    assert (after - wanted).square().mean() < 0.8 * (before - wanted).square().mean()
    assert {key: value.shape for key, value in built.module.state_dict().items()} == shapes


@pytest.mark.parametrize("name", PLANS)
def test_what_layers_read_in_the_end_is_returned(whole: EncoderModel, batches: list[Batch], name: str) -> None:
    plan = CompressionPlan(PLANS[name])
    built = pruned(whole, batches, plan)
    blocks = recovery.counterparts(plan, len(whole.shape.blocks))
    found = reconstruct(built, wanted_of(whole, batches), blocks, batches)
    for mine, its in zip(found, take_moments(built, batches), strict=True):
        assert mine.keys() == its.keys()
        for role, moments in its.items():
            assert torch.allclose(mine[role].mean, moments.mean, atol=1e-4), role
            assert torch.allclose(mine[role].second, moments.second, atol=1e-3), role


def test_before_the_first_change_nothing_is_fitted(whole: EncoderModel, batches: list[Batch]) -> None:
    plan = CompressionPlan((("block.1.ffn", PruneNeurons(keep=16)), ("block.2.attention", PruneHeads(keep=2))))
    depth, built, again = len(whole.shape.blocks), *(pruned(whole, batches, plan) for _ in range(2))
    assert recovery.first_other(plan, depth) == 1
    blocks, before = recovery.counterparts(plan, depth), built.linear(0, "ffn_out").weight.clone()
    found = reconstruct(built, wanted_of(whole, batches), blocks, batches, since=1)
    assert torch.equal(built.linear(0, "ffn_out").weight, before)
    fit(again, whole, plan, batches)
    for name, value in built.module.state_dict().items():
        assert torch.allclose(value, again.module.state_dict()[name], atol=1e-4), name
    assert [len(moments) for moments in found] == [0, 4, 4]


@pytest.mark.parametrize(
    ("plan", "first"),
    [
        (PLANS["heads"], 0),
        (PLANS["rank"], 0),
        (PLANS["rank"][1:], 1),
        (PLANS["blocks"], 0),
        (PLANS["the first block"], 0),
        (((MODEL_SITE, DropBlocks(blocks=(2,))),), 1),
        ((("block.2.ffn", Quantize(weight_bits=8)),), 3),
    ],
)
def test_the_first_change_is_where_something_goes_or_one_stands_for_several(
    plan: tuple[tuple[str, Decision], ...], first: int
) -> None:
    assert recovery.first_other(CompressionPlan(plan), 3) == first
    student = (MODEL_SITE, Student(blocks=(0, 2, 4), heads=2, neurons=32))
    assert recovery.first_other(CompressionPlan((*plan, student)), 3) == first


def test_only_what_adds_to_what_runs_through_is_changed(whole: EncoderModel, batches: list[Batch]) -> None:
    plan = CompressionPlan(PLANS["rank"] + PLANS["blocks"])
    built = pruned(whole, batches, plan)
    before = {name: value.clone() for name, value in built.module.state_dict().items()}
    fit(built, whole, plan, batches)
    changed = {name for name, value in built.module.state_dict().items() if not torch.equal(value, before[name])}
    adding = {built.layout.path(n, role) for n in range(2) for role in ("output", "ffn_out")}
    factors = {f"{path}.1" for path in adding if isinstance(built.module.get_submodule(path), nn.Sequential)}
    assert factors, "the plan has them"
    paths = {path for path in adding if f"{path}.1" not in factors} | factors
    assert changed <= {f"{path}.{what}" for path in paths for what in ("weight", "bias")}
    assert {name.rpartition(".")[0] for name in changed} == paths


def test_a_whole_model_stays_as_it_is(whole: EncoderModel, batches: list[Batch]) -> None:
    built = whole.clone()
    fit(built, whole, CompressionPlan(), batches)
    for name, value in built.module.state_dict().items():
        assert torch.allclose(value, whole.module.state_dict()[name], atol=1e-5), name


def test_padding_counts_for_nothing(whole: EncoderModel, batches: list[Batch]) -> None:
    plan = CompressionPlan(PLANS["neurons"])
    found = []
    for extra in (0, 5):
        padded = [
            Batch(
                nn.functional.pad(batch.input_ids, (0, extra)),
                nn.functional.pad(batch.attention_mask, (0, extra)),
                None if batch.token_type_ids is None else nn.functional.pad(batch.token_type_ids, (0, extra)),
                batch.labels,
                batch.rows,
            )
            for batch in batches[:2]
        ]
        built = pruned(whole, batches, plan)
        fit(built, whole, plan, padded)
        found.append(built.linear(2, "ffn_out").weight)
    assert torch.allclose(*found, atol=1e-4)


def test_blocks_that_begin_by_normalising(tiny_csv: Path) -> None:
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS}
    rest = {"intermediate_size": NEURONS, "vocab_size": len(VOCABULARY), "type_vocab_size": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    made = transformers.RobertaPreLayerNormConfig(**sizes, **rest, max_position_embeddings=64, initializer_range=0.15)
    model = transformers.RobertaPreLayerNormForSequenceClassification(made).eval()
    whole = understand(model, base="before")
    loaded = task.load(DataConfig(source=str(tiny_csv), search_rows=60))
    batches = list(loaded.tokenized(make_tokenizer("roberta"), 32)["train"].head(64).in_order_of_length(16))
    plan = CompressionPlan(PLANS["blocks"] + PLANS["neurons"][:2])
    built = pruned(whole, batches, plan)
    wanted, before = end_of(whole, batches), end_of(built, batches)
    fit(built, whole, plan, batches)
    assert (end_of(built, batches) - wanted).square().mean() < 0.8 * (before - wanted).square().mean()


def test_a_block_that_normalises_nothing_is_refused(tiny_csv: Path) -> None:
    whole = understand(make_model("bert", labels=LABELS), base="bert")
    loaded = task.load(DataConfig(source=str(tiny_csv), search_rows=60))
    batches = list(loaded.tokenized(make_tokenizer("bert"), 32)["train"].head(8).in_order_of_length(8))
    for name, layer in list(whole.block_list()[1].named_modules()):
        if isinstance(layer, nn.LayerNorm):
            whole.replace(f"{whole.layout.blocks}.1.{name}", nn.Identity())
    with pytest.raises(ModelError, match=r"block 1: nothing normalises"):
        fit(whole.clone(), whole, CompressionPlan(), batches)


def test_sums_are_what_is_normalised_next(tiny_csv: Path) -> None:
    whole = understand(make_model("bert", labels=LABELS), base="bert")
    loaded = task.load(DataConfig(source=str(tiny_csv), search_rows=60))
    [batch] = loaded.tokenized(make_tokenizer("bert"), 32)["train"].head(8).in_order_of_length(8)
    read: dict[str, torch.Tensor] = {}
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        layer = whole.module.get_submodule(f"{whole.layout.blocks}.1.{name}")
        layer.register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]}))
    found = list(sums_in(whole, [batch]))
    mask = batch.attention_mask.bool()
    assert len(found) == len(whole.shape.blocks)
    assert torch.equal(found[1]["output"], read["attention.output.LayerNorm"][mask])
    assert torch.equal(found[1]["ffn_out"], read["output.LayerNorm"][mask])


def test_sums_are_kept_in_half_of_the_bits(tmp_path: Path) -> None:
    found = [{"output": torch.randn(5, 4), "ffn_out": torch.randn(5, 4)} for _ in range(2)]
    save_sums(iter(found), tmp_path)
    again = read_sums(tmp_path, 1, "ffn_out")
    assert again.dtype == torch.float32
    assert torch.equal(again, found[1]["ffn_out"].bfloat16().float())


class TestDecision:
    def test_words_and_json(self) -> None:
        assert RECONSTRUCTED.words() == "reconstructed"
        assert Recover(epochs=2, reconstruct=True).words() == "reconstructed, recovered 2 epochs"
        plan = CompressionPlan(((MODEL_SITE, RECONSTRUCTED),))
        assert CompressionPlan.from_json(plan.to_json()) == plan
        assert "reconstruct" not in CompressionPlan(((MODEL_SITE, Recover(epochs=1)),)).to_json()

    @pytest.mark.parametrize("epochs", [0, 0.0])
    def test_no_training_is_something_only_with_it(self, epochs: float) -> None:
        assert Recover(epochs=epochs, reconstruct=True) == RECONSTRUCTED
        with pytest.raises(PlanError, match=r"Recover\.epochs: must be > 0"):
            Recover(epochs=epochs)

    @pytest.mark.parametrize("value", [False, -1, float("nan"), "0", None])
    def test_epochs_are_numbers(self, value: Any) -> None:
        with pytest.raises(PlanError, match=r"Recover\.epochs"):
            Recover(epochs=value, reconstruct=True)

    @pytest.mark.parametrize(
        ("option", "value"), [("hidden", 1), ("seeds", 2), ("quantized", True), ("l2", 0.1), ("patience", 1)]
    )
    def test_options_of_training_need_some(self, option: str, value: Any) -> None:
        with pytest.raises(PlanError, match=rf"Recover\.{option}: goes with epochs > 0"):
            Recover(epochs=0, reconstruct=True, **{option: value})

    def test_what_was_reconstructed_is_so_again(self) -> None:
        plan = CompressionPlan((("block.0.ffn", PruneNeurons(keep=16)),))
        wanted = Recover(epochs=2, hidden=1)
        assert not plan.recovered(wanted).of_type(Recover)[MODEL_SITE].reconstruct
        again = plan.recovered(RECONSTRUCTED).recovered(wanted)
        assert again.of_type(Recover) == {MODEL_SITE: Recover(epochs=2, hidden=1, reconstruct=True)}
        assert again.trained
        assert not plan.recovered(RECONSTRUCTED).trained
        assert not plan.trained

    def test_there_must_be_something_to_make_up_for(self) -> None:
        student, shared = (Student(blocks=(0, 1), heads=2, neurons=32, share=share) for share in (1, 2))
        pruned = CompressionPlan((("block.0.ffn", PruneNeurons(keep=16)),))
        assert pruned.reconstructible
        assert pruned.recovered(RECONSTRUCTED).reconstructible
        assert pruned.with_decision(MODEL_SITE, student).reconstructible
        assert not pruned.with_decision(MODEL_SITE, shared).reconstructible
        assert not CompressionPlan((("head", Quantize(weight_bits=8)),)).reconstructible
        assert not CompressionPlan(((MODEL_SITE, student),)).reconstructible
        assert not CompressionPlan(((MODEL_SITE, RECONSTRUCTED),)).reconstructible

    @pytest.mark.parametrize("value", [1, "yes", None])
    def test_it_is_true_or_false(self, value: Any) -> None:
        with pytest.raises(PlanError, match=r"Recover\.reconstruct: must be true or false"):
            Recover(epochs=1, reconstruct=value)

    def test_a_run_file_that_asks_for_nothing_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"recovery\.epochs: 0 trains nothing"):
            RunConfig.from_mapping({"recovery": {"epochs": 0}}, source="run.yaml")
        found = RunConfig.from_mapping({"recovery": {"epochs": 0, "reconstruct": True}}, source="run.yaml")
        assert found.recovery.epochs == 0


class TestInAWorkshop:
    PLAN = CompressionPlan(
        (
            ("block.0.attention", PruneHeads(keep=2)),
            ("block.1.ffn", PruneNeurons(keep=16)),
            ("block.1.ffn", Quantize(weight_bits=4, group_size=8)),
            ("block.2.ffn", Quantize(weight_bits=8, activation_bits=8)),
        )
    )

    @pytest.fixture
    def shops(
        self, tiny_run: Callable[..., RunConfig], tmp_path: Path, bert_headed_folder: Path
    ) -> Callable[..., Workshop]:
        """Return a factory of the same teacher on one fresh bank."""

        def make(*overrides: str, told: list[str] | None = None) -> Workshop:
            where = {"model.id": bert_headed_folder, "storage.bank": tmp_path / "bank"}
            given = [f"{key}={json.dumps(str(path))}" for key, path in where.items()]
            options = ["data.max_train_rows=40", "recovery.batch_size=8", "recovery.reconstruct=true"]
            heard = [] if told is None else told
            return Workshop(tiny_run([*given, *options, *overrides]), tmp_path / "artefacts", heard.append)

        return make

    def test_it_is_made_once_and_built_as_it_is(self, shops: Callable[..., Workshop], tmp_path: Path) -> None:
        told: list[str] = []
        shop = shops("recovery.epochs=0", told=told)
        plan = shop.recovering(self.PLAN)
        assert plan.of_type(Recover) == {MODEL_SITE: RECONSTRUCTED}, "options of training have no use"
        first = shop.build(plan, tmp_path / "first")
        [kept] = (tmp_path / "bank" / "reconstructed").glob("*/weights.safetensors")
        fitted = {f"{shop.teacher.layout.path(n, role)}" for n in range(3) for role in ("output", "ffn_out")}
        assert {name.rpartition(".")[0] for name in load_file(kept)} <= fitted, "the rest is known"
        other_bits = self.PLAN.with_decision("block.1.ffn", Quantize(weight_bits=16))
        assert shop.structured(other_bits.recovered(RECONSTRUCTED)).base == shop.structured(plan).base
        assert sum("reconstructing" in line for line in told) == 1
        assert not any("distilling" in line for line in told)
        again = shops("recovery.epochs=0").build(plan, tmp_path / "again")
        rows = shop.splits["search"].batch(range(20)).arrays()
        logits = [shop.runtime.load(artifact, shop.run.target).run(rows) for artifact in (first, again)]
        assert (logits[0] == logits[1]).all()
        plain = shop.build(self.PLAN, tmp_path / "plain")
        assert (shop.runtime.load(plain, shop.run.target).run(rows) != logits[0]).any()

    def test_it_stands_in_the_graph_of_what_it_was(self, shops: Callable[..., Workshop], tmp_path: Path) -> None:
        shop = shops("recovery.epochs=0")
        dropped = self.PLAN.without(Quantize).with_decision(MODEL_SITE, DropBlocks(blocks=(2,)))
        dropped = CompressionPlan(tuple((site, d) for site, d in dropped if not site.startswith("block.2")))
        plans = [self.PLAN, dropped]
        for number, plan in enumerate(plans):
            shop.build(plan, tmp_path / f"plain {number}")
        converted = set((tmp_path / "bank" / "templates").iterdir())
        rows = shop.splits["search"].batch(range(20))
        for number, plan in enumerate(plans):
            fitted = plan.recovered(RECONSTRUCTED)
            artifact = shop.build(fitted, tmp_path / f"fitted {number}")
            plain = shop.build(plan, tmp_path / f"plain {number}")
            assert abs(artifact.size_bytes - plain.size_bytes) < 0.02 * plain.size_bytes
            if not plan.of_type(Quantize):
                logits = shop.runtime.load(artifact, shop.run.target).run(rows.arrays())
                with torch.no_grad():
                    wanted = shop.structured(fitted).module(**rows.inputs()).logits
                assert torch.allclose(torch.from_numpy(logits), wanted, atol=1e-4)
        assert set((tmp_path / "bank" / "templates").iterdir()) == converted

    def test_what_one_plan_alone_starts_from_is_not_kept_for_ever(self, shops: Callable[..., Workshop]) -> None:
        shop = shops("recovery.epochs=0")
        kept = shop.activations(shop.base(None)[0])
        for neurons in (8, 16, 24):
            plan = CompressionPlan((("block.0.ffn", PruneNeurons(keep=neurons)),)).recovered(RECONSTRUCTED)
            built = shop.structured(plan)
            assert shop.activations(built) is shop.activations(built)
        assert shop.activations(shop.base(None)[0]) is kept
        assert len(shop._observed) == 2

    def test_other_rows_make_another_one(self, shops: Callable[..., Workshop]) -> None:
        few, many = (shops("recovery.epochs=0", f"data.reconstruction_rows={rows}") for rows in (20, 10**6))
        plan = few.recovering(self.PLAN)
        assert few.reconstruction_rows == 20
        assert many.reconstruction_rows == len(many.task.splits["train"])
        assert few.structured(plan).base != many.structured(plan).base
        trained = plan.recovered(Recover(epochs=0.2))
        assert few.structured(trained).base != many.structured(trained).base

    def test_training_goes_on_from_it(self, shops: Callable[..., Workshop]) -> None:
        told: list[str] = []
        shop = shops("recovery.epochs=1", told=told)
        with_it = shop.structured(shop.recovering(self.PLAN))
        assert [line.split()[0] for line in told if line.startswith(("reconstructing", "distilling a"))] == [
            "reconstructing",
            "distilling",
        ]
        without = shops("recovery.epochs=1", "recovery.reconstruct=false")
        assert without.structured(without.recovering(self.PLAN)).base != with_it.base

    def test_a_pruned_student_is_drawn_to_the_student(self, shops: Callable[..., Workshop]) -> None:
        shop = shops("recovery.epochs=0")
        student = Student(blocks=(0, 2), heads=4, neurons=32, hidden=16, epochs=0.1)
        shop.adopt(student, shop.cut(student))
        plan = self.PLAN.with_decision(MODEL_SITE, student).without(Quantize)
        plan = CompressionPlan(tuple((s, d) for s, d in plan if s != "block.2.ffn"))
        built, pruned = shop.structured(shop.recovering(plan)), shop.structured(plan)
        whole = shop.base(student)[0]
        batches = shop.calibration_batches()
        wanted = end_of(whole, batches)
        near, far = ((end_of(model, batches) - wanted).square().mean() for model in (built, pruned))
        assert near < far

    def test_blocks_that_are_run_several_times_are_refused(self, shops: Callable[..., Workshop]) -> None:
        shop = shops("recovery.epochs=1")
        shared = CompressionPlan(((MODEL_SITE, Student(blocks=(0,), heads=2, neurons=32, share=2)),))
        with pytest.raises(PlanError, match=r"Recover\.reconstruct must be false where blocks are run several times"):
            shop.check(shared.with_decision(MODEL_SITE, RECONSTRUCTED))
        assert not shop.recovering(shared).of_type(Recover)[MODEL_SITE].reconstruct
        with pytest.raises(PlanError, match=r"Recover\.epochs"):
            shops("recovery.epochs=0").recovering(shared)
