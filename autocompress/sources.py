"""Where rows come from: data that the package ships, a local file, or the hub of `datasets`."""

from __future__ import annotations

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
TEST_NAMES = ("test", "validation", "eval", "dev")
"""What a split is called whose rows are held out."""
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Of files that are read, which may be compressed."""


def is_file(source: str) -> bool:
    """Return whether data of that name are a local file, be it there or not."""
    path = Path(source).expanduser()
    return path.is_file() or _suffix(path) in SUFFIXES


def _suffix(path: Path) -> str:
    return next((s for s in reversed(path.suffixes) if s not in (".gz", ".bz2", ".xz", ".zip")), "").lower()


def read_table(config: DataConfig) -> pd.DataFrame:
    """Return all rows with all their columns, as they are.

    Raises:
        DataError: if they cannot be read.
    """
    import pandas as pd

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

    def fetch(local: bool) -> Any:
        with _hub_switched_off() if local else nullcontext():
            try:
                return datasets.load_dataset(config.source, config.subset, revision=config.revision)
            except ValueError as error:
                if str(error).startswith("Config name is missing"):  # the names stand on its second line
                    raise DataError(f"{' '.join(str(error).splitlines()[:2])}; name it by data.subset") from None
                raise

    def probe() -> None:
        from huggingface_hub import HfApi

        HfApi().dataset_info(config.source, revision=config.revision, timeout=4.0)

    try:
        found = from_hub(f"data: {config.source}", fetch, probe)
    except ModelError as error:
        raise DataError(str(error)) from None
    frames: list[pd.DataFrame] = []
    for name, part in found.items():
        frame = part.to_pandas()
        feature = part.features.get(config.label)
        if isinstance(feature, datasets.ClassLabel):
            if len(frame) and (frame[config.label] < 0).all():  # such as the hidden labels of a competition
                continue
            frame[config.label] = [feature.int2str(int(v)) if v >= 0 else None for v in frame[config.label]]
        # Such as validation_matched.
        held_out = str(name).partition("_")[0] in TEST_NAMES
        frames.append(frame.assign(**{config.split: "test" if held_out else str(name)}))
    return pd.concat(frames, ignore_index=True)
