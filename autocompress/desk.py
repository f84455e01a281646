"""What lies between the driver and its workers: jobs that nobody does yet or that somebody has, and results."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

Result = tuple[int, dict[str, Any]]
"""A job's number and its measurement, or why there is none, by kind."""
Fingerprint = dict[str, Any]
"""What `machine.fingerprint` returns."""
DIED = "the worker died or ended without a result in every attempt"
"""Why there is no measurement of a job that no worker lived through."""


@dataclass(frozen=True)
class Crew:
    """Who works on what.

    Args:
        run: the resolved run file as JSON.
        artefacts: folder for built candidates, which all see if there is no exchange.
        workers: how many there are; None for as many as find a place.
        most: more are of no use.
        threads: cores that each of them has to itself.
        cores: what a Ray of our own is told that there are.
        exclusive: whether a worker must have the machine to itself while it times.
        resources: what else each of them takes of a node, by Ray's names.
        device: what a node offers on which latency is measured; where there is nothing in it, workers do that.
        device_wait: seconds in which such a node may be away.
        max_failures: how often one worker may die.
        driver: the machine and the versions that measured the uncompressed model.
        address: of the cluster; None for a Ray of our own.
        insecure: whether the cluster may be one that asks nobody for a token.
        exchange: URL of the depot in which artefacts go to and fro between machines without a common folder.
    """

    run: str
    artefacts: str
    workers: int | None
    most: int
    threads: int
    cores: int
    exclusive: bool
    resources: dict[str, float]
    device: dict[str, float]
    device_wait: float
    max_failures: int
    driver: Fingerprint
    address: str | None = None
    insecure: bool = False
    exchange: str | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether Tune itself runs on the cluster's head, which this process only speaks to."""
        return (self.address or "").startswith("ray://")


@dataclass(frozen=True)
class Job:
    """A plan to evaluate.

    Args:
        number: of its trial in the study.
        plan: as JSON.
        front: costs that it has to reach.
        attempt: how often it was given to a worker, this time included.
    """

    number: int
    plan: str
    front: list[list[float]]
    attempt: int = 0


class Desk:
    """Where workers hand in results and take their next jobs, which lie there before the driver has heard of anything.

    One trial of Tune is one worker for the whole search, since ending a trial of Tune and beginning another takes
    time in which a worker is idle. A worker that died is begun again as the same trial, comes here, and is given the
    job that it had. Where it is known to have died, others may have that first: on a node that is gone nobody is begun
    again, and the driver may wait for this job before it lays down another one.
    """

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._given: dict[str, list[Job]] = {}
        self._deaths: Counter[str] = Counter()
        self._results: deque[Result] = deque()
        self._open = self._closed = self._ended = False
        self._changed = asyncio.Condition()

    async def open(self) -> None:
        """Let workers load what the driver has made ready."""
        async with self._changed:
            self._open = True
            self._changed.notify_all()

    async def opened(self) -> None:
        """Wait for that."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._open)

    async def put(self, job: Job) -> None:
        """Lay down a job."""
        async with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    async def close(self) -> None:
        """Send workers home once no job is left."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def withdraw(self) -> None:
        """Take back the jobs that nobody has, and send workers home."""
        async with self._changed:
            self._jobs.clear()
            self._closed = True
            self._changed.notify_all()

    async def lost(self, worker: str) -> None:
        """Give what a worker had, which died, to whoever comes next."""
        async with self._changed:
            self._deaths[worker] += 1  # of the calls of its that wait here, too
            self._jobs.extendleft(reversed(self._given.pop(worker, [])))
            self._changed.notify_all()

    async def end(self) -> None:
        """Let nobody wait for further results."""
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    async def exchange(self, worker: str, result: Result | None) -> Job | None:
        """Take the result of the last job of ``worker``, if its process has one; return the next one, or None at last.

        What it was given and did not finish comes first. A call from a process that died may still wait here: what it
        is given is its worker's all the same, unless that is known to be `lost`, and it is given nothing.
        """
        deaths = self._deaths[worker]
        async with self._changed:
            given = self._given.setdefault(worker, [])
            # What was given to somebody else meanwhile is theirs to hand in.
            if result is not None and any(job.number == result[0] for job in given):
                self._results.append(result)
                given[:] = [job for job in given if job.number != result[0]]
                self._changed.notify_all()
            await self._changed.wait_for(lambda: given or self._jobs or self._closed or self._deaths[worker] > deaths)
            if self._deaths[worker] > deaths:
                return None
            if not given:
                if not self._jobs:
                    return None
                given.append(self._jobs.popleft())
            given[0] = dataclasses.replace(given[0], attempt=given[0].attempt + 1)
            return given[0]

    async def result(self) -> Result | None:
        """Return the next result, or None once it has ended and none is left."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._results or self._ended)
            return self._results.popleft() if self._results else None
