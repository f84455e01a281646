"""Seconds by stage, for records of what a candidate or a search spent its time on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

WAITING = "waiting"
"""The stage that waiting for others is put down to."""


class Stopwatch:
    """Adds up wall seconds by stage: ``with watch("build"): ...``.

    Args:
        seconds: that it goes on from.
        waited: counts seconds of waiting; what it counts in a stage belongs to `WAITING`. Stages do not nest then.
    """

    def __init__(
        self, seconds: Mapping[str, float] | None = None, *, waited: Callable[[], float] | None = None
    ) -> None:
        self.seconds = dict(seconds or {})
        self._waited = waited

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started, before = time.perf_counter(), self._waited() if self._waited else 0.0
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            if self._waited is not None:
                turns = self._waited() - before
                self._add(WAITING, turns)
                seconds -= turns
            self._add(stage, seconds)

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
