"""What training lowers: the distance to labels and to a teacher's logits, blocks and attention, and penalties.

Distillation mixes the temperature-softened Kullback-Leibler divergence to the teacher's logits, scaled by T^2, with
the labels' cross-entropy (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2). Where the
teacher is at hand, what stands between the blocks may be drawn to the teacher's, too (Jiao et al. 2020, "TinyBERT:
Distilling BERT for Natural Language Understanding", eq. 8, with the identity for the learnt map, as both are equally
wide), and so may the relations of tokens in its attention (Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention
Relation Distillation for Compressing Pretrained Transformers", section 3.1), which asks for no equal number of heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def distillation(
    logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None, *, alpha: float, temperature: float
) -> torch.Tensor:
    """Return the mean loss of a batch.

    Args:
        logits: of the smaller model, ``batch x classes``.
        labels: class numbers, ``batch``.
        teacher: its logits, ``batch x classes``; not read at an ``alpha`` of 0.
        alpha: share of the teacher.
        temperature: softening of both distributions.
    """
    hard = functional.cross_entropy(logits, labels)
    if not alpha:
        return hard
    assert teacher is not None, "a share of a teacher that is not there"
    soft = functional.kl_div(
        functional.log_softmax(logits / temperature, dim=-1),
        functional.log_softmax(teacher / temperature, dim=-1),
        log_target=True,
        reduction="batchmean",
    )
    return alpha * temperature**2 * soft + (1 - alpha) * hard


def square_apart(mine: torch.Tensor, theirs: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of two ``batch x tokens x hidden`` at tokens that are no padding.

    Args:
        mine: what a block of the smaller model returns.
        theirs: what the teacher's block returns.
        read: ``batch x tokens``, bool, False for padding.
    """
    return (mine[read].float() - theirs[read].float()).square().mean()


def relations_apart(mine: torch.Tensor, theirs: torch.Tensor, read: torch.Tensor, heads: int) -> torch.Tensor:
    """Return how far the relations of tokens are from the teacher's, as a mean over tokens and relation heads.

    Queries (or keys, or values) of all heads are taken as one vector and cut anew into relation heads. A token's
    relation to all tokens of its text is the softmax of the scaled products of their vectors; relations are compared
    by their Kullback-Leibler divergence (Wang et al. 2021, section 3.1).

    Args:
        mine: queries, keys or values of the smaller model, ``batch x tokens x width``.
        theirs: the teacher's, ``batch x tokens x width``, of another width where heads were pruned.
        read: ``batch x tokens``, bool, False for padding.
        heads: the teacher's heads; as many relation heads, or the most of their divisors that divide ``mine``, too.
    """
    heads = math.gcd(heads, mine.shape[-1])
    wanted, found = (_relations(vectors, read, heads) for vectors in (theirs, mine))
    apart = functional.kl_div(found, wanted, log_target=True, reduction="none").sum(dim=-1)
    return apart.transpose(1, 2)[read].mean()


def _relations(vectors: torch.Tensor, read: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the logarithms of relations, ``batch x heads x tokens x tokens``; rows of padding mean nothing."""
    split = vectors.float().reshape(*vectors.shape[:-1], heads, -1).transpose(1, 2)
    products: torch.Tensor = split @ split.transpose(-1, -2) / math.sqrt(split.shape[-1])
    # Not minus infinity: a padded token is to add 0 times a difference, which then has to be finite.
    return products.masked_fill(~read[:, None, None, :], torch.finfo(products.dtype).min).log_softmax(dim=-1)


def penalty(matrices: Sequence[torch.Tensor], *, l1: float, l2: float) -> torch.Tensor:
    """Return ``l1`` times the sum of magnitudes and ``l2`` times the sum of squares of all weights."""
    total = torch.zeros(())
    for matrix in matrices:
        if l1:
            total = total + l1 * matrix.abs().sum()
        if l2:
            total = total + l2 * matrix.square().sum()
    return total


@contextmanager
def noted(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Give what the modules at ``paths`` return while ``module`` runs, ``batch x tokens x width``, by path."""
    found: dict[str, torch.Tensor] = {}

    def note(path: str) -> Callable[[nn.Module, object, Any], None]:
        def hook(_: nn.Module, inputs: object, output: Any) -> None:
            found[path] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    handles = [module.get_submodule(path).register_forward_hook(note(path)) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
