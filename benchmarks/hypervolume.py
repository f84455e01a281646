"""Hold the search against random search and the uniform ladder: ``results/benchmarks/search-hypervolume.json``.

``python benchmarks/hypervolume.py`` on an idle machine; ``--data``, ``--seeds``, ``--kinds`` and ``--trials`` make
parts of it, and each part that is done is kept with the commit that it was measured at, so that the whole can be
measured in several sittings; ``--anew`` measures parts again that are there.

Hypervolume is taken over accuracy, size and latency; the reference point is the majority-class rate with size and
latency of the fp32 artefact. Near its best corner that volume hardly grows any more: beside it stands one in which
twice as small, or twice as fast, is worth the same everywhere.

The ladder is what a search starts with, so that no search falls below its own. What comes after is told by random
search after the same start: the ladder, and plans allocated from sensitivities. Seeds are those of proposals: model,
rows and students are the same for all.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figures, commit
from held_out import DATA, space_without_students

from autocompress import api, pareto
from autocompress.config import RunConfig
from autocompress.records import Candidate, Measurement

_RANDOM = ["search.sampler=random", "search.skip_behind=false"]
SEARCHES = {
    "search": [],
    "random": [*_RANDOM, "search.seeds=false"],
    "random after the same start": _RANDOM,
    "without students": [],
}
FEWER = {"random after the same start": 3, "without students": 3}
"""Seeds of those that no target names."""
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
    if kind == "without students":
        overrides.append(f"space={space_without_students(folder)}")
    study = api.search(RunConfig.from_file("demo", overrides=overrides), folder / "results", progress=print)
    majority = study.majority or 0.0
    candidates = study.candidates()
    uniform = [c for c in candidates if c.origin == "uniform"]
    return {
        "curve": pareto.volume_curve(candidates, study.reference, majority),
        "ladder": pareto.volume(uniform, study.reference, majority),
        "plans of the ladder": len(uniform),
        "ideal": pareto.volume([best_of(candidates)], study.reference, majority),
        "for nothing": pareto.volume([best_of(candidates, costless=True)], study.reference, majority),
        "in logarithms": in_logarithms(candidates, study.reference, majority),
        "ladder in logarithms": in_logarithms(uniform, study.reference, majority),
        "commit": commit(),
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


def best_of(candidates: list[Candidate], *, costless: bool = False) -> Candidate:
    """Return a point that is at once as accurate, as small and as fast as the best of these candidates.

    Args:
        candidates: of one study.
        costless: whether it takes no bytes and no time instead: whatever is no more accurate covers less.
    """
    scores = [c.score for c in candidates if c.measurement is not None]
    best = dataclasses.replace(
        scores[0],
        accuracy=max(s.accuracy for s in scores),
        size_bytes=0 if costless else min(s.size_bytes for s in scores),
        latency_ratio=0.0 if costless else min(s.latency_ratio for s in scores),
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

    def of(kind: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return searches, each beside that of another kind with the same seed."""
        keys = [key for key in runs if key.startswith(f"{data} {trials} search ")]
        others = {key: key.replace(" search ", f" {kind} ") for key in keys}
        return [(runs[key], runs[others[key]]) for key in sorted(keys) if others[key] in runs]

    pairs = of("random")
    if not pairs:
        return
    # Those of fewer seeds are out of date.
    figures.figures = [f for f in figures.figures if not f.name.startswith(f"{data}, {trials} evaluations, ")]

    def add(name: str, values: list[float], least: float | None = None) -> None:
        what, mean = f"{data}, {trials} evaluations, {len(values)} seeds: {name}", float(np.mean(values))
        target = "reported" if least is None else f">= {least:.2f}"
        figures.add(what, mean, "times", target, least is None or mean >= least, interval(values))

    add("hypervolume over random search's", [s["curve"][-1] / r["curve"][-1] for s, r in pairs], 1.15)
    add("hypervolume over the uniform ladder's", [s["curve"][-1] / s["ladder"] for s, _ in pairs], 1.10)
    add("the uniform ladder's hypervolume over random search's", [s["ladder"] / r["curve"][-1] for s, r in pairs])
    add("ideal point of its candidates, over the uniform ladder's", [s["ideal"] / s["ladder"] for s, _ in pairs])
    add("ideal point of its candidates, over random search's", [s["ideal"] / r["curve"][-1] for s, r in pairs])
    if all("for nothing" in s for s, _ in pairs):
        name = "as accurate as the best of its candidates for no bytes and no time"
        add(f"{name}, over the uniform ladder's", [s["for nothing"] / s["ladder"] for s, _ in pairs])
        add(f"{name}, over random search's", [s["for nothing"] / r["curve"][-1] for s, r in pairs])
    if after := of("random after the same start"):
        name = "hypervolume over random search's after the same start"
        add(name, [s["curve"][-1] / r["curve"][-1] for s, r in after])
    if alone := [found for _, found in of("without students")]:
        name = "in a space without students, hypervolume over its uniform ladder's"
        add(name, [found["curve"][-1] / found["ladder"] for found in alone], 1.10)
    for name, over in (
        ("random search's", [_over(s["in logarithms"], r["in logarithms"]) for s, r in pairs]),
        ("the uniform ladder's", [_over(s["in logarithms"], s["ladder in logarithms"]) for s, _ in pairs]),
    ):
        if np.isfinite(over).all():
            add(f"in logarithms of size and latency, hypervolume over {name}", over)
    what = f"{data}, {trials} evaluations, {len(pairs)} seeds"
    reached = [
        next((n + 1 for n, v in enumerate(s["curve"]) if v >= r["curve"][-1]), trials) / trials for s, r in pairs
    ]
    name, share, told = f"{what}: evaluations until random's final value", float(np.mean(reached)), interval(reached)
    figures.add(name, share, "share of all", "<= 0.2", share <= 0.2, told)
    plans = float(np.mean([s["plans of the ladder"] for s, _ in pairs]))
    figures.add(f"{what}: plans of the uniform ladder, with which it begins", plans / trials, "share of all")
    figures.add(f"{what}: hypervolume", float(np.mean([s["curve"][-1] for s, _ in pairs])), "of 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--kinds", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--anew", action="store_true", help="measure again what is there")
    options = parser.parse_args()
    figures = Figures("search-hypervolume", "python benchmarks/hypervolume.py")
    figures.read()
    known: dict[str, Any] = figures.more
    figures.more = {  # others are of an earlier version
        key: {"commit": figures.figures[0].commit, **run} for key, run in known.items() if "ideal" in run
    }
    for seed in options.seeds:
        for data in options.data:
            for kind in options.kinds:
                key = f"{data} {options.trials} {kind} {seed}"
                if (key in figures.more and not options.anew) or seed >= FEWER.get(kind, math.inf):
                    continue
                with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
                    figures.more[key] = searched(data, kind, seed, options.trials, Path(scratch))
                conclude(figures, data, options.trials)
                figures.write()


if __name__ == "__main__":
    main()
