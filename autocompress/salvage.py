"""What can be read of a journal with damaged lines, as a new file beside it.

A trial has the number of its first record among those that begin a trial. Whether damaged lines were such records shows
in the numbers that the others name: they are then replaced by trials that failed, else they are left out. Where it
cannot be told, the new file ends before the first of them. A trial that lost what a finished one needs is unfinished in
the new file, so that the search evaluates it again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from autocompress.errors import StudyError, first_line
from autocompress.journal import Journal, beside
from autocompress.ledger import confirmed_in

_FAILED: dict[str, Any] = {
    "op_code": int(JournalOperation.CREATE_TRIAL),
    "worker_id": "salvage",
    "study_id": 0,
    "state": int(TrialState.FAIL),
    "value": None,
    "datetime_start": "1970-01-01T00:00:00.000000",
    "datetime_complete": "1970-01-01T00:00:00.000000",
    "distributions": {},
    "params": {},
    "user_attrs": {},
    "system_attrs": {},
    "intermediate_values": {},
}
_NEEDED = ("plan", "measurement")
"""What a complete trial is read from."""


@dataclass(frozen=True)
class Salvaged:
    """What became of a damaged journal.

    Args:
        file: the new one.
        damaged: lines that could not be read.
        left_out: lines that could be read, but not be kept.
        again: finished trials that will be evaluated again.
    """

    file: Path
    damaged: int
    left_out: int
    again: int


def salvage(journal: Path) -> Salvaged:
    """Write what can be read of a journal into a new file beside it; the journal stays as it is.

    Raises:
        StudyError: if there is no such file, if no line is damaged, or if nothing can be saved.
    """
    if not journal.exists():
        raise StudyError(f"{journal}: no such file; give the results folder of a search")
    read = [_record(line) for line in journal.read_bytes().splitlines()]
    damaged = sum(record is None for record in read)
    if not damaged:
        raise StudyError(f"{journal}: no line is damaged")
    whole = [record for record in read if record is not None]
    begun = sum(record["op_code"] == JournalOperation.CREATE_TRIAL for record in whole)
    missing = max((number for record in whole for number in _named(record)), default=-1) + 1 - begun
    if missing <= 0:
        kept = whole
    elif missing == damaged:
        kept = [_FAILED if record is None else record for record in read]
    else:
        kept = [record for record in read[: read.index(None)] if record is not None]
    kept, again = _with_finished_trials(kept)
    file = beside(journal, "salvaged")
    lines = (json.dumps(record, separators=(",", ":")) + "\n" for record in kept)
    file.write_text("".join(lines), encoding="utf-8")
    try:
        if not Journal(file).get_all_studies():
            raise ValueError("it does not begin a study")
    except (ValueError, TypeError, LookupError) as error:
        file.unlink()
        raise StudyError(f"{journal}: nothing can be saved ({first_line(error)})") from None
    return Salvaged(file, damaged, len(whole) - sum(record is not _FAILED for record in kept) - again, again)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("op_code"), int) else None


def _named(record: dict[str, Any]) -> list[int]:
    """Return the numbers of the trials that a record is about, and does not begin."""
    return [record["trial_id"]] if "trial_id" in record else confirmed_in(record.get("user_attr", {}))


def _with_finished_trials(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Return the records without the ends of trials that lost something; and how many these were."""
    known: dict[int, set[str]] = {}
    kept, lost = [], 0
    for record in records:
        if record["op_code"] == JournalOperation.CREATE_TRIAL:
            known[len(known)] = set(record.get("user_attrs", {}))
        attributes = known.get(record.get("trial_id", -1), set())
        if record["op_code"] == JournalOperation.SET_TRIAL_USER_ATTR:
            attributes.update(record["user_attr"])
        ends = record["op_code"] == JournalOperation.SET_TRIAL_STATE_VALUES
        if ends and record["state"] == TrialState.COMPLETE and not attributes.issuperset(_NEEDED):
            lost += 1
        else:
            kept.append(record)
    return kept, lost
