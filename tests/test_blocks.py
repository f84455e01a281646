"""The picture of a plan, block by block."""

from __future__ import annotations

import dataclasses

from autocompress.anatomy import BlockShape, ModelShape
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
from autocompress.plan import CompressionPlan
from autocompress.report.blocks import BlockPicture, Picture

SHAPE = ModelShape(hidden=384, blocks=(BlockShape(heads=12, head_size=32, neurons=1536),) * 4, vocabulary=30_522)
WHOLE = BlockPicture(12, 1536, 0, 0, "w32", "w32")


def test_an_empty_plan_leaves_everything() -> None:
    found = Picture.of(CompressionPlan(), SHAPE)
    assert found == Picture(384, 30_522, "w32", "w32", 0, (WHOLE,) * 4, 1)


def test_each_part_is_told_as_it_becomes() -> None:
    plan = CompressionPlan(
        (
            ("model", DropBlocks(blocks=(1, 2))),
            ("model", MaxTokens(tokens=48)),
            ("embeddings", TrimVocabulary(keep=4096)),
            ("embeddings", Quantize(weight_bits=4, group_size=64)),
            ("block.0.attention", PruneHeads(keep=6)),
            ("block.0.attention", LowRank(rank=64)),
            ("block.1.ffn", PruneNeurons(keep=768)),
            ("block.1.ffn", Quantize(weight_bits=4, activation_bits=8, group_size=64)),
            ("head", Quantize(weight_bits=16)),
        )
    )
    found = Picture.of(plan, SHAPE)
    assert found is not None
    assert found.blocks == (BlockPicture(6, 1536, 64, 0, "w32", "w32"), BlockPicture(12, 768, 0, 0, "w32", "w4a8"))
    assert (found.rows, found.embedding_bits, found.head_bits, found.tokens) == (4096, "w4", "w16", 48)


def test_a_student_has_its_own_blocks() -> None:
    plan = CompressionPlan((("model", Student(blocks=(0, 2), heads=3, neurons=384, epochs=1, hidden=192, share=2)),))
    found = Picture.of(plan, SHAPE)
    assert found is not None
    assert found.blocks == (BlockPicture(3, 384, 0, 0, "w32", "w32"),) * 2
    assert (found.hidden, found.runs) == (192, 2)


def test_a_plan_that_does_not_fit_has_no_picture() -> None:
    assert Picture.of(CompressionPlan((("block.9.ffn", PruneNeurons(keep=2)),)), SHAPE) is None
    assert Picture.of(CompressionPlan((("elsewhere", PruneNeurons(keep=2)),)), SHAPE) is None


def test_a_shape_is_read_back_from_what_it_is_written_as() -> None:
    assert ModelShape.from_dict(dataclasses.asdict(SHAPE)) == SHAPE
