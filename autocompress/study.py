"""The study: one Optuna study in a journal file, written by one driver, from which everything can be continued.

Ask, tell and reconcile live here; what executes in between (`distribute.py`) can be killed at any moment. A plan is
evaluated once per study, whatever the sampler proposes.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from autocompress.binding import BoundSpace
from autocompress.config import ConstraintsConfig, RunConfig
from autocompress.errors import ConfigError, MeasurementError, StudyError
from autocompress.pareto import Front
from autocompress.plan import CompressionPlan
from autocompress.records import OBJECTIVES, Candidate, Measurement

STUDY_SCHEMA = 1
_NAME = "autocompress"
_ASKS = 8
"""Proposals of the sampler that may repeat a known plan before a random new one is taken."""
_RANDOM_DRAWS = 500

optuna.logging.set_verbosity(optuna.logging.WARNING)


class _JournalLock:
    """Optuna's journal lock as an advisory lock of the kernel's, which dies with its process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def acquire(self) -> bool:
        self._handle = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def repair_tail(journal: Path) -> Path | None:
    """Cut a torn last record, which a killed driver leaves, off the journal.

    Optuna would glue its next record to the stump and fail on every later load.

    Returns:
        The backup of the file as it was, or None if there was nothing to repair.
    """
    if not journal.exists() or journal.stat().st_size == 0:
        return None
    content = journal.read_bytes()
    end = content.rfind(b"\n") + 1
    if end == len(content):
        last = content[content.rfind(b"\n", 0, end - 1) + 1 :]
        try:
            json.loads(last)
            return None
        except ValueError:
            end -= len(last)
    stamp = f"{journal.name}.torn-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stamp if number == 1 else f"{stamp}-{number}" for number in itertools.count(1))
    backup = next(path for path in map(journal.with_name, names) if not path.exists())
    shutil.copyfile(journal, backup)
    with journal.open("r+b") as opened:
        opened.truncate(end)
    return backup


