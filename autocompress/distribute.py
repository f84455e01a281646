"""Ray executes: a trial of Tune per worker, which takes the study's plans from a `Desk`. Nothing else imports ray.

Ray's own Optuna searcher is not used: it loses trials on NaN objectives and after crashes. Here the driver alone
writes the study; a worker receives a plan and returns a measurement or a reason, and may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
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
from autocompress.config import RunConfig
from autocompress.desk import Desk, Job, Result
from autocompress.errors import AutocompressError, StudyError
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate, Measurement, Stopped

if TYPE_CHECKING:
    from autocompress.evaluate import Workshop
    from autocompress.study import Study

LATENCY_SLOT = "latency_slot"
"""Custom resource, one per node that may be timed: a trial that is timed by wall clock takes it whole."""
_AHEAD = 1
"""Jobs that wait at the desk beyond those that are worked on."""
_PATIENCE_S = 5.0
"""Time that an interrupted search waits for its study to be let alone."""
_DIED = "the worker died or ended without a result in every attempt"


class _Clerk(threading.Thread):
    """Keeps the study while workers work: lays its plans on the desk and tells it what comes back.

    It has a thread of its own, so that a worker whose result has come is sent on at once: its next job lies ready, and
    proposing the one after takes longer than fetching it.
    """

    def __init__(
        self,
        study: Study,
        local: LocalRay,
        prepare: Callable[[CompressionPlan], None],
        told: Callable[[Candidate], None],
    ) -> None:
        super().__init__(name="study", daemon=True)
        self._study = study
        self._local = local
        self._prepare = prepare
        self._told = told
        self._running: dict[int, CompressionPlan] = {}
        self._ended = False
        self._left = threading.Event()
        self._failure: Exception | None = None

    def run(self) -> None:
        """Work until `finish` or `leave` is called."""
        try:
            for _ in range(self._local.workers + _AHEAD):
                self._hand_out()
            while not self._left.is_set() and (result := self._local.next_result()) is not None:
                self._receive(*result)
                self._hand_out()
            for number in [] if self._left.is_set() else list(self._running):
                self._tell(number, _DIED)  # no worker is left to do it
        except Exception as error:  # raised by `finish`, once the workers are at home
            self._failure = error
            self._send_home()

    def finish(self) -> None:
        """Return when all that was taken is told; jobs that nobody did have failed then.

        Raises:
            Exception: whatever ended its work before.
        """
        self._local.end_results()
        self.join()
        if self._failure is not None:
            raise self._failure

    def leave(self) -> None:
        """Let the study alone from now on; what runs is found as interrupted by the next search."""
        self._left.set()
        self._local.end_results()
        self.join(_PATIENCE_S)  # or longer, for a student that is being trained: nothing is written of it

    def _hand_out(self) -> None:
        if self._left.is_set() or self._ended:
            return
        asked = self._study.ask()
        if asked is None:
            self._send_home()
            return
        number, plan = asked
        self._running[number] = plan
        self._prepare(plan)
        if self._left.is_set():  # while a student was trained
            return
        front = self._study.rivals() if self._study.run.search.stop_early else []
        self._local.put(Job(number, plan.to_json(), front))

    def _send_home(self) -> None:
        self._ended = True
        self._local.close()

    def _receive(self, number: int, outcome: dict[str, Any]) -> None:
        kinds = {"measurement": Measurement, "stopped": Stopped}
        [(kind, value)] = outcome.items()
        self._tell(number, value if kind == "failure" else kinds[kind](**value))

    def _tell(self, number: int, outcome: Measurement | Stopped | str) -> None:
        self._told(self._study.tell(number, self._running.pop(number), outcome))


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
        self._run, self._artefacts = RunConfig.from_mapping(json.loads(config["run"])), Path(config["artefacts"])
        self._desk = config["desk"]
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
            result = job.number, {"failure": _DIED} if died else self.outcome(job)
        return {"done": True}

    def outcome(self, job: Job) -> dict[str, Any]:
        """Evaluate a job's plan; returns its measurement, or why there is none, by kind."""
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
            # A defect in one candidate's path must not end the search; the class name tells it from a refusal.
            text = str(error).strip().splitlines()
            return {"failure": f"{type(error).__name__}: {text[0][:200] if text else 'no message'}"}

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


