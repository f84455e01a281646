"""Tell how far latency ratios differ from one process to another: ``results/benchmarks/latency-estimators.json``.

``python benchmarks/latency_estimators.py`` on an idle machine. Each of several processes loads the same artefacts and
times them against the reference in rounds. All runs are kept, those that are made before a block's and are not timed
included, so that ways of putting them together are compared on the same runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cluster_parallel import plans, shop
from figures import Figures

from autocompress import timing
from autocompress.evaluate import Workshop
from autocompress.plan import CompressionPlan
from autocompress.runtimes import Artifact

ARTEFACTS, PROCESSES, ROUNDS, PAIRS = 12, 12, 12, 2
TAKEN = ((2, 1), (2, 2), (4, 1), (6, 1), (6, 2), (12, 1))
"""Rounds, and pairs of each, that a ratio is made of."""
CLOSE = 0.05
DRAWS = 2000
BEFORE, TIMED = 0, 1
"""Runs that a search makes before a block's and does not time, and those that it times."""
CANDIDATE, REFERENCE = 0, 1


def medians(runs: np.ndarray) -> np.ndarray:
    return np.asarray(np.nanmedian(runs.reshape(*runs.shape[:2], -1), axis=-1))


def quartiles(runs: np.ndarray) -> np.ndarray:
    return timing.lower_quartiles(runs.reshape(*runs.shape[:2], -1))


def fastest(runs: np.ndarray) -> np.ndarray:
    return np.asarray(np.nanmin(runs.reshape(*runs.shape[:2], -1), axis=-1))


def of_pairs(runs: np.ndarray) -> np.ndarray:
    """Return the median over pairs of the ratio of a pair's medians."""
    found = np.nanmedian(runs, axis=-1)
    return np.asarray(np.median(found[:, CANDIDATE] / found[:, REFERENCE], axis=-1))


