"""Artefacts of small models, and what they are run on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import LABELS, make_model, template_of

from autocompress.config import TargetConfig
from autocompress.model import understand
from autocompress.plan import CompressionPlan
from autocompress.runtimes import Artifact, get_runtime
from autocompress.task import Split

TARGET = TargetConfig(tokens=16)
ROWS = Split(tuple((2, *range(10, 20 + row), 3) for row in range(4)), None, (0, 1, 0, 1))
INPUTS = {"input_ids": np.full((1, 16), 7), "attention_mask": np.ones((1, 16), dtype=np.int64)}


def built(runtime: str, folder: Path, **sizes: int) -> Artifact:
    found, chosen = understand(make_model("distilbert", labels=LABELS, **sizes), base="test"), get_runtime(runtime)
    folder.mkdir()
    return chosen.stitch(template_of(chosen, found, ROWS.batch([0, 1])), {}, CompressionPlan(), folder)
