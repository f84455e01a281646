"""Options that several commands take, and the point that those of picking mean."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autocompress.errors import ConfigError

if TYPE_CHECKING:
    from autocompress.front import Choice


class Prefer(StrEnum):
    """What `pick` optimises among the points within the limits."""

    knee = "knee"
    latency = "latency"
    size = "size"
    accuracy = "accuracy"
    divergence = "divergence"


Run = Annotated[str, typer.Argument(help="A run file, or demo for the one that ships with the package.")]
Model = Annotated[str | None, typer.Option("--model", help="demo/minilm, a local folder or a hub id.")]
Data = Annotated[
    str | None,
    typer.Option("--data", help="demo/movies, demo/tweets, a csv, tsv, jsonl or parquet file, a datasets id."),
]
Space = Annotated[str | None, typer.Option("--space", help="A shipped search space or a YAML file.")]
Target = Annotated[str | None, typer.Option("--target", help="Runtime: openvino or onnxruntime.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the run file: KEY=VALUE. Repeatable.")]
Folder = Annotated[Path, typer.Argument(help="The results folder of a search.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="A Ray cluster: auto or HOST:PORT on one of its machines, ray://HOST:PORT from elsewhere."
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Accept a cluster that asks nobody for a token.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Preferred = Annotated[
    Prefer,
    typer.Option(
        "--prefer",
        "--pick",
        help="What to optimise; knee: nearest to the best of all objectives at once; divergence: predictions most like "
        "the original's.",
    ),
]
Trial = Annotated[int | None, typer.Option("--trial", help="Take this trial, whatever it is like, without limits.")]
MaxDrop = Annotated[
    str | None, typer.Option("--max-accuracy-drop", help="Against the reference: 1% (percentage points) or 0.01.")
]
MaxMs = Annotated[float | None, typer.Option("--max-latency-ms", help="Median latency in milliseconds.")]
MaxRatio = Annotated[
    float | None, typer.Option("--max-latency-ratio", help="Against the reference: 0.25 is four times as fast.")
]
MaxMb = Annotated[float | None, typer.Option("--max-size-mb", help="Size in megabytes of 1e6 bytes.")]


def picked(
    folder: Path,
    prefer: Prefer,
    trial: int | None,
    drop: str | None,
    ms: float | None,
    ratio: float | None,
    mb: float | None,
) -> Choice:
    """Return the point that the options of picking mean.

    Raises:
        ConfigError: if a trial is named and limits are given, too, or a limit is none.
        AutocompressError: if there is no such point.
    """
    from autocompress import api
    from autocompress.front import Limits

    limits = Limits(_share(drop), ms, ratio, mb)
    if trial is not None and limits != Limits():
        raise ConfigError("--trial: names the point; leave out the limits, which would choose one")
    study = api.open_study(folder)
    front = study.front()
    return front.choose(limits, prefer.value) if trial is None else front.asked_for(study.candidate(trial))


def _share(text: str | None) -> float | None:
    if text is None:
        return None
    in_percent = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%")) / (100 if in_percent else 1)
    except ValueError:
        value = float("nan")
    # Who writes 1 means 1 %, and would get no limit at all.
    if not 0 <= value <= 1 or (value == 1 and not in_percent):
        raise ConfigError(f"--max-accuracy-drop: must be 0%..100% or a share below 1, such as 0.01, got {text!r}")
    return value
