"""Kill workers and drivers of one search at random: ``results/benchmarks/cluster-kills.json``.

``python benchmarks/cluster_kills.py`` searches on the demo in a small space, with two workers. Once a candidate was
told, it waits for a random time and kills a worker or the driver, in random order, with SIGKILL; after a driver's death
the same command goes on. What the search printed before each death is held against what the study holds in the end.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from figures import ROOT, Figures
from processes import busy_workers

from autocompress import api
from autocompress.study import Study

WORKERS = 2
LONGEST_S = 4.0
"""Longest time from a told candidate to a kill."""
SETTINGS = ("data.max_train_rows=400", "model.finetune.epochs=1", "search.latency_pairs=2", "search.stop_early=false")
TOLD = re.compile(r"\] trial (\d+) ")
PATIENCE_S = 300.0
"""Longest time from one told candidate to the next."""
REST_S = 1800.0
"""Longest time for what is left after the last kill."""


class Search:
    """A search in a process of its own, whose lines are read as they come."""

    def __init__(self, out: Path, trials: int, cache: Path) -> None:
        settings = (*SETTINGS, f"search.trials={trials}", f"search.workers={WORKERS}")
        sets = [part for setting in settings for part in ("--set", setting)]
        self.told: list[int] = []
        arguments = ["search", "demo", "--space", "encoder-small", "--out", str(out), *sets]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "autocompress.cli", *arguments],
            cwd=ROOT,
            env={**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if match := TOLD.search(line):
                self.told.append(int(match[1]))

    def wait_for_one_more(self) -> bool:
        """Return whether another candidate was told before the search ended."""
        known, until = len(self.told), time.monotonic() + PATIENCE_S
        while len(self.told) == known and self.process.poll() is None:
            assert time.monotonic() < until, "no candidate came"
            time.sleep(0.01)
        return len(self.told) > known

    def end(self) -> int:
        code = self.process.wait(REST_S)
        self._reader.join()
        return code


def running(out: Path) -> int:
    """Return how many trials the study has that nobody finished."""
    return sum(not trial.state.is_finished() for trial in api.open_study(out)._study.get_trials(deepcopy=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25, help="of either kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures = Figures("cluster-kills", "python benchmarks/cluster_kills.py")
    rng = random.Random(options.seed)
    planned = ["worker", "driver"] * options.kills
    rng.shuffle(planned)
    trials, done, told, left_running = 6 * options.kills, Counter[str](), list[int](), list[int]()
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        out, cache = Path(scratch) / "out", Path(scratch) / "cache"
        search = Search(out, trials, cache)
        for victim in planned:
            if not search.wait_for_one_more():
                break
            time.sleep(rng.uniform(0.0, LONGEST_S))
            if victim == "worker":
                busy = busy_workers(search.process.pid)
                if not busy or search.process.poll() is not None:
                    continue
                os.kill(rng.choice(busy), signal.SIGKILL)
                done[victim] += 1
                continue
            if search.process.poll() is not None:
                break
            os.kill(search.process.pid, signal.SIGKILL)
            search.end()
            done[victim] += 1
            told += search.told
            left_running.append(running(out))
            search = Search(out, trials, cache)
        code = search.end()
        told += search.told
        study: Study = api.open_study(out)
        candidates = {c.number: c for c in study.candidates()}
        plans = Counter(c.plan.plan_id for c in candidates.values())
        for victim in ("worker", "driver"):
            figures.add(
                f"kills of a {victim}", done[victim], "kills", f"{options.kills}", done[victim] >= options.kills
            )
        figures.add("the last command's exit code", code, "exit code", "0", code == 0)
        lost = len(set(told) - candidates.keys())
        figures.add("finished candidates lost", lost, "candidates", "0", lost == 0)
        repeated = sum(count - 1 for count in plans.values()) + len(told) - len(set(told))
        figures.add("finished candidates repeated", repeated, "candidates", "0", repeated == 0)
        # One for each worker, and the one that lay at the desk, at which nobody had begun.
        most = max(left_running, default=0)
        figures.add(
            "trials begun and not finished when a driver died, most",
            most,
            "trials",
            f"<= {WORKERS} workers + 1 that waited",
            most <= WORKERS + 1,
        )
        total = len(candidates)
        figures.add("candidates in the end", total, "candidates", f"{trials}", total == trials)
        states = Counter(c.state for c in candidates.values())
        figures.add("candidates that failed", states["FAIL"], "candidates", "0", states["FAIL"] == 0)
        left = running(out)
        figures.add("trials that are RUNNING in the end", left, "trials", "0", left == 0)
        figures.more["trials left running by each driver"] = left_running
    figures.write()


if __name__ == "__main__":
    main()
