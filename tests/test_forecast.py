"""A forecast counts as an enumeration does, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_study import SHAPE, space_of

from autocompress import trained
from autocompress.anatomy import BlockShape, ModelShape
from autocompress.binding import BoundSpace, bind
from autocompress.config import RunConfig, validated
from autocompress.forecast import _START_SECONDS, Forecast, _count_pieces, count_plans, forecast
from autocompress.space import SearchSpace, Value

ONE_BLOCK = ModelShape(hidden=64, blocks=(BlockShape(heads=4, head_size=16, neurons=256),), vocabulary=1000)


def parameter_sets(space: BoundSpace) -> set[frozenset[tuple[str, Value]]]:
    """Return every set of parameters that a sampler can come up with, by trying all choices one after the other."""
    found: set[frozenset[tuple[str, Value]]] = set()
    begun: list[dict[str, Value]] = [{}]
    while begun:
        params = begun.pop()
        open_: list[tuple[str, Sequence[Value]]] = []

        def choose(name: str, choices: Sequence[Value], params: dict[str, Value] = params, at: list = open_) -> Value:
            if name not in params:
                at.append((name, choices))
            return params.get(name, choices[0])

        space.decode(choose)
        if open_:
            name, choices = open_[0]
            begun += [{**params, name: choice} for choice in choices]
        else:
            found.add(frozenset(params.items()))
    return found


BITS = "rules: [{match: block.*.ffn, bits: {choices: [8, 4, 16], tie: all}}, {match: embeddings, bits: [8, 16]}]"
WIDTHS = (
    "rules: [{match: block.*.ffn, neurons: {choices: [1.0, 0.5], tie: 3}, bits: {choices: [8, 4], tie: 2}},"
    " {match: block.*.attention, heads: {choices: [1.0, 0.5], tie: all}, rank: {choices: [full, 0.5], tie: all}}]"
)
STUDENTS = "students: {half: {heads: 0.5, neurons: 0.5, epochs: 1}, shallow: {blocks: [0, 2], epochs: 1}}\n"
SPACES = {
    "bits": BITS,
    "widths and ranks": WIDTHS,
    "single choices": "rules: [{match: block.*.ffn, bits: [8]}, {match: embeddings, bits: [8, 16]}]",
    "dropped blocks": "drop_blocks: {at_most: 2}\nrules: [{match: block.*.ffn, bits: [8, 4]}]",
    "dropped blocks, tied": f"drop_blocks: {{at_most: 2}}\n{WIDTHS}",
    "students": STUDENTS + BITS,
    "students alone": STUDENTS,
    # Two blocks cannot lose three.
    "vocabulary, length": "max_tokens: [full, 0.5]\nrules: [{match: embeddings, vocabulary: [1.0, 0.5], bits: [8, 4]}]",
    "reconstruction": f"reconstruct: [false, true]\n{WIDTHS}",
    "reconstruction, always": f"reconstruct: [true]\n{WIDTHS}",
    "reconstruction, nothing to remove": f"reconstruct: [false, true]\n{BITS}",
    "reconstruction, dropped blocks": "reconstruct: [false, true]\ndrop_blocks: {at_most: 2}\n"
    "rules: [{match: block.*.ffn, neurons: {choices: [0.5, 1.0], tie: all}, bits: [8, 4]}]",
    "reconstruction, students": "students: {twice: {blocks: [0], share: 2}, half: {heads: 0.5}}\n"
    "reconstruct: [false, true]\n"
    "rules: [{match: block.*.ffn, neurons: {choices: [1.0, 0.5], tie: all}}]",
    "students, dropped blocks": f"{STUDENTS}drop_blocks: {{at_most: 3}}\nrules: [{{match: block.*.ffn, bits: [8, 4]}}]",
}


@pytest.mark.parametrize("name", SPACES)
def test_plans_are_counted_as_by_enumeration(name: str) -> None:
    space = space_of(SPACES[name])
    sets = parameter_sets(space)
    assert count_plans(space) == (len(sets), max(len(params) for params in sets))


def test_one_block_can_lose_none() -> None:
    text = {"schema": 1, "name": "test", "drop_blocks": {"at_most": 1}, "rules": [{"match": "head", "bits": [8, 16]}]}
    space = bind(validated(SearchSpace, text, "test"), ONE_BLOCK, tokens=64)
    assert parameter_sets(space) == {frozenset({("head.bits.0", 8)}), frozenset({("head.bits.0", 16)})}
    assert count_plans(space) == (2, 1)


def test_a_shipped_space_is_counted_as_by_enumeration() -> None:
    space = bind(SearchSpace.load("encoder-small"), SHAPE, tokens=64)
    sets = parameter_sets(space)
    assert count_plans(space) == (len(sets), 8) == (1944, 8)


def test_pieces_are_counted_by_what_is_decided_at_a_site() -> None:
    # Whole or trimmed, at 8 or 4 bits; how much of a text is read makes no piece.
    assert _count_pieces(space_of(SPACES["vocabulary, length"])) == 4


def everything_below(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def foreseen(
    tiny_run: Callable[..., RunConfig], caches: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Forecast]:
    """A forecast of a run whose bank is the user's, made in a folder of its own that has to stay empty."""
    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    shared = tmp_path_factory.mktemp("shared")
    recovery = ["search.recover=2", "recovery.epochs=0.5", "search.reconstruct=true"]
    run = tiny_run(["search.trials=10", "storage.bank=null", f"storage.shared=file://{shared}", *recovery])
    kept = everything_below(caches)
    os.chdir(folder)
    try:
        found = forecast(run)
    finally:
        os.chdir(before)
    assert list(folder.iterdir()) == [], "no results folder"
    assert everything_below(caches) == kept, "the user's bank"
    assert list(shared.iterdir()) == [], "what he shares with other machines"
    return run, found


