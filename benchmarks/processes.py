"""The processes of a search, as the kernel lists them."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path


def descendants(pid: int) -> set[int]:
    """Return the processes below ``pid``."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def named(driver: int, title: bytes) -> list[int]:
    """Return the processes below ``driver`` in whose command line ``title`` stands."""
    found = []
    for pid in descendants(driver):
        with contextlib.suppress(OSError):
            if title in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def busy_workers(driver: int) -> list[int]:
    """Return the actor processes below ``driver`` that are evaluating a candidate right now."""
    found = []
    for pid in descendants(driver):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if re.match(rb"ray::\w+\.train\b", title):
            found.append(pid)
    return found
