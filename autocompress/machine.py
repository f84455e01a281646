"""The machine and the versions that gave a number."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_SUMS_IN_32_BITS = {"avx512_vnni", "avx_vnni", "amx_int8"}
_PACKAGES = ("autocompress", "torch", "transformers", "openvino", "onnxruntime", "onnx", "optuna", "ray", "numpy")

_ROOM = 2**20
"""Bytes that a disk which is not full has room for."""


@cache
def cpu() -> dict[str, Any]:
    """Return the CPU's name, its instruction sets that matter here, and the cores that this process may use."""
    try:
        known = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    except OSError:
        known = []
    said: dict[str, list[str]] = {}
    for key, _, value in known:
        said.setdefault(key.strip(), []).append(value.strip())
    name = said.get("model name", [""])[0] or platform.processor() or platform.machine()
    if "model name" not in said and "CPU part" in said:  # Arm says the maker's numbers of each core, and the board
        numbers = (said.get(key, []) for key in ("CPU implementer", "CPU part", "CPU variant"))
        kinds = sorted({" ".join(numbers) for numbers in zip(*numbers, strict=False)})
        name = ", ".join([platform.machine(), *said.get("Model", []), *kinds])
    flags = set(said.get("flags", [""])[0].split())
    return {"name": name, "features": [flag for flag in _FLAGS if flag in flags], "cores": cores()}


def adds_in_16_bits(about: Mapping[str, Any] | None = None) -> bool:
    """Say whether a CPU adds pairs of 8-bit products in 16 bits, which overflow.

    So do x86 CPUs without VNNI (``vpmaddubsw``): two products of 255 and 127 do not fit, two of 255 and 64 do.

    Args:
        about: the fingerprint of a machine, by default this one's.
    """
    about = fingerprint() if about is None else about
    return about["system"].endswith(("x86_64", "AMD64")) and not has_vnni(about)


def has_vnni(about: Mapping[str, Any] | None = None) -> bool:
    """Say whether a CPU is an x86 one that adds products of 8 bits in 32.

    Args:
        about: the fingerprint of a machine, by default this one's.
    """
    features = cpu()["features"] if about is None else about["cpu"]["features"]
    return not _SUMS_IN_32_BITS.isdisjoint(features)


def has_bfloat16() -> bool:
    """Say whether this CPU multiplies bfloat16 natively, where it is faster than float32."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu()["features"])


def waited_seconds() -> float:
    """Return how long the threads of this process have stood ready without a core; 0 where the system does not say."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(file.read_text(encoding="ascii").split()[1])
        except (OSError, LookupError, ValueError):  # the thread has ended, or another kernel writes something else
            continue
    return total / 1e9


def without_room(folders: Iterable[Path]) -> Path | None:
    """Return the first folder that nothing more can be written in, since its disk is full; None if there is none.

    Asked of the disk and not of an error: libraries say it in words of their own.
    """
    for folder in folders:
        try:
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(_ROOM))
                probe.flush()
        except OSError as full:
            if full.errno in (errno.ENOSPC, errno.EDQUOT):
                return folder
    return None


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def versions() -> dict[str, str]:
    """Return the installed versions of what can change a number."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def fingerprint() -> dict[str, Any]:
    """Return machine and versions, with ``id`` over what latencies depend on."""
    about = {"cpu": cpu(), "system": f"{platform.system()} {platform.machine()}", "versions": versions()}
    key = {"cpu": {k: v for k, v in cpu().items() if k != "cores"}, "system": about["system"]}
    return {**about, "id": hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}
