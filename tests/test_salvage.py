"""Damaged journals: whatever line is lost, what can be read goes on, and the damaged file stays as it is."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest
from helpers_records import make_candidate
from test_study import SMALL, evaluate, results_in, run_of, states

from autocompress.errors import StudyError
from autocompress.identity import identity_of
from autocompress.plan import CompressionPlan
from autocompress.salvage import Salvaged, salvage
from autocompress.study import Study

TRIALS = 6
LINE = b'{"op_code": 4, "wor\n'


def opened(folder: Path) -> Study:
    run = run_of()
    return Study(folder, run, identity=identity_of(run, model="m", data="d", space=SMALL), space=SMALL, writable=True)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Those of a study of six candidates, one that was added whole, and one that a killed driver left running."""
    folder = results_in(tmp_path_factory.mktemp("whole") / "results")
    with closing(opened(folder)) as study:
        evaluate(study, TRIALS - 1)
        study.add(CompressionPlan(), make_candidate(0, accuracy=0.9).score, origin="recover")
        assert study.ask() is not None
    return (folder / "study.journal").read_bytes().splitlines(keepends=True)


def salvaged(folder: Path, lines: list[bytes], *damaged: int) -> Salvaged:
    """Damage some lines, salvage the rest and put it in place."""
    journal = results_in(folder) / "study.journal"
    content = b"".join(LINE if number in damaged else line for number, line in enumerate(lines))
    journal.write_bytes(content)
    found = salvage(journal)
    assert journal.read_bytes() == content, "as it was"
    assert found.damaged == len(damaged)
    shutil.move(found.file, journal)
    return found


def test_no_line_costs_more_than_one_candidate(lines: list[bytes], tmp_path: Path) -> None:
    begins = 1  # without the study's own record there is none
    for number in range(begins, len(lines)):
        folder = tmp_path / str(number)
        found = salvaged(folder, lines, number)
        with closing(opened(folder)) as study:
            known = len(study.candidates())
            assert known >= TRIALS - 1, f"line {number}"
            # One that was torn apart is evaluated again, with the one that was running.
            assert found.again <= 1
            evaluate(study)
            assert study.finished >= TRIALS
        assert not {"RUNNING", "WAITING"} & set(states(folder))


def test_several_trials_that_begin_nowhere_are_replaced(lines: list[bytes], tmp_path: Path) -> None:
    begin = [number for number, line in enumerate(lines) if b'"op_code":4' in line]
    with closing(opened_after(tmp_path / "out", lines, *begin[1:3])) as study:
        assert len(study.candidates()) >= TRIALS - 2


def opened_after(folder: Path, lines: list[bytes], *damaged: int) -> Study:
    salvaged(folder, lines, *damaged)
    return opened(folder)


def test_what_cannot_be_numbered_is_left_out(lines: list[bytes], tmp_path: Path) -> None:
    begin = [number for number, line in enumerate(lines) if b'"op_code":4' in line]
    found = salvaged(tmp_path / "out", lines, begin[2], begin[3] + 1)
    assert found.left_out > 0
    with closing(opened(tmp_path / "out")) as study:
        assert len(study.candidates()) == 2, "those before the first damaged line"


def test_what_cannot_be_salvaged_is_refused(lines: list[bytes], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no such file"):
        salvage(tmp_path / "study.journal")
    journal = tmp_path / "study.journal"
    journal.write_bytes(b"".join(lines))
    with pytest.raises(StudyError, match="no line is damaged"):
        salvage(journal)
    journal.write_bytes(b"".join([LINE, *lines[1:]]))
    with pytest.raises(StudyError, match="nothing can be saved"):
        salvage(journal)
    assert [path.name for path in tmp_path.iterdir()] == ["study.journal"]