@pytest.mark.slow
def test_a_forecast_is_positive_and_finite_and_touches_nothing(foreseen: tuple[RunConfig, Forecast]) -> None:
    _, found = foreseen
    for name, value in dataclasses.asdict(found).items():
        assert math.isfinite(value), name
        assert value > 0, name
    assert (found.plans, found.parameters, found.sites) == (1944, 8, 8)
    parts = (found.finetune_seconds, found.students_seconds, found.bank_seconds, 10 * found.candidate_seconds)
    assert found.total_seconds > sum(parts) + found.recovered_seconds
    assert set(found.to_dict()) == {field.name for field in dataclasses.fields(Forecast)}


@pytest.mark.slow
def test_a_model_with_a_head_needs_no_finetuning(
    tiny_run: Callable[..., RunConfig], bert_headed_folder: Path, tiny_bank: Path, tmp_path: Path
) -> None:
    kept = everything_below(tiny_bank)
    lines: list[str] = []
    found = forecast(tiny_run([f"model.id={bert_headed_folder}"]), lines.append)
    assert len([line for line in lines if line.startswith(("timing", "building"))]) >= 4
    assert found.finetune_seconds == 0.0
    assert found.recovered_seconds == 0.0, "none is asked for"
    assert found.students_seconds > 0
    assert everything_below(tiny_bank) == kept


@pytest.mark.slow
def test_no_more_candidates_are_foreseen_than_a_space_holds(
    tiny_run: Callable[..., RunConfig], bert_headed_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "few.yaml").write_text("{schema: 1, name: few, rules: [{match: head, bits: [8, 16]}]}")
    run = tiny_run([f"model.id={bert_headed_folder}", f"space={tmp_path / 'few.yaml'}", "search.trials=1000"])
    found = forecast(run)
    assert found.plans == 2
    rest = found.total_seconds - found.finetune_seconds - found.students_seconds - found.bank_seconds
    assert rest == pytest.approx(_START_SECONDS + 2 * found.candidate_seconds)


@pytest.mark.slow
def test_all_that_a_search_does_is_foreseen(
    tiny_run: Callable[..., RunConfig], bert_headed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted_since: list[int] = []
    reconstruct = trained.reconstruct

    def noted(*arguments: Any, since: int, **named: Any) -> Any:
        fitted_since.append(since)
        return reconstruct(*arguments, since=since, **named)

    monkeypatch.setattr(trained, "reconstruct", noted)
    more = ["search.reconstruct=true", "baselines=[random]", "search.trials=100"]
    found = forecast(tiny_run([f"model.id={bert_headed_folder}", *more]))
    assert fitted_since == [0], "as if all blocks were fitted"
    parts = found.students_seconds + found.bank_seconds + found.recovered_seconds
    assert found.total_seconds > parts + 200 * found.candidate_seconds, "a search and one at random"


@pytest.mark.slow
def test_plans_that_the_runtime_refuses_are_passed_by(
    tiny_run: Callable[..., RunConfig], bert_headed_folder: Path
) -> None:
    # A search records such a plan as failed and goes on.
    found = forecast(tiny_run([f"model.id={bert_headed_folder}", "target.runtime=onnxruntime"]))
    assert found.candidate_seconds > 0


@pytest.mark.slow
def test_students_of_every_architecture_are_foreseen(
    tiny_run: Callable[..., RunConfig], bert_headed_folder: Path
) -> None:
    run = tiny_run([f"model.id={bert_headed_folder}", "space=encoder-architectures"])
    found = forecast(run)
    assert found.students_seconds > 0
    # The full model and five students at 5 widths of attention and FFN, 4 of tables, 3 vocabularies and 2 of the head.
    assert found.plans == 6 * 5 * 5 * 4 * 3 * 2