class LocalRay:
    """A Ray instance of one search on this machine, whose workers start while the driver does other things.

    Args:
        run: the resolved run file, as workers shall read it.
        artefacts: folder for built candidates.
    """

    def __init__(self, run: RunConfig, artefacts: Path) -> None:
        # Tune runs its workers in folders of their own.
        self.run, self.artefacts = run, artefacts.absolute()
        threads, cores = run.target.threads, machine.cores()
        # Wall-clock timing needs the node to itself; CPU time at one thread does not.
        exclusive = threads > 1
        wanted = 1 if exclusive else run.search.workers or max(1, cores // threads)
        self.workers = max(1, min(wanted, run.search.trials))
        self._resources: dict[str, float] = {"cpu": min(threads, cores), **({LATENCY_SLOT: 1} if exclusive else {})}
        # More workers than cores were asked for by name: Ray is told so, or it would wait for cores that do not exist.
        self._logical = max(cores, math.ceil(self.workers * self._resources["cpu"]))
        self._desk: Any = None
        self._failure: Exception | None = None
        self._started, self._open = threading.Event(), threading.Event()
        self._ended, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="ray", daemon=True)

    def __enter__(self) -> LocalRay:
        warnings.filterwarnings("ignore", module="ray.*")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def put(self, job: Job) -> None:
        """Lay a job on the desk."""
        self._desk.put.remote(job)

    def next_result(self) -> Result | None:
        """Wait for a worker's result; None after `end_results`."""
        found: Result | None = ray.get(self._desk.result.remote())
        return found

    def close(self) -> None:
        """Send the workers home once no job is left."""
        self._desk.close.remote()

    def end_results(self) -> None:
        """Let nobody wait for further results."""
        self._desk.end.remote()

    def open(self) -> None:
        """Let workers load the model, which is there by now; Ray need not have started yet."""
        self._open.set()
        if self._started.is_set():
            self._open_desk()

    def _open_desk(self) -> None:
        if self._desk is not None and self._open.is_set():
            self._desk.open.remote()

    def wait_for_start(self) -> None:
        """Return when there is a desk.

        Raises:
            StudyError: if Ray cannot be started.
        """
        self._started.wait()
        self._raise_failure()

    def wait_for_workers(self) -> None:
        """Return when all workers have gone home.

        Raises:
            StudyError: if Ray ended before.
        """
        self._ended.wait()
        self._raise_failure()

    def dismiss(self) -> None:
        """Let it end."""
        self._stopping.set()

    def stop(self) -> None:
        """End it, if it is not ended yet; returns when nothing of it runs any more."""
        self.dismiss()
        self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            line = (str(self._failure).strip() or type(self._failure).__name__).splitlines()[0]
            raise StudyError(f"search: Ray cannot be started or ended early ({line})") from self._failure

    def _live(self) -> None:
        # All in one thread: Ray's processes die with the one that started them.
        try:
            self._start()
            self._started.set()
            self._open_desk()  # here or in `open`, whichever comes last
            self._work()
        except Exception as error:  # told to whoever waits
            self._failure = error
        self._started.set()
        self._ended.set()
        self._stopping.wait()
        ray.shutdown()

    def _start(self) -> None:
        ray.init(
            num_cpus=self._logical,
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

    def _work(self) -> None:
        """Run workers until all are sent home."""
        search = self.run.search
        config = {"run": json.dumps(self.run.model_dump(mode="json", by_alias=True)), "artefacts": str(self.artefacts)}
        with tempfile.TemporaryDirectory(prefix="autocompress-tune-") as scratch:
            tune.Tuner(
                tune.with_resources(_Worker, self._resources),
                param_space={**config, "desk": self._desk},
                tune_config=tune.TuneConfig(num_samples=self.workers, max_concurrent_trials=self.workers),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[_Leave(self._stopping)],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                    # Attempts are counted by candidate; this bounds a machine on which no worker can live.
                    failure_config=tune.FailureConfig(max_failures=(1 + search.max_retries) * search.trials),
                ),
            ).fit()


def execute(
    study: Study,
    *,
    local: LocalRay,
    prepare: Callable[[CompressionPlan], None],
    told: Callable[[Candidate], None],
) -> None:
    """Evaluate the study's remaining candidates.

    Args:
        study: open for writing.
        local: entered; it need not have started yet.
        prepare: called before a plan is handed out; makes what workers then find in the bank.
        told: called after each candidate was recorded.

    Raises:
        StudyError: if Ray cannot be started.
    """
    local.open()
    local.wait_for_start()
    clerk = _Clerk(study, local, prepare, told)
    clerk.start()
    try:
        local.wait_for_workers()
    except BaseException:
        clerk.leave()
        raise
    clerk.finish()
