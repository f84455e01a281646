"""Structured pruning: attention heads, FFN neurons and whole blocks are removed physically.

Heads and neurons are ranked by the empirical Fisher information of a gate on each (Kwon et al. 2022, "A Fast
Post-Training Pruning Framework for Transformers", eq. 5-7): the squared gradient of each row's loss with respect to
the gate, summed over rows. Where it carries no information (all gradients vanish) magnitude takes its place. Where the
others are to make up for what is removed, they go in the order of `surgery.py`. Blocks are ranked by what their removal
does to the predictions: the Kullback-Leibler divergence to the full model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from autocompress.anatomy import BlockShape, Site
from autocompress.decisions import PruneHeads, PruneNeurons
from autocompress.errors import PlanError
from autocompress.model import Autocast, EncoderModel
from autocompress.task import Batch
from autocompress.transforms.moments import AS_READ_BY, Moments, OfBlocks
from autocompress.transforms.surgery import order_of_removal
from autocompress.transforms.vocabulary import TokenUse

READING = ("output", "ffn_out")
"""Roles of the layers that read heads and neurons."""


@dataclass(frozen=True)
class Importance:
    """Scores of one model's parts, larger is more important.

    Args:
        heads: one tensor a block, ``heads``.
        neurons: one tensor a block, ``neurons``.
        drop_order: block numbers, least important first.
        moments: of what the layers read, by which factors and 4-bit weights are fitted; without them, these come
            nearest to the weights as such.
        tokens: what the task's texts make of the table of tokens; None where it was not asked for.
        slopes: the mean outer product, ``hidden x hidden``, of the loss's slopes at what a block's layer of a role in
            `READING` returns; None where it is not known.
        name: tells these scores from others of the same model, for caches.
    """

    heads: tuple[torch.Tensor, ...]
    neurons: tuple[torch.Tensor, ...]
    drop_order: tuple[int, ...]
    moments: OfBlocks | None = None
    tokens: TokenUse | None = None
    slopes: Callable[[int, str], torch.Tensor] | None = None
    name: str = ""

    def best_heads(self, block: int, keep: int) -> list[int]:
        return _best(self.heads[block], keep)

    def best_neurons(self, block: int, keep: int) -> list[int]:
        return _best(self.neurons[block], keep)

    def read_by(self, block: int, role: str, pruned: BlockShape) -> Moments | None:
        """Return the moments of what a layer reads in a block that was pruned to a shape, or None if not known."""
        if self.moments is None:
            return None
        found = self.moments(block, AS_READ_BY.get(role, role))
        if role == "output" and pruned.heads < len(self.heads[block]):
            return found.kept(torch.tensor(columns_of(self.best_heads(block, pruned.heads), pruned.head_size)))
        if role == "ffn_out" and pruned.neurons < len(self.neurons[block]):
            return found.kept(torch.tensor(self.best_neurons(block, pruned.neurons)))
        return found

    def of_blocks(self, kept: Sequence[int]) -> Importance:
        """Return the scores of a model of these blocks only."""
        moments = self.moments
        return Importance(
            tuple(self.heads[n] for n in kept),
            tuple(self.neurons[n] for n in kept),
            tuple(range(len(kept))),
            None if moments is None else lambda block, role: moments(kept[block], role),
            self.tokens,
            name=self.name,
        )

    def made_up_for(self, model: EncoderModel, block: int, role: str) -> torch.Tensor:
        """Score what a layer of ``model``, of a role in `READING`, reads, for where the others make up for it.

        Returns:
            ``heads`` or ``neurons``.
        """
        assert self.moments is not None and self.slopes is not None, "it takes what the model does with its rows"
        layer, shape = model.linear(block, role), model.shape.blocks[block]
        gram = self.moments(block, role).gram(centred=layer.bias is not None)
        parts = shape.heads if role == "output" else shape.neurons
        return order_of_removal(layer.weight.detach(), gram, self.slopes(block, role), parts)


def columns_of(heads: Sequence[int], size: int) -> list[int]:
    """Return the channels of some attention heads of ``size`` channels each."""
    return [head * size + channel for head in heads for channel in range(size)]


def _best(scores: torch.Tensor, keep: int) -> list[int]:
    return sorted(torch.topk(scores, keep).indices.tolist())


def importance(
    model: EncoderModel,
    batches: Sequence[Batch],
    *,
    drops: int = 0,
    drop_batches: Sequence[Batch] | None = None,
    counts: torch.Tensor | None = None,
    autocast: Autocast = nullcontext,
) -> Importance:
    """Score heads, neurons and blocks; the model is left unchanged.

    Args:
        model: the model to score.
        batches: labelled calibration rows.
        drops: how many blocks are removed greedily to find the order of dropping; the others follow by their effect
            at the last step. 0 leaves the order from the last block to the first.
        drop_batches: rows for that order, by default ``batches``.
        counts: how often the task's texts have each token, ``vocabulary``, float64, infinite for what has to stay;
            without them nothing is said of the table of tokens.
        autocast: entered for each run of the model, as where half precision is faster; scores are summed in double.
    """
    information = _fisher(model, batches, autocast, counts)
    heads, neurons = information.heads, information.neurons
    for number in range(len(model.shape.blocks)):
        # Gradients vanish where a part cannot reach the output (a saturated or untrained head): use magnitude there.
        if not torch.isfinite(heads[number]).all() or float(heads[number].sum()) == 0:
            weight = model.linear(number, "output").weight.detach()
            heads[number] = weight.reshape(weight.shape[0], model.shape.blocks[number].heads, -1).norm(dim=(0, 2))
        if not torch.isfinite(neurons[number]).all() or float(neurons[number].sum()) == 0:
            neurons[number] = model.linear(number, "ffn_out").weight.detach().norm(dim=0)
    order = _drop_order(model, drop_batches or batches, drops, autocast)
    tokens = None
    if counts is not None:
        table = model.module.get_parameter(f"{model.layout.embeddings[0]}.weight").detach()
        tokens = TokenUse.of(table, counts, information.looked_up)
    slopes = information.returned
    return Importance(
        tuple(heads), tuple(neurons), order, tokens=tokens, slopes=lambda block, role: slopes[block, role]
    )


@dataclass(frozen=True)
class _Information:
    """What gradients tell of a model.

    Args:
        heads: the information of gates on heads, ``heads`` by block.
        neurons: that of gates on neurons, ``neurons`` by block.
        looked_up: the mean of g g^T over slopes g at tokens' rows, ``width x width`` of the table of tokens.
        returned: the same of what layers in `READING` return, by block and role, ``hidden x hidden``.
    """

    heads: list[torch.Tensor]
    neurons: list[torch.Tensor]
    looked_up: torch.Tensor
    returned: dict[tuple[int, str], torch.Tensor]


def _fisher(
    model: EncoderModel, batches: Sequence[Batch], autocast: Autocast, counts: torch.Tensor | None
) -> _Information:
    blocks = model.shape.blocks
    heads = [torch.zeros(b.heads, dtype=torch.float64) for b in blocks]
    neurons = [torch.zeros(b.neurons, dtype=torch.float64) for b in blocks]
    table = model.module.get_submodule(model.layout.embeddings[0])
    width = table.get_parameter("weight").shape[1]
    slopes, read = torch.zeros(width, width, dtype=torch.float64), 0
    keys = [(number, role) for number in range(len(blocks)) for role in READING]
    returned, tokens = {key: torch.zeros((), dtype=torch.float64) for key in keys}, 0
    captured: dict[tuple[int, str], list[torch.Tensor]] = {}
    looked_up: list[torch.Tensor] = []
    outputs: dict[tuple[int, str], list[torch.Tensor]] = {key: [] for key in keys}

    def keep(into: list[torch.Tensor]) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(_: nn.Module, inputs: object, output: torch.Tensor) -> None:
            output.requires_grad_(True)
            output.retain_grad()
            into.append(output)

        return hook

    def capture(key: tuple[int, str]) -> object:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            value = inputs[0]
            if not value.requires_grad:
                # The lowest one: from here on up everything has a gradient, although all parameters are frozen.
                value.requires_grad_(True)
            value.retain_grad()
            captured.setdefault(key, []).append(value)
            return (value, *inputs[1:])

        return hook

    handles = [
        model.linear(*key).register_forward_pre_hook(capture(key))  # type: ignore[arg-type]
        for key in keys
    ]
    handles += [model.linear(*key).register_forward_hook(keep(outputs[key])) for key in keys]
    if counts is not None:
        handles.append(table.register_forward_hook(keep(looked_up)))
    frozen = [(p, p.requires_grad) for p in model.module.parameters()]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        for batch in batches:
            with torch.enable_grad():
                with autocast():
                    logits = model.module(**batch.inputs()).logits
                functional.cross_entropy(logits.float(), batch.labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
            for (number, role), values in captured.items():
                # d loss / d gate = sum over tokens (and a head's width) of activation times its gradient, row by row;
                # over the runs, too, of a block that is run several times, as its gates are the same in all of them.
                gate = torch.stack([_gate(value) for value in values]).sum(dim=0)
                if role == "output":
                    gate = gate.reshape(gate.shape[0], blocks[number].heads, -1).sum(dim=2)
                    heads[number] += gate.square().sum(dim=0)
                else:
                    neurons[number] += gate.square().sum(dim=0)
            for output in looked_up:
                assert counts is not None
                # The rows of special tokens, which are kept anyway, answer to other things than words do.
                words = batch.attention_mask.bool() & counts[batch.input_ids].isfinite()
                found = _slope(output)[words].double()
                slopes, read = slopes + found.T @ found, read + len(found)
            mask = batch.attention_mask.bool()
            tokens += int(mask.sum())
            for key, of_layer in outputs.items():
                # Of a layer that is run several times the changes add up, and so do their slopes.
                slope = torch.stack([_slope(output) for output in of_layer]).sum(dim=0)
                at_tokens = slope[mask].float().numpy()
                returned[key] = returned[key] + torch.from_numpy(at_tokens.T @ at_tokens)
                of_layer.clear()
            captured.clear()
            looked_up.clear()
            model.module.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in frozen:
            parameter.requires_grad_(required)
    at_layers = {key: (found / max(1, tokens)).float() for key, found in returned.items()}
    return _Information(heads, neurons, slopes / max(1, read), at_layers)


def _gate(value: torch.Tensor) -> torch.Tensor:
    """Return, ``rows x channels``, what a loss's slope is in gates on ``value``, ``rows x tokens x channels``."""
    return (value.detach() * _slope(value)).double().sum(dim=1)


