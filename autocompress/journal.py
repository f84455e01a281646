"""The study's journal file: read at once, written in batches, and repaired where its last record is torn.

The file is Optuna's, record for record, and any program that reads Optuna's journals reads it. Only the way in and out
is another: a trial has dozens of records, and Optuna waits for the disk after each and replays them one by one.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, json_to_distribution
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.storages.journal._storage import JournalOperation, JournalStorageReplayResult
from optuna.trial import FrozenTrial, TrialState

from autocompress.errors import StudyError

LOCK = "study.lock"
"""File of a results folder that its driver holds; it stays."""
_Record = dict[str, Any]
_SHARED_AT_ONCE = 200
"""Finished trials whose parts are looked up in others' at a question for trials."""
_OF_PARAMS = ("params", "distributions")
_OF_A_TRIAL = (*_OF_PARAMS, "user_attrs", "system_attrs", "intermediate_values")
_OF_A_STATE = ("state", "values", "datetime_start", "datetime_complete")


class Journal(JournalStorage):
    """Optuna's storage on a journal file.

    Args:
        path: of the file; made if it is not there.

    Raises:
        ValueError, TypeError, LookupError, OSError: if a record in it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._records = _Records(path)
        self._ended: dict[int, int] = {}
        """How many trials from the first on are all finished, by study."""
        self._shared: dict[int, int] = {}
        """How many of these share their parts, by study."""
        self._parts = _Parts()
        super().__init__(self._records)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return what Optuna's own does; what nobody finished is not looked for among the first that are finished.

        A driver asks for it at every proposal, and trials end nearly in the order in which they began.
        """
        if states is None or deepcopy or any(state in states for state in TrialState if state.is_finished()):
            return super().get_all_trials(study_id, deepcopy, states)
        with self._thread_lock:
            self._sync_with_backend()
            found = self._replay_result
            numbers, trials = found._study_id_to_trial_ids[study_id], found._trials
            first = self._ended.get(study_id, 0)
            while first < len(numbers) and trials[numbers[first]].state.is_finished():
                first += 1
            self._ended[study_id] = first
            begin = self._shared.get(study_id, 0)
            # A few at a time: a driver that goes on with a large study would wait for all of them before its first one.
            self._shared[study_id] = end = min(first, begin + _SHARED_AT_ONCE)
            for number in numbers[begin:end]:
                self._parts.share(trials[number])
            return [trials[number] for number in numbers[first:] if trials[number].state in states]

    def _sync_with_backend(self) -> None:
        if not isinstance(self._replay_result, _Replay):  # nothing is applied yet
            self._replay_result = _Replay(self._worker_id_prefix)
        super()._sync_with_backend()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Write what is recorded within in one go: a reader, or a kill, finds all of it or nothing of it.

        An error within does not undo what was recorded before it.
        """
        with self._thread_lock:
            self._sync_with_backend()
        with self._records.batch():
            yield


class _Replay(JournalStorageReplayResult):
    """What a journal's records come to.

    A large study has a few dozen distributions and hundreds of thousands of parameters; Optuna reads the distribution
    of each anew, which takes longer than all else that it does with a trial that is added whole.
    """

    def __init__(self, worker_id_prefix: str) -> None:
        super().__init__(worker_id_prefix)
        self._distributions: dict[str, BaseDistribution] = {}

    def _apply_create_trial(self, log: _Record) -> None:
        before = len(self._trials)
        super()._apply_create_trial({name: value for name, value in log.items() if name not in _OF_PARAMS})
        if len(self._trials) == before:
            return  # of a study that is not there
        trial = self._trials[before]
        trial.distributions = {name: self._distribution(text) for name, text in log.get("distributions", {}).items()}
        trial.params = {
            name: trial.distributions[name].to_external_repr(value) for name, value in log.get("params", {}).items()
        }

    def _distribution(self, text: str) -> BaseDistribution:
        known = self._distributions.get(text)
        if known is None:
            known = self._distributions[text] = json_to_distribution(text)
        return known


_NOT_SHARED = {float, list, dict}


class _Parts:
    """Parts that trials have in common, each of them once in memory: without, a trial takes twice the room."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def share(self, trial: FrozenTrial) -> None:
        """Let a finished trial, which nobody changes any more, hold what others hold where it is equal."""
        trial.params = {sys.intern(name): value for name, value in trial.params.items()}
        trial.distributions = {
            sys.intern(name): self._known.setdefault((d.choices, *map(type, d.choices)), d)
            if isinstance(d, CategoricalDistribution)
            else d
            for name, d in trial.distributions.items()
        }
        trial.user_attrs = {name: self._shared(value) for name, value in trial.user_attrs.items()}

    def _shared(self, value: Any) -> Any:
        if isinstance(value, str):
            return sys.intern(value)
        if isinstance(value, list):
            return [self._shared(part) for part in value]
        if not isinstance(value, dict):
            return value
        kinds = set(map(type, value.values()))
        # What has fractions is a result, which no other trial has; what has parts is as large without its frame.
        if not kinds.isdisjoint(_NOT_SHARED):
            return {sys.intern(name): self._shared(part) for name, part in value.items()}
        # A number and a truth value can be equal.
        key = (*value.items(), *map(type, value.values()))
        return self._known.setdefault(key, value)


