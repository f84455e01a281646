"""Search spaces: what they accept, what they bind to, and that every plan finds back to its parameters."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from autocompress import strict_yaml
from autocompress.anatomy import BlockShape, ModelShape
from autocompress.binding import BoundSpace, bind, quantize_decision, students_of
from autocompress.config import validated
from autocompress.decisions import (
    DECISIONS,
    RECONSTRUCTED,
    DropBlocks,
    LowRank,
    MaxTokens,
    PruneHeads,
    PruneNeurons,
    Quantize,
    Recover,
    Student,
    TrimVocabulary,
)
from autocompress.errors import ConfigError, PlanError
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.seeds import uniform_ladder
from autocompress.space import SearchSpace, Value, shipped_spaces

MINILM = ModelShape(hidden=384, blocks=(BlockShape(heads=12, head_size=32, neurons=1536),) * 6, vocabulary=1000)
UNEVEN = ModelShape(
    hidden=120,
    blocks=tuple(
        BlockShape(heads=heads, head_size=10, neurons=neurons) for heads, neurons in ((3, 50), (12, 333), (7, 64))
    ),
    vocabulary=777,
)
SHAPES = {"minilm": MINILM, "uneven": UNEVEN}
DRAWS = 200


def space_of(text: str) -> SearchSpace:
    return validated(SearchSpace, strict_yaml.parse(f"schema: 1\nname: test\n{text}", "test.yaml"), "test.yaml")


def bound(text: str, shape: ModelShape = MINILM) -> BoundSpace:
    return bind(space_of(text), shape, tokens=64)


def draw(space: BoundSpace, rng: random.Random) -> tuple[CompressionPlan, dict[str, Value]]:
    params: dict[str, Value] = {}

    def choose(name: str, choices: Sequence[Value]) -> Value:
        assert name not in params
        assert len(choices) > 1
        params[name] = rng.choice(choices)
        return params[name]

    return space.decode(choose), params


def check_fits(plan: CompressionPlan, shape: ModelShape) -> None:
    """Check that every decision stands at a site of the compressed model and within its sizes."""
    student = next(iter(plan.of_type(Student).values()), None)
    base = shape.of_student(student) if student else shape
    dropped = plan.of_type(DropBlocks).get(MODEL_SITE)
    base = base.without(dropped) if dropped else base
    before, after = base.sites(), shape.after(plan).sites()
    for site, prune in (*plan.of_type(PruneHeads).items(), *plan.of_type(PruneNeurons).items()):
        assert 1 <= prune.keep < before[site].parts
    for site, low_rank in plan.of_type(LowRank).items():
        assert low_rank.rank <= after[site].largest_saving_rank()
    for site, quantize in plan.of_type(Quantize).items():
        if quantize.group_size:
            assert after[site].outer % quantize.group_size == 0
            assert after[site].inner % quantize.group_size == 0


@pytest.mark.parametrize("name", shipped_spaces())
@pytest.mark.parametrize("shape", SHAPES)
class TestShippedSpaces:
    def test_random_draws_find_back_to_their_parameters(self, name: str, shape: str) -> None:
        space = bind(SearchSpace.load(name), SHAPES[shape], tokens=64)
        rng = random.Random(f"{name} {shape}")
        plans = set()
        for _ in range(DRAWS):
            plan, params = draw(space, rng)
            check_fits(plan, SHAPES[shape])
            assert space.plan(params) == plan
            assert space.plan(space.parameters(plan)) == plan
            assert CompressionPlan.from_json(plan.to_json()) == plan
            plans.add(plan.plan_id)
        assert len(plans) > 1

    def test_every_seed_of_the_ladder_finds_back_to_its_parameters(self, name: str, shape: str) -> None:
        space = bind(SearchSpace.load(name), SHAPES[shape], tokens=64)
        seeds = list(uniform_ladder(space))
        plans = [space.plan(params) for params in seeds]
        assert len(seeds) >= 2
        assert len({plan.plan_id for plan in plans}) == len(plans)
        for plan in plans:
            check_fits(plan, SHAPES[shape])
            assert space.plan(space.parameters(plan)) == plan

    def test_the_way_back_names_the_same_parameters(self, name: str, shape: str) -> None:
        space = bind(SearchSpace.load(name), SHAPES[shape], tokens=64)
        for seed in range(20):
            plan, params = draw(space, random.Random(seed))
            assert set(space.parameters(plan)) == set(params)


def test_the_shipped_spaces_are_named_like_their_files() -> None:
    assert "encoder-joint" in shipped_spaces()
    for name in shipped_spaces():
        space = SearchSpace.load(name)
        assert space.name == name
        assert space.description


def test_single_axis_spaces_make_decisions_of_their_axis_only() -> None:
    allowed = {
        "encoder-bits": {Quantize},
        "encoder-pruning": {PruneHeads, PruneNeurons, DropBlocks},
        "encoder-rank": {LowRank},
        "encoder-students": {Student},
        "encoder-inputs": {MaxTokens, TrimVocabulary},
    }
    for name, kinds in allowed.items():
        space = bind(SearchSpace.load(name), MINILM, tokens=64)
        found = set()
        for seed in range(50):
            found |= {type(decision) for _, decision in draw(space, random.Random(seed))[0]}
        assert found == kinds


def test_the_full_space_makes_every_decision_and_trains_none_but_students() -> None:
    space = bind(SearchSpace.load("encoder-full"), MINILM, tokens=64)
    plans = [draw(space, random.Random(seed))[0] for seed in range(50)]
    assert {type(decision) for plan in plans for _, decision in plan} == set(DECISIONS.values())
    assert {decision for plan in plans for decision in plan.of_type(Recover).values()} == {RECONSTRUCTED}


def test_the_full_space_has_the_choices_of_all_others() -> None:
    full = SearchSpace.load("encoder-full")
    for name in shipped_spaces():
        space = SearchSpace.load(name)
        assert set(space.students.values()) <= set(full.students.values())
        assert set(space.max_tokens or ()) <= set(full.max_tokens or ())
        assert set(space.reconstruct or ()) <= set(full.reconstruct or ())
        assert (space.drop_blocks.at_most if space.drop_blocks else 0) <= full.drop_blocks.at_most  # type: ignore[union-attr]
        for rule in space.rules:
            [whole] = [other for other in full.rules if other.match == rule.match]
            for axis_name, axis in rule.axes().items():
                assert set(axis.choices) <= set(whole.axes()[axis_name].choices)


def test_the_ladder_starts_with_eight_bits_and_keeps_the_uncompressed_widths() -> None:
    space = bind(SearchSpace.load("encoder-joint"), MINILM, tokens=64)
    plan = space.plan(next(uniform_ladder(space)))
    assert {type(decision) for _, decision in plan} == {Quantize}
    assert {q.weight_bits for q in plan.of_type(Quantize).values()} == {8}


def test_the_ladder_holds_products_of_axes() -> None:
    space = bind(SearchSpace.load("encoder-joint"), MINILM, tokens=64)
    kinds = [frozenset(type(decision) for _, decision in space.plan(params)) for params in uniform_ladder(space)]
    for wanted in (
        {Student, Quantize},
        {PruneHeads, PruneNeurons, Quantize},
        {LowRank, Quantize},
        {DropBlocks, Quantize},
        {Student, DropBlocks, Quantize},
    ):
        assert frozenset(wanted) in kinds


def test_the_ladder_reads_the_axis_of_a_rule_whose_name_holds_dots() -> None:
    axes = "neurons: {choices: [1.0, 0.5], tie: all}, bits: {choices: [8, 16], tie: all}"
    rules = f"rules: [{{match: 'block.*.ffn', name: %s, {axes}}}]"
    plain, dotted = (bound(rules % name) for name in ("ffn", "all.the.ffn"))
    assert [plain.plan(p) for p in uniform_ladder(plain)] == [dotted.plan(p) for p in list(uniform_ladder(dotted))]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rules: [{match: '*', bits: [5]}]", ("rules.0.bits.choices.0:", "16, 8, 4, 3, 2, 'w4a8'", "got 5")),
        ("rules: [{match: '*', bits: [-8]}]", ("16, 8, 4, 3, 2, 'w4a8'", "got -8")),
        ("rules: [{match: '*', heads: [1.2]}]", ("rules.0.heads.choices.0:", "> 0 and <= 1", "got 1.2")),
        ("rules: [{match: '*', heads: [0]}]", ("whole count >= 1", "got 0")),
        ("rules: [{match: '*', heads: [-0.5]}]", ("> 0 and <= 1", "got -0.5")),
        ("rules: [{match: '*', neurons: [.nan]}]", ("rules.0.neurons.choices.0:", "> 0 and <= 1", "got nan")),
        ("rules: [{match: '*', neurons: [true]}]", ("whole count >= 1", "got True")),
        ("rules: [{match: '*', neurons: []}]", ("rules.0.neurons.choices:", "at least 1 item")),
        ("rules: [{match: '*', rank: [ful]}]", ("rules.0.rank.choices.0:", "got 'ful'")),
        ("rules: [{match: '*', rank: [1.5]}]", ("> 0 and <= 1", "got 1.5")),
        ("rules: [{match: '*', heads: [1.0, 0.5, 0.5]}]", ("heads: each choice may be given once",)),
        ("rules: [{match: '*', heads: [1.0, 1]}]", ("heads: each choice may be given once, got [1.0, 1]",)),
        (
            "rules: [{match: '*', heads: {choices: [0.5], tie: 0}}]",
            ("rules.0.heads.tie:", ">= 1, all or none", "got 0"),
        ),
        ("rules: [{match: '*', heads: {choices: [0.5], tie: some}}]", ("rules.0.heads.tie:", "got 'some'")),
        ("rules: [{match: '*', heads: {choices: [0.5], tie: 1.5}}]", ("rules.0.heads.tie:", "got 1.5")),
        ("rules: [{match: '*', haeds: [0.5]}]", ("test.yaml: rules.0.haeds: unknown key, did you mean heads?",)),
        ("rules: [{match: '', bits: [8]}]", ("rules.0.match:", "at least 1 character")),
        ("rules: [{match: '*', name: ../x, bits: [8]}]", ("rules.0.name:", "got '../x'")),
        ("students: {a: {haeds: 1}}", ("test.yaml: students.a.haeds: unknown key, did you mean heads?",)),
        ("students: {a: {heads: -1}}", ("students.a.heads:", "whole count >= 1", "got -1")),
        ("students: {a: {blocks: 1.5}}", ("test.yaml: students.a.blocks: must be a fraction > 0 and <= 1", "got 1.5")),
        ("students: {a: {blocks: [3, 1]}}", ("students.a.blocks:", "ascending block numbers >= 0", "got [3, 1]")),
        ("students: {a: {blocks: [-1, 1]}}", ("students.a.blocks:", "got [-1, 1]")),
        ("students: {a: {blocks: []}}", ("students.a.blocks:", "got []")),
        ("students: {a: {epochs: .nan}}", ("students.a.epochs:", "finite number", "got nan")),
        ("students: {a: {hidden: 0}}", ("students.a.hidden:", "whole count >= 1", "got 0")),
        ("students: {a: {hidden: 1.5}}", ("students.a.hidden:", "> 0 and <= 1", "got 1.5")),
        ("students: {a: {share: 0}}", ("students.a.share:", "greater than or equal to 1", "got 0")),
        ("students: {a: {share: 101}}", ("students.a.share:", "less than or equal to 100", "got 101")),
        ("students: {a: {share: 1.5}}", ("students.a.share:", "got 1.5")),
        ("students: {a: {activation: gelu}}", ("students.a.activation:", "relu", "got 'gelu'")),
        ("drop_blocks: {at_most: -1}", ("drop_blocks.at_most:", "greater than or equal to 0", "got -1")),
        ("max_tokens: [full, 0]", ("max_tokens.1:", "whole count >= 1", "got 0")),
        ("max_tokens: []", ("max_tokens:", "at least 1 item")),
        ("max_tokens: [full, 0.5, 0.5]", ("max_tokens: each choice may be given once",)),
        ("rules: [{match: '*', vocabulary: [0.0]}]", ("rules.0.vocabulary.choices.0:", "> 0 and <= 1", "got 0.0")),
        ("schema: 2", ("duplicate key 'schema'",)),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_range(text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(text)
    for part in ("test.yaml: ", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rules: [{match: 'layer.*', bits: [8, 4]}]",
            "pattern 'layer.*' matches no site; the model has embeddings, block.0",
        ),
        ("rules: [{match: 'block.6.ffn', bits: [8, 4]}]", "pattern 'block.6.ffn' matches no site"),
        ("rules: [{match: 'BLOCK.*', bits: [8, 4]}]", "pattern 'BLOCK.*' matches no site"),
        ("rules: [{match: 'head', heads: [1.0]}]", "heads at 'head' matches no site that has them (attention)"),
        (
            "rules: [{match: 'embeddings', rank: [0.5]}]",
            "rank at 'embeddings' matches no site that has them (attention, ffn)",
        ),
        (
            "rules: [{match: 'block.*.ffn', bits: [8, 4]}, {match: 'block.3.*', name: three, bits: [8]}]",
            "bits at block.3.ffn is decided by two rules",
        ),
        (
            "rules: [{match: 'block.0.ffn', bits: [8, 4]}, {match: 'block.1.ffn', bits: [8, 4]}]",
            "two rules share the parameters ffn.bits; give them names",
        ),
        (
            "rules: [{match: 'block.0.*', bits: [8, 16]}, {match: 'block.[1-5].ffn', bits: [8, 4]}]",
            "two rules share the parameter ffn.bits.1; give them names",
        ),
        ("rules: [{match: 'block.*.attention', heads: [13]}]", "heads at block.0.attention: must be <= 12, got 13"),
        ("rules: [{match: 'block.*.ffn', neurons: [2000]}]", "neurons at block.0.ffn: must be <= 1536, got 2000"),
        ("rules: [{match: 'block.*.ffn', rank: [385]}]", "rank at block.0.ffn: must be <= 384, got 385"),
        ("rules: [{match: embeddings, vocabulary: [1001]}]", "vocabulary at embeddings: must be <= 1000, got 1001"),
        ("rules: [{match: head, vocabulary: [5]}]", "vocabulary at 'head' matches no site that has them (embedding)"),
        ("students: {a: {blocks: [0, 6]}}", "students.a.blocks: must be < 6, got 6"),
        ("students: {a: {heads: 13}}", "students.a.heads: must be <= 12, got 13"),
        ("students: {a: {neurons: 1537}}", "students.a.neurons: must be <= 1536, got 1537"),
        ("students: {a: {hidden: 385}}", "students.a.hidden: must be <= 384, got 385"),
        ("students: {a: {blocks: [0, 1, 2], share: 3}}", "students.a.share: must be <= 2, got 3"),
        ("students: {a: {share: 7}}", "students.a.share: must be <= 6, got 7"),
        ("students: {a: {}}", "students.a: is as large as the model itself"),
        ("students: {a: {hidden: 384, share: 1}}", "students.a: is as large as the model itself"),
        ("students: {full: {heads: 2}}", "the name 'full' stands for the uncompressed model"),
    ],
)
def test_a_space_that_does_not_fit_the_model_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bound(text)
    assert message in str(caught.value)
    assert str(caught.value).startswith("space test: ")


def test_two_rules_may_share_a_site_on_different_axes() -> None:
    space = bound(
        "rules: [{match: 'block.*.ffn', bits: [8, 4]}, {match: 'block.0.*', name: first, neurons: [1.0, .5]}]"
    )
    plan = space.plan({"first.neurons.0": 0.5})
    assert plan.of_type(PruneNeurons) == {"block.0.ffn": PruneNeurons(keep=768)}
    assert len(plan.of_type(Quantize)) == 6


def test_an_axis_skips_matched_sites_that_do_not_have_it() -> None:
    plan = bound("rules: [{match: '*', heads: [0.5]}]").plan({})
    assert set(plan.of_type(PruneHeads)) == {f"block.{n}.attention" for n in range(6)}
    assert len(plan.decisions) == 6


@pytest.mark.parametrize(
    ("tie", "groups"),
    [
        ("none", [[0], [1], [2], [3], [4], [5]]),
        ("all", [[0, 1, 2, 3, 4, 5]]),
        ("1", [[0, 1, 2, 3, 4, 5]]),
        ("2", [[0, 1, 2], [3, 4, 5]]),
        ("4", [[0], [1, 2], [3], [4, 5]]),
        ("6", [[0], [1], [2], [3], [4], [5]]),
        ("99", [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_ties_make_groups_of_consecutive_blocks(tie: str, groups: list[list[int]]) -> None:
    space = bound(f"rules: [{{match: 'block.*.ffn', bits: {{choices: [16, 4], tie: {tie}}}}}]")
    found = []
    for group in range(len(groups)):
        bits = space.plan({f"ffn.bits.{group}": 4}).of_type(Quantize)
        found.append([int(site.split(".")[1]) for site, quantize in bits.items() if quantize.weight_bits == 4])
    assert found == groups
    with pytest.raises(ConfigError, match=rf"ffn\.bits\.{len(groups)}: not in this space"):
        space.plan({f"ffn.bits.{len(groups)}": 4})


def test_untied_parameters_of_a_shallower_student_are_fewer() -> None:
    space = bound("students: {half: {blocks: 0.5}}\nrules: [{match: 'block.*.ffn', bits: [16, 8]}]")
    assert len(space.plan({"student": "full"}).of_type(Quantize)) == 6
    assert len(space.plan({"student": "half"}).of_type(Quantize)) == 3
    with pytest.raises(ConfigError, match=r"ffn\.bits\.5: not in this space at this place"):
        space.plan({"student": "half", "ffn.bits.5": 8})


def test_a_rule_for_a_block_that_was_dropped_asks_nothing() -> None:
    space = bound("drop_blocks: {at_most: 1}\nrules: [{match: 'block.5.ffn', bits: [16, 8]}]")
    assert space.plan({"drop_blocks": 0, "ffn.bits.0": 8}).of_type(Quantize)
    plan = space.plan({"drop_blocks": 1})
    assert [type(decision) for _, decision in plan] == [DropBlocks]
    assert space.parameters(plan) == {"drop_blocks": 1}


def test_the_last_block_cannot_be_dropped() -> None:
    space = bound("drop_blocks: {at_most: 9}", ModelShape(384, MINILM.blocks[:3]))
    assert space.plan({"drop_blocks": 2}).of_type(DropBlocks)[MODEL_SITE].blocks == (1, 2)
    with pytest.raises(ConfigError, match=r"must be one of \[0, 1, 2\], got 3"):
        space.plan({"drop_blocks": 3})


def test_blocks_go_in_the_order_given_for_each_student() -> None:
    text = "students: {half: {blocks: 0.5}}\ndrop_blocks: {at_most: 2}"
    asked: list[str] = []

    def order(name: str) -> tuple[int, ...]:
        asked.append(name)
        return {"full": (4, 5, 0, 1, 2, 3), "half": (1, 2, 0)}[name]

    space = bind(space_of(text), MINILM, tokens=64, drop_order=order)
    space.plan({"student": "half", "drop_blocks": 0})
    assert asked == [], "only where blocks go, as a student may have to be distilled for its order"
    assert space.plan({"drop_blocks": 2}).of_type(DropBlocks)[MODEL_SITE].blocks == (4, 5)
    plan = space.plan({"student": "half", "drop_blocks": 1})
    assert plan.of_type(DropBlocks)[MODEL_SITE].blocks == (1,)
    assert asked == ["full", "half"]
    assert space.parameters(plan) == {"student": "half", "drop_blocks": 1}


@pytest.mark.parametrize(
    ("choice", "keep"),
    [("1.0", None), ("0.75", 9), ("0.5", 6), ("0.34", 4), ("0.01", 1), ("12", None), ("5", 5), ("1", 1)],
)
def test_heads_are_kept_by_fraction_or_by_count(choice: str, keep: int | None) -> None:
    plan = bound(f"rules: [{{match: 'block.0.attention', heads: [{choice}]}}]").plan({})
    assert plan.of_type(PruneHeads) == ({} if keep is None else {"block.0.attention": PruneHeads(keep=keep)})


@pytest.mark.parametrize(
    ("choice", "keep"), [("1.0", None), ("0.75", 1152), ("0.34", 512), ("0.001", 32), ("777", 777), ("1536", None)]
)
def test_neurons_are_kept_in_steps_of_32_or_exactly_by_count(choice: str, keep: int | None) -> None:
    plan = bound(f"rules: [{{match: 'block.0.ffn', neurons: [{choice}]}}]").plan({})
    assert plan.of_type(PruneNeurons) == ({} if keep is None else {"block.0.ffn": PruneNeurons(keep=keep)})


@pytest.mark.parametrize(
    ("choice", "rank"),
    [("full", None), ("1.0", None), ("0.5", 96), ("0.75", 128), ("191", 191), ("192", None), ("1", 1)],
)
def test_a_rank_that_saves_nothing_leaves_the_layer_whole(choice: str, rank: int | None) -> None:
    plan = bound(f"rules: [{{match: 'block.0.attention', rank: [{choice}]}}]").plan({})
    assert plan.of_type(LowRank) == ({} if rank is None else {"block.0.attention": LowRank(rank=rank)})


@pytest.mark.parametrize(("choice", "rank"), [("0.33", 48), ("0.25", 48), ("0.1", 16), ("0.03", 4), ("0.001", 1)])
def test_small_ranks_leave_groups_that_are_worth_their_steps(choice: str, rank: int) -> None:
    space = bound(f"rules: [{{match: 'block.0.attention', rank: [{choice}], bits: [4]}}]")
    plan = space.plan({})
    assert plan.of_type(LowRank)["block.0.attention"].rank == rank
    assert plan.of_type(Quantize)["block.0.attention"].group_size >= max(1, rank // 4)


def test_a_rank_follows_the_pruned_width() -> None:
    space = bound("rules: [{match: 'block.0.attention', heads: [0.5], rank: [0.5]}]")
    assert space.plan({}).of_type(LowRank)["block.0.attention"].rank == 64  # half of 192 * 384 / (192 + 384)


@pytest.mark.parametrize(("choice", "rows"), [("1.0", None), ("0.5", 512), ("0.01", 64), ("7", 7), ("1000", None)])
def test_rows_of_tokens_are_kept_by_fraction_or_by_count(choice: str, rows: int | None) -> None:
    space = bound(f"rules: [{{match: embeddings, vocabulary: [{choice}, 3], name: words}}]")
    plan = space.plan({"words.vocabulary.0": space.space.rules[0].vocabulary.choices[0]})
    assert plan.of_type(TrimVocabulary) == ({} if rows is None else {"embeddings": TrimVocabulary(keep=rows)})


def test_lengths_are_fractions_of_the_targets_or_counts() -> None:
    space = bound("max_tokens: [full, 0.5, 48]")
    found = [space.plan({"max_tokens": choice}).of_type(MaxTokens) for choice in ("full", 0.5, 48)]
    assert found == [{}, *({MODEL_SITE: MaxTokens(tokens=tokens)} for tokens in (32, 48))]
    assert space.options(MINILM)[MODEL_SITE] == [MaxTokens(tokens=32), MaxTokens(tokens=48)]
    assert [space.plan(params).of_type(MaxTokens) for params in uniform_ladder(space)] == found


def test_to_cut_where_no_text_is_longer_is_no_decision() -> None:
    text = {
        "schema": 1,
        "name": "test",
        "max_tokens": ["full", 0.5, 48, 600],
        "rules": [{"match": "head", "bits": [8]}],
    }
    space = bind(validated(SearchSpace, text, "test"), MINILM, tokens=64, most_tokens=48)
    assert space.lengths() == [0.5]
    assert len({space.plan({"max_tokens": choice}).plan_id for choice in ("full", 48, 600)}) == 1
    assert space.options(MINILM)[MODEL_SITE] == [MaxTokens(tokens=32)]
    assert space.without_order().lengths() == [0.5]


def test_what_was_removed_may_be_made_up_for() -> None:
    widths = (
        "rules: [{match: block.*.ffn, neurons: {choices: [1.0, 0.5], tie: all}, bits: {choices: [16, 8], tie: all}}]"
    )
    space = bound(f"reconstruct: [false, true]\n{widths}")
    narrow = {"ffn.neurons.0": 0.5}
    assert space.plan({**narrow, "reconstruct": True}).of_type(Recover) == {MODEL_SITE: RECONSTRUCTED}
    for less in (narrow, {**narrow, "reconstruct": False}, {"ffn.bits.0": 8}):
        assert not space.plan(less).of_type(Recover)
    with pytest.raises(ConfigError, match="reconstruct: not in this space at this place"):
        space.plan({"ffn.bits.0": 8, "reconstruct": True})
    always = bound(f"reconstruct: [true]\n{widths}")
    assert always.plan(narrow).of_type(Recover)
    assert not always.plan({"ffn.bits.0": 8}).of_type(Recover)


def test_a_student_is_reconstructed_where_something_was_removed_from_it_whose_blocks_are_run_once() -> None:
    students = "students: {half: {blocks: 0.5}, twice: {blocks: 1.0, share: 2}}"
    space = bound(f"reconstruct: [false, true]\n{students}\nrules: [{{match: block.*.ffn, neurons: [1.0, 0.5]}}]")
    assert "reconstruct" not in space.parameters(space.plan({"student": "half"}))
    assert space.plan({"student": "half", "ffn.neurons.0": 0.5, "reconstruct": True}).of_type(Recover)
    with pytest.raises(ConfigError, match="reconstruct: not in this space at this place"):
        space.plan({"student": "twice", "ffn.neurons.0": 0.5, "reconstruct": True})


def test_the_ladder_reconstructs_each_width_once() -> None:
    space = bind(SearchSpace.load("encoder-post-training"), MINILM, tokens=64)
    plans = [space.plan(params) for params in uniform_ladder(space)]
    fitted = [plan for plan in plans if plan.of_type(Recover)]
    assert {plan.without(Recover).plan_id for plan in fitted} < {plan.plan_id for plan in plans}
    assert {plan.of_type(PruneNeurons)["block.0.ffn"].keep for plan in fitted} == {1152, 768, 384}
    assert len(fitted) == 3


def test_the_ladder_keeps_most_where_it_does_not_trim() -> None:
    """Counts have no 1.0 among them, and lengths no full."""
    space = bound("max_tokens: [16, 48]\nrules: [{match: embeddings, vocabulary: [900, 300, 100], bits: [8, 16]}]")
    plans = [space.plan(params) for params in uniform_ladder(space)]
    kept = [plan.of_type(TrimVocabulary)["embeddings"].keep for plan in plans]
    assert {*kept} == {900, 300, 100}
    assert kept.count(900) > len(kept) / 2
    read = [plan.of_type(MaxTokens)[MODEL_SITE].tokens for plan in plans]
    assert read.count(48) == len(read) - 1


def test_the_ladder_trims_the_model_and_its_students() -> None:
    space = bind(SearchSpace.load("encoder-joint"), MINILM, tokens=64)
    plans = [space.plan(params) for params in uniform_ladder(space)]
    for student in (None, *space.students.values()):
        levels = {
            trim.keep
            for plan in plans
            if plan.of_type(Student).get(MODEL_SITE) == student
            for trim in plan.of_type(TrimVocabulary).values()
        }
        assert len(levels) >= 2


def test_bits_mean_integer_arithmetic_in_linear_layers_only() -> None:
    sites = MINILM.sites()
    assert quantize_decision(8, sites["block.0.ffn"]) == Quantize(weight_bits=8, activation_bits=8)
    assert quantize_decision(8, sites["embeddings"]) == Quantize(weight_bits=8, activation_bits=16)
    assert quantize_decision(4, sites["block.0.ffn"]) == Quantize(weight_bits=4, group_size=64)
    assert quantize_decision(16, sites["head"]) == Quantize(weight_bits=16)
    assert quantize_decision(4, UNEVEN.sites()["block.1.ffn"]).group_size == 1
    assert quantize_decision(4, UNEVEN.sites()["block.2.ffn"]).group_size == 8


def test_a_student_is_told_in_numbers_of_the_model() -> None:
    space = space_of(
        "students: {narrow: {heads: 0.34, neurons: 0.34}, third: {blocks: 0.34}, tiny: {blocks: 0.01}, "
        "three: {blocks: [1, 3, 5], heads: 3, neurons: 256, epochs: 2}}"
    )
    assert students_of(space, MINILM) == {
        "narrow": Student(blocks=(0, 1, 2, 3, 4, 5), heads=4, neurons=512),
        "three": Student(blocks=(1, 3, 5), heads=3, neurons=256, epochs=2),
        "third": Student(blocks=(0, 3), heads=12, neurons=1536),
        "tiny": Student(blocks=(0,), heads=12, neurons=1536),
    }


def test_a_student_may_have_another_architecture() -> None:
    space = space_of(
        "students: {relu: {activation: relu}, half: {hidden: 0.5}, third: {hidden: 0.34}, counted: {hidden: 200}, "
        "shared: {share: 2}, thrice: {blocks: 0.5, share: 3}, listed: {blocks: [1, 4], share: 3}}"
    )
    whole = {"heads": 12, "neurons": 1536}
    every = (0, 1, 2, 3, 4, 5)
    assert students_of(space, MINILM) == {
        "relu": Student(blocks=every, **whole, activation="relu"),
        "half": Student(blocks=every, **whole, hidden=192),
        # A multiple of 32, as 4-bit groups have to fill it.
        "third": Student(blocks=every, **whole, hidden=128),
        "counted": Student(blocks=every, **whole, hidden=200),
        # As deep as the fraction says, of half and a third as many blocks.
        "shared": Student(blocks=(0, 2, 4), **whole, share=2),
        "thrice": Student(blocks=(0,), **whole, share=3),
        "listed": Student(blocks=(1, 4), **whole, share=3),
    }


def test_a_student_may_not_have_the_models_own_activation() -> None:
    with pytest.raises(ConfigError, match=r"students\.a\.activation: relu is what the model has; leave it out"):
        students_of(space_of("students: {a: {activation: relu}}"), dataclasses.replace(MINILM, activation="relu"))


def test_counts_and_fractions_of_one_stay_apart() -> None:
    space = bound("rules: [{match: 'block.0.attention', heads: [1.0, 0.5]}]")
    # A parameter that was stored as 1.0 and comes back as 1 still means all heads, not a single one.
    assert space.plan({"attention.heads.0": 1}) == CompressionPlan()
    assert isinstance(space_of("rules: [{match: '*', heads: [1]}]").rules[0].axes()["heads"].choices[0], int)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ffn.bits.0": 3}, r"parameter ffn\.bits\.0: must be one of \[16, 8\], got 3"),
        ({"ffn.bits.0": "8"}, r"must be one of \[16, 8\], got '8'"),
        ({"ffn.bit.0": 8}, r"parameter ffn\.bit\.0: not in this space at this place; it has \['ffn\.bits\.0'\]"),
    ],
)
def test_a_parameter_that_the_space_does_not_have_is_refused(params: dict[str, Value], message: str) -> None:
    space = bound("rules: [{match: 'block.*.ffn', bits: {choices: [16, 8], tie: all}}]")
    with pytest.raises(ConfigError, match=message):
        space.plan(params)


def test_a_plan_that_the_space_cannot_express_is_refused() -> None:
    space = bound("rules: [{match: 'block.*.ffn', bits: {choices: [16, 8], tie: all}}]")
    plan = space.plan({"ffn.bits.0": 8})
    for other in (
        CompressionPlan(),
        plan.with_decision("block.0.ffn", Quantize(weight_bits=16)),
        plan.with_decision("block.0.ffn", PruneNeurons(keep=32)),
        plan.with_decision("head", Quantize(weight_bits=8, activation_bits=8)),
    ):
        with pytest.raises(PlanError, match=f"plan {other.plan_id}: space test cannot express it"):
            space.parameters(other)


def test_a_space_without_choices_has_one_plan_and_no_parameters() -> None:
    space = bound("rules: [{match: embeddings, bits: [8]}]")
    assert space.parameters(space.plan({})) == {}
    assert list(uniform_ladder(space)) == [{}]


def test_load_takes_a_shipped_name_or_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("schema: 1\nname: mine\nrules: [{match: head, bits: [8, 16]}]\n", encoding="utf-8")
    assert SearchSpace.load(str(path)).name == "mine"
    path.write_text("schema: 1\nname: mine\nruls: []\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^mine\.yaml: ruls: unknown key, did you mean rules\?$"):
        SearchSpace.load(str(path))
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^mine\.yaml: must hold keys and values, got list$"):
        SearchSpace.load(str(path))


@pytest.mark.parametrize("name", ["encoder-jiont", "../encoder-joint", "/etc/passwd", ""])
def test_load_refuses_what_is_not_shipped(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"not a shipped search space \(encoder-.*, encoder-joint, .*\) and not a path to a \.yaml"
    ):
        SearchSpace.load(name)
