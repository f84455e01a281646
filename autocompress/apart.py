"""Rounds of timing in a fresh process.

One that has searched for a while has memory in pieces, and the small models that are loaded into it run some percent
slower than in the programs that they are made for, while the large reference does not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from autocompress import fresh
from autocompress.config import TargetConfig
from autocompress.errors import MeasurementError
from autocompress.runtimes import Artifact, get_runtime
from autocompress.stand import Moments, Stand
from autocompress.timing import Pair


class Apart:
    """A stand in a process of its own, which each call begins anew.

    Args:
        target: what artefacts are built for.
        reference: the folder of the uncompressed model's artefact.
        inputs: of the target's shape.
        patience_s: seconds after which a call has failed.
    """

    def __init__(
        self, target: TargetConfig, reference: Path, inputs: Mapping[str, np.ndarray], *, patience_s: float
    ) -> None:
        self._target = target
        self._reference = reference
        self._inputs = inputs
        self._patience_s = patience_s

    def rounds(
        self,
        artefacts: Sequence[Artifact],
        count: int,
        *,
        quiet: Callable[[], None] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> list[Moments]:
        """Time artefacts as `Stand.rounds` does.

        Raises:
            MeasurementError: if the process fails, or does not end in time.
        """
        with tempfile.TemporaryDirectory(prefix="autocompress-apart-") as scratch:
            np.savez(Path(scratch) / "inputs.npz", **self._inputs)  # type: ignore[arg-type]
            job = {
                "target": self._target.model_dump(),
                "reference": str(self._reference.absolute()),
                "inputs": f"{scratch}/inputs.npz",
                "artefacts": [str(artifact.folder.absolute()) for artifact in artefacts],
                "count": count,
            }
            command, environment = fresh.python("-m", "autocompress.apart")
            with (Path(scratch) / "stderr").open("w+", encoding="utf-8", errors="replace") as said:
                process = subprocess.Popen(  # noqa: S603
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
                )
                with process:
                    patience = threading.Timer(self._patience_s, process.kill)
                    patience.daemon = True
                    patience.start()
                    try:
                        found = _followed(process, job, quiet, progress)
                    finally:
                        patience.cancel()
                        process.kill()
                if found is None:
                    said.seek(0)
                    last = said.read().strip().splitlines()[-1:] or [f"nothing after {self._patience_s:.0f} s"]
                    raise MeasurementError(f"latency: a fresh process could not time the front ({last[0]})")
        return found


def _followed(
    process: subprocess.Popen[str],
    job: dict[str, Any],
    quiet: Callable[[], None] | None,
    progress: Callable[[str], None] | None,
) -> list[Moments] | None:
    """Hand a process its job and return what comes of it; None if it ended before."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f"{json.dumps(job)}\n")
        process.stdin.flush()
        if quiet is not None:
            quiet()  # it loads meanwhile
        process.stdin.close()
    except BrokenPipeError:
        return None
    for line in process.stdout:
        message = json.loads(line)
        if "moments" in message:
            return [[[Pair.from_plain(pair) for pair in moment] for moment in each] for each in message["moments"]]
        if progress is not None:
            progress(message["said"])
    return None


def _main(stdin: TextIO, stdout: TextIO) -> None:
    job = json.loads(stdin.readline())
    target = TargetConfig(**job["target"])
    with np.load(job["inputs"]) as stored:
        inputs = dict(stored)
    stand = Stand(get_runtime(target.runtime), target, Path(job["reference"]), inputs)

    def quiet() -> None:
        stdin.read()  # its end is open until nothing else runs

    def tell(message: dict[str, Any]) -> None:
        stdout.write(f"{json.dumps(message)}\n")
        stdout.flush()

    found = stand.rounds(
        [Artifact.open(Path(folder)) for folder in job["artefacts"]],
        job["count"],
        quiet=quiet,
        progress=lambda line: tell({"said": line}),
    )
    tell({"moments": [[[pair.plain() for pair in moment] for moment in each] for each in found]})


if __name__ == "__main__":
    # What the runtime writes there by itself is nobody's message.
    sys.stdout, messages = sys.stderr, sys.stdout
    # OpenVINO would report its use; it takes a stub where the telemetry package cannot be imported.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    _main(sys.stdin, messages)
