"""Training: fine-tune a head, distil a student, recover a picked point - one loop with the losses of `losses.py`.

Where a recovery may end early, the last training rows are held out of it, and the state that does best on them is kept
(Prechelt 1998, "Early Stopping - But When?"). Candidates are compared on the search rows: a state that was chosen by
these would have a better score than it deserves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from autocompress import losses, machine, slot
from autocompress.errors import ModelError
from autocompress.task import Batch, Split

Progress = Callable[[str], None]
WARMUP = 0.06
"""Share of steps over which the learning rate rises."""
RECIPE = 2
"""Version of how models are trained, for the keys of what is kept."""
HELD_SHARE = 0.1
"""Share of the training rows that is held out where training may end early."""
CHECK_EPOCHS = 0.25
"""Passes between two looks at the held rows."""
_SAID_S = 20.0
"""Seconds after which it is said how far a training is, however little that is."""
_REFITS = 20
"""Times that what is fitted to weights while these are trained is fitted anew: choosing grids costs some steps."""


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
        relations: weight of the divergence from its relations of tokens, where that is at hand.
        l1: weight of the sum of magnitudes of the matrices that are penalised.
        l2: weight of the sum of their squares.
        patience: passes without improvement on held rows after which distillation ends; 0 to use all rows and end last.
    """

    epochs: float
    learning_rate: float
    batch_size: int
    precision: str = "auto"
    temperature: float = 2.0
    alpha: float = 0.5
    hidden: float = 0.0
    relations: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    patience: float = 0.0


@dataclass(frozen=True)
class Example:
    """A teacher to be followed block by block.

    Args:
        module: takes what the smaller model takes; left as it is.
        blocks: pairs of paths: of a block of the smaller model, and of the teacher's block that it is drawn to.
        related: such pairs of paths, within a block, of the layers that give queries, keys and values.
        heads: attention heads of the teacher.
    """

    module: nn.Module
    blocks: tuple[tuple[str, str], ...]
    related: tuple[tuple[str, str], ...] = ()
    heads: int = 1

    def layers(self) -> tuple[tuple[str, str], ...]:
        """Return such pairs of paths of all layers that give queries, keys and values."""
        return tuple((f"{a}.{mine}", f"{b}.{its}") for a, b in self.blocks for mine, its in self.related)


def finetune(module: nn.Module, rows: Split, budget: TrainingBudget, *, seed: int, progress: Progress) -> None:
    """Train ``module`` on the labels, in place."""

    def loss(batch: Batch) -> torch.Tensor:
        with autocast(budget.precision):
            logits = module(**batch.inputs()).logits
        return functional.cross_entropy(logits.float(), batch.labels)

    _train(module, rows, budget, loss, seed=seed, progress=progress)


def distill(
    module: nn.Module,
    teacher: torch.Tensor | None,
    rows: Split,
    budget: TrainingBudget,
    *,
    frozen: Sequence[str] = (),
    penalised: Sequence[str] = (),
    example: Example | None = None,
    refit: Callable[[], None] | None = None,
    seed: int,
    progress: Progress,
) -> None:
    """Train ``module`` towards the teacher's logits (``rows x classes``) and the labels, in place.

    There is no dropout: what is smaller than its teacher and follows it closely does not overfit, and drawing the
    masks takes time.

    Args:
        module: the smaller model.
        teacher: its logits, ``rows x classes``; not needed at ``budget.alpha`` 0.
        rows: what both read. With ``budget.patience`` the last of them are held out, see `parted`.
        budget: how long and how to train.
        frozen: paths of modules that keep their weights.
        penalised: paths of modules whose matrices ``budget.l1`` and ``budget.l2`` hold down.
        example: the teacher itself, for ``budget.hidden`` and ``budget.relations``; it is run beside the smaller model.
        refit: called now and then, but not after the last step; it may set buffers of ``module`` by its weights.
        seed: of the order of rows.
        progress: told the loss now and then.
    """
    follow = _Following(example, budget) if example is not None and (budget.hidden or budget.relations) else None
    inside = [p for path in penalised for p in module.get_submodule(path).parameters()]
    matrices = [p for p in inside if p.dim() == 2] if budget.l1 or budget.l2 else []

    def loss(batch: Batch) -> torch.Tensor:
        with losses.noted(module, follow.mine if follow is not None else ()) as found, autocast(budget.precision):
            logits = module(**batch.inputs()).logits.float()
        total = _distance(logits, teacher, batch, budget)
        if follow is not None:
            total = total + follow.apart(found, batch)
        if matrices:
            total = total + losses.penalty(matrices, l1=budget.l1, l2=budget.l2)
        return total

    kept = [p for path in frozen for p in module.get_submodule(path).parameters() if p.requires_grad]
    for parameter in kept:
        parameter.requires_grad_(False)
    try:
        if budget.patience:
            learnt, held = parted(rows)

            def judge() -> float:
                return held_loss(module, teacher, rows, held, budget)

            _train(module, learnt, budget, loss, dropout=False, judge=judge, refit=refit, seed=seed, progress=progress)
        else:
            _train(module, rows, budget, loss, dropout=False, refit=refit, seed=seed, progress=progress)
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)


