"""Measure what the search engine itself costs, and write ``results/benchmarks/search-engine-cost.json``.

``python benchmarks/engine_cost.py``. No model is run: scores are a formula of the plan. The space is encoder-joint,
bound to the sizes of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
from figures import Figures
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import TrialState

from autocompress import machine, pareto
from autocompress.anatomy import BlockShape, ModelShape
from autocompress.binding import BoundSpace, bind
from autocompress.config import RunConfig
from autocompress.decisions import Student
from autocompress.identity import identity_of
from autocompress.plan import CompressionPlan
from autocompress.predict import Predictor
from autocompress.products import Sizes
from autocompress.records import OBJECTIVES, Measurement
from autocompress.samplers import SamplerName
from autocompress.scoring import wilson
from autocompress.sensitivity import Sensitivity
from autocompress.space import SearchSpace, Value
from autocompress.study import Study

MINILM = ModelShape(hidden=384, blocks=(BlockShape(heads=12, head_size=32, neurons=1536),) * 6, vocabulary=30_522)
TABLES = Sizes(tables=((30_522, 384), (512, 384), (2, 384)), head=((384, 384), (2, 384)))
ROWS = 1000
ASKED_AT, ASKS = 2_000, 20
OPENED_AT = 10_000
REPEATS = 20


def score_of(plan: CompressionPlan) -> Measurement:
    """Return a made-up score: more compression is smaller, faster and worse, each plan a little differently."""
    noise = [byte / 255 for byte in hashlib.sha256(plan.plan_id.encode()).digest()[:3]]
    steps = sum(getattr(decision, "weight_bits", 8) < 16 for _, decision in plan)
    accuracy = 0.9 - 0.3 * (steps / 40) ** 2 - 0.05 * noise[0]
    low, high = wilson(round(accuracy * ROWS), ROWS)
    ratio = 1 - 0.8 * steps / 40 + 0.1 * noise[1]
    return Measurement(
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        loss=1 - accuracy,
        rows=ROWS,
        size_bytes=int(1e6 * (90 - 70 * steps / 40 + 10 * noise[2])),
        latency_ms=16 * ratio,
        latency_p90_ms=17 * ratio,
        reference_ms=16.0,
        latency_ratio=ratio,
        latency_ratio_low=0.98 * ratio,
        latency_ratio_high=1.02 * ratio,
        predictions="0" * 64,
        divergence=(1 - accuracy) / 2,
        stages={"build": 2.0, "load": 0.5, "latency": 2.0, "accuracy": 2.0},
        seconds=6.5,
        fingerprint=machine.fingerprint(),
    )


def run_of(sampler: SamplerName, trials: int = 100_000) -> RunConfig:
    return RunConfig.from_mapping({"search": {"trials": trials, "sampler": sampler, "seeds": False}})


def sensitivity_of(student: Student | None) -> Sensitivity:
    """Return made-up sensitivities: less kept is worse, at later sites more so."""
    shape = MINILM if student is None else MINILM.of_student(student)
    curves: dict[tuple[str, str], tuple[tuple[float, float], ...]] = {}
    for number, site in enumerate(shape.sites(), start=1):
        curves[site, "bits"] = ((4.0, 0.02 * number), (8.0, 0.001 * number), (16.0, 0.0))
        for axis in ("keep", "rank"):
            curves[site, axis] = ((0.25, 0.03 * number), (0.5, 0.015 * number), (0.75, 0.005 * number))
    return Sensitivity(curves)


@contextmanager
def opened(folder: Path, space: BoundSpace, sampler: SamplerName, trials: int = 100_000) -> Iterator[Study]:
    """Open a study for writing, as a search does: with a predictor that screens proposals."""
    run = run_of(sampler, trials)
    identity = identity_of(run, model="benchmark", data="benchmark", space=space)
    guide, tokens = run.search.guide, run.target.tokens
    predictor = Predictor(MINILM, TABLES, lambda p: p.outer * p.inner * p.bits / 8, sensitivity_of, guide, tokens)
    study = Study(folder, run, identity=identity, space=space, writable=True, predictor=predictor)
    try:
        yield study
    finally:
        study.close()


class _Buffer(BaseJournalBackend):
    """A journal in memory: as a file, each of a hundred thousand records would wait for the disk."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        return self.records[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.records += logs


