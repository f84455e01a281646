"""Fresh processes: they find what this one finds, and nothing of the folder that they are started in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from autocompress import fresh

NAME = "lies_about"


def found(folder: Path) -> bool:
    command, environment = fresh.python("-c", f"import {NAME}")
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, check=False).returncode == 0


def test_modules_are_those_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{NAME}.py").touch()
    plain = subprocess.run([sys.executable, "-c", f"import {NAME}"], cwd=tmp_path, capture_output=True, check=False)
    assert plain.returncode == 0, "where nothing is done it is found"
    assert not found(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert found(tmp_path.parent)
