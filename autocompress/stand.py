"""The uncompressed model, loaded, and what is timed against it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from autocompress import machine, slot, timing
from autocompress.config import TargetConfig
from autocompress.memory import peak_memory_bytes
from autocompress.runtimes import Artifact, Runtime, Session

Moments = list[list[timing.Pair]]
"""Pairs of blocks that were taken at different moments."""
Taken = tuple[Moments, bool]
"""Those of them that count, and whether any was not disturbed."""

_TO_A_REFERENCE = 4
"""Artefacts whose blocks of runs are held against the same block of the reference in a round."""
_AT_ONCE_BYTES = 1_000_000_000
"""Artefacts that are loaded together."""
APART_S = 1.0
"""Seconds between what was disturbed and its being timed anew."""
_ROUNDS_A_LOAD = 5
"""Rounds after which they are loaded anew: how fast a model is depends a little on where its memory came to lie."""


class Stand:
    """The reference of a target, loaded, and what is timed against it on this machine.

    Args:
        runtime: that of the target.
        target: what artefacts are built for.
        reference: the folder of the uncompressed model's artefact.
        inputs: of the target's shape.
    """

    def __init__(
        self, runtime: Runtime, target: TargetConfig, reference: Path, inputs: Mapping[str, np.ndarray]
    ) -> None:
        self._runtime = runtime
        self._target = target
        self._reference = reference
        self._inputs = inputs
        self.pace = timing.Pace(target.threads)

    @cached_property
    def reference(self) -> Session:
        return self.load(Artifact.open(self._reference))

    def close(self) -> None:
        """Let go of the reference, which is loaded again when it is next needed."""
        if (session := self.__dict__.pop("reference", None)) is not None:
            session.close()

    def load(self, artifact: Artifact) -> Session:
        with slot.working():
            return self._loaded(artifact)

    def _loaded(self, artifact: Artifact) -> Session:
        return timing.ready(self._runtime.load(artifact, self._target), self._of(artifact))

    def pairs(self, session: Session, artifact: Artifact, count: int, *, before: int = 0) -> list[timing.Pair]:
        """Time a loaded artefact against the reference; ``before`` says how many pairs of it were taken already."""
        clock, inputs = timing.clock_of(self._target), self._of(artifact)
        found = timing.paired_times(session, self.reference, inputs, pairs=count, clock=clock, before=before)
        for pair in found:
            self.pace.note(pair.beside)
        return found

    def _of(self, artifact: Artifact) -> Mapping[str, np.ndarray]:
        """Return what an artefact reads of the inputs."""
        return {name: self._inputs[name] for name in artifact.inputs}

    def memory(self, artifact: Artifact) -> int:
        """Return the bytes that running an artefact adds to a fresh process."""
        with slot.working():
            return peak_memory_bytes(artifact, self._target, self._of(artifact))

    def rounds(
        self,
        artefacts: Sequence[Artifact],
        count: int,
        *,
        quiet: Callable[[], None] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> list[Moments]:
        """Time artefacts in rounds over all of them and over several loads.

        A machine is slower for seconds at a time, and models of different sizes suffer differently: what is timed at
        several moments, seconds apart, is not at the mercy of one.

        Args:
            artefacts: of the target.
            count: rounds; there are more for those that were disturbed.
            quiet: called before anything is timed; returns when nothing else runs.
            progress: told each round.
        """
        times: list[Moments] = [[] for _ in artefacts]
        reference = Artifact.open(self._reference)
        clock = timing.clock_of(self._target)
        for some in together(artefacts, _AT_ONCE_BYTES):
            held = [reference, *(artefacts[n] for n in some)]
            sessions: dict[int, Session] = {}
            began = time.monotonic()
            for turn in range(timing.ANEW * count):
                left = [place for place, n in enumerate(some, start=1) if self.pace.missing(times[n], count, count)]
                if not left:
                    break
                if turn >= count:  # what disturbs lasts for a while
                    time.sleep(max(0.0, began + APART_S - time.monotonic()))
                began = time.monotonic()
                # A part of them before each round, so that rounds lie apart.
                due = [place for place in (0, *left) if turn == 0 or (turn - 1 - place) % _ROUNDS_A_LOAD == 0]
                sessions.update(zip(due, self._load_all([held[place] for place in due]), strict=True))
                if turn == 0 and quiet is not None:
                    quiet()
                if progress is not None:
                    progress(
                        f"confirming latencies: points {some[0] + 1} to {some[-1] + 1}, round {turn + 1} of {count}"
                        if turn < count
                        else f"confirming latencies: those of {len(left)} that were disturbed, once more"
                    )
                for start in range(0, len(left), _TO_A_REFERENCE):
                    places = left[start : start + _TO_A_REFERENCE]
                    with slot.timing():
                        before = timing.block(sessions[0], self._inputs, clock)
                        blocks = [timing.block(sessions[place], self._inputs, clock) for place in places]
                        after = timing.block(sessions[0], self._inputs, clock)
                    for place, block in zip(places, blocks, strict=True):
                        taken = times[some[place - 1]]
                        if place in due:
                            taken.append([])
                        taken[-1].append(timing.Pair.of(block, before, after))
                    self.pace.note(before.typical)
                    self.pace.note(after.typical)
        return [self.pace.undisturbed(taken) for taken in times]

    def _load_all(self, artefacts: Sequence[Artifact]) -> list[Session]:
        # Nothing else runs yet: a load takes one core for a good part of a second.
        with slot.working(), ThreadPoolExecutor(machine.cores()) as pool:
            return list(pool.map(self._loaded, artefacts))


def together(artefacts: Sequence[Artifact], most_bytes: int) -> Iterator[range]:
    """Yield which artefacts go together: as many in a row as ``most_bytes`` hold, one at least."""
    first, size_bytes = 0, 0
    for n, artifact in enumerate(artefacts):
        if n > first and size_bytes + artifact.size_bytes > most_bytes:
            yield range(first, n)
            first, size_bytes = n, 0
        size_bytes += artifact.size_bytes
    if artefacts:
        yield range(first, len(artefacts))