def filled(folder: Path, space: BoundSpace, count: int) -> None:
    """Write a study of ``count`` complete trials, record by record as a search by TPE leaves it."""
    folder.mkdir()
    environment = {"schema": 1, "reference": asdict(score_of(CompressionPlan(()))), "machine": machine.fingerprint()}
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    with opened(folder, space, "tpe"):
        pass
    journal = folder / "study.journal"
    buffer = _Buffer([json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()])
    storage = JournalStorage(buffer)
    study = storage.get_all_studies()[0]._study_id
    rng = random.Random(0)
    known: set[str] = set()
    while len(known) < count:
        params: dict[str, Value] = {}
        sets: dict[str, Sequence[Value]] = {}

        def choose(name: str, choices: Sequence[Value], chosen: Any = params, seen: Any = sets) -> Value:
            value = rng.choice(choices)
            chosen[name], seen[name] = value, choices
            return value

        plan = space.decode(choose)
        if plan.plan_id in known:
            continue
        known.add(plan.plan_id)
        measured = score_of(plan)
        trial = storage.create_new_trial(study)
        storage.set_trial_system_attr(trial, "tpe:relative_params:0", json.dumps(params))
        for name, choices in sets.items():
            distribution = CategoricalDistribution(choices)
            storage.set_trial_param(trial, name, distribution.to_internal_repr(params[name]), distribution)
        storage.set_trial_user_attr(trial, "plan", json.loads(plan.to_json()))
        storage.set_trial_user_attr(trial, "measurement", json.loads(measured.to_json()))
        values = [float(getattr(measured, OBJECTIVES[n][0])) for n in run_of("tpe").objectives]
        storage.set_trial_state_values(trial, TrialState.COMPLETE, values)
    lines = (json.dumps(record, separators=(",", ":")) for record in buffer.records)
    journal.write_text("\n".join(lines) + "\n", encoding="utf-8")


def seconds_of(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def below(
    figures: Figures, name: str, value: float, unit: str, limit: float, spread: list[float] | None = None
) -> None:
    figures.add(name, value, unit, f"< {limit:g}", value < limit, extremes=spread)


def asking(figures: Figures, scratch: Path, space: BoundSpace) -> None:
    for sampler in get_args(SamplerName):
        folder = scratch / f"ask-{sampler}"
        filled(folder, space, ASKED_AT)
        times = []
        with opened(folder, space, sampler) as study:
            for _ in range(ASKS):
                started = time.perf_counter()
                asked = study.ask()
                times.append(time.perf_counter() - started)
                assert asked is not None, "the space is not spent"
                study.tell(*asked, score_of(asked[1]))
        words = f"ask, {sampler}, {ASKED_AT} trials"
        below(figures, f"{words}: median", median(times), "seconds", 0.5, [min(times), max(times)])
        below(figures, f"{words}: maximum", max(times), "seconds", 0.5)


def opening(figures: Figures, scratch: Path, space: BoundSpace) -> None:
    folder = scratch / "open"
    filled(folder, space, OPENED_AT)

    def write() -> None:
        with opened(folder, space, "tpe"):
            pass

    for words, action in (("reading", lambda: Study(folder, run_of("tpe"))), ("writing", write)):
        below(figures, f"open for {words}, {OPENED_AT} trials", seconds_of(action), "seconds", 5)


def fronts(figures: Figures) -> None:
    """Time front and hypervolume of points whose front is a usual one, and of points that are all on the front."""
    usual = np.random.default_rng(0).random((OPENED_AT, 3))
    sphere = usual / np.linalg.norm(usual, axis=1, keepdims=True)

    def both(points: np.ndarray) -> None:
        pareto.hypervolume(points[pareto.nondominated(points)], (1.1, 1.1, 1.1))

    for words, points in (("random", usual), ("all on the front", 1 - sphere)):
        both(points[:10])  # loads the library
        times = [1e3 * seconds_of(partial(both, points)) for _ in range(REPEATS)]
        name = f"front and hypervolume, {OPENED_AT} points, {words} ({int(pareto.nondominated(points).sum())})"
        below(figures, name, median(times), "ms", 50, [min(times), max(times)])


def main() -> None:
    figures = Figures("search-engine-cost", "python benchmarks/engine_cost.py")
    space = bind(SearchSpace.load("encoder-joint"), MINILM, tokens=64)
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as folder:
        fronts(figures)
        opening(figures, Path(folder), space)
        asking(figures, Path(folder), space)
    figures.write()


if __name__ == "__main__":
    main()
