"""The arithmetic of quantisation, shared by the runtimes.

Weights are symmetric: per output channel at 8 bits, per group along the input at 4 bits, where the scale of each group
is the one of a few that leaves the smallest squared error. Where it is known what a layer reads, weights at 4 bits make
up for each other's rounding (GPTQ). Where the CPU's integer products overflow, weights at 8 bits
use 7 of them. Activations at 8 bits use one asymmetric range per layer input, the mean over calibration rows of each
row's smallest and largest value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from autocompress import machine
from autocompress.anatomy import Site
from autocompress.errors import PlanError
from autocompress.model import EncoderModel
from autocompress.plan import Quantize
from autocompress.task import Batch

_CLIPS = (1.0, 0.92, 0.84)
"""Shares of a group's largest magnitude that are tried as the end of the 4-bit grid."""


def check_groups(site: Site, decision: Quantize, rank: int) -> None:
    """Refuse groups that do not fill every input width at ``site``; ``rank`` is that of a second factor, or 0.

    Raises:
        PlanError: naming the width.
    """
    for width in (site.inner, site.outer, rank):
        if decision.group_size and width % decision.group_size:
            raise PlanError(f"{site.name}: group_size must divide the input width {width}, got {decision.group_size}")


@dataclass(frozen=True)
class Packed:
    """A weight matrix in the numbers that are stored: ``values * scales`` approximates it.

    Args:
        bits: 32, 16, 8 or 4.
        values: float32 or float16 ``out x in``; int8 ``out x in`` at 8 bits, ``out x groups x group`` at 4.
        scales: float32, ``out x 1`` at 8 bits, ``out x groups x 1`` at 4, None where values are floats.
    """

    bits: int
    values: np.ndarray
    scales: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Sizes of the matrix, ``out x in``."""
        return self.values.shape[0], math.prod(self.values.shape[1:])

    @property
    def stored_bytes(self) -> int:
        """Bytes of values and float32 scales in a file that packs two 4-bit numbers in one byte."""
        values = self.values.size // 2 if self.bits == 4 else self.values.nbytes
        return values + (0 if self.scales is None else self.scales.nbytes)

    def restored(self) -> np.ndarray:
        """Return the approximation, ``out x in``, float32."""
        scaled = self.values if self.scales is None else self.values * self.scales
        return np.asarray(scaled, dtype=np.float32).reshape(self.shape)


def packed(weight: np.ndarray, decision: Quantize | None, *, looked_up: bool = False) -> Packed:
    """Return ``weight`` (``out x in``, float32) as ``decision`` stores it, or as it is.

    Args:
        weight: of a linear layer, or an embedding table.
        decision: what is decided at its site.
        looked_up: whether it is a table, which nothing is multiplied by.
    """
    if decision is None:
        return Packed(32, np.ascontiguousarray(weight, dtype=np.float32))
    if decision.weight_bits == 16:
        return Packed(16, weight.astype(np.float16))
    if decision.weight_bits == 4:
        return per_group(weight, decision.group_size)
    # Where sums of integer products would overflow, weights leave one bit to them.
    return per_channel(weight, largest=64 if machine.adds_in_16_bits() and not looked_up else 127)


def per_channel(weight: np.ndarray, *, largest: int = 127) -> Packed:
    """Quantise ``weight`` (``out x in``) to 8 bits, -``largest``..``largest``, with one scale per output channel."""
    scales = np.abs(weight).max(axis=1, keepdims=True) / largest
    scales[scales == 0] = 1.0
    values = np.rint(weight / scales).astype(np.int8)
    return Packed(8, values, scales.astype(np.float32))


def per_group(weight: np.ndarray, group_size: int) -> Packed:
    """Quantise ``weight`` (``out x in``) to 4 bits, -8..7, with one scale per ``group_size`` inputs.

    Raises:
        PlanError: if the groups do not fill a row.
    """
    rows, width = weight.shape
    if width % group_size:
        raise PlanError(f"Quantize.group_size: must divide the input width {width}, got {group_size}")
    grouped = weight.reshape(rows, width // group_size, group_size).astype(np.float32)
    largest = np.abs(grouped).max(axis=2, keepdims=True)
    largest[largest == 0] = 7.0
    best_values, best_scales, best_error = None, None, None
    for clip in _CLIPS:
        scales = largest * np.float32(clip / 7.0)
        values = np.clip(np.rint(grouped / scales), -8, 7)
        error = np.square(values * scales - grouped).sum(axis=2, keepdims=True)
        if best_values is None:
            best_values, best_scales, best_error = values, scales, error
        else:
            better = error < best_error
            best_values = np.where(better, values, best_values)
            best_scales = np.where(better, scales, best_scales)
            best_error = np.where(better, error, best_error)
    assert best_values is not None and best_scales is not None
    return Packed(4, best_values.astype(np.int8), best_scales.astype(np.float32))


def compensated(weight: np.ndarray, group_size: int, gram: np.ndarray) -> Packed:
    """Quantise like `per_group`, the inputs of a row one after the other, so that later ones make up for earlier ones.

    What rounding one of them changes in the output is taken out of those that are not rounded yet as well as their
    correlations allow: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", algorithm 1, with groups for blocks.

    Args:
        weight: ``out x in``.
        group_size: divides ``in``.
        gram: ``in x in``, float64, second moments of the input; positive definite.
    """
    rows, width = weight.shape
    # The upper factor of the inverse: its row n tells how those after n make up for n.
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    left = weight.astype(np.float64)
    values = np.empty((rows, width // group_size, group_size), dtype=np.int8)
    scales = np.empty((rows, width // group_size, 1), dtype=np.float32)
    for group, start in enumerate(range(0, width, group_size)):
        end = start + group_size
        # As it is stored: rounding the scale is an error that can be made up for, too.
        found = per_group(left[:, start:end], group_size).scales
        assert found is not None
        step = np.maximum(found[:, 0, 0].astype(np.float16), np.finfo(np.float16).tiny)
        scales[:, group, 0] = step
        errors = np.empty((rows, group_size))
        for column in range(start, end):
            rounded = np.clip(np.rint(left[:, column] / step), -8, 7)
            values[:, group, column - start] = rounded
            error = (left[:, column] - rounded * step) / upper[column, column]
            left[:, column + 1 : end] -= np.outer(error, upper[column, column + 1 : end])
            errors[:, column - start] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    return Packed(4, values, scales)


@dataclass(frozen=True)
class ActivationRange:
    """Ends of an 8-bit asymmetric grid that holds zero exactly."""

    low: float
    high: float

    @classmethod
    def around(cls, low: float, high: float) -> ActivationRange:
        """Widen an observed range so that zero is one of its 256 steps."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / 255 or 1.0
        zero = round(-low / step)
        return cls(-zero * step, (255 - zero) * step)


