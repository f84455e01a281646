"""What is done with an exported folder alone: it is timed, against the stand-in of the reference if it carries one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autocompress import machine, slot, timing
from autocompress.calm import Calm
from autocompress.config import TargetConfig
from autocompress.errors import ConfigError, ExportError, first_line
from autocompress.parcel import MEASUREMENT
from autocompress.plan import CompressionPlan
from autocompress.records import Measurement
from autocompress.runtimes import Artifact, get_runtime

MEASUREMENT_SCHEMA = 3
"""Version of what `MEASUREMENT` holds."""
FORMATS = {"openvino": "openvino", "onnx": "onnxruntime"}
"""Export format to the runtime that builds and runs it."""
UNPACKED = {"hf": "transformers", "torch": "torch"}
"""Export format to what runs it: PyTorch, which unpacks the stored weights and multiplies floats."""
CONFIRMING_PAIRS = 20
"""Blocks of runs that confirm an exported latency: more than a search takes, and nothing beside."""
_LOADS, _MOST_PAIRS = 4, 10_000


def measure(folder: Path, *, pairs: int) -> dict[str, Any]:
    """Time an exported folder against its reference; see `autocompress.measure`."""
    if not _LOADS <= pairs <= _MOST_PAIRS:
        raise ConfigError(
            f"measure: pairs must be >= {_LOADS}, one for each time that both are loaded, and <= {_MOST_PAIRS}, "
            f"got {pairs}"
        )
    try:
        about = json.loads((folder / MEASUREMENT).read_text(encoding="utf-8"))
        by_pytorch = about.get("runtime") in UNPACKED.values()
        stored = None if by_pytorch else Measurement.from_json(json.dumps(about["search"]))
        # Exports of before do not have it.
        calm = Calm(**about["calm"]) if about.get("calm") else None
        target = TargetConfig(**about["target"])
        vocabulary = int(about["vocabulary"])
        names = tuple(about["inputs"]) if by_pytorch else ()
        inputs = timing.inputs_of(names, target, vocabulary, 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{folder / MEASUREMENT}: cannot be read ({first_line(error)}); give a folder that export wrote, with this "
            "version"
        ) from None
    if about.get("schema") != MEASUREMENT_SCHEMA:
        raise ExportError(
            f"{folder / MEASUREMENT}: schema must be {MEASUREMENT_SCHEMA}, got {about.get('schema')!r}, of a "
            "version that took latencies otherwise: export the trial again"
        )
    if stored is None:
        return _time_in_pytorch(folder, about["runtime"], inputs, target, pairs)
    artifact = Artifact.open(folder)
    # Exports of before do not say where they were built: where they were measured, unless that was on a device.
    require_same_sums(artifact.plan, about.get("built_on", stored.fingerprint), str(folder))
    here = machine.fingerprint()
    same_machine = here["id"] == stored.fingerprint.get("id")
    reference_ms = stored.reference_ms if same_machine else None
    latest = time_against_stand_in(artifact, target, vocabulary, pairs, reference_ms=reference_ms)
    timed = dataclasses.replace(stored, **latest.fields())
    if same_machine:  # to the pace, and with the drift, that are known of it
        timed = (timed if calm is None else calm.adjust(timed)).drifting(stored.latency_drift)
    in_search = about.get("latency_ratio_in_search")  # none where another runtime was searched with
    taken = ("latency_ms", "latency_p90_ms", "reference_ms", "latency_ratio", "latency_ratio_low", "latency_ratio_high")
    return {
        **{name: getattr(timed, name) for name in taken},
        "latency_adjusted": timed.latency_adjusted,
        "stored_latency_ratio": stored.latency_ratio,
        "difference": timed.latency_ratio / stored.latency_ratio - 1,
        **({} if in_search is None else {"latency_ratio_in_search": in_search}),
        "size_bytes": artifact.size_bytes,
        "target": target.model_dump(),
        "machine": here,
        "same_machine": same_machine,
    }


def require_same_sums(plan: CompressionPlan, built_on: Mapping[str, Any], what: str) -> None:
    """Refuse what computes something else on this CPU than on the one that it was built and scored on.

    Args:
        plan: of the artefact.
        built_on: fingerprint of the machine.
        what: it is, for the message.

    Raises:
        ExportError: if sums would overflow here.
    """
    overflows = plan.integer_arithmetic and machine.adds_in_16_bits() and "system" in built_on
    if overflows and not machine.adds_in_16_bits(built_on):
        raise ExportError(
            f"{what}: was built on a CPU that adds 8-bit products in 32 bits; this one adds them in 16, which "
            "overflow: the model computes something else here; search and export on a CPU of this kind"
        )


def require_same_numbers(plan: CompressionPlan, built_on: Mapping[str, Any], what: str) -> None:
    """Refuse to make again here what has other numbers, or rounds otherwise, where it was built and scored.

    Args:
        plan: of the artefact.
        built_on: fingerprint of that machine.
        what: it is, for the message.

    Raises:
        ExportError: if CPUs of its kind and of this one multiply 8-bit numbers in different ways.
    """
    if not plan.narrow or "system" not in built_on:
        return
    if any(ask() != ask(built_on) for ask in (machine.adds_in_16_bits, machine.has_vnni)):
        raise ExportError(
            f"{what}: was scored on a CPU that multiplies 8-bit numbers otherwise, for which weights are rounded in "
            "another way than for this one; export on a CPU of that kind"
        )


def _time_in_pytorch(
    folder: Path, runner: str, inputs: Mapping[str, np.ndarray], target: TargetConfig, pairs: int
) -> dict[str, Any]:
    """Time what PyTorch runs. There is nothing beside it to hold that against."""
    import torch

    from autocompress.hf.reload import read

    before = torch.get_num_threads()
    torch.set_num_threads(target.threads)
    try:
        try:
            session = timing.ready(read(folder, runner), inputs)
        # Whatever torch and transformers raise is about the files.
        except Exception as error:
            raise ExportError(f"{folder}: cannot be read ({first_line(error)}); export the trial again") from None
        clock = timing.clock_of(target)
        with slot.timing():
            seconds = np.concatenate([timing.block(session, inputs, clock).seconds for _ in range(pairs)])
    finally:
        torch.set_num_threads(before)
    p50, p90 = np.quantile(seconds, (0.5, 0.9)) * 1e3
    return {
        "latency_ms": float(p50),
        "latency_p90_ms": float(p90),
        "target": target.model_dump() | {"runtime": "torch"},
        "machine": machine.fingerprint(),
    }


def time_against_stand_in(
    artifact: Artifact, target: TargetConfig, vocabulary: int, pairs: int, *, reference_ms: float | None = None
) -> timing.Latency:
    """Time an exported artefact in turn with the reference in its folder.

    Args:
        artifact: as exported.
        target: that it was built for.
        vocabulary: number of token ids.
        pairs: of blocks; there are more where some were disturbed.
        reference_ms: what the reference took on this machine, where that is known.
    """
    runtime, reference = get_runtime(artifact.runtime), Artifact.open(artifact.folder / "reference")
    inputs, clock = timing.inputs_of(artifact.inputs, target, vocabulary, 0), timing.clock_of(target)
    # A loaded model's speed depends a little on where its memory came to lie: load both anew for each share of pairs.
    times, pace = list[list[timing.Pair]](), timing.Pace(target.threads)
    if reference_ms is not None:
        pace.note(reference_ms / 1e3)
    shares = [pairs // _LOADS + (number < pairs % _LOADS) for number in range(_LOADS)]
    while count := shares.pop(0) if shares else min(pairs // _LOADS, pace.missing(times, pairs, pairs)):
        ours, beside = (timing.ready(runtime.load(each, target), inputs) for each in (artifact, reference))
        times.append(timing.paired_times(ours, beside, inputs, pairs=count, clock=clock, before=pace.quiet(times)))
        for pair in times[-1]:
            pace.note(pair.beside)
    return timing.summarize(pace.undisturbed(times), seed=0)
