"""The arithmetic of quantisation, shared by the runtimes.

Weights at 8 bits are symmetric, with a scale per output channel. At 4, 3 and 2 bits each group along the input has a
step of its own. There is one more number below zero than above it, so a step may be negative: the end with more room is
turned to the side that needs it. Of a few steps the one is taken that leaves the smallest error. Where it is known what
a layer reads, weights make up for each other's rounding (GPTQ).

Where products are computed in integers, steps are whole multiples of one unit per output channel, so that the runtime
unpacks a group to 8-bit numbers, once, when it loads the file, and computes as fast as with weights that are stored in
8 bits: Lin et al. 2024, "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", section 4.1.
Where the CPU's integer products overflow, weights use 7 bits of them.

Activations at 8 bits use one asymmetric range per layer input, the mean over calibration rows of each row's smallest
and largest value.
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
from autocompress.decisions import Quantize
from autocompress.errors import PlanError
from autocompress.model import EncoderModel
from autocompress.task import Batch

_CLIPS = (1.0, 0.92, 0.84, 0.76, 0.68)
"""Shares of a group's largest magnitude that are tried as the far end of its grid, besides that which clips nothing."""
_PASSES = 1
"""Times that values are chosen anew after GPTQ; a second one gains little for its time."""
_TINY = float(np.finfo(np.float16).smallest_subnormal)


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
    """A weight matrix in the numbers that are stored: ``values * multiples * scales`` approximates it.

    Args:
        bits: 32, 16, 8, 4, 3 or 2.
        values: float32 or float16 ``out x in``; int8 ``out x in`` at 8 bits, ``out x groups x group`` below.
        scales: float32, ``out x 1`` at 8 bits; below, ``out x 1 x 1`` where there are multiples, else
            ``out x groups x 1``; None where values are floats.
        multiples: how many times its row's scale the step of a group is, int8 ``out x groups x 1``, or None.
    """

    bits: int
    values: np.ndarray
    scales: np.ndarray | None = None
    multiples: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Sizes of the matrix, ``out x in``."""
        return self.values.shape[0], math.prod(self.values.shape[1:])

    @property
    def zero(self) -> int:
        """What is added to values below 8 bits where they are stored from 0 on."""
        return int(2 ** (self.bits - 1))

    def regrouped(self, columns: int) -> Packed:
        """Return the same matrix, without multiples, with steps for groups of fewer ``columns``."""
        assert self.scales is not None and self.multiples is None
        rows, _, group = self.values.shape
        assert group % columns == 0, f"groups of {group} do not fall into such of {columns}"
        scales = np.repeat(self.scales, group // columns, axis=1)
        return Packed(self.bits, self.values.reshape(rows, -1, columns), scales)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return its numbers by name, to be written to a file."""
        parts = {f"values.{self.bits}": self.values, "scales": self.scales, "multiples": self.multiples}
        return {name: np.ascontiguousarray(part) for name, part in parts.items() if part is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> Packed:
        """Return the one that has these `tensors`; others are not read."""
        [(name, values)] = ((name, each) for name, each in tensors.items() if name.startswith("values."))
        return cls(int(name.removeprefix("values.")), values, tensors.get("scales"), tensors.get("multiples"))

    def from_zero(self) -> np.ndarray:
        """Return values below 8 bits as they are stored from 0 on, uint8."""
        return (self.values + np.int8(self.zero)).view(np.uint8)

    def restored(self) -> np.ndarray:
        """Return the approximation, ``out x in``, float32."""
        values = self.values if self.multiples is None else self.values * self.multiples
        scaled = values if self.scales is None else values * self.scales
        return np.asarray(scaled, dtype=np.float32).reshape(self.shape)


def limits(decision: Quantize) -> tuple[int, int]:
    """Return the smallest and the largest value of a weight of 8 or fewer bits that something is multiplied by."""
    if decision.weight_bits == 8:
        return -_largest(), _largest()
    return -int(2 ** (decision.weight_bits - 1)), int(2 ** (decision.weight_bits - 1)) - 1


def _largest() -> int:
    # Where sums of integer products would overflow, weights leave one bit to them.
    return 64 if machine.adds_in_16_bits() else 127


def packed(
    weight: np.ndarray, decision: Quantize | None, *, looked_up: bool = False, gram: np.ndarray | None = None
) -> Packed:
    """Return ``weight`` (``out x in``, float32) as ``decision`` stores it, or as it is.

    Args:
        weight: of a linear layer, or an embedding table.
        decision: what is decided at its site.
        looked_up: whether it is a table, which nothing is multiplied by.
        gram: second moments of what the layer reads, ``in x in``, where fewer than 8 bits are fitted to them.

    Raises:
        PlanError: if groups do not fill a row.
    """
    if decision is None:
        return Packed(32, np.ascontiguousarray(weight, dtype=np.float32))
    if decision.weight_bits == 16:
        return Packed(16, weight.astype(np.float16))
    largest = 127 if looked_up else _largest()
    if decision.weight_bits == 8:
        return per_channel(weight, largest=largest)
    if gram is None:
        return per_group(weight, decision, largest=largest)
    return compensated(weight, decision, gram, largest=largest)


def per_channel(weight: np.ndarray, *, largest: int = 127) -> Packed:
    """Quantise ``weight`` (``out x in``) to 8 bits, -``largest``..``largest``, with one scale per output channel."""
    scales = np.abs(weight).max(axis=1, keepdims=True) / largest
    scales[scales == 0] = 1.0
    values = np.rint(weight / scales).astype(np.int8)
    return Packed(8, values, scales.astype(np.float32))


def per_group(weight: np.ndarray, decision: Quantize, *, largest: int = 127) -> Packed:
    """Quantise ``weight`` (``out x in``) below 8 bits, each number by itself.

    Raises:
        PlanError: if the groups do not fill a row.
    """
    grid = _Grid.of(weight, decision, largest)
    grouped = grid.grouped(weight)
    steps = np.stack([grid.steps(group) for group in grouped])
    return grid.packed(grid.rounded(grouped, steps), steps)


def compensated(weight: np.ndarray, decision: Quantize, gram: np.ndarray, *, largest: int = 127) -> Packed:
    """Quantise like `per_group`, the inputs of a row one after the other, so that later ones make up for earlier ones.

    What rounding one of them changes in the output is taken out of those that are not rounded yet as well as their
    correlations allow: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", algorithm 1, with groups for blocks. Errors count for the choice of a step by what the later ones
    cannot make up for, eq. 2 there.

    Args:
        weight: ``out x in``.
        decision: fewer than 8 bits.
        gram: ``in x in``, float64, second moments of the input; positive definite.
        largest: magnitude up to which the unpacked numbers of integer products go.
    """
    grid = _Grid.of(weight, decision, largest)
    grouped, upper = grid.grouped(weight), _upper(gram)
    left = grouped.copy()
    values, errors = np.empty_like(left), np.empty_like(left[0])
    steps = np.empty((len(left), 1, len(weight)), dtype=np.float32)
    for group, inside in enumerate(left):
        start, end = (grid.size * n for n in (group, group + 1))
        own = upper[start:end, start:end]
        shares = np.diag(own)
        steps[group] = grid.steps(inside, 1 / np.square(shares)[:, None])
        for n, weights in enumerate(inside):
            values[group, n] = grid.rounded(weights, steps[group, 0])
            errors[n] = (weights - values[group, n] * steps[group, 0]) / shares[n]
            inside[n + 1 :] -= own[n, n + 1 :, None] * errors[n]
        later = left[group + 1 :].reshape(-1, len(weight))
        later -= upper[start:end, end:].T @ errors
    for _ in range(_PASSES):
        _refine(grouped, gram.astype(np.float32), grid, values, steps)
    return grid.packed(values, steps)


def _upper(gram: np.ndarray) -> np.ndarray:
    """Return the upper factor of the inverse, float32: its row n tells how those after n make up for n."""
    # A fraction of the work of inverting the matrix and decomposing the inverse; only the first half needs precision.
    root = torch.linalg.cholesky(torch.from_numpy(gram).flip(0, 1)).flip(0, 1).float()
    return np.asarray(torch.linalg.solve_triangular(root, torch.eye(len(root)), upper=True).numpy())


def _refine(grouped: np.ndarray, gram: np.ndarray, grid: _Grid, values: np.ndarray, steps: np.ndarray) -> None:
    """Choose each step and each value anew, given all others, in place; none of it makes the output's error larger.

    Coordinate descent, as in Behdin et al. 2023, "QuantEase: Optimization-based Quantization for Language Models",
    algorithm 1, with the step of a group as one more coordinate.
    """
    # Half the slope of the output's squared error by each weight, with the sign turned.
    pull = gram @ (grouped - values * steps).reshape(len(gram), -1)
    for group, inside in enumerate(values):
        rows = slice(grid.size * group, grid.size * (group + 1))
        within, before = gram[rows, rows], inside * steps[group]
        bent = np.maximum(((within @ inside) * inside).sum(axis=0), _TINY)
        steps[group] = step = grid.allowed(steps[group] + (pull[rows] * inside).sum(axis=0) / bent)
        here = pull[rows] - within @ (inside * step - before)
        for n, old in enumerate(inside * step):
            inside[n] = grid.rounded(old + here[n] / within[n, n], step[0])
            here[n + 1 :] -= within[n, n + 1 :, None] * (inside[n] * step[0] - old)
        pull -= gram[:, rows] @ (inside * step - before)


@dataclass(frozen=True)
class _Grid:
    """The numbers that groups of a matrix can be stored in.

    Work is done on ``groups x group x out``, where what is changed at once lies side by side.

    Args:
        bits: of a value, from ``lowest`` to ``-lowest - 1``.
        size: of a group.
        units: ``out``, what steps are whole multiples of, or None where they are half-precision floats.
        most: the largest multiple.
    """

    bits: int
    size: int
    units: np.ndarray | None
    most: int

    @classmethod
    def of(cls, weight: np.ndarray, decision: Quantize, largest: int) -> _Grid:
        """Return that of ``weight``, ``out x in``, whose unpacked numbers go up to ``largest``.

        Raises:
            PlanError: if the groups do not fill a row.
        """
        if weight.shape[1] % decision.group_size:
            raise PlanError(
                f"Quantize.group_size: must divide the input width {weight.shape[1]}, got {decision.group_size}"
            )
        bits = decision.weight_bits
        most = largest // 2 ** (bits - 1)
        if not decision.whole_steps:
            return cls(bits, decision.group_size, None, most)
        units = np.abs(weight).max(axis=1) / (most * 2 ** (bits - 1))
        return cls(bits, decision.group_size, np.where(units == 0, 1.0, units).astype(np.float32), most)

    @property
    def lowest(self) -> int:
        return -int(2 ** (self.bits - 1))

    def grouped(self, weight: np.ndarray) -> np.ndarray:
        """Return ``weight``, ``out x in``, as ``groups x group x out``, float32."""
        return np.ascontiguousarray(weight.T, dtype=np.float32).reshape(-1, self.size, len(weight))

    def rounded(self, weight: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Return the nearest values at given steps."""
        values: np.ndarray = np.rint(weight / steps)
        return values.clip(self.lowest, -self.lowest - 1, out=values)

    def steps(self, group: np.ndarray, costs: np.ndarray | float = 1.0) -> np.ndarray:
        """Return the best of a few steps for one group of each row, ``group x out``, as ``1 x out``.

        Args:
            group: its weights.
            costs: what a squared error counts, ``group x 1``.
        """
        farthest = np.take_along_axis(group, np.abs(group).argmax(axis=0)[None], axis=0)
        ends = [self.lowest + 1, *(side * self.lowest / clip for side in (1, -1) for clip in _CLIPS)]
        best, least = self.allowed(farthest / ends[0]), np.inf
        for end in ends:
            steps = self.allowed(farthest / end)
            errors = (costs * np.square(self.rounded(group, steps) * steps - group)).sum(axis=0, keepdims=True)
            best, least = np.where(errors < least, steps, best), np.minimum(errors, least)
        return best

    def allowed(self, steps: np.ndarray) -> np.ndarray:
        """Return the steps that can be stored next to ``steps``, none of them zero."""
        if self.units is None:
            # As it is stored: rounding the step is an error that can be made up for, too.
            half = steps.astype(np.float16).astype(np.float32)
            return np.asarray(np.where(half == 0, np.copysign(_TINY, steps), half), dtype=np.float32)
        multiples = np.clip(np.rint(steps / self.units), -self.most, self.most)
        return np.asarray(np.where(multiples == 0, np.copysign(1.0, steps), multiples) * self.units, dtype=np.float32)

    def packed(self, values: np.ndarray, steps: np.ndarray) -> Packed:
        """Return ``values`` at ``steps`` (``groups x group x out``, ``groups x 1 x out``) as they are stored."""
        values = np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.int8)
        steps = np.ascontiguousarray(steps.transpose(2, 0, 1), dtype=np.float32)
        if self.units is None:
            return Packed(self.bits, values, steps)
        units = self.units[:, None, None]
        return Packed(self.bits, values, units, np.rint(steps / units).astype(np.int8))


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

    @property
    def step(self) -> float:
        """Return the distance of two neighbours."""
        return (self.high - self.low) / 255

    @property
    def zero(self) -> int:
        """Return the number, 0 to 255, that stands for 0."""
        return round(-self.low / self.step)


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
