"""The model card that travels with an exported folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from autocompress import machine
from autocompress.config import RunConfig
from autocompress.hub import published_name
from autocompress.records import Candidate, Drop, Measurement
from autocompress.report.script import needs_of
from autocompress.report.tables import drop_words, one_line

if TYPE_CHECKING:
    from autocompress.scoring import Accuracy


_LATENCY, _RATIO, _AS = "Latency", "Latency over the uncompressed model's", "Measured as"
_OF_TIMES = (_LATENCY, _RATIO, _AS)


def _public(source: str) -> str:
    """Return what a card calls a model or data: of a path on this machine its last part alone."""
    path = Path(source).expanduser()
    return f"{path.name} (local)" if path.exists() else source


def model_card(
    candidate: Candidate,
    run: RunConfig,
    runtime: str,
    measured: Measurement,
    test: Accuracy,
    test_drop: Drop,
    agreement: float,
    *,
    data: str,
    built_on: Mapping[str, Any],
    timed: bool = True,
    fast: bool = True,
) -> str:
    """Return Markdown with YAML front matter; every number comes from the arguments.

    ``data`` is the fingerprint of all rows, splits and classes, ``built_on`` that of the machine on which it predicts
    as it was scored, where another one may have timed it. Without ``timed`` the latency is another file's, and is left
    out. ``fast`` is the tokenizer that is not Python's.
    """
    about = {"library_name": "autocompress", "pipeline_tag": "text-classification"}
    if (base := published_name(run.model.id)) is not None:
        about["base_model"] = base
    front_matter = yaml.safe_dump(about, sort_keys=False)
    target = run.target
    cpu = measured.fingerprint.get("cpu", {}).get("name", "unknown CPU")
    versions = measured.fingerprint.get("versions", {})
    said = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    rows = [
        ("Accuracy, search split", _percent(measured.accuracy, measured.accuracy_low, measured.accuracy_high)),
        ("Accuracy, held-out test split", _percent(test.value, test.low, test.high) + f", {test.rows} rows"),
        ("Accuracy lost, held-out test split", drop_words(test_drop)),
        ("Selection optimism", f"{(measured.accuracy - test.value) * 100:+.2f} points (search split minus test split)"),
        ("Size", f"{measured.size_bytes / 1e6:.2f} MB"),
        (_LATENCY, f"{measured.latency_ms:.2f} ms median, {measured.latency_p90_ms:.2f} ms 90th percentile"),
        (
            _RATIO,
            f"{measured.latency_ratio:.3f} [{measured.latency_ratio_low:.3f}, {measured.latency_ratio_high:.3f}]",
        ),
        (_AS, f"{runtime}, {target.threads} thread(s), {target.batch_size} x {target.tokens} tokens"),
        ("Measured on", cpu),
        ("Versions", said),
        ("Same predictions as the study's candidate", f"{agreement * 100:.1f} % of the search rows"),
        ("Model", _public(run.model.id)),
        ("Data, fingerprint of its rows", f"{_public(run.data.called)}, {data}"),
        ("Seed", str(run.seed)),
        ("Trial, plan", f"{candidate.number}, {candidate.plan.plan_id}"),
    ]
    if timed and candidate.plan.integer_arithmetic and not machine.adds_in_16_bits(built_on):
        rows.append(("Not for", "x86 CPUs without VNNI, where sums of 8-bit products overflow and predictions change"))
    if not timed:
        rows = [row for row in rows if row[0] not in _OF_TIMES]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    plan = json.dumps(json.loads(candidate.plan.to_json()), indent=1)
    return (
        f"---\n{front_matter}---\n\n# {_cell(run.name)}: {_cell(candidate.plan.words())}\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f'`python predict.py "a text"` runs it, with {needs_of(runtime, fast=fast)} alone.\n\n'
        f"## Plan\n\n```json\n{plan}\n```\n"
    )


def _percent(value: float, low: float, high: float) -> str:
    return f"{value * 100:.2f} % [{low * 100:.2f}, {high * 100:.2f}]"


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")
