"""Python's collector of garbage: off for a while, and rare in processes of our own."""

from __future__ import annotations

import gc
import subprocess
import sys

from autocompress.garbage import without_collection


def test_the_collector_is_back_after_an_error() -> None:
    assert gc.isenabled()
    try:
        with without_collection():
            assert not gc.isenabled()
            raise ValueError
    except ValueError:
        assert gc.isenabled()


def test_a_process_that_collects_rarely_still_collects() -> None:
    """Objects that refer to each other go, and those that are left at the end are let be."""
    code = """
import atexit, gc, weakref
atexit.register(lambda: print(gc.get_freeze_count() > 0))
from autocompress.garbage import collect_rarely
class Node: pass
collect_rarely()
watched = []
for number in range(20_000):
    node = Node()
    node.self = node
    if number == 0:
        watched.append(weakref.ref(node))
print(watched[0]() is None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "True"]
