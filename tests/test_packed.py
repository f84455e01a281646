"""Layers of PyTorch over stored numbers: what is stored comes back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.decisions import (
    Quantize,
)
from autocompress.hf.packed import PackedEmbedding, PackedLinear, Stored
from autocompress.pieces import Factor
from autocompress.transforms.quantize import ActivationRange, packed

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(6, 16)).astype(np.float32)
DECISIONS = {
    "whole": None,
    "w16": Quantize(weight_bits=16),
    "w8": Quantize(weight_bits=8),
    "w4": Quantize(weight_bits=4, group_size=8),
    "w4a8": Quantize(weight_bits=4, activation_bits=8, group_size=8),
    "w3": Quantize(weight_bits=3, group_size=8),
    "w2": Quantize(weight_bits=2, group_size=8),
}


def made(holder: type[PackedLinear] | type[PackedEmbedding], factor: Factor, **about: Any) -> nn.Module:
    """Return a layer that came back from its own state."""
    stored = Stored.of(factor, table=holder is PackedEmbedding, **about)
    first = holder(stored)
    first.fill(factor)
    second = holder(Stored(**json.loads(json.dumps(stored.to_dict()))))
    second.load_state_dict(first.state_dict())
    return second


@pytest.mark.parametrize("decision", DECISIONS.values(), ids=DECISIONS.keys())
def test_a_layer_multiplies_by_what_is_stored(decision: Quantize | None) -> None:
    weight, bias = packed(WEIGHT, decision), RNG.normal(size=6).astype(np.float32)
    layer = made(PackedLinear, Factor(weight, bias))
    read = torch.from_numpy(RNG.normal(size=(3, 16)).astype(np.float32))
    wanted = read.numpy() @ weight.restored().T + bias
    np.testing.assert_allclose(layer(read).numpy(), wanted, rtol=1e-5, atol=1e-5)
    held = sum(tensor.nbytes for name, tensor in layer.state_dict().items() if name != "bias")
    beside = sum(part.nbytes for part in (weight.scales, weight.multiples) if part is not None)
    assert held <= weight.values.size * weight.bits // 8 + beside + 6 * 4


def test_inputs_of_integer_products_are_rounded_to_their_grid() -> None:
    span = ActivationRange.around(-1.0, 2.0)
    step = (span.high - span.low) / 255
    layer = made(PackedLinear, Factor(packed(np.eye(4, dtype=np.float32), None), None, span))
    read = torch.tensor([[-5.0, 0.0, 0.4 * step, 7.0]])
    assert layer(read)[0].tolist() == pytest.approx([span.low, 0.0, 0.0, span.high], abs=1e-6)


def test_what_earlier_versions_wrote_takes_the_range_of_what_it_multiplies() -> None:
    layer = made(PackedLinear, Factor(packed(np.eye(4, dtype=np.float32), None)), anew="call")
    read = torch.tensor([[-5.0, 0.0, 0.4 * 12 / 255, 7.0]])
    assert layer(read)[0].tolist() == pytest.approx([-106 * 12 / 255, 0.0, 0.0, 149 * 12 / 255], abs=1e-6)


def test_a_trimmed_table_reads_the_row_that_stands_for_a_token() -> None:
    index = np.array([2, 0, 0, 5], dtype=np.uint16)
    weight = packed(WEIGHT, Quantize(weight_bits=4, group_size=8), looked_up=True)
    table = made(PackedEmbedding, Factor(weight, index=index))
    found = table(torch.tensor([[0, 3], [1, 2]]))
    np.testing.assert_array_equal(found.numpy(), weight.restored()[[[2, 5], [0, 0]]])


def test_rows_of_8_bits_are_those_that_openvino_looks_up() -> None:
    """To the last bit: what follows is rounded to 8 bits layer by layer."""
    weight = packed(WEIGHT, Quantize(weight_bits=8), looked_up=True)
    assert weight.scales is not None
    openvino = pytest.importorskip("openvino")
    op = openvino.opset13
    ids = op.parameter([-1], dtype=np.int64)
    values = op.convert(op.constant(weight.values), "f16")
    table = op.convert(op.multiply(values, op.constant(weight.scales.astype(np.float16))), "f32")
    graph = openvino.Model([op.gather(table, ids, op.constant(np.array(0)))], [ids])
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    read = np.array([1, 4])
    found = made(PackedEmbedding, Factor(weight))(torch.from_numpy(read)).numpy()
    np.testing.assert_array_equal(found, compiled([read])[0])


def test_other_numbers_give_another_matrix() -> None:
    factor = Factor(packed(WEIGHT, Quantize(weight_bits=8)))
    layer = made(PackedLinear, factor)
    read = torch.eye(16)
    first = layer(read)
    layer.load_state_dict(
        {name: -tensor if name == "scales" else tensor for name, tensor in layer.state_dict().items()}
    )
    assert torch.equal(layer(read), -first)
