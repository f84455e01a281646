"""Plans: one canonical form, JSON there and back."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from autocompress.decisions import (
    DECISIONS,
    Decision,
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
from autocompress.errors import PlanError
from autocompress.plan import MODEL_SITE, CompressionPlan

W8 = Quantize(weight_bits=8, activation_bits=8)
EVERY_DECISION: tuple[tuple[str, Decision], ...] = (
    (MODEL_SITE, Student(blocks=(0, 2, 4), heads=6, neurons=512, epochs=1)),
    (MODEL_SITE, DropBlocks(blocks=(1,))),
    (MODEL_SITE, MaxTokens(tokens=32)),
    (MODEL_SITE, Recover(epochs=0.5)),
    ("block.0.attention", PruneHeads(keep=4)),
    ("block.0.attention", LowRank(rank=64)),
    ("block.0.attention", W8),
    ("block.0.ffn", PruneNeurons(keep=256)),
    ("embeddings", TrimVocabulary(keep=1000)),
    ("embeddings", Quantize(weight_bits=4, group_size=64)),
    ("head", Quantize(weight_bits=16)),
)


def a_student(**more: Any) -> Student:
    return Student(blocks=(0, 2, 4), heads=6, neurons=512, **{"epochs": 2, **more})


def test_every_decision_type_is_covered_here() -> None:
    assert {type(decision).__name__ for _, decision in EVERY_DECISION} == set(DECISIONS)


def test_json_round_trip_keeps_every_decision() -> None:
    plan = CompressionPlan(EVERY_DECISION)
    back = CompressionPlan.from_json(plan.to_json())
    assert back == plan
    assert back.plan_id == plan.plan_id
    assert isinstance(back.of_type(Student)[MODEL_SITE].blocks, tuple)


def test_order_of_decisions_does_not_matter() -> None:
    plans = {CompressionPlan(order) for order in itertools.permutations(EVERY_DECISION[:6])}
    assert len(plans) == 1
    assert len({plan.plan_id for plan in plans}) == 1


def test_canonical_order_is_model_first_then_blocks_by_number_then_application() -> None:
    plan = CompressionPlan(
        (
            ("block.10.ffn", W8),
            ("block.2.ffn", W8),
            ("block.2.ffn", PruneNeurons(keep=8)),
            (MODEL_SITE, Recover(epochs=1)),
        )
    )
    assert [(site, type(d).__name__) for site, d in plan] == [
        (MODEL_SITE, "Recover"),
        ("block.2.ffn", "PruneNeurons"),
        ("block.2.ffn", "Quantize"),
        ("block.10.ffn", "Quantize"),
    ]


def test_equal_budgets_have_equal_ids() -> None:
    assert CompressionPlan(((MODEL_SITE, Recover(epochs=1)),)).plan_id == (
        CompressionPlan(((MODEL_SITE, Recover(epochs=1.0)),)).plan_id
    )


def test_any_change_changes_the_id() -> None:
    plan = CompressionPlan(EVERY_DECISION)
    others = [CompressionPlan(EVERY_DECISION[:i] + EVERY_DECISION[i + 1 :]) for i in range(len(EVERY_DECISION))]
    others.append(plan.with_decision("block.0.ffn", PruneNeurons(keep=257)))
    others.append(CompressionPlan())
    assert len({plan.plan_id, *(other.plan_id for other in others)}) == len(others) + 1


def test_the_id_is_stable_across_releases() -> None:
    # Stored studies and banks are keyed by it: a change here orphans them and needs a new PLAN_SCHEMA.
    plan = CompressionPlan((("block.0.ffn", PruneNeurons(keep=256)), ("block.0.ffn", W8)))
    assert plan.to_json() == (
        '{"decisions":[{"keep":256,"site":"block.0.ffn","type":"PruneNeurons"},{"activation_bits":8,"group_size":0,'
        '"scheme":"symmetric","site":"block.0.ffn","type":"Quantize","weight_bits":8}],"schema":1}'
    )
    assert plan.plan_id == "d4ceab6d1c57609b"


def test_one_type_can_be_decided_once_at_a_site() -> None:
    with pytest.raises(PlanError, match="Quantize is decided twice at site head"):
        CompressionPlan((("head", W8), ("head", Quantize(weight_bits=16))))


@pytest.mark.parametrize(
    ("site", "decision", "message"),
    [
        ("block.0.ffn", Recover(epochs=1), "Recover belongs to the model, not to site 'block.0.ffn'"),
        (MODEL_SITE, W8, "Quantize belongs to the site, not to site 'model'"),
    ],
)
def test_a_decision_of_the_wrong_scope_is_refused(site: str, decision: Decision, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        CompressionPlan(((site, decision),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "schema must be 1, got 'list'"),
        ('{"schema":2,"decisions":[]}', "schema must be 1, got 2"),
        ('{"schema":1}', "decisions must be a list of objects"),
        ('{"schema":1,"decisions":[3]}', "decisions must be a list of objects"),
        (
            '{"schema":1,"decisions":[{"site":"head","type":"Prune"}]}',
            "unknown decision 'Prune' at 'head'; known: Student",
        ),
        ('{"schema":1,"decisions":[{"type":"LowRank","rank":2}]}', "unknown decision 'LowRank' at None"),
        ('{"schema":1,"decisions":[{"site":"head","type":["LowRank"]}]}', "unknown decision ['LowRank'] at 'head'"),
        (
            '{"schema":1,"decisions":[{"site":"head","type":"LowRank","rank":2,"ratio":1}]}',
            "LowRank has no field ratio; it has rank",
        ),
        ('{"schema":1,"decisions":[{"site":"head","type":"LowRank"}]}', "LowRank: "),
        ('{"schema":1,"decisions":[{"site":"head","type":"LowRank","rank":"2"}]}', "must be an integer >= 1, got '2'"),
        ('{"schema":1,"decisions":[{"site":"model","type":"DropBlocks","blocks":3}]}', "DropBlocks: "),
        (
            '{"schema":1,"decisions":[{"site":"model","type":"Recover","epochs":NaN}]}',
            "must be > 0 and <= 100, got nan",
        ),
    ],
)
def test_from_json_refuses_what_is_not_a_plan(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        CompressionPlan.from_json(text)
    assert message in str(caught.value)


def test_structural_leaves_the_runtime_part_out() -> None:
    plan = CompressionPlan(EVERY_DECISION).structural()
    assert plan.of_type(Quantize) == {}
    assert len(plan.decisions) == len(EVERY_DECISION) - 5
    assert plan.structural() == plan


def test_with_decision_adds_or_replaces() -> None:
    plan = CompressionPlan().with_decision("head", W8)
    assert plan.of_type(Quantize) == {"head": W8}
    plan = plan.with_decision("head", Quantize(weight_bits=16)).with_decision("embeddings", W8)
    assert {site: q.weight_bits for site, q in plan.of_type(Quantize).items()} == {"embeddings": 8, "head": 16}


def test_an_empty_plan_is_false_and_says_so() -> None:
    assert not CompressionPlan()
    assert CompressionPlan().words() == "uncompressed"
    assert CompressionPlan((("head", W8),))


def test_words_say_equal_blocks_once() -> None:
    sites = [f"block.{n}.ffn" for n in (0, 1, 2, 5, 10, 11)]
    plan = CompressionPlan((*((site, W8) for site in sites), (MODEL_SITE, DropBlocks(blocks=(3,)))))
    assert plan.words() == "without block 3; ffn 0-2,5,10-11: w8a8"


def test_words_name_every_decision() -> None:
    words = CompressionPlan(EVERY_DECISION).words()
    for part in (
        "student of 3 blocks x 6 heads x 512 neurons",
        "without block 1",
        "recovered 0.5 epochs",
        "attention 0: 4 heads rank 64 w8a8",
        "ffn 0: 256 neurons",
        "first 32 tokens",
        "embeddings: 1000 token rows w4",
        "head: w16",
    ):
        assert part in words


@pytest.mark.parametrize("site", ["block.x.ffn", "block.².ffn", "block..ffn", "ffn", "a.b", "1.2", ""])
def test_a_site_that_no_model_has_can_be_said(site: str) -> None:
    """It is for a check to refuse it, which says what there is."""
    plan = CompressionPlan(((site, PruneNeurons(keep=1)), ("block.1.ffn", PruneNeurons(keep=1))))
    assert CompressionPlan.from_json(plan.to_json()) == plan
    assert plan.words().count("1 neurons") >= 1


def test_sites_that_are_called_like_those_of_blocks_are_said_apart() -> None:
    plan = CompressionPlan((("ffn", PruneNeurons(keep=2)), ("block.1.ffn", PruneNeurons(keep=2))))
    assert sorted(plan.words().split("; ")) == ["ffn 1: 2 neurons", "ffn: 2 neurons"]


def test_json_is_plain_data() -> None:
    data = json.loads(CompressionPlan(EVERY_DECISION).to_json())
    assert data["schema"] == 1
    assert {entry["type"] for entry in data["decisions"]} == set(DECISIONS)


def test_recovery_from_logits_alone_keeps_its_old_id() -> None:
    """As plans were written before blocks could be drawn to the teacher's."""
    plain = CompressionPlan(((MODEL_SITE, Recover(epochs=1)),))
    assert json.loads(plain.to_json())["decisions"] == [{"site": "model", "type": "Recover", "epochs": 1.0}]
    drawn = CompressionPlan(((MODEL_SITE, Recover(epochs=1, hidden=30)),))
    assert drawn.plan_id != plain.plan_id
    assert CompressionPlan.from_json(drawn.to_json()) == drawn
    assert drawn.words() == "recovered 1 epochs block by block"


