"""The parts of an encoder by name and size, as plain data.

`model.py` finds them in a torch module; spaces, transforms and runtimes speak of them by these names. One name per
site: ``embeddings``, ``block.<n>.attention``, ``block.<n>.ffn`` and ``head`` (every linear layer outside the blocks).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from autocompress.plan import CompressionPlan, DropBlocks, PruneHeads, PruneNeurons, Student

SiteKind = Literal["embedding", "attention", "ffn", "head"]


@dataclass(frozen=True)
class Site:
    """A place where decisions are made.

    Args:
        name: unique within the model, such as ``block.3.ffn``.
        kind: which decisions it can take.
        inner: width that pruning can change: heads x head size, FFN neurons, or 0.
        outer: the model's hidden width.
        parts: units of the inner width: heads, neurons, or 0.
    """

    name: str
    kind: SiteKind
    inner: int
    outer: int
    parts: int

    def largest_saving_rank(self) -> int:
        """Largest rank at which two factors hold fewer weights than the layer: r(m + n) < mn."""
        return (self.inner * self.outer - 1) // (self.inner + self.outer)


@dataclass(frozen=True)
class BlockShape:
    heads: int
    head_size: int
    neurons: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of an encoder: hidden width and, block by block, heads and FFN neurons."""

    hidden: int
    blocks: tuple[BlockShape, ...]

    def sites(self) -> dict[str, Site]:
        """Return all sites by name, in the order of the forward pass."""
        sites = [Site("embeddings", "embedding", 0, self.hidden, 0)]
        for number, block in enumerate(self.blocks):
            inner = block.heads * block.head_size
            sites.append(Site(f"block.{number}.attention", "attention", inner, self.hidden, block.heads))
            sites.append(Site(f"block.{number}.ffn", "ffn", block.neurons, self.hidden, block.neurons))
        sites.append(Site("head", "head", 0, self.hidden, 0))
        return {site.name: site for site in sites}

    def of_student(self, student: Student) -> ModelShape:
        blocks = tuple(
            dataclasses.replace(self.blocks[b], heads=student.heads, neurons=student.neurons) for b in student.blocks
        )
        return dataclasses.replace(self, blocks=blocks)

    def without(self, drop: DropBlocks) -> ModelShape:
        kept = tuple(block for number, block in enumerate(self.blocks) if number not in drop.blocks)
        return dataclasses.replace(self, blocks=kept)

    def pruned(self, number: int, *, heads: int | None = None, neurons: int | None = None) -> ModelShape:
        block = self.blocks[number]
        block = dataclasses.replace(block, heads=heads or block.heads, neurons=neurons or block.neurons)
        return dataclasses.replace(self, blocks=(*self.blocks[:number], block, *self.blocks[number + 1 :]))

    def after(self, plan: CompressionPlan) -> ModelShape:
        """Return the shape that the structural decisions of ``plan`` leave; the plan must fit this model."""
        shape = self
        for student in plan.of_type(Student).values():
            shape = shape.of_student(student)
        for drop in plan.of_type(DropBlocks).values():
            shape = shape.without(drop)
        for site, prune in plan.of_type(PruneHeads).items():
            shape = shape.pruned(int(site.split(".")[1]), heads=prune.keep)
        for site, cut in plan.of_type(PruneNeurons).items():
            shape = shape.pruned(int(site.split(".")[1]), neurons=cut.keep)
        return shape


def before_drop(site: str, kept: Sequence[int]) -> str:
    """Return the name that ``site`` had before all blocks but those in ``kept`` were dropped."""
    if not site.startswith("block."):
        return site
    _, number, kind = site.split(".")
    return f"block.{kept[int(number)]}.{kind}"
