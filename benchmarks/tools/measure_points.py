"""Measure the points of other tools as our own candidates are, and write ``points.json``.

Run it in the environment of autocompress: ``python benchmarks/tools/measure_points.py PREPARED OUT... --to FILE``. Each
``OUT`` is a folder that one of the tools' scripts wrote. A point is scored by the code that scores candidates of a
search, and its latency confirmed by the code that confirms those of a front: the same rows through the artefact, the
bytes of the model's files, pairs with the uncompressed model that our own search is compared with, in a fresh process,
adjusted for slow times. Points on the front of their tool are run on the held-out test rows, too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autocompress import machine, scoring
from autocompress.calm import calm_of
from autocompress.config import RunConfig
from autocompress.errors import AutocompressError
from autocompress.evaluate import Workshop
from autocompress.pareto import nondominated
from autocompress.plan import CompressionPlan
from autocompress.records import Measurement, drift_of
from autocompress.rows import LOGITS_FILE, read_logits
from autocompress.runtimes import Artifact
from autocompress.task import Batch

SCHEMA = 2
RUNTIMES = {"model.xml": "openvino", "model.onnx": "onnxruntime"}
POINT_FILE = "point.json"
FAILURES_FILE = "failures.json"
_ALONGSIDE = (POINT_FILE, "artefact.json", LOGITS_FILE)


def describe(folder: Path) -> Artifact | None:
    """Write ``artefact.json`` beside the files of a point: every file but the descriptions is the model's.

    None where the folder holds no model that we can run.
    """
    main = next((name for name in RUNTIMES if (folder / name).is_file()), None)
    if main is None:
        return None
    others = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in (main, *_ALONGSIDE))
    inputs = ("input_ids", "attention_mask")
    artifact = Artifact(folder, RUNTIMES[main], (main, *others), inputs, CompressionPlan())
    artifact.save()
    return artifact


class Bench(Workshop):
    """Scores artefacts of one runtime against its uncompressed artefact."""

    def __init__(self, run: RunConfig, runtime: str, scratch: Path) -> None:
        settings = run.model_dump(mode="json", by_alias=True)
        settings["target"]["runtime"] = runtime
        super().__init__(RunConfig.from_mapping(settings), scratch / runtime)
        self.score(self.build(CompressionPlan(), self.reference_folder))

    def parts(self, split: str) -> list[list[Batch]]:
        """Return the rows as those of a search, but in batches of the target: logits of others may depend on them."""
        one = self.run.target.batch_size
        rows = self.splits[split]
        parts = [[int(row) for batch in part for row in batch.rows] for part in super().parts(split)]
        return [list(rows.in_order_of_length(one, among=part)) for part in parts]

    def timed_anew(self, points: Sequence[tuple[Artifact, Measurement]]) -> list[Measurement]:
        """Return scores with latencies as those of a front are; see `Study.confirm`."""
        pairs, before = self.run.search.confirm_pairs, [measured for _, measured in points]
        latest = self.gauge.confirmed(points, pairs=pairs, quiet=None, progress=print)
        calm = calm_of(before, latest)
        calmed = [calm.adjust(measured) for measured in latest]
        drift = drift_of([calm.adjust(measured) for measured in before], calmed)
        return [measured.drifting(drift) for measured in calmed]


def mark_front(points: list[dict[str, Any]]) -> None:
    """Set ``on_front`` in each point: no other point of the same tool and runtime dominates it."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in points:
        groups.setdefault((point["tool"], point["runtime"]), []).append(point)
    for group in groups.values():
        costs = np.array([(-p["accuracy"], p["size_bytes"], p["latency_ratio"]) for p in group], dtype=float)
        for point, best in zip(group, nondominated(costs), strict=True):
            point["on_front"] = bool(best)


def scores_of(artifact: Artifact, measured: Measurement) -> dict[str, Any]:
    """Return what is told of a point, with the class that it predicts for each search row."""
    return {
        "accuracy": measured.accuracy,
        "accuracy_low": measured.accuracy_low,
        "accuracy_high": measured.accuracy_high,
        "rows": measured.rows,
        "size_bytes": measured.size_bytes,
        "latency_ratio": measured.latency_ratio,
        "latency_ratio_low": measured.latency_ratio_low,
        "latency_ratio_high": measured.latency_ratio_high,
        "latency_adjusted": measured.latency_adjusted,
        "latency_ms": measured.latency_ms,
        "reference_ms": measured.reference_ms,
        "classes": read_logits(artifact.folder).argmax(axis=1).tolist(),
    }


def measure(run: RunConfig, outs: list[Path]) -> dict[str, Any]:
    """Measure every point under ``outs`` in the order of their names; what cannot be measured is listed."""
    points: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    seconds: dict[str, float] = {}
    for out in outs:
        about = json.loads((out / FAILURES_FILE).read_text(encoding="utf-8"))
        failures += [{"tool": about["tool"], **failure} for failure in about["failures"]]
        seconds[about["tool"]] = about["seconds"]
    artefacts: list[tuple[dict[str, Any], Artifact]] = []
    for file in (file for out in outs for file in sorted(out.glob(f"*/{POINT_FILE}"))):
        about = json.loads(file.read_text(encoding="utf-8"))
        if (artifact := describe(file.parent)) is None:
            reason = f"holds neither of {', '.join(RUNTIMES)}"
            failures.append({"tool": about["tool"], "name": about["name"], "reason": reason})
        else:
            artefacts.append((about, artifact))
    if not artefacts:
        raise SystemExit(f"no points in {', '.join(map(str, outs))}")
    with tempfile.TemporaryDirectory() as scratch:
        for runtime in sorted({artifact.runtime for _, artifact in artefacts}):
            bench = Bench(run, runtime, Path(scratch))
            found: list[tuple[dict[str, Any], Artifact, Measurement]] = []
            for about, artifact in artefacts:
                if artifact.runtime != runtime:
                    continue
                try:
                    measured = bench.score(artifact)
                except (AutocompressError, RuntimeError, KeyError) as error:
                    reason = f"not measured: {type(error).__name__}: {error}"
                    failures.append({"tool": about["tool"], "name": about["name"], "reason": reason[:2000]})
                    print(f"{about['tool']} {about['name']}: {reason}", flush=True)
                    continue
                found.append((about, artifact, measured))
                print(
                    f"{about['tool']:12} {about['name']:44} {measured.accuracy:.3f} {measured.size_bytes / 1e6:6.1f} MB"
                    f"  {measured.latency_ratio:.3f}",
                    flush=True,
                )
            if not found:
                continue
            anew = bench.timed_anew([(artifact, measured) for _, artifact, measured in found])
            here = [
                {**about, "runtime": runtime, **scores_of(artifact, measured)}
                for (about, artifact, _), measured in zip(found, anew, strict=True)
            ]
            mark_front(here)
            for point, (_, artifact, _) in zip(here, found, strict=True):
                if point["on_front"]:
                    test = scoring.accuracy(bench.logits(artifact, "test"), bench.splits["test"])
                    point["test_accuracy"] = test.value
            points += here
    return {
        "schema": SCHEMA,
        "machine": machine.fingerprint(),
        "target": run.target.model_dump(exclude={"runtime"}),
        "data": bench.task.fingerprint,
        "model": bench.teacher.base,
        "seconds": seconds,
        "points": points,
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("outs", type=Path, nargs="+", metavar="OUT")
    parser.add_argument("--to", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    run = RunConfig.from_file(options.prepared / "run.yaml")
    found = measure(run, options.outs)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{len(found['points'])} points, {len(found['failures'])} failures: {options.to}")


if __name__ == "__main__":
    main()