class Study:
    """The candidates of one run.

    Args:
        folder: the results folder; holds ``study.journal``.
        run: the resolved run file.
        identity: what must be the same to continue: fingerprints of model, data, space and target.
        space: the bound search space, needed to ask; reading works without.
        writable: take the driver's lock, repair and reconcile.

    Raises:
        StudyError: if another driver holds the study, the journal cannot be read, or the identity differs.
    """

    def __init__(
        self,
        folder: Path,
        run: RunConfig,
        *,
        identity: Mapping[str, Any] | None = None,
        space: BoundSpace | None = None,
        writable: bool = False,
    ) -> None:
        self.folder = folder
        self.run = run
        self.space = space
        self.repaired: Path | None = None
        self._lock: int | None = _drive(folder) if writable else None
        try:
            self._load(folder / "study.journal", identity, writable)
        except BaseException:
            self.close()
            raise

    def _load(self, journal: Path, identity: Mapping[str, Any] | None, writable: bool) -> None:
        if writable:
            self.repaired = repair_tail(journal)
        elif not journal.exists():
            raise StudyError(f"{self.folder}: holds no study.journal; run: autocompress search RUN --out {self.folder}")
        self._study = self._open(journal, identity, writable)
        self._asked: dict[int, optuna.Trial] = {}
        self.interrupted = self._reconcile() if writable else 0
        self._candidates = {
            trial.number: candidate
            for trial in self._study.get_trials(deepcopy=False)
            if (candidate := self._read(trial)) is not None
        }
        self._known = {c.plan.plan_id for c in self._candidates.values()}
        self._seeds = self.space.ladder() if writable and self.space is not None and self.run.search.seeds else []
        self._rng = random.Random(f"{self.run.seed}:{len(self._study.get_trials(deepcopy=False))}")  # noqa: S311

    def _open(self, journal: Path, identity: Mapping[str, Any] | None, writable: bool) -> optuna.Study:
        try:
            storage = JournalStorage(
                JournalFileBackend(str(journal), lock_obj=_JournalLock(journal.with_name("study.journal.lock")))  # type: ignore[arg-type]
            )
            names = [s.study_name for s in optuna.get_all_study_summaries(storage)]
        except (ValueError, KeyError, OSError) as error:
            raise StudyError(f"{journal}: cannot be read ({str(error).splitlines()[0]})") from None
        directions = [StudyDirection[OBJECTIVES[name][1].upper()] for name in self.run.objectives]
        if _NAME not in names:
            if not writable:
                raise StudyError(f"{journal}: holds no study yet")
            study = optuna.create_study(storage=storage, study_name=_NAME, directions=directions)
            study.set_user_attr("identity", {"schema": STUDY_SCHEMA, **(identity or {})})
        study = optuna.load_study(storage=storage, study_name=_NAME)
        stored = study.user_attrs.get("identity")
        if writable and stored is None:
            study.set_user_attr("identity", {"schema": STUDY_SCHEMA, **(identity or {})})
        elif stored is not None and stored.get("schema") != STUDY_SCHEMA:
            raise StudyError(f"{journal}: schema must be {STUDY_SCHEMA}, got {stored.get('schema')!r}")
        elif identity is not None and stored is not None:
            differing = [k for k in sorted({*stored, *identity} - {"schema"}) if stored.get(k) != identity.get(k)]
            if differing:
                changes = "; ".join(f"{k}: {_brief(stored.get(k))} became {_brief(identity.get(k))}" for k in differing)
                raise StudyError(f"{journal}: this study was made with other settings ({changes}); use another --out")
        if writable:
            study.sampler = _sampler(self.run, len(study.get_trials(deepcopy=False)))
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

    @property
    def finished(self) -> int:
        """Number of evaluated candidates, complete or failed; recovered points come on top of ``search.trials``."""
        return sum(c.origin != "recover" for c in self._candidates.values())

    @property
    def remaining(self) -> int:
        """Number of candidates still to ask for."""
        return max(0, self.run.search.trials - self.finished - len(self._asked))

    def ask(self) -> tuple[int, CompressionPlan] | None:
        """Return the next trial's number and plan, or None if the budget or the space is spent."""
        assert self.space is not None, "asking needs a space"
        if self.remaining == 0:
            return None
        for attempt in range(_ASKS + 1):
            self._enqueue_seed()
            if attempt == _ASKS and not self._enqueue_unknown():
                return None
            trial = self._study.ask()
            try:
                plan = self.space.decode(trial.suggest_categorical)  # type: ignore[arg-type]
            except (ConfigError, ValueError) as error:
                trial.set_user_attr("failure", str(error))
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            if plan.plan_id in self._known:
                trial.set_user_attr("duplicate", plan.plan_id)
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            trial.set_user_attr("plan", json.loads(plan.to_json()))
            self._known.add(plan.plan_id)
            self._asked[trial.number] = trial
            return trial.number, plan
        return None

    def _enqueue_seed(self) -> None:
        """Enqueue the next seed of an unknown plan, unless trials wait, which a killed driver had begun."""
        assert self.space is not None
        while self._seeds and not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            params = self._seeds.pop(0)
            if self.space.plan(params).plan_id not in self._known:
                self._study.enqueue_trial(params, user_attrs={"origin": "uniform"})

    def _enqueue_unknown(self) -> bool:
        """Enqueue random parameters of a plan that is not known yet; False if none was found."""
        assert self.space is not None
        for _ in range(_RANDOM_DRAWS):
            params: dict[str, Any] = {}

            def choose(name: str, choices: Sequence[Any], into: dict[str, Any] = params) -> Any:
                into[name] = self._rng.choice(choices)
                return into[name]

            if self.space.decode(choose).plan_id not in self._known:
                self._study.enqueue_trial(params)
                return True
        return False

    def tell(self, number: int, plan: CompressionPlan, result: Measurement | str) -> Candidate:
        """Record a measurement, or the reason why there is none; a number that cannot stand is a failure."""
        trial = self._asked.pop(number)
        if isinstance(result, Measurement):
            try:
                result.check()
            except MeasurementError as error:
                result = str(error)
        if isinstance(result, str):
            trial.set_user_attr("failure", result)
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("measurement", json.loads(result.to_json()))
            for name, excess in self._excesses(result).items():
                trial.set_constraint(name, excess)
            self._study.tell(trial, [float(getattr(result, OBJECTIVES[n][0])) for n in self.run.objectives])
        candidate = Candidate(
            number=number,
            state="FAIL" if isinstance(result, str) else "COMPLETE",
            plan=plan,
            params=dict(trial.params),
            measurement=None if isinstance(result, str) else result,
            failure=result if isinstance(result, str) else None,
            feasible=isinstance(result, str) or self._feasible(result),
            origin=trial.user_attrs.get("origin", "sampler"),
            folder=self.folder,
        )
        self._candidates[number] = candidate
        return candidate

    def add(self, plan: CompressionPlan, measured: Measurement, *, origin: str) -> Candidate:
        """Record a candidate that was not asked for, such as a recovered point."""
        known = next((c for c in self._candidates.values() if c.plan == plan and c.measurement is not None), None)
        if known is not None:
            return known
        trial = optuna.trial.create_trial(
            values=[float(getattr(measured.check(), OBJECTIVES[n][0])) for n in self.run.objectives],
            user_attrs={
                "plan": json.loads(plan.to_json()),
                "measurement": json.loads(measured.to_json()),
                "origin": origin,
            },
        )
        self._study.add_trial(trial)
        number = len(self._study.get_trials(deepcopy=False)) - 1
        candidate = Candidate(
            number=number,
            state="COMPLETE",
            plan=plan,
            measurement=measured,
            feasible=self._feasible(measured),
            origin=origin,
            folder=self.folder,
        )
        self._candidates[number] = candidate
        self._known.add(plan.plan_id)
        return candidate

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
        try:
            environment = json.loads((self.folder / "environment.json").read_text(encoding="utf-8"))
            return Measurement.from_json(json.dumps(environment["reference"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudyError(f"{self.folder / 'environment.json'}: cannot be read ({error})") from None

    def front(self) -> Front:
        """Return the Pareto front of the candidates so far."""
        return Front.of(self.candidates(), self.reference, self.run.objectives)

    def close(self) -> None:
        """Let another driver have the study."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _feasible(self, measured: Measurement) -> bool:
        return all(excess <= 0 for excess in self._excesses(measured).values())

    def _excesses(self, measured: Measurement) -> dict[str, float]:
        return excesses(measured, self.run.constraints, self.reference)

    def _read(self, trial: optuna.trial.FrozenTrial) -> Candidate | None:
        attrs = trial.user_attrs
        if not trial.state.is_finished() or "plan" not in attrs or "interrupted" in attrs:
            return None
        measured = None
        if trial.state == TrialState.COMPLETE:
            measured = Measurement.from_json(json.dumps(attrs["measurement"]))
        return Candidate(
            number=trial.number,
            state=trial.state.name,
            plan=CompressionPlan.from_json(json.dumps(attrs["plan"])),
            params=dict(trial.params),
            measurement=measured,
            failure=attrs.get("failure") if measured is None else None,
            feasible=measured is None or self._feasible(measured),
            origin=attrs.get("origin", "sampler"),
            folder=self.folder,
        )


def excesses(measured: Measurement, constraints: ConstraintsConfig, reference: Measurement) -> dict[str, float]:
    """Return by how much each constraint of the run file is exceeded; not above 0 is feasible."""
    limits = {
        "accuracy_drop": (constraints.max_accuracy_drop, reference.accuracy - measured.accuracy),
        "size_mb": (constraints.max_size_mb, measured.size_bytes / 1e6),
        "latency_ms": (constraints.max_latency_ms, measured.latency_ms),
        "latency_ratio": (constraints.max_latency_ratio, measured.latency_ratio),
    }
    # Rounded so that a drop of exactly the limit is not refused for its last binary digit.
    return {name: round(value - limit, 12) for name, (limit, value) in limits.items() if limit is not None}


def identity_of(run: RunConfig, *, model: str, data: str, space: BoundSpace) -> dict[str, Any]:
    """Return what must not change within a study, in words short enough to show the difference."""
    choices = space.space.model_dump_json()
    return {
        "model": model,
        "data": data,
        "space": f"{space.space.name} {hashlib.sha256(choices.encode()).hexdigest()[:12]}",
        "target": run.target.model_dump(),
        "objectives": list(run.objectives),
        "recovery": run.recovery.model_dump(),
    }


def _drive(folder: Path) -> int:
    handle = os.open(folder / "study.lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise StudyError(f"{folder}: another search drives this study; wait for it or use another --out") from None
    return handle


def _sampler(run: RunConfig, trials_before: int) -> optuna.samplers.BaseSampler:
    # A continued study must not draw the same numbers again.
    seed = (run.seed + trials_before) % 2**32
    if run.search.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    if run.search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        # Optuna says on stderr that ``group`` is experimental; its version is pinned.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)


def _brief(value: object) -> str:
    text = json.dumps(value, sort_keys=True) if not isinstance(value, str) else value
    return text if len(text) <= 120 else text[:117] + "..."
