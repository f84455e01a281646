"""The documentation: it builds without a warning, and what it shows runs, with a tiny model and few candidates."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from autocompress.config import RunConfig
from autocompress.space import SearchSpace

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))

FEW = (
    "--set search.trials=5 --set search.latency_pairs=2 --set search.confirm_pairs=2 --set data.search_rows=60 "
    "--set data.calibration_rows=32 --set space=encoder-small"
)
SHELL = r"""
set -euo pipefail
autocompress() {
  case "$1" in
    search | plan | validate) python -m autocompress.cli "$@" $FEW ;;
    recover) python -m autocompress.cli "$@" --epochs 0.1 ;;
    *) python -m autocompress.cli "$@" ;;
  esac
}
"""
"""What the commands of a page are run with, so that they take seconds."""


def blocks(page: str, kind: str) -> list[str]:
    """Return the fenced blocks of a kind on a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path, **more: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path} | more, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def shell(page: str, folder: Path, few: str = FEW) -> str:
    commands = blocks(page, "sh")
    assert commands
    return run(["bash", "-c", SHELL + "".join(commands)], folder, FEW=few)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, bert_headed_folder: Path, tiny_csv: Path) -> tuple[Path, str]:
    """The folder in which the quickstart was gone through, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    tiny = f"--model {bert_headed_folder} --data {tiny_csv} --set data.max_tokens=16 --set target.tokens=16"
    return folder, shell("quickstart.md", folder, f"{FEW} {tiny}")


@pytest.mark.slow
def test_the_quickstart_runs(quick: tuple[Path, str]) -> None:
    folder, said = quick
    assert (folder / "results" / "demo" / "report.html").is_file()
    assert len([line for line in said.splitlines() if re.fullmatch(r"(negative|positive)\t0\.\d+\t.+", line)]) == 2
    assert "recovered 0.1 epochs" in said


@pytest.mark.slow
def test_what_is_said_of_a_model_and_data_of_ones_own_runs(
    tmp_path: Path, bert_headed_folder: Path, tiny_csv: Path
) -> None:
    shutil.copytree(bert_headed_folder, tmp_path / "my-model")
    shutil.copyfile(tiny_csv, tmp_path / "reviews.csv")
    shell("your-own.md", tmp_path)
    assert (tmp_path / "mine" / "README.md").is_file()


def test_what_readme_shows_is_shown_on_pages_that_are_run() -> None:
    pages = {
        line for page in ("quickstart.md", "your-own.md") for block in blocks(page, "sh") for line in block.splitlines()
    }
    shown = [line.split(" && ")[-1] for block in blocks("../README.md", "sh") for line in block.splitlines()]
    assert len(shown) > 5
    assert {line for line in shown if line.startswith("autocompress ")} <= pages
    [program] = blocks("../README.md", "python")
    assert any(set(program.splitlines()) <= set(block.splitlines()) for block in blocks("python.md", "python"))


@pytest.mark.slow
def test_the_python_examples_run(tmp_path: Path, quick: tuple[Path, str], tiny_run: Callable[..., RunConfig]) -> None:
    shutil.copytree(quick[0] / "results", tmp_path / "results")
    (tmp_path / "run.yaml").write_text(tiny_run(["name=from-python"]).to_yaml(), encoding="utf-8")
    said = [run([sys.executable, "-c", block], tmp_path) for block in blocks("python.md", "python")]
    assert (tmp_path / "smallest" / "measurement.json").is_file()
    assert "latency_ratio" in said[-1]


@pytest.mark.parametrize("block", blocks("your-own.md", "yaml"))
def test_a_whole_space_on_a_page_can_be_loaded(tmp_path: Path, block: str) -> None:
    (tmp_path / "space.yaml").write_text(block, encoding="utf-8")
    assert SearchSpace.load(str(tmp_path / "space.yaml")).rules


@pytest.mark.parametrize("block", blocks("options.md", "yaml"))
def test_a_part_of_a_space_on_a_page_is_valid(block: str) -> None:
    part = yaml.safe_load(block)
    content = {"rules": part} if isinstance(part, list) else part
    assert SearchSpace.model_validate({"schema": 1, "name": "part", **content})


def test_every_option_of_a_space_is_on_its_page() -> None:
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    names = {*SearchSpace.model_fields, *RunConfig.model_fields["recovery"].default_factory().model_dump()}  # type: ignore[misc]
    for name in names - {"schema_version", "name", "description", "rules", "learning_rate", "batch_size", "precision"}:
        assert f"`{name}`" in text, name


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(DOCS, docs, ignore=shutil.ignore_patterns("generated", "_build"))
    (tmp_path / "results").symlink_to(ROOT / "results")
    run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", "site"], tmp_path)
    for page in ("index", "quickstart", "options", "generated/commands", "generated/run-file", "generated/gallery"):
        assert (tmp_path / "site" / f"{page}.html").stat().st_size > 1000
    commands = (tmp_path / "site" / "generated" / "commands.html").read_text(encoding="utf-8")
    assert "--push-to-hub" in commands
    keys = (tmp_path / "site" / "generated" / "run-file.html").read_text(encoding="utf-8")
    assert "search.trials" in keys
    keys = (tmp_path / "site" / "generated" / "space-file.html").read_text(encoding="utf-8")
    assert all(key in keys for key in ("drop_blocks", "vocabulary", "choices", "tie", "share"))


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 2


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_stands_as_it_was_run(notebook: Path) -> None:
    cells = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert "error" not in kinds
    assert "execute_result" in kinds
    assert str(Path.home()) not in notebook.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, bert_headed_folder: Path, tiny_csv: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    content = nbformat.read(notebook, as_version=4)
    few = ["search.trials=6", "search.latency_pairs=2", "search.confirm_pairs=2", "data.search_rows=60"]
    few += ["data.calibration_rows=32", "data.max_tokens=16", "target.tokens=16"]
    few += [f"model.id={bert_headed_folder}", f"data.source={tiny_csv}"]
    instead = ", ".join(json.dumps(setting) for setting in few)
    for cell in content.cells:
        cell.source = re.sub(r'"search\.trials=\d+"', lambda _: instead, cell.source)
    NotebookClient(content, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
