"""The ledger: what is written of a candidate is what is read back, whatever became of it."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import optuna
import pytest
from helpers_records import make_candidate, make_measurement, make_reference

from autocompress.config import RunConfig
from autocompress.ledger import Ledger, excesses
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate, Measurement, Stopped

PLANS = [make_candidate(number).plan for number in range(4)]
STOPPED = Stopped(reason="loss at least 0.5 after 100 of 1000 rows", rows=100, size_bytes=2e7, latency=0.5)


def ledger_of(study: optuna.Study, *overrides: str) -> Ledger:
    run = RunConfig.from_mapping({}, overrides=overrides)
    return Ledger(study, run, Path("results"), make_reference)


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(directions=["maximize", "minimize", "minimize"])


def told(
    study: optuna.Study, ledger: Ledger, plan: CompressionPlan, result: Measurement | Stopped | str, origin: str
) -> Candidate:
    """Ask for a trial as a search does, and record its end."""
    study.enqueue_trial({"bits": 8}, user_attrs={"origin": origin})
    trial = study.ask()
    trial.suggest_categorical("bits", [4, 8])
    trial.set_user_attr("plan", json.loads(plan.to_json()))
    return ledger.record(trial, plan, result)


def test_every_end_is_read_back_as_it_was_told(study: optuna.Study) -> None:
    ledger = ledger_of(study, "constraints.max_size_mb=15")
    results = [
        make_measurement(size_bytes=10_000_000),
        make_measurement(size_bytes=20_000_000),
        STOPPED,
        "logits: not finite",
    ]
    origins = ["uniform", "sampler", "mutation", "sensitivity"]
    known = {c.number: c for c in (told(study, ledger, *each) for each in zip(PLANS, results, origins, strict=True))}
    assert ledger_of(study, "constraints.max_size_mb=15").candidates() == known
    assert [c.state for c in known.values()] == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
    assert [c.feasible for c in known.values()] == [True, False, True, True]
    assert [c.failure for c in known.values()] == [None, None, STOPPED.reason, "logits: not finite"]
    assert [c.origin for c in known.values()] == origins
    assert all(c.params == {"bits": 8} for c in known.values())
    read = ledger.candidates()
    for number, candidate in known.items():
        assert candidate.span is not None
        assert candidate.span[0] < candidate.span[1] < time.time() + 1
        assert read[number].span == pytest.approx(candidate.span, abs=1.0)
    assert ledger.add(make_candidate(9).plan, make_measurement(), "recover", {}).span is None


def test_what_was_not_asked_for_is_read_back_too(study: optuna.Study) -> None:
    ledger = ledger_of(study)
    added = ledger.add(PLANS[0], make_measurement(), "recover", {})
    assert ledger.candidates() == {added.number: added}
    assert study.trials[added.number].values == [0.85, 20_000_000, 0.5]


def test_a_latency_taken_anew_is_read_and_the_sampler_keeps_what_it_was_told(study: optuna.Study) -> None:
    ledger = ledger_of(study, "constraints.max_latency_ratio=0.45")
    first = told(study, ledger, PLANS[0], make_measurement(ratio=0.5), "sampler")
    assert not first.feasible
    latest = dataclasses.replace(make_measurement(ratio=0.4), confirmed=True)
    anew = ledger.confirm({first.number: first}, {first.number: latest})[first.number]
    assert anew.feasible
    assert ledger.candidates() == {first.number: anew}
    assert study.trials[first.number].values[2] == 0.5


def test_interrupted_repeated_and_running_trials_are_no_candidates(study: optuna.Study) -> None:
    ledger = ledger_of(study)
    kept = told(study, ledger, PLANS[0], make_measurement(), "sampler")
    study.ask().set_user_attr("plan", json.loads(PLANS[1].to_json()))
    repeated = study.ask()
    repeated.set_user_attr("duplicate", PLANS[0].plan_id)
    study.tell(repeated, state=optuna.trial.TrialState.FAIL)
    interrupted = study.ask()
    interrupted.set_user_attr("plan", json.loads(PLANS[2].to_json()))
    interrupted.set_user_attr("interrupted", True)
    study.tell(interrupted, state=optuna.trial.TrialState.FAIL)
    assert ledger.candidates() == {kept.number: kept}


def test_seeds_of_version_0_1_were_uniform_plans(study: optuna.Study) -> None:
    ledger = ledger_of(study)
    seed = told(study, ledger, PLANS[0], make_measurement(), "seed")
    assert ledger.candidates()[seed.number].origin == "uniform"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ("constraints.max_accuracy_drop=0.03", {"accuracy_drop": 0.0}),
        ("constraints.max_accuracy_drop=0.01", {"accuracy_drop": 0.02}),
        ("constraints.max_size_mb=15", {"size_mb": 5.0}),
        ("constraints.max_latency_ms=10", {"latency_ms": -2.0}),
        ("constraints.max_latency_ratio=0.25", {"latency_ratio": 0.25}),
        ("seed=0", {}),
    ],
)
def test_excesses_over_constraints(limits: str, expected: dict[str, float]) -> None:
    found = excesses(make_measurement(), RunConfig.from_mapping({}, overrides=[limits]).constraints, make_reference())
    assert found == pytest.approx(expected)
    assert all(value == 0 or abs(value) > 1e-6 for value in found.values()), "an exact limit is not exceeded"
