"""The study: its budget, what it refuses, and that nothing finished is lost however a driver ends. No model is run."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import optuna
import pandas as pd
import pytest
from helpers_records import make_measurement, make_reference
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from autocompress import api, strict_yaml
from autocompress.anatomy import BlockShape, ModelShape
from autocompress.binding import BoundSpace, bind
from autocompress.config import RunConfig, validated
from autocompress.decisions import Recover, Student
from autocompress.errors import MeasurementError, NoFeasiblePointError, StudyError
from autocompress.identity import identity_of
from autocompress.journal import held, repair_tail
from autocompress.ledger import excesses
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.predict import Predictor
from autocompress.records import Candidate, Measurement, Stopped, drift_of
from autocompress.seeds import uniform_ladder
from autocompress.space import SearchSpace
from autocompress.study import Study

SHAPE = ModelShape(hidden=64, blocks=(BlockShape(heads=4, head_size=16, neurons=256),) * 4, vocabulary=1000)
TINY_SPACE = "rules: [{match: block.*.ffn, bits: {choices: [8, 4, 16], tie: all}}, {match: embeddings, bits: [8, 16]}]"
TINY_PLANS = 6
CSV_COLUMNS = (
    *("number", "state", "plan_id", "accuracy", "accuracy_low", "accuracy_high", "size_bytes", "latency_ms"),
    *("latency_ratio", "latency_ratio_low", "latency_ratio_high", "seconds"),
)


def space_of(text: str) -> BoundSpace:
    parsed = strict_yaml.parse(f"schema: 1\nname: test\n{text}", "test.yaml")
    return bind(validated(SearchSpace, parsed, "test.yaml"), SHAPE, tokens=64)


SMALL = bind(SearchSpace.load("encoder-small"), SHAPE, tokens=64)
TINY = space_of(TINY_SPACE)


def score_of(plan: CompressionPlan) -> Measurement:
    """Return a score that depends on the plan alone, so that any driver gives the same one."""
    first, second, third = hashlib.sha256(plan.plan_id.encode()).digest()[:3]
    return make_measurement(
        accuracy=0.5 + first / 1000, size_bytes=1_000_000 + 100_000 * second, ratio=0.1 + third / 300
    )


DATABASE = "AUTOCOMPRESS_TEST_DATABASE"
"""Names the database in the environment, so that drivers in other processes know it, too."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Hold every kind of storage to the same, but for what concerns the journal's file alone."""
    if "storage" in metafunc.fixturenames:
        elsewhere = [pytest.param("postgresql", marks=pytest.mark.slow)]
        of_the_file = metafunc.definition.get_closest_marker("journal")
        metafunc.parametrize("storage", ["journal", *([] if of_the_file else elsewhere)], indirect=True)


@pytest.fixture(autouse=True)
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "postgresql":
        monkeypatch.setenv(DATABASE, request.getfixturevalue("postgresql"))
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return results_in(tmp_path / "results")