def _slope(value: torch.Tensor) -> torch.Tensor:
    assert value.grad is not None, "all that is looked at leads to the loss"
    return value.grad


def _drop_order(
    model: EncoderModel,
    batches: Sequence[Batch],
    drops: int,
    autocast: Autocast,
) -> tuple[int, ...]:
    blocks, path = model.block_list(), model.layout.blocks
    kept: list[int] = list(range(len(blocks)))
    full = [_log_probabilities(model, batch, autocast) for batch in batches]
    order: list[int] = []
    divergence: dict[int, float] = {number: -number for number in kept}

    def without(number: int) -> float:
        model.replace(path, nn.ModuleList([blocks[n] for n in kept if n != number]))
        return sum(
            float(
                functional.kl_div(
                    _log_probabilities(model, batch, autocast), reference, log_target=True, reduction="sum"
                )
            )
            for batch, reference in zip(batches, full, strict=True)
        )

    try:
        for _ in range(min(drops, len(blocks) - 1)):
            divergence = {number: without(number) for number in kept}
            order.append(min(divergence, key=lambda n: divergence[n]))
            kept.remove(order[-1])
    finally:
        model.replace(path, blocks)
    return (*order, *sorted(kept, key=lambda n: divergence[n]))


def _log_probabilities(model: EncoderModel, batch: Batch, autocast: Autocast) -> torch.Tensor:
    with torch.no_grad(), autocast():
        return functional.log_softmax(model.module(**batch.inputs()).logits.float(), dim=-1)


