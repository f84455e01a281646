"""The public surface: few names, all of them real, and nothing heavy loaded before it is used."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import pytest

import autocompress
from autocompress import errors

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "ray", "plotly", "transformers", "pandas", "optuna", "openvino", "onnx", "onnxruntime", "datasets")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, autocompress; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_reading_a_run_file_and_a_space_loads_nothing_heavy() -> None:
    code = (
        "import sys, autocompress as ac; ac.RunConfig.from_file('demo'); ac.SearchSpace.load('encoder-joint'); "
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_there_are_few_public_names_and_they_are_sorted() -> None:
    assert len(autocompress.__all__) <= 25
    assert len(set(autocompress.__all__)) == len(autocompress.__all__)
    assert autocompress.__all__ == sorted(autocompress.__all__)
    assert dir(autocompress) == sorted(autocompress.__all__)


@pytest.mark.parametrize("name", sorted(set(autocompress.__all__) - {"__version__"}))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(autocompress, name)
    assert callable(value)
    assert value.__doc__
    assert value.__name__ == name


def test_star_import_brings_exactly_the_public_names() -> None:
    code = "from autocompress import *; print(sorted(n for n in dir() if n == '__version__' or n[0] != '_'))"
    assert run_python(code) == str(sorted(autocompress.__all__))


def test_no_module_has_the_name_of_a_public_function() -> None:
    # Importing a submodule binds it in the package, where it would take the place of the function of its name.
    modules = {module.name for module in pkgutil.iter_modules(autocompress.__path__)}
    assert "plan" in modules
    assert not modules & set(autocompress.__all__)


def _imported(file: Path) -> set[str]:
    """Return the modules and folders of the package that a file imports when it is itself imported."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            package, *inside = node.module.split(".")
            if package == "autocompress":
                found |= {inside[0]} if inside else {alias.name for alias in node.names}
    return found - {"__version__"}


def test_modules_import_from_above_them_in_the_table_alone() -> None:
    root = Path(autocompress.__file__).parent
    text = (root.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| module | one job |") :].split("\n\n")[0].splitlines()[2:]
    rows = [re.findall(r"`([\w/.]+)`", line.split("|")[1]) for line in table]
    place = {name.removesuffix(".py").rstrip("/"): n for n, names in enumerate(rows) for name in names}
    files = [file for file in root.rglob("*.py") if file.name != "__init__.py"]
    assert len(files) > 80
    for file in files:
        own = file.relative_to(root).parts[0].removesuffix(".py")
        for other in _imported(file):
            assert place[other] <= place[own], f"{own} imports {other}, which stands below it"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'autocompress' has no attribute 'serach'"):
        _ = autocompress.serach


def test_the_version_is_that_of_the_distribution() -> None:
    assert autocompress.__version__ == version("autocompress")


def test_every_error_derives_from_ours_and_says_its_exit_code() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(classes) > 5
    for cls in classes:
        assert issubclass(cls, errors.AutocompressError)
        assert cls.exit_code == (2 if cls is errors.ConfigError else 1)
        assert cls.__doc__


@pytest.mark.parametrize(
    "path",
    [
        "py.typed",
        "demo/run.yaml",
        "demo/README.md",
        "demo/LICENSE-VADER.txt",
        "demo/movies.csv.gz",
        "demo/tweets.csv.gz",
        "report/page.css",
        "report/page.js",
    ],
)
def test_the_package_carries_its_data(path: str) -> None:
    assert resources.files("autocompress").joinpath(*path.split("/")).is_file()


def test_the_demo_data_keep_their_licence_and_citation() -> None:
    demo = resources.files("autocompress").joinpath("demo")
    assert "Copyright (c) 2016 C.J. Hutto" in demo.joinpath("LICENSE-VADER.txt").read_text(encoding="utf-8")
    readme = demo.joinpath("README.md").read_text(encoding="utf-8")
    assert "Hutto" in readme
    assert "ICWSM" in readme


def names_in(file: Path) -> set[str]:
    """Return the names of the tests in a file as pytest says them, without running it."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        names = (part.name for part in inner if isinstance(part, ast.FunctionDef) and part.name.startswith("test_"))
        found |= {f"{node.name}::{name}" if isinstance(node, ast.ClassDef) else name for name in names}
    return found


def test_the_tests_that_the_page_of_faults_names_are_there() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/test_\w+\.py)::((?:\w+::)?test_\w+)`", page)
    assert len(named) == page.count("tests/") > 50, "each is written as `tests/test_x.py::test_name`"
    there = {file: names_in(ROOT / file) if (ROOT / file).is_file() else set() for file, _ in named}
    missing = sorted({f"{file}::{name}" for file, name in named if name not in there[file]})
    assert not missing, f"docs/faults.md names tests that are not there: {', '.join(missing)}"


def test_the_page_of_faults_leaves_no_fault_out() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)]
    assert rows == list(range(1, 37)), "once each and in order"
