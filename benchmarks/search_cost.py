"""Measure what a search costs, and write ``results/benchmarks/search-cost.json``.

``python benchmarks/search_cost.py`` on an idle machine, after ``pip install -c constraints.txt accelerate``. It
fine-tunes the demo model for three epochs (the yardstick: by the Trainer of transformers, and as we do it), searches
from an empty bank and once more with another seed from the warm one, takes the wall time apart by stage, times the
front anew in fresh processes, and compares what `plan` forecast.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from figures import ROOT, Figures

from autocompress import api, machine, pareto
from autocompress.evaluate import Workshop
from autocompress.front import Front
from autocompress.records import Candidate
from autocompress.stopwatch import WAITING
from autocompress.study import Study

CANDIDATES = 200
FIRST_POINTS = 5
HELD_OUT = 50
ANEW_PAIRS = 24
LABELS = ("empty bank", "warm bank, another seed")
STAGES = ("build", "load", "latency", "accuracy", WAITING)
BEFORE = "d421298"
"""The last commit that converted and quantised every candidate."""


def command(*arguments: str, cache: Path) -> tuple[float, str]:
    """Run a command of the package; returns its wall seconds and stdout."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "autocompress.cli", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
        check=True,
    )
    return time.perf_counter() - started, done.stdout


def finetuned(cache: Path, folder: Path, precision: str = "auto") -> float:
    """Fine-tune for three epochs into ``folder``; returns the seconds."""
    settings = ("--set", "model.finetune.epochs=3", "--set", f"recovery.precision={precision}")
    seconds, _ = command("finetune", "demo", *settings, "--out", str(folder), cache=cache)
    return seconds


def finetuned_by_trainer(figures: Figures, cache: Path) -> float:
    """Fine-tune as most people would; returns the seconds."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    job = [sys.executable, str(ROOT / "benchmarks" / "trainer_finetune.py")]
    done = subprocess.run(job, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    figures.add("three epochs of fine-tuning by the Trainer", found["seconds"], "seconds")
    figures.add("three epochs of fine-tuning by the Trainer: accuracy on search rows", found["accuracy"], "share")
    return float(found["seconds"])


def first_front(study: Study, started: float) -> float:
    """Return the seconds from the command's start until the front had its first points, all better than guessing."""
    done: list[Candidate] = []
    trials = {t.number: t.datetime_complete for t in study._study.get_trials(deepcopy=False)}
    moment = lambda c: trials[c.number].timestamp()  # type: ignore[union-attr]  # noqa: E731
    for candidate in sorted(study.candidates(), key=moment):
        if candidate.measurement is None or candidate.score.accuracy > (study.majority or 0.0):
            done.append(candidate)
        if len(Front.of(done, study.reference, study.run.objectives)) >= FIRST_POINTS:
            return float(moment(candidate) - started)
    return float("inf")


def stages(study: Study) -> dict[str, float]:
    """Return mean seconds by stage over complete candidates."""
    complete = [c.score.stages for c in study.candidates() if c.measurement is not None]
    return {name: mean(s.get(name, 0.0) for s in complete) for name in STAGES}


def spent_seconds(study: Study) -> dict[str, float]:
    """Return what workers spent by stage, stopped candidates included."""
    spent: dict[str, float] = {}
    for trial in study._study.get_trials(deepcopy=False):
        for kind in ("measurement", "stopped"):
            for stage, seconds in trial.user_attrs.get(kind, {}).get("stages", {}).items():
                spent[stage] = spent.get(stage, 0.0) + seconds
    return spent


def searched(figures: Figures, out: Path, label: str, started: float, wall: float) -> Study:
    study = api.open_study(out)
    complete = [c for c in study.candidates() if c.measurement is not None]
    timing: dict[str, Any] = json.loads((out / "timing.json").read_text(encoding="utf-8"))
    figures.more[f"timing, {label}"] = timing
    figures.more[f"stages, {label}"] = stages(study)
    figures.add(f"{label}: candidates with accuracy on all search rows", len(complete), "candidates")
    stopped = sum(c.state == "PRUNED" for c in study.candidates())
    figures.add(f"{label}: candidates stopped early", stopped, "candidates")
    figures.add(f"{label}: whole command", wall, "seconds")
    figures.add(f"{label}: whole command by complete candidate", wall / len(complete), "seconds")
    for name, seconds in stages(study).items():
        figures.add(f"{label}: stage {name}", seconds, "seconds a candidate, one worker")
    figures.add(f"{label}: training of students and their teacher's logits", _trained(timing), "seconds")
    made = sum(seconds for kind, seconds in timing["bank"].items())
    figures.add(f"{label}: bank made by the driver, training included", made, "seconds")
    confirming, reference = timing["driver"]["confirmation"], timing["driver"]["reference"]
    spent = spent_seconds(study)
    # While one is timed, which takes the machine, the others wait: that is a part of timing.
    waiting = spent.get(WAITING, 0.0) / machine.cores() / wall
    useful = sum(spent.values()) / machine.cores() + made + confirming + reference
    own = 1 - useful / wall
    figures.add(f"{label}: waiting for others to be timed", waiting, "share of wall time")
    if not made:  # what the driver makes while workers evaluate would be counted twice
        figures.add(f"{label}: engine's own cost", own, "share of wall time", "<= 0.05", own <= 0.05)
        figures.add(f"{label}: engine's own cost and waiting", own + waiting, "share of wall time")
    asks = timing["ask"]
    figures.add(f"{label}: ask, median", median(asks), "seconds", extremes=[min(asks), max(asks)])
    figures.add(f"{label}: points on the front", len(study.front()), "points")
    gain = pareto.volume(study.front().points, study.reference, study.majority or 0.0) / pareto.volume(
        [c for c in study.candidates() if c.origin == "uniform"], study.reference, study.majority or 0.0
    )
    figures.add(f"{label}: hypervolume over the uniform ladder's", gain, "times")
    return study


