"""Hold ways of trimming the vocabulary against each other: ``results/benchmarks/methods-vocabulary.json``.

``python benchmarks/methods_vocabulary.py`` keeps some rows of the fine-tuned demo model's table of tokens and
compresses nothing else. Which rows are kept, and which of them the other tokens read, is decided by what the loss makes
of rows and, for comparison, by their plain distance; figures are those of `methods_ablation.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from figures import Figures
from held_out import DATA
from methods_ablation import Change, Side, compare

from autocompress.config import RunConfig
from autocompress.decisions import TrimVocabulary
from autocompress.evaluate import Workshop
from autocompress.model import EncoderModel
from autocompress.plan import CompressionPlan
from autocompress.transforms.importance import Importance
from autocompress.transforms.vocabulary import TokenUse

SHARES = (0.25, 0.125, 0.0625)


def by_loss(_: EncoderModel, scores: Importance) -> Importance:
    """Return what a search does."""
    return scores


def by_distance(counts: torch.Tensor) -> Change:
    """Return what ranks and compares rows as such, whatever the loss makes of them."""

    def change(base: EncoderModel, scores: Importance) -> Importance:
        assert scores.tokens is not None
        table = base.module.get_parameter(f"{base.layout.embeddings[0]}.weight").detach()
        plain = torch.zeros_like(scores.tokens.slopes)
        return dataclasses.replace(scores, tokens=TokenUse.of(table, counts, plain))

    return change


def comparisons(shop: Workshop) -> dict[str, tuple[Side, Side]]:
    """Return a method and its counterpart, by what the comparison is called."""
    rows = shop.teacher.shape.vocabulary
    plans = {share: CompressionPlan((("embeddings", TrimVocabulary(keep=round(share * rows))),)) for share in SHARES}
    return {
        f"{share:.2%} of the vocabulary: by the loss over by distance": (("loss", plan), ("distance", plan))
        for share, plan in plans.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = Figures("methods-vocabulary", "python benchmarks/methods_vocabulary.py")
    figures.read()
    for data in options.data:
        with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
            run = RunConfig.from_file("demo", overrides=[f"data.source={data}"])
            counts = Workshop(run, Path(scratch) / "counted", print)._counts()
            variants = {"loss": by_loss, "distance": by_distance(counts)}
            compare(figures, data, Path(scratch), variants, comparisons)


if __name__ == "__main__":
    main()
