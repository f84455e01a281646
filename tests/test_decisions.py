"""Decisions: what each accepts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from autocompress.decisions import (
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


def a_student(**more: Any) -> Student:
    return Student(blocks=(0, 2, 4), heads=6, neurons=512, **{"epochs": 2, **more})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneHeads(keep=0), "PruneHeads.keep: must be an integer >= 1, got 0"),
        (lambda: PruneHeads(keep=1.2), "PruneHeads.keep: must be an integer >= 1, got 1.2"),
        (lambda: PruneHeads(keep=True), "PruneHeads.keep: must be an integer >= 1, got True"),
        (lambda: PruneNeurons(keep=-3), "PruneNeurons.keep: must be an integer >= 1, got -3"),
        (lambda: Recover(epochs=1, hidden=-1), "Recover.hidden: must be >= 0 and <= 1e6, got -1"),
        (lambda: Recover(epochs=1, hidden=float("nan")), "Recover.hidden: must be >= 0 and <= 1e6, got nan"),
        (lambda: TrimVocabulary(keep=0), "TrimVocabulary.keep: must be an integer >= 1, got 0"),
        (lambda: MaxTokens(tokens=0.5), "MaxTokens.tokens: must be an integer >= 1 and <= 2147483647, got 0.5"),
        (lambda: LowRank(rank=-1), "LowRank.rank: must be an integer >= 1, got -1"),
        (lambda: LowRank(rank=float("nan")), "LowRank.rank: must be an integer >= 1, got nan"),
        (lambda: Quantize(weight_bits=5), "Quantize.weight_bits: must be one of 2, 3, 4, 8, 16, got 5"),
        (lambda: Quantize(weight_bits=8, activation_bits=4), "Quantize.activation_bits: must be 8 or 16, got 4"),
        (
            lambda: Quantize(weight_bits=16, activation_bits=8),
            "8 goes with weight_bits of 8 or fewer, got",
        ),
        (lambda: Quantize(weight_bits=4), "Quantize.group_size: must be > 0 below 8 bits and 0 otherwise, got 0 at 4"),
        (lambda: Quantize(weight_bits=8, group_size=64), "Quantize.group_size: must be > 0 below 8 bits"),
        (lambda: Quantize(weight_bits=8, scheme="affine"), "Quantize.scheme: must be 'symmetric', got 'affine'"),
        (lambda: DropBlocks(blocks=()), "DropBlocks.blocks: must be ascending block numbers >= 0, got ()"),
        (lambda: DropBlocks(blocks=(2, 1)), "must be ascending block numbers >= 0, got (2, 1)"),
        (lambda: DropBlocks(blocks=(1, 1)), "must be ascending block numbers >= 0, got (1, 1)"),
        (lambda: DropBlocks(blocks=(-1,)), "must be ascending block numbers >= 0, got (-1,)"),
        (lambda: Student(blocks=(0,), heads=0, neurons=1), "Student.heads: must be an integer >= 1, got 0"),
        (
            lambda: a_student(activation="gelu"),
            "Student.activation: must be relu, or empty for the teacher's, got 'gelu'",
        ),
        (lambda: a_student(activation=1), "Student.activation: must be relu, or empty for the teacher's, got 1"),
        (lambda: a_student(hidden=-1), "Student.hidden: must be an integer >= 0, got -1"),
        (lambda: a_student(hidden=0.5), "Student.hidden: must be an integer >= 0, got 0.5"),
        (lambda: a_student(share=0), "Student.share: must be an integer >= 1, got 0"),
        (lambda: a_student(share=True), "Student.share: must be an integer >= 1, got True"),
        (lambda: Recover(epochs=1, relations=2e6), "Recover.relations: must be >= 0 and <= 1e6, got 2000000.0"),
        (lambda: Recover(epochs=1, l1=-1), "Recover.l1: must be >= 0 and <= 1e6, got -1"),
        (lambda: Recover(epochs=1, l2=True), "Recover.l2: must be >= 0 and <= 1e6, got True"),
        (lambda: Recover(epochs=1, patience=101), "Recover.patience: must be >= 0 and <= 100, got 101"),
        (lambda: Recover(epochs=1, seeds=0), "Recover.seeds: must be an integer >= 1 and <= 32, got 0"),
        (lambda: Recover(epochs=0), "Recover.epochs: must be > 0 and <= 100, got 0"),
        (lambda: Recover(epochs=float("nan")), "Recover.epochs: must be > 0 and <= 100, got nan"),
        (lambda: Recover(epochs=101), "Recover.epochs: must be > 0 and <= 100, got 101"),
    ],
)
def test_a_decision_refuses_what_it_cannot_mean(make: Callable[[], Decision], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make()
    assert message in str(caught.value)


def test_decisions_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Quantize(weight_bits=8, activation_bits=8).weight_bits = 4
