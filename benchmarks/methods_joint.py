"""Hold the joint search against searches of one axis at equal costs: ``results/benchmarks/methods-joint.json``.

``python benchmarks/methods_joint.py`` searches each data set in the joint space without its students and in every space
of a single axis that needs no training, with as many candidates each and one bank; a space of fewer plans has all of
them measured. The best single axis is the one whose candidates cover the largest hypervolume. Each point of its front
is held against the most accurate point, by the search rows, that the joint front has at no more size and no more
latency, on the held-out test rows, with a paired bootstrap interval.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figures
from held_out import DATA, interval, space_without_students, test_hits

from autocompress import api, pareto
from autocompress.config import RunConfig
from autocompress.evaluate import Workshop
from autocompress.front import Front
from autocompress.records import Candidate

AXES = {"bits": "encoder-bits", "pruning": "encoder-pruning", "rank": "encoder-rank", "inputs": "encoder-inputs"}
TRIALS = 200


@dataclass(frozen=True)
class Searched:
    """What a search led to.

    Args:
        front: its points.
        volume: that its candidates cover.
        candidates: how many were measured, stopped or failed.
        shop: of its results folder.
    """

    front: Front
    volume: float
    candidates: int
    shop: Workshop


def searched(out: Path, settings: Sequence[str]) -> Searched:
    """Run one search; it ends when the space has no more plans."""
    run = RunConfig.from_file("demo", overrides=settings)
    study = api.search(run, out, progress=print)
    found = study.candidates()
    volume = pareto.volume(found, study.reference, study.majority or 0.0)
    return Searched(study.front(), volume, len(found), Workshop(run, out / "artefacts"))


def counterpart(point: Candidate, front: Front) -> Candidate | None:
    """Return the most accurate point, by the search rows, of no more size and no more latency, or None."""
    fitting = [
        c
        for c in front.points
        if c.score.size_bytes <= point.score.size_bytes and c.score.latency_ratio <= point.score.latency_ratio
    ]
    return max(fitting, key=lambda c: (c.score.accuracy, -c.score.latency_ratio), default=None)


def compare(figures: Figures, data: str, axis: str, single: Searched, joint: Searched) -> None:
    """Hold each point of a single axis's front against its counterpart of the joint search."""
    pairs = [(point, counterpart(point, joint.front)) for point in single.front.points]
    known: dict[tuple[int, str], np.ndarray] = {}

    def right(of: Searched, candidate: Candidate) -> np.ndarray:
        key = (id(of), candidate.plan.plan_id)
        if key not in known:
            known[key] = test_hits(of.shop, of.shop.artefacts / candidate.plan.plan_id)
        return known[key]

    table: list[dict[str, Any]] = []
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for point, other in pairs:
        told: dict[str, Any] = {axis: about(point), "joint": None if other is None else about(other)}
        if other is not None:
            first, second = right(joint, other), right(single, point)
            rows.append((first, second))
            told["test accuracy"] = [float(first.mean()), float(second.mean())]
            told["gained"] = float(first.mean() - second.mean())
            told["95 % interval"] = interval(first, second)
        table.append(told)
    name = f"{data}, {axis}"
    figures.more[f"{name}: points of its front, with the joint search's at no more size and latency"] = table
    share = len(rows) / len(pairs)
    figures.add(f"{name}: points that the joint front has one for", share, f"share of {len(pairs)}")
    if rows:
        first, second = (np.mean(of, axis=0) for of in zip(*rows, strict=True))
        figures.add(
            f"{name}: accuracy gained there, test rows, mean",
            first.mean() - second.mean(),
            "share",
            interval=interval(first, second),
        )


def about(candidate: Candidate) -> dict[str, Any]:
    """Return a point's costs and accuracy on the search rows."""
    score = candidate.score
    return {
        "plan": candidate.plan.words(),
        "size_bytes": score.size_bytes,
        "latency_ratio": score.latency_ratio,
        "search accuracy": score.accuracy,
    }


def measure(figures: Figures, data: str, trials: int, place: Path) -> None:
    """Run the searches of one data set and compare what they lead to."""
    shared = [f"data.source={data}", f"storage.bank={place / 'bank'}"]
    model = api.finetune(RunConfig.from_file("demo", overrides=shared), progress=print)
    found: dict[str, Searched] = {}
    for axis, space in {"joint": str(space_without_students(place)), **AXES}.items():
        settings = [*shared, f"model.id={model}", f"space={space}", f"search.trials={trials}"]
        found[axis] = searched(place / f"{data.split('/')[1]}-{axis}", settings)
        figures.add(f"{data}, {axis}: hypervolume", found[axis].volume, f"of 1, {found[axis].candidates} candidates")
    joint = found.pop("joint")
    best = max(found, key=lambda axis: found[axis].volume)
    for axis, single in found.items():
        # An axis that loses much accuracy before it saves anything covers next to nothing.
        if single.volume > 0:
            name = f"{data}, {axis}: the joint search's hypervolume over it"
            figures.add(name, joint.volume / single.volume, "times")
    figures.more[f"{data}: best single axis"] = best
    compare(figures, data, best, found[best], joint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--trials", type=int, default=TRIALS, help="fewer are printed and not written")
    parser.add_argument("--keep", type=Path, help="leave the bank and the results folders here")
    options = parser.parse_args()
    figures = Figures("methods-joint", "python benchmarks/methods_joint.py")
    figures.read()
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        place = options.keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        for data in options.data:
            measure(figures, data, options.trials, place)
            if options.trials >= TRIALS:
                figures.write()


if __name__ == "__main__":
    main()
