"""Layers of PyTorch that hold weights as they are stored, and compute as the runtimes do.

Weights of 4, 3 and 2 bits lie in the file as planes: one bit of each of eight neighbours to a byte, the lowest plane
first, so that any number of bits leaves none between. They are put together again when a layer is first run. Inputs
that the runtimes multiply as 8-bit integers are rounded to the same grid here, and multiplied as floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from autocompress.pieces import Factor
from autocompress.transforms.quantize import Packed


@dataclass(frozen=True)
class Stored:
    """What a matrix looks like in the file.

    Args:
        bits: of a value: 32, 16, 8, 4, 3 or 2.
        rows: of the matrix: outputs of a layer, rows of a table.
        columns: of the matrix.
        group: values that share a step, below 8 bits; else 0.
        multiples: whether steps of groups are whole multiples of a unit of their row.
        bias: whether there is one.
        rounded: whether what is multiplied is rounded to 8 bits first.
        tokens: of a table that was trimmed, how many tokens there are; else 0.
        half: whether scales of a table are in half precision, as runtimes store them at 8 bits.
        anew: where the range of what it is multiplied with is taken at each call, of how many columns of a token, as a
            number. Earlier versions wrote ``group``, of as many as share a step, and ``call``, of all that is there.
    """

    bits: int
    rows: int
    columns: int
    group: int = 0
    multiples: bool = False
    bias: bool = False
    rounded: bool = False
    tokens: int = 0
    half: bool = False
    anew: str = ""

    @classmethod
    def of(cls, factor: Factor, *, table: bool = False, anew: str = "") -> Stored:
        """Describe a factor of a piece."""
        weight, (rows, columns) = factor.weight, factor.weight.shape
        return cls(
            bits=weight.bits,
            rows=rows,
            columns=columns,
            group=weight.values.shape[2] if weight.bits < 8 else 0,
            multiples=weight.multiples is not None,
            bias=factor.bias is not None,
            rounded=factor.span is not None and not anew,
            tokens=0 if factor.index is None else len(factor.index),
            half=table and weight.bits == 8,
            anew=anew,
        )

    def to_dict(self) -> dict[str, Any]:
        # What older versions do not know is left out where it says nothing.
        return {name: value for name, value in asdict(self).items() if value or name != "anew"}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and type of each tensor in the file, by name."""
        rows, columns, groups = self.rows, self.columns, self.columns // self.group if self.group else 0
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.bits >= 16:
            found["values"] = (rows, columns), torch.float16 if self.bits == 16 else torch.float32
        elif self.bits == 8:
            found["values"], found["scales"] = ((rows, columns), torch.int8), ((rows, 1), torch.float32)
        else:
            found["values"] = (self.bits, -(-rows * columns // 8)), torch.uint8
            found["scales"] = (rows, 1 if self.multiples else groups, 1), torch.float32
        if self.multiples:
            found["multiples"] = (rows, groups, 1), torch.int8
        if self.bias:
            found["bias"] = (rows,), torch.float32
        if self.rounded:
            found["span"] = (2,), torch.float32
        if self.tokens:
            found["index"] = (self.tokens,), torch.int32
        return found


class _Holder(nn.Module):
    """Holds a matrix as it is stored.

    Args:
        stored: what it looks like.
    """

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.stored = stored
        for name, (shape, dtype) in stored.shapes().items():
            # No parameters: integers have no gradients, and there is nothing here to be trained.
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        # Of the type that the model computes in, whose casts it follows.
        self.register_buffer("like", torch.empty(0), persistent=False)
        self._restored: torch.Tensor | None = None
        self.register_load_state_dict_post_hook(_Holder._forget)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Holder:
        """Move and cast it, but for the ends of a grid, whose 0 has to stay one of its steps."""
        span = self._buffers.get("span")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if span is not None:
            self._buffers["span"] = span.to(self.get_buffer("like").device)
        self._restored = None
        return self

    def _forget(self, _: object) -> None:
        """Drop what was made of other numbers."""
        self._restored = None

    def fill(self, factor: Factor) -> None:
        """Take over the numbers of a factor."""
        parts: dict[str, np.ndarray | None] = {
            "values": _in_planes(factor.weight) if self.stored.bits < 8 else factor.weight.values
        }
        parts |= {"scales": factor.weight.scales, "multiples": factor.weight.multiples, "bias": factor.bias}
        if factor.span is not None:
            parts["span"] = np.array([factor.span.low, factor.span.high], dtype=np.float32)
        if factor.index is not None:
            parts["index"] = factor.index.astype(np.int32)
        for name, (shape, dtype) in self.stored.shapes().items():
            part = parts[name]
            assert part is not None, f"{name} is not there"
            tensor = torch.from_numpy(np.ascontiguousarray(part)).to(dtype)
            assert tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}, expected {shape}"
            setattr(self, name, tensor)
        self._restored = None

    def unpacked(self) -> torch.Tensor:
        """Return the values as numbers, in the shape that scales belong to."""
        stored, values = self.stored, self.get_buffer("values")
        if stored.bits >= 8:
            return values
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=values.device)
        bits = (values.unsqueeze(-1) >> shifts) & 1
        weights = 2 ** torch.arange(stored.bits, dtype=torch.int32, device=values.device)
        numbers: torch.Tensor = (bits.flatten(1).to(torch.int32) * weights[:, None]).sum(dim=0)[
            : stored.rows * stored.columns
        ]
        from_zero: torch.Tensor = numbers - 2 ** (stored.bits - 1)
        return from_zero.reshape(stored.rows, -1, stored.group)

    def restored(self) -> torch.Tensor:
        """Return the matrix that the numbers stand for, ``rows x columns``."""
        stored, found = self.stored, self.unpacked()
        if stored.multiples:
            found = found * self.get_buffer("multiples")
        if stored.bits < 16:
            found = found * self.get_buffer("scales")
        return found.reshape(stored.rows, stored.columns).float()

    def matrix(self) -> torch.Tensor:
        """Return `restored` as the model computes, made once; where a program is recorded, it is a part of that."""
        like = self.get_buffer("like")
        if torch.compiler.is_compiling():
            return self.restored().to(like)
        if self._restored is None or (self._restored.device, self._restored.dtype) != (like.device, like.dtype):
            self._restored = self.restored().to(like)
        return self._restored


