"""A run file to begin with: the demo's, comments and all, with what was asked for in its place."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from autocompress import strict_yaml
from autocompress.config import DataConfig, RunConfig, demo_run_text
from autocompress.errors import ConfigError, DataError

_KEYS = {
    "name": ("name", "demo"),
    "model": ("  id", "demo/minilm"),
    "data": ("  source", "demo/movies"),
    "text": ("  text", "text"),
    "label": ("  label", "label"),
    "target": ("  runtime", "openvino"),
    "search_rows": ("  search_rows", "1000"),
}
"""What can be asked for: the key in the demo's run file, and what stands there."""
_ABOUT_THE_DEMO = "# Compress all-MiniLM-L6-v2, fine-tuned on movie reviews, for one CPU thread. "
_LONGEST_NAME = 64


def run_text(source: str, wanted: Mapping[str, str | int | None]) -> str:
    """Return the text of a run file.

    Args:
        source: what the file is called in errors.
        wanted: by the names of `_KEYS`; None leaves what the demo has.

    Raises:
        ConfigError: if it would not be a run file.
    """
    text = demo_run_text()
    if wanted.get("model") is not None or wanted.get("data") is not None:
        text = text.replace(_ABOUT_THE_DEMO, "# ", 1)
    for name, value in wanted.items():
        key, default = _KEYS[name]
        if value is not None:
            text = text.replace(f"{key}: {default}", f"{key}: {json.dumps(value, ensure_ascii=False)}", 1)
    RunConfig.from_mapping(strict_yaml.parse(text, source), source=source)
    return text


def name_of(data: str) -> str | None:
    """Return what a run on ``data`` may be called: the last part of what it names, without the ends of a file's name.

    None where nothing of it can stand in a name.
    """
    word = Path(data).name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", word).strip("-_")[:_LONGEST_NAME] or None


def columns_of(data: str) -> list[str] | None:
    """Return the columns of a local file; None of what is no such file, whose columns are known once it is read."""
    if not Path(data).expanduser().is_file():
        return None
    from autocompress import task

    return task.columns(DataConfig(source=data))


def check_column(column: str, columns: list[str] | None, data: str) -> None:
    """Refuse a column that the data are known not to have.

    Raises:
        ConfigError: naming those that they have.
    """
    if columns is not None and column not in columns:
        raise ConfigError(f"init: {data}: has no column {column}; it has {', '.join(columns)}; give --text and --label")


def search_rows_of(data: str, text: str | None, label: str | None) -> int | None:
    """Return how many rows a search on a local file can be scored on, where that is fewer than the demo has.

    None, too, where the file cannot be used at all: what is wrong with it is for the search to say.
    """
    if not Path(data).expanduser().is_file():
        return None
    from autocompress import task

    named = {name: column for name, column in (("text", text), ("label", label)) if column is not None}
    config = DataConfig(source=data, **named)
    try:
        rows = task.training_rows(config)
    except DataError:
        return None
    return None if rows >= 2 * config.search_rows else task.fitting_search_rows(rows)