def _trained(timing: dict[str, Any]) -> float:
    return float(timing["bank"].get("distilled", 0.0) + timing["bank"].get("teacher-logits", 0.0))


def predictions(figures: Figures, out: Path, cache: Path) -> None:
    """Judge predictions of the last candidates from the ones before them, against careful measurements of the former.

    What a search measures of one candidate scatters by more than what is asked of the predictor.
    """
    study = api.open_study(out)
    complete = [c for c in study.candidates() if c.measurement is not None and c.origin != "recover"]
    known, held_out = complete[:-HELD_OUT], complete[-HELD_OUT:]
    predictor = Workshop(study.run, out / "artefacts").predictor
    predictor.learn(known)
    ratios = anew(out, [c.plan.plan_id for c in held_out], cache)
    latency = np.array([predictor.latency(c.plan) for c in held_out]) / ratios - 1
    size = np.array([predictor.size_bytes(c.plan) / c.score.size_bytes - 1 for c in held_out])
    single = np.array([c.score.latency_ratio for c in held_out]) / ratios - 1
    figures.more["predicted, measured in the search and anew"] = [
        [predictor.latency(c.plan), c.score.latency_ratio, ratio] for c, ratio in zip(held_out, ratios, strict=True)
    ]
    what = f"{len(held_out)} held-out candidates"
    for name, found, mean_target, worst_target in (("latency", latency, 0.03, 0.08), ("size", size, 0.01, 0.01)):
        average, worst = float(np.abs(found).mean()), float(np.abs(found).max())
        figures.add(
            f"{name} predictor, {what}: mean absolute error",
            average,
            "share",
            f"<= {mean_target}",
            average <= mean_target,
        )
        figures.add(f"{name} predictor, {what}: worst", worst, "share", f"<= {worst_target}", worst <= worst_target)
    figures.add(f"latency in the search, {what}: mean absolute difference", float(np.abs(single).mean()), "share")


def timed_anew(figures: Figures, out: Path, cache: Path) -> None:
    """Time every point of the front in a fresh process and hold it against what is stored."""
    study = api.open_study(out)
    points = study.front().points
    ratios = anew(out, [c.plan.plan_id for c in points], cache)
    stored = np.array([c.score.latency_ratio for c in points])
    within = float((np.abs(ratios / stored - 1) <= 0.05).mean())
    costs = pareto.costs(points, study.run.objectives)
    costs[:, list(study.run.objectives).index("latency")] = ratios
    kept = float(pareto.nondominated(costs).mean())
    figures.more["front timed anew"] = [[float(a), float(b)] for a, b in zip(stored, ratios, strict=True)]
    what = "front timed anew"
    low, high = (np.array([getattr(c.score, f"latency_ratio_{end}") for c in points]) for end in ("low", "high"))
    inside = float(((low <= ratios) & (ratios <= high)).mean())
    figures.add(f"{what}: within the stored 95 % interval", inside, "share of points", ">= 0.9", inside >= 0.9)
    figures.add(f"{what}: shift in the mean", float((ratios / stored).mean() - 1), "share")
    adjusted = [abs(math.log(c.score.latency_adjusted)) for c in points]
    figures.add(f"{what}: adjusted for the reference's pace by", math.expm1(mean(adjusted)), "share, in the mean")
    figures.add(f"{what}: within 5 % of the stored ratio", within, "share of points", ">= 0.95", within >= 0.95)
    figures.add(f"{what}: still not dominated", kept, "share of points", ">= 0.9", kept >= 0.9)


