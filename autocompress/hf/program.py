"""A compressed classifier as a program of ``torch.export``, which runs where nothing but PyTorch is.

The program holds the weights as they are stored and unpacks them when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from autocompress.errors import ExportError, first_line
from autocompress.runtimes.base import LogitsOnly

PROGRAM = "program.pt2"


def write_program(model: nn.Module, inputs: Sequence[str], most_tokens: int, file: Path) -> int:
    """Write a classifier as a program for any number of rows and any length up to ``most_tokens``.

    Args:
        model: takes ``inputs`` by name, each int64 ``batch x tokens``, and has ``logits`` in what it returns.
        inputs: their names, in the order in which the program takes them.
        most_tokens: of a text.
        file: to write.

    Returns:
        Its bytes.

    Raises:
        ExportError: if the model cannot be recorded as one program.
    """
    torch.export.save(_recorded(model, inputs, most_tokens), file)
    return file.stat().st_size


def require_recordable(model: nn.Module, inputs: Sequence[str], most_tokens: int) -> None:
    """Refuse a model of which no program can be made; the arguments are those of `write_program`.

    Raises:
        ExportError: if it cannot be recorded.
    """
    _recorded(model, inputs, most_tokens)


def _recorded(model: nn.Module, inputs: Sequence[str], most_tokens: int) -> torch.export.ExportedProgram:
    example = tuple(torch.ones(2, min(8, most_tokens), dtype=torch.int64) for _ in inputs)
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens", max=most_tokens)
    shapes = (tuple({0: rows, 1: tokens} for _ in inputs),)
    try:
        with torch.no_grad():
            return torch.export.export(LogitsOnly(model, inputs).eval(), example, dynamic_shapes=shapes)
    # What torch raises here has no common base below Exception, and is about the model alone.
    except Exception as error:
        said = first_line(error)
        raise ExportError(f"export: this architecture cannot be recorded by torch.export ({said})") from None
