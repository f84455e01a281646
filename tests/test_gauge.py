"""What measures: here or on a device, with how much patience, and from which pace on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers_artefacts import INPUTS, TARGET, built
from helpers_records import make_measurement

from autocompress import fresh, timing
from autocompress.config import RunConfig
from autocompress.errors import StudyError
from autocompress.gauge import Gauge
from autocompress.records import Measurement
from autocompress.runtimes import Artifact, get_runtime
from autocompress.stand import Moments

VOCABULARY = 30
BLOCK = np.array([0.25, 0.25])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return built("openvino", tmp_path_factory.mktemp("gauge") / "reference")


def gauge(reference: Artifact, *overrides: str) -> Gauge:
    run = RunConfig.from_mapping({"target": {"tokens": TARGET.tokens}}, overrides=overrides)
    return Gauge(run, get_runtime("openvino"), reference.folder, lambda: VOCABULARY)


class Elsewhere:
    """A device of paper, on which each model takes half of what the reference does."""

    def __init__(self, name: str = "elsewhere") -> None:
        self.fingerprint = {"id": name}
        self.asked: list[dict[str, Any]] = []

    def rounds(self, artefacts: Sequence[Artifact], count: int, **asked: Any) -> list[Moments]:
        self.asked.append({"count": count, **asked})
        return [[[timing.Pair(BLOCK, 2 * BLOCK)] * count] for _ in artefacts]


def taken(own: Gauge, reference_ms: float, machine: str | None = None) -> Measurement:
    """Return what was measured with ``own``, or on another machine."""
    about = own.fingerprint if machine is None else {**own.fingerprint, "id": machine}
    return dataclasses.replace(make_measurement(), reference_ms=reference_ms, fingerprint=about)


def test_a_front_is_timed_with_the_pace_and_the_patience_that_its_scores_tell(reference: Artifact) -> None:
    own, there = gauge(reference), Elsewhere()
    own.device = there  # type: ignore[assignment]
    measured = [taken(own, 9.0), taken(own, 8.0), taken(own, 5.0, "another machine")]
    found = own.confirmed([(reference, m) for m in measured], pairs=4, quiet=None, progress=print)
    [asked] = there.asked
    assert asked["count"] == 4
    assert asked["pace_ms"] == 8.0, "of those that were measured where these are"
    longest_s = max(max(m.latency_ms, m.reference_ms) for m in measured) / 1e3
    assert asked["patience_s"] == fresh.patience_s(3 * timing.RUNS_OF_A_PAIR, longest_s)
    for before, after in zip(measured, found, strict=True):
        assert (after.latency_ratio, after.confirmed) == (0.5, True)
        assert (after.accuracy, after.fingerprint) == (before.accuracy, before.fingerprint)


def test_of_another_machine_no_pace_is_known(reference: Artifact) -> None:
    own, there = gauge(reference), Elsewhere()
    own.device = there  # type: ignore[assignment]
    own.confirmed([(reference, taken(own, 9.0, "another machine"))], pairs=1, quiet=None, progress=print)
    assert there.asked[0]["pace_ms"] is None
    assert own.confirmed([], pairs=1, quiet=None, progress=print) == []
    assert len(there.asked) == 1, "nothing is timed for nothing"


def test_what_a_device_is_to_measure_is_not_measured_here(reference: Artifact) -> None:
    own = gauge(reference, "search.device={phone: 1}")
    with pytest.raises(StudyError, match=r"on a node with phone: 1; give its --address$"):
        own.confirmed([(reference, make_measurement())], pairs=1, quiet=None, progress=print)
    own.use(lambda method, *_: lambda: {"id": method})
    own.require()
    assert own.machine == {"id": "fingerprint"}


def test_inputs_have_the_targets_shape_and_known_tokens(reference: Artifact) -> None:
    found = gauge(reference).inputs(reference)
    assert {name: values.shape for name, values in found.items()} == {name: v.shape for name, v in INPUTS.items()}
    assert found["input_ids"].max() < VOCABULARY


@pytest.mark.parametrize("asks", [False, True])
def test_memory_is_measured_where_the_run_asks(reference: Artifact, asks: bool) -> None:
    own = gauge(reference, *(["constraints.max_memory_mb=1000"] if asks else []))
    assert own.measures_memory == asks
    assert (own.memory(reference) is not None) == asks


def test_a_stand_that_lets_go_of_its_reference_loads_it_again(reference: Artifact) -> None:
    stand = gauge(reference).stand
    stand.close()
    first = stand.reference
    stand.close()
    again = stand.reference
    assert again is not first
    assert np.isfinite(again.run(INPUTS)).all()
