"""What single decisions do to a model's predictions, estimated on calibration rows before anything is built."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from autocompress.anatomy import ModelShape
from autocompress.decisions import Decision, LowRank, MaxTokens, PruneHeads, PruneNeurons, Quantize, TrimVocabulary
from autocompress.errors import PlanError
from autocompress.model import EncoderModel
from autocompress.pieces import Piece, StandIn, stand_ins, unpacked
from autocompress.task import Batch
from autocompress.transforms.prune import Importance


@dataclass(frozen=True)
class Sensitivity:
    """Divergence (nats) that single decisions cause at the sites of one model.

    Args:
        curves: by site and axis, pairs of (share kept, divergence) in rising order of shares; bits and tokens by
            their number.
    """

    curves: Mapping[tuple[str, str], tuple[tuple[float, float], ...]]

    @classmethod
    def measure(
        cls,
        model: EncoderModel,
        scores: Importance,
        options: Mapping[str, Sequence[Decision]],
        batches: Sequence[Batch],
        piece: Callable[[str, Decision], Piece],
        *,
        seed: int,
    ) -> Sensitivity:
        """Estimate what each of ``options`` (by site) does on its own to the class probabilities.

        What is left to the runtime, such as bits, is judged by its ``piece``, which candidates are made of, too.

        To second order the divergence is half the mean of p_c (dlog p_c / dy . delta y)^2, summed over classes c
        (Martens 2020, "New Insights and Perspectives on the Natural Gradient Method", eq. 13), where delta y is what
        the decision changes at the layers' outputs. Random signs weight the classes, so that one backward pass a
        batch gives all of them.
        """
        flows = [_flow(model, batch, torch.Generator().manual_seed(seed + n)) for n, batch in enumerate(batches)]
        rows = sum(len(batch.labels) for batch in batches)
        curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for site, decisions in options.items():
            for decision in decisions:
                axis, level = level_of(model.shape, site, decision)
                points = curves.setdefault((site, axis), [])
                if level in dict(points):  # 4 bits with and without integer products lose the same
                    continue
                if isinstance(decision, MaxTokens):
                    points.append((level, sum(_cut(model, batch, decision.tokens) for batch in batches) / rows))
                    continue
                try:
                    if decision.structural:
                        layers = stand_ins(model, site, decision, scores)
                    else:
                        layers = unpacked(model, site, piece(site, decision))
                except PlanError:
                    # Such as groups that do not fill a narrower table: a candidate that decides so fails by itself.
                    continue
                changes = {path: _change(model, path, layer) for path, layer in layers.items()}
                total = 0.0
                for flow in flows:
                    moved = sum(use.moved(*change) for path, change in changes.items() for use in flow[path])
                    total += 0.5 * float(torch.as_tensor(moved).square().sum())
                points.append((level, total / rows))
        return cls({key: tuple(sorted(points)) for key, points in curves.items() if points})

    def to_json(self) -> str:
        return json.dumps([[site, axis, points] for (site, axis), points in self.curves.items()])

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        return cls({(s, a): tuple((float(x), float(y)) for x, y in points) for s, a, points in json.loads(text)})

    def at(self, site: str, axis: str, level: float) -> float:
        """Return the divergence at ``level``, between measured ones in proportion; keeping all costs nothing."""
        points = self.curves.get((site, axis), ())
        if axis in ("bits", "tokens"):
            return min(((abs(level - bits), found) for bits, found in points), default=(0.0, 0.0))[1]
        shares, found = [share for share, _ in points], [value for _, value in points]
        return float(np.interp(level, [*shares, 1.0], [*found, 0.0])) if points else 0.0


@dataclass(frozen=True)
class _Flow:
    """What a layer read on one batch, and how the signed log-probability answers to what it returned.

    Args:
        read: ``rows x tokens x in``; token ids, ``rows x tokens``, of an embedding.
        slope: ``rows x tokens x out``.
    """

    read: torch.Tensor
    slope: torch.Tensor

    def moved(self, change: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        """Return, for each row, the first-order move of the signed log-probability when weight and bias change so."""
        looked_up = self.read.dtype == torch.int64
        returned = change[self.read] if looked_up else functional.linear(self.read, change, shift)
        return (returned * self.slope).flatten(1).sum(dim=1)


def _change(model: EncoderModel, path: str, layer: StandIn) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return how weight and bias at ``path`` change if ``layer`` takes their place."""
    change = torch.from_numpy(layer.weight) - model.module.get_parameter(f"{path}.weight").detach()
    if layer.bias is None:
        return change, None
    return change, torch.from_numpy(layer.bias) - model.module.get_parameter(f"{path}.bias").detach()


def _cut(model: EncoderModel, batch: Batch, tokens: int) -> float:
    """Return the divergence, summed over rows, that reading no more than the first ``tokens`` tokens causes."""
    whole = batch.inputs()
    with torch.no_grad():
        full = functional.log_softmax(model.module(**whole).logits, dim=-1)
        short = {name: tensor[:, :tokens] for name, tensor in whole.items()}
        cut = functional.log_softmax(model.module(**short).logits, dim=-1)
    return float(functional.kl_div(cut, full, log_target=True, reduction="sum"))


def _flow(model: EncoderModel, batch: Batch, generator: torch.Generator) -> dict[str, list[_Flow]]:
    """Run a batch forward and backward; returns what every layer read and its slope at each of its uses, by path."""
    paths = [path for site in model.shape.sites() for path in model.layout.linears(site)]
    caught: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def note(path: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            caught.append((path, inputs[0].detach(), output))

        return hook

    handles = [model.module.get_submodule(path).register_forward_hook(note(path)) for path in paths]
    try:
        with torch.enable_grad():
            log_p = functional.log_softmax(model.module(**batch.inputs()).logits, dim=-1)
            signs = torch.randint(0, 2, log_p.shape, generator=generator) * 2.0 - 1.0
            signed = (signs * (0.5 * log_p.detach()).exp() * log_p).sum()
            slopes = torch.autograd.grad(signed, [output for _, _, output in caught])
    finally:
        for handle in handles:
            handle.remove()
    flows: dict[str, list[_Flow]] = {}
    for (path, read, _), slope in zip(caught, slopes, strict=True):
        rows = len(batch.labels)
        if len(read) != rows:  # positions are looked up once for all rows
            read = read.expand(rows, *read.shape[1:])
            slope = slope.expand(rows, *slope.shape[1:]) / rows
        flows.setdefault(path, []).append(_Flow(read, slope))
    return flows


def level_of(shape: ModelShape, site: str, decision: Decision) -> tuple[str, float]:
    """Return the axis of a decision at a site of a model of ``shape``, and the share that it keeps.

    In place of the share stands the number of bits or tokens.
    """
    if isinstance(decision, Quantize):
        return "bits", float(decision.weight_bits)
    if isinstance(decision, MaxTokens):
        return "tokens", float(decision.tokens)
    place = shape.sites()[site]
    if isinstance(decision, LowRank):
        return "rank", decision.rank * (place.inner + place.outer) / (place.inner * place.outer)
    assert isinstance(decision, (PruneHeads, PruneNeurons, TrimVocabulary))
    return "keep", decision.keep / place.parts
