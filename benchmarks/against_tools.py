"""Hold our fronts against those of other tools: ``results/benchmarks/search-against-tools.json``.

``python benchmarks/against_tools.py --points points.json --results RESULTS [--results RESULTS ...]``. The points come
from ``benchmarks/tools`` (their README says how); the results folders are finished searches of the demo for the same
runtimes: of the whole space, and of `encoder-bits`, which does no more than the tools were used for.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figures

from autocompress import api, pareto, scoring
from autocompress.evaluate import Workshop
from autocompress.rows import read_logits
from autocompress.runtimes import Artifact
from autocompress.study import Study

SCHEMA = 2
WHOLE = "encoder-joint"
ALIKE = {"encoder-bits": "quantised alone"}
_REASON = 160
"""Signs of a reason that are kept, without what names a file."""
CLOSE = 0.03
"""Accuracy that a model may lose to count where only usable ones do."""


class Ours:
    """The front of a finished search, on its own rows and on the held-out ones.

    Args:
        study: of the search.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.runtime, self.space = study.run.target.runtime, str(study.run.space)
        self.points = study.front().points
        self.rows = [(c.score.accuracy, float(c.score.size_bytes), c.score.latency_ratio) for c in self.points]
        self.shop = Workshop(study.run, study.folder / "artefacts")

    @property
    def reference_bytes(self) -> float:
        return float(self.study.reference.size_bytes)

    @property
    def majority(self) -> float:
        assert self.study.majority is not None, "an earlier version's study"
        return self.study.majority

    @property
    def majority_on_test(self) -> float:
        labels = self.shop.splits["test"].labels
        return max(labels.count(label) for label in set(labels)) / len(labels)

    def on_test(self) -> list[tuple[float, float, float]]:
        """Return the front with its accuracies on the held-out rows."""
        found = []
        for candidate, (_, size, ratio) in zip(self.points, self.rows, strict=True):
            artifact = Artifact.open(self.shop.artefacts / candidate.plan.plan_id)
            scored = scoring.accuracy(self.shop.logits(artifact, "test"), self.shop.splits["test"])
            found.append((scored.value, size, ratio))
        return found

    def logits(self) -> list[np.ndarray]:
        """Return what each point of the front made of the search rows."""
        return [read_logits(self.shop.artefacts / c.plan.plan_id) for c in self.points]


def volume(rows: list[tuple[float, float, float]], floor: float, reference_bytes: float) -> float:
    """Return the hypervolume of (accuracy, bytes, ratio) over a least accuracy, the reference's bytes and its time."""
    costs = np.array([((1 - a) / (1 - floor), s / reference_bytes, r) for a, s, r in rows]).reshape(-1, 3)
    return pareto.hypervolume(costs, (1.0, 1.0, 1.0))


def rows_of(points: list[dict[str, Any]], accuracy: str = "accuracy") -> list[tuple[float, float, float]]:
    return [(p[accuracy], float(p["size_bytes"]), p["latency_ratio"]) for p in points]


def beaten(point: dict[str, Any], ours: Ours, logits: list[np.ndarray]) -> tuple[bool, bool]:
    """Return whether a point of ours is better or equal in all, and whether one is but for chance in accuracy.

    That is one that is no larger and no slower, and whose accuracy on the same rows is not less beyond the 95 %
    interval of such a paired difference.
    """
    classes = np.eye(logits[0].shape[1])[point["classes"]]
    no_worse = [
        (accuracy, found)
        for (accuracy, size, ratio), found in zip(ours.rows, logits, strict=True)
        if size <= point["size_bytes"] and ratio <= point["latency_ratio"]
    ]
    outright = any(accuracy >= point["accuracy"] for accuracy, _ in no_worse)
    lost = (scoring.drop(found, classes, ours.shop.splits["search"]) for _, found in no_worse)
    return outright, outright or any(drop.low <= 0 for drop in lost)


