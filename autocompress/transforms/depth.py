"""In which order whole blocks go: by what the predictions are without them.

That is the Kullback-Leibler divergence to the full model on calibration rows, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional

from autocompress import slot
from autocompress.model import Autocast, EncoderModel
from autocompress.task import Batch


def drop_order(
    model: EncoderModel, batches: Sequence[Batch], drops: int, *, autocast: Autocast = nullcontext
) -> tuple[int, ...]:
    """Return the numbers of all blocks, least important first; the model is left unchanged.

    Args:
        model: whose blocks they are.
        batches: calibration rows.
        drops: how many blocks are removed greedily, each time the one without which predictions change least. The
            others follow by what they did at the last step; with 0 they go from the last to the first.
        autocast: entered for each run of the model, as where half precision is faster.
    """
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
    with slot.working(), torch.no_grad(), autocast():
        return functional.log_softmax(model.module(**batch.inputs()).logits.float(), dim=-1)
