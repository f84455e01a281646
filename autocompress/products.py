"""The matrices that a planned model stores, counted from the plan and the sizes of the uncompressed model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.anatomy import ModelShape
from autocompress.decisions import LowRank, Quantize, TrimVocabulary
from autocompress.plan import CompressionPlan

if TYPE_CHECKING:
    from autocompress.model import EncoderModel


@dataclass(frozen=True)
class Product:
    """One stored matrix of a planned model, ``outer x inner``.

    Args:
        kind: of its site, or ``index`` for the row that each token reads where the vocabulary was trimmed.
        outer: rows.
        inner: columns.
        bits: 32 where nothing is decided.
        group: weights that share a step, below 8 bits.
        bias: whether it has one.
        shares: whether it reads the same tensor as the one before it, as keys and values do.
        integers: whether it is multiplied by 8-bit numbers.
        whole_steps: whether the steps of its groups are whole multiples of a unit of their row.
    """

    kind: str
    outer: int
    inner: int
    bits: int
    group: int = 0
    bias: bool = True
    shares: bool = False
    integers: bool = False
    whole_steps: bool = False


@dataclass(frozen=True)
class Sizes:
    """Matrices of the uncompressed model outside its blocks, ``outer x inner`` each; the first table is of tokens."""

    tables: tuple[tuple[int, int], ...]
    head: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, model: EncoderModel) -> Sizes:
        """Read them off a model."""

        def sizes(paths: Iterable[str]) -> tuple[tuple[int, int], ...]:
            weights = (model.module.get_parameter(f"{path}.weight") for path in paths)
            return tuple((w.shape[0], w.shape[1]) for w in weights)

        return cls(sizes(model.layout.embeddings), sizes(model.layout.head))

    def narrowed(self, hidden: int, kept: int) -> Sizes:
        """Return them with every width between the blocks (``hidden``) cut to ``kept``; classes stay as many."""

        def width(size: int) -> int:
            return kept if size == hidden else size

        *inner, (classes, last) = self.head
        tables = tuple((rows, width(columns)) for rows, columns in self.tables)
        return Sizes(tables, (*((width(outer), width(columns)) for outer, columns in inner), (classes, width(last))))


def products_of(plan: CompressionPlan, shape: ModelShape, sizes: Sizes) -> list[Product]:
    """Return every matrix of the model that ``plan`` leads to from one of ``shape``; shared ones once."""
    quantize, ranks = plan.of_type(Quantize), plan.of_type(LowRank)
    after = shape.after(plan)
    if after.hidden != shape.hidden:
        sizes = sizes.narrowed(shape.hidden, after.hidden)
    found: list[Product] = []

    def add(site: str, kind: str, pairs: Iterable[tuple[int, int]]) -> None:
        decision = quantize.get(site)
        bits, group = (32, 0) if decision is None else (decision.weight_bits, decision.group_size)
        stored = {
            "integers": decision is not None and decision.activation_bits == 8 and kind != "embedding",
            "whole_steps": decision is not None and decision.whole_steps,
        }
        rank = ranks[site].rank if site in ranks else 0
        for number, (outer, inner) in enumerate(pairs):
            shares = kind == "attention" and number in (1, 2)
            if rank:
                found.append(Product(kind, rank, inner, bits, group, bias=False, shares=shares, **stored))
            biased, shares = kind != "embedding", shares and not rank
            found.append(Product(kind, outer, rank or inner, bits, group, biased, shares, **stored))

    (vocabulary, width), *others = sizes.tables
    trim = plan.of_type(TrimVocabulary).get("embeddings")
    if trim is not None:
        found.append(Product("index", vocabulary, 1, trim.index_bits, bias=False))
    add("embeddings", "embedding", [(vocabulary if trim is None else trim.keep, width), *others])
    for number, block in enumerate(after.blocks):
        width = block.heads * block.head_size
        attention = [(width, after.hidden)] * 3 + [(after.hidden, width)]
        add(f"block.{number}.attention", "attention", attention)
        add(f"block.{number}.ffn", "ffn", [(block.neurons, after.hidden), (after.hidden, block.neurons)])
    add("head", "head", sizes.head)
    return found
