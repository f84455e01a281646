"""Run as a module by an export: load a folder in this fresh process, time it, run prepared rows, write both."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from autocompress.config import TargetConfig
from autocompress.delivery import time_against_stand_in
from autocompress.evaluate import LOGITS_FILE
from autocompress.runtimes import Artifact, get_runtime


def main(folder: Path, scratch: Path, target: TargetConfig, vocabulary: int, pairs: int) -> None:
    """Write ``latency.json`` and ``rows x classes`` logits of ``scratch/rows.npz`` to ``scratch``."""
    artifact = Artifact.open(folder)
    timed = time_against_stand_in(artifact, target, vocabulary, pairs)
    (scratch / "latency.json").write_text(json.dumps(dataclasses.asdict(timed)), encoding="utf-8")
    session = get_runtime(artifact.runtime).load(artifact, target)
    with np.load(scratch / "rows.npz", allow_pickle=False) as prepared:
        batches: dict[str, dict[str, np.ndarray]] = {}
        for key in prepared.files:
            number, name = key.split("/")
            batches.setdefault(number, {})[name] = prepared[key]
    rows = np.concatenate([batch.pop("rows") for batch in batches.values()])
    logits = np.concatenate([session.run(batch) for batch in batches.values()])
    ordered = np.empty_like(logits)
    ordered[rows] = logits
    np.save(scratch / LOGITS_FILE, ordered, allow_pickle=False)


if __name__ == "__main__":
    about = json.loads(sys.argv[3])
    main(Path(sys.argv[1]), Path(sys.argv[2]), TargetConfig(**about["target"]), about["vocabulary"], about["pairs"])
