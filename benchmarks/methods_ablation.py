"""Hold each compression method against its plain counterpart: ``results/benchmarks/methods-ablation.json``.

``python benchmarks/methods_ablation.py`` builds uniform plans of the fine-tuned demo model twice, with a method and
without, so that both have the same size and latency, and compares their accuracy through the artefact: on the search
rows, by which it is decided what is the default, and on the held-out test rows, with a paired bootstrap interval. The
divergence from the full model tells small changes apart that accuracy does not. Nothing is trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from figures import Figures
from held_out import DATA, add_comparison, hits, logits_of
from torch import nn
from torch.nn import functional

from autocompress.config import RunConfig
from autocompress.decisions import Decision, LowRank, PruneHeads, PruneNeurons, Quantize, Recover
from autocompress.evaluate import Workshop
from autocompress.model import EncoderModel
from autocompress.plan import CompressionPlan
from autocompress.task import Batch
from autocompress.transforms.importance import Importance

W8A8, W4 = Quantize(weight_bits=8, activation_bits=8), Quantize(weight_bits=4, group_size=64)
W4A8, W3A8, W2A8 = (Quantize(weight_bits=bits, activation_bits=8, group_size=64) for bits in (4, 3, 2))

Change = Callable[[EncoderModel, Importance], Importance]
Side = tuple[str, CompressionPlan]
"""A variant of a workshop and the plan that it carries out."""


def fisher(_: EncoderModel, scores: Importance) -> Importance:
    """Return Fisher scores, for what is reconstructed, too; layers stay as they are."""
    return dataclasses.replace(scores, moments=None, slopes=None)


def magnitude(base: EncoderModel, _: Importance) -> Importance:
    """Return the L2 norms of what reads each head and neuron."""
    blocks = range(len(base.shape.blocks))
    read = [base.linear(n, "output").weight.detach() for n in blocks]
    heads = [w.reshape(len(w), base.shape.blocks[n].heads, -1).norm(dim=(0, 2)) for n, w in enumerate(read)]
    neurons = [base.linear(n, "ffn_out").weight.detach().norm(dim=0) for n in blocks]
    return Importance(tuple(heads), tuple(neurons))


def taylor(base: EncoderModel, scores: Importance, batches: Sequence[Batch]) -> Importance:
    """Return the mean magnitude of each row's slope of the loss by a gate on each head and neuron.

    Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", eq. 8.
    """
    gates: dict[tuple[int, str], torch.Tensor] = {}

    def gated(number: int, role: str, parts: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
            rows, tokens, width = inputs[0].shape
            gate = gates[number, role] = torch.ones(rows, 1, parts, 1, requires_grad=True)
            return (inputs[0].reshape(rows, tokens, parts, width // parts) * gate).reshape(inputs[0].shape)

        return hook

    found: dict[tuple[int, str], torch.Tensor] = {}
    handles = [
        base.linear(number, role).register_forward_pre_hook(gated(number, role, parts))
        for number, block in enumerate(base.shape.blocks)
        for role, parts in (("output", block.heads), ("ffn_out", block.neurons))
    ]
    for batch in batches:
        logits = base.module(**batch.inputs()).logits
        functional.cross_entropy(logits, batch.labels, reduction="sum").backward()
        for key, gate in gates.items():
            found[key] = found.get(key, 0) + gate.grad.abs().sum(dim=(0, 1, 3))
    for handle in handles:
        handle.remove()
    base.module.zero_grad(set_to_none=True)
    heads, neurons = (
        tuple(found[number, role] for number in range(len(base.shape.blocks))) for role in ("output", "ffn_out")
    )
    return dataclasses.replace(scores, heads=heads, neurons=neurons, moments=None, slopes=None)


def alone(base: EncoderModel, scores: Importance) -> Importance:
    """Return scores by which reconstructions go by the error of each layer alone, whatever the loss makes of it."""
    return dataclasses.replace(scores, slopes=lambda _, __: torch.eye(base.shape.hidden))


def fitted(_: EncoderModel, scores: Importance) -> Importance:
    """Return Fisher scores with what layers are fitted by, as the package has them."""
    return scores


def variants_of(shop: Workshop) -> dict[str, Change]:
    """Return the variants that are compared, by name."""
    rows = shop.calibration_batches()
    return {
        "magnitude": magnitude,
        "taylor": lambda base, scores: taylor(base, scores, rows),
        "alone": alone,
        "fisher": fisher,
        "fitted": fitted,
    }


class Varied(Workshop):
    """A workshop that judges and fits parts of the model in another way."""

    change: Change

    def _importance(self, base: EncoderModel) -> Importance:
        return self.change(base, super()._importance(base))

    def made_up_for(self, base: EncoderModel, scores: Importance) -> Importance:
        return scores if scores.slopes is None else super().made_up_for(base, scores)


def uniform(
    shape_of: Workshop, *, attention: Callable[[int], list[Decision]], ffn: Callable[[int], list[Decision]]
) -> CompressionPlan:
    """Return the plan that decides the same in each block; tables and head have 8 bits."""
    decisions: list[tuple[str, Decision]] = [("embeddings", Quantize(weight_bits=8)), ("head", W8A8)]
    for name, site in shape_of.teacher.shape.sites().items():
        if site.kind in ("attention", "ffn"):
            decisions += [(name, d) for d in (attention if site.kind == "attention" else ffn)(site.parts)]
    return CompressionPlan(tuple(decisions))


def comparisons(shop: Workshop) -> dict[str, tuple[Side, Side]]:
    """Return a method and its counterpart, by what the comparison is called."""
    found: dict[str, tuple[Side, Side]] = {}
    hidden = shop.teacher.shape.hidden
    neurons = shop.teacher.shape.blocks[0].neurons
    for share in (0.75, 0.5, 0.25):
        plans = {
            "heads": uniform(
                shop, attention=lambda n, s=share: [PruneHeads(keep=round(s * n)), W8A8], ffn=lambda _: [W8A8]
            ),
            "neurons": uniform(
                shop, attention=lambda _: [W8A8], ffn=lambda n, s=share: [PruneNeurons(keep=round(s * n)), W8A8]
            ),
        }
        for kind, plan in plans.items():
            found[f"{share:.0%} of {kind}: Fisher over magnitude"] = (("fisher", plan), ("magnitude", plan))
    for share in (0.75, 0.5):
        square, wide = (32 * int(share * r / 32) for r in (hidden / 2, hidden * neurons / (hidden + neurons)))
        plan = uniform(
            shop,
            attention=lambda _, r=square: [LowRank(rank=r), W8A8],
            ffn=lambda _, r=wide: [LowRank(rank=r), W8A8],
        )
        found[f"rank {share:.2f}: activation-aware over plain SVD"] = (("fitted", plan), ("fisher", plan))
    for bits, decision in {"4 bits": W4, "w4a8": W4A8, "w3a8": W3A8, "w2a8": W2A8}.items():
        plan = uniform(shop, attention=lambda _, d=decision: [d], ffn=lambda _, d=decision: [d])
        found[f"{bits}: GPTQ over rounding to the nearest"] = (("fitted", plan), ("fisher", plan))
    for share in (0.75, 0.5, 0.25):
        plan = uniform(
            shop,
            attention=lambda n, s=share: [PruneHeads(keep=round(s * n)), W8A8],
            ffn=lambda n, s=share: [PruneNeurons(keep=round(s * n)), W8A8],
        )
        again = plan.recovered(Recover(epochs=0, reconstruct=True))
        found[f"{share:.0%} of both: reconstructed over pruned alone"] = (("fitted", again), ("fitted", plan))
        for name, variant in {"Fisher": "fisher", "Taylor": "taylor", "each layer's own error": "alone"}.items():
            found[f"{share:.0%} of both reconstructed: surgery over {name}"] = (("fitted", again), (variant, again))
    return found


def compare(
    figures: Figures,
    data: str,
    scratch: Path,
    variants: Mapping[str, Change] | None = None,
    comparisons_of: Callable[[Workshop], dict[str, tuple[Side, Side]]] = comparisons,
    only: str | None = None,
) -> None:
    """Compare variants, by default those of this file, on one data set.

    ``only`` is a part of the name of the comparisons that are made.
    """
    run = RunConfig.from_file("demo", overrides=[f"data.source={data}"])
    trained = Workshop(run, scratch / "unused", print)
    model = str(trained.teacher_folder)
    shops: dict[str, Varied] = {}
    for name, change in (variants or variants_of(trained)).items():
        # A bank of its own: pieces are kept by what is decided, not by how it is judged.
        settings = [f"data.source={data}", f"model.id={model}", f"storage.bank={scratch / 'bank' / name}"]
        shops[name] = Varied(RunConfig.from_file("demo", overrides=settings), scratch / name)
        shops[name].change = change
    any_shop = next(iter(shops.values()))
    full = {split: logits_of(any_shop, CompressionPlan(), split) for split in ("search", "test")}
    for split, found in full.items():
        figures.more[f"{data}, uncompressed, {split} rows"] = float(hits(trained, found, split).mean())
    for what, sides in comparisons_of(trained).items():
        if only is not None and only not in what:
            continue
        for split in ("search", "test"):
            logits = [logits_of(shops[variant], plan, split) for variant, plan in sides]
            add_comparison(figures, trained, f"{data}, {what}", split, logits, full[split])
        figures.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--only", help="a part of the name of the comparisons that are made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = Figures("methods-ablation", "python benchmarks/methods_ablation.py")
    figures.read()
    for data in options.data:
        with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
            compare(figures, data, Path(scratch), only=options.only)


if __name__ == "__main__":
    main()
