"""The study: one Optuna study, written by one driver, from which everything can be continued.

Ask, tell and reconcile live here; what executes in between (`execute.py`) can be killed at any moment. A plan is
evaluated once per study, whatever the sampler proposes.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState

from autocompress.binding import BoundSpace
from autocompress.calm import Calm
from autocompress.config import RunConfig
from autocompress.errors import ConfigError, MeasurementError, PlanError, StudyError
from autocompress.front import Front
from autocompress.garbage import without_collection
from autocompress.identity import STUDY_SCHEMA, Identity
from autocompress.journal import held
from autocompress.ledger import Ledger
from autocompress.pareto import Unbeaten, contenders, costs
from autocompress.plan import CompressionPlan
from autocompress.predict import Predictor
from autocompress.proposals import Proposals
from autocompress.records import OBJECTIVES, QUALITIES, Candidate, Measurement, Stopped
from autocompress.samplers import make_sampler
from autocompress.space import Value
from autocompress.storage import open_records

_ASKS = 8
"""Proposals of the sampler that may repeat a known plan before a random new one is taken."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """The candidates of one run.

    Args:
        folder: the results folder; holds ``study.journal``, or names the database.
        run: the resolved run file.
        identity: what must be the same to continue: fingerprints of model, data, space and target.
        space: the bound search space, needed to ask; reading works without.
        writable: take the driver's lock, repair and reconcile.
        is_held: whether the driver holds its lock already.
        predictor: makes seeds from sensitivities and passes over plans that are predicted far behind; without one
            neither is done.

    Raises:
        StudyError: if another driver holds the study, its records cannot be read, or the identity differs.
    """

    def __init__(
        self,
        folder: Path,
        run: RunConfig,
        *,
        identity: Mapping[str, Any] | None = None,
        space: BoundSpace | None = None,
        writable: bool = False,
        is_held: bool = False,
        predictor: Predictor | None = None,
    ) -> None:
        self.folder = folder
        self.predictor = predictor
        self.ask_seconds: list[float] = []
        self._reference: Measurement | None = None
        self.run = run
        self.space = space
        self.repaired: Path | None = None
        self._held = ExitStack()
        if writable:
            self._held.enter_context(nullcontext() if is_held else held(folder, needed=run.storage.study is None))
        try:
            with without_collection():
                self._load(identity, writable)
                if self._proposals is not None and self.predictor is not None and self.remaining:
                    self.learn()  # from all at once, for which the first proposal would have to wait
        except BaseException:
            self.close()
            raise

    def _load(self, identity: Mapping[str, Any] | None, writable: bool) -> None:
        url = self.run.storage.study
        self._records = open_records(self.folder, url, name=self.run.name, writable=writable)
        self._held.callback(self._records.close)
        self.repaired = self._records.repaired
        self._study = self._open(identity, writable)
        self._asked: dict[int, optuna.Trial] = {}
        with self._records.batch():
            self.interrupted = self._reconcile() if writable else 0
        self._ledger = Ledger(self._study, self.run, self.folder, lambda: self.reference)
        self._candidates = self._ledger.candidates()
        self._recovered = sum(c.origin == "recover" for c in self._candidates.values())
        self._of_plan: dict[str, int] = {}
        for candidate in self._candidates.values():
            self._note(candidate)
        self.known = set(self._of_plan)
        """Ids of all plans that are or were evaluated."""
        self._learned = -1
        self._forget_fronts()
        self._proposals = None if self.space is None else Proposals(self, self._study, self.space)

    def _forget_fronts(self) -> None:
        self._unbeaten = Unbeaten(self.run.objectives)
        self._unbeaten_told = Unbeaten(self.told, without="recover")
        by_divergence = ["divergence" if name in QUALITIES else name for name in self.run.objectives]
        self._least_divergent = Unbeaten(by_divergence)
        self._rivals: tuple[list[Candidate], list[list[float]]] = ([], [])

    def _note(self, candidate: Candidate) -> None:
        """Remember which candidate a plan is; the one that measured it, if there are several."""
        if candidate.measurement is not None or candidate.plan.plan_id not in self._of_plan:
            self._of_plan[candidate.plan.plan_id] = candidate.number

    def _open(self, identity: Mapping[str, Any] | None, writable: bool) -> optuna.Study:
        storage, name, where = self._records.storage, self._records.name, self._records.where
        directions = [StudyDirection[OBJECTIVES[name][1].upper()] for name in self.told]
        if name not in self._records.names():
            if not writable:
                raise StudyError(f"{where}: holds no study yet")
            study = optuna.create_study(storage=storage, study_name=name, directions=directions)
            study.set_user_attr("identity", {"schema": STUDY_SCHEMA, **(identity or {})})
            with warnings.catch_warnings():  # not settled in Optuna yet; dashboards show them
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(self.told))
        study = optuna.load_study(storage=storage, study_name=name)
        stored = study.user_attrs.get("identity")
        self.identity = Identity(stored, self.run, self.folder)
        self.identity.require_known(where)
        if writable and stored is None:
            study.set_user_attr("identity", {"schema": STUDY_SCHEMA, **(identity or {})})
        elif writable:
            self.identity.require_current(where)
        if identity is not None:
            self.identity.require_same(where, identity)
        if writable:
            # A continued study must not draw the same numbers again.
            seed = (self.seed + len(study.get_trials(deepcopy=False))) % 2**32
            study.sampler = make_sampler(
                self.run.search.sampler, seed=seed, excesses=lambda trial: self._ledger.excesses_of(trial)
            )
        return study

    def _reconcile(self) -> int:
        """Fail the trials that a killed driver left running and enqueue their parameters again."""
        running = [t for t in self._study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]
        for trial in running:
            origin = trial.user_attrs.get("origin", "sampler")
            # First, so that a driver killed in between leaves it enqueued twice, which does no harm, and not never.
            if "plan" in trial.user_attrs:
                self._study.enqueue_trial(trial.params, user_attrs={"origin": origin})
            self._study._storage.set_trial_user_attr(trial._trial_id, "interrupted", True)
            self._study.tell(trial.number, state=TrialState.FAIL)
        return len(running)

    def learn(self) -> bool:
        """Let the predictor know what was measured since it was last told; False while that is too little.

        In a large study, once there is a hundredth more: to fit it to all of them after each would take longer than
        anything else that the driver does.
        """
        assert self.predictor is not None
        if len(self._candidates) - self._learned >= max(1, self._learned // 100):
            self.predictor.learn(list(self._candidates.values()))
            self._learned = len(self._candidates)
        return self.predictor.ready

    @property
    def finished(self) -> int:
        """Number of evaluated candidates, complete or failed; recovered points come on top of ``search.trials``."""
        return len(self._candidates) - self._recovered

    @property
    def in_flight(self) -> int:
        """Number of candidates that were asked for and not told yet."""
        return len(self._asked)

    @property
    def remaining(self) -> int:
        """Number of candidates still to ask for."""
        return max(0, self.run.search.trials - self.finished - self.in_flight)

    def ask(self) -> tuple[int, CompressionPlan] | None:
        """Return the next trial's number and plan, or None if the budget or the space is spent."""
        started = time.perf_counter()
        with self._records.batch():
            asked = self._ask()
        self.ask_seconds.append(time.perf_counter() - started)
        return asked

    def _ask(self) -> tuple[int, CompressionPlan] | None:
        assert self.space is not None and self._proposals is not None, "asking needs a space"
        if self.remaining == 0:
            return None
        for attempt in range(_ASKS + 1):
            again = attempt >= _ASKS // 2
            if attempt < _ASKS:
                self._proposals.enqueue_next(again=again)
            elif not self._proposals.enqueue_unknown():
                return None
            trial = self._study.ask()
            try:
                plan = self.space.decode(trial.suggest_categorical)  # type: ignore[arg-type]
            except (ConfigError, ValueError) as error:
                trial.set_user_attr("failure", str(error))
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            if plan.plan_id in self.known:
                trial.set_user_attr("duplicate", plan.plan_id)
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            reason = None if again else self._proposals.passed_over(plan, trial)
            if reason is not None:
                trial.set_user_attr("passed_over", reason)
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            trial.set_user_attr("plan", json.loads(plan.to_json()))
            self.known.add(plan.plan_id)
            self._asked[trial.number] = trial
            return trial.number, plan
        return None

    @property
    def told(self) -> list[str]:
        """The objectives as the sampler is told them: with the guide in place of accuracy."""
        return self.run.told

    @property
    def seed(self) -> int:
        """Seed of the proposals."""
        return self.run.seed if self.run.search.seed is None else self.run.search.seed

    @property
    def inherits(self) -> bool:
        """Whether it begins with what another search found, so that its own finds cannot be told from those."""
        return any(c.origin == "retarget" for c in self.candidates())

    def told_front(self) -> list[Candidate]:
        """Return the candidates that none beats in all that the sampler is told.

        Recovered ones are left out: what is new stands beside others that were not trained or fitted yet, either.
        """
        return self._unbeaten_told.among(self._candidates)

    def rivals(self) -> list[list[float]]:
        """Return the costs of the points that a new candidate must not be dominated by, as the sampler is told them."""
        front = self.told_front()
        if self._rivals[0] is not front:
            self._rivals = front, costs(front, self.told).tolist()
        return self._rivals[1]

    def tell(self, number: int, plan: CompressionPlan, result: Measurement | Stopped | str) -> Candidate:
        """Record a measurement, or the reason why there is none; a number that cannot stand is a failure."""
        trial = self._asked.pop(number)
        if self.predictor is not None:
            self.learn()
        if isinstance(result, Measurement):
            try:
                result.check()
            except MeasurementError as error:
                result = str(error)
        with self._records.batch():
            candidate = self._ledger.record(trial, plan, result)
        if self.predictor is not None:
            self.predictor.note(candidate)
        self._candidates[number] = candidate
        self._note(candidate)
        return candidate

    def confirm(self, latest: Mapping[int, Measurement]) -> list[Candidate]:
        """Put latencies that were taken anew, by trial, in place of those that the search saw.

        Where there are enough of both they tell how the machine's slow times move ratios, which is taken out of the new
        ones from then on (see `calm.py`), and how far these drift from one time to another nevertheless: no interval
        is narrower. The values that the sampler was told stay as they are: the study is a record of what happened.
        """
        with self._records.batch():  # what is known of the machine, and all that is adjusted for it
            self._candidates.update(self._ledger.confirm(self._candidates, latest))
        self._forget_fronts()
        return [self._candidates[number] for number in latest]

    @property
    def calm(self) -> Calm | None:
        """What is known of the machine's slow times; None before latencies were taken twice."""
        return self._ledger.calm

    def calmed(self, measured: Measurement) -> Measurement:
        """Return a measurement, as it was taken on this study's machine, adjusted as those of the front are."""
        return self._ledger.calmed(measured)

    def add(self, plan: CompressionPlan, measured: Measurement, *, origin: str) -> Candidate:
        """Record a candidate that was not asked for, such as a recovered point."""
        if (known := self.measured(plan)) is not None:
            return known
        with self._records.batch():
            candidate = self._ledger.add(plan, measured, origin, self._parameters_of(plan))
        self._candidates[candidate.number] = candidate
        self._recovered += origin == "recover"
        self._note(candidate)
        self.known.add(plan.plan_id)
        return candidate

    def _parameters_of(self, plan: CompressionPlan) -> dict[str, tuple[Value, Sequence[Value]]]:
        """Return what samplers and mutations can learn from: parameters with their choices, if the space has them."""
        found: dict[str, tuple[Value, Sequence[Value]]] = {}
        if self.space is None:
            return found
        try:
            params = self.space.parameters(plan)
        except PlanError:
            return found

        def choose(name: str, choices: Sequence[Value]) -> Value:
            found[name] = params[name], choices
            return params[name]

        self.space.decode(choose)
        return found

    def measured(self, plan: CompressionPlan) -> Candidate | None:
        """Return the candidate that measured ``plan``, or None."""
        found = self.of_plan(plan.plan_id)
        return found if found is not None and found.measurement is not None else None

    def of_plan(self, plan_id: str) -> Candidate | None:
        """Return the candidate that is a plan, or None where it was not evaluated."""
        number = self._of_plan.get(plan_id)
        return None if number is None else self._candidates[number]

    def candidates(self) -> list[Candidate]:
        """Return all evaluated candidates by number; interrupted and repeated trials are none."""
        return [self._candidates[number] for number in sorted(self._candidates)]

    def candidate(self, number: int) -> Candidate:
        """Return one candidate.

        Raises:
            StudyError: if there is none of that number; names the nearest.
        """
        if number not in self._candidates:
            near = min(self._candidates, key=lambda n: abs(n - number), default=None)
            hint = "the study has none yet" if near is None else f"the nearest is trial {near}"
            raise StudyError(f"trial {number}: no such candidate; {hint}")
        return self._candidates[number]

    @property
    def reference(self) -> Measurement:
        """The score of the uncompressed model, from ``environment.json``."""
        if self._reference is None:
            try:
                self._reference = Measurement.from_plain(self.environment["reference"])
            except (KeyError, TypeError) as error:
                raise StudyError(f"{self.folder / 'environment.json'}: cannot be read ({error})") from None
        return self._reference

    @property
    def majority(self) -> float | None:
        """Accuracy of always guessing the most frequent class; None in a study of version 0.1."""
        found: float | None = self.environment.get("majority")
        return found

    @property
    def environment(self) -> dict[str, Any]:
        """What ``environment.json`` holds: the reference, and how and where it was measured.

        Raises:
            StudyError: if it cannot be read.
        """
        file = self.folder / "environment.json"
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StudyError(f"{file}: cannot be read ({error})") from None
        return found

    def front(self) -> Front:
        """Return the Pareto front of the candidates so far."""
        points, nearby = self._unbeaten.among(self._candidates), self._least_divergent.among(self._candidates)
        return Front.of(points, self.reference, self.run.objectives, nearby=nearby)

    def contenders(self, among: Iterable[Candidate]) -> list[Candidate]:
        """Return those that may belong on the front once they are timed anew; see `pareto.contenders`."""
        return contenders(self.front().points, among, self.run.objectives)

    def close(self) -> None:
        """Let another driver have the study."""
        self._held.close()
