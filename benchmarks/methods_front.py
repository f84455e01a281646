"""Measure what compression retains at which speed and size, and write ``results/benchmarks/methods-front.json``.

On a CPU without VNNI instructions, where 8 bits save no time, that is ``methods-front-avx2.json``.

``python benchmarks/methods_front.py`` searches twice on each data set, from a fine-tuned model and an empty bank: in
the space in which nothing is trained, among what loses at most `MOST_LOST` of the accuracy, and in the joint space. Of
each front it takes the fastest and the smallest point that retains a share of the uncompressed model's
accuracy on the search rows, and of all candidates the best one of a gain that is aimed at, and tells what these retain
on the held-out test rows, with a paired bootstrap interval. They were chosen by the search rows, so less is to be
expected there. The best one is that which diverges least from the uncompressed model: what is most accurate among many
was lucky, too, and may keep what is better off the front. How well that chooses is told by halves of the search rows.

The best ones of a gain among the candidates of both searches are then recovered: reconstructed, and trained in as many
passes as cost no more arithmetic than one fine-tuning, with weights rounded as they are stored.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from figures import Figures
from held_out import DATA, DRAWS, test_hits

from autocompress import api, machine, scoring
from autocompress.config import RunConfig
from autocompress.evaluate import Workshop
from autocompress.front import Front
from autocompress.records import Candidate, Measurement
from autocompress.rows import read_logits

FILES = {True: "methods-front", False: "methods-front-avx2"}
"""Where figures go, by whether the CPU has VNNI instructions."""
SEARCHES = ("without training", "with students")
FASTEST = {"without training": ((0.99, 4.0),), "with students": ((0.99, 6.0), (0.97, 10.0))}
"""Shares of accuracy to be retained, and times faster that are aimed at there."""
SMALLEST = ((0.98, 12.0), (0.96, 16.0))
"""The same for times smaller."""
BOTH = "of both searches"
MORE = {"latency": "faster", "size": "smaller"}
TRIALS = {"without training": 80, "with students": 200}
MOST_LOST = 0.05
SETTINGS = {
    "without training": ("space=encoder-post-training", f"constraints.max_accuracy_drop={MOST_LOST}"),
    "with students": ("space=encoder-joint",),
}
OF_PICKED = ("recovery.epochs=auto", "recovery.quantized=true", "recovery.reconstruct=true")
HALVINGS = 400
MINUTES = 10.0
"""In which the points without training are to be found."""


def chosen(front: Front, share: float, prefer: str) -> Candidate | None:
    """Return the fastest or smallest point that retains a share of the accuracy on the search rows, or None."""
    kept = [c for c in front.points if c.score.accuracy >= share * front.reference.accuracy]
    costs = {"latency": lambda c: c.score.latency_ratio, "size": lambda c: c.score.size_bytes}
    return min(kept, key=costs[prefer], default=None)


def gain(candidate: Candidate, front: Front, prefer: str) -> float:
    """Return how many times faster or smaller than the uncompressed model a point is."""
    score = candidate.score
    return 1 / score.latency_ratio if prefer == "latency" else front.reference.size_bytes / score.size_bytes


def retained(candidate: np.ndarray, reference: np.ndarray) -> tuple[float, list[float]]:
    """Return the share of the reference's accuracy, with a 95 % interval of a bootstrap over the same rows."""
    drawn = np.random.default_rng(0).integers(0, len(reference), (DRAWS, len(reference)))
    shares = candidate[drawn].mean(axis=1) / reference[drawn].mean(axis=1)
    return float(candidate.mean() / reference.mean()), [float(q) for q in np.quantile(shares, (0.025, 0.975))]


