"""What a student begins as, before it is distilled: parts of the teacher, narrower, cheaper, or used several times.

Blocks, heads and neurons are taken by importance (`importance.py`). Beyond these a student may have

- a narrower hidden size: the same channels are kept wherever the stream between the blocks is written or read, those
  whose gate has the largest empirical Fisher information (Kwon et al. 2022, eq. 5-7, with one gate for all places of a
  channel);
- a cheaper activation function in its FFNs (Sun et al. 2020, "MobileBERT: a Compact Task-Agnostic BERT for
  Resource-Limited Devices", section 3.3);
- blocks that are run several times in a row with one set of weights (Lan et al. 2020, "ALBERT: A Lite BERT for
  Self-supervised Learning of Language Representations", section 3.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from autocompress import slot
from autocompress.decisions import Student
from autocompress.errors import ModelError
from autocompress.model import Autocast, EncoderModel
from autocompress.task import Batch
from autocompress.transforms.importance import Importance
from autocompress.transforms.prune import keep_blocks, keep_heads, keep_neurons, linear

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU}


class Repeated(nn.Module):
    """A block that is run several times in a row."""

    def __init__(self, block: nn.Module, times: int) -> None:
        super().__init__()
        self.block = block
        self.times = times

    def forward(self, hidden: torch.Tensor, *inputs: Any, **options: Any) -> torch.Tensor:
        """Take and return ``batch x tokens x hidden``; what else a block is given is given at each run."""
        for _ in range(self.times):
            hidden = self.block(hidden, *inputs, **options)
        return hidden


def begun(teacher: EncoderModel, student: Student, scores: Importance, channels: torch.Tensor | None) -> EncoderModel:
    """Return a copy of the parts of ``teacher`` that ``student`` begins as.

    Args:
        teacher: the uncompressed model.
        student: which parts; it fits the teacher.
        scores: importance of its heads and neurons.
        channels: of `channel_scores`, where the student is narrower.

    Raises:
        ModelError: if the teacher has other parts than are understood.
    """
    built = teacher.clone()
    keep_blocks(built, student.blocks)
    for number, block in enumerate(student.blocks):
        keep_heads(built, number, scores.best_heads(block, student.heads))
        keep_neurons(built, number, scores.best_neurons(block, student.neurons))
    if student.hidden:
        assert channels is not None, "which channels are kept needs their scores"
        _prove(built)
        keep_channels(built, sorted(torch.topk(channels, student.hidden).indices.tolist()))
    if student.activation:
        replace_activation(built, student.activation)
    if student.share > 1:
        share_blocks(built, student.share)
    return built


def channel_scores(model: EncoderModel, batches: Sequence[Batch], *, autocast: Autocast = nullcontext) -> torch.Tensor:
    """Return the Fisher information of a gate on each channel between the blocks, ``hidden``, float64.

    One gate stands at every place where the stream has been normalised; the model is left unchanged.
    """
    found = torch.zeros(model.shape.hidden, dtype=torch.float64)
    written: list[torch.Tensor] = []

    def note(_: nn.Module, inputs: object, output: torch.Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)
        output.retain_grad()
        written.append(output)

    handles = [norm.register_forward_hook(note) for _, norm in _norms(model)]
    frozen = [(p, p.requires_grad) for p in model.module.parameters()]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        for batch in batches:
            with slot.working(), torch.enable_grad():
                with autocast():
                    logits = model.module(**batch.inputs()).logits
                functional.cross_entropy(logits.float(), batch.labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
            gates = torch.zeros(len(batch.labels), len(found), dtype=torch.float64)
            for value in written:
                assert value.grad is not None
                gates += (value.detach() * value.grad).double().sum(dim=1)
            found += gates.square().sum(dim=0)
            written.clear()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in frozen:
            parameter.requires_grad_(required)
    if not torch.isfinite(found).all() or float(found.sum()) == 0:
        # As of a head that was never trained: what the tables write most is kept.
        table = model.module.get_parameter(f"{model.layout.embeddings[0]}.weight").detach()
        found = table.double().square().mean(dim=0) if table.shape[1] == len(found) else torch.ones_like(found)
    return found


def keep_channels(model: EncoderModel, channels: Sequence[int]) -> None:
    """Keep some channels of the stream between the blocks, the same ones wherever it is written or read.

    A layer outside the blocks is cut at every side that is as wide as the stream, but for that of the classes.
    """
    hidden, layout, index = model.shape.hidden, model.layout, torch.tensor(list(channels))
    for path, norm in _norms(model):
        model.replace(path, _norm(norm, index))
    for path in layout.embeddings:
        table = model.module.get_submodule(path)
        assert isinstance(table, nn.Embedding)
        if table.embedding_dim == hidden:
            model.replace(path, _table(table, index))
    for block in range(len(model.shape.blocks)):
        for role, path in ((role, layout.path(block, role)) for role in layout.roles):
            writes = role in ("output", "ffn_out")
            model.replace(path, _cut(model.linear(block, role), index if writes else None, None if writes else index))
    for number, path in enumerate(layout.head):
        layer = model.module.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        rows = index if layer.out_features == hidden and number < len(layout.head) - 1 else None
        model.replace(path, _cut(layer, rows, index if layer.in_features == hidden else None))
    model.shape = dataclasses.replace(model.shape, hidden=len(index))
    model.module.config.hidden_size = len(index)  # type: ignore[union-attr]


def replace_activation(model: EncoderModel, name: str) -> None:
    """Put the activation function ``name`` of `decisions.ACTIVATIONS` into every FFN.

    Raises:
        ModelError: if a block does not have one module that is an activation function.
    """
    for number, block in enumerate(model.block_list()):
        found = [
            path
            for path, module in block.named_modules()
            if not any(module.children())
            and not any(True for _ in module.parameters())
            and not isinstance(module, (nn.Dropout, nn.Identity))
        ]
        if len(found) != 1:
            raise ModelError(
                f"model: {type(model.module).__name__}: its activation function cannot be replaced: expected one in a "
                f"block, found {', '.join(found) or 'none'}"
            )
        model.replace(f"{model.layout.blocks}.{number}.{found[0]}", _ACTIVATIONS[name]())
    model.shape = dataclasses.replace(model.shape, activation=name)


def share_blocks(model: EncoderModel, times: int) -> None:
    """Let each block be run ``times`` times in a row."""
    layout = model.layout
    model.replace(layout.blocks, nn.ModuleList([Repeated(block, times) for block in model.block_list()]))
    model.layout = dataclasses.replace(layout, roles={role: f"block.{path}" for role, path in layout.roles.items()})
    model.shape = dataclasses.replace(model.shape, runs=times)


def _prove(model: EncoderModel) -> None:
    """Put the channels of a copy into another order: equal logits show that all that belongs together was moved."""
    probe = model.clone()
    keep_channels(probe, list(reversed(range(model.shape.hidden))))
    vocabulary = model.shape.vocabulary
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}
    with torch.no_grad():
        before, after = (one.module(**inputs).logits for one in (model, probe))
    if not torch.allclose(before, after, atol=1e-4, rtol=1e-3):
        gap = (before - after).abs().max().item()
        raise ModelError(
            f"model: {type(model.module).__name__}: cannot be made narrower: another order of its {model.shape.hidden} "
            f"channels changes the logits by {gap:.2g}"
        )


def _norms(model: EncoderModel) -> list[tuple[str, nn.LayerNorm]]:
    """Return all normalisations of the stream between the blocks, by path."""
    found = [(path, module) for path, module in model.module.named_modules() if isinstance(module, nn.LayerNorm)]
    return [(path, norm) for path, norm in found if norm.normalized_shape == (model.shape.hidden,)]


def _norm(norm: nn.LayerNorm, index: torch.Tensor) -> nn.LayerNorm:
    kept = nn.LayerNorm(len(index), eps=norm.eps)
    kept.weight = nn.Parameter(norm.weight.detach()[index].clone())
    kept.bias = nn.Parameter(norm.bias.detach()[index].clone())
    return kept


def _table(table: nn.Embedding, index: torch.Tensor) -> nn.Embedding:
    kept = nn.Embedding(table.num_embeddings, len(index), padding_idx=table.padding_idx, device="meta")
    kept.weight = nn.Parameter(table.weight.detach()[:, index].contiguous())
    return kept


def _cut(layer: nn.Linear, rows: torch.Tensor | None, columns: torch.Tensor | None) -> nn.Linear:
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return linear(weight if columns is None else weight[:, columns], bias)
