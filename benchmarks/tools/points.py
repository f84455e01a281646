"""What the tools' scripts share: the rows, the model, and a folder per point with ``point.json``.

It needs numpy, torch and transformers only and nothing of autocompress, so that it runs in every tool's environment.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

CALIBRATION_ROWS = 1024
"""As many as the demo's run file gives our own search."""
POINT_FILE = "point.json"
FAILURES_FILE = "failures.json"
INPUTS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Rows:
    """Texts of one split as the tokenizer leaves them, one row at its real length, and their classes."""

    input_ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]

    def feeds(self) -> list[dict[str, np.ndarray]]:
        """Return each row as a batch of its own, without padding: int64 arrays by input name."""
        arrays = [np.array([ids], dtype=np.int64) for ids in self.input_ids]
        return [dict(zip(INPUTS, (ids, np.ones_like(ids)), strict=True)) for ids in arrays]


class Prepared:
    """The folder that `prepare.py` wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    def rows(self, split: str, limit: int | None = None) -> Rows:
        """Tokenise the first ``limit`` rows of a split with truncation at the run's limit."""
        from transformers import AutoTokenizer

        with (self.folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file))[:limit]
        tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
        encoded = tokenizer([row["text"] for row in found], truncation=True, max_length=self.meta["max_tokens"])
        return Rows(tuple(map(tuple, encoded["input_ids"])), tuple(int(row["label"]) for row in found))

    def model(self, attention: str = "sdpa") -> Any:
        """Return the classifier in float32, in evaluation mode, with the named implementation of attention."""
        import torch
        from transformers import AutoModelForSequenceClassification

        loaded = AutoModelForSequenceClassification.from_pretrained(
            self.model_folder, dtype=torch.float32, attn_implementation=attention
        )
        return loaded.eval()


class Points:
    """Makes points, one folder each, until the wall-clock budget is spent.

    Args:
        out: folder of the points; what stands there of an earlier call is removed.
        tool: name of the tool.
        packages: packages whose versions are recorded.
        seconds: wall-clock budget; no point is started once it is spent.
    """

    def __init__(self, out: Path, tool: str, packages: Sequence[str], seconds: float) -> None:
        self.out = out
        self.tool = tool
        self.versions = versions_of(packages)
        self.seconds = seconds
        self._started = time.perf_counter()
        self._failures: list[dict[str, str]] = []
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        self._write_failures()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def make(self, name: str, build: Callable[[Path], None], settings: Mapping[str, Any]) -> bool:
        """Let ``build`` fill the point's folder; a failure is told and recorded, and its folder removed.

        Returns:
            Whether the point was made.
        """
        if self.spent > self.seconds:
            self.fail(name, f"not started: the budget of {self.seconds:.0f} s is spent")
            return False
        folder = self.out / name
        folder.mkdir()
        started = time.perf_counter()
        try:
            build(folder)
        except Exception as error:
            shutil.rmtree(folder)
            self.fail(name, f"{type(error).__name__}: {error}")
            return False
        self.record(name, settings, time.perf_counter() - started)
        return True

    def record(self, name: str, settings: Mapping[str, Any], seconds: float, **more: Any) -> None:
        """Write ``point.json`` into the folder of a point whose model files are there."""
        about = {
            "tool": self.tool,
            "name": name,
            "versions": self.versions,
            "settings": dict(settings),
            "seconds": round(seconds, 3),
            **more,
        }
        (self.out / name / POINT_FILE).write_text(json.dumps(about, indent=1, default=str), encoding="utf-8")
        self._write_failures()
        print(f"{self.spent:7.1f} s  {self.tool}  {name}  ({seconds:.1f} s)", flush=True)

    def fail(self, name: str, reason: str) -> None:
        """Tell and record that a point was not made."""
        self._failures.append({"name": name, "reason": reason[:2000]})
        self._write_failures()
        print(f"{self.spent:7.1f} s  {self.tool}  {name}  FAILED: {reason.splitlines()[0]}", flush=True)

    def _write_failures(self) -> None:
        about = {"tool": self.tool, "versions": self.versions, "seconds": self.spent, "failures": self._failures}
        text = json.dumps(about, indent=1)
        (self.out / FAILURES_FILE).write_text(text, encoding="utf-8")


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed versions of ``packages``, leaving out those that are not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def quiet() -> None:
    """Keep the tools off the network: models are local, and usage is not to be reported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OLIVE_DISABLE_TELEMETRY", "1")
