"""Write model, rows and settings of a run file as plain files that any tool can read.

Run it in the environment of autocompress: ``python benchmarks/tools/prepare.py demo --out PREPARED``. The folder then
holds ``model/`` (the fine-tuned classifier), ``train.csv`` and ``search.csv`` (text and class number; the splits that
our search uses), ``meta.json``, and ``run.yaml`` for `measure_points.py`.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path

from autocompress import api
from autocompress.config import RunConfig
from autocompress.evaluate import Workshop
from autocompress.task import Task


def write_rows(task: Task, split: str, file: Path) -> int:
    """Write a split's texts and class numbers as CSV; returns their number.

    Raises:
        SystemExit: if the task has pairs of texts, which the tools' scripts do not handle.
    """
    rows = task.splits[split]
    if any(pair is not None for _, pair, _ in rows):
        raise SystemExit("pairs of texts: the tools' scripts handle single texts only")
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("text", "label"))
        writer.writerows((text, label) for text, _, label in rows)
    return len(rows)


def prepare(run: RunConfig, out: Path) -> None:
    """Fill ``out``; what stands there of an earlier call is replaced."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "model", ignore_errors=True)
    shutil.copytree(api.finetune(run, progress=print), out / "model")
    task = Workshop(run, out).task
    rows = {split: write_rows(task, split, out / f"{split}.csv") for split in ("train", "search")}
    meta = {
        "labels": list(task.labels),
        "max_tokens": run.data.max_tokens,
        "tokens": run.target.tokens,
        "batch_size": run.target.batch_size,
        "threads": run.target.threads,
        "rows": rows,
    }
    (out / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    (out / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run file, or demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run")
    options = parser.parse_args()
    prepare(RunConfig.from_file(options.run, overrides=options.set), options.out)
    print(f"prepared {options.out}")


if __name__ == "__main__":
    main()
