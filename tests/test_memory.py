"""Peak memory: taken in a fresh process, larger for a larger model, and an error where nothing can be run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_artefacts import INPUTS, TARGET, built

from autocompress import memory
from autocompress.errors import MeasurementError
from autocompress.memory import peak_memory_bytes
from autocompress.plan import CompressionPlan
from autocompress.runtimes import RUNTIMES, Artifact


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_larger_model_needs_more(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx" if runtime == "onnxruntime" else "numpy")
    small = built(runtime, tmp_path / "small")
    large = built(runtime, tmp_path / "large", dim=256, hidden_dim=8192)
    assert large.size_bytes > small.size_bytes + 40e6
    needs = [peak_memory_bytes(artifact, TARGET, INPUTS) for artifact in (small, large)]
    assert 0 < needs[0] < needs[1]
    assert needs[1] - needs[0] > 0.5 * (large.size_bytes - small.size_bytes)
    assert all(isinstance(found, int) for found in needs)
    # Once more: what this process holds does not count.
    ballast = np.ones(30_000_000)
    again = peak_memory_bytes(small, TARGET, INPUTS)
    assert ballast.sum() > 0
    assert abs(again - needs[0]) < 20e6


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no description", "no weights", "not a model"])
def test_an_artefact_that_is_broken_is_an_error(tmp_path: Path, damage: str) -> None:
    artifact = built("openvino", tmp_path / "broken")
    if damage == "no description":
        (artifact.folder / "artefact.json").unlink()
    elif damage == "no weights":
        (artifact.folder / "model.bin").unlink()
    else:
        (artifact.folder / "model.xml").write_text("<net", encoding="utf-8")
    with pytest.raises(MeasurementError, match=rf"^peak_memory: {artifact.folder} could not be run on its own \("):
        peak_memory_bytes(artifact, TARGET, INPUTS)


@pytest.mark.parametrize("program", ["import time; time.sleep(60)", "print('many')", "raise SystemExit(3)"])
def test_a_process_without_a_number_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {memory.sys.executable} -c "{program}"\n', encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(memory.sys, "executable", str(script))
    monkeypatch.setattr(memory, "_SECONDS", 1)
    artifact = Artifact(tmp_path, "openvino", ("model.xml",), ("input_ids",), CompressionPlan())
    with pytest.raises(MeasurementError, match="could not be run on its own"):
        peak_memory_bytes(artifact, TARGET, INPUTS)
