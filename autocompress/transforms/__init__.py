"""Compression methods: one file each, a decision class and its handler in one table.

Structural decisions change the torch module here, in the order of `decisions.DECISIONS`; what `Quantize` and
`TrimVocabulary` decide is carried out by the runtime with the arithmetic of `quantize.py` and `vocabulary.py`, and
`MaxTokens` by the runtime alone. Students and recovery need training and live in the bank.
"""

from __future__ import annotations

from typing import Any, Protocol

from autocompress.anatomy import ModelShape, Site
from autocompress.decisions import (
    Decision,
    DropBlocks,
    LowRank,
    PruneHeads,
    PruneNeurons,
    Quantize,
    Recover,
    Student,
    TrimVocabulary,
)
from autocompress.errors import PlanError
from autocompress.model import EncoderModel
from autocompress.plan import CompressionPlan
from autocompress.transforms.factorize import Factorization
from autocompress.transforms.importance import Importance
from autocompress.transforms.prune import HeadPruning, NeuronPruning, keep_blocks
from autocompress.transforms.quantize import check_groups
from autocompress.transforms.vocabulary import check_rows


class Transform(Protocol):
    """A handler of one decision type at one site."""

    def check(self, site: Site, decision: Any) -> None:
        """Raise `PlanError` if the decision cannot be carried out at ``site``."""

    def apply(self, model: EncoderModel, site: Site, decision: Any, scores: Importance) -> None:
        """Change ``model`` in place; the resulting sizes are what `ModelShape.after` says."""


HANDLERS: dict[type[Decision], Transform] = {
    PruneHeads: HeadPruning(),
    PruneNeurons: NeuronPruning(),
    LowRank: Factorization(),
}


def check_plan(plan: CompressionPlan, shape: ModelShape) -> None:
    """Check every decision of ``plan`` against a model of ``shape``, before any work.

    Raises:
        PlanError: naming the site, what is allowed and what the plan says.
    """
    for student in plan.of_type(Student).values():
        _check_student(student, shape)
        for recovery in plan.of_type(Recover).values():
            if student.hidden and recovery.hidden:
                raise PlanError(
                    f"model: Recover.hidden must be 0 where the student is {student.hidden} wide, as its blocks cannot "
                    f"be compared with the model's, which are {shape.hidden} wide"
                )
            if student.share > 1 and recovery.reconstruct:
                raise PlanError("model: Recover.reconstruct must be false where blocks are run several times")
        shape = shape.of_student(student)
    for drop in plan.of_type(DropBlocks).values():
        depth = len(shape.blocks)
        if drop.blocks[-1] >= depth or len(drop.blocks) >= depth:
            raise PlanError(f"model: blocks to drop must be < {depth} and leave one, got {drop.blocks}")
        shape = shape.without(drop)
    ranks = plan.of_type(LowRank)
    for kind in (PruneHeads, PruneNeurons, LowRank, TrimVocabulary, Quantize):
        sites = shape.sites()
        for name, decision in plan.of_type(kind).items():
            if name not in sites:
                raise PlanError(f"{name}: no such site; the model has {', '.join(sites)}")
            if isinstance(decision, Quantize):
                check_groups(sites[name], decision, ranks[name].rank if name in ranks else 0)
            elif isinstance(decision, TrimVocabulary):
                check_rows(sites[name], decision)
            else:
                HANDLERS[kind].check(sites[name], decision)
        shape = shape.after(CompressionPlan(tuple(plan.of_type(kind).items())))


def _check_student(student: Student, shape: ModelShape) -> None:
    depth = len(shape.blocks)
    if student.blocks[-1] >= depth:
        raise PlanError(f"model: student blocks must be < {depth}, got {student.blocks}")
    for number in student.blocks:
        block = shape.blocks[number]
        if student.heads > block.heads or student.neurons > block.neurons:
            raise PlanError(
                f"model: a student block keeps at most {block.heads} heads and {block.neurons} neurons, got "
                f"{student.heads} and {student.neurons}"
            )
    if student.hidden >= shape.hidden:
        raise PlanError(f"model: Student.hidden must be < {shape.hidden}, or 0 for all of them, got {student.hidden}")
    if student.activation == shape.activation:
        raise PlanError(f"model: Student.activation: {student.activation} is what the model has; leave it empty")
    if len(student.blocks) * student.share > depth:
        raise PlanError(
            f"model: a student runs at most {depth} blocks, got {len(student.blocks)} blocks x {student.share} times"
        )


def apply_plan(model: EncoderModel, plan: CompressionPlan, scores: Importance) -> None:
    """Carry out the structural decisions of ``plan`` on ``model``, which already is the student where one is named.

    ``scores`` belong to ``model`` as it is given: block numbers count before any block is dropped.

    Raises:
        PlanError: if a decision does not fit; the model is then unchanged.
    """
    own = plan.without(Student, Recover)
    check_plan(own, model.shape)
    for drop in own.of_type(DropBlocks).values():
        kept = [n for n in range(len(model.shape.blocks)) if n not in drop.blocks]
        keep_blocks(model, kept)
        scores = scores.of_blocks(kept)
    for kind, handler in HANDLERS.items():
        for name, decision in own.of_type(kind).items():
            handler.apply(model, model.shape.sites()[name], decision, scores)
