"""YAML that says something else than its author meant, or tries to do something, is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from autocompress import strict_yaml
from autocompress.errors import ConfigError


def message_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        strict_yaml.parse(text, "run.yaml")
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message.startswith("run.yaml: ")
    assert "\n" not in message
    return message


def test_a_duplicate_key_is_named_with_its_line() -> None:
    assert message_of("a: 1\nsearch:\n  trials: 3\n  trials: 4\n") == "run.yaml: line 4: duplicate key 'trials'"


def test_equal_keys_in_different_sections_are_fine() -> None:
    assert strict_yaml.parse("a: {epochs: 1}\nb: {epochs: 2}\n", "run.yaml") == {"a": {"epochs": 1}, "b": {"epochs": 2}}


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {marker}']",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]",
        "!!python/object/new:subprocess.check_call [['touch', '{marker}']]",
        "!!python/name:os.system",
    ],
)
def test_tags_that_build_objects_are_refused_and_run_nothing(tmp_path: Path, tag: str) -> None:
    marker = tmp_path / "executed"
    started = time.monotonic()
    message = message_of(f"name: {tag.format(marker=marker)}\n")
    assert time.monotonic() - started < 1
    assert "python/" in message
    assert not marker.exists()


def test_an_alias_bomb_is_refused_within_a_second() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    started = time.monotonic()
    assert message_of("\n".join(lines)) == "run.yaml: line 2: aliases are not accepted; write the value out"
    assert time.monotonic() - started < 1


def test_a_merge_key_is_refused() -> None:
    assert "merge" in message_of("a: {<<: {b: 1}}\n")


def test_deep_nesting_is_refused_and_does_not_overflow() -> None:
    started = time.monotonic()
    assert "not readable as YAML" in message_of("[" * 100_000)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1, 2\nb: 3\n", "line 2: "),
        ("1: a\n", "line 1: key 1 is not text"),
        ("[a, b]: c\n", "is not text"),
        ("a: \x00\n", "not readable as YAML"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("a: " + "9" * 10_000, "not readable as YAML"),
    ],
)
def test_malformed_text_is_one_line(text: str, part: str) -> None:
    assert part in message_of(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5e2", 50.0),
        ("0.1", 0.1),
        ("3", 3),
        ("true", True),
        ("", None),
        ("1e", "1e"),
        ("e3", "e3"),
        ("'1e-3'", "1e-3"),
    ],
)
def test_scalars_read_as_written(text: str, value: object) -> None:
    parsed = strict_yaml.parse(text, "run.yaml")
    assert parsed == value
    assert type(parsed) is type(value)


def test_large_text_is_refused_before_it_is_parsed() -> None:
    assert "larger than 1,000,000 bytes" in message_of("a: " + "ä" * 500_000)


def test_read_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("a: 1\na: 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^space\.yaml: line 2: duplicate key 'a'$"):
        strict_yaml.read(path)
    path.write_text("a: 1\n", encoding="utf-8")
    assert strict_yaml.read(path) == {"a": 1}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such file"):
        strict_yaml.read(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        strict_yaml.read(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read as text"):
        strict_yaml.read(tmp_path / "latin.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(ConfigError, match=r"big\.yaml: larger than"):
        strict_yaml.read(tmp_path / "big.yaml")
