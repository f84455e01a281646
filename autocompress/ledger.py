"""The ledger: how candidates stand in the trials of an Optuna study, what is written of each and what is read back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from autocompress.calm import Calm, calm_of
from autocompress.config import ConstraintsConfig, RunConfig
from autocompress.plan import CompressionPlan
from autocompress.records import OBJECTIVES, Candidate, Measurement, Stopped, drift_of

_CALM = "calm"
"""Study attribute that holds what is known of the machine's slow times."""
_CONFIRMED = "confirmed:"
"""Start of the study attributes that hold measurements with a latency taken anew, by trial number."""
_TELL_DRIFT = 5
"""Latencies that, taken twice, tell how far they drift."""


class Ledger:
    """What a study's trials say of its candidates.

    Args:
        study: whose trials they are.
        run: the resolved run file.
        folder: the results folder.
        reference: gives the score of the uncompressed model, which constraints may be relative to.
    """

    def __init__(self, study: optuna.Study, run: RunConfig, folder: Path, reference: Callable[[], Measurement]) -> None:
        self._study, self._run, self._folder, self._reference = study, run, folder, reference
        calm = study.user_attrs.get(_CALM)
        self.calm = None if calm is None else Calm(**calm)
        """What is known of the machine's slow times; None before anything is."""

    def candidates(self) -> dict[int, Candidate]:
        """Return all evaluated candidates by number; interrupted and repeated trials are none."""
        attributes = self._study.user_attrs
        confirmed = {number: attributes[f"{_CONFIRMED}{number}"] for number in confirmed_in(attributes)}
        found = (self._read(trial, confirmed) for trial in self._study.get_trials(deepcopy=False))
        return {candidate.number: candidate for candidate in found if candidate is not None}

    def record(self, trial: optuna.Trial, plan: CompressionPlan, result: Measurement | Stopped | str) -> Candidate:
        """Write the end of a trial: a measurement, or the reason why there is none."""
        state, measured, failure = TrialState.FAIL, None, None
        if isinstance(result, Measurement):
            state, measured = TrialState.COMPLETE, result
            trial.set_user_attr("measurement", json.loads(result.to_json()))
            for name, excess in self._excesses(result).items():
                trial.set_constraint(name, excess)
        elif isinstance(result, Stopped):
            state, failure = TrialState.PRUNED, result.reason
            trial.set_user_attr("stopped", dataclasses.asdict(result))
        else:
            failure = result
            trial.set_user_attr("failure", result)
        self._study.tell(trial, None if measured is None else self._values(measured), state=state)
        return Candidate(
            number=trial.number,
            state=state.name,
            plan=plan,
            params=dict(trial.params),
            measurement=measured,
            failure=failure,
            feasible=measured is None or self._feasible(measured),
            origin=trial.user_attrs.get("origin", "sampler"),
            folder=self._folder,
            span=_span(trial.datetime_start, datetime.now()),
        )

    def add(
        self,
        plan: CompressionPlan,
        measured: Measurement,
        origin: str,
        params: Mapping[str, tuple[Any, Sequence[Any]]],
    ) -> Candidate:
        """Write a trial for a candidate that was not asked for.

        Args:
            plan: of the candidate.
            measured: its score.
            origin: where it comes from.
            params: what its plan is in the search space, each with its choices; none where that does not have it.
        """
        trial = optuna.trial.create_trial(
            values=self._values(measured.check()),
            params={name: value for name, (value, _) in params.items()},
            distributions={name: CategoricalDistribution(choices) for name, (_, choices) in params.items()},
            user_attrs={
                "plan": json.loads(plan.to_json()),
                "measurement": json.loads(measured.to_json()),
                "origin": origin,
            },
        )
        self._study.add_trial(trial)
        return Candidate(
            number=len(self._study.get_trials(deepcopy=False)) - 1,
            state="COMPLETE",
            plan=plan,
            params={name: value for name, (value, _) in params.items()},
            measurement=measured,
            feasible=self._feasible(measured),
            origin=origin,
            folder=self._folder,
        )

    def confirm(self, candidates: Mapping[int, Candidate], latest: Mapping[int, Measurement]) -> dict[int, Candidate]:
        """Write latencies that were taken anew; what the sampler was told stays as it is.

        Args:
            candidates: of the study, by number.
            latest: measurements of some of them, by number, as they were taken.

        Returns:
            Those that changed by that: these, and where the machine's slow times came to be known by them all that had
            been confirmed before.

        Raises:
            MeasurementError: if a number cannot stand.
        """
        first = {number: candidates[number] for number in latest if not candidates[number].score.confirmed}
        for measured in latest.values():
            measured.check()
        found: dict[int, Candidate] = {}
        tells = len(first) >= _TELL_DRIFT
        if tells and self.calm is None:
            self._keep_calm(calm_of([c.score for c in first.values()], [latest[n] for n in first]))
            for number, candidate in candidates.items():
                if candidate.measurement is not None and candidate.score.confirmed and number not in latest:
                    found[number] = self._confirm(candidate, self.calmed(candidate.score))
        calmed = {number: self.calmed(measured) for number, measured in latest.items()}
        if tells:
            drift = drift_of([self.calmed(c.score) for c in first.values()], [calmed[n] for n in first])
        else:
            drift = max((c.score.latency_drift for c in candidates.values() if c.measurement is not None), default=0.0)
        for number, measured in calmed.items():
            found[number] = self._confirm(candidates[number], measured.drifting(drift))
        return found

    def _confirm(self, candidate: Candidate, measured: Measurement) -> Candidate:
        # Beside the trials: Optuna lets nobody change one that has finished.
        self._study.set_user_attr(f"{_CONFIRMED}{candidate.number}", dataclasses.asdict(measured))
        return dataclasses.replace(candidate, measurement=measured, feasible=self._feasible(measured))

    def calmed(self, measured: Measurement) -> Measurement:
        """Return a measurement, as it was taken on this study's machine, adjusted as those of the front are."""
        return measured if self.calm is None else self.calm.adjust(measured)

    def _keep_calm(self, calm: Calm) -> None:
        """Write what is known of the machine's slow times; it stays, so that all points are adjusted alike."""
        self._study.set_user_attr(_CALM, dataclasses.asdict(calm))
        self.calm = calm

    def _values(self, measured: Measurement) -> list[float]:
        return [float(getattr(measured, OBJECTIVES[name][0])) for name in self._run.told]

    def excesses_of(self, trial: optuna.trial.FrozenTrial) -> dict[str, float]:
        """Return by how much a complete trial exceeds each constraint of the run file as that is now."""
        return self._excesses(Measurement.from_plain(trial.user_attrs["measurement"]))

    def _feasible(self, measured: Measurement) -> bool:
        return all(excess <= 0 for excess in self._excesses(measured).values())

    def _excesses(self, measured: Measurement) -> dict[str, float]:
        return excesses(measured, self._run.constraints, self._reference())

    def _read(self, trial: optuna.trial.FrozenTrial, confirmed: Mapping[int, dict[str, Any]]) -> Candidate | None:
        attrs = trial.user_attrs
        if not trial.state.is_finished() or "plan" not in attrs or "interrupted" in attrs:
            return None
        measured = None
        if trial.state == TrialState.COMPLETE:
            measured = Measurement.from_plain(attrs["measurement"])
            latest = confirmed.get(trial.number, {})
            # Of a damaged journal, trials may have come to other numbers.
            own = (latest.get("predictions"), latest.get("size_bytes")) == (measured.predictions, measured.size_bytes)
            # What it was adjusted for may be lost there, too; then it is timed anew.
            if own and (self.calm is not None or latest.get("latency_adjusted", 1.0) == 1.0):
                measured = Measurement.from_plain(latest)
        failure = attrs["stopped"]["reason"] if "stopped" in attrs else attrs.get("failure")
        origin = attrs.get("origin", "sampler")
        return Candidate(
            number=trial.number,
            state=trial.state.name,
            plan=CompressionPlan.from_dict(attrs["plan"]),
            params=dict(trial.params),
            measurement=measured,
            failure=failure if measured is None else None,
            feasible=measured is None or self._feasible(measured),
            # Version 0.1 knew one kind of seeds.
            origin="uniform" if origin == "seed" else origin,
            folder=self._folder,
            span=_span(trial.datetime_start, trial.datetime_complete),
        )


