"""The program beside an exported model: whole for each runtime, and free of this package."""

from __future__ import annotations

import ast

import pytest

from autocompress.report.script import predict_script
from autocompress.runtimes import RUNTIMES


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("runtime", [*RUNTIMES, "torch"])
def test_it_imports_the_runtime_and_little_else(runtime: str, fast: bool) -> None:
    tree = ast.parse(predict_script(runtime, fast=fast))
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert plain | parts == {"json", "sys", "pathlib", "numpy", runtime, "tokenizers" if fast else "transformers"}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not {"PACKAGE", "LOAD", "RUN", "INPUTS", "SILENTLY"} & names, "every mark was replaced"
