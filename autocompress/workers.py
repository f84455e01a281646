"""Ray and the workers of one search: a process that `distribute.LocalRay` starts, and the only file that imports ray.

It is a process of its own because Ray ends the one that it was started from, without a word, when one of its own
processes fails. What stands here can be killed at any moment; plans and results come and go through a pipe. Each
worker is one trial of Tune, which takes plans from a `Desk`. Ray's own Optuna searcher is not used: it loses trials on
NaN objectives and after crashes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import secrets
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Whoever calls Ray after its end, as Tune does when it is left, would start another one.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# For this search alone. Ray would leave one in a file of the home folder that others may read.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# With no clusters, whatever the system, Ray's servers are bound to the loopback address alone.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
from ray import tune

from autocompress import garbage
from autocompress.desk import DIED, Crew, Desk, Job, Result
from autocompress.errors import AutocompressError

if TYPE_CHECKING:
    from autocompress.config import RunConfig
    from autocompress.evaluate import Workshop

LATENCY_SLOT = "latency_slot"
"""Custom resource, one per node that may be timed: a trial that is timed by wall clock takes it whole."""


_ROOM = 2**20
"""Bytes that a disk which is not full has room for."""
_LOOK_S = 10.0
"""Seconds without a result after which Ray is asked whether it lives."""


def _or_die(work: Callable[[_Site], None]) -> Callable[[_Site], None]:
    """Let a thread's failure end the process, which the driver sees, where Tune would wait for a dead Ray for ever."""

    def carried_out(site: _Site) -> None:
        try:
            work(site)
        except BaseException:
            if not site.over.is_set():
                traceback.print_exc()
                os._exit(1)

    return carried_out


class _Left(Exception):
    """The search is left before its workers are done."""


class _Leave(tune.Callback):
    """Ends Tune where it stands once a search is left."""

    def __init__(self, left: threading.Event) -> None:
        self._left = left

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._left.is_set():
            raise _Left

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its settings for a restore that is never made; an event cannot be


class _Worker(tune.Trainable):
    """Evaluates plans until none is left, all in one step; the teacher, the rows and the reference stay loaded."""

    def setup(self, config: dict[str, Any]) -> None:
        garbage.collect_rarely()
        from autocompress.config import RunConfig

        self._run: RunConfig = RunConfig.from_mapping(json.loads(config["run"]))
        self._artefacts, self._desk = Path(config["artefacts"]), config["desk"]
        self._workshop: Workshop | None = None
        self._ready = False

    def step(self) -> dict[str, Any]:
        # While the driver measures the reference. What fails here fails again with a job, and then has a reason.
        with contextlib.suppress(Exception):
            import autocompress.evaluate  # noqa: F401 - seconds, in which the driver loads the model

            ray.get(self._desk.opened.remote())
            self._workshop = self._opened()
            self._get_ready(self._workshop)
        result: Result | None = None
        while (job := ray.get(self._desk.exchange.remote(self.trial_id, result))) is not None:
            died = job.attempt > 1 + self._run.search.max_retries
            result = job.number, {"failure": DIED} if died else self.outcome(job)
        return {"done": True}

    def outcome(self, job: Job) -> dict[str, Any]:
        """Evaluate a job's plan; returns its measurement, or why there is none, by kind.

        A full disk is no candidate's failure: it is told as what it is.
        """
        from autocompress.plan import CompressionPlan
        from autocompress.records import Measurement

        try:
            # Not in setup: what fails there reaches the driver without its reason.
            self._workshop = self._workshop or self._opened()
            self._get_ready(self._workshop)
            found = self._workshop.attempt(CompressionPlan.from_json(job.plan), job.front)
            kind = "measurement" if isinstance(found, Measurement) else "stopped"
            return {kind: dataclasses.asdict(found)}
        except AutocompressError as error:
            return {"failure": str(error)}
        except Exception as error:
            if (folder := self._full()) is not None:
                return {"full": f"no space is left in {folder} ({type(error).__name__})"}
            # A defect in one candidate's path must not end the search; the class name tells it from a refusal.
            text = str(error).strip().splitlines()
            return {"failure": f"{type(error).__name__}: {text[0][:200] if text else 'no message'}"}

    def _full(self) -> Path | None:
        """Return the folder in which nothing more can be written, if there is one.

        Asked of the disk and not of the error: libraries say it in words of their own.
        """
        folders = [self._artefacts, *([self._workshop.bank.root] if self._workshop is not None else [])]
        for folder in folders:
            try:
                with tempfile.TemporaryFile(dir=folder) as probe:
                    probe.write(bytes(_ROOM))
                    probe.flush()
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    return folder
        return None

    def _opened(self) -> Workshop:
        from autocompress.evaluate import Workshop

        workshop = Workshop(self._run, self._artefacts)
        workshop.open()
        return workshop

    def _get_ready(self, workshop: Workshop) -> None:
        if not self._ready:
            workshop.ready()
            self._ready = True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: a killed worker's job starts again."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Load nothing."""


