"""Where rows come from: data that the package ships, a local file, or the hub of `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.config import DataConfig
from autocompress.errors import DataError, ModelError, first_line
from autocompress.origins import from_hub

if TYPE_CHECKING:
    import pandas as pd

DEMO_DATA = ("demo/movies", "demo/tweets")
_HELD_OUT = {"test", "testing", "validation", "valid", "val", "eval", "evaluation", "dev", "development", "holdout"}
"""A word of what a split is called whose rows are held out."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Of files that are read, which may be compressed."""


def is_file(source: str) -> bool:
    """Return whether data of that name are a local file, be it there or not."""
    path = Path(source).expanduser()
    return path.is_file() or _suffix(path) in SUFFIXES


def is_held_out(split: str) -> bool:
    """Return whether rows of a split of this name are held out, such as ``val`` or ``validation_matched``."""
    words = {word.lower() for word in _WORD.findall(split)}
    return bool(words & _HELD_OUT) and "train" not in words


def _suffix(path: Path) -> str:
    return next((s for s in reversed(path.suffixes) if s not in (".gz", ".bz2", ".xz", ".zip")), "").lower()


def read_table(config: DataConfig) -> pd.DataFrame:
    """Return all rows with all their columns, as they are.

    Raises:
        DataError: if they cannot be read.
    """
    import pandas as pd

    if config.subset is not None and (config.source in DEMO_DATA or is_file(config.source)):
        raise DataError(f"data.subset: is of a datasets id, which {config.source} is not; leave it out")
    if config.source in DEMO_DATA:
        name = config.source.split("/")[1] + ".csv.gz"
        with resources.as_file(resources.files("autocompress").joinpath("demo", name)) as file:
            return pd.read_csv(file)
    path = Path(config.source).expanduser()
    suffix = _suffix(path)
    if suffix in SUFFIXES:
        if not path.is_file():
            raise DataError(f"data: {path}: no such file")
        try:
            if suffix == ".parquet":
                return pd.read_parquet(path)
            if suffix in (".jsonl", ".json"):
                return pd.DataFrame(pd.read_json(path, lines=True, dtype=False))
            # Only an empty field is missing: None, NA and null are words, and names of classes, as are 007 and true.
            sep = "\t" if suffix == ".tsv" else ","
            found = pd.read_csv(path, sep=sep, dtype=str, keep_default_na=False, na_values=[""])
            return _whole(found, config.label)
        except pd.errors.EmptyDataError:
            raise DataError(f"data: {path}: is empty") from None
        except Exception as error:
            # Readers and decompressors have no class of errors in common.
            wanted = "; it must hold one object a line" if suffix in (".jsonl", ".json") else ""
            raise DataError(f"data: {path}: cannot be read ({first_line(error)}){wanted}") from None
    if path.exists():
        raise DataError(f"data: {path}: must be a .csv, .tsv, .jsonl or .parquet file (or a compressed one)")
    return _read_hub(config)


def _whole(table: pd.DataFrame, label: str) -> pd.DataFrame:
    """Return the table with classes that are whole numbers as such, where they were written as 1.0 or after a space."""
    if label in table.columns:
        names = table[label].dropna().str.strip()
        spoilt = names.str.contains(".", regex=False).any() or (names != table[label].dropna()).any()
        if spoilt and names.str.fullmatch(r"-?\d+(\.0+)?").all():
            return table.assign(**{label: table[label].str.strip().str.partition(".")[0]})
    return table


@contextmanager
def _hub_switched_off() -> Iterator[None]:
    """Let `datasets` look into its cache only; asked for local files, it still tries the network, for half a minute."""
    import datasets
    import huggingface_hub

    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


def _read_hub(config: DataConfig) -> pd.DataFrame:
    import datasets
    import pandas as pd

    datasets.disable_progress_bars()

    cached: list[str] = []

    def fetch(local: bool) -> Any:
        with _hub_switched_off() if local else nullcontext():
            try:
                found = datasets.load_dataset(config.source, config.subset, revision=config.revision)
            except ValueError as error:
                said = str(error).splitlines() or [""]
                if config.subset is None and said[0].startswith("There are multiple"):
                    cached.append(said[0])
                elif said[0].startswith("Config name is missing"):  # which there are stands on the second line
                    raise DataError(f"data: {config.source}: {' '.join(said[:2])}; name it by data.subset") from None
                raise
        name = next(iter(found.values())).config_name
        if local and config.subset is None and name != "default":
            # Which of several it is depends on what somebody asked for before; the hub knows whether there are others.
            cached.append(f"its configuration {name!r} is cached")
            raise LookupError(name)
        return found

    def probe() -> None:
        from huggingface_hub import HfApi

        HfApi().dataset_info(config.source, revision=config.revision, timeout=4.0)

    try:
        found = from_hub(f"data: {config.source}", fetch, probe)
    except ModelError as error:
        which = f"; {cached[0]}: name it by data.subset" if cached else ""
        raise DataError(f"{error}{which}") from None
    frames: list[pd.DataFrame] = []
    for name, part in found.items():
        frame = part.to_pandas()
        feature = part.features.get(config.label)
        if isinstance(feature, datasets.ClassLabel):
            if len(frame) and (frame[config.label] < 0).all():  # such as the hidden labels of a competition
                continue
            frame[config.label] = [feature.int2str(int(v)) if v >= 0 else None for v in frame[config.label]]
        frames.append(frame.assign(**{config.split: str(name)}))
    return pd.concat(frames, ignore_index=True)
