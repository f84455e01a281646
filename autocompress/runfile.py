"""A run file to begin with: the demo's, comments and all, with what was asked for in its place; and its name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from autocompress import strict_yaml
from autocompress.config import DataConfig, RunConfig, demo_run_text
from autocompress.errors import ConfigError, DataError, quoted
from autocompress.sources import is_file, read_table

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


def run_text(out: Path, wanted: Mapping[str, str | int | None]) -> str:
    """Return the text of a run file.

    Args:
        out: the file that it is to stand in.
        wanted: by the names of `_KEYS`; None leaves what the demo has.

    Raises:
        ConfigError: if it would not be a run file.
    """
    text = demo_run_text()
    if wanted.get("model") is not None or wanted.get("data") is not None:
        text = text.replace(_ABOUT_THE_DEMO, "# ", 1).replace("search demo", f"search {quoted(out)}", 1)
    for name, value in wanted.items():
        key, default = _KEYS[name]
        if value is not None:
            text = text.replace(f"{key}: {default}", f"{key}: {json.dumps(value, ensure_ascii=False)}", 1)
    RunConfig.from_mapping(strict_yaml.parse(text, out.name), source=out.name)
    return text


def name_of(data: str) -> str | None:
    """Return what a run on ``data`` may be called: the last part of what it names, without the ends of a file's name.

    None where nothing of it can stand in a name.
    """
    word = Path(data).name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", word).strip("-_")[:_LONGEST_NAME] or None


def named(run: RunConfig, source: str, out: Path | None) -> RunConfig:
    """Return a run by the name of its data, where these were given in place of the demo's.

    Args:
        run: with what was given put in.
        source: the run file that was named; only the demo's own gets another name.
        out: the results folder that was given. A study that was begun there keeps its name.
    """
    from autocompress.api import results_of

    name = name_of(run.data.subset or run.data.source) if source == run.name == "demo" else None
    if name is None:
        return run
    begun = results_of(run, out) / "run.yaml"
    if begun.is_file() and (known := RunConfig.from_file(begun)).name == "demo" and (out or known.data == run.data):
        return run
    return run.model_copy(update={"name": name})


class Known:
    """What is known of data before a run file is written for them: of a local file all, of others nothing yet.

    Args:
        data: as a run file names them.

    Raises:
        DataError: if it is a local file that cannot be read.
    """

    def __init__(self, data: str) -> None:
        self._data = data
        self._table = read_table(DataConfig(source=data)) if is_file(data) else None

    @property
    def columns(self) -> list[str] | None:
        """Their columns, None where these are not known."""
        return None if self._table is None else [str(name) for name in self._table.columns]

    def check_column(self, column: str) -> None:
        """Refuse a column that the data are known not to have.

        Raises:
            ConfigError: naming those that they have.
        """
        if self.columns is not None and column not in self.columns:
            have = ", ".join(self.columns)
            raise ConfigError(f"init: {self._data}: has no column {column}; it has {have}; give --text and --label")

    def search_rows(self, text: str | None, label: str | None) -> int | None:
        """Return how many rows a search can be scored on, where that is known to be fewer than the demo has.

        None, too, where the data cannot be used at all: what is wrong with them is for the search to say.
        """
        if self._table is None:
            return None
        from autocompress import task

        given = {name: column for name, column in (("text", text), ("label", label)) if column is not None}
        config = DataConfig(source=self._data, **given)
        try:
            rows = task.training_rows(config, self._table)
        except DataError:
            return None
        return None if rows >= 2 * config.search_rows else task.fitting_search_rows(rows)
