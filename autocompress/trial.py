"""One pass of a built artefact over the rows: what it predicts, how long it takes, and whether it is worth going on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from autocompress import scoring, slot, timing
from autocompress.records import Stopped
from autocompress.runtimes import Artifact, Session
from autocompress.stand import Moments, Taken
from autocompress.stopwatch import Stopwatch
from autocompress.task import Batch

if TYPE_CHECKING:
    from autocompress.evaluate import Workshop

Rivals = Sequence[Sequence[float]]
"""Costs of the points on the front, in the order of a run's objectives, as the sampler is told them."""


class Trial:
    """One pass of a loaded artefact over the search rows, with its latency taken at moments in between.

    A machine is slow for seconds at a time, and not for small and large models alike: pairs that are spread over the
    pass scatter less than the same number of pairs in a row.
    """

    def __init__(self, workshop: Workshop, session: Session, artifact: Artifact, memory_bytes: int | None) -> None:
        self._workshop = workshop
        self._session = session
        self._artifact = artifact
        self._memory_bytes = float(memory_bytes or 0)
        self._times: Moments = []
        self._due = 0
        """Pairs that should have been taken until now."""
        self._coming: Callable[[], Taken] | None = None
        """Waits for what is timed on another machine."""
        self._elsewhere: Taken | None = None
        self._done: list[int] = []
        self._logits: np.ndarray | None = None

    @property
    def logits(self) -> np.ndarray:
        """``rows x classes``, float32, in row order."""
        assert self._logits is not None, "no rows"
        return self._logits

    @property
    def latency(self) -> timing.Latency:
        moments, _ = self._taken
        return timing.summarize(moments, seed=self._workshop.run.seed)

    @property
    def _taken(self) -> Taken:
        """What counts of the times that were taken, and whether any of them was not disturbed."""
        if self._coming is not None:
            self._elsewhere, self._coming = self._coming(), None
        if self._elsewhere is not None:
            return self._elsewhere
        pace = self._workshop.gauge.stand.pace
        return pace.undisturbed(self._times), pace.quiet(self._times) > 0

    def run(self, front: Rivals, watch: Stopwatch) -> None:
        """Run all rows, unless it shows that the artefact cannot reach ``front``.

        Raises:
            CannotReachFront: if it cannot.
        """
        parts = self._workshop.parts("search")
        first, *later = counts = _spread(self._workshop.run.search.latency_pairs, len(parts) + 1)
        if (device := self._workshop.gauge.device) is not None:
            self._coming = device.moments(self._artifact, counts)
            first, later = 0, [0] * len(parts)
        with watch("latency"):
            self._time(first)
        for part, pairs in zip(parts, later, strict=True):
            with watch("accuracy"):
                self._classify(part)
                if part is not parts[-1]:
                    self._give_up_behind(front)
            with watch("latency"):
                self._time(pairs)
        with watch("latency"):
            self._time(0)

    def _time(self, pairs: int) -> None:
        """Time so many pairs, and those anew that were disturbed at another moment."""
        if self._workshop.gauge.device is not None:
            return
        stand, self._due = self._workshop.gauge.stand, self._due + pairs
        count = stand.pace.missing(self._times, self._due, self._workshop.run.search.latency_pairs)
        if count:
            # Who goes first alternates over those that count.
            before = stand.pace.quiet(self._times)
            self._times.append(stand.pairs(self._session, self._artifact, count, before=before))

    def _classify(self, part: Sequence[Batch]) -> None:
        rows = self._workshop.splits["search"]
        for batch in part:
            with slot.working():
                found = self._session.run(batch.arrays())
            if self._logits is None:
                self._logits = np.full((len(rows), found.shape[1]), np.nan, dtype=np.float32)
            self._logits[batch.rows.numpy()] = found
            self._done += batch.rows.tolist()
        scoring.require_finite(self.logits[self._done], len(self._done))

    def _give_up_behind(self, front: Rivals) -> None:
        timed, (_, tells) = self.latency, self._taken
        if not tells:
            return
        size_bytes, memory_bytes = float(self._artifact.size_bytes), self._memory_bytes
        # The low end: what is on the front must not be missed for the noise of a few pairs.
        known = {"size_bytes": size_bytes, "latency": timed.ratio_low, "peak_memory": memory_bytes}
        bound = self._workshop.bound(known, front)
        if bound is None:
            return
        rows, reference = self._workshop.splits["search"], self._workshop.reference_logits
        reason = bound.out_of_reach(self.logits, self._done, rows, reference)
        if reason is not None:
            stopped = Stopped(
                reason=reason,
                rows=len(self._done),
                size_bytes=size_bytes,
                latency=timed.ratio,
                peak_memory=memory_bytes,
            )
            raise CannotReachFront(stopped)


def _spread(count: int, places: int) -> list[int]:
    """Return ``count`` in ``places`` parts that differ by one at most, larger ones first."""
    return [count // places + (place < count % places) for place in range(places)]


class CannotReachFront(Exception):
    """An accuracy pass was ended; carries what is known."""

    def __init__(self, stopped: Stopped) -> None:
        super().__init__(stopped.reason)
        self.stopped = stopped
