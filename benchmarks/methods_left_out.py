"""Hold methods that no plan offers against those that it does: ``results/benchmarks/methods-left-out.json``.

``python benchmarks/methods_left_out.py`` gives the fine-tuned demo model other weights, in torch: those of the blocks'
linear layers, or the table of tokens, once by a method that neither runtime can store or execute, or that was found not
to pay, and once by what a plan does at as many bytes or fewer. All else stays in float32. A figure below zero is what
the method would lose. Accuracies are of the search and of the held-out test rows, with a paired bootstrap interval.
Nothing is trained. A comparison that is on file is not made again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from figures import Figures
from held_out import DATA, add_comparison, hits

from autocompress import training
from autocompress.config import RunConfig
from autocompress.decisions import Quantize
from autocompress.evaluate import Workshop
from autocompress.model import ROLES
from autocompress.transforms.moments import Moments, same_in_the_mean
from autocompress.transforms.quantize import ActivationRange, Activations, observe, packed, per_channel

GROUP = 64
"""Weights that share a scale, here and in the plans that are compared with."""
ROUNDS = 20
"""Of k-means."""
SMOOTH = 0.5
"""Share of the range that SmoothQuant moves into the weights: alpha, as in most of its paper."""


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block.

    Args:
        path: of the module.
        weight: ``out x in``, float32.
        moments: of what it reads, by which a plan fits few bits.
        seen: what all layers read on calibration rows.
    """

    path: str
    weight: np.ndarray
    moments: Moments
    seen: Activations

    @property
    def read(self) -> np.ndarray:
        """What it reads, ``tokens x in``."""
        return self.seen.read_by(self.path)

    @cached_property
    def energy(self) -> np.ndarray:
        """Mean squares of what it reads, ``in``."""
        return np.asarray(np.square(self.read, dtype=np.float64).mean(axis=0))


@dataclass(frozen=True)
class Table:
    """The table of tokens.

    Args:
        path: of the module.
        weight: ``tokens x width``, float32.
        counts: how often the training texts have each token, ``tokens``.
    """

    path: str
    weight: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Stand:
    """What stands in a layer's place: its weight and, if it reads 8-bit numbers, their range after a division."""

    weight: np.ndarray
    span: ActivationRange | None = None
    divided: np.ndarray | None = None


OfLayer = Callable[[Layer], Stand]
OfTable = Callable[[Table], Stand]


def ours(bits: int, *, fitted: bool = True) -> OfLayer:
    """Return what a plan does at few bits; not ``fitted`` is each number rounded by itself."""
    decision = Quantize(weight_bits=bits, group_size=GROUP)

    def method(layer: Layer) -> Stand:
        gram = layer.moments.gram(centred=True).numpy() if fitted else None
        return Stand(packed(layer.weight, decision, gram=gram).restored())

    return method


def table_of_4_bits(table: Table) -> Stand:
    """Return the table as a plan stores it."""
    return Stand(packed(table.weight, Quantize(weight_bits=4, group_size=GROUP), looked_up=True).restored())


def bits_of(bits: int) -> float:
    """Return what a weight of a plan takes at few bits, with its share of a group's step."""
    step = 8 if Quantize(weight_bits=bits, group_size=GROUP).whole_steps else 16
    return bits + step / GROUP


def unstructured(bits: int) -> OfLayer:
    """Return 8-bit weights with zeros anywhere, told by one bit each, in as many bytes as ``bits`` take in a plan.

    What is kept has the largest product of magnitude and what is read there in each row: Sun et al. 2024, "A Simple and
    Effective Pruning Approach for Large Language Models" (Wanda).
    """

    def method(layer: Layer) -> Stand:
        keep = math.ceil((bits_of(bits) - 1) / 8 * layer.weight.shape[1])
        return Stand(_of_largest(layer, layer.weight.shape[1], keep))

    return method


def two_of_four(layer: Layer) -> Stand:
    """Return 8-bit weights of which two in four are zero: 5 bits a weight, with 4 bits a group that say which."""
    return Stand(_of_largest(layer, 4, 2))


