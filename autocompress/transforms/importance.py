"""How much the parts of a model matter: attention heads, FFN neurons, and rows of the table of tokens.

Heads and neurons are ranked by the empirical Fisher information of a gate on each (Kwon et al. 2022, "A Fast
Post-Training Pruning Framework for Transformers", eq. 5-7): the squared gradient of each row's loss with respect to
the gate, summed over rows. Where it carries no information (all gradients vanish) magnitude takes its place. Where the
others are to make up for what is removed, they go in the order of `surgery.py`. In which order whole blocks go is for
`depth.py` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from autocompress import slot
from autocompress.anatomy import BlockShape, columns_of
from autocompress.model import Autocast, EncoderModel
from autocompress.task import Batch
from autocompress.transforms.moments import AS_READ_BY, Moments, OfBlocks, outer_products
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
        moments: of what the layers read, by which factors and 4-bit weights are fitted; without them, these come
            nearest to the weights as such.
        tokens: what the task's texts make of the table of tokens; None where it was not asked for.
        slopes: the mean outer product, ``hidden x hidden``, of the loss's slopes at what a block's layer of a role in
            `READING` returns; None where it is not known.
        name: tells these scores from others of the same model, for caches.
    """

    heads: tuple[torch.Tensor, ...]
    neurons: tuple[torch.Tensor, ...]
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


def _best(scores: torch.Tensor, keep: int) -> list[int]:
    return sorted(torch.topk(scores, keep).indices.tolist())


def importance(
    model: EncoderModel,
    batches: Sequence[Batch],
    *,
    counts: torch.Tensor | None = None,
    autocast: Autocast = nullcontext,
) -> Importance:
    """Score heads, neurons and, if asked, tokens; the model is left unchanged.

    Args:
        model: the model to score.
        batches: labelled calibration rows.
        counts: how often the task's texts have each token, ``vocabulary``, float64, infinite for what has to stay;
            without them nothing is said of the table of tokens.
        autocast: entered for each run of the model, as where half precision is faster; scores are summed in double.
    """
    gates = _Gates(model)
    outputs = {key: _Outputs(model.linear(*key), _tokens) for key in _reading(model)}
    watchers: list[_Watcher] = [gates, *outputs.values()]
    if counts is not None:
        # The rows of special tokens, which are kept anyway, answer to other things than words do.
        words = counts.isfinite()
        embedding = model.module.get_submodule(model.layout.embeddings[0])
        looked_up = _Outputs(embedding, lambda batch: _tokens(batch) & words[batch.input_ids])
        watchers.append(looked_up)
    _watched(model, batches, watchers, autocast)
    heads, neurons = gates.heads, gates.neurons
    for number in range(len(model.shape.blocks)):
        # Gradients vanish where a part cannot reach the output (a saturated or untrained head): use magnitude there.
        if not torch.isfinite(heads[number]).all() or float(heads[number].sum()) == 0:
            weight = model.linear(number, "output").weight.detach()
            heads[number] = weight.reshape(weight.shape[0], model.shape.blocks[number].heads, -1).norm(dim=(0, 2))
        if not torch.isfinite(neurons[number]).all() or float(neurons[number].sum()) == 0:
            neurons[number] = model.linear(number, "ffn_out").weight.detach().norm(dim=0)
    tokens = None
    if counts is not None:
        with slot.working():
            tokens = TokenUse.of(embedding.get_parameter("weight").detach(), counts, looked_up.mean())
    slopes = {key: watcher.mean().float() for key, watcher in outputs.items()}
    return Importance(tuple(heads), tuple(neurons), tokens=tokens, slopes=lambda block, role: slopes[block, role])


def _tokens(batch: Batch) -> torch.Tensor:
    return batch.attention_mask.bool()


