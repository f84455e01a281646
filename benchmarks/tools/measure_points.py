"""Measure the points of other tools with our protocol, and write ``points.json``.

Run it in the environment of autocompress: ``python benchmarks/tools/measure_points.py PREPARED OUT... --to FILE``. Each
``OUT`` is a folder that one of the tools' scripts wrote. As for our own candidates, accuracy is taken on the search
rows through the artefact, size is the bytes of the model's files, and latency is paired with the same runtime's
artefact of the uncompressed model that our own search is compared with.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocompress import machine, scoring, timing
from autocompress.config import RunConfig
from autocompress.errors import AutocompressError
from autocompress.evaluate import Workshop
from autocompress.pareto import nondominated
from autocompress.plan import CompressionPlan
from autocompress.runtimes import Artifact, Session

SCHEMA = 1
RUNTIMES = {"model.xml": "openvino", "model.onnx": "onnxruntime"}
POINT_FILE = "point.json"
FAILURES_FILE = "failures.json"
_ALONGSIDE = (POINT_FILE, "artefact.json", "logits.npy")


class Foreign(Session):
    """An artefact of another tool, which may want segment ids that our tasks of single texts leave out."""

    def __init__(self, inner: Session) -> None:
        self._inner = inner

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return logits; segment ids are zeros unless they are given."""
        if "token_type_ids" in inputs:
            return self._inner.run(inputs)
        return self._inner.run({**inputs, "token_type_ids": np.zeros_like(inputs["input_ids"])})

    def close(self) -> None:
        """Close what it is around."""
        self._inner.close()


def describe(folder: Path) -> Artifact:
    """Write ``artefact.json`` beside the files of a point: every file but the descriptions is the model's.

    Raises:
        SystemExit: if the folder holds no model that we can run.
    """
    main = next((name for name in RUNTIMES if (folder / name).is_file()), None)
    if main is None:
        raise SystemExit(f"{folder}: holds neither of {', '.join(RUNTIMES)}")
    others = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in (main, *_ALONGSIDE))
    inputs = ("input_ids", "attention_mask")
    artifact = Artifact(folder, RUNTIMES[main], (main, *others), inputs, CompressionPlan())
    artifact.save()
    return artifact


class Bench:
    """Scores artefacts of one runtime against its uncompressed artefact."""

    def __init__(self, run: RunConfig, runtime: str, scratch: Path) -> None:
        settings = run.model_dump(mode="json", by_alias=True)
        settings["target"]["runtime"] = runtime
        self.workshop = Workshop(RunConfig.from_mapping(settings), scratch / runtime)
        self.workshop.build(CompressionPlan(), self.workshop.reference_folder)
        self.reference = Artifact.open(self.workshop.reference_folder)
        self.inputs = self.workshop.gauge.inputs(self.reference)
        self.pace = timing.Pace(run.target.threads)

    def score(self, artifact: Artifact, pairs: int) -> dict[str, Any]:
        """Return accuracy, size and paired latency of an artefact.

        Raises:
            AutocompressError: if it cannot be loaded or its logits are not finite.
        """
        workshop, started = self.workshop, time.perf_counter()
        session = Foreign(workshop.runtime.load(artifact, workshop.run.target))
        rows = workshop.splits["search"]
        # Logits of others may depend on the batch: they are scored in that of the target.
        batches = rows.in_order_of_length(workshop.run.target.batch_size)
        scored = scoring.accuracy(scoring.logits_of(session, rows, batches), rows)
        pairs_taken = timing.paired_times(
            session,
            workshop.gauge.stand.reference,
            self.inputs,
            pairs=pairs,
            clock=timing.clock_of(workshop.run.target),
        )
        for pair in pairs_taken:
            self.pace.note(pair.beside)
        timed = timing.summarize(self.pace.undisturbed([pairs_taken]), seed=workshop.run.seed)
        return {
            "accuracy": scored.value,
            "accuracy_low": scored.low,
            "accuracy_high": scored.high,
            "rows": scored.rows,
            "size_bytes": artifact.size_bytes,
            "latency_ratio": timed.ratio,
            "latency_ratio_low": timed.ratio_low,
            "latency_ratio_high": timed.ratio_high,
            "latency_ms": timed.p50_ms,
            "reference_ms": timed.reference_ms,
            "measuring_seconds": round(time.perf_counter() - started, 3),
        }


def mark_front(points: list[dict[str, Any]]) -> None:
    """Set ``on_front`` in each point: no other point of the same tool and runtime dominates it."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in points:
        groups.setdefault((point["tool"], point["runtime"]), []).append(point)
    for group in groups.values():
        costs = np.array([(-p["accuracy"], p["size_bytes"], p["latency_ratio"]) for p in group], dtype=float)
        for point, best in zip(group, nondominated(costs), strict=True):
            point["on_front"] = bool(best)


def measure(run: RunConfig, outs: list[Path], pairs: int) -> dict[str, Any]:
    """Measure every point under ``outs`` in the order of their names; what cannot be measured is listed."""
    points: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    for out in outs:
        if (out / FAILURES_FILE).is_file():
            about = json.loads((out / FAILURES_FILE).read_text(encoding="utf-8"))
            failures += [{"tool": about["tool"], **failure} for failure in about["failures"]]
    with tempfile.TemporaryDirectory() as scratch:
        benches: dict[str, Bench] = {}
        for file in [file for out in outs for file in sorted(out.glob(f"*/{POINT_FILE}"))]:
            about = json.loads(file.read_text(encoding="utf-8"))
            artifact = describe(file.parent)
            if artifact.runtime not in benches:
                benches[artifact.runtime] = Bench(run, artifact.runtime, Path(scratch))
            try:
                scored = benches[artifact.runtime].score(artifact, pairs)
            except (AutocompressError, RuntimeError, KeyError) as error:
                reason = f"not measured: {type(error).__name__}: {error}"
                failures.append({"tool": about["tool"], "name": about["name"], "reason": reason[:2000]})
                print(f"{about['tool']} {about['name']}: {reason}", flush=True)
                continue
            points.append({**about, "runtime": artifact.runtime, **scored})
            low, high = scored["latency_ratio_low"], scored["latency_ratio_high"]
            print(
                f"{about['tool']:12} {about['name']:44} {scored['accuracy']:.3f} {scored['size_bytes'] / 1e6:6.1f} MB  "
                f"{scored['latency_ratio']:.3f} [{low:.3f}, {high:.3f}]",
                flush=True,
            )
    mark_front(points)
    return {
        "schema": SCHEMA,
        "machine": machine.fingerprint(),
        "target": run.target.model_dump(exclude={"runtime"}),
        "pairs": pairs,
        "points": points,
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("outs", type=Path, nargs="+", metavar="OUT")
    parser.add_argument("--to", type=Path, required=True, help="file to write")
    parser.add_argument("--pairs", type=int, default=None, help="of candidate and reference; by default the run's")
    options = parser.parse_args()
    run = RunConfig.from_file(options.prepared / "run.yaml")
    found = measure(run, options.outs, options.pairs or run.search.latency_pairs)
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{len(found['points'])} points, {len(found['failures'])} failures: {options.to}")


if __name__ == "__main__":
    main()
