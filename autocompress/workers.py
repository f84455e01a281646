"""Ray and the workers of one search: a process that `distribute.Workers` starts. Only `knock.py` imports Ray, too.

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
import subprocess
import sys
import tempfile
import threading
import time
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

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autocompress import garbage, machine
from autocompress.desk import DIED, Crew, Desk, Fingerprint, Job, Result
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
_PLACE_S = 20.0
"""Seconds in which a node of a cluster may still join that has a place for a worker."""
_JOINS, _JOIN_AGAIN_S = 4, 5.0
"""How often a cluster is joined from outside before that is given up, and seconds in between."""
_KNOCK_S = 15.0
"""Seconds in which it is known whether a cluster answers somebody without a token."""


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


class _Refused(Exception):
    """What is asked for cannot be had, and why."""


def _words(resources: dict[str, float]) -> str:
    """Say what a node offers or a worker takes, without what every node has that nobody asks for."""
    named = {name: amount for name, amount in sorted(resources.items()) if not name.startswith(("node:", "memory"))}
    return ", ".join(f"{name}: {amount:g}" for name, amount in named.items() if name != "object_store_memory")


def _knock(address: str) -> str:
    """Ask a cluster something without a token; returns what `knock` printed."""
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "autocompress.knock", address],
            env={**without, "RAY_AUTH_MODE": "disabled"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
            timeout=_KNOCK_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {_KNOCK_S:.0f} s"
    return done.stdout.strip() or "no answer"


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
        return {}  # Tune pickles its settings, for a restore that is never made or to run there; an event cannot be

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._left = threading.Event()  # where Tune runs on a cluster's head, the cluster ends it


class _Worker(tune.Trainable):
    """Evaluates plans until none is left, all in one step; the teacher, the rows and the reference stay loaded."""

    def setup(self, config: dict[str, Any]) -> None:
        garbage.collect_rarely()
        from autocompress.config import RunConfig

        self._run: RunConfig = RunConfig.from_mapping(json.loads(config["run"]))
        self._artefacts, self._desk = Path(config["artefacts"]), config["desk"]
        self._driver: Fingerprint = config["driver"]
        self._workshop: Workshop | None = None
        self._ready = False

    def step(self) -> dict[str, Any]:
        # While the driver measures the reference. What fails here fails again with a job, and then has a reason.
        with contextlib.suppress(Exception):
            import autocompress.evaluate  # noqa: F401 - seconds, in which the driver loads the model

            ray.get(self._desk.opened.remote())
            if self._elsewhere() is None:
                self._workshop = self._opened()
                self._get_ready(self._workshop)
        result: Result | None = None
        while (job := ray.get(self._desk.exchange.remote(self.trial_id, result))) is not None:
            died = job.attempt > 1 + self._run.search.max_retries
            result = job.number, {"failure": DIED} if died else self.outcome(job)
        return {"done": True}

    def outcome(self, job: Job) -> dict[str, Any]:
        """Evaluate a job's plan; returns its measurement, or why there is none, by kind.

        What no other candidate would fare better with, such as a full disk, is told as what ends the search.
        """
        from autocompress.plan import CompressionPlan
        from autocompress.records import Measurement

        if (elsewhere := self._elsewhere()) is not None:
            return {"end": elsewhere}
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
                return {"end": f"no space is left in {folder} ({type(error).__name__}); make room"}
            # A defect in one candidate's path must not end the search; the class name tells it from a refusal.
            text = str(error).strip().splitlines()
            return {"failure": f"{type(error).__name__}: {text[0][:200] if text else 'no message'}"}

    def _elsewhere(self) -> str | None:
        """Return why what is measured here does not belong in the study, and what to do about it; None if it does."""
        node = f"node {ray.util.get_node_ip_address()}"  # type: ignore[no-untyped-call]
        here = machine.fingerprint()
        if not self._artefacts.is_dir():
            return f"{node} has no folder {self._artefacts}; put --out and storage.bank where all nodes see them"
        if here["id"] != self._driver["id"]:
            cpus = f"{here['cpu']['name']}, not {self._driver['cpu']['name']}"
            return f"{node} has another CPU ({cpus}); keep workers on nodes like the driver's with search.resources"
        known = self._driver["versions"]
        for name in sorted({*here["versions"], *known}):
            if (found := here["versions"].get(name)) != known.get(name):
                return f"{node} has {name} {found}, the driver {known.get(name)}; install the same on all nodes"
        return None

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
            workers = self._start()
            report = threading.Thread(target=self._report, name="report", daemon=True)
            report.start()
            self._work(workers)
            ray.get(self._desk.end.remote())
            report.join()
        except _Left:
            pass
        except _Refused as error:
            failure = str(error)
        except Exception as error:
            if self._started.is_set():
                raise  # the driver starts another Ray
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            failure = f"Ray cannot be started ({reason})"
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
                if self._crew.elsewhere:  # Tune runs there, and sees nothing of this
                    ray.shutdown()
                    os._exit(0)
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

    def _start(self) -> int:
        """Start Ray, or join the cluster, and tell the driver for how many workers there is a place."""
        crew = self._crew
        if crew.address is None:
            ray.init(
                "local",
                num_cpus=crew.cores,
                resources={LATENCY_SLOT: 1},
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            self._join(crew.address)
        # A worker's death is retried and then told as the candidate's failure; Tune's own traceback of it is noise.
        for name in ("ray", "ray.tune"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        places = self._places()
        workers = min(crew.workers or places, crew.most)
        self._connection.send(("workers", workers))
        # Here, since other nodes may go at any time.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._desk = ray.remote(num_cpus=0)(Desk).options(scheduling_strategy=here).remote()
        self._started.set()
        return workers

    def _join(self, address: str) -> None:
        said = _knock(address)
        if said == "open" and not self._crew.insecure:
            raise _Refused(
                f"{address}: asks nobody for a token, so that whoever reaches it runs what they like there; start it "
                "with RAY_AUTH_MODE=token, or accept that with --insecure"
            )
        if said not in ("open", "closed"):
            raise _Refused(f"{address}: no cluster answers there ({said})")
        # The server for clients fails at times while it still ends what a driver before this one had.
        for left in reversed(range(_JOINS if self._crew.elsewhere else 1)):
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
                return
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if left:
                ray.shutdown()
                time.sleep(_JOIN_AGAIN_S)
        raise _Refused(f"{address}: cannot be joined ({reason}); is the token its own? (RAY_AUTH_TOKEN)")

    @property
    def _takes(self) -> dict[str, float]:
        """What a worker takes of a node."""
        crew = self._crew
        return {"CPU": crew.threads, **({LATENCY_SLOT: 1} if crew.exclusive else {}), **crew.resources}

    def _places(self) -> int:
        """Return for how many workers there is a place.

        Raises:
            _Refused: if there is none, where Ray would wait for ever.
        """
        until = time.monotonic() + (0.0 if self._crew.address is None else _PLACE_S)
        while True:
            offered = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
            found = sum(
                int(min(node.get(name, 0.0) / amount for name, amount in self._takes.items())) for node in offered
            )
            if found:
                return found
            if time.monotonic() > until:
                break
            time.sleep(1.0)
        seen = "; ".join(sorted({_words(node) for node in offered})) or "nothing"
        raise _Refused(f"a worker takes {_words(self._takes)}, which no node has; the nodes have: {seen}")

    def _work(self, workers: int) -> None:
        """Run workers until all are sent home."""
        crew = self._crew
        # On a cluster Tune wants a folder that all nodes see, though nothing is to be kept in it.
        shared = None if crew.address is None else Path(crew.artefacts).parent
        with tempfile.TemporaryDirectory(prefix=".autocompress-tune-", dir=shared) as scratch:
            tune.Tuner(
                tune.with_resources(_Worker, tune.PlacementGroupFactory([self._takes])),
                param_space={
                    "run": crew.run,
                    "artefacts": crew.artefacts,
                    "desk": self._desk,
                    "driver": crew.driver,
                },
                tune_config=tune.TuneConfig(num_samples=workers, max_concurrent_trials=workers),
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
