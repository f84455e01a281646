"""Hold the search against random search and the uniform ladder: ``results/benchmarks/search-hypervolume.json``.

``python benchmarks/hypervolume.py`` on an idle machine; ``--data``, ``--seeds`` and ``--trials`` make parts of it, and
each part that is done is kept, so that the whole can be measured in several sittings. Hypervolume is taken over
accuracy, size and latency; the reference point is the majority-class rate with size and latency of the fp32 artefact.
Near its best corner that volume hardly grows any more: beside it stands one in which twice as small, or twice as fast,
is worth the same everywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figures
from held_out import DATA

from autocompress import api, pareto
from autocompress.config import RunConfig
from autocompress.decisions import Student
from autocompress.records import Candidate, Measurement

SEARCHES = {
    "search": [],
    "random": ["search.sampler=random", "search.seeds=false", "search.skip_behind=false"],
}
_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t for a two-sided 95 % interval of a mean, by number of values."""


def searched(data: str, kind: str, seed: int, trials: int, folder: Path) -> dict[str, Any]:
    """Run one search and return its hypervolume after each evaluation, and that of its uniform plans."""
    overrides = [
        f"data.source={data}",
        f"search.trials={trials}",
        f"search.seed={seed}",
        "search.confirm_pairs=0",
        *SEARCHES[kind],
    ]
    study = api.search(RunConfig.from_file("demo", overrides=overrides), folder, progress=print)
    majority = study.majority or 0.0
    candidates = study.candidates()
    uniform = [c for c in candidates if c.origin == "uniform"]
    untrained = [c for c in uniform if not c.plan.of_type(Student)]
    return {
        "curve": pareto.volume_curve(candidates, study.reference, majority),
        "ladder": pareto.volume(uniform, study.reference, majority),
        "ladder without students": pareto.volume(untrained, study.reference, majority),
        "bound": pareto.volume([ideal(candidates)], study.reference, majority),
        "in logarithms": in_logarithms(candidates, study.reference, majority),
        "ladder in logarithms": in_logarithms(uniform, study.reference, majority),
        "reference point": [majority, study.reference.size_bytes, 1.0],
    }


def in_logarithms(candidates: list[Candidate], reference: Measurement, majority: float) -> float:
    """Return the hypervolume over accuracy and the logarithms of how many times smaller and faster a candidate is."""
    scores = [c.score for c in candidates if c.usable]
    rows = [
        (-s.accuracy, math.log(s.size_bytes / reference.size_bytes), math.log(s.latency_ratio))
        for s in scores
        if s.accuracy > majority
    ]
    return pareto.hypervolume(np.array(rows).reshape(len(rows), 3), (-majority, 0.0, 0.0))


def ideal(candidates: list[Candidate]) -> Candidate:
    """Return a point that is at once as accurate, as small and as fast as the best of all: no front covers more."""
    scores = [c.score for c in candidates if c.measurement is not None]
    best = dataclasses.replace(
        scores[0],
        accuracy=max(s.accuracy for s in scores),
        size_bytes=min(s.size_bytes for s in scores),
        latency_ratio=min(s.latency_ratio for s in scores),
    )
    known = next(c for c in candidates if c.measurement is not None)
    return dataclasses.replace(known, measurement=best)


def interval(values: list[float]) -> list[float] | None:
    """Return the 95 % interval of the mean."""
    if len(values) not in _T95:
        return None
    half = _T95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return [float(np.mean(values)) - half, float(np.mean(values)) + half]


def _over(ours: float, theirs: float) -> float:
    return ours / theirs if theirs > 0 else math.inf


def conclude(figures: Figures, data: str, trials: int) -> None:
    """Turn the runs that are there into figures."""
    runs: dict[str, Any] = figures.more
    pairs = [
        (runs[key], runs[key.replace(" search ", " random ")])
        for key in sorted(runs)
        if key.startswith(f"{data} {trials} search ") and key.replace(" search ", " random ") in runs
    ]
    if not pairs:
        return
    over_random = [s["curve"][-1] / r["curve"][-1] for s, r in pairs]
    over_ladder = [s["curve"][-1] / s["ladder"] for s, _ in pairs]
    over_untrained = [s["curve"][-1] / s["ladder without students"] for s, _ in pairs]
    reached = [
        next((n + 1 for n, v in enumerate(s["curve"]) if v >= r["curve"][-1]), trials) / trials for s, r in pairs
    ]
    bounds = [s["bound"] / s["ladder"] for s, _ in pairs]
    bounds_of_random = [max(s["bound"], r["bound"]) / r["curve"][-1] for s, r in pairs]
    logarithmic = [(s, r) for s, r in pairs if "in logarithms" in s and "in logarithms" in r]
    # Those of fewer seeds are out of date.
    figures.figures = [f for f in figures.figures if not f.name.startswith(f"{data}, {trials} evaluations, ")]
    what = f"{data}, {trials} evaluations, {len(pairs)} seeds"
    for name, values, target, holds in (
        ("hypervolume over random search's", over_random, ">= 1.15", np.mean(over_random) >= 1.15),
        ("hypervolume over the uniform ladder's", over_ladder, ">= 1.10", np.mean(over_ladder) >= 1.10),
        ("what no front can exceed, over the uniform ladder's", bounds, "reported", True),
        ("what no front can exceed, over random search's", bounds_of_random, "reported", True),
        ("hypervolume over that ladder's without students", over_untrained, ">= 1.10", np.mean(over_untrained) >= 1.10),
        ("evaluations until random's final value", reached, "<= 0.2", np.mean(reached) <= 0.2),
    ):
        unit = "share of all" if "until" in name else "times"
        figures.add(f"{what}: {name}", float(np.mean(values)), unit, target, bool(holds), interval(values))
    for name, over in (
        ("random search's", [_over(s["in logarithms"], r["in logarithms"]) for s, r in logarithmic]),
        ("the uniform ladder's", [_over(s["in logarithms"], s["ladder in logarithms"]) for s, _ in logarithmic]),
    ):
        if len(over) == len(pairs) and np.isfinite(over).all():
            told = f"{what}: in logarithms of size and latency, hypervolume over {name}"
            figures.add(told, float(np.mean(over)), "times", interval=interval(over))
    figures.add(f"{what}: hypervolume", float(np.mean([s["curve"][-1] for s, _ in pairs])), "of 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--trials", type=int, default=200)
    options = parser.parse_args()
    figures = Figures("search-hypervolume", "python benchmarks/hypervolume.py")
    figures.read()
    for seed in options.seeds:
        for data in options.data:
            for kind in SEARCHES:
                key = f"{data} {options.trials} {kind} {seed}"
                if key in figures.more:
                    continue
                with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
                    figures.more[key] = searched(data, kind, seed, options.trials, Path(scratch))
                conclude(figures, data, options.trials)
                figures.write()


if __name__ == "__main__":
    main()
