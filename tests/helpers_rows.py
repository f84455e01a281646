"""Small data in files, for tests of what reads and parts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from conftest import LABELS, make_texts

from autocompress import task
from autocompress.config import DataConfig


def config(source: object, **fields: Any) -> DataConfig:
    return DataConfig(**{"source": str(source), "search_rows": 20, **fields})


def frame(count: int = 100, classes: int = 2) -> pd.DataFrame:
    rows = make_texts(count, classes, seed=7)
    return pd.DataFrame({"text": [text for text, _ in rows], "label": [(*LABELS, "so-so")[n] for _, n in rows]})


def saved(tmp_path: Path, data: pd.DataFrame, name: str = "data.csv") -> Path:
    data.to_csv(tmp_path / name, index=False)
    return tmp_path / name


def all_rows(loaded: task.Task) -> list[tuple[str, str | None, int]]:
    return [row for rows in loaded.splits.values() for row in rows]
