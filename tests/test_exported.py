"""Measuring an exported folder: what is not one is refused before anything is loaded, and all pairs are taken."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_records import make_measurement

from autocompress import exported as exported_folder
from autocompress import machine, timing
from autocompress.config import TargetConfig
from autocompress.decisions import Quantize
from autocompress.errors import ConfigError, ExportError
from autocompress.plan import CompressionPlan
from autocompress.runtimes import Artifact


class Session:
    """Notes its runs and takes as long as it is told."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        self._tick()
        return np.zeros((1, 2), dtype=np.float32)


class Runtime:
    """Loads sessions that are three times as fast as the reference's."""

    def __init__(self) -> None:
        self.now = 0.0
        self.loaded: list[str] = []

    def load(self, artifact: Artifact, target: TargetConfig) -> Session:
        self.loaded.append(artifact.folder.name)
        seconds = 0.003 if artifact.folder.name == "reference" else 0.001

        def tick() -> None:
            self.now += seconds

        return Session(tick)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr(exported_folder, "get_runtime", lambda _: found)
    monkeypatch.setattr(exported_folder.timing, "clock_of", lambda _: lambda: found.now)
    return found


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Return a folder as an export leaves it, without a model in it."""
    folder = tmp_path / "out"
    for place in (folder, folder / "reference"):
        place.mkdir()
        (place / "model.xml").write_text("<net/>", encoding="utf-8")
        Artifact(place, "openvino", ("model.xml",), ("input_ids",), CompressionPlan()).save()
    about = {
        "schema": exported_folder.MEASUREMENT_SCHEMA,
        "search": dataclasses.asdict(make_measurement(ratio=0.5)),
        "target": TargetConfig().model_dump(),
        "vocabulary": 100,
        "latency_ratio_in_search": 0.4,
    }
    (folder / "measurement.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def change(folder: Path, **changes: Any) -> None:
    file = folder / "measurement.json"
    about = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in about.items() if v is not None}), encoding="utf-8")


@pytest.mark.parametrize("pairs", [5, 20, 23])
def test_all_pairs_are_taken_over_several_loads(runtime: Runtime, exported: Path, pairs: int) -> None:
    timed = exported_folder.time_against_stand_in(Artifact.open(exported), TargetConfig(), 100, pairs)
    assert runtime.loaded == ["out", "reference"] * 4
    assert timed.ratio == pytest.approx(1 / 3)
    block = {"out": 2 * 10, "reference": 2 * 6}
    once = 4 * (0.001 + 0.003)  # after each load, for which it may have to prepare itself
    assert runtime.now == pytest.approx(once + pairs * (0.001 * block["out"] + 0.003 * block["reference"]))


def test_pairs_that_were_disturbed_are_taken_anew_after_another_load(
    runtime: Runtime, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, int]] = []

    def paired(*_: object, pairs: int, before: int, **__: object) -> list[timing.Pair]:
        taken.append((pairs, before))
        slow = len(taken) in (1, 3)
        pair = timing.Pair(np.full(4, 0.9 if slow else 0.5), np.full(2, 1.3 if slow else 1.0))
        return [pair] * pairs

    monkeypatch.setattr(timing, "paired_times", paired)
    timed = exported_folder.time_against_stand_in(Artifact.open(exported), TargetConfig(), 100, 20)
    # Only the second load shows that the first was slow.
    assert taken == [(5, 0), (5, 5), (5, 5), (5, 5), (5, 10), (5, 15)]
    assert runtime.loaded == ["out", "reference"] * 6
    assert timed.ratio == 0.5
    taken.clear()
    exported_folder.time_against_stand_in(Artifact.open(exported), TargetConfig(), 100, 20, reference_ms=1e3)
    assert taken[1] == (5, 0), "where it is known how fast the reference is, that shows at once"


def test_a_folder_is_held_against_what_it_says(runtime: Runtime, exported: Path) -> None:
    found = exported_folder.measure(exported, pairs=8)
    assert found["latency_ratio"] == pytest.approx(1 / 3)
    assert found["stored_latency_ratio"] == 0.5
    assert found["difference"] == pytest.approx(2 / 3 - 1)
    assert found["latency_ratio_in_search"] == 0.4
    change(exported, latency_ratio_in_search=None)
    assert "latency_ratio_in_search" not in exported_folder.measure(exported, pairs=8), "that was of another runtime"


@pytest.mark.parametrize("here", [True, False])
def test_how_far_latencies_drift_is_in_the_interval(runtime: Runtime, exported: Path, here: bool) -> None:
    plain = exported_folder.measure(exported, pairs=8)
    fingerprint = machine.fingerprint() if here else {"id": "another"}
    search = dataclasses.replace(make_measurement(), fingerprint=fingerprint, latency_drift=0.1)
    change(exported, search=dataclasses.asdict(search))
    found = exported_folder.measure(exported, pairs=8)
    assert found["latency_ratio"] == pytest.approx(plain["latency_ratio"])
    wider = (
        found["latency_ratio_low"] < plain["latency_ratio_low"],
        found["latency_ratio_high"] > plain["latency_ratio_high"],
    )
    assert wider == (here, here)


@pytest.mark.parametrize("here", [True, False])
def test_a_slow_time_is_adjusted_for_on_the_machine_that_it_is_known_of(
    runtime: Runtime, exported: Path, here: bool
) -> None:
    plain = exported_folder.measure(exported, pairs=8)
    assert plain["latency_adjusted"] == 1.0, "an export of before knows nothing of it"
    known = {"reference_ms": plain["reference_ms"] / 1.1, "spared": 0.5}
    fingerprint = machine.fingerprint() if here else {"id": "another"}
    search = dataclasses.replace(make_measurement(), fingerprint=fingerprint)
    change(exported, calm=known, search=dataclasses.asdict(search))
    found = exported_folder.measure(exported, pairs=8)
    factor = 1.1 ** (0.5 * (1 - plain["latency_ratio"])) if here else 1.0
    assert found["latency_adjusted"] == pytest.approx(factor)
    assert found["latency_ratio"] == pytest.approx(factor * plain["latency_ratio"])
    assert found["latency_ms"] == plain["latency_ms"]


@pytest.mark.parametrize("pairs", [3, 10_001])
def test_fewer_pairs_than_loads_and_very_many_are_refused(runtime: Runtime, exported: Path, pairs: int) -> None:
    with pytest.raises(ConfigError, match=rf"measure: pairs must be >= 4, .*, and <= 10000, got {pairs}$"):
        exported_folder.measure(exported, pairs=pairs)
    assert not runtime.loaded


def test_what_pytorch_cannot_read_is_said(exported: Path) -> None:
    change(exported, runtime="torch", inputs=["input_ids"])
    with pytest.raises(ExportError, match=r"out: cannot be read \(.+\); export the trial again$"):
        exported_folder.measure(exported, pairs=4)
    change(exported, inputs=["nothing"])
    with pytest.raises(ExportError, match=r"cannot be read \('nothing'\)"):
        exported_folder.measure(exported, pairs=4)


def test_latencies_of_another_protocol_are_not_compared(runtime: Runtime, exported: Path) -> None:
    change(exported, schema=2)
    with pytest.raises(ExportError, match=r"schema must be 3, got 2, of a version .* export the trial again"):
        exported_folder.measure(exported, pairs=8)
    assert not runtime.loaded


@pytest.mark.parametrize("features", [["avx2"], ["avx2", "avx_vnni"]])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_eight_bits_from_a_cpu_with_vnni_are_refused_on_one_without(
    runtime: Runtime, exported: Path, monkeypatch: pytest.MonkeyPatch, features: list[str], activation_bits: int
) -> None:
    plan = CompressionPlan((("head", Quantize(weight_bits=8, activation_bits=activation_bits)),))
    Artifact(exported, "openvino", ("model.xml",), ("input_ids",), plan).save()

    def fingerprint(features: list[str]) -> dict[str, Any]:
        return {"cpu": {"features": features}, "system": "Linux x86_64", "id": "any"}

    built = dataclasses.replace(make_measurement(), fingerprint=fingerprint(["avx2", "avx512_vnni"]))
    change(exported, search=dataclasses.asdict(built))
    monkeypatch.setattr(exported_folder.machine, "fingerprint", lambda: fingerprint(features))
    if features == ["avx2"] and activation_bits == 8:
        with pytest.raises(ExportError, match="computes something else here; search and export on a CPU of this kind"):
            exported_folder.measure(exported, pairs=8)
        assert not runtime.loaded
        # Where a device was timed, what counts is the machine on which it predicted as it was scored.
        change(exported, built_on=fingerprint(features))
    assert exported_folder.measure(exported, pairs=8)["same_machine"]


@pytest.mark.parametrize("lost", ["search", "target", "vocabulary"])
def test_what_is_not_an_exported_folder_is_refused(runtime: Runtime, exported: Path, lost: str) -> None:
    change(exported, **{lost: None})
    with pytest.raises(ExportError, match=r"measurement\.json: cannot be read \(.*\); give a folder that export wrote"):
        exported_folder.measure(exported, pairs=8)
    (exported / "measurement.json").unlink()
    with pytest.raises(ExportError, match="give a folder that export wrote"):
        exported_folder.measure(exported, pairs=8)
    assert not runtime.loaded
