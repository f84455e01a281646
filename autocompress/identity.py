"""What must stay the same within a study, in words short enough to show a difference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from autocompress.binding import BoundSpace
from autocompress.config import OF_PICKED_POINTS, RunConfig
from autocompress.records import LATENCY_PROTOCOL
from autocompress.runtimes import get_runtime
from autocompress.space import SearchSpace, StudentSpec

_ROWS = ("calibration_rows", "reconstruction_rows")
"""Numbers of rows that weights are fitted to: with others a plan makes another model."""


def identity_of(run: RunConfig, *, model: str, data: str, space: BoundSpace) -> dict[str, Any]:
    """Return what a study is of: another model, task, space, target, guide or recovery needs another study."""
    choices = _choices_of(space.space)
    return {
        "model": model,
        "data": data,
        "rows": {name: getattr(run.data, name) for name in _ROWS},
        "seed": run.seed,  # of students, too; search.seed is that of proposals
        "space": f"{space.space.name} {hashlib.sha256(choices.encode()).hexdigest()[:12]}",
        "target": run.target.model_dump(),
        "objectives": run.told,
        "latency": LATENCY_PROTOCOL,
        **({"arithmetic": arithmetic} if (arithmetic := get_runtime(run.target.runtime).arithmetic) else {}),
        # Students depend on it; what concerns picked points only stands in their plans.
        "recovery": run.recovery.model_dump(exclude=set(OF_PICKED_POINTS)),
    }


def _choices_of(space: SearchSpace) -> str:
    """Return all that a space says, without what earlier versions did not know and it does not use."""
    unknown: dict[str, Any] = {name: True for name in ("max_tokens", "reconstruct") if getattr(space, name) is None}
    unknown["rules"] = {n: {"vocabulary"} for n, rule in enumerate(space.rules) if rule.vocabulary is None}
    later = StudentSpec().model_dump(include={"activation", "hidden", "share"})
    unknown["students"] = {
        name: {field for field, default in later.items() if getattr(spec, field) == default}
        for name, spec in space.students.items()
    }
    return space.model_dump_json(exclude=unknown)


def difference(stored: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Say in what two identities differ, or return None.

    Their schema is not compared, nor are numbers of rows and the seed where a study is from before they were told.
    """
    compared = {*stored, *found} - {"schema"} - ({"rows", "seed"} - stored.keys())
    names = (name for name in sorted(compared) if stored.get(name) != found.get(name))
    return "; ".join(f"{name}: {_brief(stored.get(name))} became {_brief(found.get(name))}" for name in names) or None


def _brief(value: object) -> str:
    text = json.dumps(value, sort_keys=True) if not isinstance(value, str) else value
    return text if len(text) <= 120 else text[:117] + "..."
