"""The machine that latency is measured on, where that is another one.

A search for a device measures latency and memory there, and accuracy wherever there are workers: the files of an
artefact travel, and numbers come back.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from autocompress import machine
from autocompress.apart import Apart
from autocompress.config import TargetConfig
from autocompress.errors import MeasurementError
from autocompress.runtimes import Artifact, get_runtime
from autocompress.runtimes.base import ARTIFACT_FILE
from autocompress.stand import APART_S, Moments, Stand, Taken, together

_BEGINNINGS = 3
"""How often what the device's process did not survive is asked of it again."""
Files = dict[str, bytes]
"""An artefact's files by name, its description among them."""
Call = Callable[..., Callable[[], Any]]

_SENT_BYTES = 200_000_000
"""Artefacts that are sent together: devices have little memory."""


class Outpost:
    """A stand on the machine that latency is measured on, which has of the search what it is sent.

    Args:
        target: as plain data.
    """

    def __init__(self, target: dict[str, Any]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="autocompress-stand-")
        self._target = TargetConfig(**target)
        self._stand: Stand | None = None
        self._apart: Apart | None = None

    def fingerprint(self) -> dict[str, Any]:
        return machine.fingerprint()

    def equip(self, reference: Files, inputs: Mapping[str, np.ndarray]) -> None:
        """Time against this model on these inputs from now on; begun anew, an outpost has none.

        Several workers may find that at once; what comes after the first is the same.
        """
        if self._stand is not None:
            return
        runtime, folder = get_runtime(self._target.runtime), self._written(reference).folder
        self._stand = Stand(runtime, self._target, folder, inputs)
        self._apart = Apart(self._target, folder, inputs)

    def moments(self, files: Files, counts: Sequence[int]) -> Taken | None:
        """Time an artefact, as many pairs at each moment as are said; None without a reference to time it against."""
        if self._stand is None:
            return None
        with self._unpacked([files]) as [artifact]:
            session = self._stand.load(artifact)
            try:
                found, pace = Moments(), self._stand.pace
                for count in counts:
                    if count:
                        found.append(self._stand.pairs(session, artifact, count, before=sum(map(len, found))))
                while count := min(max(counts), pace.missing(found, sum(counts), sum(counts))):
                    time.sleep(APART_S)
                    found.append(self._stand.pairs(session, artifact, count, before=pace.quiet(found)))
                return pace.undisturbed(found), pace.quiet(found) > 0
            finally:
                session.close()

    def rounds(
        self, artefacts: Sequence[Files], count: int, patience_s: float, pace_ms: float | None
    ) -> list[Moments] | None:
        """Time artefacts as `Apart.rounds` does; None without a reference."""
        if self._stand is None or self._apart is None:
            return None
        self._stand.close()  # a device may not hold the reference twice
        with self._unpacked(artefacts) as found:
            return self._apart.rounds(found, count, patience_s=patience_s, pace_ms=pace_ms)

    def memory(self, files: Files) -> int | None:
        """Return the bytes that running an artefact adds to a fresh process."""
        if self._stand is None:
            return None
        with self._unpacked([files]) as [artifact]:
            return self._stand.memory(artifact)

    @contextmanager
    def _unpacked(self, artefacts: Sequence[Files]) -> Iterator[list[Artifact]]:
        found: list[Artifact] = []
        try:
            for files in artefacts:
                found.append(self._written(files))
            yield found
        finally:
            for artifact in found:
                shutil.rmtree(artifact.folder, ignore_errors=True)

    def _written(self, files: Files) -> Artifact:
        folder = Path(tempfile.mkdtemp(dir=self._scratch.name))
        for name, content in files.items():
            (folder / Path(name).name).write_bytes(content)
        return Artifact.open(folder)


class Device:
    """An outpost as the driver and the workers see it.

    Args:
        call: begins a method of it; returns what waits for the result.
        reference: the folder of the uncompressed model's artefact; it may be made later than this.
        inputs: of the target's shape, for an artefact.
    """

    def __init__(self, call: Call, reference: Path, inputs: Callable[[Artifact], Mapping[str, np.ndarray]]) -> None:
        self._call = call
        self._reference = reference
        self._inputs = inputs

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The machine and the versions there."""
        found: dict[str, Any] = self._call("fingerprint")()
        return found

    def moments(self, artifact: Artifact, counts: Sequence[int]) -> Callable[[], Taken]:
        """Begin to time an artefact; returns what waits for the pairs of each moment."""
        return self._begin("moments", files_of(artifact), list(counts))

    def memory(self, artifact: Artifact) -> int:
        """Return the bytes that running an artefact there adds to a fresh process."""
        found: int = self._begin("memory", files_of(artifact))()
        return found

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
        """Time artefacts there as `Apart.rounds` does; nothing has to be quiet here."""
        found: list[Moments] = []
        for some in together(artefacts, _SENT_BYTES):
            if progress is not None:
                progress(f"confirming latencies: points {some[0] + 1} to {some[-1] + 1} on the device")
            found += self._begin("rounds", [files_of(artefacts[n]) for n in some], count, patience_s, pace_ms)()
        return found

    def _begin(self, method: str, *values: Any) -> Callable[[], Any]:
        begun = self._call(method, *values)

        def wait() -> Any:
            found = begun()
            for _ in range(_BEGINNINGS):
                if found is not None:
                    return found
                reference = Artifact.open(self._reference)
                self._call("equip", files_of(reference), self._inputs(reference))()
                found = self._call(method, *values)()
            if found is None:
                raise MeasurementError(f"the device's process ended {_BEGINNINGS} times while it ran this")
            return found

        return wait


def files_of(artifact: Artifact) -> Files:
    """Return what an artefact is elsewhere."""
    return {name: (artifact.folder / name).read_bytes() for name in (ARTIFACT_FILE, *artifact.files)}
