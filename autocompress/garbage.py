"""When Python looks for objects that only refer to each other.

Importing torch and transformers, or reading a long journal, makes millions of objects and hardly any garbage: looking
through them takes a good part of the time.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_NEW_OBJECTS = 10_000
"""Objects made between two looks at the young ones; Python's own number is 700."""


def collect_rarely() -> None:
    """Let this process, which must be one of our own, look rarely, and not at all when it ends."""
    gc.set_threshold(_NEW_OBJECTS)
    atexit.register(gc.freeze)


@contextmanager
def without_collection() -> Iterator[None]:
    """Switch the garbage collector off for a while."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
