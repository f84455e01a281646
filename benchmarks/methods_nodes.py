"""Tell what the runtime spends its time on, kind of node by kind: ``results/benchmarks/methods-nodes.json``.

``python benchmarks/methods_nodes.py`` on an idle machine builds the fine-tuned demo model as it is, with 8-bit and with
packed 4-bit products, and pruned to half and a quarter of its heads and neurons, and runs each with OpenVINO's own
counters. What is no matrix product bounds what bits can gain; what is one bounds what fusing can.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import openvino as ov
from figures import Figures

from autocompress.config import RunConfig
from autocompress.decisions import Decision, PruneHeads, PruneNeurons, Quantize
from autocompress.evaluate import Workshop
from autocompress.plan import CompressionPlan
from autocompress.runtimes import Artifact

RUNS = 60
KINDS = {
    "matrix products": ("FullyConnected", "MatMul"),
    "attention": ("Subgraph", "ScaledDotProductAttention", "Softmax"),
    "normalisation": ("MVN", "MulAdd", "Multiply"),
    "sums of branches": ("Add",),
    "rounding to 8 bits": ("FakeQuantize", "Convert", "Reorder"),
    "moving": ("Transpose", "Reshape"),
    "tables": ("Gather",),
}
"""Kinds of the runtime's nodes, by how their types begin; a node is of the first kind that fits, or of the rest."""
W8A8 = Quantize(weight_bits=8, activation_bits=8)
W4A8 = Quantize(weight_bits=4, activation_bits=8, group_size=64)


def plans(shop: Workshop) -> dict[str, CompressionPlan]:
    """Return plans of the same decisions at all blocks and the head, by what they are called."""

    def everywhere(bits: Quantize | None, part: int = 1) -> CompressionPlan:
        found: list[tuple[str, Decision]] = []
        for site in (name for name in shop.teacher.shape.sites() if name != "embeddings"):
            _, number, kind = site.split(".") if site.startswith("block.") else ("", "", "")
            if kind and part > 1:
                block = shop.teacher.shape.blocks[int(number)]
                attention = kind == "attention"
                own = PruneHeads(keep=block.heads // part) if attention else PruneNeurons(keep=block.neurons // part)
                found.append((site, own))
            if bits is not None:
                found.append((site, bits if kind else W8A8))
        return CompressionPlan(tuple(found))

    return {
        "uncompressed": everywhere(None),
        "w8a8": everywhere(W8A8),
        "w4a8": everywhere(W4A8),
        "half of heads and neurons": everywhere(None, 2),
        "half of heads and neurons, w8a8": everywhere(W8A8, 2),
        "a quarter of heads and neurons, w8a8": everywhere(W8A8, 4),
    }


def kind_of(node: str) -> str:
    """Return the kind that a type of node belongs to."""
    return next((kind for kind, begins in KINDS.items() if node.startswith(begins)), "the rest")


def times(shop: Workshop, artifact: Artifact) -> dict[str, float]:
    """Return the milliseconds of a run by kind of node: the median over runs."""
    settings = {**shop.runtime.settings(shop.run.target), "PERF_COUNT": True}
    compiled = ov.Core().compile_model(artifact.folder / "model.xml", "CPU", settings)
    request, inputs = compiled.create_infer_request(), shop.gauge.inputs(artifact)
    found: list[Counter[str]] = []
    for _ in range(RUNS):
        request.infer(inputs)
        spent: Counter[str] = Counter()
        for node in request.get_profiling_info():
            if node.status == ov.ProfilingInfo.Status.EXECUTED:
                spent[kind_of(node.node_type)] += node.real_time.total_seconds() * 1e3
        found.append(spent)
    # The first ones find the caches empty.
    return {kind: float(np.median([run[kind] for run in found[RUNS // 6 :]])) for kind in (*KINDS, "the rest")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    figures = Figures("methods-nodes", "python benchmarks/methods_nodes.py")
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        shop = Workshop(RunConfig.from_file("demo", overrides=["target.runtime=openvino"]), Path(scratch), print)
        for name, plan in plans(shop).items():
            spent = times(shop, shop.build(plan, shop.artefacts / plan.plan_id))
            whole = sum(spent.values())
            figures.add(f"{name}: all nodes", whole, "ms")
            for kind, value in sorted(spent.items(), key=lambda item: -item[1]):
                figures.add(f"{name}: {kind}", value / whole, "share")
    figures.write()


if __name__ == "__main__":
    main()
