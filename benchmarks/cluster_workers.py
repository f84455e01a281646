"""Keep 200 workers busy whose candidates take a second: ``results/benchmarks/cluster-workers.json``.

``python benchmarks/cluster_workers.py`` on an idle machine. Driver, study, desk and Ray are those of a search, on this
machine; workers are coroutines in a few of Ray's actors that sleep for a second where others evaluate, and score by a
formula of the plan. A second is little: the figures tell what the driver and the way to it cost at most.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import resource
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import numpy as np
from engine_cost import MINILM, filled, opened, score_of
from figures import Figures

from autocompress.binding import bind
from autocompress.distribute import Workers
from autocompress.execute import execute
from autocompress.plan import CompressionPlan
from autocompress.samplers import SamplerName
from autocompress.space import SearchSpace
from autocompress.study import Study

WORKERS, ACTORS = 200, 8
SECONDS = 1.0
SOAK_S, SAMPLE_S = 3600.0, 60.0
FLAT = 0.1
"""Part of the driver's memory that the second half of the soak may add."""
TRIALS = {"random": 10_000, "tpe": 2_000}


class Logical(Workers):
    """Workers that sleep, in place of workers that evaluate."""

    ENTRY = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import cluster_workers as c; c.ray_main()"

    def __init__(self, study: Study, folder: Path, count: int = WORKERS) -> None:
        super().__init__(study.run, folder)
        self.count = count
        # Ray begins as many processes as there are cores.
        self._crew = dataclasses.replace(self._crew, cores=ACTORS, workers=count)


class Sleepers:
    """Some of the workers, in one process."""

    def __init__(self, desk: Any, names: list[str]) -> None:
        self._desk, self._names = desk, names

    async def work(self) -> None:
        await asyncio.gather(*map(self._one, self._names))

    async def _one(self, name: str) -> None:
        result = None
        while (job := await self._desk.exchange.remote(name, result)) is not None:
            await asyncio.sleep(SECONDS)
            measured = dataclasses.asdict(score_of(CompressionPlan.from_json(job.plan)))
            result = job.number, {"measurement": measured}


def ray_main() -> None:
    """Serve the driver as `autocompress.crew` does."""
    import ray

    from autocompress import crew

    class Site(crew._Site):
        def _places(self, takes: dict[str, float], *, who: str = "a worker") -> int:
            return WORKERS

        def _work(self, count: int) -> None:
            names = [[f"w{n}" for n in range(part, count, ACTORS)] for part in range(ACTORS)]
            actor = ray.remote(num_cpus=0)(Sleepers)
            ray.get([actor.remote(self._desk, some).work.remote() for some in names])  # type: ignore[attr-defined]

    Site(Connection(int(sys.argv[1]))).live()


def searched(figures: Figures, sampler: SamplerName, trials: int) -> None:
    space = bind(SearchSpace.load("encoder-joint"), MINILM, tokens=64)
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        folder = Path(scratch) / "study"
        filled(folder, space, 0)
        told: list[float] = []
        with (
            opened(folder, space, sampler, trials=trials) as study,
            Logical(study, folder / "artefacts") as crew,
        ):
            execute(
                study,
                workers=crew,
                prepare=lambda _: None,
                alone=lambda _: False,
                told=lambda _: told.append(time.perf_counter()),
            )
            candidates = study.candidates()
            asks = study.ask_seconds
        states = Counter(c.state for c in candidates)
    words = f"{WORKERS} workers, {trials} candidates of {SECONDS:g} s, {sampler}"
    # From the first result on: Ray's start is another matter.
    took, ideal = told[-1] - told[0], SECONDS * trials / WORKERS
    lost = trials - states["COMPLETE"]
    doubled = len(candidates) - len({c.plan.plan_id for c in candidates})
    figures.add(f"{words}: lost", lost, "candidates", "0", lost == 0)
    figures.add(f"{words}: doubled", doubled, "candidates", "0", doubled == 0)
    figures.add(f"{words}: time over the ideal", took / ideal, "times")
    figures.add(f"{words}: candidates a second", trials / took, "candidates")
    figures.add(f"{words}: ask, median", float(np.median(asks)), "seconds", extremes=[min(asks), max(asks)])


def soaked() -> None:
    """Search for an hour with a worker, and look at the driver's memory each minute."""
    figures = Figures("cluster-soak", "python benchmarks/cluster_workers.py --soak")
    space = bind(SearchSpace.load("encoder-joint"), MINILM, tokens=64)
    memory: list[float] = []
    began = time.monotonic()

    def told(_: object) -> None:
        if time.monotonic() - began >= SAMPLE_S * (len(memory) + 1):
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            memory.append(pages * resource.getpagesize() / 1e6)

    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        folder = Path(scratch) / "study"
        filled(folder, space, 0)
        with opened(folder, space, "tpe", trials=int(SOAK_S / SECONDS)) as study:
            with Logical(study, folder / "artefacts", count=1) as crew:
                execute(study, workers=crew, prepare=lambda _: None, alone=lambda _: False, told=told)
            candidates = study.candidates()
    minutes, half = len(memory), len(memory) // 2
    added = memory[-1] / memory[half] - 1
    figures.add("length of the soak", minutes, "minutes", "60", minutes >= SOAK_S / SAMPLE_S)
    figures.add("candidates", len(candidates), "candidates")
    figures.add("memory of the driver in the end", memory[-1], "MB", "< 1074", memory[-1] < 1074)
    figures.add("added in the second half", added, "share of the memory", f"<= {FLAT}", added <= FLAT)
    figures.more["MB by minute"] = memory
    figures.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", action="store_true", help="an hour with one worker, for the driver's memory")
    parser.add_argument("--samplers", nargs="+", choices=get_args(SamplerName), default=list(TRIALS))
    options = parser.parse_args()
    if options.soak:
        soaked()
        return
    figures = Figures("cluster-workers", "python benchmarks/cluster_workers.py")
    for sampler in options.samplers:
        searched(figures, sampler, TRIALS[sampler])
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        what = f"memory of the driver after {TRIALS[sampler]} candidates, {sampler}"
        figures.add(what, memory, "MB", "< 1074", memory < 1074)
    figures.write()


if __name__ == "__main__":
    main()
