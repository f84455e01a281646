"""Peak memory of running an artefact, taken in a fresh process, where nothing else has been loaded.

Run as a module it prints the bytes by which loading and running an artefact raised the process's peak.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from autocompress import fresh
from autocompress.config import TargetConfig
from autocompress.errors import MeasurementError
from autocompress.runtimes import RUNTIMES, Artifact, get_runtime

_SECONDS = 120
_RUNS = 3


def peak_memory_bytes(artifact: Artifact, target: TargetConfig, inputs: Mapping[str, np.ndarray]) -> int:
    """Return how many bytes loading and running ``artifact`` on ``inputs`` adds to a fresh process.

    Raises:
        MeasurementError: if that process fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        np.savez(Path(scratch) / "inputs.npz", **inputs)  # type: ignore[arg-type]
        job = {"folder": str(artifact.folder), "target": target.model_dump(), "inputs": f"{scratch}/inputs.npz"}
        try:
            command, environment = fresh.python("-m", "autocompress.memory")
            done = subprocess.run(  # noqa: S603
                command,
                env=environment,
                input=json.dumps(job),
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=True,
            )
            return int(done.stdout)
        except (subprocess.SubprocessError, ValueError) as error:
            raise MeasurementError(f"peak_memory: {artifact.folder} could not be run on its own ({error})") from None


def _main() -> None:
    job = json.loads(sys.stdin.read())
    target = TargetConfig(**job["target"])
    artifact = Artifact.open(Path(job["folder"]))
    with np.load(job["inputs"]) as stored:
        inputs = dict(stored)
    runtime = get_runtime(artifact.runtime)
    # OpenVINO would report its use; it takes a stub where the telemetry package cannot be imported.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    importlib.import_module(RUNTIMES[artifact.runtime][2][0])
    before = _peak_bytes(anew=True)
    session = runtime.load(artifact, target)
    for _ in range(_RUNS):
        session.run(inputs)
    sys.stdout.write(str(max(1, _peak_bytes() - before)))


def _peak_bytes(*, anew: bool = False) -> int:
    """Return the most memory that this process held; ``anew`` begins to count from what it holds now."""
    # Not ru_maxrss: Linux hands that of the process that forked on to the program that is started.
    if anew:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    _main()
