"""Folders for transformers: stored numbers come back, and so does every structure that a plan can lead to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.config import RunConfig
from autocompress.decisions import (
    DropBlocks,
    LowRank,
    MaxTokens,
    PruneHeads,
    PruneNeurons,
    Quantize,
    Student,
    TrimVocabulary,
)
from autocompress.errors import ModelError
from autocompress.evaluate import Workshop
from autocompress.hf.packed import PackedEmbedding, PackedLinear, Stored
from autocompress.pieces import Factor
from autocompress.plan import CompressionPlan
from autocompress.transforms.prune import keep_blocks
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


def made(holder: type[PackedLinear] | type[PackedEmbedding], factor: Factor, *, half: bool = False) -> nn.Module:
    """Return a layer that came back from its own state."""
    stored = Stored.of(factor, half=half)
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
    assert held <= weight.stored_bytes + 6 * 4


def test_inputs_of_integer_products_are_rounded_to_their_grid() -> None:
    span = ActivationRange.around(-1.0, 2.0)
    step = (span.high - span.low) / 255
    layer = made(PackedLinear, Factor(packed(np.eye(4, dtype=np.float32), None), None, span))
    read = torch.tensor([[-5.0, 0.0, 0.4 * step, 7.0]])
    assert layer(read)[0].tolist() == pytest.approx([span.low, 0.0, 0.0, span.high], abs=1e-6)


def test_a_trimmed_table_reads_the_row_that_stands_for_a_token() -> None:
    index = np.array([2, 0, 0, 5], dtype=np.uint16)
    weight = packed(WEIGHT, Quantize(weight_bits=4, group_size=8), looked_up=True)
    table = made(PackedEmbedding, Factor(weight, index=index))
    found = table(torch.tensor([[0, 3], [1, 2]]))
    np.testing.assert_array_equal(found.numpy(), weight.restored()[[[2, 5], [0, 0]]])


def test_rows_of_8_bits_may_be_unpacked_in_half_precision() -> None:
    weight = packed(WEIGHT, Quantize(weight_bits=8), looked_up=True)
    assert weight.scales is not None
    found = made(PackedEmbedding, Factor(weight), half=True)(torch.tensor([1, 4])).numpy()
    wanted = weight.values[[1, 4]].astype(np.float16) * weight.scales[[1, 4]].astype(np.float16)
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


def q(bits: int, activations: int = 8) -> Quantize:
    return Quantize(weight_bits=bits, activation_bits=activations, group_size=8 if bits < 8 else 0)


BITS = (("block.0.attention", q(8)), ("block.0.ffn", q(4)), ("embeddings", Quantize(weight_bits=8)), ("head", q(8)))
PLANS = {
    "nothing": (),
    "bits": BITS,
    "few bits": (("block.0.attention", q(3, 16)), ("block.0.ffn", q(2)), ("head", Quantize(weight_bits=16))),
    "widths": (("block.0.attention", PruneHeads(keep=2)), ("block.1.ffn", PruneNeurons(keep=24)), *BITS),
    "ranks": (("block.0.ffn", LowRank(rank=8)), ("block.0.ffn", q(8)), ("block.1.attention", LowRank(rank=8))),
    "fewer blocks": (("model", DropBlocks(blocks=(1,))), *BITS),
    "inputs": (("model", MaxTokens(tokens=6)), ("embeddings", TrimVocabulary(keep=40))),
    "student": (("model", Student(blocks=(0, 2), heads=2, neurons=32, epochs=0.1)), *BITS),
    "narrow student": (("model", Student(blocks=(0, 1), heads=2, neurons=32, epochs=0.1, hidden=24)), ("head", q(8))),
    "shared": (("model", Student(blocks=(0,), heads=2, neurons=32, epochs=0.1, share=2, activation="relu")), *BITS[:2]),
}


@pytest.fixture(scope="module")
def shop(
    tiny_run: Callable[..., RunConfig], bert_headed_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Workshop:
    run = tiny_run([f"model.id={json.dumps(str(bert_headed_folder))}"])
    return Workshop(run, tmp_path_factory.mktemp("hf"))


@pytest.mark.slow
@pytest.mark.parametrize("decisions", PLANS.values(), ids=PLANS.keys())
def test_what_comes_back_predicts_as_the_artefact(
    shop: Workshop, tmp_path: Path, decisions: tuple[object, ...]
) -> None:
    from transformers import AutoModelForSequenceClassification

    from autocompress.hf.modeling import write_folder

    plan = CompressionPlan(decisions)  # type: ignore[arg-type]
    base, kept, pieces = shop.parted(plan)
    model = base.clone()
    if len(kept) < len(model.shape.blocks):
        keep_blocks(model, kept)
    size = write_folder(model, pieces, plan, shop.teacher_folder, "openvino", tmp_path)
    assert 0 < size < 2 * sum(p.numel() * 4 for p in shop.teacher.module.parameters())
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(found).__name__ == "CompressedForSequenceClassification"
    assert found.config.id2label == dict(enumerate(shop.task.labels))
    artifact = shop.build(plan, tmp_path / "artefact")
    session = shop.runtime.load(artifact, shop.run.target)
    for batch in shop.splits["search"].head(24).in_order_of_length(8):
        with torch.no_grad():
            logits = found(**batch.inputs()).logits.numpy()
        # A step of 8 bits here or there where floats are added in another order.
        np.testing.assert_allclose(logits, session.run(batch.arrays()), atol=0.05 if decisions else 1e-4)
    with torch.no_grad():
        assert found(**batch.inputs(), labels=batch.labels).loss.isfinite()
    saved = tmp_path / "again"
    found.save_pretrained(saved)
    again = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch.inputs()).logits, found(**batch.inputs()).logits)


LAST = "print(type(AutoConfig.for_model('autocompress')).__name__)"
FIRST_US = "import sys, autocompress; assert not {'torch', 'transformers'} & set(sys.modules)"


@pytest.mark.parametrize(
    "lines",
    [
        (FIRST_US, "from transformers import AutoConfig"),
        (FIRST_US, "from transformers import AutoModel, AutoConfig"),
        ("import transformers", "import autocompress", "from transformers import AutoConfig"),
        ("from transformers import AutoModel, AutoConfig", "import autocompress"),
        ("import autocompress.hf.modeling", "from transformers import AutoConfig"),
        ("import autocompress.hf.config", "from transformers import AutoModel, AutoConfig"),
    ],
)
def test_transformers_knows_our_class_whoever_comes_first(lines: tuple[str, ...]) -> None:
    program = "\n".join((*lines, LAST))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["CompressedConfig"], done.stderr


def one(layers: dict[str, object]) -> dict[str, object]:
    return {"runs": 1, "blocks": "", "tokens": 0, "layers": layers}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"format_version": 99}, "format_version must be 1, got 99"),
        ({"structure": {}}, "does not describe a compressed model"),
        ({"structure": one({"bert": ["pickle", []]})}, "unknown kind"),
        (
            {"structure": one({"no.such": ["relu", []]})},
            "does not describe",
        ),
    ],
)
def test_a_configuration_that_is_none_is_refused(
    bert_headed_folder: Path, config: dict[str, object], said: str
) -> None:
    from autocompress.hf.modeling import CompressedConfig, CompressedForSequenceClassification

    base = json.loads((bert_headed_folder / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(ModelError, match=said):
        CompressedForSequenceClassification(CompressedConfig(base=base, **config))
