"""Turns on a machine: who times is alone, who works waits, and nobody waits for ever."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from autocompress import slot

HOLD = "import sys, time; from autocompress import slot\nwith slot.{0}(): print('in', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def entered(turn: Callable[[], AbstractContextManager[None]], within_s: float) -> bool:
    """Say whether another thread gets its turn in that time."""
    done = threading.Event()

    def take() -> None:
        with turn():
            done.set()

    threading.Thread(target=take, daemon=True).start()
    return done.wait(within_s)


def test_who_works_does_so_beside_others() -> None:
    with slot.working():
        assert entered(slot.working, 2.0)


@pytest.mark.parametrize("other", [slot.working, slot.timing])
def test_who_times_is_alone(other: Callable[[], AbstractContextManager[None]]) -> None:
    with slot.timing():
        assert not entered(other, 0.3)
    assert entered(other, 2.0)


def test_who_times_waits_for_who_works_and_is_next() -> None:
    timed, ended, done = threading.Event(), threading.Event(), threading.Event()

    def time_it() -> None:
        with slot.timing():
            timed.set()
            ended.wait(5.0)

    def work_again() -> None:
        with slot.working():
            done.set()

    with slot.working():
        threading.Thread(target=time_it, daemon=True).start()
        assert not timed.wait(0.3)
        threading.Thread(target=work_again, daemon=True).start()
        assert not done.wait(0.3), "behind who wants to time, though others work"
        with slot.working():  # a part of what is done already
            pass
    assert timed.wait(2.0)
    assert not done.is_set()
    ended.set()
    assert done.wait(2.0)


@pytest.mark.parametrize(("held", "wanted"), [("timing", slot.working), ("working", slot.timing)])
def test_a_killed_process_holds_nobody_up(held: str, wanted: Callable[[], AbstractContextManager[None]]) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD.format(held)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "in\n"
    assert not entered(wanted, 0.3)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert entered(wanted, 2.0)


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "_LONGEST_S", 0.2)
    with slot.working():
        began = time.monotonic()
        assert entered(slot.timing, 5.0)
        assert time.monotonic() - began >= 0.2


def test_a_queue_that_moves_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "_LONGEST_S", 0.4)
    seen: list[int] = []

    def time_it(number: int) -> None:
        with slot.timing():
            seen.append(number)
            time.sleep(0.3)
            seen.append(number)

    threads = [threading.Thread(target=time_it, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[::2] == seen[1::2], "each alone, also the last"


def test_what_one_waits_for_a_turn_is_counted_by_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "_LONGEST_S", 0.3)
    waited: list[float] = []

    def wait() -> None:
        for turn in (slot.timing, slot.working):
            before = slot.waited()
            with turn():
                time.sleep(0.1)
            waited.append(slot.waited() - before)

    before = slot.waited()
    with slot.working():
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join()
    assert 0.3 <= waited[0] < 2.0, "for the first one, whom nobody let in"
    assert waited[1] < 0.3, "beside others one works at once"
    assert slot.waited() - before < 0.3, "others' waiting is theirs"


def test_a_folder_that_cannot_be_written_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with slot.timing(), slot.timing():
        pass
    with slot.working():
        pass
    # and after it
    with slot.timing():
        pass
