"""Training with weights on the grid that they are stored on: what is computed with, what is learnt, what is shipped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS, make_model

from autocompress import machine, model, training
from autocompress.config import RunConfig
from autocompress.decisions import Decision, LowRank, PruneHeads, Quantize, Recover, Student, TrimVocabulary
from autocompress.errors import ConfigError, PlanError
from autocompress.evaluate import Workshop
from autocompress.model import EncoderModel
from autocompress.pieces import Piece
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.rounding import read_packed, rounded, save_packed
from autocompress.task import Split
from autocompress.transforms.quantize import Packed, packed

BITS = {
    "w8": Quantize(weight_bits=8),
    "w8a8": Quantize(weight_bits=8, activation_bits=8),
    "w4": Quantize(weight_bits=4, group_size=8),
    "w4a8": Quantize(weight_bits=4, activation_bits=8, group_size=8),
    "w3a8": Quantize(weight_bits=3, activation_bits=8, group_size=8),
    "w2": Quantize(weight_bits=2, group_size=16),
}
QUERY, HEAD = "bert.encoder.layer.0.attention.self.query", "classifier"


@pytest.fixture(params=BITS)
def decision(request: pytest.FixtureRequest) -> Quantize:
    return BITS[request.param]


@pytest.fixture
def tiny() -> EncoderModel:
    return model.understand(make_model("bert", labels=LABELS), base="test")


def of_sites(decision: Decision, *sites: str) -> CompressionPlan:
    return CompressionPlan(tuple((site, decision) for site in sites or ("block.0.attention", "head")))


def weight_of(built: EncoderModel, path: str = QUERY) -> torch.Tensor:
    return built.module.get_parameter(f"{path}.weight")


class TestRounding:
    def test_it_computes_with_what_would_be_stored(self, tiny: EncoderModel, decision: Quantize) -> None:
        before = {path: weight_of(tiny, path).detach().clone() for path in (QUERY, HEAD)}
        with rounded(tiny, of_sites(decision)):
            for path, weight in before.items():
                expected = packed(weight.numpy(), decision).restored()
                computed = tiny.module.get_submodule(path).weight.detach().numpy()
                assert np.array_equal(computed, expected)
                assert not np.array_equal(computed, weight.numpy())

    def test_gradients_go_through_as_if_nothing_was_rounded(self, tiny: EncoderModel, decision: Quantize) -> None:
        layer = tiny.module.get_submodule(QUERY)
        read = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        with rounded(tiny, of_sites(decision)):
            (layer(read) ** 2).sum().backward()
            gradient = layer.parametrizations.weight.original.grad  # type: ignore[union-attr]
        # The layer now has the rounded weights that the slope was taken at.
        layer.zero_grad()
        (layer(read) ** 2).sum().backward()
        assert torch.allclose(gradient, weight_of(tiny).grad)

    def test_what_was_computed_with_last_is_left_and_stored(self, tiny: EncoderModel, decision: Quantize) -> None:
        names = set(tiny.module.state_dict())
        layer = tiny.module.get_submodule(QUERY)
        with rounded(tiny, of_sites(decision)) as found:
            with torch.no_grad():
                layer.parametrizations.weight.original.mul_(1.7)  # type: ignore[union-attr]
            last = layer.weight.detach().clone()
        assert torch.equal(weight_of(tiny), last)
        assert np.array_equal(found.stored[QUERY].restored(), last.numpy())
        assert set(found.stored) == {*tiny.layout.linears("block.0.attention"), *tiny.layout.linears("head")}
        assert set(tiny.module.state_dict()) == names

    def test_grids_follow_the_weights_when_they_are_told_to(self, tiny: EncoderModel, decision: Quantize) -> None:
        layer = tiny.module.get_submodule(QUERY)
        with rounded(tiny, of_sites(decision)) as found:
            with torch.no_grad():
                layer.parametrizations.weight.original.mul_(8)  # type: ignore[union-attr]
            as_it_was = layer.weight.detach().clone()
            found.refit()
            again = layer.weight.detach().clone()
            wanted = packed(layer.parametrizations.weight.original.detach().numpy(), decision)  # type: ignore[union-attr]
        assert as_it_was.abs().max() < 0.5 * again.abs().max(), "they were cut off where the old grid ends"
        assert np.array_equal(again.numpy(), wanted.restored())

    def test_weights_of_16_bits_and_of_other_sites_are_left(self, tiny: EncoderModel) -> None:
        with rounded(tiny, of_sites(Quantize(weight_bits=16))) as found:
            assert not any("parametrizations" in name for name, _ in tiny.module.named_modules())
        assert found.stored == {}

    def test_tables_are_as_they_were_in_the_end(self, tiny: EncoderModel) -> None:
        [path, *_] = tiny.layout.embeddings
        before = weight_of(tiny, path).detach().clone()
        table = packed(before.numpy(), BITS["w4"], looked_up=True).restored()
        with rounded(tiny, of_sites(BITS["w4"], "embeddings"), {path: table}) as found:
            assert np.array_equal(weight_of(tiny, path).detach().numpy(), table)
        assert torch.equal(weight_of(tiny, path), before)
        assert found.stored == {}

    def test_a_training_that_fails_leaves_the_models_own_modules(self, tiny: EncoderModel) -> None:
        names = set(tiny.module.state_dict())
        with pytest.raises(KeyError), rounded(tiny, of_sites(BITS["w4a8"])):
            raise KeyError
        assert set(tiny.module.state_dict()) == names


def test_stored_weights_are_read_as_they_were_written(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    written = {f"layer.{name}": packed(weight, decision) for name, decision in BITS.items()}
    save_packed(written, tmp_path)
    read = read_packed(tmp_path)
    assert read.keys() == written.keys()
    for path, each in written.items():
        assert read[path].bits == each.bits
        for part, tensor in each.tensors().items():
            assert np.array_equal(read[path].tensors()[part], tensor)
    assert read_packed(tmp_path / "nowhere") == {}


PLAN = CompressionPlan(
    (
        ("embeddings", TrimVocabulary(keep=70)),
        ("embeddings", Quantize(weight_bits=4, group_size=8)),
        ("block.0.attention", PruneHeads(keep=2)),
        ("block.0.attention", BITS["w3a8"]),
        ("block.1.attention", LowRank(rank=8)),
        ("block.1.attention", BITS["w4"]),
        ("block.1.ffn", BITS["w2"]),
        ("block.2.ffn", BITS["w8a8"]),
        ("head", BITS["w8"]),
    )
)


@pytest.fixture
def shops(tiny_run: Callable[..., RunConfig], tmp_path: Path, bert_headed_folder: Path) -> Callable[..., Workshop]:
    """Return a factory of the same teacher on one fresh bank."""

    def make(*overrides: str) -> Workshop:
        where = {"model.id": bert_headed_folder, "storage.bank": tmp_path / "bank"}
        given = [f"{key}={json.dumps(str(path))}" for key, path in where.items()]
        options = ["data.max_train_rows=40", "recovery.batch_size=8", "recovery.learning_rate=0.003"]
        return Workshop(tiny_run([*given, *options, *overrides]), tmp_path / "artefacts")

    return make


def recovered(plan: CompressionPlan = PLAN, **options: Any) -> CompressionPlan:
    return plan.with_decision(MODEL_SITE, Recover(epochs=1, **options))


def weights_in(pieces: Mapping[str, Piece]) -> list[Packed]:
    return [
        factor.weight
        for site in sorted(pieces)
        if site != "embeddings"
        for layer in pieces[site]
        for factor in layer
        if factor.weight.bits <= 8
    ]


class TestRecovery:
    @pytest.mark.parametrize("options", [{}, {"patience": 0.5}], ids=["to the end", "early"])
    def test_what_is_shipped_is_what_was_trained_number_by_number(
        self, shops: Callable[..., Workshop], monkeypatch: pytest.MonkeyPatch, options: dict[str, float]
    ) -> None:
        """Also in a process that finds it in the bank. Weights of the model are those that the artefact has."""
        shop, plan = shops(), recovered(quantized=True, **options)
        computed: dict[str, torch.Tensor] = {}
        distill = training.distill

        def noting(module: torch.nn.Module, *arguments: Any, **given: Any) -> None:
            distill(module, *arguments, **given)
            linear = {name: m for name, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
            computed.update({name: m.weight.detach().clone() for name, m in linear.items()})

        monkeypatch.setattr(training, "distill", noting)
        trained = shop.structured(plan)
        layers = {name: m for name, m in trained.module.named_modules() if isinstance(m, torch.nn.Linear)}
        assert all(torch.equal(layer.weight, computed[name]) for name, layer in layers.items())
        monkeypatch.setattr(training, "distill", lambda *_, **__: pytest.fail("trained again"))
        for each in (shop, shops()):
            found = weights_in(each.stitched(plan)[1])
            assert len(found) == 4 + 2 * 4 + 2 + 2 + len(trained.layout.linears("head"))
            restored = [weight.restored() for weight in found]
            assert all(any(np.array_equal(r, layer.weight.detach()) for layer in layers.values()) for r in restored)

    def test_the_artefact_computes_what_was_trained(self, shops: Callable[..., Workshop], tmp_path: Path) -> None:
        """Weights alone are rounded here, so that torch and runtime agree; the table stays whole in the torch model.

        Where the CPU has instructions for it, OpenVINO rounds the inputs of 8-bit weights by itself.
        """
        only = [(s, Quantize(weight_bits=d.weight_bits, group_size=d.group_size)) for s, d in PLAN.narrow.items()]
        plan = recovered(CompressionPlan(tuple((s, d) for s, d in only if s != "embeddings")), quantized=True)
        shop = shops()
        session = shop.runtime.load(shop.build(plan, tmp_path / "built"), shop.run.target)
        batch = shop.splits["search"].batch([0, 7, 20, 33])
        with torch.no_grad():
            expected = shop.structured(plan).module(**batch.inputs()).logits.numpy()
        allowed = 1e-4 if machine.adds_in_16_bits() else 0.01 * np.abs(expected).max()
        assert np.allclose(session.run(batch.arrays()), expected, atol=allowed)

    def test_it_is_trained_with_the_table_that_is_shipped(
        self, shops: Callable[..., Workshop], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shop, seen = shops(), []
        [path, *_] = shop.teacher.layout.embeddings
        monkeypatch.setattr(
            training, "distill", lambda module, *_, **__: seen.append(module.get_submodule(path).weight.clone())
        )
        own = weight_of(shop.teacher, path).detach().clone()
        built = shop.structured(recovered(quantized=True))
        table = shop.stitched(recovered(quantized=True))[1]["embeddings"][0][0]
        assert table.index is not None
        assert np.array_equal(seen[0].detach().numpy(), table.weight.restored()[table.index])
        assert torch.equal(weight_of(built, path), own)

    def test_it_loses_less_to_rounding(self, shops: Callable[..., Workshop]) -> None:
        """At 2 bits in all blocks, against the same training without rounding: by the loss that is trained for."""
        shop = shops("recovery.hidden=0")
        sites = [site for site in shop.teacher.shape.sites() if site.startswith("block.")]
        rows: Split = shop.splits["train"]
        budget = training.TrainingBudget(epochs=1, learning_rate=1e-3, batch_size=8, precision="float32")
        losses = []
        for quantized in (True, False):
            plan = of_sites(BITS["w2"], *sites).with_decision(MODEL_SITE, Recover(epochs=20, quantized=quantized))
            built, pieces = shop.structured(plan), shop.stitched(plan)[1]
            with torch.no_grad():
                for site in sites:
                    for layer, path in zip(pieces[site], built.layout.linears(site), strict=True):
                        weight_of(built, path).copy_(torch.from_numpy(layer[0].weight.restored()))
            losses.append(training.held_loss(built.module, shop._teacher_logits, rows, range(len(rows)), budget))
        assert losses[0] < losses[1]

    def test_bits_are_part_of_what_was_trained_only_where_they_are_rounded(
        self, shops: Callable[..., Workshop]
    ) -> None:
        shop = shops()
        other = PLAN.with_decision("block.1.ffn", BITS["w3a8"])
        assert shop.structured(recovered()).base == shop.structured(recovered(other)).base
        bases = {shop.structured(recovered(plan, quantized=True)).base for plan in (PLAN, other)}
        assert len(bases | {shop.structured(recovered()).base}) == 3

    def test_few_bits_are_fitted_to_what_the_trained_layers_read(
        self, shops: Callable[..., Workshop], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shop = shops()
        plain, taken = weights_in(shop.stitched(recovered())[1]), Workshop._moments

        def of_the_teacher(shop: Workshop, base: EncoderModel, *of: Any) -> Any:
            return taken(shop, base, *of) if base is shop.teacher else pytest.fail("not needed")

        monkeypatch.setattr(Workshop, "_moments", of_the_teacher)
        eight = CompressionPlan(tuple((site, BITS["w8a8"]) for site in ("block.0.attention", "block.1.ffn")))
        shop.stitched(recovered(eight))
        shop.stitched(recovered(quantized=True))
        built = shop.structured(recovered())
        ffn = packed(weight_of(built, built.layout.linears("block.1.ffn")[0]).detach().numpy(), BITS["w2"])
        assert not any(w.shape == ffn.shape and np.array_equal(w.restored(), ffn.restored()) for w in plain)


class TestAskedFor:
    def test_it_is_off_where_nothing_is_rounded(self) -> None:
        whole = CompressionPlan((("block.0.ffn", Quantize(weight_bits=16)),))
        for plan, quantized in ((whole, False), (PLAN, True)):
            found = plan.recovered(Recover(epochs=1, quantized=True)).of_type(Recover)[MODEL_SITE]
            assert found.quantized is quantized

    def test_ids_of_other_plans_stay(self) -> None:
        assert "quantized" not in recovered().to_json()
        assert CompressionPlan.from_json(recovered(quantized=True).to_json()) == recovered(quantized=True)
        assert "with rounded weights" in recovered(quantized=True).words()

    @pytest.mark.parametrize("value", [1, "yes", None])
    def test_it_is_yes_or_no(self, value: Any) -> None:
        with pytest.raises(PlanError, match=r"Recover\.quantized: must be true or false"):
            Recover(epochs=1, quantized=value)

    def test_a_mean_is_on_no_grid(self) -> None:
        with pytest.raises(PlanError, match=r"Recover\.quantized: goes with 1 seed.*got 2"):
            Recover(epochs=1, quantized=True, seeds=2)
        with pytest.raises(ConfigError, match=r"recovery\.quantized: needs 1 in recovery\.seeds, got 2"):
            RunConfig.from_mapping({"recovery": {"quantized": True, "seeds": 2}}, source="run.yaml")

    def test_a_student_of_a_search_is_not_rounded(self, shops: Callable[..., Workshop]) -> None:
        student = CompressionPlan(((MODEL_SITE, Student(blocks=(0, 2), heads=2, neurons=20)),))
        first, second = (shops(*options).structured(student).base for options in ((), ("recovery.quantized=true",)))
        assert first == second
