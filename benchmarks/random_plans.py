"""Build, run and reload random plans on every runtime: ``results/benchmarks/methods-plans.json``.

``python benchmarks/random_plans.py`` draws plans of the fine-tuned demo model: half of them through `encoder-full`, the
space of every choice there is, and half decision by decision without a space, with sizes that no space offers and some
that no model has. Each plan is refused by `Workshop.check`, with nothing written, or it is built, gives finite logits,
and gives the same ones when another process reads the files from elsewhere. Everything else is a failure and stands in
the file with its plan. Nothing is distilled: students are used as they are cut, and what is recovered gets one step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Figures

from autocompress import api
from autocompress.anatomy import ModelShape
from autocompress.config import RunConfig, TargetConfig
from autocompress.decisions import Student
from autocompress.errors import PlanError
from autocompress.evaluate import Workshop
from autocompress.plan import MODEL_SITE, PLAN_SCHEMA, CompressionPlan
from autocompress.runtimes import RUNTIMES, Artifact, get_runtime

ROWS = 12
"""Rows of the search split that are run."""
TOGETHER = 50
"""Plans to a workshop: it holds the graphs of all models that its plans start from."""
_ONE_STEP = 1e-3
"""Epochs of recovery that come to a single step."""

Batches = list[dict[str, np.ndarray]]
Document = dict[str, Any]


@dataclass
class Outcome:
    """What became of the plans on one runtime.

    Args:
        built: how many were built, run, and read back with the same logits.
        refused: by kind of reason, how many were refused.
        failed: plans with what went wrong.
    """

    built: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[Document, str]] = field(default_factory=list)


def documents(shop: Workshop, count: int, seed: int) -> list[Document]:
    """Return ``count`` plans as they would be read from a file; every other one is drawn without a space."""
    rng = random.Random(seed)
    found: list[Document] = []
    while len(found) < count:
        if len(found) % 2:
            found.append({"schema": PLAN_SCHEMA, "decisions": list(odd_decisions(shop.teacher.shape, rng))})
        else:
            found.append(json.loads(shop.space.decode(lambda _, choices: rng.choice(choices)).to_json()))
    return found


def odd_decisions(shape: ModelShape, rng: random.Random) -> Iterator[Document]:
    """Yield a few decisions whose sizes are any that there are, and now and then one that there is not."""
    depth, sites = len(shape.blocks), [name for name in shape.sites() if name.startswith("block.")]
    heads, neurons = shape.blocks[0].heads, shape.blocks[0].neurons
    whole_model: tuple[Document, ...] = (
        {
            "type": "Student",
            "blocks": sorted(rng.sample(range(depth), rng.randint(1, depth))),
            "heads": rng.randint(1, heads),
            "neurons": rng.randint(1, neurons),
            "activation": rng.choice(("", "", "relu")),
            "hidden": rng.choice((0, 0, rng.randint(1, shape.hidden))),
            "share": rng.choice((1, 1, 2)),
        },
        {"type": "DropBlocks", "blocks": sorted(rng.sample(range(depth), rng.randint(1, depth)))},
        {"type": "MaxTokens", "tokens": rng.choice((1, 2, rng.randint(1, 100), 10**9))},
        {
            "type": "Recover",
            "epochs": _ONE_STEP,
            "hidden": rng.choice((0.0, 1.0)),
            "relations": rng.choice((0.0, 1.0)),
            "l1": rng.choice((0.0, 1e-4)),
            **rng.choice(({}, {"seeds": 2}, {"quantized": True}, {"reconstruct": True})),
        },
    )
    for decision, chance in zip(whole_model, (0.1, 0.15, 0.2, 0.05), strict=True):
        if rng.random() < chance:
            yield {"site": MODEL_SITE, **decision}
    for site in rng.sample(sites, rng.randint(1, 4)):
        own = (
            {"type": "PruneHeads", "keep": rng.randint(1, heads + 1)}
            if site.endswith("attention")
            else {"type": "PruneNeurons", "keep": rng.choice((rng.randint(1, neurons + 8), 16 * rng.randint(1, 8)))}
        )
        rank = {"type": "LowRank", "rank": rng.choice((rng.randint(1, shape.hidden), 2 ** rng.randint(0, 6)))}
        for decision in (own, rank, odd_bits(rng)):
            if rng.random() < 0.5:
                yield {"site": site, **decision}
    if rng.random() < 0.2:
        yield {"site": "embeddings", "type": "TrimVocabulary", "keep": rng.randint(1, shape.vocabulary + 1)}
    for site in ("embeddings", "head"):
        if rng.random() < 0.3:
            yield {"site": site, **odd_bits(rng)}
    if rng.random() < 0.15:
        yield out_of_place(sites, rng)


def odd_bits(rng: random.Random) -> Document:
    """Return how a site is quantised; groups are of any size, those that fill a row being as likely as others."""
    bits = rng.choice((16, 8, 8, 4, 4, 3, 2))
    group = rng.choice((rng.randint(1, 64), 2 ** rng.randint(0, 7), 3, 96)) if bits < 8 else 0
    activation_bits = rng.choice((8, 16)) if bits < 16 else 16
    return {"type": "Quantize", "weight_bits": bits, "activation_bits": activation_bits, "group_size": group}


def out_of_place(sites: Sequence[str], rng: random.Random) -> Document:
    """Return a decision that is of no kind, or that does not belong where it stands."""
    return rng.choice(
        (
            {"site": rng.choice(("block.99.ffn", "block.x.ffn", "block.².ffn", "pooler", "")), **odd_bits(rng)},
            {"site": "head", "type": "LowRank", "rank": 8},
            {"site": "embeddings", "type": "PruneHeads", "keep": 1},
            {"site": rng.choice(sites), "type": "TrimVocabulary", "keep": 100},
            {"site": MODEL_SITE, "type": "PruneNeurons", "keep": 8},
            {"site": rng.choice(sites), "type": "MaxTokens", "tokens": 8},
            {"site": rng.choice(sites), "type": "Quantize", "weight_bits": 5},
            {"site": rng.choice(sites), "type": "LowRank", "rank": 0},
            {"site": rng.choice(sites), "type": "Explode"},
            # Beside what may have been drawn there before: two of one kind.
            {"site": sites[0], "type": "LowRank", "rank": 4},
            {"site": MODEL_SITE, "type": "MaxTokens", "tokens": 9},
        )
    )


def kind_of(refusal: PlanError) -> str:
    """Return a reason without what is particular to a plan: the site, the numbers, what else there would have been."""
    text = re.sub(r"^(block\.[^:]*|embeddings|head|model|pooler|): ", "", str(refusal))
    text = re.sub(r"('[^']*'|\([\d, ]*\)|\d+)", "#", re.split(r",? got |; the model has|; it has|; known", text)[0])
    return re.sub(r"site block\.\S+", "site #", text)


def touched(*folders: Path) -> dict[str, int]:
    """Return when entries of a bank and artefacts were made, used or left: reading one leaves a mark, too."""
    found = {}
    for folder in folders:
        for path in (p for pattern in ("*", "*/*") for p in folder.glob(pattern)):
            found[str(path)] = path.stat().st_mtime_ns
    return found


def reloaded(folder: Path, target: TargetConfig, batches: Batches) -> tuple[CompressionPlan, np.ndarray]:
    """Return the plan and the logits of what another process built, ``rows x classes``."""
    artifact = Artifact.open(folder)
    return artifact.plan, logits_of(artifact, target, batches)


def logits_of(artifact: Artifact, target: TargetConfig, batches: Batches) -> np.ndarray:
    """Return the logits of an artefact, ``rows x classes``."""
    session = get_runtime(artifact.runtime).load(artifact, target)
    found = np.concatenate([session.run(batch) for batch in batches])
    session.close()
    return found


def attempt(shop: Workshop, document: Document, batches: Batches, elsewhere: ProcessPoolExecutor) -> PlanError | None:
    """Take one plan to its end and return why it was refused, or None if it was carried out.

    Raises:
        Exception: whatever else happens is a defect.
    """
    before = touched(shop.bank.root, shop.artefacts)
    try:
        plan = CompressionPlan.from_dict(document)
        plan.words()
        assert CompressionPlan.from_json(plan.to_json()) == plan, "it does not survive JSON"
        shop.check(plan)
    except PlanError as refusal:
        assert touched(shop.bank.root, shop.artefacts) == before, "a refused plan touched the bank or the artefacts"
        return refusal
    student = plan.of_type(Student).get(MODEL_SITE)
    if student is not None and shop.needs_training(plan):
        shop.adopt(student, shop.cut(student))
    artifact = shop.build(plan, shop.artefacts / plan.plan_id)
    try:
        logits = logits_of(artifact, shop.run.target, batches)
        assert logits.shape == (sum(map(len, (b["input_ids"] for b in batches))), len(shop.task.labels))
        assert np.isfinite(logits).all(), "logits are not finite"
        moved = artifact.folder.rename(artifact.folder.with_name("elsewhere"))
        read, again = elsewhere.submit(reloaded, moved, shop.run.target, batches).result()
        assert read == plan, "another plan was read back"
        assert np.array_equal(again, logits), f"logits differ by {np.abs(again - logits).max():.3g} after reloading"
    finally:
        for folder in (artifact.folder, artifact.folder.with_name("elsewhere")):
            shutil.rmtree(folder, ignore_errors=True)
    return None


def try_plans(run: RunConfig, count: int, scratch: Path, *, seed: int = 0) -> Outcome:
    """Draw plans and take each of them to its end on the run's runtime."""
    outcome, started = Outcome(), time.perf_counter()
    drawing = workshop(run, scratch)
    drawn = documents(drawing, count, seed)
    del drawing
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as elsewhere:
        for first in range(0, count, TOGETHER):
            shop = workshop(run, scratch)
            rows = shop.splits["search"].head(ROWS)
            batches = [batch.arrays() for batch in rows.in_order_of_length(4)]
            for document in drawn[first : first + TOGETHER]:
                try:
                    refusal = attempt(shop, document, batches, elsewhere)
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    said = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
                    outcome.failed.append((document, said))
                    print(f"MISS {said}\n     {json.dumps(document)}", flush=True)
                else:
                    outcome.built += refusal is None
                    outcome.refused.update([] if refusal is None else [kind_of(refusal)])
            done = min(first + TOGETHER, count)
            print(f"{run.target.runtime}: {done} of {count} plans, {time.perf_counter() - started:.0f} s", flush=True)
    return outcome


