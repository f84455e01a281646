"""Run as a module by an export: read a folder as its users do, in this fresh process, and run prepared rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

import autocompress  # noqa: F401 - lets transformers know what the folder holds
from autocompress.hf.program import PROGRAM
from autocompress.rows import read_rows, write_logits
from autocompress.runtimes.base import Session


class InPyTorch(Session):
    """An exported folder that PyTorch runs.

    Args:
        call: takes tensors by name, in the order in which they were prepared, and returns logits.
    """

    def __init__(self, call: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]) -> None:
        self._call: Callable[[Mapping[str, torch.Tensor]], torch.Tensor] | None = call

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        assert self._call is not None, "closed"
        with torch.no_grad():
            logits: np.ndarray = self._call({name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()
        return logits

    def close(self) -> None:
        self._call = None


def read(folder: Path, runner: str) -> InPyTorch:
    """Read an exported folder as its users do.

    Args:
        folder: the export.
        runner: what it was written for: ``torch``, whose programs may run code when they are read, or ``transformers``.
    """
    if runner == "torch":
        program = torch.export.load(folder / PROGRAM).module()
        return InPyTorch(lambda tensors: program(*tensors.values()))
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Nothing is fetched, and no code in it is run.
    model = AutoModelForSequenceClassification.from_pretrained(  # nosec B615
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
    ).eval()
    return InPyTorch(lambda tensors: model(**tensors).logits)


def main(folder: Path, scratch: Path, runner: str) -> None:
    """Write the logits of the rows in ``scratch``, ``rows x classes``, to ``scratch``."""
    write_logits(scratch, read_rows(scratch), read(folder, runner).run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