class PackedLinear(_Holder):
    """A linear layer over a stored matrix."""

    def forward(self, read: torch.Tensor) -> torch.Tensor:
        """Return ``... x rows`` for ``... x columns``."""
        if self.stored.rounded:
            low, high = self.get_buffer("span")
            # As OpenVINO's FakeQuantize with 256 levels: to the nearest, ties to even. Few are ties elsewhere, too.
            steps = torch.round((read.float().clamp(low, high) - low) / (high - low) * 255)
            read = (steps / 255 * (high - low) + low).to(read)
        elif self.stored.anew:
            anew = self.stored.anew
            columns = self.stored.group if anew == "group" else 0 if anew == "call" else int(anew)
            read = _by_group(read, columns) if columns else _by_call(read)
        bias = self.get_buffer("bias").to(read) if self.stored.bias else None
        return functional.linear(read, self.matrix(), bias)


class PackedEmbedding(_Holder):
    """A table over a stored matrix."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return ``... x columns`` for token ids."""
        if self.stored.tokens:
            ids = self.get_buffer("index")[ids].long()
        if not self.stored.half:
            return functional.embedding(ids, self.matrix())
        # Multiplied in single precision: what is rounded otherwise here is rounded otherwise in every layer after it.
        scales = functional.embedding(ids, self.get_buffer("scales").half())
        rows = functional.embedding(ids, self.get_buffer("values")).float() * scales.float()
        return rows.to(self.get_buffer("like"))


def _by_call(read: torch.Tensor) -> torch.Tensor:
    """Round as ONNX Runtime's DynamicQuantizeMatMul does: to 256 levels from the least to the most, 0 among them."""
    low, high = read.amin().clamp(max=0), read.amax().clamp(min=0)
    step = ((high - low) / 255).clamp(min=torch.finfo(read.dtype).tiny)
    zero = torch.round(-low / step)
    return ((torch.round(read / step) + zero).clamp(0, 255) - zero) * step


def _by_group(read: torch.Tensor, group: int) -> torch.Tensor:
    """Round as runtimes do that multiply by 4 bits: each token's groups of columns to 255 levels around 0."""
    parts = read.reshape(*read.shape[:-1], -1, group)
    step = (parts.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(read.dtype).tiny)
    return (torch.round(parts / step) * step).reshape(read.shape)


def _in_planes(weight: Packed) -> np.ndarray:
    """Return values below 8 bits as planes of bits, uint8 ``bits x bytes``."""
    values = weight.from_zero().reshape(-1)
    return np.stack([np.packbits((values >> plane) & 1) for plane in range(weight.bits)])
