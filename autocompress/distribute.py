"""The way to the workers, which leads through Ray's process (`crew.py`): jobs go out, results come back.

Workers, and all of Ray, may be killed at any moment: what they had is given out again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from autocompress import fresh, machine
from autocompress.cluster import Cluster, environment
from autocompress.config import RunConfig
from autocompress.desk import Crew, Job, Result
from autocompress.errors import ConfigError, StudyError
from autocompress.trained import Progress, silent

_LIVES = 3
"""How often Ray may be started for one search."""
_PATIENCE_S = 20.0
"""Time that Ray has to end by itself."""
LEAVE_S = 15.0
"""Time that candidates have to come to their end after Ctrl-C."""
_JOIN_S = 120.0
"""Time that a cluster has to take us in."""


class Workers:
    """Ray and the workers of one search, which start while the driver does other things.

    When Ray dies, which ends the process that it was reached from, it is started again, or joined again, and given what
    had no result yet.

    Args:
        run: the resolved run file, as workers shall read it.
        artefacts: folder for built candidates.
        progress: told when it is started again.
        cluster: where the workers are, instead of on this machine.
        exchange: URL of the depot where they find the reference and leave artefacts, if they see no folder of ours.
        most: more than so many are of no use, by default than there are candidates.
    """

    ENTRY = "from autocompress.crew import main; main()"
    """What the process runs that Ray is reached from; whoever measures the way to it runs something else there."""

    def __init__(
        self,
        run: RunConfig,
        artefacts: Path,
        progress: Progress = silent,
        *,
        cluster: Cluster | None = None,
        exchange: str | None = None,
        most: int | None = None,
    ) -> None:
        if run.search.device and cluster is None:
            raise ConfigError("search.device: names nodes of a cluster; give its --address")
        most = run.search.trials if most is None else most
        self._progress = progress
        self._cluster = cluster
        cores = machine.cores()
        threads = min(run.target.threads, cores)
        # Wall-clock timing needs the node to itself; CPU time at one thread does not.
        exclusive = run.target.threads > 1
        wanted = run.search.workers
        if cluster is None:
            wanted = 1 if exclusive else wanted or cores // threads
        self.count = min(wanted or 1, most)
        """How many there are; on a cluster this is known once it is entered."""
        self._crew = Crew(
            run=json.dumps(run.model_dump(mode="json", by_alias=True)),
            artefacts=str(artefacts.absolute()),  # Tune runs its workers in folders of their own
            workers=wanted,
            most=most,
            threads=threads,
            # More workers than cores were asked for by name: Ray would wait for cores that do not exist.
            cores=max(cores, self.count * threads),
            exclusive=exclusive,
            resources=run.search.resources,
            device=run.search.device,
            device_wait=run.search.device_wait,
            max_failures=(1 + run.search.max_retries) * run.search.trials,
            driver=machine.fingerprint(),
            address=None if cluster is None else cluster.address,
            insecure=cluster is not None and cluster.insecure,
            exchange=exchange,
        )
        self._jobs: dict[int, Job] = {}
        self._calls: dict[int, tuple[Any, ...]] = {}
        """What the device was asked and did not answer yet, by number."""
        self._answers: dict[int, Any] = {}
        self._numbers = itertools.count()
        self._heard: deque[tuple[str, Any]] = deque()
        """What came of workers and was not asked for yet."""
        self._open = self._closed = self._withdrawn = False
        self._lives = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._words: IO[bytes] | None = None

    def __enter__(self) -> Workers:
        self._start()
        if self._cluster is not None:
            try:
                self._join()
            except BaseException:
                self.stop()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def open(self) -> None:
        """Let workers load the model, which is there by now; Ray need not have started yet."""
        self._open = True
        self._send("open")

    def put(self, job: Job) -> None:
        """Lay a job on the desk."""
        self._jobs[job.number] = job
        self._send("put", job)

    def close(self) -> None:
        """Send the workers home once no job is left."""
        self._closed = True
        self._send("close")

    def withdraw(self) -> None:
        """Take back the jobs that nobody works on, and send home who is done."""
        self._progress(f"candidates that are running have {LEAVE_S:.0f} s to end; Ctrl-C again ends at once")
        self._withdrawn = True
        self._send("withdraw")

    def next_result(self, timeout: float | None = None) -> Result | None:
        """Wait for a worker's result; None when all of them have gone home, done or not.

        Args:
            timeout: in seconds, by default as long as it takes.

        Raises:
            TimeoutError: if none came in time.
            StudyError: if Ray cannot be started, or died too often.
        """
        while not self._heard:
            self._hear(timeout)
        kind, found = self._heard.popleft()
        if kind == "result":
            result: Result = found
            self._jobs.pop(result[0], None)
            return result
        if found is not None:
            again = "; run the same command again to continue" if self._lives > 1 else ""
            raise StudyError(f"search: {found}{again}")
        return None

    def on_device(self, method: str, *values: Any) -> Callable[[], Any]:
        """Begin a method of the outpost on the device; returns what waits for its result.

        Raises:
            DeviceError: by what is returned, if the device cannot be reached.
        """
        number = next(self._numbers)
        self._calls[number] = (method, values)
        self._send("call", number, method, values)

        def wait() -> Any:
            while number not in self._answers:
                for kind, found in self._heard:
                    if kind == "ended" and found is not None:
                        raise StudyError(f"search: {found}")
                self._hear(None)
            answer = self._answers.pop(number)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return wait

    def _hear(self, timeout: float | None) -> None:
        """Take in what comes next; a Ray that died is started again."""
        assert self._connection is not None
        try:
            if not self._connection.poll(timeout):
                raise TimeoutError
            kind, found = self._connection.recv()
        except TimeoutError:
            raise
        except (EOFError, OSError):
            self._start_again()
            return
        if kind == "workers":
            self.count = found
        elif kind == "answer":
            number, answer = found
            del self._calls[number]
            self._answers[number] = answer
        else:
            self._heard.append((kind, found))

    def stop(self) -> None:
        """End it, if it has not ended yet; returns when nothing of it runs any more."""
        if self._process is None:
            return
        assert self._connection is not None
        assert self._words is not None
        self._connection.close()  # which it sees
        try:
            fresh.exited(self._process.pid, _PATIENCE_S)
        finally:  # also where nobody wants to wait
            fresh.end(self._process.pid)  # what it left behind, or it
        self._process.wait()
        self._words.close()
        self._process = None

    def _start(self) -> None:
        self._lives += 1
        ours, theirs = socket.socketpair()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        command, known = fresh.python("-c", self.ENTRY, str(theirs.fileno()))
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                command,
                env={**known, **environment(self._cluster)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._words,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the driver
            )
        self._connection = Connection(ours.detach())
        self._tell(self._crew)

    def _join(self) -> None:
        """Wait until it is known for how many workers the cluster has a place."""
        assert self._connection is not None
        self._progress(f"joining the cluster at {self._crew.address}")
        try:
            if not self._connection.poll(_JOIN_S):
                raise StudyError(f"search: {self._crew.address}: no answer in {_JOIN_S:.0f} s")
            kind, found = self._connection.recv()
        except (EOFError, OSError):
            raise StudyError(f"search: {self._crew.address}: cannot be joined ({self._last_words()})") from None
        if kind == "ended":
            raise StudyError(f"search: {found}")
        self.count = found

    def _start_again(self) -> None:
        """Give a new Ray what had no result yet."""
        last = self._last_words()
        self.stop()
        if self._lives == _LIVES:
            raise StudyError(f"search: Ray died {_LIVES} times ({last}); run the same command again to continue")
        self._progress(f"Ray died ({last}); it is started again with what had no result yet")
        self._start()
        if self._open:
            self._send("open")
        for number, (method, values) in self._calls.items():
            self._send("call", number, method, values)
        for job in () if self._withdrawn else self._jobs.values():
            self._send("put", job)
        if self._closed or self._withdrawn:
            self._send("close")

    def _last_words(self) -> str:
        assert self._words is not None
        self._words.seek(0)
        lines = [line.strip() for line in self._words.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1][-200:] if lines else "it left no word"

    def _send(self, method: str, *values: Any) -> None:
        self._tell((method, *values))

    def _tell(self, message: Any) -> None:
        assert self._connection is not None
        # `next_result` finds it dead, and tells all of this to the next one.
        with contextlib.suppress(OSError):
            self._connection.send(message)
