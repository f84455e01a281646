"""Compare what may stand for accuracy while searching, and write ``results/benchmarks/search-guides.json``.

``python benchmarks/guides.py``. Each guide runs the same search with several seeds. The points that it would offer (its
front, judged by its own guide) are then scored on a fold that no search saw: training rows that neither the model nor
a student was trained on. The guide with the larger hypervolume on that fold is the better default.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figures

from autocompress import api, pareto, scoring, task
from autocompress.config import RunConfig
from autocompress.evaluate import Workshop
from autocompress.records import QUALITIES
from autocompress.runtimes import Artifact
from autocompress.task import Split

FOLD_ROWS = 1000


def rows_of(run: RunConfig) -> int:
    """Return how many rows the training split has when the fold is left out of it."""
    everything = task.load(run.data)
    return len(everything.splits["train"]) - FOLD_ROWS


def fold_of(run: RunConfig, workshop: Workshop) -> Split:
    """Return the rows that were cut off the training split, tokenised."""
    whole = task.load(run.data.model_copy(update={"max_train_rows": None}))
    cut = whole.splits["train"][run.data.max_train_rows :]
    return task.Task(whole.labels, {"fold": cut}).tokenized(workshop.tokenizer, run.data.max_tokens)["fold"]


def searched(guide: str, seed: int, trials: int, data: str, folder: Path) -> dict[str, Any]:
    """Run one search and score what it offers on the fold."""
    base = RunConfig.from_file("demo", overrides=[f"data.source={data}"])
    overrides = [
        f"data.source={data}",
        f"data.max_train_rows={rows_of(base)}",
        f"search.trials={trials}",
        f"search.seed={seed}",
        f"search.guide={guide}",
        "search.keep_artefacts=all",
        "search.confirm_pairs=0",
    ]
    run = RunConfig.from_file("demo", overrides=overrides)
    study = api.search(run, folder, progress=print)
    workshop = Workshop(run, folder / "artefacts")
    fold = fold_of(run, workshop)
    found: dict[str, Any] = {}
    for judged in ("told", "accuracy"):
        names = run.told if judged == "told" else list(run.objectives)
        usable = [c for c in study.candidates() if c.measurement is not None]
        kept = pareto.nondominated(pareto.costs(usable, names))
        offered = [c for c, on_front in zip(usable, kept, strict=True) if on_front]
        unseen, optimism = [], []
        for candidate in offered:
            session = workshop.runtime.load(Artifact.open(workshop.artefacts / candidate.plan.plan_id), run.target)
            batches = fold.in_order_of_length(32, step=4)
            value = scoring.accuracy(scoring.logits_of(session, fold, batches), fold).value
            optimism.append(candidate.score.accuracy - value)
            unseen.append(
                dataclasses.replace(candidate, measurement=dataclasses.replace(candidate.score, accuracy=value))
            )
        found[judged] = {
            "points": len(offered),
            "hypervolume on the fold": pareto.volume(unseen, study.reference, study.majority or 0.0),
            "hypervolume on the search split": pareto.volume(offered, study.reference, study.majority or 0.0),
            "optimism": float(np.mean(optimism)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="demo/movies")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(3))
    parser.add_argument("--trials", type=int, default=120)
    options = parser.parse_args()
    figures = Figures("search-guides", "python benchmarks/guides.py")
    figures.read()
    for seed in options.seeds:
        for guide in QUALITIES:
            key = f"{options.data} {options.trials} {guide} {seed}"
            if key not in figures.more:
                with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
                    figures.more[key] = searched(guide, seed, options.trials, options.data, Path(scratch))
                figures.write()
    for guide in QUALITIES:
        runs: list[Any] = [figures.more[f"{options.data} {options.trials} {guide} {seed}"] for seed in options.seeds]
        what = f"{options.data}, {options.trials} candidates, {len(runs)} seeds, guided by {guide}"
        for judged in ("told", "accuracy"):
            for name in ("hypervolume on the fold", "optimism", "points"):
                values = [run[judged][name] for run in runs]
                figures.add(
                    f"{what}, front by {judged}: {name}",
                    float(np.mean(values)),
                    "points" if name == "points" else "share",
                    extremes=[min(values), max(values)],
                )
    figures.write()


if __name__ == "__main__":
    main()
