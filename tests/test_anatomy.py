"""Names and sizes of sites, and how structural decisions change them."""

from __future__ import annotations

from autocompress.anatomy import BlockShape, ModelShape, Site, before_drop
from autocompress.decisions import DropBlocks, PruneHeads, PruneNeurons, Quantize, Student
from autocompress.plan import MODEL_SITE, CompressionPlan

BLOCK = BlockShape(heads=12, head_size=32, neurons=1536)
SHAPE = ModelShape(hidden=384, blocks=(BLOCK,) * 6)


def test_sites_stand_in_the_order_of_the_forward_pass() -> None:
    names = list(SHAPE.sites())
    assert names[:3] == ["embeddings", "block.0.attention", "block.0.ffn"]
    assert names[-2:] == ["block.5.ffn", "head"]
    assert len(names) == 2 + 2 * 6
    assert all(site.name == name for name, site in SHAPE.sites().items())


def test_a_site_knows_its_widths() -> None:
    sites = ModelShape(hidden=384, blocks=(BlockShape(heads=5, head_size=32, neurons=777),)).sites()
    assert sites["block.0.attention"] == Site("block.0.attention", "attention", 160, 384, 5)
    assert sites["block.0.ffn"] == Site("block.0.ffn", "ffn", 777, 384, 777)
    assert sites["embeddings"] == Site("embeddings", "embedding", 0, 384, 0)
    assert sites["head"].kind == "head"


def test_the_largest_saving_rank_is_the_last_that_saves() -> None:
    for inner, outer in ((384, 384), (1536, 384), (160, 384), (3, 2), (1, 1), (7, 5)):
        rank = Site("x", "ffn", inner, outer, 1).largest_saving_rank()
        assert rank * (inner + outer) < inner * outer
        assert (rank + 1) * (inner + outer) >= inner * outer


def test_a_student_takes_its_blocks_and_widths() -> None:
    mixed = ModelShape(384, tuple(BlockShape(12, 32, 1000 + n) for n in range(6)))
    shape = mixed.of_student(Student(blocks=(0, 2, 5), heads=4, neurons=512))
    assert shape == ModelShape(384, (BlockShape(4, 32, 512),) * 3)


def test_a_student_of_another_architecture_keeps_it_through_all_that_follows() -> None:
    student = Student(blocks=(1, 3), heads=4, neurons=512, activation="relu", hidden=192, share=2)
    expected = ModelShape(192, (BlockShape(4, 32, 512),) * 2, activation="relu", runs=2)
    assert SHAPE.of_student(student) == SHAPE.after([(MODEL_SITE, student)]) == expected
    # One site for each set of weights, as wide as the student.
    assert list(expected.sites()) == [
        "embeddings",
        *(f"block.{n}.{kind}" for n in (0, 1) for kind in ("attention", "ffn")),
        "head",
    ]
    assert {site.outer for site in expected.sites().values()} == {192}
    rest = SHAPE.after(
        [(MODEL_SITE, student), (MODEL_SITE, DropBlocks(blocks=(0,))), ("block.0.attention", PruneHeads(keep=1))]
    )
    assert rest == ModelShape(192, (BlockShape(1, 32, 512),), activation="relu", runs=2)
    assert expected.without(DropBlocks(blocks=(0,))).pruned(0, heads=1) == rest


def test_dropping_and_pruning_apply_in_order() -> None:
    mixed = ModelShape(384, tuple(BlockShape(12, 32, 100 * (n + 1)) for n in range(4)))
    plan = CompressionPlan(
        (
            (MODEL_SITE, DropBlocks(blocks=(0, 2))),
            ("block.1.attention", PruneHeads(keep=3)),
            ("block.0.ffn", PruneNeurons(keep=50)),
            ("head", Quantize(weight_bits=16)),
        )
    )
    # Blocks 1 and 3 remain and are numbered anew before they are pruned.
    assert mixed.after(plan) == ModelShape(384, (BlockShape(12, 32, 50), BlockShape(3, 32, 400)))


def test_blocks_are_dropped_from_the_student_where_there_is_one() -> None:
    plan = CompressionPlan(
        ((MODEL_SITE, DropBlocks(blocks=(2,))), (MODEL_SITE, Student(blocks=(1, 3, 5), heads=2, neurons=64)))
    )
    assert SHAPE.after(plan) == ModelShape(384, (BlockShape(2, 32, 64),) * 2)


def test_an_empty_plan_changes_nothing() -> None:
    assert SHAPE.after(CompressionPlan()) == SHAPE


def test_pruning_one_side_of_a_block_leaves_the_other() -> None:
    assert SHAPE.pruned(2, heads=4).blocks[2] == BlockShape(4, 32, 1536)
    assert SHAPE.pruned(5, neurons=96).blocks == (*SHAPE.blocks[:5], BlockShape(12, 32, 96))


def test_names_before_blocks_were_dropped() -> None:
    assert [before_drop(f"block.{n}.ffn", (0, 2, 5)) for n in range(3)] == ["block.0.ffn", "block.2.ffn", "block.5.ffn"]
    assert before_drop("embeddings", (1,)) == "embeddings"
