"""Ray and where its workers are, for one search: a process that `distribute.Workers` starts.

It is a process of its own because Ray ends the one that it was started from, without a word, when one of its own
processes fails. Plans and results come and go through a pipe. Each worker is one trial of Tune (`workers.py`), which
takes plans from a `Desk`. Ray's own Optuna searcher is not used: it loses trials on NaN objectives and after crashes.
"""

from __future__ import annotations

import contextlib
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
from typing import Any

from autocompress.workers import LOOK_S, Worker, answer_of, words_of  # first, since it tells Ray how to behave

import ray  # isort: skip
from ray import tune  # isort: skip
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # isort: skip

from autocompress import fresh, garbage, machine
from autocompress.desk import Crew, Desk, Result
from autocompress.errors import AutocompressError, DeviceError, first_line

LATENCY_SLOT = "latency_slot"
"""Custom resource, one per node that may be timed: a trial that is timed by wall clock takes it whole."""
_PLACE_S = 20.0
"""Seconds in which a node of a cluster may still join that has a place for a worker."""
_WORKERLESS_S = 600.0
"""Seconds in which a cluster may be without any node that a worker could be on."""
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


def _knock(address: str) -> str:
    """Ask a cluster something without a token; returns what `knock` printed."""
    command, environment = fresh.python("-m", "autocompress.knock", address)
    without = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH_")}
    try:
        done = subprocess.run(  # noqa: S603
            command,
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


class _Watch(tune.Callback):
    """Ends Tune where it stands once a search is left, and tells the desk of workers that died."""

    def __init__(self, left: threading.Event, desk: Any) -> None:
        self._left = left
        self._desk = desk

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._left.is_set():
            raise _Left

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._desk.lost.remote(trial.trial_id)

    on_trial_error = on_trial_recover

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its settings, for a restore that is never made or to run there; an event cannot be.
        return {"_desk": self._desk}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._desk = state["_desk"]
        self._left = threading.Event()  # where Tune runs on a cluster's head, the cluster ends it


class _Site:
    """Where the crew works: Ray, Tune and the desk, and the way between the desk and the driver."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._crew: Crew = connection.recv()
        self._desk: Any = None
        self._outposts: list[Any] = []
        self._saying = threading.Lock()
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
            reason = first_line(error)
            failure = f"Ray cannot be started ({reason})"
        self._say("ended", failure)
        if self._outposts and failure is None:
            self.over.wait()  # the driver may still want something timed
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
            if method == "call":
                threading.Thread(target=self._call, args=values, daemon=True).start()
            else:
                getattr(self._desk, method).remote(*values)

    def _say(self, kind: str, what: Any) -> None:
        """Tell the driver something, unless it has left."""
        with self._saying, contextlib.suppress(OSError):
            self._connection.send((kind, what))

    def _call(self, number: int, method: str, values: tuple[Any, ...]) -> None:
        """Ask the first outpost for what the driver wants to know, and say what it answers."""
        answer: Any
        try:
            asked = getattr(self._outposts[0], method).remote(*values)
            answer = answer_of(asked, self._crew.device, self._crew.device_wait)
        except AutocompressError as error:
            answer = error
        except Exception as error:
            answer = DeviceError(f"the device cannot do that ({type(error).__name__}: {error})")
        self._say("answer", (number, answer))

    @_or_die
    def _report(self) -> None:
        """Tell the driver what the crew found, until that has gone home or the driver has left."""
        while not self.over.is_set() and (found := self._next_result()) is not None:
            self._say("result", found)

    def _next_result(self) -> Result | None:
        asked, last = self._desk.result.remote(), time.monotonic()
        while True:
            with contextlib.suppress(ray.exceptions.GetTimeoutError):
                found: Result | None = ray.get(asked, timeout=LOOK_S)
                return found
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
            if not nodes:
                raise RuntimeError("no node of Ray is alive")
            if not self._crew.most or any(_times(node, self._takes) for node in nodes):
                last = time.monotonic()
            elif time.monotonic() - last > _WORKERLESS_S:  # whoever joins anew says what there is
                raise RuntimeError(f"no node has had {words_of(self._takes)} for {_WORKERLESS_S:.0f} s")

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
        self._outposts = self._manned()
        places = self._places(self._takes) if crew.most else 0
        workers = min(crew.workers or places, crew.most)
        self._say("workers", workers)
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
                reason = first_line(error)
            if left:
                ray.shutdown()
                time.sleep(_JOIN_AGAIN_S)
        raise _Refused(f"{address}: cannot be joined ({reason}); is the token its own? (RAY_AUTH_TOKEN)")

    @property
    def _takes(self) -> dict[str, float]:
        """What a worker takes of a node."""
        crew = self._crew
        return {"CPU": crew.threads, **({LATENCY_SLOT: 1} if crew.exclusive else {}), **crew.resources}

    def _manned(self) -> list[Any]:
        """Return an outpost on each node that latency is to be measured on.

        Raises:
            _Refused: if there is no such node, if they differ, or have other versions than what artefacts are made by.
        """
        crew = self._crew
        if not crew.device:
            return []
        from autocompress.outpost import Outpost

        target = json.loads(crew.run)["target"]
        # No cores: a node that offers workers none is left to the outpost, also when it comes back.
        places = min(self._places(crew.device, who="a device"), max(1, crew.workers or crew.most))
        there: Any = ray.remote(num_cpus=0, resources=crew.device, max_restarts=-1, max_task_retries=-1)(Outpost)
        outposts = [there.remote(target) for _ in range(places)]
        try:
            found = [answer_of(outpost.fingerprint.remote(), crew.device, crew.device_wait) for outpost in outposts]
        except AutocompressError as error:
            raise _Refused(str(error)) from None
        cpus = sorted({about["cpu"]["name"] for about in found})
        if len({about["id"] for about in found}) > 1:
            raise _Refused(f"devices differ ({', '.join(cpus)}); give each kind a name of its own in search.device")
        if machine.adds_in_16_bits(found[0]) and not machine.adds_in_16_bits(crew.driver):
            raise _Refused(
                f"the device {cpus[0]} adds 8-bit products in 16 bits, where models that are built here overflow and "
                "predict otherwise than they are scored; search on machines of its kind"
            )
        for name in ("autocompress", target["runtime"]):
            for about in found:
                if (has := about["versions"].get(name)) != (wanted := crew.driver["versions"].get(name)):
                    raise _Refused(f"the device {cpus[0]} has {name} {has}, the driver {wanted}; install the same")
        return outposts

    def _places(self, takes: dict[str, float], *, who: str = "a worker") -> int:
        """Return how often the nodes can give what one of a kind takes.

        Raises:
            _Refused: if there is none, where Ray would wait for ever.
        """
        until = time.monotonic() + (0.0 if self._crew.address is None else _PLACE_S)
        while True:
            offered = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
            found = sum(_times(node, takes) for node in offered)
            if found:
                return found
            if time.monotonic() > until:
                break
            time.sleep(1.0)
        seen = "; ".join(sorted({words_of(node) for node in offered})) or "nothing"
        raise _Refused(f"{who} takes {words_of(takes)}, which no node has; the nodes have: {seen}")

    def _work(self, workers: int) -> None:
        """Run workers until all are sent home."""
        crew = self._crew
        if not workers:
            return
        # Nothing is to be kept in it; where there is a folder that all nodes see, Tune has it there.
        shared = None if crew.address is None or crew.exchange is not None else Path(crew.artefacts).parent
        with tempfile.TemporaryDirectory(prefix=".autocompress-tune-", dir=shared) as scratch:
            tune.Tuner(
                tune.with_resources(Worker, tune.PlacementGroupFactory([self._takes])),
                param_space={
                    "run": crew.run,
                    "artefacts": crew.artefacts,
                    "exchange": crew.exchange,
                    "desk": self._desk,
                    "driver": crew.driver,
                    "outposts": self._outposts,
                },
                tune_config=tune.TuneConfig(num_samples=workers, max_concurrent_trials=workers),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[_Watch(self.over, self._desk)],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                    # Attempts are counted by candidate; this bounds a machine on which no worker can live.
                    failure_config=tune.FailureConfig(max_failures=crew.max_failures),
                ),
            ).fit()


def _times(node: dict[str, float], takes: dict[str, float]) -> int:
    """Return how often a node can give what somebody takes."""
    return int(min(node.get(name, 0.0) / amount for name, amount in takes.items()))


def main() -> None:
    """Serve the driver at the other end of the file descriptor that is the only argument."""
    garbage.collect_rarely()
    _Site(Connection(int(sys.argv[1]))).live()
