"""Measure the main job as a user would run it, and write ``results/benchmarks/search-demo.json``.

Run it in a fresh clone and a fresh virtual environment, after the installation, with nothing else running:
``python benchmarks/search_demo.py``. It starts from an empty bank, runs the commands of README in subprocesses, kills
a search once in the middle, and computes every figure from what they wrote. ``--eight-classes FILE.csv`` adds the run
on another task (``benchmarks/eight_classes.py`` makes the file).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gallery
import pandas as pd
from figures import ROOT, Figures

from autocompress.records import Measurement
from autocompress.scoring import wilson


class Bench:
    """Runs commands of the package with an own bank and collects figures."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"}
        self.figures = Figures("search-demo", "python benchmarks/search_demo.py")

    def add(self, name: str, value: float, unit: str, target: str, holds: bool, interval: Any = None) -> None:
        self.figures.add(name, value, unit, target, holds, interval)

    def run(self, *arguments: str, log: str) -> tuple[float, str, list[float]]:
        """Return seconds, stdout, and the moments at which progress lines came."""
        command = [sys.executable, "-m", "autocompress.cli", *arguments]
        started, moments = time.perf_counter(), []
        with (self.scratch / f"{log}.log").open("w") as kept:
            process = subprocess.Popen(
                command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
            )
            assert process.stderr is not None and process.stdout is not None
            for line in process.stderr:
                moments.append(time.perf_counter() - started)
                kept.write(line)
            output = process.stdout.read()
            code = process.wait()
            kept.write(output)
        seconds = time.perf_counter() - started
        if code != 0:
            raise SystemExit(f"{' '.join(arguments)} ended with {code}; see {self.scratch / (log + '.log')}")
        return seconds, output, moments


def main_job(bench: Bench, demo: Path, keep: Path | None) -> None:
    seconds, _, moments = bench.run("search", "demo", "--out", str(demo), log="search")
    if keep is not None:
        gallery.keep(demo, keep)
    bench.add("main job, from an empty bank to report.html", seconds / 60, "minutes", "<= 15", seconds <= 900)
    gaps = [b - a for a, b in zip([0.0, *moments], [*moments, seconds], strict=True)]
    bench.add("longest time without a line of progress", max(gaps), "seconds", "<= 60", max(gaps) <= 60)
    study, front = pd.read_csv(demo / "study.csv"), pd.read_csv(demo / "pareto.csv")
    environment = json.loads((demo / "environment.json").read_text())
    reference = Measurement.from_json(json.dumps(environment["reference"]))
    done = study[study.state == "COMPLETE"]
    bench.add("evaluated candidates", len(done), "candidates", ">= 40", len(done) >= 40)
    bench.add("rows of the search split", reference.rows, "rows", ">= 1000", reference.rows >= 1000)
    slowest, middle = done.seconds.max(), done.seconds.median()
    bench.add("slowest candidate", slowest, "seconds", "<= 10", slowest <= 10)
    bench.add("median candidate", middle, "seconds", "<= 10", middle <= 10)
    bench.add("points on the front", len(front), "points", ">= 8", len(front) >= 8)
    used = {
        "pruning": decided(done, r"\.(?:heads|neurons)\.", 1.0) | decided(done, "drop_blocks", 0),
        "bits": decided(done, r"\.bits\.", 16),
        "rank": decided(done, r"\.rank\.", "full"),
        "vocabulary": decided(done, r"\.vocabulary\.", 1.0),
        "student": decided(done, "student", "full"),
    }
    for axis, mask in used.items():
        bench.add(f"candidates with {axis}", int(mask.sum()), "candidates", ">= 1", mask.any())
    joint = sum(mask.astype(int) for mask in used.values()) >= 2
    bench.add("candidates with two or more axes", int(joint.sum()), "candidates", ">= 1", joint.any())
    near = front[front.accuracy >= reference.accuracy - 0.01 - 1e-9]
    interval = list(wilson(round(reference.accuracy * reference.rows), reference.rows))
    bench.add("reference accuracy, search split", reference.accuracy, "share", "reported", True, interval)
    fastest = near.loc[near.latency_ratio.idxmin()]
    bench.add(
        "fastest point of the front within 1 point of accuracy",
        1 / fastest.latency_ratio,
        "times faster than fp32 in the same runtime",
        ">= 3",
        1 / fastest.latency_ratio >= 3,
        [1 / fastest.latency_ratio_high, 1 / fastest.latency_ratio_low],
    )
    lost(bench, "fastest", reference.accuracy - fastest.accuracy)
    smallest = near.loc[near.size_bytes.idxmin()]
    times = reference.size_bytes / smallest.size_bytes
    bench.add("smallest point within 1 point of accuracy", times, "times smaller than fp32", ">= 5", times >= 5)
    lost(bench, "smallest", reference.accuracy - smallest.accuracy)