def _of_largest(layer: Layer, size: int, keep: int) -> np.ndarray:
    """Return the weight with the strongest ``keep`` in each ``size`` of a row, rounded to 8 bits."""
    grouped = (np.abs(layer.weight) * np.sqrt(layer.energy)).reshape(len(layer.weight), -1, size)
    least = np.sort(grouped, axis=2)[:, :, -keep, None]
    return per_channel(layer.weight * (grouped >= least).reshape(layer.weight.shape)).restored()


def k_means(bits: int) -> OfLayer:
    """Return weights of a codebook a matrix and a scale a group, found by k-means that counts what is read.

    Han et al. 2016, "Deep Compression", section 3; weighted as in Kim et al. 2024, "SqueezeLLM", section 4.1, by what
    an error of each weight does to the output.
    """

    def method(layer: Layer) -> Stand:
        scaled, scales = _scaled(layer.weight)
        flat = scaled.ravel()
        counts = (np.broadcast_to(layer.energy, layer.weight.shape).reshape(scaled.shape) * scales**2).ravel()
        code = np.quantile(flat, (np.arange(2**bits) + 0.5) / 2**bits)
        for _ in range(ROUNDS):
            nearest = _nearest(flat, code)
            total = np.bincount(nearest, counts, len(code))
            moved = np.bincount(nearest, counts * flat, len(code)) / np.maximum(total, 1e-30)
            code = np.sort(np.where(total > 0, moved, code))
        return Stand((code[_nearest(flat, code)].reshape(scaled.shape) * scales).reshape(layer.weight.shape))

    return method


def normal_floats(layer: Layer) -> Stand:
    """Return weights of 16 values that a normal distribution takes about equally often, with a scale a group.

    NF4 of Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", eq. 4.
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.5 * (1 / 32 + 1 / 30)
    below = normal.icdf(torch.linspace(offset, 0.5, 8))
    above = -normal.icdf(torch.linspace(offset, 0.5, 9))
    code = torch.cat([below, above.flip(0)[1:]]).numpy()
    code = np.sort(code / np.abs(code).max())
    scaled, scales = _scaled(layer.weight)
    return Stand((code[_nearest(scaled.ravel(), code)].reshape(scaled.shape) * scales).reshape(layer.weight.shape))


def asymmetric(bits: int) -> OfLayer:
    """Return weights rounded to the nearest on grids from each group's smallest to its largest, with a zero point."""

    def method(layer: Layer) -> Stand:
        grouped = layer.weight.reshape(len(layer.weight), -1, GROUP)
        low, high = (np.minimum(grouped.min(2, keepdims=True), 0), np.maximum(grouped.max(2, keepdims=True), 0))
        steps = np.maximum((high - low) / (2**bits - 1), 1e-12)
        zero = np.rint(-low / steps)
        values = np.clip(np.rint(grouped / steps) + zero, 0, 2**bits - 1)
        return Stand(((values - zero) * steps).reshape(layer.weight.shape))

    return method


def binary(layer: Layer) -> Stand:
    """Return signs with a scale a group, which is their mean magnitude: Rastegari et al. 2016, XNOR-Net, eq. 6."""
    grouped = layer.weight.reshape(len(layer.weight), -1, GROUP)
    return Stand((np.sign(grouped) * np.abs(grouped).mean(2, keepdims=True)).reshape(layer.weight.shape))


def w8a8(layer: Layer) -> Stand:
    """Return what a plan does at 8 bits with 8-bit activations."""
    return Stand(per_channel(layer.weight).restored(), layer.seen.span(layer.read))


def smooth(layer: Layer) -> Stand:
    """Return the same after channels of large inputs were divided, and their weights multiplied.

    Xiao et al. 2023, "SmoothQuant", eq. 4. The division is an operation of its own here: these encoders normalise what
    goes into a layer and into the sum behind it alike, so that it has nowhere to be folded into.
    """
    reach, largest = (np.maximum(np.abs(of).max(axis=0), 1e-6) for of in (layer.read, layer.weight))
    divided = reach**SMOOTH / largest ** (1 - SMOOTH)
    span = layer.seen.span(layer.read / divided)
    return Stand(per_channel(layer.weight * divided).restored() / divided, span, divided)


