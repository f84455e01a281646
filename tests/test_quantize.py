"""The arithmetic of quantisation: bounds of its errors, its grids, and the ranges of activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BLOCKS, FAMILIES, LABELS, make_tokenizer

from autocompress import machine, model, task
from autocompress.anatomy import Site
from autocompress.config import DataConfig
from autocompress.decisions import Quantize
from autocompress.errors import PlanError
from autocompress.transforms import quantize
from autocompress.transforms.quantize import (
    ActivationRange,
    Packed,
    check_groups,
    observe,
    packed,
    per_channel,
    per_group,
)


def ranges_of(loaded: model.EncoderModel, batches: list[task.Batch]) -> dict[str, ActivationRange]:
    """Return the range of every linear layer's input."""
    found = observe(loaded, batches)
    return {path: found.span(found.read_by(path)) for path in found.readers}


def weights(out: int = 24, width: int = 64, seed: int = 0) -> np.ndarray:
    """Return weights whose channels differ by orders of magnitude, with a few outliers."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((out, width)) * 10.0 ** rng.uniform(-4, 2, (out, 1))
    values[rng.random(values.shape) < 0.02] *= 20
    return values.astype(np.float32)


class TestPerChannel:
    def test_the_error_is_at_most_half_a_step(self) -> None:
        weight = weights()
        found = per_channel(weight)
        assert np.all(np.abs(found.restored() - weight) <= 0.5 * found.scales * (1 + 1e-5))

    def test_shapes_and_grid(self) -> None:
        found = per_channel(weights(5, 9))
        assert found.values.shape == (5, 9)
        assert found.values.dtype == np.int8
        assert found.scales.shape == (5, 1)
        assert found.scales.dtype == np.float32
        assert found.restored().shape == (5, 9)
        assert found.restored().dtype == np.float32

    def test_the_largest_weight_of_a_channel_is_the_end_of_its_grid(self) -> None:
        weight = weights()
        found = per_channel(weight)
        assert np.array_equal(np.abs(found.values).max(axis=1), np.full(24, 127))
        assert found.values.min() >= -127
        assert np.allclose(np.abs(found.restored()).max(axis=1), np.abs(weight).max(axis=1), rtol=1e-6)

    def test_rows_of_zeros_stay_zeros(self) -> None:
        weight = weights()
        weight[3] = 0
        found = per_channel(weight)
        assert np.isfinite(found.scales).all()
        assert np.all(found.scales > 0)
        assert not found.restored()[3].any()

    def test_the_weights_given_are_left_alone(self) -> None:
        weight = weights()
        before = weight.copy()
        per_channel(weight)
        per_group(weight, narrow(4))
        assert np.array_equal(weight, before)


NARROW = [(4, 16), (4, 8), (3, 8), (3, 16), (2, 8), (2, 16)]
"""Bits of weights and activations."""


def narrow(bits: int, activation_bits: int = 16, group_size: int = 16) -> Quantize:
    return Quantize(weight_bits=bits, activation_bits=activation_bits, group_size=group_size)


@pytest.mark.parametrize("group_size", [1, 2, 16, 64])
@pytest.mark.parametrize(("bits", "activation_bits"), NARROW)
class TestPerGroup:
    def test_shapes_and_grid(self, bits: int, activation_bits: int, group_size: int) -> None:
        found = per_group(weights(), narrow(bits, activation_bits, group_size))
        assert found.values.shape == (24, 64 // group_size, group_size)
        assert found.values.dtype == np.int8
        assert found.values.min() >= -(2 ** (bits - 1))
        assert found.values.max() <= 2 ** (bits - 1) - 1
        assert found.restored().shape == (24, 64)
        assert found.restored().dtype == np.float32
        if (bits, activation_bits) == (4, 16):
            assert found.multiples is None
            assert found.scales.shape == (24, 64 // group_size, 1)
            assert np.array_equal(found.scales, found.scales.astype(np.float16)), "steps are half-precision floats"
        else:
            assert found.scales.shape == (24, 1, 1)
            assert found.multiples.shape == (24, 64 // group_size, 1)
            assert found.multiples.dtype == np.int8
            assert found.multiples.all()
        assert found.scales.dtype == np.float32

    @pytest.mark.parametrize("largest", [64, 127])
    def test_unpacked_numbers_fit_into_what_is_multiplied(
        self, bits: int, activation_bits: int, group_size: int, largest: int
    ) -> None:
        found = per_group(weights(), narrow(bits, activation_bits, group_size), largest=largest)
        if found.multiples is not None:
            unpacked = found.values.astype(int) * found.multiples
            assert np.abs(unpacked).max() <= largest
            assert np.allclose(found.restored(), unpacked.reshape(24, 64) * found.scales[:, 0], rtol=1e-6)

    def test_the_squared_error_is_at_most_that_of_rounding(
        self, bits: int, activation_bits: int, group_size: int
    ) -> None:
        """Whatever step is taken, it is no worse than the one that clips nothing: half a step a weight at most.

        A step that is a multiple of a unit misses it by half a unit, and the largest value by as many.
        """
        weight = weights()
        grouped = weight.reshape(24, -1, group_size)
        found = per_group(weight, narrow(bits, activation_bits, group_size))
        error = np.square(found.restored().reshape(grouped.shape) - grouped).sum(axis=2)
        most = 2 ** (bits - 1) - 1
        step = np.abs(grouped).max(axis=2) / most
        off = 0 if found.multiples is None else found.scales[..., 0]
        # A multiple of one unit at least, which then stands in for smaller steps.
        bound = group_size * np.square(np.maximum(step, off) / 2 + (most + 0.5) * off / 2)
        assert np.all(error <= bound * (1 + 1e-2) + 1e-12)

    def test_searching_a_step_is_never_worse_than_clipping_nothing(
        self, bits: int, activation_bits: int, group_size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weight = weights(seed=1)
        grouped = weight.reshape(24, -1, group_size)
        decision = narrow(bits, activation_bits, group_size)

        def error() -> np.ndarray:
            restored = per_group(weight, decision).restored().reshape(grouped.shape)
            return np.asarray(np.square(restored.astype(np.float64) - grouped).sum(axis=2))

        searched = error()
        monkeypatch.setattr(quantize, "_CLIPS", ())
        plain = error()
        assert np.all(searched <= plain * (1 + 1e-5) + 1e-12)
        if group_size == 16:
            assert searched.sum() < 0.99 * plain.sum()

    def test_groups_of_zeros_stay_zeros(self, bits: int, activation_bits: int, group_size: int) -> None:
        weight = weights()
        weight[2] = 0
        weight[5, :group_size] = 0
        found = per_group(weight, narrow(bits, activation_bits, group_size))
        assert np.isfinite(found.scales).all()
        assert np.all(found.scales != 0)
        assert not found.restored()[2].any()
        assert not found.restored()[5, :group_size].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_turns_the_end_with_more_room_to_where_it_is_needed(bits: int, activation_bits: int, sign: int) -> None:
    """-2 to 1 at 2 bits: a group whose largest magnitude is positive needs a negative step to be kept exactly."""
    values = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.float32)
    weight = sign * np.tile(values, 8)[None]
    found = per_group(weight, narrow(bits, activation_bits, group_size=len(values)))
    assert np.allclose(found.restored(), weight, rtol=1e-3)
    steps = found.scales if found.multiples is None else found.multiples * found.scales
    assert np.all(np.sign(steps) == sign)


def test_weights_on_a_grid_are_kept_exactly() -> None:
    steps = np.random.default_rng(0).integers(-7, 8, (6, 32)).astype(np.float32)
    steps[:, ::16] = 7
    assert np.allclose(per_group(0.25 * steps, narrow(4)).restored(), 0.25 * steps, atol=1e-7)
    steps = np.random.default_rng(0).integers(-127, 128, (6, 32)).astype(np.float32)
    steps[:, 0] = 127
    assert np.allclose(per_channel(0.5 * steps).restored(), 0.5 * steps, atol=1e-5)


class TestPacked:
    @pytest.mark.parametrize(
        ("decision", "bits", "kind"),
        [
            (None, 32, np.float32),
            (Quantize(weight_bits=16), 16, np.float16),
            (Quantize(weight_bits=8), 8, np.int8),
            (Quantize(weight_bits=8, activation_bits=8), 8, np.int8),
            (narrow(4), 4, np.int8),
            (narrow(4, 8), 4, np.int8),
            (narrow(3, 8), 3, np.int8),
            (narrow(2), 2, np.int8),
        ],
    )
    def test_it_is_stored_as_the_decision_says(self, decision: Quantize | None, bits: int, kind: type) -> None:
        weight = weights(6, 32)
        found = packed(weight, decision)
        assert (found.bits, found.values.dtype, found.shape) == (bits, kind, (6, 32))
        assert (found.scales is None) == (bits >= 16)
        largest = np.abs(weight).max(axis=1, keepdims=True)
        steps = {32: 0, 16: 2.0**-11, 8: 0.5 / (64 if machine.adds_in_16_bits() else 127), 4: 1 / 7, 3: 1 / 3, 2: 1}
        assert np.all(np.abs(found.restored() - weight) <= steps[bits] * largest + 1e-6)
        one_a_row, one_a_group = 6 * 4, 6 * 2
        floats = {32: 0, 16: 0, 8: one_a_row, 4: 4 * one_a_group}.get(bits, 0)
        expected = floats if found.multiples is None else one_a_row + one_a_group
        assert sum(part.nbytes for part in (found.scales, found.multiples) if part is not None) == expected

    @pytest.mark.parametrize("overflows", [False, True])
    def test_eight_and_four_bits_are_those_of_the_arithmetic(
        self, monkeypatch: pytest.MonkeyPatch, overflows: bool
    ) -> None:
        monkeypatch.setattr(machine, "adds_in_16_bits", lambda: overflows)
        weight = weights()
        for decision, expected in (
            (Quantize(weight_bits=8), per_channel(weight, largest=64 if overflows else 127)),
            (narrow(4, group_size=32), per_group(weight, narrow(4, group_size=32))),
            (narrow(3, 8, 32), per_group(weight, narrow(3, 8, 32), largest=64 if overflows else 127)),
        ):
            found = packed(weight, decision)
            table = packed(weight, decision, looked_up=True)
            whole = per_channel(weight) if decision.weight_bits == 8 else per_group(weight, decision)
            assert np.array_equal(table.restored(), whole.restored()), "nothing is multiplied by a table"
            assert np.array_equal(found.values, expected.values)
            assert np.array_equal(found.scales, expected.scales)

    def test_restoring_gives_the_shape_of_the_matrix(self) -> None:
        values = np.arange(-8, 8, dtype=np.int8).reshape(2, 2, 4)
        scales = np.array([[[1.0], [2.0]], [[0.5], [4.0]]], dtype=np.float32)
        expected = [[-8, -7, -6, -5, -8, -6, -4, -2], [0, 0.5, 1, 1.5, 16, 20, 24, 28]]
        assert Packed(4, values, scales).restored().tolist() == expected
        multiples, units = np.array([[[1], [-2]], [[1], [3]]], dtype=np.int8), np.array([[[0.5]], [[2.0]]], np.float32)
        found = Packed(4, values, units, multiples).restored()
        assert found.tolist() == [[-4, -3.5, -3, -2.5, 4, 3, 2, 1], [0, 2, 4, 6, 24, 30, 36, 42]]

    def test_smaller_groups_with_the_same_steps_are_the_same_matrix(self) -> None:
        weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
        found = per_group(weight, narrow(4, group_size=32))
        smaller = found.regrouped(16)
        assert smaller.values.shape == (8, 4, 16)
        assert np.array_equal(smaller.restored(), found.restored())
        with pytest.raises(AssertionError, match="groups of 32 do not fall into such of 24"):
            found.regrouped(24)


def test_a_group_has_a_scale_of_its_own() -> None:
    weight = np.concatenate([np.full((1, 16), 0.001), np.full((1, 16), 100.0)], axis=1).astype(np.float32)
    assert np.allclose(per_group(weight, narrow(4)).restored(), weight, rtol=1e-3)
    assert not np.allclose(per_group(weight, narrow(4, group_size=32)).restored(), weight, rtol=1e-2)


def test_groups_that_do_not_fill_a_row_are_refused() -> None:
    with pytest.raises(PlanError, match=r"group_size: must divide the input width 40, got 16"):
        per_group(weights(4, 40), narrow(4))


def test_groups_are_checked_against_every_input_width() -> None:
    site = Site("block.0.ffn", "ffn", inner=96, outer=64, parts=96)
    check_groups(site, Quantize(weight_bits=4, group_size=32), rank=0)
    check_groups(site, Quantize(weight_bits=8), rank=7)
    with pytest.raises(PlanError, match=r"block\.0\.ffn: group_size must divide the input width 96, got 64"):
        check_groups(site, Quantize(weight_bits=4, group_size=64), rank=0)
    with pytest.raises(PlanError, match=r"block\.0\.ffn: group_size must divide the input width 40, got 32"):
        check_groups(site, Quantize(weight_bits=4, group_size=32), rank=40)


class TestActivationRange:
    @pytest.mark.parametrize("ends", [(-1.0, 2.0), (-3.7, 0.11), (0.5, 2.0), (-2.0, -0.5), (0.0, 0.0), (-1e-3, 1e4)])
    def test_it_holds_zero_exactly_and_nearly_what_was_seen(self, ends: tuple[float, float]) -> None:
        low, high = ends
        found = ActivationRange.around(low, high)
        step = (found.high - found.low) / 255
        assert step > 0
        assert found.low <= 0 <= found.high
        assert found.low / step == pytest.approx(round(found.low / step), abs=1e-6)
        # Moving zero onto the grid shifts both ends by half a step at most.
        assert found.low <= low + 0.5001 * step
        assert found.high >= high - 0.5001 * step
        assert found.high - found.low == pytest.approx(max(high, 0.0) - min(low, 0.0) or 255.0)

    @pytest.fixture(params=FAMILIES)
    def loaded(self, request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> model.EncoderModel:
        self.family = request.param
        return model.load(tiny_model(request.param), labels=LABELS)

    @pytest.fixture
    def rows(self, loaded: model.EncoderModel, tiny_csv: Path) -> task.Split:
        tokenizer = make_tokenizer(self.family)
        return task.load(DataConfig(source=str(tiny_csv), search_rows=60)).tokenized(tokenizer, 16)["train"].head(12)

    def test_every_linear_layer_has_one(self, loaded: model.EncoderModel, rows: task.Split) -> None:
        found = ranges_of(loaded, list(rows.in_order_of_length(4)))
        wanted = {p for site in loaded.shape.sites() if site != "embeddings" for p in loaded.layout.linears(site)}
        assert set(found) == wanted
        for number in range(BLOCKS):
            query, key = (found[loaded.layout.path(number, role)] for role in ("query", "key"))
            assert query == key, "layers that read the same tensor see the same range"

    def test_padding_does_not_count(self, loaded: model.EncoderModel, rows: task.Split) -> None:
        alone = ranges_of(loaded, list(rows.in_order_of_length(1)))
        padded = ranges_of(loaded, list(rows.in_order_of_length(12)))
        order = sorted(range(len(rows)), key=lambda row: len(rows.input_ids[row]))
        assert len(rows.input_ids[order[0]]) < len(rows.input_ids[order[-1]]), "some rows are padded"
        for path in alone:
            assert padded[path].low == pytest.approx(alone[path].low, rel=1e-3, abs=1e-4)
            assert padded[path].high == pytest.approx(alone[path].high, rel=1e-3, abs=1e-4)

    def test_it_is_the_mean_of_what_rows_reach(self, loaded: model.EncoderModel, rows: task.Split) -> None:
        lows, highs = [], []
        path = loaded.layout.path(1, "ffn_out")

        def note(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            lows.append(float(inputs[0].min()))
            highs.append(float(inputs[0].max()))

        handle = loaded.module.get_submodule(path).register_forward_pre_hook(note)
        with torch.no_grad():
            for batch in rows.in_order_of_length(1):
                loaded.module(**batch.inputs())
        handle.remove()
        expected = ActivationRange.around(float(np.mean(lows)), float(np.mean(highs)))
        found = ranges_of(loaded, list(rows.in_order_of_length(5)))[path]
        assert found.low == pytest.approx(expected.low, rel=1e-3, abs=1e-4)
        assert found.high == pytest.approx(expected.high, rel=1e-3, abs=1e-4)

    def test_what_is_kept_is_what_the_layers_read(self, loaded: model.EncoderModel, rows: task.Split) -> None:
        found = observe(loaded, list(rows.in_order_of_length(5)))
        tokens = sum(len(ids) for ids in rows.input_ids)
        for site in loaded.shape.sites():
            for path in loaded.layout.linears(site) if site != "embeddings" else ():
                read = found.read_by(path)
                assert read.shape[1] == loaded.module.get_submodule(path).in_features
                # ELECTRA's head holds the projection behind its embeddings too, which reads every token.
                pooled = site == "head" and "embeddings" not in path
                assert len(read) == (len(rows) if pooled else tokens)
        for number in range(BLOCKS):
            query, value = (found.read_by(loaded.layout.path(number, role)) for role in ("query", "value"))
            assert query is value, "one tensor is kept once"
            output, fed = (found.read_by(loaded.layout.path(number, role)) for role in ("output", "ffn_in"))
            assert not np.array_equal(output, fed)
        assert found.starts.tolist() == np.cumsum([0, *sorted(map(len, rows.input_ids))])[:-1].tolist()
        assert len(found.values) == 4 * BLOCKS + len(loaded.layout.linears("head"))

    def test_observing_leaves_the_model_as_it_is(self, loaded: model.EncoderModel, rows: task.Split) -> None:
        batch = rows.batch([0, 1])
        with torch.no_grad():
            before = loaded.module(**batch.inputs()).logits
            observe(loaded, [batch])
            assert torch.equal(loaded.module(**batch.inputs()).logits, before)
        assert not any(m._forward_pre_hooks for m in loaded.module.modules())
