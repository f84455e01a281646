"""The study's journal file: its lock, and the repair of a torn last record."""

from __future__ import annotations

import fcntl
import gc
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend


def open_journal(journal: Path) -> JournalStorage:
    """Return Optuna's storage on a journal file.

    Raises:
        ValueError, KeyError, OSError: if a record in it cannot be read.
    """
    lock = _JournalLock(journal.with_name("study.journal.lock"))
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))  # type: ignore[arg-type]


class _JournalLock:
    """Optuna's journal lock as an advisory lock of the kernel's, which dies with its process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def acquire(self) -> bool:
        self._handle = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


@contextmanager
def without_collection() -> Iterator[None]:
    """Switch the garbage collector off: a long journal makes millions of objects and no cycles among them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def repair_tail(journal: Path) -> Path | None:
    """Cut a torn last record, which a killed driver leaves, off the journal.

    Optuna would glue its next record to the stump and fail on every later load.

    Returns:
        The backup of the file as it was, or None if there was nothing to repair.
    """
    if not journal.exists() or journal.stat().st_size == 0:
        return None
    content = journal.read_bytes()
    end = content.rfind(b"\n") + 1
    if end == len(content):
        last = content[content.rfind(b"\n", 0, end - 1) + 1 :]
        try:
            json.loads(last)
            return None
        except ValueError:
            end -= len(last)
    stamp = f"{journal.name}.torn-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stamp if number == 1 else f"{stamp}-{number}" for number in itertools.count(1))
    backup = next(path for path in map(journal.with_name, names) if not path.exists())
    shutil.copyfile(journal, backup)
    with journal.open("r+b") as opened:
        opened.truncate(end)
    return backup
