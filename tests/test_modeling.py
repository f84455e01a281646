"""Folders for transformers: every structure that a plan can lead to comes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from autocompress import machine
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
from autocompress.plan import CompressionPlan
from autocompress.transforms.prune import cut_to_blocks


def q(bits: int, activations: int = 8) -> Quantize:
    return Quantize(weight_bits=bits, activation_bits=activations, group_size=8 if bits < 8 else 0)


W4 = Quantize(weight_bits=4, group_size=16)
BITS = (("block.0.attention", q(8)), ("block.0.ffn", q(4)), ("embeddings", Quantize(weight_bits=8)), ("head", q(8)))
PLANS = {
    "nothing": (),
    "bits": BITS,
    "groups": (("block.0.attention", W4), ("block.1.ffn", W4), ("block.0.ffn", q(4, 16)), ("embeddings", W4)),
    "few bits": (("block.0.attention", q(3, 16)), ("block.0.ffn", q(2)), ("head", Quantize(weight_bits=16))),
    "widths": (("block.0.attention", PruneHeads(keep=2)), ("block.1.ffn", PruneNeurons(keep=24)), *BITS),
    "ranks": (("block.0.ffn", LowRank(rank=8)), ("block.0.ffn", q(8)), ("block.1.attention", LowRank(rank=8))),
    "fewer blocks": (("model", DropBlocks(blocks=(1,))), *BITS),
    "inputs": (("model", MaxTokens(tokens=6)), ("embeddings", TrimVocabulary(keep=40))),
    "fewer tokens": (("model", MaxTokens(tokens=6)), *BITS),
    "student": (("model", Student(blocks=(0, 2), heads=2, neurons=32, epochs=0.1)), *BITS),
    "narrow student": (("model", Student(blocks=(0, 1), heads=2, neurons=32, epochs=0.1, hidden=24)), ("head", q(8))),
    "shared": (("model", Student(blocks=(0,), heads=2, neurons=32, epochs=0.1, share=2, activation="relu")), *BITS[:2]),
}


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def shop(
    request: pytest.FixtureRequest,
    tiny_run: Callable[..., RunConfig],
    bert_headed_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Workshop:
    run = tiny_run([f"model.id={json.dumps(str(bert_headed_folder))}", f"target.runtime={request.param}"])
    return Workshop(run, tmp_path_factory.mktemp("hf"))


@pytest.mark.slow
@pytest.mark.parametrize("decisions", PLANS.values(), ids=PLANS.keys())
def test_what_comes_back_predicts_as_the_artefact(
    shop: Workshop, tmp_path: Path, decisions: tuple[object, ...]
) -> None:
    from transformers import AutoModelForSequenceClassification

    from autocompress.hf.modeling import compressed_model
    from autocompress.hf.program import PROGRAM, write_program
    from autocompress.hf.reload import read

    plan = CompressionPlan(decisions)  # type: ignore[arg-type]
    base, kept, pieces = shop.parted(plan)
    made = compressed_model(cut_to_blocks(base, kept), pieces, plan, shop.teacher_folder, shop.runtime)
    made.save_pretrained(tmp_path)
    program = tmp_path / "program" / PROGRAM
    program.parent.mkdir()
    inputs = list(next(shop.splits["search"].head(1).in_order_of_length(1)).inputs())
    write_program(made, inputs, 16, program)
    run_program = read(tmp_path / "program", "torch").run
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
        np.testing.assert_allclose(run_program(batch.arrays()), logits, atol=0.05 if decisions else 1e-4)
    with torch.no_grad():
        assert found(**batch.inputs(), labels=batch.labels).loss.isfinite()
        for dtype in (torch.float16, torch.bfloat16):
            for narrow in (AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype), found.to(dtype)):
                rough = narrow.eval()(**batch.inputs()).logits
                assert rough.dtype == dtype
                np.testing.assert_allclose(rough.float(), logits, atol=0.2)
            found = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        inside = found(**batch.inputs(), output_hidden_states=True)
        assert inside.hidden_states[-1].shape[0] == len(batch.rows)
        places = torch.arange(batch.input_ids.shape[1]).expand(batch.input_ids.shape).flip(1)
        assert not torch.allclose(found(**batch.inputs(), position_ids=places).logits, inside.logits)
        assert torch.equal(found(**batch.inputs(), return_dict=False)[0], inside.logits)
    saved = tmp_path / "again"
    found.save_pretrained(saved)
    again = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch.inputs()).logits, found(**batch.inputs()).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "distilbert", "sinusoidal distilbert", "electra"])
def test_every_family_comes_back(
    family: str, tiny_run: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    from autocompress.hf.modeling import compressed_model

    folder = tmp_path / "model"
    shutil.copytree(tiny_model(family.split()[-1]), folder)
    if "sinusoidal" in family:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, "sinusoidal_pos_embds": True}), encoding="utf-8")
    run = tiny_run([f"model.id={json.dumps(str(folder))}"])
    workshop = Workshop(run, tmp_path / "work")
    plan = CompressionPlan((*PLANS["widths"], *PLANS["inputs"][:1]))  # type: ignore[arg-type]
    base, kept, pieces = workshop.parted(plan)
    made = compressed_model(cut_to_blocks(base, kept), pieces, plan, workshop.teacher_folder, workshop.runtime)
    made.save_pretrained(tmp_path / "saved")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    session = workshop.runtime.load(workshop.build(plan, tmp_path / "artefact"), run.target)
    for batch in workshop.splits["search"].head(24).in_order_of_length(8):
        with torch.no_grad():
            logits = found(**batch.inputs()).logits.numpy()
        np.testing.assert_allclose(logits, session.run(batch.arrays()), atol=0.05)


@pytest.mark.slow
def test_products_with_4_bits_round_what_the_runtime_rounds(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autocompress.hf.modeling import compressed_model

    wide = Quantize(weight_bits=4, group_size=32)
    plan = CompressionPlan(tuple((f"block.{n}.{kind}", wide) for n in range(3) for kind in ("attention", "ffn")))
    session = shop.runtime.load(shop.build(plan, tmp_path / "artefact"), shop.run.target)
    [batch] = shop.splits["search"].head(24).in_order_of_length(24)
    expected = session.run(batch.arrays())

    def distance() -> float:
        base, kept, pieces = shop.parted(plan)
        made = compressed_model(cut_to_blocks(base, kept), pieces, plan, shop.teacher_folder, shop.runtime)
        with torch.no_grad():
            return float(np.abs(made(**batch.inputs()).logits.numpy() - expected).mean())

    followed = distance()
    monkeypatch.setattr(type(shop.runtime), "rounded_together", lambda *_: 0)
    of_floats = distance()
    if shop.runtime.name == "openvino" and not machine.has_vnni():
        assert followed == of_floats < 1e-5
    else:
        assert followed < 0.6 * of_floats


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
