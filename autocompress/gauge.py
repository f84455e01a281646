"""What measures latency and memory of a run's artefacts: this machine, or the device that the run names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from autocompress import fresh, machine, timing
from autocompress.apart import Apart
from autocompress.config import RunConfig
from autocompress.errors import StudyError
from autocompress.outpost import Call, Device
from autocompress.records import Measurement
from autocompress.runtimes import Artifact, Runtime
from autocompress.stand import Stand


class Gauge:
    """Where artefacts of a run are measured, and what is measured there.

    Args:
        run: the resolved run file.
        runtime: of its target.
        reference: the folder of the uncompressed model's artefact; it may be made later than this.
        vocabulary: returns the number of token ids of the model, for which that has to be loaded.
    """

    def __init__(self, run: RunConfig, runtime: Runtime, reference: Path, vocabulary: Callable[[], int]) -> None:
        self._run = run
        self._runtime = runtime
        self._reference = reference
        self._vocabulary = vocabulary
        self.device: Device | None = None
        """Where latency and memory are measured, if not here."""

    def use(self, call: Call) -> None:
        """Measure on the device that ``call`` reaches."""
        self.device = Device(call, self._reference, self.inputs)

    def require(self) -> None:
        """Raise `StudyError` where a device is to measure that nobody has reached."""
        if self.device is None and (wanted := self._run.search.device):
            offered = ", ".join(f"{name}: {amount:g}" for name, amount in wanted.items())
            raise StudyError(f"search.device: latency is measured on a node with {offered}; give its --address")

    def inputs(self, artifact: Artifact) -> dict[str, np.ndarray]:
        """Return what an artefact is timed on, of the target's shape."""
        return timing.inputs_of(artifact.inputs, self._run.target, self._vocabulary(), self._run.seed)

    @cached_property
    def stand(self) -> Stand:
        """What times artefacts on this machine, in this process."""
        inputs = self.inputs(Artifact.open(self._reference))
        return Stand(self._runtime, self._run.target, self._reference, inputs)

    @property
    def apart(self) -> Apart:
        """What times artefacts on this machine, in a fresh process."""
        return Apart(self._run.target, self._reference, self.inputs(Artifact.open(self._reference)))

    @property
    def measures_memory(self) -> bool:
        return "peak_memory" in self._run.objectives or self._run.constraints.max_memory_mb is not None

    def memory(self, artifact: Artifact) -> int | None:
        """Return the bytes that running an artefact adds to a fresh process; None where the run does not ask."""
        return (self.device or self.stand).memory(artifact) if self.measures_memory else None

    @property
    def machine(self) -> dict[str, Any]:
        """The machine that measures, and its versions."""
        return machine.fingerprint() if self.device is None else self.device.fingerprint

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Machine, versions, target and runtime options, as stored with every number."""
        settings = {k: str(v) for k, v in self._runtime.settings(self._run.target).items()}
        return {**self.machine, "target": self._run.target.model_dump(), "runtime_options": settings}

    def confirmed(
        self,
        points: Sequence[tuple[Artifact, Measurement]],
        *,
        pairs: int,
        quiet: Callable[[], None] | None,
        progress: Callable[[str], None],
    ) -> list[Measurement]:
        """Return scores of artefacts with latencies taken anew in a fresh process; see `Stand.rounds`.

        Args:
            points: artefacts with what was measured of them.
            pairs: rounds over all of them.
            quiet: called before anything is timed; returns when nothing else runs.
            progress: told each round.

        Raises:
            MeasurementError: if the fresh process fails.
        """
        self.require()
        if not points:
            return []
        artefacts, measured = zip(*points, strict=True)
        longest_s = max(max(m.latency_ms, m.reference_ms) for m in measured) / 1e3
        kind = self.machine["id"], self._run.target.model_dump()
        here = [m.reference_ms for m in measured if (m.fingerprint.get("id"), m.fingerprint.get("target")) == kind]
        times = (self.device or self.apart).rounds(
            artefacts,
            pairs,
            patience_s=fresh.patience_s(len(artefacts) * timing.RUNS_OF_A_PAIR, longest_s),
            pace_ms=min(here, default=None),
            quiet=quiet,
            progress=progress,
        )
        found = []
        for known, moments in zip(measured, times, strict=True):
            timed = timing.summarize(moments, seed=self._run.seed)
            found.append(dataclasses.replace(known, **timed.fields(), confirmed=True).check())
        return found