def parted(rows: Split) -> tuple[Split, range]:
    """Return the rows to learn from, and the numbers of the last ones, which are held out.

    Training rows stand in the order of a hash of their text, so that the last ones are drawn at random. The
    uncompressed model may have learnt from them; what is trained here does not.
    """
    count = len(rows) - max(1, round(HELD_SHARE * len(rows)))
    return rows.head(count), range(count, len(rows))


def held_loss(
    module: nn.Module, teacher: torch.Tensor | None, rows: Split, held: Sequence[int], budget: TrainingBudget
) -> float:
    """Return the mean loss on held rows, of teacher and labels only.

    The loss and not the accuracy: so few rows tell states apart by their accuracy only where it differs by points. What
    draws the blocks together and what holds weights down are means to that end.

    Args:
        module: the smaller model.
        teacher: its logits on all rows, ``rows x classes``; not needed at ``budget.alpha`` 0.
        rows: among which the held ones are.
        held: their numbers.
        budget: how teacher and labels are mixed.
    """
    module.eval()
    total = 0.0
    with torch.no_grad():
        for batch in rows.in_order_of_length(64, among=held):
            with autocast(budget.precision):
                logits = module(**batch.inputs()).logits.float()
            total += float(_distance(logits, teacher, batch, budget)) * len(batch.labels)
    return total / len(held)


def _distance(logits: torch.Tensor, teacher: torch.Tensor | None, batch: Batch, budget: TrainingBudget) -> torch.Tensor:
    target = teacher[batch.rows] if teacher is not None and budget.alpha else None
    return losses.distillation(logits, batch.labels, target, alpha=budget.alpha, temperature=budget.temperature)


