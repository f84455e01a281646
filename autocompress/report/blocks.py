"""The picture of a plan, block by block: how much of each part is kept, and in how many bits."""

from __future__ import annotations

from dataclasses import dataclass

from autocompress.anatomy import ModelShape
from autocompress.decisions import LowRank, MaxTokens, Quantize, TrimVocabulary
from autocompress.plan import MODEL_SITE, CompressionPlan

WHOLE = "w32"
"""Said of a site whose weights stay as they are."""


@dataclass(frozen=True)
class BlockPicture:
    """One block of a compressed model.

    Args:
        heads: attention heads.
        neurons: of the FFN.
        attention_rank: of the factors of its linear layers; 0 where they are whole.
        ffn_rank: the same for the FFN.
        attention_bits: such as ``w8a8`` or ``w4``.
        ffn_bits: the same for the FFN.
    """

    heads: int
    neurons: int
    attention_rank: int
    ffn_rank: int
    attention_bits: str
    ffn_bits: str


@dataclass(frozen=True)
class Picture:
    """A compressed model.

    Args:
        hidden: width between the blocks.
        rows: tokens in the table of embeddings.
        embedding_bits: of the tables.
        head_bits: of the layers after the last block.
        tokens: at which texts are cut; 0 where they are not.
        blocks: from the first to the last that is stored.
        runs: times that each block is run in a row.
    """

    hidden: int
    rows: int
    embedding_bits: str
    head_bits: str
    tokens: int
    blocks: tuple[BlockPicture, ...]
    runs: int

    @classmethod
    def of(cls, plan: CompressionPlan, shape: ModelShape) -> Picture | None:
        """Return what ``plan`` makes of a model of ``shape``; None where it does not fit, which is why it failed."""
        try:
            return cls._of(plan, shape)
        except (IndexError, ValueError):
            return None

    @classmethod
    def _of(cls, plan: CompressionPlan, shape: ModelShape) -> Picture:
        after, bits, ranks = shape.after(plan), plan.of_type(Quantize), plan.of_type(LowRank)

        def said(site: str) -> str:
            return bits[site].words() if site in bits else WHOLE

        def rank(site: str) -> int:
            return ranks[site].rank if site in ranks else 0

        blocks = []
        for number, block in enumerate(after.blocks):
            attention, ffn = f"block.{number}.attention", f"block.{number}.ffn"
            blocks.append(
                BlockPicture(block.heads, block.neurons, rank(attention), rank(ffn), said(attention), said(ffn))
            )
        trim, cut = plan.of_type(TrimVocabulary).get("embeddings"), plan.of_type(MaxTokens).get(MODEL_SITE)
        return cls(
            hidden=after.hidden,
            rows=shape.vocabulary if trim is None else trim.keep,
            embedding_bits=said("embeddings"),
            head_bits=said("head"),
            tokens=0 if cut is None else cut.tokens,
            blocks=tuple(blocks),
            runs=after.runs,
        )