def confirmed_in(attributes: Iterable[str]) -> list[int]:
    """Return the numbers of the trials whose latencies, taken anew, are among a study's attributes of these names."""
    return [int(key.removeprefix(_CONFIRMED)) for key in attributes if key.startswith(_CONFIRMED)]


def _span(began: datetime | None, ended: datetime | None) -> tuple[float, float] | None:
    """Return when a trial began and ended; None for one that was added whole, or salvaged without its times."""
    if began is None or ended is None or ended <= began:
        return None
    return began.timestamp(), ended.timestamp()


def excesses(measured: Measurement, constraints: ConstraintsConfig, reference: Measurement) -> dict[str, float]:
    """Return by how much each constraint of the run file is exceeded; not above 0 is feasible."""
    limits = {
        "accuracy_drop": (constraints.max_accuracy_drop, reference.accuracy - measured.accuracy),
        "size_mb": (constraints.max_size_mb, measured.size_bytes / 1e6),
        "latency_ms": (constraints.max_latency_ms, measured.latency_ms),
        "latency_ratio": (constraints.max_latency_ratio, measured.latency_ratio),
        "memory_mb": (constraints.max_memory_mb, (measured.peak_memory_bytes or math.inf) / 1e6),
    }
    # Rounded so that a drop of exactly the limit is not refused for its last binary digit.
    return {name: round(value - limit, 12) for name, (limit, value) in limits.items() if limit is not None}
