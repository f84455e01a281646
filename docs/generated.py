"""Pages that are made of the program when the documentation is built: commands, keys of files, committed runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import typer.main
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx

from autocompress.cli import app
from autocompress.config import RunConfig
from autocompress.space import BitsAxis, DropSpec, KeepAxis, RankAxis, Rule, SearchSpace, StudentSpec

FOLDER = "generated"
"""Beside the pages; git does not keep it."""


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _rows(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield key, default and meaning of each value."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        if (inner := _section_of(field.annotation)) is not None:
            yield from _rows(inner, f"{key}.")
            continue
        default = field.get_default(call_default_factory=True)
        yield key, "" if default is PydanticUndefined else _said(default), _meaning(field.description, field.annotation)


def _said(value: Any) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _meaning(description: str | None, annotation: Any) -> str:
    choices = [str(choice) for choice in get_args(annotation) if isinstance(choice, str)]
    parts = [description or "", f"one of {', '.join(choices)}" if len(choices) > 1 else ""]
    return "; ".join(part for part in parts if part)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def run_file() -> str:
    """Return the page of the run file's keys."""
    said = "`autocompress init --demo` writes a commented one; `--set key=value` sets any of them."
    return "\n".join(["# Keys of the run file", "", said, "", *_table(RunConfig), ""])


def _table(section: type[BaseModel]) -> Iterator[str]:
    yield "| key | default | meaning |"
    yield "|---|---|---|"
    for key, default, meaning in _rows(section):
        yield f"| `{key}` | {f'`{_cell(default)}`' if default else ''} | {_cell(meaning)} |"


def space_file() -> str:
    """Return the page of the keys of a search-space file."""
    said = (
        "`autocompress ls spaces` names those that are shipped. [Your own](../your-own.md) tells how one is written, "
        "[what a plan can decide](../options.md) what the choices do. A rule's key takes a list in place of `choices`."
    )
    lines = ["# Keys of a search space", "", said]
    for title, section in (
        ("The file", SearchSpace),
        ("Each of `rules`", Rule),
        ("`heads`, `neurons` and `vocabulary` of a rule", KeepAxis),
        ("`rank` of a rule", RankAxis),
        ("`bits` of a rule", BitsAxis),
        ("Each of `students`", StudentSpec),
        ("`drop_blocks`", DropSpec),
    ):
        lines += ["", f"## {title}", "", *_table(section)]
    return "\n".join([*lines, ""])


def _usage(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{(parameter.name or '').upper()}`"
    return f"`{', '.join([*parameter.opts, *parameter.secondary_opts])}`"


def commands() -> str:
    """Return the page of the commands and their options."""
    group: Any = typer.main.get_command(app)
    codes = "0 done, 1 an error in one line (`--debug` shows the traceback), 2 usage, 130 interrupted"
    said = f"`--json` prints JSON on stdout; what happens meanwhile goes to stderr. Exit codes: {codes}."
    lines = ["# Commands", "", said]
    for name, command in group.commands.items():
        lines += ["", f"## {name}", "", *_of_command(command)]
    return "\n".join([*lines, ""])


def _of_command(command: Any) -> Iterator[str]:
    yield (command.help or "").strip()
    yield ""
    for parameter in command.params:
        yield f"- {_usage(parameter)}: {(getattr(parameter, 'help', '') or '').strip()}"


def gallery(results: Path, folder: Path) -> str:
    """Return the page of committed runs, with their pictures copied into ``folder``."""
    lines = ["# Gallery", "", "Runs whose results are in the repository; each folder says how to make it again."]
    for run in sorted(found.parent for found in results.glob("*/front.png")):
        shutil.copyfile(run / "front.png", folder / f"{run.name}.png")
        said = (run / "README.md").read_text(encoding="utf-8").strip().splitlines()
        front = pd.read_csv(run / "pareto.csv")
        lines += ["", f"## {said[0].removeprefix('# ')}", "", f"![The front of {run.name}]({run.name}.png)", ""]
        lines += [f"{len(front)} points; as `results/{run.name}` in the repository, with the page as `report.html`."]
    return "\n".join([*lines, ""])


def write(app_: Sphinx) -> None:
    """Write the pages before they are read."""
    here = Path(app_.srcdir)
    folder = here / FOLDER
    folder.mkdir(exist_ok=True)
    pages = {"run-file": run_file(), "space-file": space_file(), "commands": commands()}
    pages["gallery"] = gallery(here.parent / "results", folder)
    for name, text in pages.items():
        file = folder / f"{name}.md"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def setup(app_: Sphinx) -> dict[str, bool]:
    """Let sphinx know."""
    app_.connect("builder-inited", write)
    return {"parallel_read_safe": True}
