"""Simulate searches on 1 to 1,000 workers: ``results/benchmarks/cluster-simulated.json``.

``python benchmarks/cluster_simulated.py`` on an idle machine. The driver, the study and its proposals are the real
ones, and what they compute passes in the simulation as long as it takes here; candidates take as long as recorded ones,
brought to a mean of ten seconds, a few take several times as long, and workers die. No model is run: scores are a
formula of the plan. Each size of cluster is simulated in a process of its own. Scaling is judged while there is work
for all; after that a search waits for its last candidates, of which a slow one may die again and again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import heapq
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
from engine_cost import MINILM, filled, opened, score_of
from figures import ROOT, Figures

from autocompress import driver, machine
from autocompress.binding import bind
from autocompress.desk import Job, Result
from autocompress.plan import CompressionPlan
from autocompress.space import SearchSpace
from autocompress.trackers import Trackers
from autocompress.trained import silent

RECORDED = ROOT / "results" / "minilm-movies-openvino" / "study.csv"
SIZES = (1, 10, 50, 100, 200, 500, 1000)
MEAN_S = 10.0
STRAGGLERS, SLOWER = 0.02, 5.0
"""Share of candidates that take so many times as long."""
DEATHS, WITHIN_S = 0.03, 10.0
"""Chance that a worker dies within that time."""
RESTART_S = 8.0
"""From a worker's death until another one has loaded what it needs."""
HAND_S = 0.005
"""From one side of the desk to the other."""
EACH, FEWEST, MOST = 50, 1_000, 10_000
"""Candidates a worker, and in all."""


def recorded() -> list[dict[str, str]]:
    """Return the complete candidates of a search that was run."""
    with RECORDED.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["state"] == "COMPLETE"]


class Simulated:
    """Workers of a made-up cluster, with a clock of their own, in place of `distribute.Workers`.

    Args:
        count: of workers.
        durations: seconds of recorded candidates.
        seed: of durations, stragglers and deaths.
    """

    def __init__(self, count: int, durations: np.ndarray, seed: int) -> None:
        self.count = count
        self.now = self.driver_s = self.lost_s = self.last_handed_out = 0.0
        self.useful: list[tuple[float, float]] = []
        """When candidates that counted began and ended."""
        self.deaths = 0
        self._durations = durations / durations.mean() * MEAN_S
        self._rng = np.random.default_rng(seed)
        self._idle = [(0.0, worker) for worker in range(count)]
        self._desk: deque[tuple[float, Job]] = deque()
        self._results: deque[Result] = deque()
        self._running: list[tuple[float, int, int, str]] = []
        self._closed = False
        self._left = time.perf_counter()

    def clock(self) -> float:
        """Return the time in the simulation while the driver computes."""
        return self.now + time.perf_counter() - self._left

    def useful_s(self, until: float = float("inf")) -> float:
        """Return the seconds that workers spent until then on candidates that counted."""
        return sum(max(0.0, min(ended, until) - began) for began, ended in self.useful)

    def open(self) -> None: ...

    def put(self, job: Job) -> None:
        self._enter()
        self._desk.append((self.now + HAND_S, job))
        self._hand_out()
        self._leave()

    def close(self) -> None:
        self._closed = True

    def next_result(self, timeout: float | None = None) -> Result | None:
        self._enter()
        while self._running and (self._running[0][0] <= self.now or not self._results):
            if not self._results:
                self.now = max(self.now, self._running[0][0])
            end, number, worker, plan = heapq.heappop(self._running)
            measured = score_of(CompressionPlan.from_json(plan))
            self._results.append((number, {"measurement": dataclasses.asdict(measured)}))
            heapq.heappush(self._idle, (end + HAND_S, worker))
            self._hand_out()
        found = self._results.popleft() if self._results else None
        self._leave()
        return found

    def _enter(self) -> None:
        spent = time.perf_counter() - self._left
        self.driver_s += spent
        self.now += spent

    def _leave(self) -> None:
        self._left = time.perf_counter()

    def _hand_out(self) -> None:
        while self._desk and self._idle:
            (put, job), (free, worker) = self._desk.popleft(), heapq.heappop(self._idle)
            at, took = max(put, free), float(self._rng.choice(self._durations))
            if self._rng.random() < STRAGGLERS:
                took *= SLOWER
            while (lived := self._rng.exponential(-WITHIN_S / np.log(1 - DEATHS))) < took:
                self.lost_s += lived
                self.deaths += 1
                at += lived + RESTART_S
            self.useful.append((at, at + took))
            self.last_handed_out = at
            heapq.heappush(self._running, (at + took + HAND_S, job.number, worker, job.plan))


