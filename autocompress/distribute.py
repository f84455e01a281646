"""Ray executes: a Tune searcher over the study in the driver, a reused actor per worker. Nothing else imports ray.

Ray's own Optuna searcher is not used: it loses trials on NaN objectives and after crashes. Here the driver alone
writes the study; a worker receives a plan and returns a measurement or a reason, and may be killed at any moment.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Tune would take Ctrl-C for the end of the search; the driver has to hear of it.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import tune
from ray.tune.search import Searcher

from autocompress import machine
from autocompress.config import RunConfig
from autocompress.errors import AutocompressError, StudyError
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate, Measurement, Stopped
from autocompress.study import Study

if TYPE_CHECKING:
    from autocompress.evaluate import Workshop

LATENCY_SLOT = "latency_slot"
"""Custom resource, one per node that may be timed: a trial that is timed by wall clock takes it whole."""


class _StudySearcher(Searcher):
    """Hands the study's plans to Tune and Tune's results to the study."""

    def __init__(
        self, study: Study, prepare: Callable[[CompressionPlan], None], told: Callable[[Candidate], None]
    ) -> None:
        super().__init__(metric=None, mode=None)
        self._study = study
        self._prepare = prepare
        self._told = told
        self._running: dict[str, tuple[int, CompressionPlan]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        asked = self._study.ask()
        if asked is None:
            return str(Searcher.FINISHED)
        self._running[trial_id] = asked
        self._prepare(asked[1])
        front = self._study.rivals() if self._study.run.search.stop_early else []
        return {"number": asked[0], "plan": asked[1].to_json(), "front": front}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self._running:
            return
        number, plan = self._running.pop(trial_id)
        outcome: Measurement | Stopped | str
        if error or not result or "outcome" not in result:
            outcome = "the worker died or ended without a result in every attempt"
        else:
            found = json.loads(result["outcome"])
            kinds = {"measurement": Measurement, "stopped": Stopped}
            [(kind, value)] = found.items()
            outcome = value if kind == "failure" else kinds[kind](**value)
        self._told(self._study.tell(number, plan, outcome))

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its settings for a restore that is never made; the study's lock and sessions stay here.
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: a search is continued from the study."""


class _Worker(tune.Trainable):
    """Evaluates one plan per trial; the teacher, the rows and the reference stay loaded between trials."""

    def setup(self, config: dict[str, Any]) -> None:
        self._run, self._artefacts = RunConfig.from_mapping(json.loads(config["run"])), Path(config["artefacts"])
        self._workshop: Workshop | None = None
        self._plan, self._front = config["plan"], config["front"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._plan, self._front = new_config["plan"], new_config["front"]
        return True

    def step(self) -> dict[str, Any]:
        try:
            # Not in setup: what fails there reaches the driver without its reason.
            self._workshop = self._workshop or self._opened()
            found = self._workshop.attempt(CompressionPlan.from_json(self._plan), self._front)
            kind = "measurement" if isinstance(found, Measurement) else "stopped"
            outcome: dict[str, Any] = {kind: dataclasses.asdict(found)}
        except AutocompressError as error:
            outcome = {"failure": str(error)}
        except Exception as error:
            # A defect in one candidate's path must not end the search; the class name tells it from a refusal.
            text = str(error).strip().splitlines()
            outcome = {"failure": f"{type(error).__name__}: {text[0][:200] if text else 'no message'}"}
        return {"done": True, "outcome": json.dumps(outcome)}

    def _opened(self) -> Workshop:
        from autocompress.evaluate import Workshop

        workshop = Workshop(self._run, self._artefacts)
        workshop.ready()
        return workshop

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: a trial is one step, and a killed one starts again."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Load nothing."""


def execute(
    study: Study,
    run: RunConfig,
    artefacts: Path,
    *,
    prepare: Callable[[CompressionPlan], None],
    told: Callable[[Candidate], None],
) -> None:
    """Evaluate the study's remaining candidates on a local Ray instance.

    Args:
        study: open for writing.
        run: the resolved run file, as workers shall read it.
        artefacts: folder for built candidates.
        prepare: called before a plan is handed out; makes what workers then find in the bank.
        told: called after each candidate was recorded.

    Raises:
        StudyError: if Ray cannot be started.
    """
    threads, cores = run.target.threads, machine.cores()
    # Wall-clock timing needs the node to itself; CPU time at one thread does not.
    exclusive = threads > 1
    wanted = 1 if exclusive else run.search.workers or max(1, cores // threads)
    workers = max(1, min(wanted, study.remaining))
    resources: dict[str, float] = {"cpu": min(threads, cores), **({LATENCY_SLOT: 1} if exclusive else {})}
    # More workers than cores were asked for by name: Ray is told so, or it would wait for cores that do not exist.
    logical = max(cores, math.ceil(workers * resources["cpu"]))
    warnings.filterwarnings("ignore", module="ray.*")
    try:
        ray.init(
            num_cpus=logical,
            resources={LATENCY_SLOT: 1},
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100 * 2**20,
        )
    except (RuntimeError, ConnectionError, OSError, ValueError) as error:
        raise StudyError(f"search: Ray cannot be started ({str(error).strip().splitlines()[0]})") from None
    # A worker's death is retried and then told as the candidate's failure; Tune's own traceback of it is noise.
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Tune runs its workers in folders of their own.
    config = {"run": json.dumps(run.model_dump(mode="json", by_alias=True)), "artefacts": str(artefacts.absolute())}
    try:
        with tempfile.TemporaryDirectory(prefix="autocompress-tune-") as scratch:
            tune.Tuner(
                tune.with_resources(_Worker, resources),
                param_space=config,
                tune_config=tune.TuneConfig(
                    search_alg=_StudySearcher(study, prepare, told),
                    num_samples=study.remaining,
                    max_concurrent_trials=workers,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=scratch,
                    verbose=0,
                    checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=run.search.max_retries),
                ),
            ).fit()
    finally:
        ray.shutdown()
