"""Damaged journals: whatever line is lost, what can be read goes on, and the damaged file stays as it is."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from helpers_records import make_candidate
from test_study import SMALL, evaluate, results_in, run_of, states

from autocompress.decisions import PruneNeurons
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


@pytest.mark.parametrize("numbered", [True, False])
def test_what_was_timed_anew_stays_with_its_plan(tmp_path: Path, numbered: bool) -> None:
    """Points that were added whole are named by nothing else; where the last is not, the others get other numbers."""
    folder = results_in(tmp_path / "results")
    expected = {}
    with closing(opened(folder)) as study:
        evaluate(study, TRIALS)
        for number in range(3):
            plan = CompressionPlan((("block.0.ffn", PruneNeurons(keep=10 + number)),))
            score = make_candidate(0, size_bytes=10**6 + number, ratio=0.5).score
            added = study.add(plan, score, origin="recover")
            latest = dataclasses.replace(score, latency_ratio=0.4, latency_ratio_low=0.39, latency_ratio_high=0.41)
            study.confirm({added.number: dataclasses.replace(latest, confirmed=True)})
            expected[plan] = 10**6 + number
    lines = (folder / "study.journal").read_bytes().splitlines(keepends=True)
    added = [number for number, line in enumerate(lines) if b'"origin":"recover"' in line]
    last = [number for number, line in enumerate(lines) if b"confirmed:" in line][-1]
    with closing(opened_after(tmp_path / "out", lines, added[0], *([] if numbered else [last]))) as study:
        found = {c.plan: c.score for c in study.candidates() if c.origin == "recover"}
    assert len(found) == 2
    assert {plan: score.size_bytes for plan, score in found.items()}.items() <= expected.items()
    assert [score.confirmed for score in found.values()].count(True) == (2 if numbered else 0)


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