def test_a_student_without_the_later_fields_keeps_its_old_id() -> None:
    """As such plans were written, and named, before students could have other architectures."""
    plan = CompressionPlan(((MODEL_SITE, a_student()), ("block.0.ffn", W8)))
    assert plan.to_json() == (
        '{"decisions":[{"blocks":[0,2,4],"epochs":2.0,"heads":6,"neurons":512,"site":"model","type":"Student"},'
        '{"activation_bits":8,"group_size":0,"scheme":"symmetric","site":"block.0.ffn","type":"Quantize",'
        '"weight_bits":8}],"schema":1}'
    )
    assert plan.plan_id == "13354b661bd687fe"
    explicit = CompressionPlan(((MODEL_SITE, a_student(activation="", hidden=0, share=1)), ("block.0.ffn", W8)))
    assert explicit.plan_id == plan.plan_id


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("activation", "relu", ", with relu"),
        ("hidden", 192, ", 192 wide"),
        ("share", 2, ", each block run 2 times"),
    ],
)
def test_a_student_of_another_architecture_is_another_one(field: str, value: Any, said: str) -> None:
    student = a_student(**{field: value})
    plan = CompressionPlan(((MODEL_SITE, student),))
    plain = CompressionPlan(((MODEL_SITE, a_student()),))
    assert plan.plan_id != plain.plan_id
    assert json.loads(plan.to_json())["decisions"][0][field] == value
    assert CompressionPlan.from_json(plan.to_json()) == plan
    assert plan.words() == plain.words() + said