def keep_heads(model: EncoderModel, block: int, heads: Sequence[int]) -> None:
    """Shrink query, key, value and output of ``block`` to the given heads."""
    index = torch.tensor(columns_of(heads, model.shape.blocks[block].head_size))
    for role in ("query", "key", "value"):
        model.replace(model.layout.path(block, role), _rows(model.linear(block, role), index))
    model.replace(model.layout.path(block, "output"), _columns(model.linear(block, "output"), index))
    model.shape = model.shape.pruned(block, heads=len(heads))


def keep_neurons(model: EncoderModel, block: int, neurons: Sequence[int]) -> None:
    """Shrink the FFN of ``block`` to the given neurons."""
    index = torch.tensor(list(neurons))
    model.replace(model.layout.path(block, "ffn_in"), _rows(model.linear(block, "ffn_in"), index))
    model.replace(model.layout.path(block, "ffn_out"), _columns(model.linear(block, "ffn_out"), index))
    model.shape = model.shape.pruned(block, neurons=len(neurons))


def keep_blocks(model: EncoderModel, blocks: Sequence[int]) -> None:
    """Keep the given blocks, in order, and renumber them."""
    kept = model.block_list()
    model.replace(model.layout.blocks, nn.ModuleList([kept[b] for b in blocks]))
    model.shape = dataclasses.replace(model.shape, blocks=tuple(model.shape.blocks[b] for b in blocks))
    model.module.config.num_hidden_layers = len(blocks)  # type: ignore[union-attr]


def _rows(layer: nn.Linear, index: torch.Tensor) -> nn.Linear:
    return linear(layer.weight.detach()[index], None if layer.bias is None else layer.bias.detach()[index])


def _columns(layer: nn.Linear, index: torch.Tensor) -> nn.Linear:
    return linear(layer.weight.detach()[:, index], None if layer.bias is None else layer.bias.detach())


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Build a linear layer that holds copies of ``weight`` (``out x in``) and ``bias`` (``out``)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone().contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone().contiguous())
    return layer


class HeadPruning:
    """Carry out `PruneHeads`."""

    def check(self, site: Site, decision: PruneHeads) -> None:
        _check_keep(site, decision.keep, "attention", "heads")

    def apply(self, model: EncoderModel, site: Site, decision: PruneHeads, scores: Importance) -> None:
        block = int(site.name.split(".")[1])
        keep_heads(model, block, scores.best_heads(block, decision.keep))


class NeuronPruning:
    """Carry out `PruneNeurons`."""

    def check(self, site: Site, decision: PruneNeurons) -> None:
        _check_keep(site, decision.keep, "ffn", "neurons")

    def apply(self, model: EncoderModel, site: Site, decision: PruneNeurons, scores: Importance) -> None:
        block = int(site.name.split(".")[1])
        keep_neurons(model, block, scores.best_neurons(block, decision.keep))


def _check_keep(site: Site, keep: int, kind: str, unit: str) -> None:
    if site.kind != kind:
        raise PlanError(f"{site.name}: pruning {unit} belongs to {kind} sites, not to {site.kind}")
    if keep > site.parts:
        raise PlanError(f"{site.name}: keep must be <= {site.parts} {unit}, got {keep}")
