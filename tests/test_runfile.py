"""A run file to begin with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autocompress import strict_yaml, task
from autocompress.config import RunConfig
from autocompress.errors import ConfigError
from autocompress.runfile import Known, name_of, named, run_text


def test_what_is_not_asked_for_stays_the_demos() -> None:
    text = run_text(Path("run.yaml"), {"name": None, "model": None})
    assert RunConfig.from_mapping(strict_yaml.parse(text, "run.yaml")) == RunConfig.from_file("demo")
    assert text.count("#") > 10


def test_whatever_is_asked_for_is_text() -> None:
    odd = "a: b # c \"d\" 'e'"
    text = run_text(Path("run.yaml"), {"data": odd, "text": "t: x", "label": "l#"})
    run = RunConfig.from_mapping(strict_yaml.parse(text, "run.yaml"))
    assert (run.data.source, run.data.text, run.data.label) == (odd, "t: x", "l#")


def test_what_would_be_no_run_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml: name: "):
        run_text(Path("mine.yaml"), {"name": "../x"})
    with pytest.raises(ConfigError, match=r"mine\.yaml: target\.runtime: "):
        run_text(Path("mine.yaml"), {"target": "tflite"})


def test_columns_are_known_of_local_files(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("review,mood\nfine,good\n", encoding="utf-8")
    known = Known(str(tmp_path / "mine.csv"))
    assert known.columns == ["review", "mood"]
    known.check_column("mood")
    with pytest.raises(
        ConfigError, match=r"mine\.csv: has no column text; it has review, mood; give --text and --label"
    ):
        known.check_column("text")
    assert Known("demo/movies").columns is None
    Known("demo/movies").check_column("anything")


def test_a_file_for_other_data_does_not_tell_of_the_demos() -> None:
    text = run_text(Path("run.yaml"), {"data": "mine.csv"})
    assert "movie reviews" in run_text(Path("run.yaml"), {"name": "x"})
    assert "movie reviews" not in text
    assert text.startswith("# Every key can be overridden")


def test_the_command_within_runs_where_the_file_was_asked_for() -> None:
    text = run_text(Path("conf/my run.yaml"), {"data": "mine.csv"})
    assert "autocompress search 'conf/my run.yaml' --set search.trials=200" in text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("mine.csv", "mine"),
        ("folder/My tickets (2026).csv.gz", "My-tickets-2026"),
        ("demo/tweets", "tweets"),
        ("owner/set", "set"),
        ("_x" * 60 + ".csv", ("x_" * 60)[:64]),
        ("文.csv", None),
        ("..", None),
    ],
)
def test_a_run_is_called_as_its_data(data: str, expected: str | None) -> None:
    found = name_of(data)
    assert found == expected
    if found is not None:
        assert RunConfig.from_mapping({"name": found}).name == found


def test_few_rows_are_cut_in_proportion(tmp_path: Path, tiny_csv: Path) -> None:
    rows = Known(str(tiny_csv)).search_rows(None, None)
    assert rows is not None
    read = RunConfig.from_mapping(
        strict_yaml.parse(run_text(Path("run.yaml"), {"data": str(tiny_csv), "search_rows": rows}), "run.yaml")
    )
    splits = task.load(read.data).splits
    assert len(splits["search"]) == rows
    assert len(splits["train"]) >= 2 * rows - 2
    assert Known("demo/movies").search_rows(None, None) is None
    (tmp_path / "mine.csv").write_text("text,label\nfine,good\n", encoding="utf-8")
    assert Known(str(tmp_path / "mine.csv")).search_rows(None, None) is None


def test_a_search_of_the_demos_file_on_other_data_is_called_as_these(tmp_path: Path) -> None:
    def name(data: str, out: Path, *overrides: str, source: str = "demo") -> str:
        run = RunConfig.from_file("demo", overrides=[f"data.source={json.dumps(data)}", *overrides])
        return named(run, source, out).name

    assert name("sub/tickets.csv", tmp_path / "new") == "tickets"
    assert name("tickets.csv", tmp_path / "new", "name=mine") == "mine"
    assert name("tickets.csv", tmp_path / "new", source="run.yaml") == "demo"
    begun = tmp_path / "begun"
    begun.mkdir()
    run = RunConfig.from_file("demo", overrides=["data.source=tickets.csv"])
    (begun / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
    assert name("tickets.csv", begun) == "demo", "a study that was begun keeps its name"
