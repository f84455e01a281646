"""What single decisions do to a model's predictions, estimated on calibration rows before anything is built."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from autocompress import slot
from autocompress.anatomy import ModelShape
from autocompress.decisions import Decision, LowRank, MaxTokens, PruneHeads, PruneNeurons, Quantize, TrimVocabulary
from autocompress.errors import PlanError
from autocompress.model import Autocast, EncoderModel
from autocompress.pieces import Piece, StandIn, stand_ins, unpacked
from autocompress.task import Batch
from autocompress.transforms.importance import Importance

_HELD_BYTES = 2**30
"""What layers read and their slopes may take at once; of more rows, decisions are judged by a part after the other."""


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
        autocast: Autocast = nullcontext,
    ) -> Sensitivity:
        """Estimate what each of ``options`` (by site) does on its own to the class probabilities.

        What is left to the runtime, such as bits, is judged by its ``piece``, which candidates are made of, too.

        To second order the divergence is half the mean of p_c (dlog p_c / dy . delta y)^2, summed over classes c
        (Martens 2020, "New Insights and Perspectives on the Natural Gradient Method", eq. 13), where delta y is what
        the decision changes at the layers' outputs. Random signs weight the classes, so that one backward pass a
        batch gives all of them. What a model has learned by heart hardly answers: it takes a few hundred rows to tell.
        """
        rows = sum(len(batch.labels) for batch in batches)
        lost: dict[tuple[str, str], dict[float, float]] = {}
        for flows in _flows(model, batches, seed, autocast):
            for site, decisions in options.items():
                # 4 bits with and without integer products lose the same.
                places = {
                    level_of(model.shape, site, d): d for d in reversed(decisions) if not isinstance(d, MaxTokens)
                }
                # Layers are judged by all decisions at once; tables are looked up, and fill memory.
                for part in [[place] for place in places] if site == "embeddings" else [[*places]]:
                    changes: dict[tuple[str, float], dict[str, Change]] = {}
                    for place in part:
                        with slot.working():
                            changes[place] = _changes(model, site, places[place], scores, piece)
                    judged = [(place, change) for place, change in changes.items() if change]
                    with slot.working():
                        moves = _moved(flows, [change for _, change in judged])
                    for ((axis, level), _), found in zip(judged, moves, strict=True):
                        points = lost.setdefault((site, axis), {})
                        points[level] = points.get(level, 0.0) + 0.5 * float(found.square().sum())
        for site, decisions in options.items():
            for decision in decisions:
                if isinstance(decision, MaxTokens):
                    axis, level = level_of(model.shape, site, decision)
                    points = lost.setdefault((site, axis), {})
                    points[level] = sum(_cut(model, batch, decision.tokens) for batch in batches)
        return cls({k: tuple(sorted((x, y / rows) for x, y in points.items())) for k, points in lost.items()})

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


Change = tuple[torch.Tensor, torch.Tensor | None]
"""What is added to the weight of a layer, and to its bias."""


@dataclass(frozen=True)
class _Flow:
    """What a layer read on one batch, and how the signed log-probability answers to what it returned.

    Args:
        read: ``rows x tokens x in``, of the head without tokens; token ids, ``rows x tokens``, of an embedding.
        slope: ``rows x tokens x out``, of the head without tokens.
    """

    read: torch.Tensor
    slope: torch.Tensor

    def moved(self, changes: Sequence[Change]) -> torch.Tensor:
        """Return the first-order moves of the signed log-probability, ``changes x rows``."""
        if self.read.dtype == torch.int64:
            each = [(change[self.read] * self.slope).flatten(1).sum(dim=1) for change, _ in changes]
            return torch.stack(each)
        # The slope of each row at the weight: it serves all changes, which are then not run on the row's tokens.
        rows = len(self.read)
        slope, read = (value.reshape(rows, -1, value.shape[-1]) for value in (self.slope, self.read))
        at_weight = (slope.transpose(1, 2) @ read).flatten(1).float()
        moved = torch.stack([change.flatten() for change, _ in changes]) @ at_weight.T
        at_bias = slope.float().sum(dim=1)
        for row, (_, shift) in zip(moved, changes, strict=True):
            if shift is not None:
                row += at_bias @ shift
        return moved

    @property
    def size_bytes(self) -> int:
        return self.read.nbytes + self.slope.nbytes


def _changes(
    model: EncoderModel, site: str, decision: Decision, scores: Importance, piece: Callable[[str, Decision], Piece]
) -> dict[str, Change]:
    """Return what a decision changes at the layers of a site, by path; nothing where it cannot be carried out."""
    try:
        if decision.structural:
            layers = stand_ins(model, site, decision, scores)
        else:
            layers = unpacked(model, site, piece(site, decision))
    except PlanError:
        # Such as groups that do not fill a narrower table: a candidate that decides so fails by itself.
        return {}
    return {path: _change(model, path, layer) for path, layer in layers.items()}


def _moved(flows: Sequence[Mapping[str, Sequence[_Flow]]], changes: Sequence[Mapping[str, Change]]) -> torch.Tensor:
    """Return the first-order moves by what is changed at the layers of a site, by path, ``changes x rows``."""
    found = []
    for flow in flows:
        rows = len(next(iter(flow.values()))[0].read)
        moved = torch.zeros(len(changes), rows)
        for path in dict.fromkeys(path for change in changes for path in change):
            those = [n for n, change in enumerate(changes) if path in change]
            for use in flow[path]:
                moved[those] += use.moved([changes[n][path] for n in those])
        found.append(moved)
    return torch.cat(found, dim=1)


def _change(model: EncoderModel, path: str, layer: StandIn) -> Change:
    """Return how weight and bias at ``path`` change if ``layer`` takes their place."""
    change = torch.from_numpy(layer.weight) - model.module.get_parameter(f"{path}.weight").detach()
    if layer.bias is None:
        return change, None
    return change, torch.from_numpy(layer.bias) - model.module.get_parameter(f"{path}.bias").detach()


def _cut(model: EncoderModel, batch: Batch, tokens: int) -> float:
    """Return the divergence, summed over rows, that reading no more than the first ``tokens`` tokens causes."""
    whole = batch.inputs()
    with slot.working(), torch.no_grad():
        full = functional.log_softmax(model.module(**whole).logits, dim=-1)
        short = {name: tensor[:, :tokens] for name, tensor in whole.items()}
        cut = functional.log_softmax(model.module(**short).logits, dim=-1)
    return float(functional.kl_div(cut, full, log_target=True, reduction="sum"))


def _flows(
    model: EncoderModel, batches: Sequence[Batch], seed: int, autocast: Autocast
) -> Iterator[list[dict[str, list[_Flow]]]]:
    """Yield what `_flow` finds of the batches, as many at once as may be held."""
    held: list[dict[str, list[_Flow]]] = []
    taken = 0
    for number, batch in enumerate(batches):
        held.append(_flow(model, batch, torch.Generator().manual_seed(seed + number), autocast))
        taken += sum(use.size_bytes for uses in held[-1].values() for use in uses)
        if taken >= _HELD_BYTES:
            yield held
            held, taken = [], 0
    if held:
        yield held


def _flow(model: EncoderModel, batch: Batch, generator: torch.Generator, autocast: Autocast) -> dict[str, list[_Flow]]:
    """Run a batch forward and backward; returns what every layer read and its slope at each of its uses, by path."""
    paths = [path for site in model.shape.sites() for path in model.layout.linears(site)]
    caught: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def note(path: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            read = inputs[0].detach()
            # In the precision of the product: what is read may be normalised, which is done in single precision.
            caught.append((path, read.to(output.dtype) if read.is_floating_point() else read, output))

        return hook

    handles = [model.module.get_submodule(path).register_forward_hook(note(path)) for path in paths]
    try:
        with slot.working(), torch.enable_grad():
            with autocast():
                logits = model.module(**batch.inputs()).logits
            log_p = functional.log_softmax(logits.float(), dim=-1)
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
            # Their slope is the sum over rows, of which each has its own signs: its square is that of all together.
            slope = slope.expand(rows, *slope.shape[1:]) / math.sqrt(rows)
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
