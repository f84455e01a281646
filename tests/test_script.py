"""The program beside an exported model: whole for each runtime, and free of this package."""

from __future__ import annotations

import ast

import pytest

from autocompress.report.script import predict_script
from autocompress.runtimes import RUNTIMES


@pytest.mark.parametrize("runtime", [*RUNTIMES, "torch"])
def test_it_imports_the_runtime_and_little_else(runtime: str) -> None:
    tree = ast.parse(predict_script(runtime))
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert plain | parts == {"json", "sys", "pathlib", "numpy", "tokenizers", runtime}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not {"PACKAGE", "LOAD", "RUN", "INPUTS"} & names, "every mark was replaced"