def compared(figures: Figures, searches: list[Ours], found: dict[str, Any]) -> None:
    """Add the figures of one runtime."""
    [ours] = [each for each in searches if each.space == WHOLE]
    runtime, size, majority, on_test = ours.runtime, ours.reference_bytes, ours.majority, ours.majority_on_test
    usable = ours.study.reference.accuracy - CLOSE
    figures.more[f"{runtime}: our front, accuracy, bytes and ratio"] = ours.rows
    figures.more[f"{runtime}: uncompressed, accuracy and bytes"] = [ours.study.reference.accuracy, size]
    figures.more[f"{runtime}: corner of the hypervolumes, accuracy, bytes and ratio"] = [majority, size, 1.0]
    mine, mine_on_test = volume(ours.rows, majority, size), volume(ours.on_test(), on_test, size)
    mine_usable = volume(ours.rows, usable, size)
    best = best_on_test = best_usable = 0.0
    here = [point for point in found["points"] if point["runtime"] == runtime]
    logits = ours.logits()
    for tool in sorted({point["tool"] for point in here}):
        of_tool = [point for point in here if point["tool"] == tool]
        what, rows, front = f"{runtime}, {tool}", rows_of(of_tool), [p for p in of_tool if p["on_front"]]
        covered = volume(rows, majority, size)
        figures.add(f"{what}: points", len(of_tool), "")
        smaller = sum(p["accuracy"] > majority and p["size_bytes"] < size and p["latency_ratio"] < 1 for p in of_tool)
        figures.add(f"{what}: of these smaller, faster and better than the majority class", smaller, "")
        refused = [failure for failure in found["failures"] if failure["tool"] == tool]
        late = sum(failure["reason"].startswith("not started") for failure in refused)
        figures.add(f"{what}: settings that its budget did not reach", late, "", "0", late == 0)
        figures.add(f"{what}: other settings that came to nothing", len(refused) - late, "")
        figures.more[f"{what}: settings that came to nothing"] = [
            {"name": each["name"], "reason": re.sub(r"/\S+", "...", each["reason"])[:_REASON]} for each in refused
        ]
        figures.add(f"{what}: its script, without our measuring of its points", found["seconds"][tool], "seconds")
        figures.add(f"{what}: hypervolume", covered, "of 1")
        best, best_usable = max(best, covered), max(best_usable, volume(rows, usable, size))
        best_on_test = max(best_on_test, volume(rows_of(front, "test_accuracy"), on_test, size))
        both = [beaten(point, ours, logits) for point in front]
        outright, matched = (float(np.mean([each[n] for each in both])) for n in (0, 1))
        figures.add(f"{what}: points on its front", len(front), "")
        figures.add(f"{what}: of its front, one of ours is no worse in all", outright, "share")
        told = f"{what}: of its front, one of ours is no larger, no slower, and no less accurate beyond chance"
        figures.add(told, matched, "share", "1", matched == 1)
        for name, of_both in (("no worse in all", 0), ("no less accurate beyond chance", 1)):
            left = [p["name"] for p, each in zip(front, both, strict=True) if not each[of_both]]
            figures.more[f"{what}: of its front, where none of ours is {name}"] = left
    over = mine / best
    figures.add(f"{runtime}: our hypervolume over the best tool's", over, "times", ">= 1.2", over >= 1.2)
    figures.add(f"{runtime}: the same on the held-out test rows", mine_on_test / best_on_test, "times")
    told = f"{runtime}: the same of models that lose at most {100 * CLOSE:g} points of accuracy"
    if best_usable:
        figures.add(told, mine_usable / best_usable, "times")
    for each in searches:
        words = ALIKE.get(each.space, "the whole space")
        what = f"{runtime}, ours, {words} ({each.space})"
        figures.add(f"{what}: candidates", each.study.finished, "")
        figures.add(f"{what}: points on the front", len(each.rows), "")
        spent = json.loads((each.study.folder / "timing.json").read_text(encoding="utf-8"))
        figures.add(f"{what}: its search, from start to end", spent["driver"]["all"], "seconds")
        lacked = float(sum(spent["bank"].values()))
        figures.add(f"{what}: of that, making what was not in the bank yet", lacked, "seconds")
        covered = volume(each.rows, majority, size)
        figures.add(f"{what}: hypervolume", covered, "of 1")
        if each is not ours:
            figures.more[f"{runtime}: our front, {words}"] = each.rows
            figures.add(f"{what}: hypervolume over the best tool's", covered / best, "times")


def searches_of(folders: list[Path], found: dict[str, Any]) -> dict[str, list[Ours]]:
    """Return the searches by runtime.

    Raises:
        SystemExit: if a search and the points are not of one machine, target, model and rows, or one is missing.
    """
    searches: dict[str, list[Ours]] = {}
    for folder in folders:
        ours = Ours(api.open_study(folder))
        ours.study.identity.require_machine(found["machine"]["id"])
        ours.study.identity.require_data(found["data"])
        ours.study.identity.require_model(found["model"])
        if ours.study.run.target.model_dump(exclude={"runtime"}) != found["target"]:
            raise SystemExit(f"{folder}: is of another target than the points")
        searches.setdefault(ours.runtime, []).append(ours)
    for runtime in {point["runtime"] for point in found["points"]}:
        spaces = [each.space for each in searches.get(runtime, [])]
        if sorted(spaces) != sorted([WHOLE, *ALIKE]):
            raise SystemExit(f"{runtime}: wants a search of {', '.join([WHOLE, *ALIKE])} each, got {spaces}")
    return searches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=Path, required=True, help="what benchmarks/tools/measure_points.py wrote")
    parser.add_argument("--results", type=Path, action="append", required=True, help="results folder of a search")
    options = parser.parse_args()
    found = json.loads(options.points.read_text(encoding="utf-8"))
    if found.get("schema") != SCHEMA:
        raise SystemExit(f"{options.points}: schema must be {SCHEMA}; measure the points anew")
    searches = searches_of(options.results, found)
    figures = Figures("search-against-tools", "sh benchmarks/tools/compare.sh VENVS FOLDER")
    for runtime in sorted(searches):
        compared(figures, searches[runtime], found)
    figures.more["points"] = [{k: v for k, v in p.items() if k != "classes"} for p in found["points"]]
    figures.write()


if __name__ == "__main__":
    main()
