"""Structured pruning: attention heads, FFN neurons and whole blocks are removed physically, the least important first.

What is important `importance.py` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from autocompress.anatomy import Site, columns_of
from autocompress.decisions import PruneHeads, PruneNeurons
from autocompress.errors import PlanError
from autocompress.model import EncoderModel
from autocompress.transforms.importance import Importance


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


def cut_to_blocks(model: EncoderModel, blocks: Sequence[int]) -> EncoderModel:
    """Return a copy of ``model`` with the given blocks only."""
    built = model.clone()
    if len(blocks) < len(model.shape.blocks):
        keep_blocks(built, blocks)
    return built


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
