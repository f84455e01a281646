"""Ask whether the score after stitching foretells the one after recovery: ``results/benchmarks/search-rungs.json``.

``python benchmarks/rung_tau.py --results RESULTS`` takes a finished search of the demo, draws plans that prune or
factorise, evenly over the ranks of their accuracy, distils each for a short while, and correlates both (Kendall's
tau-b) for each quality that may guide a search.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
from figures import Figures

from autocompress import api
from autocompress.decisions import Recover
from autocompress.evaluate import Workshop
from autocompress.plan import MODEL_SITE
from autocompress.records import QUALITIES, Candidate

PLANS = 24
EPOCHS = 0.25
DRAWS = 2000


def drawn(candidates: list[Candidate]) -> list[Candidate]:
    """Return plans with structural decisions, evenly over the ranks of their accuracy."""
    usable = [c for c in candidates if c.measurement is not None and c.origin != "recover" and c.plan.structural()]
    usable.sort(key=lambda c: c.score.accuracy)
    return [usable[round(n)] for n in np.linspace(0, len(usable) - 1, min(PLANS, len(usable)))]


def tau_b(first: list[float], second: list[float]) -> float:
    """Return Kendall's tau-b, which allows for ties (Kendall 1945)."""
    signs = [
        (np.sign(a - b), np.sign(c - d))
        for (a, c), (b, d) in itertools.combinations(zip(first, second, strict=True), 2)
    ]
    agreed = sum(float(x * y) for x, y in signs)
    untied = [sum(pair[side] != 0 for pair in signs) for side in (0, 1)]
    return agreed / math.sqrt(untied[0] * untied[1])


def interval(first: list[float], second: list[float]) -> list[float]:
    """Return the 95 % interval of their tau over plans drawn anew."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(first), (DRAWS, len(first)))
    taus = [tau_b([first[n] for n in draw], [second[n] for n in draw]) for draw in draws]
    return [float(end) for end in np.quantile(taus, (0.025, 0.975))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="results folder of a finished search")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    options = parser.parse_args()
    figures = Figures("search-rungs", "python benchmarks/rung_tau.py --results results/demo")
    figures.read()
    study = api.open_study(options.results)
    plans = drawn(study.candidates())
    done: list[Candidate] = []
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        workshop = Workshop(study.run, Path(scratch), print)
        shutil.copytree(options.results / "artefacts" / "reference", workshop.reference_folder)
        for candidate in plans:
            key = f"{candidate.plan.plan_id} {options.epochs}"
            if key not in figures.more:
                plan = candidate.plan.with_decision(MODEL_SITE, Recover(epochs=options.epochs))
                figures.more[key] = dataclasses.asdict(workshop.evaluate(plan))
                figures.write()
            recovered: dict[str, float] = figures.more[key]  # type: ignore[assignment]
            done.append(candidate)
            print(f"trial {candidate.number}: {candidate.score.accuracy:.3f} became {recovered['accuracy']:.3f}")
    after = [figures.more[f"{c.plan.plan_id} {options.epochs}"]["accuracy"] for c in done]  # type: ignore[index]
    for quality in QUALITIES:
        sign = 1.0 if quality == "accuracy" else -1.0
        before = [sign * getattr(c.score, quality) for c in done]
        tau = tau_b(before, after)
        what = f"{len(done)} plans, {options.epochs:g} epochs: tau of {quality} before and accuracy after recovery"
        figures.add(what, tau, "Kendall's tau-b", ">= 0.7", tau >= 0.7, interval(before, after))
    gains = [float(b) - c.score.accuracy for c, b in zip(done, after, strict=True)]
    figures.add(
        f"{len(done)} plans: accuracy gained", float(np.mean(gains)), "share", extremes=[min(gains), max(gains)]
    )
    figures.write()


if __name__ == "__main__":
    main()
