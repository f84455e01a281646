"""The bank: entries are made once, whole or not at all, under the hash of what they were made from."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from autocompress import bank
from autocompress.bank import Bank, default_bank

MADE_FROM = {"model": "abc", "rows": 10, "nested": {"b": 1, "a": [1, 2]}}


class Maker:
    """Writes a file and counts how often it was asked."""

    def __init__(self, text: str = "made") -> None:
        self.calls = 0
        self.text = text

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        assert folder.is_dir()
        assert not list(folder.iterdir())
        (folder / "content.txt").write_text(self.text, encoding="utf-8")


def entries(root: Path) -> list[Path]:
    return sorted(root.rglob("content.txt"))


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    store, make = Bank(tmp_path), Maker()
    first = store.get("kind", MADE_FROM, make)
    again = Bank(tmp_path).get("kind", dict(reversed(MADE_FROM.items())), make)
    assert first == again == store.path("kind", MADE_FROM)
    assert make.calls == 1
    assert (first / "content.txt").read_text(encoding="utf-8") == "made"
    assert json.loads((first / "made_from.json").read_text(encoding="utf-8")) == MADE_FROM


@pytest.mark.parametrize(
    "changed",
    [{"model": "abd"}, {"rows": 11}, {"rows": "10"}, {"nested": {"b": 1, "a": [2, 1]}}, {"more": None}],
)
def test_the_key_changes_with_everything_it_was_made_from(tmp_path: Path, changed: dict[str, object]) -> None:
    store, make = Bank(tmp_path), Maker()
    store.get("kind", MADE_FROM, make)
    store.get("kind", {**MADE_FROM, **changed}, make)
    assert make.calls == 2


def test_kinds_and_versions_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, make = Bank(tmp_path), Maker()
    one = store.get("one", MADE_FROM, make)
    other = store.get("other", MADE_FROM, make)
    assert one != other
    monkeypatch.setattr(bank, "BANK_VERSION", bank.BANK_VERSION + 1)
    assert store.get("one", MADE_FROM, make) != one
    assert make.calls == 3


def test_a_failed_maker_leaves_nothing(tmp_path: Path) -> None:
    store = Bank(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "content.txt").write_text("half", encoding="utf-8")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        store.get("kind", MADE_FROM, fail)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list((tmp_path / "kind").iterdir())
    assert store.get("kind", MADE_FROM, Maker()).is_dir()


def test_what_it_was_made_from_must_be_data(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Bank(tmp_path).get("kind", {"folder": tmp_path}, Maker())
    assert not entries(tmp_path)


def test_two_makers_at_once_leave_one_whole_entry(tmp_path: Path) -> None:
    store = Bank(tmp_path)
    together = threading.Barrier(2, timeout=20)
    found: list[Path] = []

    def make(folder: Path) -> None:
        together.wait()
        (folder / "content.txt").write_text("made", encoding="utf-8")
        together.wait()

    threads = [threading.Thread(target=lambda: found.append(store.get("kind", MADE_FROM, make))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [store.path("kind", MADE_FROM)] * 2
    assert [path.name for path in (tmp_path / "kind").iterdir()] == [found[0].name]
    assert (found[0] / "content.txt").read_text(encoding="utf-8") == "made"


def test_a_reader_never_sees_half_an_entry(tmp_path: Path) -> None:
    store = Bank(tmp_path)

    def make(folder: Path) -> None:
        assert not store.path("kind", MADE_FROM).exists()
        (folder / "content.txt").write_text("made", encoding="utf-8")
        assert not store.path("kind", MADE_FROM).exists()

    assert (store.get("kind", MADE_FROM, make) / "content.txt").is_file()


def test_the_default_bank_is_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_bank() == tmp_path / "autocompress" / "bank"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_bank() == tmp_path / ".cache" / "autocompress" / "bank"
