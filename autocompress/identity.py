"""What must stay the same within a study, in words short enough to show a difference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autocompress.binding import BoundSpace
from autocompress.config import OF_PICKED_POINTS, RunConfig
from autocompress.errors import StudyError, quoted
from autocompress.records import LATENCY_PROTOCOL
from autocompress.runtimes import get_runtime
from autocompress.space import SearchSpace, StudentSpec

STUDY_SCHEMA = 1
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


class Identity:
    """What a study says that it is of, and whether what is here now goes with it.

    Args:
        stored: as it was written when the study began, by `identity_of`; None where nothing was.
        run: the resolved run file.
        folder: the results folder.
    """

    def __init__(self, stored: Mapping[str, Any] | None, run: RunConfig, folder: Path) -> None:
        self._stored = stored
        self._run = run
        self._folder = folder

    def require_known(self, where: str) -> None:
        """Raise `StudyError` if ``where`` holds a study of another version, which cannot be read."""
        if self._stored is not None and self._stored.get("schema") != STUDY_SCHEMA:
            raise StudyError(f"{where}: schema must be {STUDY_SCHEMA}, got {self._stored.get('schema')!r}")

    def require_current(self, where: str) -> None:
        """Raise `StudyError` if what this version measures is not to be mixed with what the study ``where`` holds."""
        if self._stored is not None and self._stored.get("latency") != LATENCY_PROTOCOL:
            raise StudyError(
                f"{where}: is of a version that took latencies otherwise, which are not mixed with new ones; it can be "
                f"read and exported from, and {self._retarget} measures its front anew"
            )
        if self.outdated is not None:
            raise StudyError(f"{where}: {self.outdated}")

    def require_same(self, where: str, found: Mapping[str, Any]) -> None:
        """Raise `StudyError` unless the study ``where`` is of what was found here."""
        if self._stored is None or not (changes := difference(self._stored, found)):
            return
        moved = self._stored.get("machine") != found.get("machine")
        hint = f"; {self._retarget} measures its front here" if moved else ""
        raise StudyError(f"{where}: this study was made with other settings ({changes}); use another --out{hint}")

    def require_data(self, fingerprint: str) -> None:
        """Raise `StudyError` unless rows of this fingerprint are those that the study was scored on."""
        stored = str((self._stored or {}).get("data", fingerprint))
        if stored.partition(",")[0] != fingerprint:
            raise StudyError(
                f"data: {self._run.data.called}: holds other rows than those that {self._folder} was scored on; bring "
                "these back, or search anew"
            )

    def is_of_model(self, base: str) -> bool:
        """Return whether a model of this content key is the one that the study compresses."""
        return str((self._stored or {}).get("model", base)) == base

    def require_model(self, base: str) -> None:
        """Raise `StudyError` unless `is_of_model`."""
        if not self.is_of_model(base):
            raise StudyError(
                f"model: {self._run.model.id}: is not the one that {self._folder} compresses; bring that back (a "
                "classifier that a search has fine-tuned lies in its bank), or search anew"
            )

    def require_machine(self, machine: str) -> None:
        """Raise `StudyError` unless the study's latencies were measured on a machine of this id."""
        if str((self._stored or {}).get("machine", machine)) != machine:
            raise StudyError(
                f"{self._folder}: its latencies are of another machine, and are not mixed with this one's; "
                f"{self._retarget} measures its front here"
            )

    @property
    def outdated(self) -> str | None:
        """Why what is built now is not comparable with what was scored, or None; see `Runtime.arithmetic`."""
        runtime, stored = self._run.target.runtime, self._stored or {}
        of_it = stored.get("target", {}).get("runtime") == runtime
        if not of_it or stored.get("arithmetic", "") == get_runtime(runtime).arithmetic:
            return None
        return (
            f"is of a version that computed otherwise with {runtime}, so that nothing is added to it or exported from "
            f"it; it can be read, and {self._retarget} scores its front anew"
        )

    @property
    def _retarget(self) -> str:
        return f"autocompress retarget {quoted(self._folder)} -o NEW"
