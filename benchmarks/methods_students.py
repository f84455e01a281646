"""Hold students of other architectures against plain ones: ``results/benchmarks/methods-students.json``.

``python benchmarks/methods_students.py`` distils students of the fine-tuned demo model, all for as many epochs: plain
ones of several sizes, and ones with a cheaper activation, a narrower hidden size or shared blocks. Each of the latter
is compared, at 8 bits through the artefact, with the plain one whose latency is nearest and with the one whose size is;
for size, plain ones may also store their tables in 4 bits, as no other comes near to a narrower student. Accuracies are
of the held-out test rows, with a paired bootstrap interval. It takes about an hour on two cores;
``--rows 200 --epochs 0.2`` tries it in minutes, and then writes nothing.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from figures import Figures
from held_out import DATA, hits, interval, logits_of

from autocompress.anatomy import ModelShape
from autocompress.binding import quantize_decision, students_of
from autocompress.config import RunConfig
from autocompress.decisions import Student
from autocompress.evaluate import Workshop
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.space import SearchSpace

PAIRS = 20
"""Blocks of runs that each latency is taken in."""
PLAIN = {
    "6 blocks, 1/2": {"blocks": 1.0, "heads": 0.5, "neurons": 0.5},
    "6 blocks, 1/4": {"blocks": 1.0, "heads": 0.25, "neurons": 0.25},
    "3 blocks": {"blocks": 0.5},
    "3 blocks, 1/2": {"blocks": 0.5, "heads": 0.5, "neurons": 0.5},
    "3 blocks, 1/4": {"blocks": 0.5, "heads": 0.25, "neurons": 0.25},
}
OTHERS = {
    "relu": {"blocks": 1.0, "heads": 0.5, "neurons": 0.5, "activation": "relu"},
    "half as wide": {"blocks": 1.0, "heads": 0.5, "neurons": 0.5, "hidden": 0.5},
    "half as wide with relu": {"blocks": 1.0, "heads": 0.25, "neurons": 0.25, "hidden": 0.5, "activation": "relu"},
    "3 blocks run twice": {"blocks": 1.0, "heads": 0.5, "neurons": 0.5, "share": 2},
}


@dataclass(frozen=True)
class Point:
    """One artefact: its bytes, its latency over the reference's, and which test rows it predicts rightly."""

    name: str
    size_bytes: int
    latency: float
    right: np.ndarray


def students(shape: ModelShape, specs: Mapping[str, Mapping[str, object]], epochs: float) -> dict[str, Student]:
    """Return students in numbers of a model of ``shape``."""
    names = {f"s{number}": name for number, name in enumerate(specs)}
    told = {key: {**specs[name], "epochs": epochs} for key, name in names.items()}
    space = SearchSpace.model_validate({"schema": 1, "name": "students", "students": told})
    return {names[key]: student for key, student in students_of(space, shape).items()}


def at_8_bits(student: Student, shape: ModelShape, tables: int) -> CompressionPlan:
    """Return the plan of a student at 8 bits, its tables in ``tables`` bits."""
    sites = shape.of_student(student).sites()
    bits = ((name, quantize_decision(tables if name == "embeddings" else 8, site)) for name, site in sites.items())
    return CompressionPlan(((MODEL_SITE, student), *bits))


def measured(shop: Workshop, name: str, plan: CompressionPlan) -> Point:
    """Build, time and run a plan's artefact."""
    score = shop.evaluate(plan)
    return Point(name, score.size_bytes, score.latency_ratio, hits(shop, logits_of(shop, plan, "test"), "test"))


def nearest(point: Point, plain: list[Point], measure: Callable[[Point], float]) -> Point:
    """Return the plain point that differs by the smallest factor."""
    return min(plain, key=lambda other: abs(math.log(measure(other) / measure(point))))


def compare(figures: Figures, data: str, scratch: Path, epochs: float, rows: int | None) -> None:
    """Compare the students of one data set."""
    settings = [f"data.source={data}", f"search.latency_pairs={PAIRS}"]
    trained = Workshop(RunConfig.from_file("demo", overrides=settings), scratch / "unused", print)
    settings += [f"model.id={trained.teacher_folder}", *([] if rows is None else [f"data.max_train_rows={rows}"])]
    shop = Workshop(RunConfig.from_file("demo", overrides=settings), scratch / "artefacts", print)
    shop.score(shop.build(CompressionPlan(), shop.reference_folder))
    shape = shop.teacher.shape
    plain = students(shape, PLAIN, epochs)
    eight = [measured(shop, name, at_8_bits(student, shape, 8)) for name, student in plain.items()]
    four = [measured(shop, f"{name}, tables in 4 bits", at_8_bits(s, shape, 4)) for name, s in plain.items()]
    found = [*eight, *four]
    for name, student in students(shape, OTHERS, epochs).items():
        point = measured(shop, name, at_8_bits(student, shape, 8))
        found.append(point)
        rivals = {
            "latency": nearest(point, eight, lambda p: p.latency),
            "size": nearest(point, [*eight, *four], lambda p: p.size_bytes),
        }
        for what, other in rivals.items():
            told = f"{data}, {name} over the plain student of about its {what}"
            gained = point.right.mean() - other.right.mean()
            figures.add(
                f"{told}, test rows: accuracy gained", gained, "share", interval=interval(point.right, other.right)
            )
            figures.add(f"{told}: latency", point.latency / other.latency, "times the plain's")
            figures.add(f"{told}: size", point.size_bytes / other.size_bytes, "times the plain's")
            figures.more[told] = other.name
    for point in found:
        figures.more[f"{data}, {point.name}"] = {
            "accuracy": float(point.right.mean()),
            "size_bytes": point.size_bytes,
            "latency_ratio": point.latency,
        }
    if rows is None:
        figures.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=DATA)
    parser.add_argument("--epochs", type=float, default=2.0, help="that each student is distilled for")
    parser.add_argument("--rows", type=int, help="training rows, to try the script; nothing is written then")
    options = parser.parse_args()
    figures = Figures("methods-students", "python benchmarks/methods_students.py")
    figures.read()
    figures.more["epochs"] = options.epochs
    for data in options.data:
        with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
            compare(figures, data, Path(scratch), options.epochs, options.rows)


if __name__ == "__main__":
    main()
