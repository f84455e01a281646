"""Random plans of every kind are carried out or refused: what `benchmarks/random_plans.py` does, on tiny models."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_plans import kind_of, odd_decisions, try_plans

from autocompress.anatomy import BlockShape, ModelShape
from autocompress.decisions import DECISIONS
from autocompress.errors import PlanError
from autocompress.runtimes import RUNTIMES

PLANS = 12
SHAPE = ModelShape(hidden=384, blocks=(BlockShape(heads=12, head_size=32, neurons=1536),) * 6, vocabulary=1000)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "electra"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_random_plans_are_carried_out_or_refused(
    tiny_run: Callable[..., Any], tiny_model: Callable[..., Path], tmp_path: Path, runtime: str, family: str
) -> None:
    overrides = [f"model.id={tiny_model(family)}", f"storage.bank={tmp_path / 'bank'}", f"target.runtime={runtime}"]
    overrides += ["space=encoder-full", "data.max_train_rows=40"]
    outcome = try_plans(tiny_run(overrides), PLANS, tmp_path)
    assert outcome.failed == []
    assert outcome.built + outcome.refused.total() == PLANS
    assert outcome.built
    assert outcome.refused
    assert not any((tmp_path / "artefacts").iterdir())


def test_plans_without_a_space_hold_every_decision() -> None:
    rng = random.Random(0)
    drawn = [list(odd_decisions(SHAPE, rng)) for _ in range(200)]
    assert {decision["type"] for plan in drawn for decision in plan} >= set(DECISIONS)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("block.3.ffn: keep must be <= 64 neurons, got 65", "keep must be <= # neurons"),
        ("block.3.ffn: no such site; the model has embeddings, head", "no such site"),
        ("plan: LowRank is decided twice at site block.0.ffn", "plan: LowRank is decided twice at site #"),
        ("model: student blocks must be < 3, got (0, 3)", "student blocks must be < #"),
    ],
)
def test_reasons_are_counted_by_kind(message: str, kind: str) -> None:
    assert kind_of(PlanError(message)) == kind
