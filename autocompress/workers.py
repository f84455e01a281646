"""Workers, each one trial of Tune: they take plans from a `Desk`, and may be killed at any moment.

With `crew.py`, which starts them, and `knock.py` the only modules that import Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property
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

from autocompress import garbage, machine
from autocompress.desk import DIED, Fingerprint, Job, Result
from autocompress.errors import ENDS, AutocompressError, DepotError, DeviceError

if TYPE_CHECKING:
    from autocompress.config import RunConfig
    from autocompress.depot import Depot
    from autocompress.evaluate import Workshop


LOOK_S = 10.0
"""Seconds without a result after which Ray is asked whether it lives."""


def words_of(resources: dict[str, float]) -> str:
    """Say what a node offers or a worker takes, without what every node has that nobody asks for."""
    named = {name: amount for name, amount in sorted(resources.items()) if not name.startswith(("node:", "memory"))}
    return ", ".join(f"{name}: {amount:g}" for name, amount in named.items() if name != "object_store_memory")


def answer_of(begun: Any, device: dict[str, float], wait: float) -> Any:
    """Wait for what the outpost on a device was asked for, as long as there is a node that can be the device.

    Args:
        begun: what is waited for.
        device: what such a node offers.
        wait: seconds in which it may be away.

    Raises:
        DeviceError: if there is none for so long that it will not come back.
        AutocompressError: what was raised there.
    """
    gone = 0.0
    while True:
        try:
            return ray.get(begun, timeout=LOOK_S)
        except ray.exceptions.GetTimeoutError:
            offered = (node["Resources"] for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]
            there = any(all(node.get(name, 0.0) >= amount for name, amount in device.items()) for node in offered)
            gone = 0.0 if there else gone + LOOK_S
            if gone > wait:
                raise DeviceError(f"no node has {words_of(device)} any more; start the device's node again") from None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what was raised there, without where
        except ray.exceptions.RayError as error:
            raise DeviceError(f"the device cannot be reached ({type(error).__name__})") from None


def _words(error: Exception) -> str:
    """Say what went wrong on one line; the class name tells a defect from a refusal."""
    text = (str(error).strip().splitlines() or ["no message"])[0][:200]
    return text if isinstance(error, AutocompressError) else f"{type(error).__name__}: {text}"


class Worker(tune.Trainable):
    """Evaluates plans until none is left, all in one step; the teacher, the rows and the reference stay loaded."""

    def setup(self, config: dict[str, Any]) -> None:
        # Nothing that may fail, as with another version: it would reach the driver without its reason.
        garbage.collect_rarely()
        self._settings = config
        self._desk = config["desk"]
        self._artefacts = Path(config["artefacts"])
        if config["exchange"] is not None:
            self._scratch = tempfile.TemporaryDirectory(prefix="autocompress-artefacts-")
            self._artefacts = Path(self._scratch.name)
        self._driver: Fingerprint = config["driver"]
        self._outposts: list[Any] = config["outposts"]
        self._workshop: Workshop | None = None
        self._ready = False

    @cached_property
    def _run(self) -> RunConfig:
        from autocompress.config import RunConfig

        return RunConfig.from_mapping(json.loads(self._settings["run"]))

    @cached_property
    def _exchange(self) -> Depot | None:
        from autocompress.depot import Depot

        url = self._settings["exchange"]
        return None if url is None else Depot(url)

    def step(self) -> dict[str, Any]:
        # While the driver measures the reference. What fails here fails again with a job, and then has a reason.
        with contextlib.suppress(Exception):
            import autocompress.evaluate  # noqa: F401 - seconds, in which the driver loads the model

            ray.get(self._desk.opened.remote())
            if self._elsewhere() is None:
                self._workshop = self._opened()
                self._get_ready(self._workshop)
        # Not of the run as this version reads it, which may fail.
        attempts = 1 + json.loads(self._settings["run"])["search"]["max_retries"]
        result: Result | None = None
        while (job := ray.get(self._desk.exchange.remote(self.trial_id, result))) is not None:
            result = job.number, {"failure": DIED} if job.attempt > attempts else self.outcome(job)
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
            workshop = self._workshop = self._workshop or self._opened()
            self._get_ready(workshop)
        except ENDS as error:
            return {"end": str(error)}
        except Exception as error:
            # It would fail so with each candidate, sooner than another worker is done with one.
            return {"end": self._without_room(error) or f"{self._node()} cannot begin: {_words(error)}"}
        try:
            plan = CompressionPlan.from_json(job.plan)
            found = workshop.attempt(plan, job.front)
            kind = "measurement" if isinstance(found, Measurement) else "stopped"
            if self._exchange is not None and kind == "measurement":
                self._exchange.put(plan.plan_id, self._artefacts / plan.plan_id)
                shutil.rmtree(self._artefacts / plan.plan_id)
            return {kind: dataclasses.asdict(found)}
        except ENDS as error:
            return {"end": str(error)}
        except AutocompressError as error:
            return {"failure": str(error)}
        except Exception as error:
            if (full := self._without_room(error)) is not None:
                return {"end": full}
            # A defect in one candidate's path must not end the search.
            return {"failure": _words(error)}

    def _node(self) -> str:
        return f"node {ray.util.get_node_ip_address()}"  # type: ignore[no-untyped-call]

    def _elsewhere(self) -> str | None:
        """Return why what is measured here does not belong in the study, and what to do about it; None if it does."""
        node, here = self._node(), machine.fingerprint()
        if not self._artefacts.is_dir():
            where = "put --out and storage.bank where all nodes see them, or name a URL in storage.shared"
            return f"{node} has no folder {self._artefacts}; {where}"
        if here["id"] != self._driver["id"]:
            cpus = f"{here['cpu']['name']}, not {self._driver['cpu']['name']}"
            return f"{node} has another CPU ({cpus}); keep workers on nodes like the driver's with search.resources"
        known = self._driver["versions"]
        for name in sorted({*here["versions"], *known}):
            if (found := here["versions"].get(name)) != known.get(name):
                return f"{node} has {name} {found}, the driver {known.get(name)}; install the same on all nodes"
        return None

    def _without_room(self, error: Exception) -> str | None:
        """Say which folder nothing more can be written in, if an error may come of that."""
        folders = [self._artefacts, *([self._workshop.bank.root] if self._workshop is not None else [])]
        full = machine.without_room(folders)
        return None if full is None else f"no space is left in {full} ({type(error).__name__}); make room"

    def _opened(self) -> Workshop:
        from autocompress.evaluate import Workshop
        from autocompress.trained import bank_of

        workshop = Workshop(
            self._run.with_files(bank_of(self._run).borrowed), self._artefacts, threads=self._run.target.threads
        )
        if self._outposts:
            workshop.gauge.use(self._call)
        workshop.open()
        return workshop

    def _call(self, method: str, *values: Any) -> Callable[[], Any]:
        outpost = self._outposts[int(self.trial_id.rpartition("_")[2]) % len(self._outposts)]
        begun = getattr(outpost, method).remote(*values)
        return lambda: answer_of(begun, self._run.search.device, self._run.search.device_wait)

    def _get_ready(self, workshop: Workshop) -> None:
        if not self._ready:
            if self._exchange is not None:
                workshop.reference_folder.mkdir(exist_ok=True)
                if not self._exchange.get(workshop.reference_folder.name, workshop.reference_folder):
                    raise DepotError(
                        f"storage.shared: {self._exchange.url} has no reference; run the same command again"
                    )
            workshop.ready()
            self._ready = True

    def cleanup(self) -> None:
        if self._settings["exchange"] is not None:
            self._scratch.cleanup()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: a killed worker's job starts again."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Load nothing."""
