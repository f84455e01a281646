"""A run file to begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocompress import strict_yaml
from autocompress.config import RunConfig
from autocompress.errors import ConfigError
from autocompress.runfile import check_column, columns_of, run_text


def test_what_is_not_asked_for_stays_the_demos() -> None:
    text = run_text("run.yaml", name=None, model=None)
    assert RunConfig.from_mapping(strict_yaml.parse(text, "run.yaml")) == RunConfig.from_file("demo")
    assert text.count("#") > 10


def test_whatever_is_asked_for_is_text() -> None:
    odd = "a: b # c \"d\" 'e'"
    run = RunConfig.from_mapping(strict_yaml.parse(run_text("run.yaml", data=odd, text="t: x", label="l#"), "run.yaml"))
    assert (run.data.source, run.data.text, run.data.label) == (odd, "t: x", "l#")


def test_what_would_be_no_run_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml: name: "):
        run_text("mine.yaml", name="../x")
    with pytest.raises(ConfigError, match=r"mine\.yaml: target\.runtime: "):
        run_text("mine.yaml", target="tflite")


def test_columns_are_known_of_local_files(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("review,mood\nfine,good\n", encoding="utf-8")
    found = columns_of(str(tmp_path / "mine.csv"))
    assert found == ["review", "mood"]
    check_column("mood", found, "mine.csv")
    with pytest.raises(
        ConfigError, match=r"mine\.csv: has no column text; it has review, mood; give --text and --label"
    ):
        check_column("text", found, "mine.csv")
    assert columns_of("demo/movies") is None
    check_column("anything", None, "demo/movies")
