"""Hold our front against those of other tools: ``results/benchmarks/search-against-tools.json``.

``python benchmarks/against_tools.py --points points.json --results RESULTS [--results RESULTS]``. The points come from
``benchmarks/tools`` (their README says how), measured by the same protocol on the same rows; the results folders are
finished searches of the demo, one for each runtime that is compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figures

from autocompress import api, pareto
from autocompress.study import Study


def losses(rows: list[tuple[float, float, float]], majority: float, reference_bytes: int) -> np.ndarray:
    """Return (accuracy, bytes, ratio) as costs in units of the hypervolume's box."""
    return np.array([((1 - a) / (1 - majority), s / reference_bytes, r) for a, s, r in rows]).reshape(-1, 3)


def compared(figures: Figures, study: Study, points: list[dict[str, Any]]) -> None:
    runtime, majority = study.run.target.runtime, study.majority or 0.0
    size = study.reference.size_bytes
    ours = [(c.score.accuracy, float(c.score.size_bytes), c.score.latency_ratio) for c in study.front().points]
    figures.more[f"{runtime}: our front, accuracy, bytes and ratio"] = ours
    mine = pareto.hypervolume(losses(ours, majority, size), (1.0, 1.0, 1.0))
    figures.add(f"{runtime}: our hypervolume, {len(ours)} points", mine, "of 1")
    spent = json.loads((study.folder / "timing.json").read_text(encoding="utf-8"))
    trained = "" if "distilled" in spent["bank"] else ", its students in the bank before"
    figures.add(f"{runtime}: our search{trained}", spent["driver"]["all"], "seconds")
    here = [p for p in points if p["runtime"] == runtime and p.get("accuracy") is not None]
    best = 0.0
    for tool in sorted({p["tool"] for p in here}):
        rows = [(p["accuracy"], float(p["size_bytes"]), p["latency_ratio"]) for p in here if p["tool"] == tool]
        found = pareto.hypervolume(losses(rows, majority, size), (1.0, 1.0, 1.0))
        figures.add(f"{runtime}: hypervolume of {tool}, {len(rows)} points", found, "of 1")
        made = sum(p["seconds"] for p in here if p["tool"] == tool)
        figures.add(f"{runtime}: {tool}, making its points, our measuring of them not counted", made, "seconds")
        best = max(best, found)
        front = np.array(rows)[pareto.nondominated(losses(rows, majority, size))]
        kept = [
            p
            for p in here
            if p["tool"] == tool and (p["accuracy"], p["size_bytes"], p["latency_ratio"]) in {tuple(r) for r in front}
        ]
        # A point is matched by one of ours that is no larger and no slower and not worse than its accuracy's interval.
        open_points = [
            p
            for p in kept
            if not any(
                a >= p["accuracy_low"] and s <= p["size_bytes"] and r <= p["latency_ratio_high"] for a, s, r in ours
            )
        ]
        figures.more[f"{runtime}: points of {tool} that none of ours matches"] = open_points
        what = f"{runtime}: points on the front of {tool} that ours dominates or matches"
        share = 1 - len(open_points) / len(kept)
        figures.add(what, share, f"share of {len(kept)}", "1", share == 1)
    if best:
        figures.add(
            f"{runtime}: our hypervolume over the best tool's", mine / best, "times", ">= 1.2", mine / best >= 1.2
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=Path, required=True, help="what benchmarks/tools/measure_points.py wrote")
    parser.add_argument("--results", type=Path, action="append", required=True, help="results folder of a search")
    options = parser.parse_args()
    figures = Figures("search-against-tools", "python benchmarks/against_tools.py (see benchmarks/tools/README.md)")
    figures.read()
    found = json.loads(options.points.read_text(encoding="utf-8"))
    points: list[dict[str, Any]] = found["points"] if isinstance(found, dict) else found
    figures.more["points"] = points
    for folder in options.results:
        compared(figures, api.open_study(folder), points)
    figures.write()


if __name__ == "__main__":
    main()
