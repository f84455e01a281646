from __future__ import annotations

import csv
import dataclasses
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_records import make_candidate, make_reference
from rich.console import Console

from autocompress.decisions import PruneNeurons
from autocompress.front import Front
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate
from autocompress.report.tables import candidate_line, frame, front_table, write_aside, write_csv

OBJECTIVES = ("accuracy", "size_bytes", "latency")
COLUMNS = [
    "number",
    "state",
    "plan_id",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "accuracy_drop",
    "accuracy_drop_low",
    "accuracy_drop_high",
    "loss",
    "divergence",
    "size_bytes",
    "latency_ms",
    "latency_p90_ms",
    "latency_ratio",
    "latency_ratio_low",
    "latency_ratio_high",
    "latency_waited",
    "latency_drift",
    "latency_adjusted",
    "peak_memory_bytes",
    "seconds",
    "feasible",
    "origin",
    "plan",
    "failure",
]


def front_of(candidates: list[Candidate]) -> Front:
    return Front.of(candidates, make_reference(), OBJECTIVES)


def terminal(front: Front, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(front_table(front))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_an_empty_frame_has_the_fixed_columns() -> None:
    table = frame([])
    assert list(table.columns) == COLUMNS
    assert len(table) == 0


def test_a_frame_has_one_row_a_candidate_and_one_column_a_parameter() -> None:
    candidates = [
        make_candidate(3, accuracy=0.874, size_bytes=17_600_000, ratio=0.4, params={"width": 2, "bits": "w8"}),
        make_candidate(4, state="FAIL", failure="logits: not finite", params={"attention": 0.5}),
    ]
    table = frame(iter(candidates))
    assert list(table.columns) == [*COLUMNS, "param.attention", "param.bits", "param.width"]
    first, second = (row for _, row in table.iterrows())
    assert (first["number"], first["state"], first["accuracy"], first["size_bytes"]) == (
        3,
        "COMPLETE",
        0.874,
        17_600_000,
    )
    assert first["latency_ms"] == pytest.approx(6.4)
    assert first["latency_ratio_low"] < first["latency_ratio"] < first["latency_ratio_high"]
    assert first["plan_id"] == candidates[0].plan.plan_id
    assert first["plan"] == candidates[0].plan.words()
    assert first["failure"] is None
    assert first["param.width"] == 2
    assert second["failure"] == "logits: not finite"
    assert table["accuracy"].isna().tolist() == [False, True]
    assert table["param.attention"].isna().tolist() == [True, False]


def test_csv_keeps_integers_beside_a_failure_and_leaves_what_is_missing_empty(tmp_path: Path) -> None:
    path = tmp_path / "study.csv"
    candidates = [make_candidate(0, params={"keep": 8}), make_candidate(1, state="FAIL", failure="out of memory")]
    write_csv(candidates, path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["size_bytes"] == "20000000"
    assert rows[0]["param.keep"] == "8"
    assert rows[1]["size_bytes"] == rows[1]["accuracy"] == rows[1]["param.keep"] == ""
    assert rows[1]["failure"] == "out of memory"
    assert [row["feasible"] for row in rows] == ["True", ""], "nothing is known of what failed"


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx"])
def test_csv_never_holds_a_formula(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "study.csv"
    plan = CompressionPlan(((cell, PruneNeurons(keep=2)),))
    params: dict[str, Any] = {"name": cell, "shift": -0.5}
    write_csv([make_candidate(0, state="FAIL", failure=cell, plan=plan, params=params, origin=cell)], path)
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    shown = "'" + cell.replace("\r", "\n")
    assert row["failure"] == row["param.name"] == row["origin"] == shown
    assert row["plan"].startswith(shown)
    assert row["param.shift"] == "-0.5"


def test_a_carriage_return_inside_a_cell_starts_no_row(tmp_path: Path) -> None:
    path = tmp_path / "study.csv"
    write_csv([make_candidate(0, state="FAIL", failure="broken\r=1+1\r\n=2+2", params={"a\rb": 1})], path)
    assert b"\r" not in path.read_bytes()
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["failure"] == "broken\n=1+1\n=2+2"
    assert row["param.a\nb"] == "1"


def test_csv_of_nothing_is_a_header(tmp_path: Path) -> None:
    write_csv([], tmp_path / "pareto.csv")
    assert (tmp_path / "pareto.csv").read_text() == ",".join(COLUMNS) + "\n"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.csv"
    write_aside(path, "old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_csv([make_candidate(0)], path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["study.csv"]


def test_a_complete_candidate_on_one_line() -> None:
    candidate = make_candidate(11, accuracy=0.874, size_bytes=17_300_000, ratio=1 / 2.24)
    assert candidate_line(candidate, 12, 40, make_reference()) == (
        "[ 12/40] trial 11  87.4 %  17.3 MB (5.2x smaller)  7.1 ms (2.24x faster)  6.8 s  ffn 0: 75 neurons w8a8"
    )


def test_a_line_says_larger_slower_and_infeasible() -> None:
    line = candidate_line(
        make_candidate(0, size_bytes=180_000_000, ratio=1.25, feasible=False), 1, 1000, make_reference()
    )
    assert line.startswith("[   1/1000] trial 0  ")
    assert "(2.0x larger)" in line
    assert "(0.80x as fast)" in line
    assert line.endswith("(infeasible)")


def test_a_line_says_what_was_timed_on_a_busy_machine() -> None:
    candidate = make_candidate(0)
    busy = dataclasses.replace(candidate, measurement=dataclasses.replace(candidate.score, latency_waited=0.24))
    line = candidate_line(busy, 1, 10, make_reference())
    assert line.endswith("(timed on a busy machine: 24 % of the time without a core)")
    assert "busy" not in candidate_line(candidate, 1, 10, make_reference())


def test_a_failure_on_one_line_cannot_drive_the_terminal() -> None:
    candidate = make_candidate(11, state="FAIL", failure="\x1b[2Jbroken\nin two\r\x07 ")
    assert candidate_line(candidate, 12, 40, make_reference()) == "[ 12/40] trial 11  FAILED: [2Jbroken in two"


def test_what_was_stopped_early_did_not_fail() -> None:
    line = candidate_line(make_candidate(11, state="PRUNED", failure="3 hits in 15 rows"), 12, 40, make_reference())
    assert line == "[ 12/40] trial 11  stopped early: 3 hits in 15 rows"


def test_the_front_table_says_intervals_factors_and_the_plan() -> None:
    text = terminal(front_of([make_candidate(7, accuracy=0.85, size_bytes=18_000_000, ratio=0.5)]))
    assert "85.0 (82.7-87.1)" in text
    assert "18.0" in text and "5.0" in text and "8.0" in text
    assert "2.00 (1.96-2.04)" in text
    assert "ffn 0: 71 neurons w8a8" in text
    assert "reference: 88.0 %, 90.0 MB, 16.0 ms" in text


def test_the_front_table_shows_markup_as_text() -> None:
    plan = CompressionPlan((("[red]x[/red]", PruneNeurons(keep=2)),))
    assert "[red]x[/red]: 2 neurons" in terminal(front_of([make_candidate(0, plan=plan)]))


def test_the_front_table_loses_no_word_in_80_columns() -> None:
    text = terminal(front_of([make_candidate(0)]), width=80)
    header = next(line for line in text.splitlines() if "plan" in line)
    words = [line[header.index("plan") :].strip() for line in text.splitlines() if "reference" not in line]
    assert " ".join(word for word in words if word).endswith("ffn 0: 64 neurons w8a8")
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("candidates", [[], [make_candidate(0, state="FAIL")]])
def test_an_empty_front_says_so(candidates: list[Candidate]) -> None:
    assert "no candidate completed within the constraints" in terminal(front_of(candidates))


def test_importing_the_report_loads_nothing_heavy() -> None:
    code = (
        "import sys, autocompress.report.tables, autocompress.report.page; "
        "print([m for m in ('pandas', 'plotly', 'torch', 'rich') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
