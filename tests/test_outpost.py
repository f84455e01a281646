"""A device: it has what it is sent, times fronts in a fresh process, and begins anew with nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers_artefacts import INPUTS, TARGET, built

from autocompress import outpost, timing
from autocompress.errors import MeasurementError
from autocompress.fresh import LEAST_PATIENCE_S
from autocompress.outpost import Device, Outpost
from autocompress.runtimes import Artifact


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return built("openvino", tmp_path_factory.mktemp("outpost") / "reference")


class Nodes:
    """Where outposts are begun, and what each was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.begin()

    def begin(self) -> None:
        self._there = Outpost(TARGET.model_dump())

    def __call__(self, method: str, *values: Any) -> Callable[[], Any]:
        self.asked.append(method)
        return lambda: getattr(self._there, method)(*values)


def device_on(nodes: Nodes, reference: Artifact) -> Device:
    return Device(nodes, reference.folder, lambda _: INPUTS)


def test_what_begins_anew_is_sent_the_reference_again(reference: Artifact) -> None:
    nodes = Nodes()
    device = device_on(nodes, reference)
    for _ in range(2):
        nodes.begin()
        moments, tells = device.moments(reference, [2, 1])()
        assert sum(map(len, moments)) >= 1
        assert isinstance(tells, bool)
        assert 0.2 < timing.summarize(moments, seed=0).ratio < 5, "a model against itself"
    device.moments(reference, [1])()
    assert nodes.asked == [*["moments", "equip", "moments"] * 2, "moments"]


@pytest.mark.parametrize("deaths", [2, 3, 9])
def test_what_the_device_does_not_survive_is_asked_of_it_a_few_times(reference: Artifact, deaths: int) -> None:
    left = [None] * deaths

    def call(method: str, *_: Any) -> Callable[[], Any]:
        return lambda: None if method == "equip" or (left and left.pop() is None) else 4096

    device = Device(call, reference.folder, lambda _: INPUTS)
    if deaths <= 3:
        assert device.memory(reference) == 4096
    else:
        with pytest.raises(MeasurementError, match="the device's process ended 3 times while it ran this"):
            device.memory(reference)
        assert len(left) == deaths - 4


def test_a_front_is_timed_in_a_fresh_process(reference: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def block(*_: object) -> timing.Block:
        raise AssertionError("this one has timed other artefacts before")

    monkeypatch.setattr(timing, "block", block)
    found = device_on(Nodes(), reference).rounds([reference] * 2, 2, patience_s=LEAST_PATIENCE_S)
    assert [sum(map(len, moments)) >= 1 for moments in found] == [True, True]
    assert all((pair.candidate > 0).all() for moments in found for moment in moments for pair in moment)


def test_a_front_travels_in_parts(reference: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outpost, "_SENT_BYTES", 1)
    nodes, said = Nodes(), list[str]()
    device = device_on(nodes, reference)
    assert len(device.rounds([reference] * 2, 1, patience_s=LEAST_PATIENCE_S, progress=said.append)) == 2
    assert said == [f"confirming latencies: points {n} to {n} on the device" for n in (1, 2)]
    assert nodes.asked == ["rounds", "equip", "rounds", "rounds"]


def test_memory_is_that_of_a_fresh_process(reference: Artifact) -> None:
    assert device_on(Nodes(), reference).memory(reference) > 0