@dataclass(frozen=True)
class Activations:
    """What the linear layers of a model read on calibration rows, padding left out.

    Args:
        values: ``tokens x channels`` (``rows x channels`` behind the pooling), float32, by the path of the first layer
            that reads the tensor; of a block that is run several times, one run after the other.
        readers: for each linear layer's path, the path under which its input stands.
        starts: the first token of each row.
        tokens: of all rows.
    """

    values: Mapping[str, np.ndarray]
    readers: Mapping[str, str]
    starts: np.ndarray
    tokens: int

    def read_by(self, path: str) -> np.ndarray:
        """Return the input of the layer at ``path``, ``tokens x channels``."""
        return self.values[self.readers[path]]

    def span(self, values: np.ndarray) -> ActivationRange:
        """Return the 8-bit range of ``values`` (``tokens x channels``): the mean over rows of what each row reaches.

        Of a layer that is run several times, that is what a row reaches in any of its runs.
        """
        rows = len(self.starts)
        runs, starts = (len(values) // self.tokens, self.starts) if len(values) > rows else (1, np.arange(rows))
        lows, highs = values.min(axis=1).reshape(runs, -1), values.max(axis=1).reshape(runs, -1)
        low = np.minimum.reduceat(lows.min(axis=0), starts).mean()
        high = np.maximum.reduceat(highs.max(axis=0), starts).mean()
        return ActivationRange.around(float(low), float(high))


def observe(model: EncoderModel, batches: Sequence[Batch]) -> Activations:
    """Run ``batches`` and keep the input of every linear layer; the model is left unchanged."""
    found: dict[str, list[list[np.ndarray]]] = {}
    readers: dict[str, str] = {}
    lengths: list[int] = []
    mask = torch.zeros(0)
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    runs: Counter[str] = Counter()

    def note(path: str) -> object:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            value = inputs[0]
            # Query, key and value read one tensor, which is kept once; held, so that its id stays its own.
            first = readers.setdefault(path, seen.setdefault(id(value), (path, value))[0])
            if first == path:
                tokens = value[mask.bool()] if value.ndim == 3 and value.shape[:2] == mask.shape else value
                by_run = found.setdefault(path, [])
                if runs[path] == len(by_run):
                    by_run.append([])
                by_run[runs[path]].append(tokens.flatten(0, -2).numpy().copy())
                runs[path] += 1

        return hook

    handles = [
        layer.register_forward_pre_hook(note(path))  # type: ignore[arg-type]
        for path, layer in model.module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.attention_mask
                lengths += mask.sum(dim=1).tolist()
                seen.clear()
                runs.clear()
                model.module(**batch.inputs())
    finally:
        for handle in handles:
            handle.remove()
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    values = {path: np.concatenate([part for parts in by_run for part in parts]) for path, by_run in found.items()}
    return Activations(values, readers, starts, sum(lengths))
