"""Products are the matrices of the model that a plan leads to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import FAMILIES, LABELS, make_model
from helpers_plans import random_plans
from torch import nn

from autocompress.anatomy import BlockShape, ModelShape
from autocompress.binding import bind
from autocompress.decisions import DropBlocks, LowRank, Quantize, Student, TrimVocabulary
from autocompress.model import EncoderModel, understand
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.products import Product, Sizes, products_of
from autocompress.space import SearchSpace, shipped_spaces
from autocompress.transforms import apply_plan
from autocompress.transforms.importance import Importance
from autocompress.transforms.student import begun

W16, W4 = Quantize(weight_bits=16), Quantize(weight_bits=4, group_size=8)


def carried_out(of: EncoderModel, plan: CompressionPlan, seed: int) -> EncoderModel:
    """Return the model that ``plan`` makes of ``of``; what is kept is drawn, nothing is distilled."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(blocks: Sequence[BlockShape]) -> Importance:
        return Importance(
            tuple(torch.rand(b.heads, generator=generator) for b in blocks),
            tuple(torch.rand(b.neurons, generator=generator) for b in blocks),
        )

    built = of.clone()
    for student in plan.of_type(Student).values():
        built = begun(of, student, drawn(of.shape.blocks), torch.rand(of.shape.hidden, generator=generator))
    own = CompressionPlan(tuple((s, d) for s, d in plan if not isinstance(d, Student)))
    apply_plan(built, own, drawn(built.shape.blocks))
    for trim in plan.of_type(TrimVocabulary).values():
        built.replace(built.layout.embeddings[0], nn.Embedding(trim.keep, sizes_of_tokens(built)[1]))
    return built


def sizes_of_tokens(of: EncoderModel) -> tuple[int, int]:
    rows, width = of.module.get_parameter(f"{of.layout.embeddings[0]}.weight").shape
    return rows, width


def matrices(of: EncoderModel) -> tuple[list[tuple[int, int]], int]:
    """Return the sorted shapes of all linear layers and embeddings, and their parameters with biases."""
    layers = [m for m in of.module.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    shapes = [(layer.weight.shape[0], layer.weight.shape[1]) for layer in layers]
    return sorted(shapes), sum(p.numel() for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("name", shipped_spaces())
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_those_of_the_model(family: str, name: str) -> None:
    of = understand(make_model(family, labels=LABELS), base="test")
    space, sizes = bind(SearchSpace.load(name), of.shape, tokens=64), Sizes.of(of)
    for number, plan in enumerate([CompressionPlan(), *random_plans(space, 5 if name != "encoder-students" else 4, 1)]):
        products = [p for p in products_of(plan, of.shape, sizes) if p.kind != "index"]
        shapes, parameters = matrices(carried_out(of, plan, number))
        assert sorted((p.outer, p.inner) for p in products) == shapes, plan.words()
        assert sum(p.outer * p.inner + p.outer * p.bias for p in products) == parameters, plan.words()


def test_products_carry_the_bits_of_their_site() -> None:
    shape = ModelShape(hidden=32, blocks=(BlockShape(heads=4, head_size=8, neurons=64),) * 3)
    plan = CompressionPlan(
        (
            (MODEL_SITE, DropBlocks(blocks=(1,))),
            ("embeddings", Quantize(weight_bits=8)),
            ("block.1.ffn", LowRank(rank=6)),
            ("block.1.ffn", W4),
        )
    )
    products = products_of(plan, shape, Sizes(tables=((100, 32),), head=((32, 32), (2, 32))))
    assert products[0] == Product("embedding", 100, 32, 8, bias=False)
    ffn = [p for p in products if p.kind == "ffn"]
    assert ffn == [
        *[Product("ffn", 64, 32, 32), Product("ffn", 32, 64, 32)],
        *[Product("ffn", 6, 32, 4, 8, bias=False), Product("ffn", 64, 6, 4, 8)],
        *[Product("ffn", 6, 64, 4, 8, bias=False), Product("ffn", 32, 6, 4, 8)],
    ]
    trimmed = products_of(
        plan.with_decision("embeddings", TrimVocabulary(keep=7)),
        shape,
        Sizes(tables=((100, 32), (9, 32)), head=((2, 32),)),
    )
    assert trimmed[:3] == [
        Product("index", 100, 1, 16, bias=False),
        *[Product("embedding", 7, 32, 8, bias=False), Product("embedding", 9, 32, 8, bias=False)],
    ]
    assert TrimVocabulary(keep=2**16).index_bits == 16
    assert TrimVocabulary(keep=2**16 + 1).index_bits == 32
    assert [p.kind for p in products].count("attention") == 8
    assert [(p.kind, p.bits) for p in products[-2:]] == [("head", 32)] * 2


@pytest.mark.parametrize("classes", [2, 32])
def test_a_narrower_model_has_as_many_classes_and_rows(classes: int) -> None:
    sizes = Sizes(tables=((32, 32), (9, 32)), head=((32, 32), (classes, 32)))
    assert sizes.narrowed(32, 16) == Sizes(tables=((32, 16), (9, 16)), head=((16, 16), (classes, 16)))
    projected = Sizes(tables=((100, 8),), head=((32, 8), (32, 32), (2, 32)))
    assert projected.narrowed(32, 16) == Sizes(tables=((100, 8),), head=((16, 8), (16, 16), (2, 16)))
