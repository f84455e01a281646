"""Time the stages of one dense W8A8 candidate as version 0.1 evaluated it, before candidates were stitched.

Run by ``search_cost.py`` with a checkout of that version on ``PYTHONPATH``; prints seconds by stage as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from autocompress import scoring
from autocompress.config import RunConfig
from autocompress.evaluate import Workshop
from autocompress.plan import CompressionPlan
from autocompress.runtimes import openvino

REPEATS = 3
spent: dict[str, float] = {}


def timed(owner: Any, name: str, stage: str) -> None:
    """Add what ``owner.name`` takes to a stage."""
    inner: Callable[..., Any] = getattr(owner, name)

    def outer(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        found = inner(*arguments, **options)
        spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - started
        return found

    setattr(owner, name, outer)


def main() -> None:
    torch.set_num_threads(1)
    run = RunConfig.from_file("demo", overrides=[f"model.id={json.dumps(sys.argv[1])}"])
    with tempfile.TemporaryDirectory() as scratch:
        workshop = Workshop(run, Path(scratch))
        workshop.build(CompressionPlan(), workshop.reference_folder)
        workshop.ready()
        plan = workshop.space.plan(workshop.space.ladder()[0]) if len(sys.argv) < 3 else CompressionPlan()  # type: ignore[attr-defined]
        timed(openvino, "_convert", "convert")
        timed(openvino, "activation_ranges", "activation ranges")
        timed(workshop.runtime, "load", "load")
        timed(scoring, "logits_of", "accuracy")
        timed(scoring, "latency", "latency")
        timed(workshop, "build", "build, all of it")
        for _ in range(REPEATS):
            workshop.evaluate(plan)
    print(json.dumps({stage: seconds / REPEATS for stage, seconds in spent.items()}))


if __name__ == "__main__":
    main()
