"""The bank: entries are made once, whole or not at all, under the hash of what they were made from, and go in order."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest

from autocompress import bank, machine, slot
from autocompress.bank import Bank, Usage, default_bank
from autocompress.depot import Depot
from autocompress.errors import DepotError

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


@pytest.mark.parametrize("name", ["rows.csv", "model"])
def test_a_copy_stands_for_its_original(tmp_path: Path, name: str) -> None:
    original = tmp_path / "from" / name
    texts = {"": "text,label\n"} if name == "rows.csv" else {"config.json": "{}", "deep/er.bin": "weights"}
    for place, text in texts.items():
        (original / place).parent.mkdir(parents=True, exist_ok=True)
        (original / place).write_text(text, encoding="utf-8")
    store = Bank(tmp_path / "bank")
    copy = Path(store.lent(original))
    assert copy.name == name
    assert store.root in copy.parents
    assert {place: (copy / place).read_text(encoding="utf-8") for place in texts} == texts
    assert store.lent(original) == str(copy)
    (original / next(iter(texts))).write_text("changed", encoding="utf-8")
    assert store.lent(original) != str(copy)


def test_what_one_bank_made_another_fetches(tmp_path: Path) -> None:
    def store(name: str) -> Bank:
        return Bank(tmp_path / name, depot=Depot(f"file://{tmp_path / 'shared'}"))

    make = Maker()
    first = store("first").get("kind", MADE_FROM, make)
    second = store("second").get("kind", MADE_FROM, make)
    assert make.calls == 1
    assert second == store("second").path("kind", MADE_FROM)
    assert [file.read_bytes() for file in sorted(second.iterdir())] == [f.read_bytes() for f in sorted(first.iterdir())]
    (tmp_path / "rows.csv").write_text("text,label\n", encoding="utf-8")
    lent = store("first").lent(tmp_path / "rows.csv")
    borrowed = Path(store("second").borrowed(lent))
    assert borrowed.is_relative_to(tmp_path / "second")
    assert borrowed.read_text(encoding="utf-8") == "text,label\n"
    assert store("second").borrowed(lent) == str(borrowed)
    assert store("second").borrowed("demo/minilm") == "demo/minilm"
    shutil.rmtree(tmp_path / "shared")
    store("first").get("kind", MADE_FROM, make)
    store("third").get("kind", MADE_FROM, make)
    assert make.calls == 1, "what is there is shared, also where the depot had it no more"
    with pytest.raises(DepotError, match=r"^storage\.shared: bank/copies/.* is gone"):
        store("third").borrowed(lent)
    assert not list((tmp_path / "third").rglob("*copies/*"))


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


@pytest.mark.parametrize("kind", ["pieces", "importance", "moments", "sensitivity", "teacher-logits", "channels"])
def test_who_times_does_not_wait_for_what_is_made_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(slot, "_LONGEST_S", 0.3)
    waited: list[float] = []

    def time_it() -> None:
        with slot.timing():
            waited.append(slot.waited())

    def make(folder: Path) -> None:
        timing = threading.Thread(target=time_it)
        timing.start()
        timing.join()

    Bank(tmp_path / "bank").get(kind, {}, make)
    assert (waited[0] >= 0.3) == (kind == "pieces")


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


def put(store: Bank, number: int, *, kind: str = "cheap", size_bytes: int = 1000, unused_s: float = 0) -> Path:
    """Make an entry of about this size that was last used so long ago."""
    folder = store.get(kind, {"number": number}, lambda folder: made_with(folder, size_bytes))
    last_used(folder, unused_s)
    return folder


def made_with(folder: Path, size_bytes: int) -> None:
    (folder / "weights.bin").write_bytes(b"w" * size_bytes)


def last_used(folder: Path, unused_s: float) -> None:
    now = time.time()
    os.utime(folder, (now - unused_s, now - unused_s))


def there(folders: list[Path]) -> list[int]:
    return [position for position, folder in enumerate(folders) if folder.is_dir()]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def store(tmp_path: Path) -> Bank:
    """A bank without a limit; tests that need one set it when the entries stand, so that only they trim."""
    return Bank(tmp_path)


def test_the_least_recently_used_entries_go_first(store: Bank) -> None:
    folders = [put(store, number, unused_s=unused_s) for number, unused_s in enumerate([300, 500, 100, 400, 200])]
    sizes = [size(folder) for folder in folders]
    store.limit_bytes = 2500
    assert store.trim() == sizes[0] + sizes[1] + sizes[3]
    assert there(folders) == [2, 4]
    assert store.trim() == 0
    assert sorted(path.name for path in (store.root / "cheap").iterdir()) == sorted(folders[n].name for n in (2, 4))


def test_use_renews_an_entry(store: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [put(store, number, unused_s=300 - number) for number in range(4)]
    monkeypatch.setattr(bank, "RECENT_S", 0)
    put(store, 0)
    store.limit_bytes = 2500
    assert store.trim() > 0
    assert there(folders) == [0, 3]


@pytest.mark.parametrize("kind", bank.LAST)
def test_what_took_training_goes_last(store: Bank, kind: str) -> None:
    trained = [put(store, number, kind=kind, unused_s=9000 - number) for number in range(2)]
    cheap = [put(store, number, unused_s=300 - number) for number in range(2)]
    store.limit_bytes = 2500
    store.trim()
    assert (there(trained), there(cheap)) == ([0, 1], [])
    store.limit_bytes = 1500
    store.trim()
    assert there(trained) == [1]


def test_recent_entries_stay_even_above_the_limit(store: Bank) -> None:
    recent = [put(store, number) for number in range(3)]
    old = put(store, 3, kind="finetuned", unused_s=bank.RECENT_S + 5)
    store.limit_bytes = 10
    store.trim()
    assert (there(recent), old.is_dir()) == ([0, 1, 2], False)


def test_an_entry_used_after_it_was_listed_stays(store: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [put(store, number, unused_s=300 - number) for number in range(3)]
    listed = Bank._entries

    def use_meanwhile(self: Bank) -> Iterator[Any]:
        found = list(listed(self))
        put(store, 0)
        return iter(found)

    monkeypatch.setattr(Bank, "_entries", use_meanwhile)
    store.limit_bytes = 2500
    store.trim()
    assert there(folders) == [0, 2]


def test_what_another_process_removed_is_not_removed_twice(store: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [put(store, number, unused_s=300 - number) for number in range(3)]
    listed = Bank._entries

    def remove_meanwhile(self: Bank) -> Iterator[Any]:
        found = list(listed(self))
        shutil.rmtree(folders[0])
        return iter(found)

    monkeypatch.setattr(Bank, "_entries", remove_meanwhile)
    store.limit_bytes = 2500
    assert store.trim() == 0
    assert there(folders) == [1, 2]


def test_an_open_file_outlives_its_entry(store: Bank) -> None:
    folder = put(store, 0, unused_s=300)
    store.limit_bytes = 0
    with (folder / "weights.bin").open("rb") as file:
        store.trim()
        assert not folder.exists()
        assert file.read() == b"w" * 1000


def test_a_bank_without_a_limit_keeps_everything(store: Bank) -> None:
    folders = [put(store, number, unused_s=1e6) for number in range(3)]
    assert store.trim() == 0
    assert there(folders) == [0, 1, 2]


def test_an_empty_bank_has_nothing_to_trim(tmp_path: Path) -> None:
    nowhere = Bank(tmp_path / "none", limit_bytes=1)
    assert nowhere.trim() == 0
    assert nowhere.usage() == {}
    assert not nowhere.root.exists()


def test_files_that_are_not_the_banks_are_never_deleted(store: Bank) -> None:
    others = [store.root / "photos" / "summer" / "a.jpg", store.root / "code" / ".git" / "HEAD", store.root / "notes"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine", encoding="utf-8")
        last_used(path.parent, 1e6)
    store.limit_bytes = 0
    assert store.trim() == 0
    assert store.usage() == {}
    assert all(path.is_file() for path in others)


def test_making_entries_trims_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    trim = Bank.trim

    def count(self: Bank) -> int:
        trims.append(made)
        return trim(self)

    monkeypatch.setattr(Bank, "trim", count)
    limited = Bank(tmp_path, limit_bytes=60_000)  # a twentieth is 3000: three entries and what they were made from
    for made in range(1, 10):
        put(limited, made)
        put(limited, made)
    assert trims == [3, 6, 9]
    made = 10
    for number in range(5):
        put(Bank(tmp_path), 100 + number, size_bytes=100_000)
    assert trims == [3, 6, 9]


def test_a_long_search_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "RECENT_S", 0)
    limited = Bank(tmp_path, limit_bytes=20_000)
    for number in range(60):
        put(limited, number)
        assert sum(kind.bytes for kind in limited.usage().values()) <= 22_000
    assert limited.usage()["cheap"].entries > 15


def test_an_entry_evicted_before_it_was_read_is_made_again(tmp_path: Path) -> None:
    store, make, reads = Bank(tmp_path), Maker(), []

    def read(folder: Path) -> str:
        reads.append(folder)
        if len(reads) < 3:
            shutil.rmtree(folder)
        return (folder / "content.txt").read_text(encoding="utf-8")

    assert store.load("kind", MADE_FROM, make, read) == "made"
    assert (make.calls, len(reads)) == (3, 3)
    assert store.load("kind", MADE_FROM, make, lambda folder: folder) == reads[0]
    assert make.calls == 3


def test_a_library_error_for_a_missing_folder_is_tried_again(tmp_path: Path) -> None:
    store, make, reads = Bank(tmp_path), Maker(), []

    def read(folder: Path) -> str:
        reads.append(folder)
        if len(reads) == 1:
            shutil.rmtree(folder)
            raise RuntimeError("cannot open model.xml")
        return "read"

    assert store.load("kind", MADE_FROM, make, read) == "read"
    assert make.calls == 2


def test_loading_ends_with_the_last_error(tmp_path: Path) -> None:
    reads: list[Path] = []

    def read(folder: Path) -> None:
        reads.append(folder)
        raise FileNotFoundError(f"attempt {len(reads)}")

    with pytest.raises(FileNotFoundError, match=f"attempt {bank.LOAD_ATTEMPTS}"):
        Bank(tmp_path).load("kind", MADE_FROM, Maker(), read)
    assert len(reads) == bank.LOAD_ATTEMPTS == 3


def test_other_errors_of_reading_and_all_of_making_are_not_tried_again(tmp_path: Path) -> None:
    store, calls = Bank(tmp_path), []

    def fail(error: Exception) -> Callable[[Path], None]:
        def call(folder: Path) -> None:
            calls.append(folder)
            raise error

        return call

    with pytest.raises(ValueError, match="bad header"):
        store.load("kind", MADE_FROM, Maker(), fail(ValueError("bad header")))
    assert len(calls) == 1
    with pytest.raises(FileNotFoundError, match="no data"):
        store.load("other", MADE_FROM, fail(FileNotFoundError("no data")), lambda folder: folder)
    assert len(calls) == 2


def left_over(root: Path, age_s: float) -> Path:
    """What a process killed while it made an entry leaves."""
    final = Bank(root).path("kind", {"age": age_s})
    folder = final.with_name(f".{final.name}.{'0' * 32}")
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "half.bin").write_bytes(b"h" * 500)
    last_used(folder, age_s)
    return folder


@pytest.mark.parametrize("limit_bytes", [None, 10**9])
def test_left_overs_of_killed_processes_go_after_an_hour(tmp_path: Path, limit_bytes: int | None) -> None:
    store = Bank(tmp_path, limit_bytes=limit_bytes)
    kept = put(store, 0, unused_s=1e6)
    stale, young = left_over(tmp_path, bank.STALE_S + 5), left_over(tmp_path, bank.STALE_S - 60)
    assert store.trim() == 500
    assert (stale.exists(), young.is_dir(), kept.is_dir()) == (False, True, True)


def test_an_entry_that_takes_hours_to_make_is_no_left_over(tmp_path: Path) -> None:
    store = Bank(tmp_path)

    def make(folder: Path) -> None:
        last_used(folder, bank.STALE_S * 5)
        assert Bank(tmp_path).trim() == 0
        (folder / "content.txt").write_text("made", encoding="utf-8")

    assert (store.get("kind", MADE_FROM, make) / "content.txt").is_file()


def test_without_locks_entries_are_made_and_left_overs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    stale = left_over(tmp_path, bank.STALE_S * 5)
    assert put(Bank(tmp_path), 0).is_dir()
    assert Bank(tmp_path).trim() == 0
    assert stale.is_dir()


def test_a_lock_is_of_a_file_that_goes_with_its_maker(tmp_path: Path) -> None:
    """Over NFS a folder's lock is one machine's own."""
    store, seen = Bank(tmp_path), list[str]()

    def make(folder: Path) -> None:
        [held] = (file for file in folder.parent.iterdir() if file.is_file())
        with held.open("r+b") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(held.name)

    entry = store.get("kind", MADE_FROM, make)
    assert {file.name for file in entry.iterdir()} == {"made_from.json"}
    assert len(seen) == 1
    assert list(entry.parent.iterdir()) == [entry]
    (entry.parent / seen[0]).touch()  # its maker was killed just then
    store.trim()
    assert list(entry.parent.iterdir()) == [entry]


@pytest.mark.parametrize("full", [True, False])
def test_a_full_disk_is_an_error_of_the_system_whoever_met_it(
    store: Bank, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """As where safetensors cannot write, which says so in words of its own."""
    monkeypatch.setattr(machine, "without_room", lambda folders: next(iter(folders)) if full else None)

    def make(folder: Path) -> None:
        raise RuntimeError("Error while serializing: I/O error")

    with pytest.raises(OSError if full else RuntimeError, match="No space left" if full else "serializing"):
        store.get("kind", MADE_FROM, make)
    assert not list(store.root.rglob("*.lock"))


def test_usage_by_kind(store: Bank) -> None:
    small, large = put(store, 0, size_bytes=10), put(store, 1, size_bytes=2000)
    student = put(store, 0, kind="distilled", size_bytes=300)
    left_over(store.root, 5)
    assert store.usage() == {"cheap": Usage(2, size(small) + size(large)), "distilled": Usage(1, size(student))}
    assert list(store.usage()) == ["cheap", "distilled"]


def test_usage_leaves_out_what_vanishes(store: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, stays = put(store, 0), put(store, 1)
    measure = bank._size_bytes

    def remove_meanwhile(folder: Path) -> int:
        if folder == gone:
            shutil.rmtree(folder)
        return measure(folder)

    monkeypatch.setattr(bank, "_size_bytes", remove_meanwhile)
    assert store.usage() == {"cheap": Usage(1, size(stays))}


def test_a_bank_that_may_only_be_read_is_read(store: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(store, 0, unused_s=300)

    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "rename", refuse)
    assert store.load("cheap", {"number": 0}, Maker(), lambda folder: folder) == folder
    store.limit_bytes = 0
    assert store.trim() == 0
    assert folder.is_dir()


def test_a_full_disk_at_the_rename_leaves_nothing(store: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="no space left"):
            put(store, 0)
    assert not list((store.root / "cheap").iterdir())
    assert put(store, 0).is_dir()


def test_an_entry_made_twice_and_evicted_at_once_is_placed(store: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, tries = Path.rename, []

    def occupied_at_first(self: Path, target: Path) -> Path:
        tries.append(target)
        if len(tries) == 1:
            raise OSError(errno.ENOTEMPTY, "directory not empty")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", occupied_at_first)
    assert (put(store, 0) / "weights.bin").is_file()
    assert len(tries) == 2


KEYS, LIMIT_BYTES, HAMMER_S = 150, 30_000, 2.0


def hammer(root: Path, seed: int, together: Any, results: Any) -> None:
    """Load random entries of a bank that holds a tenth of them; report loads, makes, repeated makes and error."""
    bank.RECENT_S = 0.1  # in this process, spawned for it
    store, pick, loaded, made = Bank(root, limit_bytes=LIMIT_BYTES), random.Random(seed), 0, []
    together.wait()
    end = time.monotonic() + HAMMER_S
    try:
        while time.monotonic() < end:
            key = pick.randrange(KEYS)
            content = f"{key:05d}" * 200

            def make(folder: Path, content: str = content) -> None:
                made.append(content)
                for name in ("a.txt", "b.txt"):
                    (folder / name).write_text(content, encoding="utf-8")

            def read(folder: Path) -> list[str]:
                first = (folder / "a.txt").read_text(encoding="utf-8")
                # Time for the other process to evict it; and without a pause every entry would be a recent one.
                time.sleep(0.002)
                return [first, (folder / "b.txt").read_text(encoding="utf-8")]

            kind = ("cheap", *bank.TRAINED)[key % 3]
            assert store.load(kind, {"key": key}, make, read) == [content, content]
            loaded += 1
    except BaseException as error:
        results.put((loaded, len(made), len(made) - len(set(made)), repr(error)))
        raise
    results.put((loaded, len(made), len(made) - len(set(made)), ""))


def test_processes_share_a_small_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = multiprocessing.get_context("spawn")
    together, results = spawn.Barrier(2, timeout=60), spawn.Queue()
    workers = [spawn.Process(target=hammer, args=(tmp_path, seed, together, results)) for seed in range(2)]
    for worker in workers:
        worker.start()
    try:
        found = [results.get(timeout=60) for _ in workers]
    except Empty:
        found = [(0, 0, 0, "a process died")]
    for worker in workers:
        worker.join(30)
    assert [error for *_, error in found] == ["", ""]
    # Entries were evicted and made again, and others were found.
    assert sum(again for _, _, again, _ in found) > 0
    assert sum(loaded - made for loaded, made, _, _ in found) > 0
    monkeypatch.setattr(bank, "RECENT_S", 0)
    store = Bank(tmp_path, limit_bytes=LIMIT_BYTES)
    store.trim()
    assert 0 < sum(kind.bytes for kind in store.usage().values()) <= LIMIT_BYTES
    assert not list(tmp_path.glob("*/.*"))