class _Following:
    """A teacher that runs beside the smaller model and is compared with it within.

    Args:
        example: the teacher, with what is to be compared.
        budget: how much each comparison weighs.
    """

    def __init__(self, example: Example, budget: TrainingBudget) -> None:
        self.example, self.budget = example, budget
        self.blocks = example.blocks if budget.hidden else ()
        self.layers = example.layers() if budget.relations else ()
        self.mine, self.theirs = zip(*self.blocks, *self.layers, strict=True)

    def apart(self, found: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """Return the weighted distance between what the smaller model's parts returned and what the teacher's do."""
        module, read = self.example.module, batch.attention_mask.bool()
        with torch.no_grad(), losses.noted(module, self.theirs) as wanted, autocast(self.budget.precision):
            module(**batch.inputs())
        total = torch.zeros(())
        if self.blocks:
            apart = [losses.square_apart(found[a], wanted[b], read) for a, b in self.blocks]
            total = total + self.budget.hidden * torch.stack(apart).mean()
        if self.layers:
            heads = self.example.heads
            apart = [losses.relations_apart(found[a], wanted[b], read, heads) for a, b in self.layers]
            # Queries, keys and values add up (Wang et al. 2021, section 3.1); blocks count in the mean, as above.
            total = total + self.budget.relations * torch.stack(apart).sum() / len(self.example.blocks)
        return total


def logits_of(
    module: nn.Module, rows: Split, *, precision: str = "float32", progress: Progress | None = None
) -> torch.Tensor:
    """Return the model's logits in row order, ``rows x classes``, float32."""
    module.eval()
    found: torch.Tensor | None = None
    done, said = 0, time.monotonic()
    with torch.no_grad(), autocast(precision):
        for batch in rows.in_order_of_length(64):
            with slot.working():
                logits = module(**batch.inputs()).logits.float()
            if found is None:
                found = torch.empty(len(rows), logits.shape[1])
            found[batch.rows] = logits
            done += len(logits)
            if progress is not None and time.monotonic() - said > _SAID_S:
                said = time.monotonic()
                progress(f"{done}/{len(rows)} rows")
    assert found is not None, "no rows"
    return found


def _train(
    module: nn.Module,
    rows: Split,
    budget: TrainingBudget,
    loss_of: Callable[[Batch], torch.Tensor],
    *,
    dropout: bool = True,
    judge: Callable[[], float] | None = None,
    refit: Callable[[], None] | None = None,
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
    state = [*parameters, *module.buffers()]
    best = None if judge is None else _Best(state, judge, patience=budget.patience * per_epoch)
    every = max(1, round(per_epoch * CHECK_EPOCHS))
    # In evaluation mode dropout is off; gradients flow all the same.
    module.train(dropout)
    running, said = 0.0, time.monotonic()
    for step, batch in enumerate(_drawn(rows, budget.batch_size, steps, generator), start=1):
        loss = loss_of(batch)
        if not torch.isfinite(loss):
            raise ModelError(f"training: the loss is {loss.item()} at step {step - 1}; lower the learning rate")
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        running += (loss.item() - running) / min(step, 50)
        if refit is not None and step % max(1, steps // _REFITS) == 0 and step < steps:
            refit()
        if step % max(1, steps // 10) == 0 or step == steps or time.monotonic() - said > _SAID_S:
            said = time.monotonic()
            progress(f"step {step}/{steps}, loss {running:.3f}")
        if best is not None and (step % every == 0 or step == steps) and not best.goes_on(step):
            progress(f"ends at step {step}/{steps}: no better on held rows since step {best.step}")
            break
    if best is not None:
        best.restore()
        progress(f"kept the state of step {best.step}/{steps}, loss on held rows {best.loss:.3f}")
    module.eval()


def _drawn(rows: Split, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield so many batches, pass by pass."""
    left = steps
    while left > 0:
        batches = rows.shuffled(batch_size, generator)[:left]
        yield from batches
        left -= len(batches)


class _Best:
    """The state that does best on held rows, while training goes on.

    Args:
        state: what is trained or fitted to it.
        judge: returns the loss on held rows.
        patience: steps without improvement after which training ends.
    """

    def __init__(self, state: Sequence[torch.Tensor], judge: Callable[[], float], *, patience: float) -> None:
        self._state, self._judge, self._patience = state, judge, patience
        self._kept: list[torch.Tensor] = []
        self.loss, self.step = math.inf, 0

    def goes_on(self, step: int) -> bool:
        """Judge the state after ``step`` steps, note it if it is the best so far, and say whether to go on.

        Raises:
            ModelError: if its loss is not finite.
        """
        loss = self._judge()
        if not math.isfinite(loss):
            raise ModelError(f"training: the loss on held rows is {loss} at step {step}; lower the learning rate")
        if loss < self.loss:
            self.loss, self.step = loss, step
            self._kept = [tensor.detach().clone() for tensor in self._state]
        return step - self.step < self._patience

    def restore(self) -> None:
        """Go back to the best state."""
        with torch.no_grad():
            for tensor, value in zip(self._state, self._kept, strict=True):
                tensor.copy_(value)


def _linear(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / max(1.0, WARMUP * steps)) * max(0.0, (steps - step) / steps)


def autocast(precision: str) -> torch.autocast:
    """Return the context in which a model computes in ``precision``; its weights stay as they are."""
    enabled = precision == "bfloat16" or (precision == "auto" and machine.has_bfloat16())
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)