def test_what_is_recovered_is_drawn_to_the_teacher_where_it_is_as_wide() -> None:
    for given, drawn in ((CompressionPlan(), 30.0), (a_student(share=2), 30.0), (a_student(hidden=192), 0.0)):
        plan = given if isinstance(given, CompressionPlan) else CompressionPlan(((MODEL_SITE, given),))
        found = plan.recovered(Recover(epochs=2, hidden=30))
        assert found == plan.with_decision(MODEL_SITE, Recover(epochs=2, hidden=drawn))


@pytest.mark.parametrize(
    ("wanted", "written"),
    [(Recover(epochs=1), "7df06761235734c4"), (Recover(epochs=0.5, hidden=30), "2e4c48399f0bf084")],
)
def test_recoveries_from_before_there_were_more_options_keep_their_ids(wanted: Recover, written: str) -> None:
    """With what was written before relations, penalties, patience and seeds."""
    assert CompressionPlan(((MODEL_SITE, wanted), ("block.0.ffn", PruneNeurons(keep=512)))).plan_id == written


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"relations": 2}, "recovered 1 epochs, relations 2"),
        ({"l1": 1e-4}, "recovered 1 epochs, l1 0.0001"),
        ({"l2": 0.5}, "recovered 1 epochs, l2 0.5"),
        ({"patience": 0.5}, "recovered 1 epochs, patience 0.5"),
        ({"seeds": 3}, "recovered 1 epochs, mean of 3 seeds"),
    ],
)
def test_what_changes_recovered_weights_is_part_of_the_plan(option: dict[str, Any], said: str) -> None:
    plan = CompressionPlan(((MODEL_SITE, Recover(epochs=1, **option)),))
    assert plan.plan_id != CompressionPlan(((MODEL_SITE, Recover(epochs=1)),)).plan_id
    assert CompressionPlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["decisions"] == [{"site": "model", "type": "Recover", "epochs": 1.0, **option}]
    assert plan.words() == said