def factorised(table: Table) -> Stand:
    """Return the table as a product of two in 8 bits, in as many bytes as 4 bits take in a plan.

    As ALBERT has it (Lan et al. 2020, section 3.1), but found by a singular value decomposition that counts how often
    a token is read, not trained.
    """
    rank = math.ceil(bits_of(4) / 8 * table.weight.size / sum(table.weight.shape))
    often = np.sqrt(1.0 + table.counts)[:, None]
    _, _, right = np.linalg.svd((often * table.weight).astype(np.float32), full_matrices=False)
    return Stand(per_channel(table.weight @ right[:rank].T).restored() @ per_channel(right[:rank]).restored())


def min_max(layer: Layer) -> Stand:
    """Return 8 bits with one range from the smallest to the largest number that calibration rows have."""
    return Stand(per_channel(layer.weight).restored(), ActivationRange.around(layer.read.min(), layer.read.max()))


def percentiles(layer: Layer) -> Stand:
    """Return the same with a ten-thousandth of these numbers beyond either end."""
    low, high = np.quantile(layer.read, (1e-4, 1 - 1e-4))
    return Stand(per_channel(layer.weight).restored(), ActivationRange.around(float(low), float(high)))


def least_squares(layer: Layer) -> Stand:
    """Return the same with the range, of a few about the middle, that leaves the smallest squared error."""
    low, high = float(layer.read.min()), float(layer.read.max())
    read = layer.read[:: max(1, len(layer.read) // 4096)]

    def error(span: ActivationRange) -> float:
        step = (span.high - span.low) / 255
        rounded = np.rint((read.clip(span.low, span.high) - span.low) / step) * step + span.low
        return float(np.square(rounded - read).mean())

    spans = [ActivationRange.around(share * low, share * high) for share in np.linspace(0.2, 1, 33)]
    return Stand(per_channel(layer.weight).restored(), min(spans, key=error))


def _scaled(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``out x groups x group`` within -1 and 1, and the float16 scales that were taken out."""
    grouped = weight.reshape(len(weight), -1, GROUP)
    scales = np.abs(grouped).max(axis=2, keepdims=True).astype(np.float16).astype(np.float32)
    scales[scales == 0] = 1.0
    return grouped / scales, scales


def _nearest(values: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Return the number of the nearest entry of a sorted code."""
    return np.searchsorted((code[1:] + code[:-1]) / 2, values)


FOUR, TWO = ours(4), ours(2)
COMPARISONS: Mapping[str, tuple[OfLayer, OfLayer]] = {
    "zeros anywhere at 8 bits over 4 bits": (unstructured(4), FOUR),
    "two zeros in four at 8 bits (5 bits) over 4 bits": (two_of_four, FOUR),
    "zeros anywhere at 8 bits over 3 bits": (unstructured(3), ours(3)),
    "k-means codebook of 16 over 4 bits": (k_means(4), FOUR),
    "k-means codebook of 4 over 2 bits": (k_means(2), TWO),
    "normal floats over 4 bits": (normal_floats, FOUR),
    "zero points over 4 bits and both rounded plainly": (asymmetric(4), ours(4, fitted=False)),
    "zero points over 2 bits and both rounded plainly": (asymmetric(2), ours(2, fitted=False)),
    "binary weights (half the bytes) over 2 bits": (binary, TWO),
    "SmoothQuant over mean ends of rows at w8a8": (smooth, w8a8),
    "smallest and largest over mean ends of rows at w8a8": (min_max, w8a8),
    "percentiles over mean ends of rows at w8a8": (percentiles, w8a8),
    "least squared error over mean ends of rows at w8a8": (least_squares, w8a8),
}
"""What is left out and what is there, by what the comparison is called."""
OF_TABLES: Mapping[str, tuple[OfTable, OfTable]] = {
    "table of tokens of half the rank at 8 bits over 4 bits": (factorised, table_of_4_bits),
}
"""The same for the table of tokens."""


def layers_of(shop: Workshop) -> list[Layer]:
    """Return the linear layers of the model's blocks."""
    base, scores = shop.base(None)
    seen = observe(base, shop.calibration_batches())
    found = []
    for number, block in enumerate(base.shape.blocks):
        for role in (role for roles in ROLES.values() for role in roles):
            path, layer = base.layout.path(number, role), base.linear(number, role)
            moments = scores.read_by(number, role, block)
            assert moments is not None, "the workshop takes moments"
            assert layer.bias is not None, "which takes up what a method changes in the mean"
            found.append(Layer(path, layer.weight.detach().numpy().copy(), moments, seen))
    return found


def table_of(shop: Workshop) -> Table:
    """Return the model's table of tokens."""
    base = shop.base(None)[0]
    path = base.layout.embeddings[0]
    weight = base.module.get_submodule(path).weight.detach().numpy().copy()
    read = np.concatenate([np.array(row) for row in shop.splits["train"].input_ids])
    return Table(path, weight, np.bincount(read, minlength=len(weight)))


def standing(shop: Workshop, stands: Mapping[str, Stand], moments: Mapping[str, Moments]) -> torch.nn.Module:
    """Return the model with other weights, which rounds what its layers read.

    As in a plan, and for all methods alike, biases take up what is changed in the mean.
    """
    built = shop.base(None)[0].clone()
    for path, stand in stands.items():
        layer, weight = built.module.get_submodule(path), np.ascontiguousarray(stand.weight, dtype=np.float32)
        if path in moments:
            layer.bias.data = same_in_the_mean(layer, torch.from_numpy(weight), moments[path])
        layer.weight.data = torch.from_numpy(weight)
        if stand.span is not None:
            layer.register_forward_pre_hook(rounding(stand.span, stand.divided))
    return built.module


def rounding(
    span: ActivationRange, divided: np.ndarray | None
) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """Return a hook that rounds a layer's input to the 256 numbers of a range."""
    step = (span.high - span.low) / 255
    scale = torch.ones(1) if divided is None else torch.from_numpy(divided.astype(np.float32))

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        read = (inputs[0] / scale).clamp(span.low, span.high)
        return (torch.round((read - span.low) / step) * step + span.low) * scale, *inputs[1:]

    return hook


def compare(figures: Figures, data: str, scratch: Path) -> None:
    """Make the comparisons of one data set."""
    shop = Workshop(RunConfig.from_file("demo", overrides=[f"data.source={data}"]), scratch / "unused", print)
    layers, table, splits = layers_of(shop), table_of(shop), ("search", "test")

    moments = {layer.path: layer.moments for layer in layers}

    def logits_of(stands: Mapping[str, Stand]) -> dict[str, np.ndarray]:
        module = standing(shop, stands, moments)
        return {split: training.logits_of(module, shop.splits[split]).numpy() for split in splits}

    full = logits_of({})
    for split, logits in full.items():
        figures.more[f"{data}, uncompressed, {split} rows"] = float(hits(shop, logits, split).mean())

    def add(what: str, pair: Iterable[dict[str, np.ndarray]]) -> None:
        by_method = list(pair)
        for split in splits:
            add_comparison(figures, shop, f"{data}, {what}", split, [found[split] for found in by_method], full[split])
        figures.write()

    @cache
    def of_layers(method: OfLayer) -> dict[str, np.ndarray]:
        return logits_of({layer.path: method(layer) for layer in layers})

    on_file = {name.split(", ")[1] for name in figures.more if name.startswith(data)}
    for what, methods in COMPARISONS.items():
        if what not in on_file:
            add(what, map(of_layers, methods))
    for what, of_table in OF_TABLES.items():
        if what not in on_file:
            add(what, (logits_of({table.path: method(table)}) for method in of_table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    options = parser.parse_args()
    figures = Figures("methods-left-out", "python benchmarks/methods_left_out.py")
    figures.read()
    for data in options.data:
        with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
            compare(figures, data, Path(scratch))


if __name__ == "__main__":
    main()
