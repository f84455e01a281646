"""Training: fine-tune a head, distil a student, recover a picked point - one loop with two losses.

Distillation mixes the temperature-softened Kullback-Leibler divergence to the teacher's logits, scaled by T^2, with
the labels' cross-entropy (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2). Where the
teacher is at hand, what stands between the blocks may be drawn to the teacher's, too (Jiao et al. 2020, "TinyBERT:
Distilling BERT for Natural Language Understanding", eq. 8, with the identity for the learnt map, as both are equally
wide).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from autocompress import machine
from autocompress.errors import ModelError
from autocompress.task import Batch, Split

Progress = Callable[[str], None]
WARMUP = 0.06
"""Share of steps over which the learning rate rises."""
RECIPE = 2
"""Version of how models are trained, for the keys of what is kept."""


@dataclass(frozen=True, kw_only=True)
class TrainingBudget:
    """How long and how to train.

    Args:
        epochs: passes over the rows; a fraction ends within a pass.
        learning_rate: peak of a linear schedule with warm-up.
        batch_size: rows a step.
        precision: ``auto``, ``float32`` or ``bfloat16`` arithmetic; weights stay in float32.
        temperature: softening of both distributions, for distillation.
        alpha: share of the distillation loss.
        hidden: weight of the mean squared difference to the teacher between the blocks, where that is at hand.
    """

    epochs: float
    learning_rate: float
    batch_size: int
    precision: str = "auto"
    temperature: float = 2.0
    alpha: float = 0.5
    hidden: float = 0.0


@dataclass(frozen=True)
class Example:
    """A teacher to be followed block by block.

    Args:
        module: takes what the smaller model takes; left as it is.
        blocks: pairs of paths: of a block of the smaller model, and of the teacher's block that it is drawn to.
    """

    module: nn.Module
    blocks: tuple[tuple[str, str], ...]


def finetune(module: nn.Module, rows: Split, budget: TrainingBudget, *, seed: int, progress: Progress) -> None:
    """Train ``module`` on the labels, in place."""

    def loss(batch: Batch) -> torch.Tensor:
        with autocast(budget.precision):
            logits = module(**batch.inputs()).logits
        return functional.cross_entropy(logits.float(), batch.labels)

    _train(module, rows, budget, loss, seed=seed, progress=progress)


def distill(
    module: nn.Module,
    teacher: torch.Tensor,
    rows: Split,
    budget: TrainingBudget,
    *,
    frozen: Sequence[str] = (),
    example: Example | None = None,
    seed: int,
    progress: Progress,
) -> None:
    """Train ``module`` towards the teacher's logits (``rows x classes``) and the labels, in place.

    There is no dropout: what is smaller than its teacher and follows it closely does not overfit, and drawing the
    masks takes time.

    Args:
        module: the smaller model.
        teacher: its logits, ``rows x classes``.
        rows: what both read.
        budget: how long and how to train.
        frozen: paths of modules that keep their weights.
        example: the teacher itself, for ``budget.hidden``; it is run beside the smaller model.
        seed: of the order of rows.
        progress: told the loss now and then.
    """
    follow = example if budget.hidden else None
    mine, theirs = zip(*follow.blocks, strict=True) if follow is not None else ((), ())

    def loss(batch: Batch) -> torch.Tensor:
        with _noted(module, mine) as found, autocast(budget.precision):
            logits = module(**batch.inputs()).logits.float()
        soft = functional.kl_div(
            functional.log_softmax(logits / budget.temperature, dim=-1),
            functional.log_softmax(teacher[batch.rows] / budget.temperature, dim=-1),
            log_target=True,
            reduction="batchmean",
        )
        hard = functional.cross_entropy(logits, batch.labels)
        total = budget.alpha * budget.temperature**2 * soft + (1 - budget.alpha) * hard
        if follow is not None:
            with torch.no_grad(), _noted(follow.module, theirs) as wanted, autocast(budget.precision):
                follow.module(**batch.inputs())
            read = batch.attention_mask.bool()
            apart = [(found[a][read].float() - wanted[b][read].float()).square().mean() for a, b in follow.blocks]
            total = total + budget.hidden * torch.stack(apart).mean()
        return total

    kept = [p for path in frozen for p in module.get_submodule(path).parameters() if p.requires_grad]
    for parameter in kept:
        parameter.requires_grad_(False)
    try:
        _train(module, rows, budget, loss, dropout=False, seed=seed, progress=progress)
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)


def logits_of(module: nn.Module, rows: Split, *, precision: str = "float32") -> torch.Tensor:
    """Return the model's logits in row order, ``rows x classes``, float32."""
    module.eval()
    found: torch.Tensor | None = None
    with torch.no_grad(), autocast(precision):
        for batch in rows.in_order_of_length(64):
            logits = module(**batch.inputs()).logits.float()
            if found is None:
                found = torch.empty(len(rows), logits.shape[1])
            found[batch.rows] = logits
    assert found is not None, "no rows"
    return found


def _train(
    module: nn.Module,
    rows: Split,
    budget: TrainingBudget,
    loss_of: Callable[[Batch], torch.Tensor],
    *,
    dropout: bool = True,
    seed: int,
    progress: Progress,
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=budget.learning_rate, weight_decay=0.01, fused=True)
    per_epoch = math.ceil(len(rows) / budget.batch_size)
    steps = max(1, round(per_epoch * budget.epochs))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _linear(step, steps))
    # In evaluation mode dropout is off; gradients flow all the same.
    module.train(dropout)
    step, running = 0, 0.0
    while step < steps:
        for batch in rows.shuffled(budget.batch_size, generator)[: steps - step]:
            loss = loss_of(batch)
            if not torch.isfinite(loss):
                raise ModelError(f"training: the loss is {loss.item()} at step {step}; lower the learning rate")
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            step += 1
            running += (loss.item() - running) / min(step, 50)
            if step % max(1, steps // 10) == 0 or step == steps:
                progress(f"step {step}/{steps}, loss {running:.3f}")
    module.eval()


@contextmanager
def _noted(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Give what the modules at ``paths`` return while ``module`` runs, ``batch x tokens x hidden``, by path."""
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


def _linear(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / max(1.0, WARMUP * steps)) * max(0.0, (steps - step) / steps)


def autocast(precision: str) -> torch.autocast:
    """Return the context in which a model computes in ``precision``; its weights stay as they are."""
    enabled = precision == "bfloat16" or (precision == "auto" and has_bfloat16())
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def has_bfloat16() -> bool:
    """Say whether this CPU multiplies bfloat16 natively, where it is faster than float32."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(machine.cpu()["features"])
