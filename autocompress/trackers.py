"""Tell what a search finds to TensorBoard and MLflow, too, by one key of the run file.

They are beside the study and never in its place: what they do not take is said and left, the search goes on, and the
same command later brings them up to date.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autocompress.config import RunConfig
from autocompress.errors import ConfigError, first_line
from autocompress.records import Candidate
from autocompress.trained import Progress

METRICS = (
    *("accuracy", "accuracy_low", "accuracy_high", "accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"),
    *("loss", "divergence", "size_bytes", "peak_memory_bytes"),
    *("latency_ms", "latency_p90_ms", "latency_ratio", "latency_ratio_low", "latency_ratio_high"),
)
"""What is logged of a measurement, where it is known."""

_UNFINISHED = ".part"
"""Ends the name of an events file that is being written."""


class Tracker(ABC):
    """Logs candidates: each when it is scored, when its latency was confirmed, and when that was adjusted."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}
        """By trial number, how often it was logged."""

    def tell(self, candidate: Candidate) -> None:
        """Log a candidate unless what is known of it was logged before."""
        if candidate.measurement is None:
            return
        # Confirmed is also what is known to be adjusted only later, by candidates that come after it.
        confirmed = candidate.score.confirmed
        step = confirmed + (confirmed and candidate.score.latency_adjusted != 1)
        if self.known.get(candidate.number, 0) > step:
            return
        score = dataclasses.asdict(candidate.score)
        metrics = {name: float(score[name]) for name in METRICS if score[name] is not None}
        about = {**candidate.params, "origin": candidate.origin, "plan": candidate.plan.words()}
        self.log(candidate.number, about, metrics, step)
        self.known[candidate.number] = step + 1

    @abstractmethod
    def log(self, number: int, about: dict[str, Any], metrics: dict[str, float], step: int) -> None:
        """Log parameters and metrics of a trial; ``step`` is 1 for what was measured anew, 2 for what was adjusted."""


class TensorBoard(Tracker):
    """One run a candidate in ``tensorboard/`` of the results folder, for the HParams page."""

    def __init__(self, run: RunConfig, folder: Path) -> None:
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        self._place, self._writer = folder / "tensorboard", SummaryWriter
        for there in self._place.glob("trial-*"):
            # The suffix of an events file is the step that it was written for.
            steps = [int(file.suffix[1:]) for file in there.iterdir() if file.suffix[1:].isdigit()]
            self.known[int(there.name.removeprefix("trial-"))] = 1 + max(steps, default=-1)

    def log(self, number: int, about: dict[str, Any], metrics: dict[str, float], step: int) -> None:
        from torch.utils.tensorboard.summary import hparams

        place = self._place / f"trial-{number}"
        # A file that was not written to its end does not count, and goes when its trial is logged anew.
        for left in place.glob(f"*{_UNFINISHED}"):
            left.unlink()
        with self._writer(str(place), filename_suffix=f".{step}{_UNFINISHED}") as writer:
            for summary in hparams(about, metrics):  # type: ignore[no-untyped-call]
                writer._get_file_writer().add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
        for made in place.glob(f"*{_UNFINISHED}"):
            made.rename(made.with_suffix(""))


class MLflow(Tracker):
    """One run a candidate in an experiment of the search's name.

    It goes where ``MLFLOW_TRACKING_URI`` says, by default to ``mlflow.db`` of the results folder.
    """

    def __init__(self, run: RunConfig, folder: Path) -> None:
        super().__init__()
        # It would report to its makers that it is used; who wants that can set it otherwise.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise _missing("mlflow") from None
        here = folder.absolute()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{here / 'mlflow.db'}")
        # Tells searches of one name apart, without telling a server where on this machine they are.
        self._study = hashlib.sha256(str(here).encode()).hexdigest()[:16]
        found = self._client.get_experiment_by_name(run.name)
        self._experiment = found.experiment_id if found else self._client.create_experiment(run.name)
        self._runs: dict[int, str] = {}
        token = None
        while token != "":
            page = self._client.search_runs(
                [self._experiment], f"tags.study = '{self._study}'", max_results=1000, page_token=token
            )
            for each in page:
                number = int(each.data.tags["trial"])
                self._runs[number] = each.info.run_id
                metrics = each.data.metrics  # only those of an earlier version have no step
                self.known[number] = int(metrics.get("step", metrics.get("confirmed", -1))) + 1
            token = page.token or ""

    def log(self, number: int, about: dict[str, Any], metrics: dict[str, float], step: int) -> None:
        if number not in self._runs:
            tags = {"study": self._study, "trial": str(number)}
            made = self._client.create_run(self._experiment, tags=tags, run_name=f"trial-{number}")
            self._runs[number] = made.info.run_id
        if not self.known.get(number):  # also where the server went away before it had all of them
            for name, value in about.items():
                # Of the names that a space gives, MLflow takes letters, digits and a few signs.
                self._client.log_param(self._runs[number], re.sub(r"[^\w. /-]", "_", name), str(value)[:6000])
        for name, value in {**metrics, "confirmed": float(step > 0), "step": float(step)}.items():
            self._client.log_metric(self._runs[number], name, value, step=step)
        self._client.set_terminated(self._runs[number])


KINDS: dict[str, type[TensorBoard] | type[MLflow]] = {"tensorboard": TensorBoard, "mlflow": MLflow}


class Trackers:
    """All that a run file names; one that fails is left out from then on.

    Args:
        run: whose ``trackers`` are asked for.
        folder: results folder.
        progress: told if one fails.

    Raises:
        ConfigError: if the package of one is not there.
    """

    def __init__(self, run: RunConfig, folder: Path, progress: Progress) -> None:
        self._progress = progress
        self._open: dict[str, Tracker] = {}
        for name in run.trackers:
            try:
                self._open[name] = KINDS[name](run, folder)
            except ConfigError:
                raise
            # A server that does not answer, a full disk, an older format: whatever it is, the search is worth more.
            except Exception as error:
                self._fails(name, error)

    def tell(self, candidates: Iterable[Candidate]) -> None:
        """Log what they do not know yet."""
        every = list(candidates)
        for name, tracker in list(self._open.items()):
            try:
                for candidate in every:
                    tracker.tell(candidate)
            except Exception as error:
                self._fails(name, error)

    def _fails(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        said = first_line(error)
        self._progress(f"{name}: takes nothing ({said}); the search goes on without it")


def _missing(name: str) -> ConfigError:
    return ConfigError(f'trackers: {name} is not installed; run: pip install "autocompress[{name}]"')