def lost(bench: Bench, which: str, drop: float) -> None:
    bench.add(
        f"accuracy that the {which} point lost on the search split", drop, "share", "<= 0.01", drop <= 0.01 + 1e-9
    )


def decided(study: pd.DataFrame, parameter: str, nothing: object) -> pd.Series:
    """Return which rows decide anything but ``nothing`` in a parameter whose name matches."""
    columns = study.filter(regex=rf"^param\..*{parameter}|^param\.{parameter}$")
    meant = columns.map(lambda value: value if isinstance(value, str) or pd.isna(value) else float(value))
    idle = meant.eq(nothing if isinstance(nothing, str) else float(nothing))
    return (~idle & columns.notna()).any(axis=1)


def again(bench: Bench, demo: Path) -> None:
    front, before = (demo / "pareto.csv").read_bytes(), len(pd.read_csv(demo / "study.csv"))
    seconds, _, _ = bench.run("search", "demo", "--out", str(demo), log="again")
    same = (demo / "pareto.csv").read_bytes() == front
    bench.add("the same command again", seconds, "seconds", "<= 20, same front", seconds <= 20 and same)
    added = len(pd.read_csv(demo / "study.csv")) - before
    bench.add("candidates evaluated again", added, "candidates", "0", added == 0)


def exports(bench: Bench, demo: Path) -> None:
    for name in ("openvino", "onnx"):
        out = bench.scratch / f"out-{name}"
        arguments = ("export", str(demo), "--pick", "knee", "--format", name, "-o", str(out), "--json")
        _, output, _ = bench.run(*arguments, log=f"export-{name}")
        shipped = json.loads(output)[name]
        identical = shipped["reloaded_predictions"] == "identical"
        bench.add(f"{name}: reloaded predictions identical to its score", identical, "1 = yes", "1", identical)
        agreement = shipped["agreement_with_scored_candidate"]
        bench.add(f"{name}: predictions equal to the study's candidate", agreement, "share of rows", "reported", True)
        value, low, high = shipped["test_accuracy"]
        bench.add(f"{name}: accuracy, held-out test split", value, "share", "reported", True, [low, high])
        _, output, _ = bench.run("measure", str(out), "--json", log=f"measure-{name}")
        found = json.loads(output)
        difference = found["difference"]
        if "latency_ratio_in_search" in found:  # this runtime is the one that was searched for
            chosen_by = found["latency_ratio"] / found["latency_ratio_in_search"] - 1
            bench.add(f"{name}: measured ratio against the one in the search", chosen_by, "share", "reported", True)
        bench.add(
            f"{name}: measured ratio against the stored one",
            difference,
            "share",
            "within 0.05",
            abs(difference) <= 0.05,
        )


def extended(bench: Bench, demo: Path) -> None:
    before = len(pd.read_csv(demo / "study.csv"))
    bench.run("search", "demo", "--out", str(demo), "--set", "search.trials=120", log="more")
    added = len(pd.read_csv(demo / "study.csv")) - before
    bench.add("candidates added by search.trials=120", added, "candidates", "20", added == 20)


