"""What commands print: results on stdout, in lines or as JSON, and what happens meanwhile on stderr."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_records import front_of, make_candidate

from autocompress import console
from autocompress.status import SearchStatus

NESTED = {"folder": "out", "score": {"ratio": 0.25, "interval": [0.2, 0.3]}, "left": None}


def test_nested_values_are_a_line_each_with_dotted_names(capsys: pytest.CaptureFixture[str]) -> None:
    console.result(NESTED, as_json=False)
    told = capsys.readouterr()
    assert told.out.splitlines() == ["folder: out", "score.ratio: 0.25", "score.interval: 0.2, 0.3", "left: None"]
    assert told.err == ""


def test_as_json_they_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    console.result(NESTED, as_json=True)
    assert json.loads(capsys.readouterr().out) == NESTED


def test_what_comes_from_elsewhere_does_not_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.result({"classes": ["fine\x1b]0;mine\x07", "two\nlines"]}, as_json=False)
    [line] = capsys.readouterr().out.splitlines()
    assert line == "classes: fine ]0;mine , two lines"


def test_progress_is_not_among_results(capsys: pytest.CaptureFixture[str]) -> None:
    console.progress("distilling")
    told = capsys.readouterr()
    assert told.out == ""
    assert re.fullmatch(r"\d\d:\d\d:\d\d distilling\n", told.err)


def test_off_a_terminal_a_search_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "perf_counter", lambda: now)
    with console.live() as say:
        for number in range(40):
            now += 1.0
            say(SimpleNamespace(stage="", words=lambda number=number: f"{number} candidates"))
        for stage in ("timing", "random: 1 of 2", "random: 2 of 2"):
            say(SimpleNamespace(stage=stage, words=lambda stage=stage: stage))
    said = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == ["14 candidates", "29 candidates", "timing", "random: 1 of 2"], "every 15 seconds, and a stage once"


def test_a_point_is_told_with_its_intervals() -> None:
    candidate = make_candidate(7, accuracy=0.85, ratio=0.5)
    told: dict[str, Any] = console.about(candidate)
    assert told["trial"] == 7
    assert told["accuracy"] == [0.85, candidate.score.accuracy_low, candidate.score.accuracy_high]
    assert told["accuracy_drop"] == list(candidate.score.drop or ())
    assert told["latency_ratio"] == [0.5, candidate.score.latency_ratio_low, candidate.score.latency_ratio_high]
    assert json.loads(json.dumps(told))["accuracy"] == told["accuracy"]


def test_intervals_are_said_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    console.result({"a": {"ratio": console.Interval([0.5, 0.49, 0.51234])}, "names": ["x", "y"]}, False)
    assert capsys.readouterr().out.splitlines() == ["a.ratio: 0.5 (95 % interval 0.49 to 0.5123)", "names: x, y"]


@pytest.mark.parametrize("width", [80, 200])
def test_plans_stand_beside_a_front_or_below_it(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    front = front_of([make_candidate(3, accuracy=0.875, ratio=0.5)])
    console.front_of(SimpleNamespace(front=lambda: front), False)  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    words = front.points[0].plan.words()
    assert (f"trial 3: {words}" in printed.splitlines()) == (width == 80)
    assert printed.count(words) == 1


@pytest.mark.parametrize(("stored", "verdict"), [(0.505, "within"), (0.42, "beyond")])
def test_a_measurement_is_held_against_the_stored_one(stored: float, verdict: str) -> None:
    ratios = {"latency_ratio": 0.5, "latency_ratio_low": 0.49, "latency_ratio_high": 0.51}
    said = console.words_of_measured(
        {**ratios, "stored_latency_ratio": stored, "same_machine": verdict == "within", "latency_adjusted": 1.02}
    )
    assert "adjusted by +2.0 % to the reference's pace" in said
    assert said.startswith("2.00x as fast as the reference, 1.96 to 2.04 with 95 % confidence")
    assert f"stored {1 / stored:.2f}x" in said
    assert f"{verdict} this interval" in said
    assert ("another machine" in said) == (verdict == "beyond")


def test_on_a_terminal_a_table_shows_what_the_front_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=120, height=30)
    monkeypatch.setattr("rich.console.Console", lambda **_: terminal)
    front = front_of([make_candidate(3, accuracy=0.875, ratio=0.5), make_candidate(5, accuracy=0.8, ratio=0.1)])
    status = SearchStatus(done=20, total=80, failed=1, stopped=2, front=front, gain=1.2, seconds_each=2.0)
    with console.live() as say:
        say(status)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert "20/80 candidates, 1 failed, 2 stopped early, 2 on the front, hypervolume 1.20x" in text
    assert "120 s" in text
    [row] = {line.strip() for line in text.splitlines() if "fastest" in line}
    assert row.startswith("fastest within 1% and smallest within 1%")
    assert "87.5 %" in row
    assert "2.00x faster" in row


def test_before_there_is_a_front_the_table_is_empty() -> None:
    status = SearchStatus(done=1, total=8, failed=1, stopped=0, front=front_of([]), gain=None, seconds_each=2.0)
    assert status.words() in console._table_of(status).renderables
