"""Tell what a second worker does to latencies of a first one: ``results/benchmarks/cluster-parallel.json``.

``python benchmarks/cluster_parallel.py`` on an idle machine of two cores. A neighbour evaluates one candidate after the
other in a process of its own, as the other worker of a search does. Candidates are timed against the reference in turns
while it works and while it is held, so that each pair of figures comes from the same moment and the same loaded model.
Two that are both taken alone tell how far such figures differ by themselves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from figures import Figures

from autocompress import slot, timing
from autocompress.config import RunConfig
from autocompress.evaluate import Workshop
from autocompress.plan import CompressionPlan
from autocompress.records import Z95
from autocompress.runtimes import Artifact
from autocompress.seeds import uniform_ladder

CANDIDATES, ROUNDS, PAIRS = 20, 64, 2
MOST = 0.02
DRAWS = 2000
SETTLE_S = 0.02


def shop(folder: Path) -> Workshop:
    return Workshop(RunConfig.from_file("demo"), folder)


def plans(workshop: Workshop) -> list[CompressionPlan]:
    """Return uniform plans that take no training, from all over the ladder."""
    found = [workshop.space.plan(params) for params in uniform_ladder(workshop.space)]
    quick = [plan for plan in found if not workshop.needs_training(plan)]
    return [quick[n] for n in np.linspace(0, len(quick) - 1, min(CANDIDATES, len(quick))).astype(int)]


def be_a_neighbour(folder: Path) -> None:
    """Evaluate candidates without end; says once that it has begun."""
    workshop = shop(folder)
    workshop.open()
    workshop.ready()
    print("ready", flush=True)
    while True:
        for plan in plans(workshop):
            workshop.attempt(plan)


def timed(workshop: Workshop, neighbour: subprocess.Popen[str]) -> Iterator[np.ndarray]:
    """Yield each candidate's runs, ``3 x 2 x rounds x runs``: alone, beside the neighbour, and alone again.

    Of each, those of the candidate and of the reference, in seconds; NaN where a block has fewer runs than another.
    """
    for plan in plans(workshop):
        artifact = workshop.build(plan, workshop.artefacts / plan.plan_id)
        session = workshop.runtime.load(artifact, workshop.run.target)
        found = []
        for _ in range(ROUNDS):
            for order in (signal.SIGSTOP, signal.SIGCONT, signal.SIGSTOP):
                with slot.timing():  # it holds no turn when it is stopped
                    os.kill(neighbour.pid, order)
                time.sleep(SETTLE_S)
                found.append(timing.runs_of(workshop.gauge.stand.pairs(session, artifact, PAIRS)).reshape(2, -1))
        os.kill(neighbour.pid, signal.SIGCONT)
        yield np.stack(found).reshape(ROUNDS, 3, 2, -1).transpose(1, 2, 0, 3)


def shift(of: np.ndarray, over: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Return by how much a ratio differs from another one of the same rounds, with the ends of the 95 % interval.

    Args:
        of: runs of both models, ``2 x rounds x runs``.
        over: runs that they are held against.
        rng: draws rounds.
    """

    def apart(rounds: np.ndarray) -> np.ndarray:
        (a, b), (c, d) = (timing.lower_quartiles(runs[:, rounds].reshape(2, len(rounds), -1)) for runs in (of, over))
        return np.asarray(a / b / (c / d) - 1)

    [found] = apart(np.arange(ROUNDS)[None])
    drawn = np.concatenate([apart(some) for some in rng.integers(0, ROUNDS, (DRAWS // 100, 100, ROUNDS))])
    return float(found), *(float(end) for end in np.quantile(drawn, (0.025, 0.975)))


def without_noise(shifts: np.ndarray) -> np.ndarray:
    """Return what shifts are by what all of them tell, as shares.

    The largest of many noisy figures is mostly noise. Each is drawn to their mean by the share of the variance that its
    interval explains (Efron and Morris 1975, "Data Analysis Using Stein's Estimator and its Generalizations"): what
    they vary by beyond that is of the candidates.

    Args:
        shifts: ``candidates x 3``, with the ends of their 95 % intervals.
    """
    own = ((shifts[:, 2] - shifts[:, 1]) / (2 * Z95)) ** 2
    true = max(0.0, float(shifts[:, 0].var(ddof=1) - own.mean()))
    mean = shifts[:, 0].mean()
    return np.asarray(mean + true / (true + own) * (shifts[:, 0] - mean))


def main() -> None:
    if len(sys.argv) > 1:
        be_a_neighbour(Path(sys.argv[1]))
        return
    figures = Figures("cluster-parallel", "python benchmarks/cluster_parallel.py")
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        ours, theirs = Path(scratch) / "ours", Path(scratch) / "theirs"
        workshop = shop(ours)
        for folder in (ours, theirs):
            one = shop(folder)
            one.score(one.build(CompressionPlan(), one.reference_folder))
        workshop.gauge.stand.pairs(workshop.gauge.stand.reference, Artifact.open(workshop.reference_folder), 1)
        for plan in plans(workshop):  # what the bank lacks is made before anything is timed
            workshop.prepare(plan)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        job = [sys.executable, __file__, str(theirs)]
        neighbour = subprocess.Popen(job, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert neighbour.stdout is not None
            assert neighbour.stdout.readline() == "ready\n"
            taken = list(timed(workshop, neighbour))
        finally:
            neighbour.kill()
            neighbour.wait()
    rng = np.random.default_rng(0)
    shifts = np.array([shift(runs[1], np.concatenate([runs[0], runs[2]], axis=-1), rng) for runs in taken])
    again = np.array([shift(runs[2], runs[0], rng) for runs in taken])
    means = rng.choice(shifts[:, 0], (DRAWS, len(shifts))).mean(axis=1)
    interval = [float(end) for end in np.quantile(means, (0.025, 0.975))]
    mean, worst = float(shifts[:, 0].mean()), float(np.abs(shifts[:, 0]).max())
    beyond = int(((shifts[:, 1] > MOST) | (shifts[:, 2] < -MOST)).sum())
    what = f"latency ratio beside another worker over alone, {len(shifts)} candidates"
    figures.add(f"{what}: mean shift", mean, "share", f"<= {MOST}", abs(mean) <= MOST, interval)
    figures.add(f"{what}: shifted by more than {MOST:.0%}, interval and all", beyond, "candidates", "0", beyond == 0)
    figures.add(f"{what}: median of the sizes of shifts", float(np.median(np.abs(shifts[:, 0]))), "share")
    figures.add(f"{what}: largest shift", worst, "share", f"<= {MOST}", worst <= MOST)
    shrunk = float(np.abs(without_noise(shifts)).max())
    figures.add(f"{what}: largest shift without noise", shrunk, "share", f"<= {MOST}", shrunk <= MOST)
    for name, value in (("median", np.median(np.abs(again[:, 0]))), ("largest", np.abs(again[:, 0]).max())):
        figures.add(f"latency ratio alone over alone a moment before, {name} of the sizes", float(value), "share")
    figures.more["shifts with their intervals"] = shifts.tolist()
    figures.more["clock"] = timing.clock_of(workshop.run.target).__name__
    figures.write()


if __name__ == "__main__":
    main()
