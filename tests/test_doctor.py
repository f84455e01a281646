"""What is here to work with, and what adds what is missing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from autocompress import __version__, doctor, machine


def test_doctor_says_what_is_here(caches: Path) -> None:
    found = doctor.examine()
    assert found["cpu"]["cores"] >= 1
    assert found["versions"]["autocompress"] == __version__
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["runtimes"]["openvino"] == "ready"
    assert found["bank"] == str(caches / "autocompress" / "bank")
    assert set(found["good at"]) == {"8-bit integers", "bfloat16"}
    assert found["parts"]["demo model"] == "ready"
    assert re.fullmatch(r"\d+\.\d GB of disk", found["free"]["results"])
    assert re.fullmatch("[0-9a-f]{12}", found["id"])


def test_doctor_says_what_adds_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    parts = doctor.parts()
    assert parts["studies in PostgreSQL"] == 'missing; run: pip install "autocompress[postgresql]"'


@pytest.mark.parametrize(("features", "said"), [(["avx2"], "without VNNI"), (["avx2", "avx_vnni"], "native")])
def test_doctor_says_what_the_cpu_does_with_few_bits(
    monkeypatch: pytest.MonkeyPatch, features: list[str], said: str
) -> None:
    about = {**machine.fingerprint(), "system": "Linux x86_64", "cpu": {**machine.cpu(), "features": features}}
    monkeypatch.setattr(machine, "fingerprint", lambda: about)
    monkeypatch.setattr(machine, "cpu", lambda: about["cpu"])
    found = doctor.advice()
    assert found["8-bit integers"].startswith(said)
    assert found["bfloat16"].startswith("not native")