def anew(out: Path, plan_ids: list[str], cache: Path) -> np.ndarray:
    """Return the latency ratios of candidates, taken in a fresh process over many moments."""
    job = [sys.executable, __file__, "--time", str(out), *plan_ids]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(job, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, check=True, env=environment)
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def time_anew(out: Path, plan_ids: list[str]) -> None:
    """Print the ratios of candidates; an artefact that the search did not keep is built again."""
    study = api.open_study(out)
    candidates = {c.plan.plan_id: c for c in study.candidates() if c.measurement is not None}
    points = [candidates[plan_id] for plan_id in plan_ids]
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        workshop = Workshop(study.run, Path(scratch))
        shutil.copytree(out / "artefacts" / "reference", workshop.reference_folder)
        for candidate in points:
            kept = out / "artefacts" / candidate.plan.plan_id
            if kept.is_dir():
                shutil.copytree(kept, Path(scratch) / kept.name)
            else:
                workshop.build(candidate.plan, Path(scratch) / kept.name)
        found = workshop.confirmed([(c.plan, c.score) for c in points], pairs=ANEW_PAIRS)
    print(json.dumps([study.calmed(measured).latency_ratio for measured in found]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", nargs="+", metavar="RESULTS PLAN ...", help="time candidates (used within)")
    parser.add_argument("--keep", type=Path, help="leave the bank, the model and the results folders here")
    parser.add_argument("--trials", type=int, default=int(1.2 * CANDIDATES), help="candidates, stopped ones included")
    parser.add_argument("--name", default="search-cost", help="of the file, for a machine of another kind")
    options = parser.parse_args()
    if options.time:
        time_anew(Path(options.time[0]), options.time[1:])
        return
    named = "" if options.name == parser.get_default("name") else f" --name {options.name}"
    figures = Figures(options.name, f"python benchmarks/search_cost.py{named}")
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        place = options.keep or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        cache, model = place / "cache", place / "model"
        usual = finetuned_by_trainer(figures, cache)
        yardstick = finetuned(cache, model)
        figures.add("three epochs of fine-tuning", yardstick, "seconds")
        # Ours uses bfloat16 where the CPU multiplies it.
        single = finetuned(cache, place / "model-float32", "float32") if machine.has_bfloat16() else yardstick
        figures.add("three epochs of fine-tuning in float32", single, "seconds")
        shutil.rmtree(cache)
        settings = ["--model", str(model), "--set", f"search.trials={options.trials}"]
        _, said = command("plan", "demo", *settings, "--json", cache=cache)
        forecast = json.loads(said)["forecast"]
        figures.more["forecast"] = forecast
        try:
            for seed, label in enumerate(LABELS):
                out = place / f"search-{seed}"
                started = time.time()
                wall, _ = command(
                    "search", "demo", "--out", str(out), *settings, "--set", f"search.seed={seed}", cache=cache
                )
                study = searched(figures, out, label, started, wall)
                if seed == 0:
                    first = first_front(study, started)
                    figures.add(f"first front of {FIRST_POINTS} points", first, "seconds", "<= 60", first <= 60)
                    error = forecast["total_seconds"] / wall - 1
                    figures.add("forecast of the whole search, empty bank", error, "share", "reported")
            timed_anew(figures, out, cache)
            os.environ["XDG_CACHE_HOME"] = str(cache)
            predictions(figures, out, cache)
            before(figures, model, cache, Path(scratch))
            conclude(figures, yardstick, single, usual)
        finally:
            figures.write()


def before(figures: Figures, model: Path, cache: Path, scratch: Path) -> None:
    """Time the stages of a dense W8A8 candidate at the last commit before stitching."""
    old = scratch / "before"
    subprocess.run(["git", "worktree", "add", "--detach", str(old), BEFORE], cwd=ROOT, check=True, capture_output=True)
    try:
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(old)}
        job = [sys.executable, str(ROOT / "benchmarks" / "stages_before.py"), str(model)]
        done = subprocess.run(job, cwd=old, env=environment, capture_output=True, text=True, check=True)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=True)
    for stage, seconds in json.loads(done.stdout).items():
        figures.add(f"before ({BEFORE}): stage {stage}", seconds, "seconds a dense W8A8 candidate, one worker")


def conclude(figures: Figures, yardstick: float, single: float, usual: float) -> None:
    """Say what 200 candidates cost, over a fine-tuning as most people would do it and over the fastest that we know."""
    found = {figure.name: figure.value for figure in figures.figures}
    for label in LABELS:
        count = found[f"{label}: candidates with accuracy on all search rows"]
        for words, seconds in (
            ("", found[f"{label}: whole command"]),
            (
                " without training students",
                found[f"{label}: whole command"] - found[f"{label}: training of students and their teacher's logits"],
            ),
        ):
            share = seconds / yardstick * CANDIDATES / count
            name = f"{label}: {CANDIDATES} candidates{words}"
            figures.add(name, share, "of the fine-tuning", "<= 1.0", share <= 1.0)
            figures.add(f"{name}, over float32", share * yardstick / single, "of the fine-tuning in float32")
            share *= yardstick / usual
            figures.add(f"{name}, over the Trainer", share, "of the fine-tuning by the Trainer", "<= 1.0", share <= 1.0)
    cold, warm = (found[f"{label}: whole command by complete candidate"] for label in LABELS)
    figures.add("warm over empty bank, by candidate", warm / cold, "times", "<= 0.7", warm / cold <= 0.7)


if __name__ == "__main__":
    main()
