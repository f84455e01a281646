"""Rounds of timing in a fresh process."""

from __future__ import annotations

import io
import json
import math
import os
import select
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_artefacts import INPUTS, TARGET, built

from autocompress import fresh, timing
from autocompress.apart import Apart, _main, _read
from autocompress.errors import MeasurementError
from autocompress.fresh import LEAST_PATIENCE_S
from autocompress.runtimes import Artifact
from autocompress.stand import Moments


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return built("openvino", tmp_path_factory.mktemp("apart") / "reference")


def rounds(reference: Artifact, count: int = 1, *, patience_s: float = LEAST_PATIENCE_S, **told: Any) -> list[Moments]:
    """Time a model against itself, twice in each round."""
    return Apart(TARGET, reference.folder, INPUTS).rounds([reference] * 2, count, patience_s=patience_s, **told)


def test_pairs_of_all_come_back_and_what_is_said_meanwhile(reference: Artifact) -> None:
    said: list[str] = []
    found = rounds(reference, 3, progress=said.append)
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


def test_quiet_is_asked_for_before_anything_is_timed(reference: Artifact) -> None:
    order: list[str] = []
    rounds(reference, quiet=lambda: order.append("quiet"), progress=lambda line: order.append(line.split(", ")[-1]))
    assert order[:2] == ["quiet", "round 1 of 1"]


def test_the_fresh_process_waits_for_each_answer(
    reference: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "inputs.npz", **INPUTS)
    job = {
        "target": TARGET.model_dump(),
        "reference": str(reference.folder),
        "inputs": str(tmp_path / "inputs.npz"),
        "artefacts": [str(reference.folder)],
        "count": 1,
        "pace_ms": None,
    }
    monkeypatch.setattr(timing, "SLOWED", math.inf)  # so that there is one round
    (job_end, our_end), (their_end, message_end) = os.pipe(), os.pipe()
    with os.fdopen(our_end, "w") as write, os.fdopen(their_end) as read:
        child = threading.Thread(target=_main, args=(os.fdopen(job_end), os.fdopen(message_end, "w")), daemon=True)
        child.start()
        for answer, expected in ((job, {}), (None, {"said": "confirming latencies: points 1 to 1, round 1 of 1"})):
            write.write(f"{json.dumps(answer)}\n")
            write.flush()
            assert json.loads(read.readline()) == expected
            assert not select.select([read], [], [], 0.5)[0], "it waits"
        write.write("null\n")
        write.flush()
        assert list(json.loads(read.readline())) == ["moments"]
        child.join(10)
        assert not child.is_alive()


def test_a_process_that_fails_says_why(reference: Artifact, tmp_path: Path) -> None:
    there = Apart(TARGET, tmp_path / "nothing", INPUTS)
    with pytest.raises(MeasurementError, match=r"could not time the front \(.*nothing"):
        there.rounds([reference], 1, patience_s=LEAST_PATIENCE_S)


def test_a_process_that_says_nothing_is_killed(reference: Artifact) -> None:
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    before = set(children.read_text(encoding="utf-8").split())
    with pytest.raises(MeasurementError, match=r"nothing for 0\.05 s"):
        rounds(reference, patience_s=0.05)
    assert not set(children.read_text(encoding="utf-8").split()) - before


@pytest.mark.parametrize("message", ["", '{"moments": [[[[0.1'])
def test_a_process_that_ends_within_a_message_says_why(
    reference: Artifact, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"import sys; sys.stdin.readline(); sys.stdout.write({message!r}); sys.exit('no memory')"
    monkeypatch.setattr(fresh, "python", lambda *_: ([sys.executable, "-c", program], dict(os.environ)))
    with pytest.raises(MeasurementError, match=r"could not time the front \(no memory\)"):
        rounds(reference)


def test_what_a_library_says_is_no_message() -> None:
    lines = io.StringIO('loading plugins\n3\n{"said": "hello"}\n{"moments": [[')
    assert _read(lines) == {"said": "hello"}
    assert _read(lines) is None


def test_what_asks_for_quiet_may_fail(reference: Artifact) -> None:
    def quiet() -> None:
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError, match="a worker's"):
        rounds(reference, quiet=quiet)


def test_pairs_travel_as_they_are() -> None:
    pair = timing.Pair(np.array([0.1, 0.2]), np.array([0.3]), waited=0.01, other_side=0.4)
    again = timing.Pair.from_plain(pair.plain())
    assert again.plain() == pair.plain()
    assert again.beside == pair.beside == 0.4