def over(statistic: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Return the ratio of a statistic of all runs of the candidate over that of the reference's."""

    def ratio(runs: np.ndarray) -> np.ndarray:
        found = statistic(runs)
        return np.asarray(found[:, CANDIDATE] / found[:, REFERENCE])

    return ratio


def timed(runs: np.ndarray) -> np.ndarray:
    return runs[:, :, :, TIMED]


def none_before_the_reference(runs: np.ndarray) -> np.ndarray:
    return np.stack([runs[:, CANDIDATE, :, TIMED], runs[:, REFERENCE, :, BEFORE]], axis=1)


def none_before(runs: np.ndarray) -> np.ndarray:
    return runs[:, :, :, BEFORE]


def all_of_them(runs: np.ndarray) -> np.ndarray:
    return np.concatenate([runs[:, :, :, BEFORE], runs[:, :, :, TIMED]], axis=-1)


Part = Callable[[np.ndarray], np.ndarray]
WAYS: dict[str, tuple[Part, Part, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "lower quartiles": (timed, over(quartiles), ((BEFORE, TIMED), (BEFORE, TIMED))),
    "medians": (timed, over(medians), ((BEFORE, TIMED), (BEFORE, TIMED))),
    "fastest runs": (timed, over(fastest), ((BEFORE, TIMED), (BEFORE, TIMED))),
    "median of pairs": (timed, of_pairs, ((BEFORE, TIMED), (BEFORE, TIMED))),
    "lower quartiles, the reference's first runs timed": (
        none_before_the_reference,
        over(quartiles),
        ((BEFORE, TIMED), (BEFORE,)),
    ),
    "lower quartiles, first runs timed": (none_before, over(quartiles), ((BEFORE,), (BEFORE,))),
    "lower quartiles, first runs timed, too": (all_of_them, over(quartiles), ((BEFORE, TIMED), (BEFORE, TIMED))),
}
"""Which runs count, what is made of them, and what has to be run for it: of the candidate, and of the reference.

With runs before those that are timed where these are short, which the demo's reference are not, and of pairs that were
not disturbed, this is what a search does at the end.
"""
UNDISTURBED = "lower quartiles, disturbed pairs taken anew"


def time_all(folder: Path, out: Path) -> None:
    """Write the runs of one process, ``artefacts x model x rounds x pairs x (before, timed) x runs`` in seconds."""
    workshop = shop(folder)
    artefacts = [Artifact.open(workshop.artefacts / plan.plan_id) for plan in chosen(workshop)]
    sessions = [workshop.gauge.stand.load(artifact) for artifact in artefacts]
    reference, clock = workshop.gauge.stand.reference, timing.clock_of(workshop.run.target)
    runs = np.full((len(sessions), 2, ROUNDS, PAIRS, 2, timing.MOST_RUNS), np.nan)
    for number in range(ROUNDS):
        for n, (session, artifact) in enumerate(zip(sessions, artefacts, strict=True)):
            inputs = workshop.gauge.inputs(artifact)
            for pair in range(PAIRS):
                for model, loaded in ((CANDIDATE, session), (REFERENCE, reference)):
                    for row in (BEFORE, TIMED):
                        seconds = timing.row(loaded, inputs, clock)
                        runs[n, model, number, pair, row, : seconds.size] = seconds
    np.save(out, runs, allow_pickle=False)


def chosen(workshop: Workshop) -> list[CompressionPlan]:
    found = plans(workshop)
    return [found[n] for n in np.linspace(0, len(found) - 1, ARTEFACTS).astype(int)]


def apart(ratios: np.ndarray) -> tuple[float, float]:
    """Return the standard deviation between processes, and the share of pairs of processes that are close.

    Args:
        ratios: ``processes x artefacts``, logarithms.
    """
    pairs = np.array(list(itertools.combinations(range(len(ratios)), 2)))
    close = np.abs(ratios[pairs[:, 0]] - ratios[pairs[:, 1]]) <= np.log1p(CLOSE)
    return float(np.sqrt(ratios.var(axis=0, ddof=1).mean())), float(close.mean())


def of_undisturbed(runs: np.ndarray, wanted: int) -> tuple[np.ndarray, float]:
    """Return what a search makes of the runs of one process, which takes pairs anew that were disturbed.

    Args:
        runs: ``artefacts x model x rounds x pairs x (before, timed) x runs``.
        wanted: pairs that are to be undisturbed.

    Returns:
        ``artefacts`` ratios, and the mean seconds that a candidate takes, with the runs before those that are timed.
    """
    # One of each round first: rounds lie apart.
    flat = runs.swapaxes(2, 3).reshape(len(runs), 2, ROUNDS * PAIRS, *runs.shape[4:])
    pace, moments = timing.Pace(), [list[list[timing.Pair]]() for _ in flat]
    for place in range(ROUNDS * PAIRS):  # round by round, as a front is timed anew
        for artefact, taken in zip(flat, moments, strict=True):
            if pace.missing(taken, wanted, wanted):
                pair = timing.Pair(*(_finite(artefact[model, place, TIMED]) for model in (CANDIDATE, REFERENCE)))
                pace.note(pair.beside)
                taken.append([pair])
    ratios = [timing.summarize(pace.undisturbed(taken), seed=0).ratio for taken in moments]
    spent = sum(float(np.nansum(artefact[:, : len(taken)])) for artefact, taken in zip(flat, moments, strict=True))
    return np.array(ratios), spent / len(flat)


def _finite(row: np.ndarray) -> np.ndarray:
    return np.asarray(row[np.isfinite(row)])


def compare(figures: Figures, runs: np.ndarray) -> None:
    """Write how steady each way is, for several numbers of rounds and pairs.

    Args:
        figures: to write to.
        runs: ``processes x artefacts x model x rounds x pairs x (before, timed) x runs``.
    """
    rng = np.random.default_rng(0)

    def add(what: str, ratios: np.ndarray, spent: float) -> None:
        """Write how far logarithms of ratios, ``processes x artefacts``, differ, and seconds a candidate."""
        deviation, close = apart(ratios)
        drawn = [apart(ratios[rng.integers(0, len(ratios), len(ratios))])[0] for _ in range(DRAWS)]
        scale = np.sqrt(len(ratios) / (len(ratios) - 1))  # what is drawn with repetitions varies less
        interval = [float(scale * end) for end in np.quantile(drawn, (0.025, 0.975))]
        figures.add(f"{what}: standard deviation between processes", deviation, "share", interval=interval)
        figures.add(f"{what}: pairs of processes within {CLOSE:.0%}", close, "share")
        figures.add(f"{what}: what is run takes", spent, "seconds a candidate")

    of_all = runs.reshape(-1, 2, ROUNDS * PAIRS, *runs.shape[5:])
    expected = np.log(WAYS["lower quartiles"][1](timed(of_all))).mean()
    for name, (part, ratio, needed) in WAYS.items():
        shift = float(np.exp(np.log(ratio(part(of_all))).mean() - expected))
        figures.add(f"{name}: ratio over that of lower quartiles", shift, "times")
        for rounds, pairs in TAKEN:
            taken = runs[:, :, :, :rounds, :pairs].reshape(-1, 2, rounds * pairs, *runs.shape[5:])
            ratios = np.log(ratio(part(taken))).reshape(len(runs), -1)
            spent = sum(np.nansum(taken[:, model][:, :, list(rows)]) for model, rows in enumerate(needed))
            add(f"{name}, {rounds} rounds of {pairs}", ratios, float(spent) / len(taken))
    by_count = {rounds: [of_undisturbed(process, rounds) for process in runs] for rounds, pairs in TAKEN if pairs == 1}
    most = np.log(np.stack([ratios for ratios, _ in by_count[max(by_count)]]))
    figures.add(f"{UNDISTURBED}: ratio over that of lower quartiles", float(np.exp(most.mean() - expected)), "times")
    for rounds, found in by_count.items():
        logarithms = np.log(np.stack([ratios for ratios, _ in found]))
        add(f"{UNDISTURBED}, {rounds} rounds of 1", logarithms, float(np.mean([spent for _, spent in found])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", nargs=2, type=Path, metavar=("ARTEFACTS", "RUNS"), help="time once (used within)")
    parser.add_argument("--name", default="latency-estimators", help="of the file of figures")
    options = parser.parse_args()
    if options.time:
        time_all(*options.time)
        return
    named = "" if options.name == parser.get_default("name") else f" --name {options.name}"
    figures = Figures(options.name, f"python benchmarks/latency_estimators.py{named}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        folder, found = Path(scratch) / "artefacts", []
        workshop = shop(folder)
        workshop.build(CompressionPlan(), workshop.reference_folder)
        for plan in chosen(workshop):
            workshop.prepare(plan)
            workshop.build(plan, workshop.artefacts / plan.plan_id)
        for number in range(PROCESSES):
            out = Path(scratch) / f"{number}.npy"
            subprocess.run([sys.executable, __file__, "--time", str(folder), str(out)], check=True, env=environment)
            found.append(np.load(out, allow_pickle=False))
            print(f"process {number + 1} of {PROCESSES}", flush=True)
    compare(figures, np.stack(found))
    figures.write()


if __name__ == "__main__":
    main()
