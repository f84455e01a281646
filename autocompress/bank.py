"""A content-addressed store of what is expensive to make: fine-tuned models, scores, students.

An entry's key is the hash of everything that it was made from. It is written aside and renamed, so that a reader sees
a whole entry or none, and two processes that make the same one do no harm to each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BANK_VERSION = 1
"""Part of every key: raised when what an entry holds changes its meaning."""


def default_bank() -> Path:
    """Return the bank in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "autocompress" / "bank"


class Bank:
    """Folders by kind and key under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, made_from: Mapping[str, Any]) -> Path:
        """Return where the entry made from these things stands or would stand."""
        text = json.dumps({"version": BANK_VERSION, **made_from}, sort_keys=True)
        return self.root / kind / hashlib.sha256(text.encode()).hexdigest()[:24]

    def get(self, kind: str, made_from: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """Return the entry's folder; ``make`` fills a fresh folder if there is none yet."""
        final = self.path(kind, made_from)
        if final.is_dir():
            return final
        aside = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
        try:
            make(aside)
            (aside / "made_from.json").write_text(json.dumps(made_from, sort_keys=True, indent=1), encoding="utf-8")
            try:
                aside.rename(final)
            except OSError:
                # Another process finished the same entry first; its content is the same.
                if not final.is_dir():
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return final