class _Site:
    """Where the crew works: Ray, Tune and the desk, and the way between the desk and the driver."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._crew: Crew = connection.recv()
        self._desk: Any = None
        self._started = threading.Event()
        self.over = threading.Event()
        """Set once the driver has left, or nothing is to come."""

    def live(self) -> None:
        """Work until all workers have gone home, or the driver has left."""
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        failure = None
        try:
            self._start()
            report = threading.Thread(target=self._report, name="report", daemon=True)
            report.start()
            self._work()
            ray.get(self._desk.end.remote())
            report.join()
        except _Left:
            pass
        except Exception as error:  # told to the driver
            failure = (str(error).strip() or type(error).__name__).splitlines()[0]
        with contextlib.suppress(OSError):  # the driver has left
            self._connection.send(("ended", failure))
        self.over.set()
        ray.shutdown()

    @_or_die
    def _listen(self) -> None:
        """Pass on what the driver says, until it leaves."""
        while True:
            try:
                method, *values = self._connection.recv()
            except (EOFError, OSError):
                self.over.set()
                return
            self._started.wait()
            getattr(self._desk, method).remote(*values)

    @_or_die
    def _report(self) -> None:
        """Tell the driver what the crew found, until that has gone home or the driver has left."""
        while (found := self._next_result()) is not None:
            try:
                self._connection.send(("result", found))
            except OSError:
                return

    def _next_result(self) -> Result | None:
        asked = self._desk.result.remote()
        while True:
            with contextlib.suppress(ray.exceptions.GetTimeoutError):
                found: Result | None = ray.get(asked, timeout=_LOOK_S)
                return found
            if not any(node["Alive"] for node in ray.nodes()):  # type: ignore[no-untyped-call]
                raise RuntimeError("no node of Ray is alive")

    def _start(self) -> None:
        ray.init(
            num_cpus=self._crew.cores,
            resources={LATENCY_SLOT: 1},
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100 * 2**20,
        )
        # A worker's death is retried and then told as the candidate's failure; Tune's own traceback of it is noise.
        for name in ("ray", "ray.tune"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._desk = ray.remote(num_cpus=0)(Desk).remote()
        self._started.set()

    def _work(self) -> None:
        """Run workers until all are sent home."""
        crew = self._crew
        resources: dict[str, float] = {"cpu": crew.threads, **({LATENCY_SLOT: 1} if crew.exclusive else {})}
        with tempfile.TemporaryDirectory(prefix="autocompress-tune-") as scratch:
            tune.Tuner(
                tune.with_resources(_Worker, resources),
                param_space={"run": crew.run, "artefacts": crew.artefacts, "desk": self._desk},
                tune_config=tune.TuneConfig(num_samples=crew.workers, max_concurrent_trials=crew.workers),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[_Leave(self.over)],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                    # Attempts are counted by candidate; this bounds a machine on which no worker can live.
                    failure_config=tune.FailureConfig(max_failures=crew.max_failures),
                ),
            ).fit()


def main() -> None:
    """Serve the driver at the other end of the file descriptor that is the only argument."""
    garbage.collect_rarely()
    _Site(Connection(int(sys.argv[1]))).live()