def killed(bench: Bench, folder: Path) -> None:
    """Kill a search in the middle (its own students and teacher come from the bank), then run the same command."""
    arguments = ("search", "demo", "--out", str(folder), "--set", "search.trials=16")
    command = [sys.executable, "-m", "autocompress.cli", *arguments]
    process = subprocess.Popen(
        command, env=bench.environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "[  5/" in line or "[ 5/" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = pd.read_csv(folder / "study.csv")
    bench.run(*arguments, log="resumed")
    after = pd.read_csv(folder / "study.csv")
    known, still = ({*zip(f.number, f.plan_id, strict=True)} for f in (finished, after))
    lost = len(known - still)
    bench.add("kill -9: finished candidates lost", lost, "candidates", "0", lost == 0)
    from optuna.trial import TrialState

    from autocompress.api import open_study

    running = [t for t in open_study(folder)._study.get_trials() if t.state == TrialState.RUNNING]
    bench.add("kill -9: trials left RUNNING", len(running), "trials", "0", not running)
    exact = len(after) == 16 and after.plan_id.is_unique
    bench.add("kill -9: candidates in the end, none twice", len(after), "candidates", "16", exact)


def eight_classes(bench: Bench, data: Path, model: str) -> None:
    out = bench.scratch / "eight"
    seconds, _, _ = bench.run("search", "demo", "--out", str(out), "--model", model, "--data", str(data), log="eight")
    study = pd.read_csv(out / "study.csv")
    done = int((study.state == "COMPLETE").sum())
    bench.add("eight classes: evaluated candidates", done, "candidates", ">= 40", done >= 40)
    bench.add("eight classes: whole run", seconds / 60, "minutes", "reported", True)
    reference = json.loads((out / "environment.json").read_text())["reference"]["accuracy"]
    bench.add("eight classes: reference accuracy, search split", reference, "share", "reported", True)
    front = pd.read_csv(out / "pareto.csv")
    near = front[front.accuracy >= reference - 0.01 - 1e-9]
    bench.add("eight classes: fastest within 1 point", 1 / near.latency_ratio.min(), "times", "reported", True)


def installs(bench: Bench) -> None:
    """Time README's two installations, each in a virtual environment of its own."""
    for extra in ("demo", "dev"):
        place = bench.scratch / f"venv-{extra}"
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        started = time.perf_counter()
        command = [str(place / "bin" / "pip"), "install", "-q", "-c", "constraints.txt", "-e", f".[{extra}]"]
        subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        bench.add(f"installation of .[{extra}], package cache warm", seconds, "seconds", "reported", True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="copy what the main job tells here")
    parser.add_argument("--eight-classes", type=Path, help="CSV of another task")
    only = ("main-job", "exports", "installs", "eight-classes")
    parser.add_argument("--only", choices=only, help="measure these figures anew")
    parser.add_argument(
        "--results", type=Path, help="results folder of the main job, for exports that it has made, else for it to make"
    )
    options = parser.parse_args()
    if options.only in ("main-job", "exports") and options.results is None:
        parser.error(f"--only {options.only} goes with --results")
    if options.only == "main-job" and options.results.exists():
        parser.error(f"{options.results} exists: the main job begins with nothing")
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as folder:
        bench = Bench(Path(folder))
        if options.only is not None:
            bench.figures.read()
        try:
            if options.only is None:
                everything(bench, options.keep)
            if options.only == "main-job":
                main_job(bench, options.results.resolve(), options.keep)
            if options.only == "exports":
                exports(bench, options.results.resolve())
            if options.only in (None, "installs"):
                installs(bench)
            if options.eight_classes is not None:
                from autocompress.origins import locate

                eight_classes(bench, options.eight_classes.resolve(), str(locate("demo/minilm")))
        finally:
            bench.figures.write()


def everything(bench: Bench, keep: Path | None) -> None:
    demo = bench.scratch / "demo"
    helped, _, _ = bench.run("--help", log="help")
    bench.add("--help", helped, "seconds", "<= 0.5", helped <= 0.5)
    main_job(bench, demo, keep)
    again(bench, demo)
    exports(bench, demo)
    killed(bench, bench.scratch / "killed")
    extended(bench, demo)


if __name__ == "__main__":
    main()