def results_in(path: Path) -> Path:
    path.mkdir()
    environment = {"schema": 1, "reference": dataclasses.asdict(make_reference()), "machine": {"id": "test"}}
    (path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    return path


@pytest.fixture
def drive(folder: Path) -> Iterator[Callable[..., Study]]:
    """Return a function that opens the study for writing; what stays open is closed at the end."""
    opened: list[Study] = []

    def open_(*overrides: str, space: BoundSpace = SMALL, at: Path = folder, **identity: str) -> Study:
        run = run_of(*overrides)
        found = identity_of(run, model="m", data="d", space=space) | identity
        opened.append(Study(at, run, identity=found, space=space, writable=True))
        return opened[-1]

    yield open_
    for study in opened:
        study.close()


def run_of(*overrides: str) -> RunConfig:
    return RunConfig.from_mapping(
        {"search": {"trials": 6}, "storage": {"study": os.environ.get(DATABASE)}}, overrides=overrides
    )


def evaluate(study: Study, count: int = 10**6) -> list[Candidate]:
    """Ask and tell up to ``count`` candidates."""
    told = []
    while len(told) < count and (asked := study.ask()) is not None:
        told.append(study.tell(*asked, score_of(asked[1])))
    return told


def rows(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """Return the trials as another program finds them in the storage."""
    if (folder / "study.json").exists():
        known = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        url = known["database"].replace("postgresql:", "postgresql+psycopg:")
        return optuna.load_study(storage=url, study_name=known["study"]).get_trials()
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(storage=storage, study_name="autocompress").get_trials()


def states(folder: Path) -> dict[str, int]:
    return {state.name: n for state in TrialState if (n := sum(t.state == state for t in rows(folder)))}


def plan_ids(candidates: list[Candidate]) -> list[str]:
    return [c.plan.plan_id for c in candidates]


# --- asking and telling


def test_candidates_are_asked_for_up_to_the_budget(drive: Callable[..., Study], folder: Path) -> None:
    study = drive()
    assert (study.finished, study.remaining) == (0, 6)
    number, plan = study.ask() or pytest.fail("nothing asked for")
    assert (study.finished, study.remaining) == (0, 5)
    told = study.tell(number, plan, score_of(plan))
    assert (study.finished, study.remaining) == (1, 5)
    assert (told.number, told.state, told.plan, told.measurement) == (number, "COMPLETE", plan, score_of(plan))
    evaluate(study)
    assert (study.finished, study.remaining, study.ask()) == (6, 0, None)
    assert states(folder)["COMPLETE"] == 6
    assert "RUNNING" not in states(folder)


def test_no_more_are_running_than_the_budget_leaves(drive: Callable[..., Study]) -> None:
    study = drive("search.trials=4")
    running = [study.ask() for _ in range(6)]
    assert running[4:] == [None, None]
    for asked in running[:4]:
        assert asked is not None
        study.tell(*asked, "the worker died")
    assert (study.finished, study.remaining, study.ask()) == (4, 0, None)


def test_seeds_come_first_in_the_order_of_the_ladder(drive: Callable[..., Study]) -> None:
    ladder = [SMALL.plan(params).plan_id for params in uniform_ladder(SMALL)]
    study = drive(f"search.trials={len(ladder) + 5}")
    told = evaluate(study)
    assert plan_ids(told[: len(ladder)]) == ladder
    assert [c.origin for c in told[: len(ladder)]] == ["uniform"] * len(ladder)
    assert {c.origin for c in told[len(ladder) :]} <= {"sampler", "mutation"}
    assert told[0].params == next(uniform_ladder(SMALL))


def test_seeds_made_from_sensitivities_wait_until_predictions_can_be_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a predictor of paper that is ready three candidates after the uniform plans."""
    ladder = [SMALL.plan(params).plan_id for params in uniform_ladder(SMALL)]
    drawn = random.Random(1)
    chosen: list[dict[str, Any]] = [{}, {}]
    for params in chosen:
        SMALL.decode(lambda name, choices, into=params: into.setdefault(name, drawn.choice(choices)))
    monkeypatch.setattr("autocompress.proposals.sensitivity_ladder", lambda *_: iter(chosen))

    class Paper:
        ready = False

        def learn(self, known: Sequence[Candidate]) -> None:
            self.ready = len(known) >= len(ladder) + 3

        def hoped(self, *_: Any) -> None: ...

        def behind(self, *_: Any) -> None: ...

        def expected(self, *_: Any) -> None: ...

        def note(self, _: Candidate) -> None: ...

    run = run_of(f"search.trials={len(ladder) + 12}")
    identity, paper = identity_of(run, model="m", data="d", space=SMALL), cast(Predictor, Paper())
    with closing(Study(folder, run, identity=identity, space=SMALL, writable=True, predictor=paper)) as study:
        origins = [c.origin for c in evaluate(study)]
    assert origins[: len(ladder)] == ["uniform"] * len(ladder)
    assert set(origins[len(ladder) : len(ladder) + 3]) <= {"sampler", "mutation"}, "nobody waits for them"
    assert origins[len(ladder) + 3 :].count("sensitivity") == 2


class Knowing:
    """A predictor of paper that knows what becomes of a plan."""

    ready = True

    def learn(self, _: Sequence[Candidate]) -> None: ...

    def hoped(self, plan: CompressionPlan) -> dict[str, float]:
        score = score_of(plan)
        return {"size_bytes": score.size_bytes, "latency": score.latency_ratio, "accuracy": -score.accuracy}

    def behind(self, *_: Any) -> None: ...

    def expected(self, *_: Any) -> None: ...

    def note(self, _: Candidate) -> None: ...


def knowing(folder: Path, *overrides: str, predictor: Knowing | None = None) -> Study:
    run, predictor = run_of(*overrides), cast(Predictor, predictor or Knowing())
    identity = identity_of(run, model="m", data="d", space=SMALL)
    return Study(folder, run, identity=identity, space=SMALL, writable=True, predictor=predictor)


def test_half_the_size_of_a_small_model_promises_as_much_as_half_of_a_large_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was recovered stands beside no prediction of what was not."""
    large, small, slightly, half = itertools.islice(uniform_ladder(SMALL), 4)
    costs = {
        SMALL.plan(slightly).plan_id: [-0.89, 95e6, 0.9],
        SMALL.plan(half).plan_id: [-0.4, 0.5e6, 0.005],
    }

    class Expecting(Knowing):
        guide, guide_deviation = "accuracy", 0.0
        settled: Mapping[int, float] = MappingProxyType({2: -0.95})  # the others are elder than what it learned from

        def expected(self, plan: CompressionPlan, told: Sequence[str]) -> list[float]:
            assert list(told) == ["accuracy", "size_bytes", "latency"]
            return costs[plan.plan_id]

    changed = itertools.cycle([(slightly, SMALL.plan(slightly)), (half, SMALL.plan(half))])
    monkeypatch.setattr("autocompress.proposals.mutated", lambda *_: next(changed))
    wanted = ("search.seeds=false", "search.mutation_share=1", "search.guide=accuracy")
    with closing(knowing(folder, *wanted, predictor=Expecting())) as study:
        study.add(SMALL.plan(large), make_measurement(accuracy=0.9, size_bytes=10**8, ratio=1.0), origin="sampler")
        study.add(SMALL.plan(small), make_measurement(accuracy=0.4, size_bytes=10**6, ratio=0.01), origin="sampler")
        recovered = SMALL.plan(small).recovered(Recover(epochs=1))
        study.add(recovered, make_measurement(accuracy=0.95, size_bytes=10**5, ratio=0.001), origin="recover")
        asked = study.ask()
    assert asked is not None
    assert asked[1] == SMALL.plan(half)


@pytest.mark.parametrize(
    ("limit", "name"),
    [
        ("max_size_mb=10", "size_mb"),
        ("max_latency_ratio=0.4", "latency_ratio"),
        (f"max_latency_ms={0.4 * make_reference().latency_ms}", "latency_ms"),
        ("max_accuracy_drop=0.25", "accuracy_drop"),
    ],
)
def test_what_is_predicted_to_break_a_constraint_is_passed_over(
    drive: Callable[..., Study], folder: Path, tmp_path: Path, limit: str, name: str
) -> None:
    overrides = ("search.trials=30", "search.seeds=false", f"constraints.{limit}")
    with closing(knowing(folder, *overrides)) as study:
        kept = [c.feasible for c in evaluate(study)]
    said = {t.user_attrs["passed_over"] for t in rows(folder) if "passed_over" in t.user_attrs}
    assert said == {f"predicted to break max_{name} even if it does well"}
    blindly = [c.feasible for c in evaluate(drive(*overrides, at=results_in(tmp_path / "blind")))]
    assert sum(kept) >= 27 > 1.3 * sum(blindly)


def test_what_would_break_a_constraint_is_no_seed_unless_it_is_uniform(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = [SMALL.plan(params) for params in uniform_ladder(SMALL)]
    every = list(range(400))
    drawn = [random.Random(n) for n in every]
    plans: list[dict[str, Any]] = [{} for _ in every]
    for params, source in zip(plans, drawn, strict=True):
        SMALL.decode(lambda name, choices, into=params, source=source: into.setdefault(name, source.choice(choices)))
    monkeypatch.setattr("autocompress.proposals.sensitivity_ladder", lambda *_: iter(plans))
    trials = len(ladder) + 20
    with closing(knowing(folder, f"search.trials={trials}", "constraints.max_size_mb=10")) as study:
        told = evaluate(study)
    assert [c.plan for c in told if c.origin == "uniform"] == ladder
    assert not all(c.feasible for c in told if c.origin == "uniform")
    allocated = [c for c in told if c.origin == "sensitivity"]
    assert len(allocated) == int(0.2 * trials)
    assert all(c.feasible for c in allocated)
    with closing(knowing(folder, f"search.trials={trials + 30}", "constraints.max_size_mb=10")) as study:
        evaluate(study)
        allocated = [c for c in study.candidates() if c.origin == "sensitivity"]
    assert len(allocated) == int(0.2 * (trials + 30)), "those of an earlier command count"


def test_a_sampler_judges_by_the_constraints_of_now(drive: Callable[..., Study]) -> None:
    drive("search.trials=20").close()
    study = drive("search.trials=20")
    evaluate(study)
    study.close()
    study = drive("search.trials=24", "constraints.max_size_mb=10")
    evaluate(study)
    shown: Any = study._study.sampler
    judged = {number: trial.constraints for number, trial in shown._judged.items()}
    limits = study.run.constraints
    sizes = {c.number: excesses(c.score, limits, study.reference) for c in study.candidates()}
    assert {number: sizes[number] for number in judged} == judged
    assert len(judged) >= 20


def test_a_search_without_seeds_has_none(drive: Callable[..., Study]) -> None:
    assert {c.origin for c in evaluate(drive("search.seeds=false", "search.trials=20"))} == {"sampler", "mutation"}


def test_the_share_of_mutations_is_that_of_the_run_file(drive: Callable[..., Study], tmp_path: Path) -> None:
    found = {}
    for share in (0, 0.3, 1):
        study = drive(
            *("search.trials=20", "search.seeds=false", f"search.mutation_share={share}"),
            at=results_in(tmp_path / str(share)),
        )
        found[share] = sum(c.origin == "mutation" for c in evaluate(study))
    assert found[0] == 0
    assert 1 <= found[0.3] <= 13
    # The first one has no front to come from; where all changes are known, a random plan takes the turn.
    assert 14 <= found[1] <= 19


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3", "random"])
def test_only_tpe_is_helped_by_mutations(drive: Callable[..., Study], sampler: str) -> None:
    study = drive("search.seeds=false", f"search.sampler={sampler}", "search.mutation_share=1", "search.trials=12")
    assert {c.origin for c in evaluate(study)} == {"sampler"}


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "random"])
def test_no_plan_is_asked_for_twice_in_a_study(drive: Callable[..., Study], sampler: str) -> None:
    space = space_of(
        "drop_blocks: {at_most: 1}\n"
        "rules: [{match: block.*.ffn, neurons: {choices: [1.0, 0.5], tie: all}, bits: {choices: [8, 4, 16], tie: 2}}]"
    )
    found: list[str] = []
    for trials in (12, 24):
        study = drive("search.trials=" + str(trials), f"search.sampler={sampler}", space=space)
        found += plan_ids(evaluate(study))
        study.close()
    assert len(found) == 24
    assert len(set(found)) == 24


def test_plans_in_flight_are_not_asked_for_again(drive: Callable[..., Study]) -> None:
    study = drive(f"search.trials={TINY_PLANS}", space=TINY)
    asked = [study.ask() for _ in range(TINY_PLANS)]
    assert None not in asked
    assert len({plan.plan_id for _, plan in filter(None, asked)}) == TINY_PLANS


def test_a_space_that_is_exhausted_ends_the_search(drive: Callable[..., Study], folder: Path) -> None:
    study = drive("search.trials=50", space=TINY)
    assert len(evaluate(study)) == TINY_PLANS
    assert study.ask() is None
    assert study.remaining == 50 - TINY_PLANS
    study.close()
    again = drive("search.trials=50", space=TINY)
    assert again.ask() is None
    assert again.finished == TINY_PLANS
    assert not {"RUNNING", "WAITING"} & set(states(folder))


def test_a_student_of_another_depth_does_not_take_parameters_from_the_search(drive: Callable[..., Study]) -> None:
    # Fewer blocks leave fewer that can be dropped: the parameter's choices then differ within one study.
    space = space_of(
        "students: {shallow: {blocks: [0, 2], epochs: 1}}\ndrop_blocks: {at_most: 2}\n"
        "rules: [{match: block.*.ffn, bits: {choices: [8, 4, 16], tie: all}}]"
    )
    told = evaluate(drive("search.trials=100", space=space))
    depths = {(bool(c.plan.of_type(Student)), len(SHAPE.after(c.plan).blocks)) for c in told}
    assert depths == {(False, 4), (False, 3), (False, 2), (True, 2), (True, 1)}
    assert len(told) == 3 * (3 + 2)


def test_one_seed_gives_the_same_sequence(drive: Callable[..., Study], tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        study = drive("search.trials=25", "seed=3", at=results_in(tmp_path / name))
        found.append(plan_ids(evaluate(study)))
    assert found[0] == found[1]
    other = drive("search.trials=25", "seed=4", at=results_in(tmp_path / "c"))
    assert plan_ids(evaluate(other)) != found[0]


# --- failures


def test_a_failed_candidate_is_kept_with_its_reason(drive: Callable[..., Study], folder: Path) -> None:
    study = drive()
    number, plan = study.ask() or pytest.fail("nothing asked for")
    told = study.tell(number, plan, "block.1.ffn: not carried out")
    assert (told.state, told.failure, told.measurement) == ("FAIL", "block.1.ffn: not carried out", None)
    evaluate(study)
    study.close()
    read = Study(folder, run_of()).candidate(number)
    assert (read.state, read.failure, read.plan) == ("FAIL", "block.1.ffn: not carried out", plan)
    assert study.finished == 6
    assert number not in [c.number for c in study.front().points]


BAD = [
    *[(field, value) for field in ("size_bytes", "latency_ms", "latency_ratio") for value in (0, -1)],
    *[(field, value) for field in ("size_bytes", "latency_ms", "latency_ratio") for value in (math.nan, math.inf)],
    *[("accuracy", value) for value in (math.nan, math.inf, -0.1, 1.1)],
    ("loss", math.nan),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_number_that_cannot_stand_fails_its_trial(
    drive: Callable[..., Study], folder: Path, field: str, value: float
) -> None:
    study = drive("search.trials=3")
    good = evaluate(study, 1)[0]
    number, plan = study.ask() or pytest.fail("nothing asked for")
    # Better than the good one in every other number: only the bad number keeps it off the front.
    best = make_measurement(accuracy=0.999, size_bytes=1, ratio=1e-6)
    told = study.tell(number, plan, dataclasses.replace(best, **{field: value}))
    assert (told.state, told.measurement) == ("FAIL", None)
    assert told.failure is not None
    assert told.failure.startswith(f"{field}: must be ")
    assert str(value) in told.failure
    last = evaluate(study)
    assert len(last) == 1
    assert number not in [c.number for c in study.front().points]
    assert {c.number for c in study.front().points} <= {good.number, last[0].number}
    study.close()
    assert {k: n for k, n in states(folder).items() if k != "WAITING"} == {"COMPLETE": 2, "FAIL": 1}
    assert Study(folder, run_of()).candidate(number).failure == told.failure


# --- candidates whose accuracy pass was ended


def stopped(**changes: Any) -> Stopped:
    reason = "9 hits in 250 of 1000 rows; the front needs 850 (chance 1.0e-12)"
    return Stopped(**{"reason": reason, "rows": 250, "size_bytes": 1.0, "latency": 1e-6, **changes})


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "random"])
def test_a_stopped_candidate_counts_and_is_never_on_the_front(
    drive: Callable[..., Study], folder: Path, sampler: str
) -> None:
    study = drive("search.trials=20", f"search.sampler={sampler}")
    numbers = []
    for turn in range(20):
        number, plan = study.ask() or pytest.fail("nothing asked for")
        told = study.tell(number, plan, stopped() if turn % 2 else score_of(plan))
        if turn % 2:
            numbers.append(number)
            assert (told.state, told.measurement, told.failure) == ("PRUNED", None, stopped().reason)
            assert (told.plan, told.feasible) == (plan, True)
            with pytest.raises(MeasurementError, match="has no measurement"):
                _ = told.score
    assert (study.finished, study.remaining, study.ask()) == (20, 0, None)
    assert len(set(plan_ids(study.candidates()))) == 20, "what was stopped is not asked for again"
    assert study.front().points
    assert not set(numbers) & {c.number for c in study.front().points}
    study.close()
    assert (states(folder)["PRUNED"], states(folder)["COMPLETE"]) == (10, 10)
    for again in (Study(folder, run_of("search.trials=20")), drive("search.trials=20", f"search.sampler={sampler}")):
        assert again.candidates() == study.candidates()
        assert again.front() == study.front()
        assert (again.finished, again.remaining, again.interrupted) == (20, 0, 0)
        assert [c.number for c in again.candidates() if c.state == "PRUNED"] == numbers
    assert rows(folder)[numbers[0]].user_attrs["stopped"] == dataclasses.asdict(stopped())


def test_a_study_of_nothing_but_stopped_candidates_goes_on(drive: Callable[..., Study], folder: Path) -> None:
    study = drive("search.trials=8", "search.seeds=false")
    while (asked := study.ask()) is not None:
        study.tell(*asked, stopped())
    assert (study.finished, len(study.front()), study.rivals()) == (8, 0, [])
    study.close()
    again = drive("search.trials=12", "search.seeds=false")
    assert len(evaluate(again)) == 4
    everything, front, report = written(folder, again)
    assert sorted(everything["state"]) == ["COMPLETE"] * 4 + ["PRUNED"] * 8
    assert set(everything["failure"].dropna()) == {stopped().reason}
    assert 1 <= len(front) <= 4
    assert "<html" in report


def test_rivals_are_the_front_that_the_sampler_is_told(drive: Callable[..., Study]) -> None:
    limit = "constraints.max_size_mb=20"
    study = drive("search.trials=30", limit)
    assert study.rivals() == []
    for turn in range(30):
        number, plan = study.ask() or pytest.fail("nothing asked for")
        study.tell(number, plan, ["out of memory", stopped(), score_of(plan), score_of(plan)][turn % 4])
        front = [[-c.score.accuracy, float(c.score.size_bytes), c.score.latency_ratio] for c in study.front().points]
        assert sorted(study.rivals()) == sorted(front)
        assert all(cost[1] <= 20e6 for cost in study.rivals())
    assert len(study.rivals()) >= 2
    study.close()
    assert sorted(drive("search.trials=30", limit).rivals()) == sorted(front)


# --- objectives and the guide


def full_score(plan: CompressionPlan) -> Measurement:
    """Return a score whose objectives are at odds with each other, with a latency that is sure."""
    numbers, score = hashlib.sha256(b"full" + plan.plan_id.encode()).digest(), score_of(plan)
    return dataclasses.replace(
        score,
        latency_ratio_low=score.latency_ratio,
        latency_ratio_high=score.latency_ratio,
        loss=0.2 + numbers[0] / 100,
        divergence=numbers[1] / 500,
        peak_memory_bytes=1_000_000 + 100_000 * numbers[2],
    )


FIELDS = {
    "accuracy": "accuracy",
    "loss": "loss",
    "divergence": "divergence",
    "size_bytes": "size_bytes",
    "latency": "latency_ratio",
    "peak_memory": "peak_memory_bytes",
}


def brute_front(candidates: list[Candidate], names: list[str]) -> set[int]:
    """Return the numbers of what no other candidate beats, without the package's help."""
    costs = {
        c.number: tuple(getattr(c.score, FIELDS[n]) * (-1 if n == "accuracy" else 1) for n in names) for c in candidates
    }
    return {
        number
        for number, mine in costs.items()
        if not any(all(a <= b for a, b in zip(his, mine, strict=True)) and his != mine for his in costs.values())
    }


@pytest.mark.parametrize(
    "names",
    [
        ["accuracy", "latency"],
        ["loss", "peak_memory"],
        ["divergence", "size_bytes", "latency"],
        ["latency", "peak_memory", "size_bytes"],
        ["accuracy", "size_bytes", "latency", "peak_memory"],
        ["accuracy", "loss", "divergence", "size_bytes", "peak_memory"],
    ],
    ids="-".join,
)
@pytest.mark.parametrize("sampler", ["tpe", "nsga3"])
def test_two_to_five_objectives_of_any_kind(
    drive: Callable[..., Study], folder: Path, names: list[str], sampler: str
) -> None:
    wanted = (f"objectives={json.dumps(names)}", "search.trials=16", f"search.sampler={sampler}", "search.seeds=false")
    study = drive(*wanted)
    told = []
    while (asked := study.ask()) is not None:
        told.append(study.tell(*asked, full_score(asked[1])))
    assert len(told) == 16
    assert study.told == names
    assert {c.number for c in study.front().points} == brute_front(told, names)
    expected = [[float(getattr(c.score, FIELDS[n])) for n in names] for c in told]
    assert [t.values for t in rows(folder) if t.state == TrialState.COMPLETE] == expected
    study.close()
    again = drive(*wanted)
    assert again.front() == study.front()
    assert sorted(again.rivals()) == sorted(study.rivals())
    assert len(again.rivals()[0]) == len(names)
    again.close()
    with pytest.raises(StudyError, match="objectives: "):
        drive("search.trials=16")


@pytest.mark.parametrize(("field", "value"), [("divergence", math.nan), ("divergence", -0.1), ("peak_memory_bytes", 0)])
def test_a_new_number_that_cannot_stand_fails_its_trial(drive: Callable[..., Study], field: str, value: float) -> None:
    study = drive()
    number, plan = study.ask() or pytest.fail("nothing asked for")
    told = study.tell(number, plan, dataclasses.replace(full_score(plan), **{field: value}))
    assert (told.state, told.measurement) == ("FAIL", None)
    assert (told.failure or "").startswith(f"{field}: must be ")


@pytest.mark.parametrize("guide", ["divergence", "loss"])
def test_the_guide_is_told_and_the_front_is_judged_by_accuracy(
    drive: Callable[..., Study], folder: Path, guide: str
) -> None:
    wanted = (f"search.guide={guide}", "search.trials=30")
    study = drive(*wanted)
    told = []
    while (asked := study.ask()) is not None:
        told.append(study.tell(*asked, full_score(asked[1])))
    assert study.told == [guide, "size_bytes", "latency"]
    complete = [t for t in rows(folder) if t.state == TrialState.COMPLETE]
    assert [t.values[0] for t in complete] == [getattr(c.score, guide) for c in told]
    assert complete[0].values[1:] == [told[0].score.size_bytes, told[0].score.latency_ratio]
    judged = {c.number for c in study.front().points}
    guided = brute_front(told, [guide, "size_bytes", "latency"])
    assert judged == brute_front(told, ["accuracy", "size_bytes", "latency"]) != guided
    assert {tuple(cost) for cost in study.rivals()} == {
        (getattr(c.score, guide), c.score.size_bytes, c.score.latency_ratio) for c in told if c.number in guided
    }
    study.close()
    assert Study(folder, run_of(*wanted)).front() == study.front()
    with pytest.raises(StudyError, match=f"objectives: .*{guide}.* became .*accuracy"):
        drive("search.trials=30")


def test_a_limit_of_memory_keeps_candidates_off_the_front(drive: Callable[..., Study]) -> None:
    study = drive("constraints.max_memory_mb=12", "search.trials=25")
    told = []
    while (asked := study.ask()) is not None:
        told.append(study.tell(*asked, full_score(asked[1])))
    over = {c.number for c in told if c.score.peak_memory_bytes > 12e6}
    assert 0 < len(over) < 25
    assert {c.number for c in told if not c.feasible} == over
    assert not over & {c.number for c in study.front().points}
    assert excesses(told[0].score, study.run.constraints, make_reference()) == {
        "memory_mb": pytest.approx(told[0].score.peak_memory_bytes / 1e6 - 12)
    }


# --- latencies taken anew


def test_a_confirmed_latency_stands_in_place_of_the_first(drive: Callable[..., Study], folder: Path) -> None:
    limit = "constraints.max_latency_ratio=2"
    study = drive(limit)
    told = evaluate(study)
    values = [t.values for t in rows(folder) if t.state == TrialState.COMPLETE]
    chosen = study.front().points[0]
    taken = dataclasses.replace(
        chosen.score, latency_ms=99.0, latency_ratio=1.5, latency_ratio_low=1.4, latency_ratio_high=1.6, confirmed=True
    )
    [found] = study.confirm({chosen.number: taken})
    assert found == dataclasses.replace(chosen, measurement=taken)
    assert study.candidate(chosen.number) == found
    other = next(c for c in told if c.number != chosen.number)
    slow = dataclasses.replace(other.score, latency_ratio=2.5, latency_ratio_high=2.6, confirmed=True)
    assert not study.confirm({other.number: slow})[0].feasible
    [again] = study.confirm({other.number: dataclasses.replace(slow, latency_ratio=1.9)})
    assert again.feasible, "the last one counts"
    study.close()
    for read in (Study(folder, run_of(limit)), drive(limit)):
        assert read.candidates() == study.candidates()
        assert read.candidate(chosen.number).score.confirmed
        assert read.candidate(other.number).score.latency_ratio == 1.9
        assert read.front() == study.front()
        assert read.finished == 6
    # The study is a record of what happened: what the sampler was told stays.
    assert [t.values for t in rows(folder) if t.state == TrialState.COMPLETE] == values


def test_latencies_taken_twice_tell_how_far_they_drift(drive: Callable[..., Study]) -> None:
    study = drive()
    told = evaluate(study)
    assert len(told) == 6

    def taken(candidate: Candidate, factor: float) -> Measurement:
        ends = {name: factor * getattr(candidate.score, name) for name in ("latency_ratio_low", "latency_ratio_high")}
        ratio = factor * candidate.score.latency_ratio
        return dataclasses.replace(candidate.score, latency_ratio=ratio, **ends, confirmed=True)

    few = study.confirm({told[0].number: taken(told[0], 1.2)})
    assert [c.score.latency_drift for c in few] == [0.0], "two latencies of one artefact tell too little"
    five = {c.number: taken(c, factor) for c, factor in zip(told[1:], (0.8, 0.9, 1.0, 1.1, 1.2), strict=True)}
    found = study.confirm(five)
    [drift] = {c.score.latency_drift for c in found}
    assert drift == drift_of([c.score for c in told[1:]], list(five.values())) > 0.05
    for candidate in found:
        before = five[candidate.number]
        assert candidate.score.latency_ratio == before.latency_ratio
        assert candidate.score.latency_ratio_low < before.latency_ratio_low
        assert candidate.score.latency_ratio_high > before.latency_ratio_high
    # What was found holds for what is taken later.
    [later] = study.confirm({told[0].number: taken(told[0], 1.1)})
    assert later.score.latency_drift == drift


def slowed(measured: Measurement, slower: float) -> Measurement:
    """Return what is seen of an artefact while the reference is so many times slower; a very small one would not be."""
    factor = slower ** (1 - measured.latency_ratio)
    ends = {name: getattr(measured, name) / factor for name in ("latency_ratio_low", "latency_ratio_high")}
    ratio, reference_ms = measured.latency_ratio / factor, measured.reference_ms * slower
    return dataclasses.replace(measured, latency_ratio=ratio, reference_ms=reference_ms, **ends, confirmed=True)


def test_latencies_taken_twice_tell_what_slow_times_do_to_ratios(drive: Callable[..., Study], folder: Path) -> None:
    study = drive()
    told = evaluate(study)
    assert study.calm is None
    assert study.calmed(told[0].score) == told[0].score, "nothing is known yet"
    factors = (1.0, 1.05, 1.1, 1.15, 1.2)
    found = study.confirm({c.number: slowed(c.score, f) for c, f in zip(told[1:], factors, strict=True)})
    calm = study.calm
    assert calm is not None
    assert calm.spared > 0.9
    for candidate, factor, first in zip(found, factors, told[1:], strict=True):
        assert candidate.score.latency_ratio == calm.adjust(slowed(first.score, factor)).latency_ratio
        assert candidate.score.latency_ratio == pytest.approx(first.score.latency_ratio, rel=0.02)
    # What was found holds for what is taken later, and elsewhere.
    [later] = study.confirm({told[0].number: slowed(told[0].score, 1.1)})
    assert later.score.latency_ratio == study.calmed(slowed(told[0].score, 1.1)).latency_ratio
    study.close()
    again = drive()
    assert again.calm == calm
    assert again.candidate(told[0].number) == later


def test_what_was_confirmed_before_slow_times_were_known_is_adjusted_like_the_others(
    drive: Callable[..., Study], folder: Path
) -> None:
    study = drive()
    told = evaluate(study)
    [alone] = study.confirm({told[0].number: slowed(told[0].score, 1.1)})
    assert alone.score.latency_adjusted == 1.0
    study.confirm(
        {c.number: slowed(c.score, factor) for c, factor in zip(told[1:], (1, 1.05, 1.1, 1.15, 1.2), strict=True)}
    )
    assert study.calm is not None
    adjusted = study.candidate(told[0].number)
    assert adjusted.score == study.calm.adjust(alone.score) != alone.score
    study.close()
    assert drive().candidate(told[0].number) == adjusted


def test_a_latency_whose_adjustment_was_lost_is_not_taken_for_confirmed(drive: Callable[..., Study]) -> None:
    study = drive()
    told = evaluate(study)
    found = study.confirm(
        {c.number: slowed(c.score, factor) for c, factor in zip(told, (1, 1, 1.05, 1.1, 1.15, 1.2), strict=True)}
    )
    assert any(c.score.latency_adjusted != 1.0 for c in found)
    study._study.set_user_attr("calm", None)
    study.close()
    for before, candidate in zip(found, drive().candidates(), strict=True):
        assert candidate.score.confirmed == (before.score.latency_adjusted == 1.0)


def test_a_confirmed_number_that_cannot_stand_is_refused(drive: Callable[..., Study], folder: Path) -> None:
    study = drive()
    chosen = evaluate(study)[0]
    with pytest.raises(MeasurementError, match="latency_ratio: must be finite"):
        study.confirm({chosen.number: dataclasses.replace(chosen.score, latency_ratio=math.nan)})
    assert study.candidate(chosen.number) == chosen
    study.close()
    assert Study(folder, run_of()).candidate(chosen.number) == chosen


# --- studies of version 0.1


@pytest.mark.journal
def test_a_study_of_version_0_1_reads_and_continues(drive: Callable[..., Study], folder: Path) -> None:
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    old = optuna.create_study(
        storage=storage, study_name="autocompress", directions=["maximize", "minimize", "minimize"]
    )
    old.set_user_attr("identity", {"schema": 1, **identity_of(run_of(), model="m", data="d", space=TINY)})
    expected = {}
    ladder = list(uniform_ladder(TINY))
    for number, params in enumerate(ladder):
        old.enqueue_trial(params, user_attrs={"origin": "seed"})
        trial = old.ask()
        plan = TINY.decode(trial.suggest_categorical)  # type: ignore[arg-type]
        trial.set_user_attr("plan", json.loads(plan.to_json()))
        if number == len(ladder) - 1:
            trial.set_user_attr("failure", "logits: not finite")
            old.tell(trial, state=TrialState.FAIL)
            continue
        score = score_of(plan)
        kept = dataclasses.asdict(score)
        for name in ("divergence", "peak_memory_bytes", "confirmed", "stages"):
            del kept[name]
        trial.set_user_attr("measurement", kept)
        old.tell(trial, [score.accuracy, score.size_bytes, score.latency_ratio])
        expected[trial.number] = (plan, score)
    for study in (Study(folder, run_of()), drive(space=TINY)):
        complete = [c for c in study.candidates() if c.state == "COMPLETE"]
        assert {c.number: (c.plan, c.measurement) for c in complete} == expected
        assert {c.origin for c in study.candidates()} == {"uniform"}
        first = complete[0].score
        assert (first.divergence, first.peak_memory_bytes, first.confirmed, first.stages) == (None, None, False, {})
        assert study.candidate(len(ladder) - 1).failure == "logits: not finite"
        assert study.finished == len(ladder) >= 3
        assert study.front().points
    left = TINY_PLANS - len(ladder)
    assert study.remaining == left > 0
    assert len(evaluate(study)) == left
    _, front, report = written(folder, study)
    assert len(front) >= 1
    assert "<html" in report


# --- continuing


def test_a_study_that_is_opened_again_is_the_same(drive: Callable[..., Study], folder: Path) -> None:
    study = drive("search.trials=12")
    evaluate(study, 7)
    study.tell(*(study.ask() or pytest.fail("nothing asked for")), "broken")
    study.close()
    for again in (Study(folder, run_of("search.trials=12")), drive("search.trials=12")):
        assert again.candidates() == study.candidates()
        assert again.front() == study.front()
        assert again.front().reference == make_reference()
        assert (again.finished, again.remaining, again.interrupted, again.repaired) == (8, 4, 0, None)


def test_a_larger_number_of_trials_continues_a_study(drive: Callable[..., Study]) -> None:
    study = drive()
    first = evaluate(study)
    study.close()
    again = drive("search.trials=8")
    assert again.remaining == 2
    more = evaluate(again)
    assert len(more) == 2
    assert len({*plan_ids(first), *plan_ids(more)}) == 8
    assert again.candidates()[:6] == first
    again.close()
    smaller = drive("search.trials=4")
    assert (smaller.finished, smaller.remaining, smaller.ask()) == (8, 0, None)


def test_seeds_are_not_enqueued_again(drive: Callable[..., Study]) -> None:
    ladder = [SMALL.plan(params).plan_id for params in uniform_ladder(SMALL)]
    found: list[str] = []
    for trials in (4, 9, len(ladder)):
        study = drive(f"search.trials={trials}")
        found += plan_ids(evaluate(study))
        study.close()
    assert found == ladder


def test_interrupted_trials_are_asked_for_again_and_not_counted(drive: Callable[..., Study], folder: Path) -> None:
    budget = len(list(uniform_ladder(SMALL)))
    study = drive(f"search.trials={budget}")
    evaluate(study, 2)
    lost = [study.ask() or pytest.fail("nothing asked for") for _ in range(3)]
    assert states(folder)["RUNNING"] == 3
    study.close()  # the driver dies here
    assert Study(folder, run_of()).finished == 2
    again = drive(f"search.trials={budget}")
    assert (again.interrupted, again.finished, again.remaining) == (3, 2, budget - 2)
    assert "RUNNING" not in states(folder)
    assert [t.state.name for t in rows(folder) if t.number in {n for n, _ in lost}] == ["FAIL"] * 3
    told = evaluate(again)
    assert len(told) == budget - 2
    assert {plan.plan_id for _, plan in lost} <= set(plan_ids(told))
    assert {c.origin for c in told} == {"uniform"}
    assert len(set(plan_ids(again.candidates()))) == len(again.candidates()) == budget
    assert not {n for n, _ in lost} & {c.number for c in again.candidates()}


def test_interrupted_proposals_of_the_sampler_come_first(drive: Callable[..., Study]) -> None:
    budget = ("search.trials=9", "search.seeds=false")
    study = drive(*budget)
    evaluate(study, 3)
    lost = [plan.plan_id for _, plan in filter(None, (study.ask() for _ in range(2)))]
    study.close()
    told = evaluate(drive(*budget))
    assert plan_ids(told)[:2] == lost
    assert {c.origin for c in told} <= {"sampler", "mutation"}
    assert len(told) == 6


def test_an_interrupted_trial_is_the_next_to_be_evaluated(drive: Callable[..., Study]) -> None:
    # The seeds that still wait are more than the budget leaves: behind them it would never have its turn.
    study = drive("search.trials=4")
    evaluate(study, 2)
    _, lost = study.ask() or pytest.fail("nothing asked for")
    study.close()
    again = drive("search.trials=4")
    assert again.interrupted == 1
    assert lost.plan_id in plan_ids(evaluate(again))


def test_a_trial_that_is_interrupted_again_and_again_stays_one(drive: Callable[..., Study]) -> None:
    budget = len(list(uniform_ladder(SMALL)))
    for attempt in range(4):
        study = drive(f"search.trials={budget}")
        assert study.interrupted == min(attempt, 1)
        study.ask()
        study.close()
    told = evaluate(drive(f"search.trials={budget}"))
    assert sorted(plan_ids(told)) == sorted(SMALL.plan(params).plan_id for params in uniform_ladder(SMALL))


@pytest.mark.journal
def test_a_driver_killed_between_any_two_records_loses_no_seed(
    drive: Callable[..., Study], tmp_path: Path, folder: Path
) -> None:
    ladder = sorted(TINY.plan(params).plan_id for params in uniform_ladder(TINY))
    trials = f"search.trials={len(ladder)}"
    study = drive(trials, space=TINY)
    evaluate(study, 1)
    study.ask()
    study.close()
    lines = (folder / "study.journal").read_bytes().splitlines(keepends=True)
    assert len(lines) > 10
    for count in range(len(lines) + 1):
        copy = tmp_path / str(count)
        shutil.copytree(folder, copy)
        (copy / "study.journal").write_bytes(b"".join(lines[:count]))
        again = drive(trials, space=TINY, at=copy)
        evaluate(again)
        assert sorted(plan_ids(again.candidates())) == ladder
        assert "RUNNING" not in states(copy)
        again.close()


_DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_study import SMALL, identity_of, run_of, score_of
from autocompress.study import Study
run = run_of("search.trials={trials}")
study = Study(Path(sys.argv[1]), run, identity=identity_of(run, model="m", data="d", space=SMALL), space=SMALL,
              writable=True)
print("open", flush=True)
while (asked := study.ask()) is not None:
    print(study.tell(*asked, score_of(asked[1])).number, flush=True)
sys.stdin.read()
"""


def start_driver(folder: Path, trials: int) -> subprocess.Popen[str]:
    code = _DRIVER.format(tests=str(Path(__file__).parent), trials=trials)
    command = [sys.executable, "-c", code, str(folder)]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "open\n"
    return driver


def kill(driver: subprocess.Popen[str]) -> None:
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    for stream in (driver.stdin, driver.stdout):
        if stream is not None:
            stream.close()


def test_a_driver_that_is_killed_loses_nothing_that_it_told(drive: Callable[..., Study], folder: Path) -> None:
    told: list[int] = []
    for count in (3, 11, 1):
        driver = start_driver(folder, 60)
        assert driver.stdout is not None
        told += [int(driver.stdout.readline()) for _ in range(count)]
        kill(driver)
        study = drive("search.trials=60")
        assert set(told) <= {c.number for c in study.candidates()}
        assert "RUNNING" not in states(folder)
        study.close()
    final = drive("search.trials=60")
    evaluate(final)
    assert final.finished == 60
    assert len(set(plan_ids(final.candidates()))) == 60
    assert [c.measurement for c in final.candidates()] == [score_of(c.plan) for c in final.candidates()]


# --- one driver at a time


def test_a_second_driver_is_refused_until_the_first_has_closed(drive: Callable[..., Study], folder: Path) -> None:
    first = drive()
    evaluate(first, 2)
    before = rows(folder)
    with pytest.raises(StudyError, match="another search drives this study"):
        drive()
    assert rows(folder) == before
    assert Study(folder, run_of()).finished == 2, "reading is allowed meanwhile"
    first.close()
    assert drive().finished == 2


def test_a_driver_in_another_process_is_respected_until_it_is_killed(drive: Callable[..., Study], folder: Path) -> None:
    driver = start_driver(folder, 1)
    with pytest.raises(StudyError, match="another search drives this study"):
        drive()
    kill(driver)
    assert drive().remaining >= 5


@pytest.mark.journal
def test_locks_that_are_left_lying_hold_nobody_up(drive: Callable[..., Study], folder: Path) -> None:
    study = drive()
    evaluate(study, 2)
    study.close()
    assert (folder / "study.lock").is_file(), "it always stays; what counts is whether somebody holds it"
    assert (folder / "study.journal.flock").is_file()
    lock = folder / "study.journal.lock"
    assert not lock.exists(), "another program would wait until it is stale"
    lock.symlink_to(folder / "study.journal")  # what another program that was killed while it wrote leaves there
    start = time.monotonic()
    again = drive()
    assert again.finished == 2
    assert len(evaluate(again)) == 4
    assert time.monotonic() - start < 5, "nobody waits for it to grow old"


def test_a_refused_study_can_be_opened_rightly_in_the_same_process(drive: Callable[..., Study]) -> None:
    drive().close()
    with pytest.raises(StudyError, match="other settings"):
        drive(model="another")
    assert drive().remaining == 6


# --- what must be the same to continue


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"model": "m2"}, "(model: m became m2)"),
        ({"data": "d2"}, "(data: d became d2)"),
        ({"machine": "b"}, "(machine: null became b)"),
    ],
)
def test_another_model_data_or_machine_is_refused(
    drive: Callable[..., Study], folder: Path, change: dict[str, str], difference: str
) -> None:
    study = drive()
    evaluate(study, 2)
    study.close()
    before = rows(folder)
    with pytest.raises(StudyError) as caught:
        drive(**change)
    assert difference in str(caught.value)
    assert "--out" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert rows(folder) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("identity.LATENCY_PROTOCOL", r"took latencies otherwise.* retarget .* -o NEW measures its front anew"),
        (
            "runtimes.openvino.OpenVINORuntime.arithmetic",
            r"computed otherwise with openvino.* retarget .* -o NEW scores its front anew",
        ),
    ],
)
def test_what_was_measured_otherwise_is_read_and_not_added_to(
    drive: Callable[..., Study], folder: Path, monkeypatch: pytest.MonkeyPatch, changed: str, said: str
) -> None:
    study = drive()
    evaluate(study, 2)
    study.close()
    before = rows(folder)
    monkeypatch.setattr(f"autocompress.{changed}", "of another version")
    with pytest.raises(StudyError, match=said):
        drive()
    with pytest.raises(StudyError, match=said):
        Study(folder, run_of(), writable=True)
    assert rows(folder) == before
    assert len(Study(folder, run_of()).candidates()) == 2


def test_a_study_says_whether_what_is_built_now_compares(
    drive: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = drive()
    assert study.identity.outdated is None
    monkeypatch.setattr("autocompress.runtimes.openvino.OpenVINORuntime.arithmetic", "of another version")
    assert "nothing is added to it or exported from it" in str(study.identity.outdated)


@pytest.mark.parametrize("database", [False, True])
def test_a_file_system_without_locks_is_no_other_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: bool
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    refused = pytest.raises(StudyError, match=r"has no locks \(No locks available\).* database \(storage\.study\)")
    with nullcontext() if database else refused, held(tmp_path / "results", needed=not database):
        assert (tmp_path / "results").is_dir()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("objectives=[accuracy, latency]", ("objectives: ", '["accuracy", "size_bytes", "latency"] became')),
        ("target.tokens=32", ("target: ", '"tokens": 64', '"tokens": 32')),
        ("target.runtime=onnxruntime", ("target: ", '"runtime": "openvino"', '"runtime": "onnxruntime"')),
        ("recovery.epochs=7", ("recovery: ", '"epochs": 1.0', '"epochs": 7.0')),
    ],
)
def test_another_objective_target_or_recovery_is_refused(
    drive: Callable[..., Study], override: str, parts: tuple[str, ...]
) -> None:
    drive().close()
    with pytest.raises(StudyError) as caught:
        drive(override)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_space_is_refused_even_under_the_same_name(drive: Callable[..., Study]) -> None:
    drive(space=TINY).close()
    with pytest.raises(StudyError, match=r"space: test [0-9a-f]{12} became encoder-small [0-9a-f]{12}\)"):
        drive()
    with pytest.raises(StudyError, match=r"space: test [0-9a-f]{12} became test [0-9a-f]{12}\)"):
        drive(space=space_of(TINY_SPACE.replace("[8, 16]", "[8, 4]")))
    assert drive(space=TINY).remaining == 6


def test_what_may_change_does(drive: Callable[..., Study]) -> None:
    drive().close()
    overrides = ("search.trials=9", "search.workers=3", "search.latency_pairs=7", "constraints.max_size_mb=3")
    assert drive(*overrides, "search.seed=9").remaining == 9


# --- the journal


def cuts(record: bytes) -> list[int]:
    """Return about 40 numbers of bytes to cut off, the whole record and its newline alone among them."""
    return sorted({1, 2, len(record) - 1, len(record), *range(1, len(record), max(1, len(record) // 36))})


@pytest.mark.parametrize("last", ["told", "asked"])
@pytest.mark.journal
def test_a_torn_last_record_is_cut_off(drive: Callable[..., Study], tmp_path: Path, folder: Path, last: str) -> None:
    study = drive(space=TINY)
    evaluate(study, 3)
    asked = study.ask() or pytest.fail("nothing asked for")
    if last == "told":
        study.tell(*asked, score_of(asked[1]))
    study.close()
    kept = study.candidates()[:3]
    content = (folder / "study.journal").read_bytes()
    record = content.splitlines(keepends=True)[-1]
    positions = cuts(record)
    assert len(positions) >= 35
    for position in positions:
        copy = tmp_path / f"{last}-{position}"
        shutil.copytree(folder, copy)
        torn = content[: len(content) - position]
        (copy / "study.journal").write_bytes(torn)
        again = drive(space=TINY, at=copy)
        if position == len(record):
            assert again.repaired is None
        else:
            assert again.repaired is not None
            assert again.repaired.parent == copy
            assert again.repaired.read_bytes() == torn
        assert again.candidates() == kept
        assert again.interrupted == 1
        evaluate(again)
        again.close()
        read = Study(copy, run_of())
        assert read.finished == 6
        assert read.candidates()[:3] == kept
        assert len(set(plan_ids(read.candidates()))) == 6


@pytest.mark.journal
def test_a_torn_journal_can_be_read_and_is_left_as_it_is(drive: Callable[..., Study], folder: Path) -> None:
    study = drive()
    evaluate(study, 3)
    study.close()
    journal = folder / "study.journal"
    torn = journal.read_bytes()[:-9]
    journal.write_bytes(torn)
    assert Study(folder, run_of()).candidates() == study.candidates()[:2]
    assert journal.read_bytes() == torn
    assert not list(folder.glob("*.torn-*"))


@pytest.mark.journal
def test_a_last_record_that_is_whole_but_no_json_is_cut_off(drive: Callable[..., Study], folder: Path) -> None:
    study = drive()
    evaluate(study, 3)
    study.close()
    journal = folder / "study.journal"
    content = journal.read_bytes()
    journal.write_bytes(content + b"\x00" * 300 + b"\n")
    again = drive()
    assert again.repaired is not None
    assert again.candidates() == study.candidates()
    assert journal.read_bytes()[: len(content)] == content


@pytest.mark.journal
def test_a_disk_that_is_full_in_mid_record_keeps_what_was_told(drive: Callable[..., Study], folder: Path) -> None:
    study = drive()
    told = evaluate(study, 3)
    number, plan = study.ask() or pytest.fail("nothing asked for")
    journal = folder / "study.journal"
    room = journal.stat().st_size + 40
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # what goes beyond is cut off, as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            study.tell(number, plan, score_of(plan))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    study.close()
    assert journal.stat().st_size == room, "half a record"
    assert Study(folder, run_of()).candidates() == told
    again = drive()
    assert again.repaired is not None
    assert (again.candidates(), again.interrupted) == (told, 1)
    assert plan.plan_id in plan_ids(evaluate(again))
    assert again.finished == 6


@pytest.mark.journal
def test_a_sound_journal_is_not_repaired(drive: Callable[..., Study], folder: Path) -> None:
    evaluate(drive(), 2)
    before = (folder / "study.journal").read_bytes()
    assert repair_tail(folder / "study.journal") is None
    assert (folder / "study.journal").read_bytes() == before


@pytest.mark.journal
def test_a_corrupt_line_in_the_middle_is_refused_and_left_alone(drive: Callable[..., Study], folder: Path) -> None:
    study = drive()
    evaluate(study, 3)
    study.close()
    journal = folder / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[len(lines) // 2] = b'{"op_code": 4, "wor\n'
    journal.write_bytes(b"".join(lines))
    for open_ in (drive, lambda: Study(folder, run_of())):
        with pytest.raises(StudyError) as caught:
            open_()
        assert str(caught.value).startswith(f"{journal}: cannot be read (")
        assert "\n" not in str(caught.value)
    assert journal.read_bytes() == b"".join(lines)


@pytest.mark.journal
def test_a_folder_without_a_study_is_refused(folder: Path) -> None:
    with pytest.raises(StudyError, match=r"holds no study\.journal; run: autocompress search"):
        Study(folder, run_of())
    assert not (folder / "study.journal").exists(), "reading makes no files"


# --- constraints, recovered points


def test_constraints_keep_candidates_off_the_front(drive: Callable[..., Study], folder: Path) -> None:
    limit = "constraints.max_size_mb=10"
    study = drive("search.trials=20", limit)
    told = evaluate(study)
    over = {c.number for c in told if c.score.size_bytes > 10_000_000}
    assert 0 < len(over) < 20
    assert {c.number for c in told if not c.feasible} == over
    assert study.front().points
    assert not over & {c.number for c in study.front().points}
    study.close()
    assert Study(folder, run_of(limit)).front() == study.front()
    assert all(c.feasible for c in Study(folder, run_of()).candidates())


def test_the_front_is_empty_where_nothing_is_feasible(drive: Callable[..., Study]) -> None:
    study = drive("constraints.max_latency_ratio=1e-6")
    evaluate(study)
    assert len(study.front()) == 0
    with pytest.raises(NoFeasiblePointError, match="no candidate completed within the constraints"):
        study.front().pick()


def test_a_recovered_point_is_added_on_top(drive: Callable[..., Study], folder: Path) -> None:
    study = drive()
    best = evaluate(study)[0]
    plan = best.plan.with_decision(MODEL_SITE, Recover(epochs=1))
    score = make_measurement(accuracy=0.99, size_bytes=500_000, ratio=0.05)
    added = study.add(plan, score, origin="recover")
    assert (added.state, added.origin, added.plan, added.measurement) == ("COMPLETE", "recover", plan, score)
    assert added.number not in [c.number for c in study.candidates() if c.plan != plan]
    assert [c.number for c in study.front().points] == [added.number]
    assert (study.finished, study.remaining) == (6, 0)
    assert study.add(plan, score, origin="recover") == added, "a known plan is not added twice"
    assert added.params == {}
    assert added not in study.told_front(), "what is new is neither trained nor fitted, and not held against it"
    assert len(study.candidates()) == 7
    study.close()
    again = drive("search.trials=8")
    assert again.candidates() == study.candidates()
    assert (again.finished, again.remaining) == (6, 2)
    evaluate(again)
    assert again.finished == 8
    assert rows(folder)[added.number].state == TrialState.COMPLETE


def test_what_is_brought_in_is_learned_from_as_what_was_asked_for(drive: Callable[..., Study], folder: Path) -> None:
    params: dict[str, Any] = {}
    drawn = random.Random(5)
    plan = SMALL.decode(lambda name, choices: params.setdefault(name, drawn.choice(choices)))
    study = drive("search.trials=3")
    added = study.add(plan, make_measurement(accuracy=0.99, size_bytes=500_000, ratio=0.05), origin="retarget")
    assert added.params == params
    assert study.told_front() == [added]
    study.close()
    again = drive("search.trials=30", "search.seeds=false")
    assert again.candidate(added.number) == added
    assert rows(folder)[added.number].params == params
    assert {c.origin for c in evaluate(again)} == {"sampler", "mutation"}


# --- numbers, ends


def test_an_unknown_number_names_the_nearest(drive: Callable[..., Study]) -> None:
    study = drive("search.trials=3")
    with pytest.raises(StudyError, match=r"^trial 0: no such candidate; the study has none yet$"):
        study.candidate(0)
    numbers = [c.number for c in evaluate(study)]
    assert study.candidate(numbers[1]).number == numbers[1]
    with pytest.raises(StudyError, match=f"^trial 99: no such candidate; the nearest is trial {max(numbers)}$"):
        study.candidate(99)
    on_front = [c.number for c in study.front().points]
    with pytest.raises(
        NoFeasiblePointError, match=f"^trial 99: not on the front; the nearest is trial {max(on_front)}"
    ):
        study.front().trial(99)


def test_the_front_knows_what_diverges_least(drive: Callable[..., Study]) -> None:
    study = drive("search.trials=20")
    rng = np.random.default_rng(0)
    while (asked := study.ask()) is not None:
        study.tell(*asked, dataclasses.replace(score_of(asked[1]), divergence=float(rng.uniform(0, 1))))
    front = study.front()
    assert front.nearby
    limit = float(np.median([c.score.latency_ratio for c in study.candidates()]))
    kept = [c for c in study.candidates() if c.score.latency_ratio <= limit]
    least = min(c.score.divergence for c in kept)
    assert front.pick(prefer="divergence", max_latency_ratio=limit).score.divergence == least


def written(folder: Path, study: Study) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    study.close()
    api.write_results(Study(folder, study.run))
    frames = [pd.read_csv(folder / name) for name in ("study.csv", "pareto.csv")]
    for frame in frames:
        assert set(CSV_COLUMNS) <= set(frame.columns)
    return frames[0], frames[1], (folder / "report.html").read_text(encoding="utf-8")


def test_results_where_all_trials_fail(drive: Callable[..., Study], folder: Path) -> None:
    study = drive("search.trials=3")
    while (asked := study.ask()) is not None:
        study.tell(*asked, "logits: 3 of 60 rows are not finite")
    everything, front, report = written(folder, study)
    assert list(everything["state"]) == ["FAIL"] * 3
    assert list(everything["failure"]) == ["logits: 3 of 60 rows are not finite"] * 3
    assert len(front) == 0
    assert "logits: 3 of 60 rows are not finite" in report
    with pytest.raises(NoFeasiblePointError, match="the front is empty"):
        study.front().pick()


def test_results_of_one_trial(drive: Callable[..., Study], folder: Path) -> None:
    study = drive("search.trials=1")
    told = evaluate(study)[0]
    everything, front, report = written(folder, study)
    assert list(everything["number"]) == list(front["number"]) == [told.number]
    assert front["size_bytes"][0] == told.score.size_bytes
    assert {f"param.{name}" for name in told.params} <= set(front.columns)
    assert "<html" in report
    for prefer in ("knee", "latency", "size", "accuracy"):
        assert study.front().pick(prefer=prefer) == told  # type: ignore[arg-type]


def test_results_where_all_objectives_are_equal(drive: Callable[..., Study], folder: Path) -> None:
    study = drive("search.trials=25")
    while (asked := study.ask()) is not None:
        study.tell(*asked, make_measurement())
    everything, front, report = written(folder, study)
    assert len(everything) == 25
    assert set(everything["state"]) == {"COMPLETE"}
    assert len(front) == 1
    assert "<html" in report
    assert study.front().pick().number == front["number"][0]


def test_a_study_whose_reference_is_gone_says_so(drive: Callable[..., Study], folder: Path) -> None:
    study = drive()
    told: dict[str, Any] = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    del told["reference"]
    (folder / "environment.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(StudyError, match=r"environment\.json: cannot be read"):
        _ = study.reference