def _watched(model: EncoderModel, batches: Sequence[Batch], watchers: Sequence[_Watcher], autocast: Autocast) -> None:
    """Run the model and the loss back, batch by batch, and let every watcher look at the slopes."""
    with _frozen(model.module), ExitStack() as stack:
        for watcher in watchers:
            for handle in watcher.hooks(model):
                stack.callback(handle.remove)
        for batch in batches:
            with slot.working(), torch.enable_grad():
                with autocast():
                    logits = model.module(**batch.inputs()).logits
                functional.cross_entropy(logits.float(), batch.labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
            for watcher in watchers:
                with slot.working():
                    watcher.look(batch)
            model.module.zero_grad(set_to_none=True)


class _Watcher(Protocol):
    """Takes one thing from the slopes of the loss at what runs through a model."""

    def hooks(self, model: EncoderModel) -> Iterator[RemovableHandle]:
        """Have what it looks at kept, with its slopes."""

    def look(self, batch: Batch) -> None:
        """Look at what was kept of a batch, and let go of it."""


class _Gates:
    """The information of gates on heads and neurons, one tensor a block."""

    def __init__(self, model: EncoderModel) -> None:
        self._blocks = model.shape.blocks
        self.heads = [torch.zeros(block.heads, dtype=torch.float64) for block in self._blocks]
        self.neurons = [torch.zeros(block.neurons, dtype=torch.float64) for block in self._blocks]
        self._read: dict[tuple[int, str], list[torch.Tensor]] = {key: [] for key in _reading(model)}

    def hooks(self, model: EncoderModel) -> Iterator[RemovableHandle]:
        for key, kept in self._read.items():
            yield model.linear(*key).register_forward_pre_hook(partial(self._keep, kept))

    @staticmethod
    def _keep(kept: list[torch.Tensor], _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        value = inputs[0]
        if not value.requires_grad:
            # The lowest one: from here on up everything has a gradient, although all parameters are frozen.
            value.requires_grad_(True)
        value.retain_grad()
        kept.append(value)
        return (value, *inputs[1:])

    def look(self, batch: Batch) -> None:
        for (number, role), values in self._read.items():
            # d loss / d gate = sum over tokens (and a head's width) of activation times its gradient, row by row;
            # over the runs, too, of a block that is run several times, as its gates are the same in all of them.
            gate = torch.stack(
                [(value.detach() * _slope(value)).sum(dim=1, dtype=torch.float64) for value in values]
            ).sum(dim=0)
            if role == "output":
                gate = gate.reshape(len(gate), self._blocks[number].heads, -1).sum(dim=2)
            (self.heads if role == "output" else self.neurons)[number] += gate.square().sum(dim=0)
            values.clear()


class _Outputs:
    """The mean of g g^T over slopes g at what a layer returns at tokens, ``out x out``.

    Of a layer that is run several times the changes add up, and so do their slopes.

    Args:
        layer: whose output is looked at.
        words: which tokens of a batch count, ``rows x tokens``.
    """

    def __init__(self, layer: nn.Module, words: Callable[[Batch], torch.Tensor]) -> None:
        self._layer = layer
        self._words = words
        self._sum = torch.zeros((), dtype=torch.float64)
        self._count = 0
        self._returned: list[torch.Tensor] = []

    def hooks(self, model: EncoderModel) -> Iterator[RemovableHandle]:
        yield self._layer.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: object, output: torch.Tensor) -> None:
        output.requires_grad_(True)
        output.retain_grad()
        self._returned.append(output)

    def look(self, batch: Batch) -> None:
        slopes = torch.stack([_slope(output) for output in self._returned]).sum(dim=0)
        # In single precision it may lack definiteness.
        at_words = slopes[self._words(batch)].double()
        self._sum = self._sum + outer_products(at_words)
        self._count += len(at_words)
        self._returned.clear()

    def mean(self) -> torch.Tensor:
        return self._sum / max(1, self._count)


def _reading(model: EncoderModel) -> list[tuple[int, str]]:
    """Return block and role of all layers that read heads or neurons."""
    return [(number, role) for number in range(len(model.shape.blocks)) for role in READING]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Let no parameter have a gradient for a while."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _slope(value: torch.Tensor) -> torch.Tensor:
    assert value.grad is not None, "all that is looked at leads to the loss"
    return value.grad
