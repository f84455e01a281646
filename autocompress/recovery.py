"""How a picked point is recovered: with which budget, for how long, and what of the teacher it is drawn to.

All of it follows from plan and run file. How long may be counted from arithmetic, but is never timed: it becomes part
of the plan, which has to be the same on every machine.
"""

from __future__ import annotations

import dataclasses
import math

from autocompress import training
from autocompress.config import OF_PICKED_POINTS, RecoveryConfig
from autocompress.decisions import DropBlocks, Recover, Student
from autocompress.model import EncoderModel
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.products import Sizes, products_of

_BUDGETED = frozenset(field.name for field in dataclasses.fields(training.TrainingBudget))
HEADED_EPOCHS = 3.0
"""Passes that stand for one fine-tuning where the model came with a head (Devlin et al. 2019, section 4.1)."""
_TRAINING = 3.0
"""Forward passes that a step of training is worth: going back takes twice as much (Kaplan et al. 2020, section 2.1)."""


def budget_of(asked: RecoveryConfig, decided: Student | Recover, *, precision: str) -> training.TrainingBudget:
    """Return the budget of one training; that of a student has no options of picked points."""
    shared = asked.model_dump(exclude={*OF_PICKED_POINTS, "epochs", "precision"})
    # A student's `hidden` is a width.
    of_point = vars(decided) if isinstance(decided, Recover) else {}
    own = {name: value for name, value in of_point.items() if name in OF_PICKED_POINTS & _BUDGETED}
    return training.TrainingBudget(epochs=decided.epochs, precision=precision, **shared, **own)


def affordable_epochs(
    plan: CompressionPlan, wanted: Recover, teacher: EncoderModel, finetune_epochs: float, *, alpha: float
) -> float:
    """Return the passes of a recovery that cost at most one fine-tuning of the uncompressed model.

    Costs are multiplications of the blocks' matrices for a token: tables are looked up, and the head runs once a text.

    Args:
        plan: what is recovered.
        wanted: how; its epochs are not read.
        teacher: the uncompressed model.
        finetune_epochs: passes of that fine-tuning.
        alpha: share of the teacher's logits, which take one forward pass of it.

    Returns:
        Passes, rounded down to hundredths; at least 0.01, which may be more than that, and at most 100.
    """
    full, small = (_multiplications(each, teacher) for each in (CompressionPlan(), plan))
    a_pass = _TRAINING * small + (full if wanted.hidden or wanted.relations else 0)
    if wanted.patience:
        judged = training.HELD_SHARE * small / training.CHECK_EPOCHS
        a_pass = (1 - training.HELD_SHARE) * a_pass + judged
    left = _TRAINING * full * finetune_epochs - (full if alpha else 0)
    return min(100.0, max(0.01, math.floor(100 * left / (a_pass * wanted.seeds)) / 100))


def _multiplications(plan: CompressionPlan, teacher: EncoderModel) -> int:
    products = products_of(plan, teacher.shape, Sizes.of(teacher))
    stored = sum(product.outer * product.inner for product in products if product.kind in ("attention", "ffn"))
    return stored * teacher.shape.after(plan).runs


def example_of(plan: CompressionPlan, teacher: EncoderModel, built: EncoderModel) -> training.Example:
    """Return the teacher with those of its parts that the parts of ``built``, which ``plan`` led to, are drawn to."""
    own, its = built.layout, teacher.layout
    blocks = counterparts(plan, len(teacher.shape.blocks))
    return training.Example(
        teacher.module,
        tuple((f"{own.blocks}.{mine}", f"{its.blocks}.{last}") for mine, (_, last) in enumerate(blocks)),
        related=tuple((own.roles[role], its.roles[role]) for role in ("query", "key", "value")),
        heads=teacher.shape.blocks[0].heads,
    )


def first_other(plan: CompressionPlan, depth: int) -> int:
    """Return the first of the blocks that a plan leaves of ``depth`` where it removes something, or else how many.

    A student's blocks count as they are: those of ``depth`` that it has.
    """
    plan = plan.without(Student)
    blocks = counterparts(plan, depth)
    pruned = {site.split(".")[1] for site, _ in plan.structural() if site.startswith("block.")}
    others = (n for n, its in enumerate(blocks) if its != (n, n) or str(n) in pruned)
    return next(others, len(blocks))


def counterparts(plan: CompressionPlan, depth: int) -> list[tuple[int, int]]:
    """Return for each block that a plan leaves the first and the last block that it stands for, of ``depth`` blocks.

    The first is the one that it was, and the last the one before the next that is left: it has to do the work of those
    that are gone in between.
    """
    student, drop = plan.of_type(Student).get(MODEL_SITE), plan.of_type(DropBlocks).get(MODEL_SITE)
    taken = student.blocks if student is not None else range(depth)
    left = [block for number, block in enumerate(taken) if drop is None or number not in drop.blocks]
    return [(first, following - 1) for first, following in zip(left, [*left[1:], depth], strict=True)]
