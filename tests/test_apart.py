"""Rounds of timing in a fresh process."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from helpers_artefacts import INPUTS, TARGET, built

from autocompress import timing
from autocompress.apart import Apart
from autocompress.errors import MeasurementError
from autocompress.fresh import LEAST_PATIENCE_S
from autocompress.runtimes import Artifact


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return built("openvino", tmp_path_factory.mktemp("apart") / "reference")


def apart(reference: Artifact, patience_s: float = LEAST_PATIENCE_S) -> Apart:
    return Apart(TARGET, reference.folder, INPUTS, patience_s=patience_s)


def test_pairs_of_all_come_back_and_what_is_said_meanwhile(reference: Artifact) -> None:
    said: list[str] = []
    found = apart(reference).rounds([reference, reference], 3, progress=said.append)
    assert len(found) == 2
    for moments in found:
        pairs = [pair for moment in moments for pair in moment]
        assert len(pairs) >= 1
        assert all(isinstance(pair, timing.Pair) for pair in pairs)
        assert all((pair.candidate > 0).all() and (pair.reference > 0).all() for pair in pairs)
        assert all(pair.other_side > 0 for pair in pairs), "the reference was timed on both sides"
        assert 0.2 < timing.summarize(moments, seed=0).ratio < 5, "a model against itself"
    assert [line for line in said if "once more" not in line] == [
        f"confirming latencies: points 1 to 2, round {number} of 3" for number in (1, 2, 3)
    ]


def test_nothing_is_timed_before_nothing_else_runs(reference: Artifact) -> None:
    order: list[str] = []
    loaded = threading.Event()

    def quiet() -> None:
        assert not loaded.wait(3), "a round began"
        order.append("quiet")

    def progress(line: str) -> None:
        loaded.set()
        order.append(line.split(", ")[-1])

    apart(reference).rounds([reference], 1, quiet=quiet, progress=progress)
    assert order[:2] == ["quiet", "round 1 of 1"]


def test_a_process_that_fails_says_why(reference: Artifact, tmp_path: Path) -> None:
    there = Apart(TARGET, tmp_path / "nothing", INPUTS, patience_s=LEAST_PATIENCE_S)
    with pytest.raises(MeasurementError, match=r"could not time the front \(.*nothing"):
        there.rounds([reference], 1)


def test_a_process_that_does_not_end_is_killed(reference: Artifact) -> None:
    with pytest.raises(MeasurementError, match="nothing after 0 s"):
        apart(reference, patience_s=0.05).rounds([reference], 1)
    own = f"/proc/self/task/{threading.get_native_id()}/children"
    left = [Path(f"/proc/{child}/cmdline") for child in Path(own).read_text(encoding="utf-8").split()]
    assert not [file for file in left if b"autocompress.apart" in file.read_bytes()]


def test_pairs_travel_as_they_are() -> None:
    pair = timing.Pair(np.array([0.1, 0.2]), np.array([0.3]), waited=0.01, other_side=0.4)
    again = timing.Pair.from_plain(pair.plain())
    assert again.plain() == pair.plain()
    assert again.beside == pair.beside == 0.4
