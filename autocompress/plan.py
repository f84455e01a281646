"""What is to be done to a model: decisions per site, collected in a plan with a canonical form.

A plan is data. It is made by a search space (`space.py`), carried out by the transforms and a runtime, and its
``plan_id`` is part of every cache key. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from autocompress.decisions import DECISIONS, Decision, Quantize, Recover, Student
from autocompress.errors import PlanError

PLAN_SCHEMA = 1
MODEL_SITE = "model"
"""Site name of decisions that concern the whole model."""

D = TypeVar("D", bound=Decision)
_ORDER = {name: position for position, name in enumerate(DECISIONS)}


@dataclass(frozen=True)
class CompressionPlan:
    """Decisions in canonical order: the whole model's first, then by site, each in order of application.

    Args:
        decisions: pairs of site name and decision; one of each type at a site at most.

    Raises:
        PlanError: if a type occurs twice at a site, or a decision stands at a site of the wrong scope.
    """

    decisions: tuple[tuple[str, Decision], ...] = ()

    def __post_init__(self) -> None:
        seen: set[tuple[str, str]] = set()
        for site, decision in self.decisions:
            key = (site, type(decision).__name__)
            if key in seen:
                raise PlanError(f"plan: {key[1]} is decided twice at site {site}")
            if (decision.scope == "model") != (site == MODEL_SITE):
                raise PlanError(f"plan: {key[1]} belongs to the {decision.scope}, not to site {site!r}")
            seen.add(key)
        ordered = sorted(
            self.decisions, key=lambda d: (d[0] != MODEL_SITE, _natural(d[0]), _ORDER[type(d[1]).__name__])
        )
        object.__setattr__(self, "decisions", tuple(ordered))

    def __bool__(self) -> bool:
        return bool(self.decisions)

    def __iter__(self) -> Iterator[tuple[str, Decision]]:
        return iter(self.decisions)

    def of_type(self, kind: type[D]) -> dict[str, D]:
        """Return the decisions of one type by site name."""
        return {site: decision for site, decision in self.decisions if isinstance(decision, kind)}

    @property
    def integer_arithmetic(self) -> bool:
        """Whether any site multiplies 8-bit weights by 8-bit activations."""
        return any(decision.activation_bits == 8 for decision in self.of_type(Quantize).values())

    @property
    def narrow(self) -> dict[str, Quantize]:
        """The decisions of 8 or fewer bits a weight, by site."""
        return {site: decision for site, decision in self.of_type(Quantize).items() if decision.weight_bits <= 8}

    def structural(self) -> CompressionPlan:
        """Return the part that changes the torch module, without what the runtime does."""
        return CompressionPlan(tuple((s, d) for s, d in self.decisions if d.structural))

    @property
    def trained(self) -> bool:
        """Whether the model is trained after all structural decisions."""
        return any(recovery.epochs for recovery in self.of_type(Recover).values())

    @property
    def reconstructible(self) -> bool:
        """Whether something was removed that least squares could make up for, from blocks that are run once."""
        students = self.of_type(Student).values()
        return bool(self.without(Student, Recover).structural()) and all(s.share == 1 for s in students)

    def without(self, *kinds: type[Decision]) -> CompressionPlan:
        """Return the plan without decisions of these types."""
        return CompressionPlan(tuple((s, d) for s, d in self.decisions if not isinstance(d, kinds)))

    def with_decision(self, site: str, decision: Decision) -> CompressionPlan:
        """Return this plan with one more decision, in place of one of the same type at that site."""
        kept = tuple((s, d) for s, d in self.decisions if s != site or type(d) is not type(decision))
        return CompressionPlan((*kept, (site, decision)))

    def recovered(self, wanted: Recover) -> CompressionPlan:
        """Return this plan with a recovery at its end, less what there is no use for.

        Between the blocks of a narrower student there is nothing to compare with the teacher's, blocks that are run
        several times are not reconstructed, and weights of 16 bits are not worth rounding while they are trained. What
        was reconstructed is so again.

        Raises:
            PlanError: if nothing is left of it.
        """
        if any(before.reconstruct for before in self.of_type(Recover).values()):
            wanted = dataclasses.replace(wanted, reconstruct=True)
        for student in self.of_type(Student).values():
            if student.hidden:
                wanted = dataclasses.replace(wanted, hidden=0.0)
            if student.share > 1:
                wanted = dataclasses.replace(wanted, reconstruct=False)
        if not self.narrow:
            wanted = dataclasses.replace(wanted, quantized=False)
        return self.with_decision(MODEL_SITE, wanted)

    @functools.cached_property
    def plan_id(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        entries = [{"site": site, **decision.to_dict()} for site, decision in self.decisions]
        return json.dumps({"schema": PLAN_SCHEMA, "decisions": entries}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Read a plan.

        Raises:
            PlanError: on malformed JSON, another schema version, or unknown decisions and fields.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"plan: not JSON ({error})") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: object) -> CompressionPlan:
        """Read a plan from parsed JSON.

        Raises:
            PlanError: on another schema version, or unknown decisions and fields.
        """
        if not isinstance(data, dict) or data.get("schema") != PLAN_SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise PlanError(f"plan: schema must be {PLAN_SCHEMA}, got {found!r}")
        entries = data.get("decisions")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise PlanError("plan: decisions must be a list of objects")
        return cls(tuple(_read_decision(entry) for entry in entries))

    def words(self) -> str:
        """Say the plan in one line; equal decisions of several blocks are said once."""
        if not self.decisions:
            return "uncompressed"
        parts = [decision.words() for site, decision in self.decisions if site == MODEL_SITE]
        by_site: dict[str, list[str]] = {}
        for site, decision in self.decisions:
            if site != MODEL_SITE:
                by_site.setdefault(site, []).append(decision.words())
        grouped: dict[tuple[str, str, bool], list[int]] = {}
        for site, words in by_site.items():
            block, _, kind = site.removeprefix("block.").rpartition(".")
            numbered = block.isdecimal()
            blocks = grouped.setdefault((kind if numbered else site, " ".join(words), numbered), [])
            blocks += [int(block)] if numbered else []
        for (name, said, _), blocks in grouped.items():
            where = f" {_ranges(blocks)}" if blocks else ""
            parts.append(f"{name}{where}: {said}")
        return "; ".join(parts)


def _ranges(blocks: list[int]) -> str:
    spans: list[list[int]] = []
    for n in sorted(blocks):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


@functools.cache
def _natural(site: str) -> tuple[tuple[int, str], ...]:
    # Superscripts are digits, but no number can be read from them.
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in site.split("."))


def _read_decision(entry: Mapping[str, Any]) -> tuple[str, Decision]:
    fields = dict(entry)
    site, kind = fields.pop("site", None), fields.pop("type", None)
    if not isinstance(site, str) or not isinstance(kind, str) or kind not in DECISIONS:
        raise PlanError(f"plan: unknown decision {kind!r} at {site!r}; known: {', '.join(DECISIONS)}")
    values = (tuple(value) if isinstance(value, list) else value for value in fields.values())
    try:
        return site, _decision(kind, tuple(fields), *values)
    except TypeError as error:  # a value that no decision holds
        raise PlanError(f"plan: {kind}: {error}") from None


@functools.lru_cache(maxsize=4096, typed=True)
def _decision(kind: str, names: tuple[str, ...], *values: Any) -> Decision:
    """Return a decision of some fields; a long study repeats the same ones."""
    cls = DECISIONS[kind]
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := set(names) - known:
        raise PlanError(f"plan: {kind} has no field {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return cls(**dict(zip(names, values, strict=True)))