def simulate(workers: int, trials: int) -> dict[str, float]:
    """Search with the real driver on ``workers`` that are not there."""
    space = bind(SearchSpace.load("encoder-joint"), MINILM, tokens=64)
    durations = np.array([float(row["seconds"]) for row in recorded()])
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        folder = Path(scratch) / "study"
        filled(folder, space, 0)
        (folder / "artefacts").mkdir()
        with opened(folder, space, "tpe", trials=trials) as study:
            cluster = Simulated(workers, durations, seed=0)
            driver.time = SimpleNamespace(perf_counter=cluster.clock)  # type: ignore[attr-defined]
            workshop: Any = SimpleNamespace(
                artefacts=folder / "artefacts",
                majority=0.5,
                space=space,
                runtime=SimpleNamespace(name="simulated"),
                prepare=lambda _: None,
                needs_training=lambda _: False,
            )
            trackers = Trackers(study.run, folder, silent)
            driver._evaluate(study, workshop, cluster, trackers, silent, None)  # type: ignore[arg-type]
            assert study.finished == trials, "none is lost"
            assert len({c.plan.plan_id for c in study.candidates()}) == trials, "none is doubled"
            asks = study.ask_seconds
    return {
        "workers": workers,
        "candidates": trials,
        "hours": cluster.now / 3600,
        "useful": cluster.useful_s(cluster.last_handed_out) / workers / cluster.last_handed_out,
        "useful to the end": cluster.useful_s() / workers / cluster.now,
        "tail": cluster.now - cluster.last_handed_out,
        "lost": cluster.lost_s / (cluster.lost_s + cluster.useful_s()),
        "deaths": cluster.deaths,
        "driver load": cluster.driver_s / cluster.now,
        "driver seconds a candidate": cluster.driver_s / trials,
        "ask, mean of the last hundred": mean(asks[-100:]),
        "memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, type=int, metavar=("WORKERS", "TRIALS"), help="one size (used within)")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(simulate(*options.one)))
        return
    sizes = "" if options.sizes == list(SIZES) else f" --sizes {' '.join(map(str, options.sizes))}"
    figures = Figures("cluster-simulated", f"python benchmarks/cluster_simulated.py{sizes}")
    rows: list[dict[str, float]] = []
    written = float(np.mean([float(row["size_bytes"]) for row in recorded()])) / 1e6
    for workers in options.sizes:
        job = [sys.executable, __file__, "--one", str(workers), str(min(MOST, max(FEWEST, EACH * workers)))]
        done = subprocess.run(job, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        words = f"{workers} workers, {row['candidates']} candidates of {MEAN_S:g} s"
        for name, until in (
            ("useful", "until the last one was handed out"),
            ("useful to the end", "until the last result"),
        ):
            figures.add(f"{words}: spent on what counted, {until}", row[name], "share of the time of all workers")
        figures.add(f"{words}: between these two", row["tail"], "seconds")
        if rows[0]["workers"] == 1:
            efficiency = row["useful"] / rows[0]["useful"]
            wanted = ("reported", True) if workers != 200 else (">= 0.9", efficiency >= 0.9)
            figures.add(f"{words}: scaling efficiency", efficiency, "of that with one worker", *wanted)
        figures.add(f"{words}: lost with workers that died", row["lost"], "share of what was computed")
        figures.add(f"{words}: the driver is busy", row["driver load"], "share of the time")
        rate = row["candidates"] / (3600 * row["hours"])
        figures.add(f"{words}: artefacts written to the shared folder", rate * written, "MB a second")
        if row["candidates"] == MOST:
            memory = row["memory, MB"]
            figures.add(f"{words}: memory of the driver", memory, "MB", "< 1074", memory < 1074)
    figures.more["sizes"] = rows
    figures.more["assumed"] = {
        "mean seconds": MEAN_S,
        "stragglers": [STRAGGLERS, SLOWER],
        "deaths": [DEATHS, WITHIN_S],
        "restart seconds": RESTART_S,
        "hand over seconds": HAND_S,
        "machine of the driver": machine.cpu(),
    }
    slowest = max(rows, key=lambda row: row["candidates"])
    figures.add(
        f"one driver keeps busy, at its speed with {slowest['candidates']:.0f} candidates",
        MEAN_S / slowest["driver seconds a candidate"],
        f"workers with candidates of {MEAN_S:g} s",
    )
    figures.write()


if __name__ == "__main__":
    main()
