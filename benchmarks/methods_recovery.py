"""Hold ways of recovering a structure against each other: ``results/benchmarks/methods-recovery.json``.

``python benchmarks/methods_recovery.py`` prunes the fine-tuned demo model to small structures and trains each of them
for the same passes in several ways: on the labels alone, from the model's logits, with its blocks as examples, which
is the default, and with one more ingredient each on top of that; and one of them with weights of few bits, rounded
after the training (where GPTQ fits them) or in the course of it. Logits alone and blocks are compared at the same cost,
too. Figures are those of `methods_ablation.py`. Two seeds that are averaged take twice the time, and a training that
may end early leaves out a tenth of its rows. Each way is trained once: intervals tell what other rows would have said,
not what other seeds would.

Trained weights are kept in the bank, and a comparison that is on file is not made again, so that it can be interrupted.
``--rows`` and ``--epochs`` try it on less; what that gives goes into a file of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from figures import Figures
from held_out import DATA, add_comparison, hits, logits_of
from methods_ablation import W8A8

from autocompress.config import RunConfig
from autocompress.decisions import Decision, DropBlocks, PruneHeads, PruneNeurons, Quantize
from autocompress.evaluate import Workshop
from autocompress.plan import MODEL_SITE, CompressionPlan

EPOCHS = 3.0
RECIPES: dict[str, tuple[str, ...]] = {
    "labels": ("alpha=0", "hidden=0"),
    "logits": ("hidden=0",),
    "blocks": (),
    "relations": ("relations=1",),
    "soup": ("seeds=2",),
    "early": ("patience=0.5",),
    "rounded": ("quantized=true",),
    "reconstructed": ("reconstruct=true",),
    "logits for a fine-tuning": ("hidden=0", "epochs=auto"),
    "blocks for a fine-tuning": ("epochs=auto",),
}
"""What is asked of recovery beside its defaults."""
COMPARISONS = {
    "logits over labels alone": ("logits", "labels"),
    "blocks and logits over logits alone": ("blocks", "logits"),
    # Blocks as examples need the teacher in every pass, so that fewer passes cost as much.
    "blocks over logits, each at one fine-tuning's cost": ("blocks for a fine-tuning", "logits for a fine-tuning"),
    "relations added": ("relations", "blocks"),
    "two seeds averaged": ("soup", "blocks"),
    "best state on held rows": ("early", "blocks"),
    "reconstructed before": ("reconstructed", "blocks"),
}
"""A recipe and its counterpart, by what the difference is called."""
OF_FEW_BITS = {"rounded in training over afterwards": ("rounded", "blocks")}
"""The same for structures of few bits."""


def structures(shop: Workshop) -> dict[str, tuple[CompressionPlan, dict[str, tuple[str, str]]]]:
    """Return small structures by what they are called, and what is compared there; all in 8 bits unless they say so."""
    shape = shop.teacher.shape
    half = len(shape.blocks) // 2
    dropped = tuple(sorted(shop.drop_order(None)[:half]))
    shallow = _pruned(shop, blocks=len(shape.blocks) - half, part=2).with_decision(
        MODEL_SITE, DropBlocks(blocks=dropped)
    )
    found = {
        f"{len(shape.blocks) - half} of {len(shape.blocks)} blocks with half of heads and neurons": shallow,
        "all blocks with a quarter of heads and neurons": _pruned(shop, blocks=len(shape.blocks), part=4),
    }
    few = {
        f"all blocks with half of heads and neurons in {bits} bits": _pruned(
            shop, blocks=len(shape.blocks), part=2, bits=Quantize(weight_bits=bits, activation_bits=8, group_size=64)
        )
        for bits in (3, 2)
    }
    return {name: (plan, COMPARISONS) for name, plan in found.items()} | {
        name: (plan, OF_FEW_BITS) for name, plan in few.items()
    }


def _pruned(shop: Workshop, *, blocks: int, part: int, bits: Quantize = W8A8) -> CompressionPlan:
    decisions: list[tuple[str, Decision]] = [("embeddings", Quantize(weight_bits=8)), ("head", W8A8)]
    for number in range(blocks):
        block = shop.teacher.shape.blocks[number]
        decisions += [(f"block.{number}.attention", d) for d in (PruneHeads(keep=block.heads // part), bits)]
        decisions += [(f"block.{number}.ffn", d) for d in (PruneNeurons(keep=block.neurons // part), bits)]
    return CompressionPlan(tuple(decisions))


def compare(figures: Figures, data: str, scratch: Path, *, epochs: float, rows: int | None, only: str | None) -> None:
    """Make the comparisons of one data set that are not on file."""
    teacher = Workshop(RunConfig.from_file("demo", overrides=[f"data.source={data}"]), scratch / "unused", print)
    settings = [f"data.source={data}", f"model.id={teacher.teacher_folder}", f"recovery.epochs={epochs}"]
    settings += [f"data.max_train_rows={rows}"] if rows is not None else []

    @cache
    def shop(recipe: str) -> Workshop:
        overrides = [*settings, *(f"recovery.{option}" for option in RECIPES[recipe])]
        return Workshop(RunConfig.from_file("demo", overrides=overrides), scratch / recipe, print)

    @cache
    def logits(recipe: str, plan: CompressionPlan, split: str) -> np.ndarray:
        return logits_of(shop(recipe), plan, split)

    def known(name: str, plan: CompressionPlan, split: str) -> np.ndarray:
        """Return what a plan that is the same for all recipes predicts, and note its accuracy."""
        found = logits("blocks", plan, split)
        figures.more[f"{data}, {name}, {split} rows"] = float(hits(shop("blocks"), found, split).mean())
        return found

    for structure, (plan, comparisons) in structures(shop("blocks")).items():
        for what, recipes in comparisons.items():
            for split in ("search", "test"):
                name = f"{data}, {structure}: {what}, {split} rows"
                if name in figures.more or (only is not None and only not in name):
                    continue
                full = known("uncompressed", CompressionPlan(), split)
                known(f"{structure} as it is", plan, split)
                found = [logits(recipe, shop(recipe).recovering(plan), split) for recipe in recipes]
                add_comparison(figures, shop("blocks"), f"{data}, {structure}: {what}", split, found, full)
                figures.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--only", help="a part of the name of the comparisons that are made")
    parser.add_argument("--rows", type=int, help="train on so many rows only")
    options = parser.parse_args()
    whole = options.rows is None and options.epochs == EPOCHS
    name = "methods-recovery" if whole else f"tried-recovery-{options.epochs:g}-{options.rows or 'all'}"
    figures = Figures(name, "python benchmarks/methods_recovery.py")
    figures.read()
    for data in options.data:
        with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
            compare(figures, data, Path(scratch), epochs=options.epochs, rows=options.rows, only=options.only)


if __name__ == "__main__":
    main()
