"""The parts of an encoder by name and size, as plain data.

`model.py` finds them in a torch module; spaces, transforms and runtimes speak of them by these names. One name per
site: ``embeddings``, ``block.<n>.attention``, ``block.<n>.ffn`` and ``head`` (every linear layer outside the blocks).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

from autocompress.decisions import Decision, DropBlocks, PruneHeads, PruneNeurons, Student

SiteKind = Literal["embedding", "attention", "ffn", "head"]


@dataclass(frozen=True)
class Site:
    """A place where decisions are made.

    Args:
        name: unique within the model, such as ``block.3.ffn``.
        kind: which decisions it can take.
        inner: width that pruning can change: heads x head size, FFN neurons, or 0. Of the head: that of the tables,
            where a projection reads them, or 0.
        outer: the model's hidden width; of the embeddings, that of their tables.
        parts: what pruning can remove one by one: heads, neurons, rows of the table of tokens, or 0.
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
    """Sizes of an encoder.

    Args:
        hidden: width between the blocks.
        blocks: heads and FFN neurons, block by block.
        vocabulary: rows of the table of tokens; 0 where that is not known.
        activation: name of the FFN's activation function.
        runs: times that each block is run in a row; its sites are there once.
        table_width: of the embedding tables where a projection follows them; 0 where they have the hidden width.
    """

    hidden: int
    blocks: tuple[BlockShape, ...]
    vocabulary: int = 0
    activation: str = "gelu"
    runs: int = 1
    table_width: int = 0

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelShape:
        """Read what `dataclasses.asdict` makes of a shape.

        Raises:
            TypeError: if fields are missing or unknown.
        """
        return cls(**{**fields, "blocks": tuple(BlockShape(**block) for block in fields["blocks"])})

    def sites(self) -> Mapping[str, Site]:
        """Return all sites by name, in the order of the forward pass."""
        return _sites_of(self)

    @cache  # noqa: B019 - a few shapes, each of which is asked for again and again
    def of_student(self, student: Student) -> ModelShape:
        blocks = tuple(
            dataclasses.replace(self.blocks[b], heads=student.heads, neurons=student.neurons) for b in student.blocks
        )
        return dataclasses.replace(
            self,
            hidden=student.hidden or self.hidden,
            blocks=blocks,
            activation=student.activation or self.activation,
            runs=student.share,
        )

    def without(self, drop: DropBlocks) -> ModelShape:
        kept = tuple(block for number, block in enumerate(self.blocks) if number not in drop.blocks)
        return dataclasses.replace(self, blocks=kept)

    def pruned(self, number: int, *, heads: int | None = None, neurons: int | None = None) -> ModelShape:
        block = self.blocks[number]
        block = dataclasses.replace(block, heads=heads or block.heads, neurons=neurons or block.neurons)
        return dataclasses.replace(self, blocks=(*self.blocks[:number], block, *self.blocks[number + 1 :]))

    def after(self, plan: Iterable[tuple[str, Decision]]) -> ModelShape:
        """Return the shape that structural decisions leave, those of the whole model first; they must fit this model.

        It is asked for at every step of building a plan, so it makes no shapes in between.
        """
        blocks, begun = list(self.blocks), self
        for site, decision in plan:
            if isinstance(decision, Student):
                begun = self.of_student(decision)
                blocks = list(begun.blocks)
            elif isinstance(decision, DropBlocks):
                blocks = [block for number, block in enumerate(blocks) if number not in decision.blocks]
            elif isinstance(decision, (PruneHeads, PruneNeurons)):
                number = int(site.split(".")[1])
                heads, size, neurons = blocks[number].heads, blocks[number].head_size, blocks[number].neurons
                if isinstance(decision, PruneHeads):
                    blocks[number] = BlockShape(decision.keep, size, neurons)
                else:
                    blocks[number] = BlockShape(heads, size, decision.keep)
        return dataclasses.replace(begun, blocks=tuple(blocks))


@lru_cache(maxsize=1024)
def _sites_of(shape: ModelShape) -> Mapping[str, Site]:
    sites = [Site("embeddings", "embedding", 0, shape.table_width or shape.hidden, shape.vocabulary)]
    for number, block in enumerate(shape.blocks):
        inner = block.heads * block.head_size
        sites.append(Site(f"block.{number}.attention", "attention", inner, shape.hidden, block.heads))
        sites.append(Site(f"block.{number}.ffn", "ffn", block.neurons, shape.hidden, block.neurons))
    sites.append(Site("head", "head", shape.table_width, shape.hidden, 0))
    return {site.name: site for site in sites}


def before_drop(site: str, kept: Sequence[int]) -> str:
    """Return the name that ``site`` had before all blocks but those in ``kept`` were dropped."""
    if not site.startswith("block."):
        return site
    _, number, kind = site.split(".")
    return f"block.{kept[int(number)]}.{kind}"


def columns_of(heads: Sequence[int], size: int) -> list[int]:
    """Return the channels of some attention heads of ``size`` channels each."""
    return [head * size + channel for head in heads for channel in range(size)]
