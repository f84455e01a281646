"""Scores: which numbers may stand on a front, and that they are stored without loss."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import get_args

import numpy as np
import pytest
from helpers_records import make_candidate, make_measurement

from autocompress.config import Objective, RunConfig
from autocompress.errors import MeasurementError
from autocompress.records import OBJECTIVES, QUALITIES, Z95, Measurement, drift_of

ACCURACIES = ("accuracy", "accuracy_low", "accuracy_high")
POSITIVE = (
    "size_bytes",
    "latency_ms",
    "latency_p90_ms",
    "reference_ms",
    "latency_ratio",
    "latency_ratio_low",
    "latency_ratio_high",
)


def test_a_good_score_passes_unchanged() -> None:
    score = make_measurement()
    assert score.check() is score


@pytest.mark.parametrize("field", ACCURACIES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.001, 1.001])
def test_an_accuracy_outside_its_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(MeasurementError, match=rf"^{field}: must be within 0\.\.1, got "):
        dataclasses.replace(make_measurement(), **{field: value}).check()


@pytest.mark.parametrize("field", ACCURACIES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_the_range_are_accuracies(field: str, value: float) -> None:
    assert getattr(dataclasses.replace(make_measurement(), **{field: value}).check(), field) == value


@pytest.mark.parametrize("field", POSITIVE)
@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -1])
def test_a_size_or_latency_that_is_not_positive_is_refused(field: str, value: float) -> None:
    with pytest.raises(MeasurementError, match=rf"^{field}: must be finite and > 0, got "):
        dataclasses.replace(make_measurement(), **{field: value}).check()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(MeasurementError, match=r"^loss: must be finite, got "):
        dataclasses.replace(make_measurement(), loss=value).check()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9])
def test_a_divergence_below_zero_or_not_finite_is_refused(value: float) -> None:
    with pytest.raises(MeasurementError, match=r"^divergence: must be finite and >= 0, got "):
        dataclasses.replace(make_measurement(), divergence=value).check()


@pytest.mark.parametrize("field", ["accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.001, 1.001])
def test_a_drop_outside_its_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(MeasurementError, match=rf"^{field}: must be within -1\.\.1, got "):
        dataclasses.replace(make_measurement(), **{field: value}).check()


@pytest.mark.parametrize("value", [0, -1])
def test_a_peak_memory_that_is_not_positive_is_refused(value: int) -> None:
    with pytest.raises(MeasurementError, match=r"^peak_memory_bytes: must be > 0, got "):
        dataclasses.replace(make_measurement(), peak_memory_bytes=value).check()


def test_what_was_not_measured_may_be_missing() -> None:
    score = make_measurement()
    assert (score.divergence, score.peak_memory_bytes, score.confirmed, score.stages) == (None, None, False, {})
    both = dataclasses.replace(score, divergence=0.0, peak_memory_bytes=1)
    assert both.check() is both


def test_a_record_without_a_drop_has_none() -> None:
    stored = json.loads(make_measurement().to_json())
    older = {name: value for name, value in stored.items() if not name.startswith("accuracy_drop")}
    assert Measurement.from_json(json.dumps(older)).check().drop is None
    assert Measurement.from_json(json.dumps(stored)).drop == (0.88 - 0.85, 0.87 - 0.85, 0.89 - 0.85)


def test_json_round_trip_is_exact() -> None:
    score = dataclasses.replace(
        make_measurement(), accuracy=1 / 3, latency_ms=math.pi, fingerprint={"cpu": "x", "threads": 1}
    )
    assert Measurement.from_json(score.to_json()) == score
    more = dataclasses.replace(
        score, divergence=2 / 3, peak_memory_bytes=123, confirmed=True, stages={"build": 0.1, "accuracy": 1 / 3}
    )
    assert Measurement.from_json(more.to_json()) == more


def test_a_record_of_version_0_1_has_no_new_fields() -> None:
    kept = json.loads(make_measurement().to_json())
    for name in ("divergence", "peak_memory_bytes", "confirmed", "stages"):
        del kept[name]
    assert Measurement.from_json(json.dumps(kept)) == make_measurement()


def test_what_was_confirmed_before_latencies_were_adjusted_is_not_what_is_confirmed_now() -> None:
    stored = json.loads(dataclasses.replace(make_measurement(), confirmed=True).to_json())
    assert Measurement.from_plain(stored).confirmed
    del stored["latency_adjusted"]
    assert Measurement.from_plain(stored) == make_measurement()


def test_a_failed_candidate_has_a_reason_in_place_of_a_score() -> None:
    failed = make_candidate(7, state="FAIL", failure="logits: not finite")
    with pytest.raises(MeasurementError, match=r"^trial 7: has no measurement \(logits: not finite\)$"):
        _ = failed.score
    assert make_candidate(8).score is not None


def test_objectives_are_those_of_the_run_file_and_read_fields_of_a_score() -> None:
    assert tuple(OBJECTIVES) == get_args(Objective)
    assert set(RunConfig().objectives) <= set(OBJECTIVES)
    assert set(QUALITIES) == {"accuracy", "loss", "divergence"}
    fields = {field.name for field in dataclasses.fields(Measurement)}
    for field, direction in OBJECTIVES.values():
        assert field in fields
        assert direction == ("maximize" if field == "accuracy" else "minimize")


class TestDrift:
    """Latencies of one artefact differ from one time to another by more than pairs of one time tell."""

    DRIFT, ARTEFACTS = 0.03, 4000

    def taken(self, seed: int) -> list[Measurement]:
        """Return what was seen at one time of artefacts of one latency, each with an interval that is too narrow."""
        rng = np.random.default_rng(seed)
        scores = [make_measurement(ratio=0.3 * math.exp(rng.normal(0, self.DRIFT))) for _ in range(self.ARTEFACTS)]
        assert all(score.latency_deviation < self.DRIFT for score in scores)
        return scores

    def test_it_is_found(self) -> None:
        assert drift_of(self.taken(0), self.taken(1)) == pytest.approx(self.DRIFT, rel=0.05)
        assert drift_of([make_measurement()] * 3, [make_measurement()] * 3) == 0.0

    def test_what_all_differ_by_alike_is_none(self) -> None:
        before, after = self.taken(0), self.taken(1)
        shifted = [dataclasses.replace(score, latency_ratio=1.1 * score.latency_ratio) for score in before]
        assert drift_of(shifted, after) == pytest.approx(drift_of(before, after))

    def test_an_interval_with_it_holds_at_another_time(self) -> None:
        widened = [score.drifting(self.DRIFT) for score in self.taken(2)]
        held = [score.latency_ratio_low <= 0.3 <= score.latency_ratio_high for score in widened]
        assert np.mean(held) == pytest.approx(0.95, abs=0.015)
        assert {score.latency_drift for score in widened} == {self.DRIFT}

    def test_an_end_that_is_farther_away_stays(self) -> None:
        score = dataclasses.replace(make_measurement(ratio=0.5), latency_ratio_low=0.5, latency_ratio_high=0.55)
        found = score.drifting(0.02)
        assert found.latency_ratio_low == pytest.approx(0.5 * math.exp(-Z95 * 0.02))
        assert found.latency_ratio_high == 0.55
        assert score.drifting(0.0) is score
