"""Run as a module by an export: read a folder as its users do, in this fresh process, and run prepared rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import autocompress  # noqa: F401 - lets transformers know what the folder holds
from autocompress.hf.program import PROGRAM
from autocompress.rows import read_rows, write_logits

Run = Callable[[dict[str, np.ndarray]], np.ndarray]


def of_transformers(folder: Path) -> Run:
    """Return what runs a folder that transformers reads."""
    from transformers import AutoModelForSequenceClassification

    # A folder that was just written: nothing is fetched, and no code in it is run.
    model = AutoModelForSequenceClassification.from_pretrained(  # nosec B615
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
    ).eval()

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits.numpy()
        return found

    return run


def of_program(file: Path) -> Run:
    """Return what runs a program; its inputs come in the order in which they were prepared."""
    program = torch.export.load(file).module()

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = program(*map(torch.from_numpy, batch.values())).numpy()
        return found

    return run


def main(folder: Path, scratch: Path) -> None:
    """Write the logits of the rows in ``scratch``, ``rows x classes``, to ``scratch``."""
    program = folder / PROGRAM
    write_logits(scratch, read_rows(scratch), of_program(program) if program.exists() else of_transformers(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
