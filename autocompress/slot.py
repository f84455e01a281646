"""Turns on a machine: while something is timed there, no other process of a search works.

Processes of one machine share its last-level cache and its memory's bandwidth. CPU time does not show that as other
load but as a slower model, and one that fits into the cache loses more than the reference. Who works says so in pieces
of a fraction of a second; who times waits until nobody does, and holds back who would begin.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_LONGEST_S = 5.0
"""Seconds that anybody waits for one holder: a process that trains, or was stopped, must not hold up all others."""
_LONGEST_OF_ALL_S = 60.0
"""Seconds that anybody waits for several in a row."""
_AGAIN_S = 0.001
_mine = threading.local()


@contextmanager
def working() -> Iterator[None]:
    """Do a piece of work that nobody is timed beside; within another one it is a part of that."""
    if getattr(_mine, "works", False):
        yield
        return
    with ExitStack() as held:
        with _locked("turn", fcntl.LOCK_EX):  # behind who waits to time
            held.enter_context(_locked("work", fcntl.LOCK_SH))
        _mine.works = True
        try:
            yield
        finally:
            _mine.works = False


@contextmanager
def timing() -> Iterator[None]:
    """Time something, alone as far as searches go; not within a piece of work."""
    assert not getattr(_mine, "works", False), "nobody can wait for oneself"
    with _locked("turn", fcntl.LOCK_EX), _locked("work", fcntl.LOCK_EX):
        yield


def waited() -> float:
    """Return the seconds that this thread has waited for its turns so far."""
    return float(getattr(_mine, "waited", 0.0))


@contextmanager
def _locked(name: str, kind: int) -> Iterator[None]:
    """Hold one of the machine's locks, or nothing where it does not come free in time; it ends with the process."""
    file = Path(tempfile.gettempdir()) / f"autocompress-{os.getuid()}.{name}"
    try:
        handle = os.open(file, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    except OSError:  # a folder that cannot be written: as if one were alone
        yield
        return
    try:
        began = time.monotonic()
        since, holder = began, os.fstat(handle).st_mtime_ns
        while (now := time.monotonic()) < min(since + _LONGEST_S, began + _LONGEST_OF_ALL_S):
            with suppress(OSError):
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
                os.utime(handle)
                break
            if (latest := os.fstat(handle).st_mtime_ns) != holder:  # it came to somebody else meanwhile
                since, holder = now, latest
            time.sleep(_AGAIN_S)
        _mine.waited = waited() + time.monotonic() - began
        yield
    finally:
        os.close(handle)
