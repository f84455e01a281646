"""The journal file: a torn end is cut off with a backup, and what is sound stays as it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autocompress.journal import Journal, repair_tail, with_whole_trials


def as_optuna_reads(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def trials_of(storage: JournalStorage) -> list[dict[str, Any]]:
    """Return everything that can be told of the trials, so that a difference shows where it is."""
    return [vars(trial) for trial in storage.get_all_trials(0)]


def searched(path: Path) -> optuna.Study:
    """Return a study with trials of every state and every kind of record."""
    storage = Journal(path)
    study = optuna.create_study(storage=storage, study_name="one", directions=["minimize", "maximize"])
    study.set_user_attr("identity", {"schema": 1})
    study.enqueue_trial({"width": 2, "bits": "full"}, user_attrs={"origin": "uniform"})
    for number in range(6):
        with storage.batch():
            trial = study.ask()
            trial.suggest_categorical("width", [1, 2, 4])
            trial.suggest_categorical("bits", [4, 8, "full"])
            trial.set_user_attr("plan", {"number": number})
        if number == 1:
            study.tell(trial, state=TrialState.FAIL)
        elif number == 2:
            storage.set_trial_intermediate_value(trial._trial_id, 3, 0.5)
            study.tell(trial, state=TrialState.PRUNED)
        elif number != 3:  # which goes on
            trial.set_constraint("size", 0.25)
            study.tell(trial, [float(number), 0.5])
    study.enqueue_trial({"width": 4, "bits": 4})
    study.add_trial(optuna.trial.create_trial(values=[1.0, 2.0], user_attrs={"origin": "recover"}))
    return study


def test_what_is_missing_empty_or_whole_is_not_repaired(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    assert repair_tail(journal) is None
    journal.touch()
    assert repair_tail(journal) is None
    journal.write_bytes(b"{}\n{}\n")
    assert repair_tail(journal) is None
    assert journal.read_bytes() == b"{}\n{}\n"
    assert list(tmp_path.iterdir()) == [journal]


def test_a_last_record_that_is_cut_at_any_byte_goes_and_the_others_stay(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    searched(journal)
    whole = journal.read_bytes()
    *others, last = whole.splitlines(keepends=True)
    sound = b"".join(others)
    assert len(last) > 100
    for left in range(1, len(last)):
        torn = sound + last[:left]
        journal.write_bytes(torn)
        backup = repair_tail(journal)
        assert backup is not None, f"{left} bytes are left"
        assert backup.read_bytes() == torn
        assert journal.read_bytes() == sound
        backup.unlink()
    for content in (sound, whole):
        journal.write_bytes(content)
        assert repair_tail(journal) is None
        assert journal.read_bytes() == content


def test_repairs_do_not_overwrite_each_others_backups(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    found = []
    for stump in (b'{"a"', b'{"bb"', b'{"ccc"'):
        journal.write_bytes(b"{}\n" + stump)
        found.append((repair_tail(journal), stump))
        assert journal.read_bytes() == b"{}\n"
    for backup, stump in found:
        assert backup is not None
        assert backup.read_bytes() == b"{}\n" + stump


def test_what_is_written_is_whole_lines_and_is_read_again(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    written = Journal(journal).create_new_study([], "one")
    for line in journal.read_text(encoding="utf-8").splitlines():
        json.loads(line)
    assert Journal(journal).get_study_id_from_name("one") == written


def test_a_journal_reads_as_optuna_reads_it(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    study = searched(journal)
    expected = trials_of(as_optuna_reads(journal))
    assert [t["_values"] for t in expected][4:6] == [[4.0, 0.5], [5.0, 0.5]]
    assert trials_of(Journal(journal)) == expected
    assert trials_of(study._storage) == expected  # type: ignore[arg-type]


def test_a_journal_reads_as_optuna_reads_it_wherever_it_ends(tmp_path: Path) -> None:
    journal, part = tmp_path / "study.journal", tmp_path / "part.journal"
    searched(journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    for count in range(1, len(lines)):
        part.write_bytes(b"".join(lines[:count]) + lines[count][:-1])
        assert trials_of(Journal(part)) == trials_of(as_optuna_reads(part)), f"{count} records"


def test_trials_after_a_read_are_numbered_on(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    before = len(searched(journal).trials)
    study = optuna.load_study(storage=Journal(journal), study_name="one")
    asked = [study.ask() for _ in range(2)]  # the first of them was waiting
    assert [trial.number for trial in asked] == [before - 2, before]
    assert trials_of(as_optuna_reads(journal)) == trials_of(study._storage)  # type: ignore[arg-type]


def test_deleted_studies_leave_records_as_they_are(tmp_path: Path) -> None:
    storage = Journal(tmp_path / "study.journal")
    first = storage.create_new_study([StudyDirection.MINIMIZE], "gone")
    storage.create_new_trial(first, FrozenTrial(0, TrialState.COMPLETE, 1.0, None, None, {}, {}, {}, {}, {}, 0))
    storage.delete_study(first)
    records = [json.loads(line) for line in (tmp_path / "study.journal").read_bytes().splitlines()]
    assert with_whole_trials(records) is records


def test_reading_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    searched(journal)
    os.utime(journal, (1e9, 1e9))
    Journal(journal).get_all_studies()
    assert journal.stat().st_mtime == 1e9


def test_a_batch_is_written_whole_and_can_be_read_within(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    storage = Journal(journal)
    study = storage.create_new_study([StudyDirection.MINIMIZE], "one")
    before = journal.read_bytes()
    with storage.batch():
        trial = storage.create_new_trial(study)
        storage.set_trial_user_attr(trial, "plan", 1)
        assert journal.read_bytes() == before
        assert storage.get_trial(trial).user_attrs == {"plan": 1}
    assert trials_of(as_optuna_reads(journal)) == trials_of(storage)

    def fail() -> None:
        storage.set_trial_user_attr(trial, "more", 2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), storage.batch():
        fail()
    assert as_optuna_reads(journal).get_trial(trial).user_attrs == {"plan": 1, "more": 2}


def test_equal_parts_of_finished_trials_are_kept_once(tmp_path: Path) -> None:
    storage = Journal(tmp_path / "study.journal")
    study = optuna.create_study(storage=storage)
    kept = {"site": "block.0.ffn", "keep": 1}
    plans = [{"decisions": [kept, {"site": "head", "whole": whole}], "share": 0.5} for whole in (1, True, 1)]
    for plan in plans:
        with storage.batch():
            trial = study.ask()
            trial.suggest_categorical("width", [1, 2, 4])
            trial.set_user_attr("plan", plan)
            study.tell(trial, 1.0)
    study.ask()  # looks for what waits
    first, second, third = study.get_trials(deepcopy=False)[:3]
    assert [trial.user_attrs["plan"] for trial in (first, second, third)] == plans
    assert first.distributions["width"] is second.distributions["width"]
    decisions = [trial.user_attrs["plan"]["decisions"] for trial in (first, second, third)]
    assert decisions[0][0] is decisions[1][0]
    assert decisions[0][1] is decisions[2][1]
    assert decisions[1][1]["whole"] is True, "equal to 1, and something else"


def test_what_another_program_writes_in_between_is_read(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    storage = Journal(journal)
    study = storage.create_new_study([StudyDirection.MINIMIZE], "one")
    other = as_optuna_reads(journal)
    with storage.batch():
        trial = storage.create_new_trial(study)
        other.set_study_user_attr(study, "note", "from a dashboard")
    storage.set_trial_user_attr(trial, "plan", 1)
    assert storage.get_study_user_attrs(study) == {"note": "from a dashboard"}
    assert storage.get_trial(trial).user_attrs == {"plan": 1}
    assert trials_of(as_optuna_reads(journal)) == trials_of(storage)