class _Records(BaseJournalBackend):
    """The records of a journal file, for one storage.

    Records have the numbers that this storage counts, not those of their lines: trials that are finished when the file
    is read first are one record each.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.exists():
            path.touch()
        self._ready: list[_Record] = []
        """What the storage may not have applied yet, from number `_first` on."""
        self._first = 0
        self._read_to = 0
        """Where in the file the next read begins."""
        self._own: list[tuple[int, int]] = []
        """Where beyond it batches stand that the storage has had from memory."""
        self._held: list[str] | None = None
        """Lines of the batch in the making."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._path,)  # whoever opens a copy reads the file from the beginning

    def read_logs(self, log_number_from: int) -> Sequence[_Record]:
        self._ready = self._ready[log_number_from - self._first :]
        self._first = log_number_from
        if self._held is None:
            new = self._new_in_file()
            self._ready += with_whole_trials(new) if log_number_from == 0 else new
        return list(self._ready)

    def append_logs(self, logs: list[_Record]) -> None:
        lines = [json.dumps(record, separators=(",", ":")) + "\n" for record in logs]
        if self._held is None:
            self._write(lines)
        else:
            self._held += lines
            self._ready += map(json.loads, lines)

    @contextmanager
    def batch(self) -> Iterator[None]:
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            if held:
                self._own.append(self._write(held))

    def _write(self, lines: Sequence[str]) -> tuple[int, int]:
        """Append ``lines``; returns where they begin and end in the file."""
        content = "".join(lines).encode()
        # Not Optuna's name: its programs take a file of that name for a lock, and wait half a minute until it is stale.
        with _locked(self._path.with_name(f"{self._path.name}.flock")), self._path.open("ab") as opened:
            begin = opened.tell()
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        return begin, begin + len(content)

    def _new_in_file(self) -> list[_Record]:
        with self._path.open("rb") as opened:
            opened.seek(self._read_to)
            content = opened.read()
        lines, position = [], self._read_to
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # another program is writing it, or was killed while it did
            if not any(begin <= position < end for begin, end in self._own):
                lines.append(line)
            position += len(line)
        # As one list: a call for each line takes longer.
        found: list[_Record] = json.loads(b"[" + b",".join(lines) + b"]")
        self._read_to = position
        self._own = [(begin, end) for begin, end in self._own if end > position]
        return found


def with_whole_trials(records: list[_Record]) -> list[_Record]:
    """Return a journal's records with those of each finished trial as one: that of a trial which is added whole.

    Args:
        records: from the beginning of a journal on.
    """
    if any(record["op_code"] == JournalOperation.DELETE_STUDY for record in records):
        return records  # Optuna then numbers trials otherwise
    trials: list[_Record] = []
    finished: set[int] = set()
    for record in records:
        if record["op_code"] == JournalOperation.CREATE_TRIAL:
            trials.append({**record, **{name: dict(record.get(name, {})) for name in _OF_A_TRIAL}})
            state = record.get("state", TrialState.RUNNING)
        elif "trial_id" not in record or record["trial_id"] in finished:
            continue
        else:
            state = _add(trials[record["trial_id"]], record)
        if TrialState(state).is_finished():
            finished.add(record.get("trial_id", len(trials) - 1))
    found, created = [], 0
    for record in records:
        if record["op_code"] == JournalOperation.CREATE_TRIAL:
            found.append(trials[created] if created in finished else record)
            created += 1
        elif record.get("trial_id") not in finished:
            found.append(record)
    return found


def _add(trial: _Record, record: _Record) -> int:
    """Put what ``record`` says into the record of a trial as a whole; returns the trial's state then."""
    match record["op_code"]:
        case JournalOperation.SET_TRIAL_PARAM:
            trial["params"][record["param_name"]] = record["param_value_internal"]
            trial["distributions"][record["param_name"]] = record["distribution"]
        case JournalOperation.SET_TRIAL_USER_ATTR:
            trial["user_attrs"].update(record["user_attr"])
        case JournalOperation.SET_TRIAL_SYSTEM_ATTR:
            trial["system_attrs"].update(record["system_attr"])
        case JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE:
            trial["intermediate_values"][record["step"]] = record["intermediate_value"]
        case JournalOperation.SET_TRIAL_STATE_VALUES:
            trial.update({name: record[name] for name in record if name in _OF_A_STATE}, value=None)
    return int(trial.get("state", TrialState.RUNNING))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock of the kernel's, which dies with its process."""
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def held(folder: Path, *, needed: bool = True) -> Iterator[None]:
    """Hold the lock of the one driver that a results folder, which is made, and its study have.

    Args:
        folder: of the results.
        needed: whether a file system without locks is refused; a database has locks of its own.

    Raises:
        StudyError: if another driver holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"{folder}: another search drives this study; wait for it or use another --out") from None
        except OSError as error:
            if needed:
                raise StudyError(
                    f"{folder}: has no locks ({error.strerror}), which keep a second search off; use an --out that "
                    "has, or keep the study in a database (storage.study)"
                ) from None
        yield
    finally:
        os.close(handle)


def beside(journal: Path, what: str) -> Path:
    """Return the path of a new file beside a journal, named by the time."""
    stamp = f"{journal.name}.{what}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stamp if number == 1 else f"{stamp}-{number}" for number in itertools.count(1))
    return next(path for path in map(journal.with_name, names) if not path.exists())


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
    backup = beside(journal, "torn")
    shutil.copyfile(journal, backup)
    with journal.open("r+b") as opened:
        opened.truncate(end)
    return backup
