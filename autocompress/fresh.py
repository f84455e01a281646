"""Fresh processes of this Python, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

LEAST_PATIENCE_S, PATIENCE = 300, 20
"""Seconds that a fresh process has at least, and how many times what its runs should take."""
_END_S = 5.0
"""Time in which the kernel takes down what was killed."""


def python(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a Python that finds the modules that this one finds.

    What lies in the folder that it is started in is not among them, unless it is for this one.
    """
    known = os.pathsep.join(filter(None, sys.path))
    return [sys.executable, "-P", *arguments], {**os.environ, "PYTHONPATH": known}


def patience_s(runs: int, longest_s: float) -> float:
    """Return how many seconds a process may take that makes so many runs of a model, none of which takes longer."""
    return LEAST_PATIENCE_S + PATIENCE * runs * longest_s


def exited(pid: int, within_s: float) -> None:
    """Wait so long for a child to exit, and do not ask for its status: until that is done its number stays its own."""
    until = time.monotonic() + within_s
    with contextlib.suppress(ChildProcessError):
        while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) and time.monotonic() < until:
            time.sleep(0.02)


def end(session: int) -> None:
    """Kill what runs in a session (setsid(2)) of this number; return when it is gone, or after 5 s.

    A process group would not do: Ray gives each of its workers a group of its own.

    Args:
        session: number of its first process, which has not been asked for its status yet.
    """
    until = time.monotonic() + _END_S
    while (left := _running(session)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _running(session: int) -> set[int]:
    """Return the processes of a session; not those that have ended and that nobody has asked for their status yet."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, _, its_session, *_ = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(its_session) == session and state not in "ZX":
                found.add(int(stat.parent.name))
    return found
