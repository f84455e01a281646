"""Rounds of timing in a fresh process.

One that has searched for a while has memory in pieces, and the small models that are loaded into it run slower than in
the programs that they are made for, while the large reference does not.

The two processes take turns: each line that the fresh one writes is answered by one, and until then it waits, so that
nothing is done beside what is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from autocompress import fresh
from autocompress.config import TargetConfig
from autocompress.errors import MeasurementError
from autocompress.runtimes import Artifact, get_runtime
from autocompress.stand import Moments, Stand
from autocompress.timing import Pair

_END_S = 5.0
"""Time that a process has to say why it ends."""


class Apart:
    """A stand in a process of its own, which each call begins anew.

    Args:
        target: what artefacts are built for.
        reference: the folder of the uncompressed model's artefact.
        inputs: of the target's shape.
    """

    def __init__(self, target: TargetConfig, reference: Path, inputs: Mapping[str, np.ndarray]) -> None:
        self._target = target
        self._reference = reference
        self._inputs = inputs

    def rounds(
        self,
        artefacts: Sequence[Artifact],
        count: int,
        *,
        patience_s: float,
        pace_ms: float | None = None,
        quiet: Callable[[], None] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> list[Moments]:
        """Time artefacts as `Stand.rounds` does.

        Args:
            artefacts: of the target.
            count: rounds.
            patience_s: seconds after which the call has failed if nothing was said in them.
            pace_ms: what the reference took at another time on this machine, where that is known.
            quiet: called before anything is timed; returns when nothing else runs.
            progress: told each round.

        Raises:
            MeasurementError: if the process fails, or says nothing for too long.
        """
        with tempfile.TemporaryDirectory(prefix="autocompress-apart-") as scratch:
            np.savez(Path(scratch) / "inputs.npz", **self._inputs)  # type: ignore[arg-type]
            job = {
                "target": self._target.model_dump(),
                "reference": str(self._reference.absolute()),
                "inputs": f"{scratch}/inputs.npz",
                "artefacts": [str(artifact.folder.absolute()) for artifact in artefacts],
                "count": count,
                "pace_ms": pace_ms,
            }
            command, environment = fresh.python("-m", "autocompress.apart")
            with (Path(scratch) / "stderr").open("w+", encoding="utf-8", errors="replace") as said:
                process = subprocess.Popen(  # noqa: S603
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                    start_new_session=True,  # a terminal's interrupt is this one's matter
                )
                patience = _Patience(process, patience_s)
                try:
                    found = _followed(process, patience, job, quiet, progress)
                    if found is None:  # it may be about to say why
                        with suppress(subprocess.TimeoutExpired):
                            process.wait(_END_S)
                finally:
                    patience.end()
                    process.kill()
                    with suppress(BrokenPipeError):
                        process.communicate()
                if found is None:
                    said.seek(0)
                    lines = said.read().strip().splitlines()
                    ended = lines[-1] if lines else f"exit status {process.returncode}"
                    reason = f"nothing for {patience_s:g} s" if patience.lost else ended
                    raise MeasurementError(f"latency: a fresh process could not time the front ({reason})")
        return found


class _Patience:
    """Kills a process that says nothing for so many seconds."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self._process = process
        self._seconds = seconds
        self._timer: threading.Timer | None = None
        self.lost = False

    def begin(self) -> None:
        self.end()
        self._timer = threading.Timer(self._seconds, self._lose)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _lose(self) -> None:
        self.lost = True
        self._process.kill()


def _followed(
    process: subprocess.Popen[str],
    patience: _Patience,
    job: dict[str, Any],
    quiet: Callable[[], None] | None,
    progress: Callable[[str], None] | None,
) -> list[Moments] | None:
    """Hand a process its job, answer what it says, and return what comes of it; None if it ended before."""
    assert process.stdout is not None
    answer: Any = job
    while True:
        patience.begin()
        if not _written(process, answer):
            return None
        message = _read(process.stdout)
        if message is None:
            return None
        patience.end()
        if "moments" in message:
            return [[[Pair.from_plain(pair) for pair in moment] for moment in each] for each in message["moments"]]
        if "said" not in message and quiet is not None:
            quiet()
        elif "said" in message and progress is not None:
            progress(message["said"])
        answer = None


def _read(lines: IO[str]) -> dict[str, Any] | None:
    """Return the next message; None if the process ended, perhaps within one."""
    for line in iter(lines.readline, ""):
        with suppress(ValueError):  # what a library says while it is loaded is nobody's message
            message = json.loads(line)
            if isinstance(message, dict):
                return message
    return None


def _written(process: subprocess.Popen[str], answer: Any) -> bool:
    assert process.stdin is not None
    try:
        process.stdin.write(f"{json.dumps(answer)}\n")
        process.stdin.flush()
    except BrokenPipeError:
        return False
    return True


def _main(read: IO[str], write: IO[str]) -> None:
    def tell(message: dict[str, Any]) -> None:
        write.write(f"{json.dumps(message)}\n")
        write.flush()

    def asked(message: dict[str, Any]) -> None:
        tell(message)
        if not read.readline():
            sys.exit("who asked for it is gone")

    job = json.loads(read.readline())
    target = TargetConfig(**job["target"])
    with np.load(job["inputs"]) as stored:
        inputs = dict(stored)
    stand = Stand(get_runtime(target.runtime), target, Path(job["reference"]), inputs)
    if job["pace_ms"] is not None:
        stand.pace.note(job["pace_ms"] / 1e3)
    found = stand.rounds(
        [Artifact.open(Path(folder)) for folder in job["artefacts"]],
        job["count"],
        quiet=lambda: asked({}),
        progress=lambda line: asked({"said": line}),
    )
    tell({"moments": [[[pair.plain() for pair in moment] for moment in each] for each in found]})


if __name__ == "__main__":
    # What a runtime writes there by itself is nobody's message.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as messages:
        os.dup2(2, 1)
        # OpenVINO would report its use; it takes a stub where the telemetry package cannot be imported.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        _main(sys.stdin, messages)
