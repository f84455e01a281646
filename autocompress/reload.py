"""Run as a module by an export: load a folder in this fresh process, run prepared rows, write the logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from autocompress.config import TargetConfig
from autocompress.evaluate import LOGITS_FILE
from autocompress.runtimes import Artifact, get_runtime


def main(folder: Path, scratch: Path, target: TargetConfig) -> None:
    """Write ``rows x classes`` logits of ``scratch/rows.npz`` to ``scratch``."""
    artifact = Artifact.open(folder)
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
    main(Path(sys.argv[1]), Path(sys.argv[2]), TargetConfig(**json.loads(sys.argv[3])))
