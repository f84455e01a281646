"""A run file to begin with: the demo's, comments and all, with what was asked for in its place."""

from __future__ import annotations

import json
from pathlib import Path

from autocompress import strict_yaml
from autocompress.config import DataConfig, RunConfig, demo_run_text
from autocompress.errors import ConfigError

_KEYS = {
    "name": ("name", "demo"),
    "model": ("  id", "demo/minilm"),
    "data": ("  source", "demo/movies"),
    "text": ("  text", "text"),
    "label": ("  label", "label"),
    "target": ("  runtime", "openvino"),
}
"""What can be asked for: the key in the demo's run file, and what stands there."""


def run_text(source: str, **wanted: str | None) -> str:
    """Return the text of a run file.

    Args:
        source: what the file is called in errors.
        wanted: by the names of `_KEYS`; None leaves what the demo has.

    Raises:
        ConfigError: if it would not be a run file.
    """
    text = demo_run_text()
    for name, value in wanted.items():
        key, default = _KEYS[name]
        if value is not None:
            text = text.replace(f"{key}: {default}", f"{key}: {json.dumps(value, ensure_ascii=False)}", 1)
    RunConfig.from_mapping(strict_yaml.parse(text, source), source=source)
    return text


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