def gained_by_nearness(shop: Workshop, among: Sequence[Candidate]) -> tuple[float, list[float]]:
    """Return by how much what diverges least beats what is most accurate, on rows that neither was chosen by.

    Both are chosen by a half of the search rows and judged by the other one, many times; with the 95 % interval over
    how the rows are parted.
    """
    full, labels = read_logits(shop.reference_folder), np.array(shop.splits["search"].labels)
    logits = [read_logits(shop.artefacts / candidate.plan.plan_id) for candidate in among]
    right = np.stack([each.argmax(axis=1) == labels for each in logits])
    apart = np.stack([scoring.divergences(each, full) for each in logits])
    rng, gained = np.random.default_rng(0), []
    for _ in range(HALVINGS):
        order = rng.permutation(len(labels))
        by, on = order[: len(order) // 2], order[len(order) // 2 :]
        near, accurate = apart[:, by].mean(axis=1).argmin(), right[:, by].mean(axis=1).argmax()
        gained.append(right[near, on].mean() - right[accurate, on].mean())
    return float(np.mean(gained)), [float(end) for end in np.quantile(gained, (0.025, 0.975))]


@dataclass
class Measured:
    """A search that has ended, with what is to be told of its points.

    Args:
        figures: to write to.
        name: of the search.
        front: what it found.
        candidates: all that it tried.
        shop: its run, with built candidates.
        calmed: adjusts a measurement as those of the front are.
    """

    figures: Figures
    name: str
    front: Front
    candidates: Sequence[Candidate]
    shop: Workshop
    calmed: Callable[[Measurement], Measurement]

    def __post_init__(self) -> None:
        self.reference = test_hits(self.shop, self.shop.reference_folder)
        self.figures.more[f"{self.name}: test accuracy of the uncompressed model"] = float(self.reference.mean())

    def reach(self, target: float, prefer: str) -> list[Candidate]:
        """Return the candidates that have a gain, and were not trained, that which diverges least first."""
        scored = [c for c in self.candidates if c.measurement is not None and c.feasible and not c.plan.trained]
        found = (c for c in scored if gain(c, self.front, prefer) >= target)
        return sorted(found, key=lambda c: c.score.divergence or 0.0)

    def timed(self, candidate: Candidate) -> Candidate:
        """Return a candidate with a latency taken as that of a front's point is."""
        if candidate.score.confirmed:
            return candidate
        pairs = self.shop.run.search.confirm_pairs
        [measured] = self.shop.confirmed([(candidate.plan, candidate.score)], pairs=pairs)
        return replace(candidate, measurement=self.calmed(measured))

    def write(self, name: str, candidate: Candidate, prefer: str, share: float, target: float) -> None:
        """Write a point's gain, with its ``target``, and what it retains on test rows, with the ``share`` aimed at."""
        score, found = candidate.score, gain(candidate, self.front, prefer)
        spread = [1 / score.latency_ratio_high, 1 / score.latency_ratio_low] if prefer == "latency" else None
        unit = "times faster" if prefer == "latency" else "times smaller"
        self.figures.add(name, found, unit, f">= {target:g}", found >= target, spread)
        built = self.shop.artefacts / candidate.plan.plan_id
        value, interval = retained(test_hits(self.shop, built), self.reference)
        self.figures.add(f"{name}: retained on test rows", value, "share", f">= {share:g}", value >= share, interval)
        said: dict[str, object] = {"plan": candidate.plan.words(), "megabytes": score.size_bytes / 1e6}
        on_search = score.accuracy / self.front.reference.accuracy
        self.figures.more[name] = {**said, "retained on search rows": on_search}
        self.figures.write()


def nearest(searches: Sequence[Measured], target: float, prefer: str) -> tuple[Measured, Candidate] | None:
    """Return what diverges least of all that have a gain when they are timed as a front's points are, or None."""
    found = [(search, candidate) for search in searches for candidate in search.reach(target, prefer)]
    for search, candidate in sorted(found, key=lambda pair: pair[1].score.divergence or 0.0):
        timed = search.timed(candidate)
        if gain(timed, search.front, prefer) >= target:
            return search, timed
    return None


def none(figures: Figures, name: str, target: float) -> None:
    """Write that nothing has a gain."""
    figures.add(name, 1.0, "times: none but the uncompressed model", f">= {target:g}", False)


def measure(figures: Figures, data: str, search: str, place: Path, settings: Sequence[str]) -> Measured:
    """Run one search and write what its points retain."""
    out, name = place / f"{data.split('/')[1]}-{search.replace(' ', '-')}", f"{data}, {search}"
    bank = f"storage.bank={out}-bank"
    run = RunConfig.from_file("demo", overrides=[f"data.source={data}", bank, *settings])
    begun, started = (out / "study.csv").exists(), time.perf_counter()
    study = api.search(run, out, progress=print)
    minutes = (time.perf_counter() - started) / 60
    if not begun:
        bound = MINUTES if search == SEARCHES[0] else math.inf
        said = f"<= {bound:g}" if search == SEARCHES[0] else "reported"
        figures.add(f"{name}: the whole search", minutes, "minutes", said, minutes <= bound)
    shop = Workshop(run, out / "artefacts")
    measured = Measured(figures, name, study.front(), study.candidates(), shop, study.calmed)
    wanted = [("latency", share, target) for share, target in FASTEST[search]]
    wanted += [("size", share, target) for share, target in SMALLEST]
    for prefer, share, target in wanted:
        extreme, more = {"latency": "fastest", "size": "smallest"}[prefer], MORE[prefer]
        of_extreme = f"{name}, {extreme} with {share:.0%} of the accuracy"
        of_best = f"{name}, best of {target:g} times {more}"
        if (point := chosen(measured.front, share, prefer)) is None:
            none(figures, of_extreme, target)
        else:
            measured.write(of_extreme, point, prefer, share, target)
        reach = measured.reach(target, prefer)
        if len(reach) > 1:
            gained, interval = gained_by_nearness(measured.shop, reach)
            said = f"{name}, least divergent over most accurate of {target:g} times {more}"
            figures.add(f"{said}: on the other half of search rows", gained, "share of rows", interval=interval)
        if (found := nearest([measured], target, prefer)) is None:
            none(figures, of_best, target)
        else:
            measured.write(of_best, found[1], prefer, share, target)
    return measured


def recover(figures: Figures, data: str, searches: Sequence[Measured]) -> None:
    """Recover the best candidates of several searches on the same data, and write what they retain then."""
    wanted = [("latency", share, target) for share, target in FASTEST[SEARCHES[1]]]
    for prefer, share, target in [*wanted, *(("size", share, target) for share, target in SMALLEST)]:
        name = f"{data}, {BOTH}, best of {target:g} times {MORE[prefer]}, recovered"
        if (found := nearest(searches, target, prefer)) is None:
            none(figures, name, target)
            continue
        search, candidate = found
        again = api.recover(candidate, overrides=OF_PICKED, progress=print)
        search.write(name, again, prefer, share, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=SEARCHES)
    parser.add_argument("--trials", type=int, help="by default 80 without training and 200 with students")
    parser.add_argument("--learning-rate", type=float, default=6e-4, help="of students and of recovery")
    parser.add_argument("--keep", type=Path, help="leave the banks and the results folders here")
    options = parser.parse_args()
    fast_integers = any("vnni" in feature for feature in machine.fingerprint()["cpu"]["features"])
    figures = Figures(FILES[fast_integers], "python benchmarks/methods_front.py")
    figures.read()
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        place = options.keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        for data in options.data:
            trained = RunConfig.from_file("demo", overrides=[f"data.source={data}", f"storage.bank={place / 'bank'}"])
            model = api.finetune(trained, progress=print)
            measured = []
            for search in options.searches:
                trials = options.trials or TRIALS[search]
                settings = [f"search.trials={trials}", "search.keep_artefacts=all", f"model.id={model}"]
                settings += SETTINGS[search]
                settings += [f"recovery.learning_rate={options.learning_rate}"]
                measured.append(measure(figures, data, search, place, settings))
            if len(measured) == len(SEARCHES):
                recover(figures, data, measured)


if __name__ == "__main__":
    main()
