"""Tell what a second worker does to latencies of a first one: ``results/benchmarks/cluster-parallel.json``.

``python benchmarks/cluster_parallel.py`` on an idle machine of two cores. A neighbour evaluates one candidate after the
other in a process of its own, as the other worker of a search does. Candidates are timed against the reference in turns
while it works and while it is held, so that each pair of figures comes from the same moment and the same loaded model.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from figures import Figures

from autocompress import scoring, slot
from autocompress.config import RunConfig
from autocompress.evaluate import Workshop
from autocompress.plan import CompressionPlan
from autocompress.runtimes import Artifact
from autocompress.seeds import uniform_ladder

CANDIDATES, ROUNDS, PAIRS = 20, 12, 2
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


def shifts(workshop: Workshop, neighbour: subprocess.Popen[str]) -> list[float]:
    """Return by how much each candidate's ratio differs with the neighbour at work from what it is without."""
    found = []
    for plan in plans(workshop):
        artifact = workshop.build(plan, workshop.artefacts / plan.plan_id)
        session = workshop.runtime.load(artifact, workshop.run.target)
        ratios: dict[int, list[float]] = {signal.SIGSTOP: [], signal.SIGCONT: []}
        for _ in range(ROUNDS):
            for order, taken in ratios.items():
                with slot.timing():  # it holds no turn when it is stopped
                    os.kill(neighbour.pid, order)
                time.sleep(SETTLE_S)
                taken += [pair.ratio for pair in workshop.stand.pairs(session, artifact, PAIRS)]
        alone, beside = (float(np.median(taken)) for taken in ratios.values())
        found.append(beside / alone - 1)
    return found


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
        workshop.stand.pairs(workshop.stand.reference, Artifact.open(workshop.reference_folder), 1)
        for plan in plans(workshop):  # what the bank lacks is made before anything is timed
            workshop.prepare(plan)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        job = [sys.executable, __file__, str(theirs)]
        neighbour = subprocess.Popen(job, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert neighbour.stdout is not None
            assert neighbour.stdout.readline() == "ready\n"
            found = np.array(shifts(workshop, neighbour))
        finally:
            neighbour.kill()
            neighbour.wait()
    drawn = np.random.default_rng(0).choice(found, (DRAWS, len(found))).mean(axis=1)
    interval = [float(end) for end in np.quantile(drawn, (0.025, 0.975))]
    mean, worst = float(found.mean()), float(np.abs(found).max())
    what = f"latency ratio beside another worker over alone, {len(found)} candidates"
    figures.add(f"{what}: mean shift", mean, "share", "<= 0.02", abs(mean) <= 0.02, interval)
    figures.add(f"{what}: median of the sizes of shifts", float(np.median(np.abs(found))), "share")
    figures.add(f"{what}: largest shift", worst, "share", "<= 0.02", worst <= 0.02)
    figures.more["shifts"] = found.tolist()
    figures.more["clock"] = scoring.clock_of(workshop.run.target).__name__
    figures.write()


if __name__ == "__main__":
    main()