def workshop(run: RunConfig, scratch: Path) -> Workshop:
    """Return a workshop in which students of the space stand as they are cut; all that a check reads is there."""
    shop = Workshop(run, scratch / "artefacts")
    shop.artefacts.mkdir(exist_ok=True)
    shop.bank.root.mkdir(exist_ok=True)
    for student in shop.space.students.values():
        shop.adopt(student, shop.cut(student))
    return shop


def report(figures: Figures, runtime: str, count: int, outcome: Outcome) -> None:
    """Add what became of the plans."""
    of = f"of {count} plans"
    figures.add(f"{runtime}: built, run, and the same logits after reloading", outcome.built, of)
    figures.add(f"{runtime}: refused before anything was touched", sum(outcome.refused.values()), of)
    figures.add(f"{runtime}: failed", len(outcome.failed), of, "0", not outcome.failed)
    figures.more[f"{runtime}: refused, by reason"] = dict(outcome.refused.most_common())
    figures.more[f"{runtime}: failed"] = outcome.failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=500, help="fewer are printed and not written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the process that reloads
    torch.set_num_threads(1)
    whole = options.plans >= 500
    figures = Figures("methods-plans", "python benchmarks/random_plans.py")
    trained = api.finetune(RunConfig.from_file("demo"), progress=print)
    for runtime in options.runtimes:
        with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
            settings = [f"target.runtime={runtime}", f"model.id={trained}", f"storage.bank={scratch}/bank"]
            # Few rows: neither importance nor what a step of recovery learns matters here.
            settings += ["storage.bank_gb=5", "space=encoder-full", "data.calibration_rows=16"]
            settings += ["data.reconstruction_rows=16", "data.max_train_rows=300", "data.search_rows=100"]
            run = RunConfig.from_file("demo", overrides=settings)
            outcome = try_plans(run, options.plans, Path(scratch), seed=options.seed)
        figures.read()  # what another process may have written meanwhile
        report(figures, runtime, options.plans, outcome)
        if whole:
            figures.write()


if __name__ == "__main__":
    main()
