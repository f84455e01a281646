"""The fingerprint of machine and versions that is stored with every number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from autocompress import machine


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    yield
    machine.cpu.cache_clear()
    machine.versions.cache_clear()


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    code = "import json; from autocompress import machine; print(json.dumps(machine.fingerprint()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == machine.fingerprint()


def test_the_fingerprint_is_data_and_says_its_versions() -> None:
    found = machine.fingerprint()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["autocompress"] == metadata.version("autocompress")
    assert set(found["cpu"]) == {"name", "features", "cores"}
    assert found["cpu"]["name"]
    assert len(found["id"]) == 12


def test_the_id_is_of_the_cpu_and_not_of_how_much_of_it_we_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine.fingerprint()
    monkeypatch.setattr(machine, "cores", lambda: 1000)
    machine.cpu.cache_clear()
    after = machine.fingerprint()
    assert after["cpu"]["cores"] == 1000
    assert after["id"] == before["id"]
    monkeypatch.setattr(machine, "cpu", lambda: {**before["cpu"], "name": "another"})
    assert machine.fingerprint()["id"] != before["id"]
    monkeypatch.setattr(machine, "cpu", lambda: {**before["cpu"], "features": ["none"]})
    assert machine.fingerprint()["id"] != before["id"]


def test_cores_are_those_of_this_process() -> None:
    assert machine.cores() >= 1
    if hasattr(os, "sched_getaffinity"):
        assert machine.cores() == len(os.sched_getaffinity(0))


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PACKAGES", ("torch", "no-such-package-of-anybody"))
    machine.versions.cache_clear()
    assert set(machine.versions()) == {"python", "torch"}


def test_without_cpuinfo_there_is_still_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def __init__(self, _: str) -> None:
            pass

        def read_text(self, **_: object) -> str:
            raise FileNotFoundError

    monkeypatch.setattr(machine, "Path", Gone)
    machine.cpu.cache_clear()
    found = machine.cpu()
    assert found["name"]
    assert found["features"] == []


_ARM = "processor\t: {n}\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU variant\t: 0x0\nCPU part\t: {part}\n\n"


def test_arm_machines_of_two_kinds_have_two_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_cores(*parts: str, board: str = "") -> dict[str, Any]:
        text = "".join(_ARM.format(n=n, part=part) for n, part in enumerate(parts))
        monkeypatch.setattr(machine, "Path", lambda _: SimpleNamespace(read_text=lambda **_: text + board))
        monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
        monkeypatch.setattr(machine.platform, "processor", lambda: "")
        machine.cpu.cache_clear()
        return machine.fingerprint()

    alike = [with_cores("0xd08", "0xd08"), with_cores("0xd08")]
    assert alike[0]["cpu"]["name"] == "aarch64, 0x41 0xd08 0x0"
    assert alike[0]["id"] == alike[1]["id"], "some of its cores are the same CPU"
    other = with_cores("0xd0b", "0xd05", board="Model\t\t: Board of Somebody 5\n")
    assert other["cpu"]["name"] == "aarch64, Board of Somebody 5, 0x41 0xd05 0x0, 0x41 0xd0b 0x0"
    assert other["id"] != alike[0]["id"]


@pytest.mark.parametrize(
    ("kind", "features", "expected"),
    [
        ("x86_64", ["avx2"], True),
        ("x86_64", ["avx2", "avx512f"], True),
        ("x86_64", ["avx2", "avx512f", "avx512_vnni"], False),
        ("AMD64", ["avx2", "avx_vnni"], False),
        ("aarch64", [], False),
    ],
)
def test_sums_of_eight_bit_products_overflow_without_vnni(
    monkeypatch: pytest.MonkeyPatch, kind: str, features: list[str], expected: bool
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: kind)
    monkeypatch.setattr(machine, "cpu", lambda: {"name": "any", "features": features, "cores": 1})
    assert machine.adds_in_16_bits() is expected
    assert 2 * 255 * 64 < 2**15 <= 2 * 255 * 127, "why 7 bits do"
