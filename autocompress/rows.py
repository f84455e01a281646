"""Rows that a fresh process runs, and the logits that come back: two files in a folder that both know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autocompress.task import Batch

LOGITS_FILE = "logits.npy"
_ROWS_FILE = "rows.npz"


@dataclass(frozen=True)
class Prepared:
    """Inputs of one call.

    Args:
        inputs: int64 arrays, ``batch x tokens``, by name.
        rows: whose they are, in the order of the split.
    """

    inputs: dict[str, np.ndarray]
    rows: np.ndarray


def write_rows(folder: Path, batches: Iterable[Batch]) -> None:
    """Write the batches that are to be run."""
    arrays: dict[str, np.ndarray] = {}
    for number, batch in enumerate(batches):
        arrays |= {f"{number}/{name}": array for name, array in batch.arrays().items()}
        arrays[f"{number}/rows"] = batch.rows.numpy()
    np.savez(folder / _ROWS_FILE, **arrays)  # type: ignore[arg-type]


def read_rows(folder: Path) -> list[Prepared]:
    """Read what `write_rows` wrote."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(folder / _ROWS_FILE, allow_pickle=False) as prepared:
        for key in prepared.files:
            number, name = key.split("/")
            found.setdefault(number, {})[name] = prepared[key]
    return [Prepared({n: a for n, a in batch.items() if n != "rows"}, batch["rows"]) for batch in found.values()]


def write_logits(folder: Path, batches: Iterable[Prepared], run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> None:
    """Run all batches and write their logits in the order of the rows, ``rows x classes``."""
    parts = [(batch.rows, run(batch.inputs)) for batch in batches]
    rows, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
    ordered = np.empty_like(logits)
    ordered[rows] = logits
    np.save(folder / LOGITS_FILE, ordered, allow_pickle=False)


def read_logits(folder: Path) -> np.ndarray:
    """Return the logits that lie in ``folder``, ``rows x classes``, such as an artefact was scored with."""
    found: np.ndarray = np.load(folder / LOGITS_FILE, allow_pickle=False)
    return found
