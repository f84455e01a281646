"""Run as a module by an export: load a folder in this fresh process, time it, run prepared rows, write both."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from autocompress.config import TargetConfig
from autocompress.exported import time_against_stand_in
from autocompress.rows import read_rows, write_logits
from autocompress.runtimes import Artifact, get_runtime


def main(
    folder: Path, scratch: Path, target: TargetConfig, vocabulary: int, pairs: int, reference_ms: float | None
) -> None:
    """Write ``latency.json`` and the logits of the rows in ``scratch``, ``rows x classes``, to ``scratch``."""
    artifact = Artifact.open(folder)
    timed = time_against_stand_in(artifact, target, vocabulary, pairs, reference_ms=reference_ms)
    (scratch / "latency.json").write_text(json.dumps(dataclasses.asdict(timed)), encoding="utf-8")
    session = get_runtime(artifact.runtime).load(artifact, target)
    write_logits(scratch, read_rows(scratch), session.run)


if __name__ == "__main__":
    about = json.loads(sys.argv[3])
    known = about["vocabulary"], about["pairs"], about["reference_ms"]
    main(Path(sys.argv[1]), Path(sys.argv[2]), TargetConfig(**about["target"]), *known)
