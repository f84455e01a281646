"""Fresh processes of this Python."""

from __future__ import annotations

import os
import sys


def python(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a Python that finds the modules that this one finds.

    What lies in the folder that it is started in is not among them, unless it is for this one.
    """
    known = os.pathsep.join(filter(None, sys.path))
    return [sys.executable, "-P", *arguments], {**os.environ, "PYTHONPATH": known}
