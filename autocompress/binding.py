"""A search space bound to one model: parameters become plans, and plans parameters again.

One walk over the parameters serves samplers, seeds, stored trials and the way back from a plan to its parameters, so
that they cannot disagree.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from autocompress.anatomy import ModelShape, Site
from autocompress.decisions import (
    RECONSTRUCTED,
    Decision,
    DropBlocks,
    LowRank,
    MaxTokens,
    PruneHeads,
    PruneNeurons,
    Quantize,
    Recover,
    Student,
    TrimVocabulary,
)
from autocompress.errors import ConfigError, PlanError
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.space import AXES, BitsAxis, KeepAxis, RankAxis, Rule, SearchSpace, Value, bits_of

Chooser = Callable[[str, Sequence[Value]], Value]
Effect = dict[tuple[str, type[Decision]], Decision | None]
DropOrder = Callable[[str], Sequence[int]]
Picker = Callable[[str, Sequence[Value], Callable[[Value], Effect]], Value]

FULL = "full"
NO_STUDENT = "full"
_NEURON_STEP = 32
_RANK_STEP = 32
_CHANNEL_STEP = 32
"""Fractions become multiples of these, so that groups of narrow weights fill them; small ranks see `_rounded`."""
_GROUP = 64
"""Weights that share a step below 8 bits, where the widths allow it."""
TABLE_STEP = 64
"""Fractions of the vocabulary become multiples of this."""

_DECISION_OF: dict[str, type[Decision]] = {
    "heads": PruneHeads,
    "neurons": PruneNeurons,
    "rank": LowRank,
    "vocabulary": TrimVocabulary,
    "bits": Quantize,
}
_KINDS = {
    "heads": ("attention",),
    "neurons": ("ffn",),
    "rank": ("attention", "ffn"),
    "vocabulary": ("embedding",),
    "bits": ("attention", "ffn", "embedding", "head"),
}


@dataclass(frozen=True)
class BoundSpace:
    """A search space over the sites of one model.

    Args:
        space: the choices.
        shape: sizes of the uncompressed model.
        tokens: of the target's inputs.
        drop_order: for ``full`` and each student, the order in which blocks go, least important first; asked only
            where blocks do go, as it may take a student to be distilled.
        most_tokens: that are read of a text anyway; to cut there is no decision. None where that is not known.
    """

    space: SearchSpace
    shape: ModelShape
    tokens: int
    drop_order: DropOrder
    most_tokens: int | None = None

    @cached_property
    def students(self) -> dict[str, Student]:
        return students_of(self.space, self.shape)

    def without_order(self) -> BoundSpace:
        """Return the space with the last blocks going first: to count plans, for which no student need be distilled."""
        return bind(self.space, self.shape, tokens=self.tokens, most_tokens=self.most_tokens)

    def decode(self, choose: Chooser) -> CompressionPlan:
        """Build a plan; ``choose(name, choices)`` is asked once for each parameter that has a choice."""
        return self.walk(lambda name, choices, _: choose(name, choices))

    def plan(self, params: Mapping[str, Value]) -> CompressionPlan:
        """Build the plan of given parameters; a parameter left out takes its first choice.

        Raises:
            ConfigError: if a value is not among the choices, or a name is not a parameter at that place.
        """
        asked: set[str] = set()

        def choose(name: str, choices: Sequence[Value]) -> Value:
            asked.add(name)
            value = params.get(name, choices[0])
            if value not in choices:
                raise ConfigError(f"parameter {name}: must be one of {list(choices)}, got {value!r}")
            # The choice as the space has it: a stored 1.0 that comes back as 1 would read as a count.
            return choices[list(choices).index(value)]

        plan = self.decode(choose)
        if unknown := sorted(set(params) - asked):
            raise ConfigError(f"parameter {unknown[0]}: not in this space at this place; it has {sorted(asked)}")
        return plan

    def parameters(self, plan: CompressionPlan) -> dict[str, Value]:
        """Return the parameters that decode to ``plan``, so that it can be enqueued.

        Raises:
            PlanError: if this space cannot express the plan.
        """
        wanted = {(site, type(decision)): decision for site, decision in plan}
        found: dict[str, Value] = {}

        def pick(name: str, choices: Sequence[Value], effect: Callable[[Value], Effect]) -> Value:
            fitting = (c for c in choices if all(wanted.get(key) == d for key, d in effect(c).items()))
            found[name] = next(fitting, choices[0])
            return found[name]

        if self.walk(pick) != plan:
            raise PlanError(f"plan {plan.plan_id}: space {self.space.name} cannot express it ({plan.words()})")
        return found

    def options(self, shape: ModelShape) -> dict[str, list[Decision]]:
        """Return, for each site of a model of ``shape``, every decision that some choice makes there on its own."""
        found: dict[str, list[Decision]] = {}
        if lengths := self.lengths():
            found[MODEL_SITE] = [cut for choice in lengths if (cut := self._cut(choice)) is not None]
        for name, site in shape.sites().items():
            for rule in self.space.rules:
                if fnmatch.fnmatchcase(name, rule.match):
                    for axis_name, axis in rule.axes().items():
                        if site.kind in _KINDS[axis_name]:
                            decisions = (_decide(axis_name, choice, site, 0) for choice in axis.choices)
                            found.setdefault(name, []).extend(d for d in decisions if d is not None)
        return found

    def _cut(self, choice: Value) -> MaxTokens | None:
        if isinstance(choice, str):
            return None
        tokens = choice if isinstance(choice, int) else max(1, round(choice * self.tokens))
        return None if self.most_tokens is not None and tokens >= self.most_tokens else MaxTokens(tokens=tokens)

    def lengths(self) -> list[Value]:
        """Return every choice that cuts texts."""
        return [choice for choice in self.space.max_tokens or () if self._cut(choice) is not None]

    def walk(self, pick: Picker) -> CompressionPlan:
        """Build a plan; ``pick(name, choices, effect)`` is asked once for each parameter that has a choice."""
        decisions: list[tuple[str, Decision]] = []

        def ask(name: str, choices: Sequence[Value], effect: Callable[[Value], Effect]) -> Value:
            choice = choices[0] if len(choices) == 1 else pick(name, choices, effect)
            decisions.extend((site, d) for (site, _), d in effect(choice).items() if d is not None)
            return choice

        shape, base = self.shape, NO_STUDENT
        students = self.students
        if students:
            base = str(ask("student", (NO_STUDENT, *students), lambda c: {(MODEL_SITE, Student): students.get(str(c))}))
        if self.space.drop_blocks is not None:
            shape = self.shape.after(decisions)
            most, most_of_all = (min(self.space.drop_blocks.at_most, len(s.blocks) - 1) for s in (shape, self.shape))
            ask(
                # One name has one set of choices in a study; a shallow student has fewer.
                "drop_blocks" if most == most_of_all else f"drop_blocks_{most}",
                tuple(range(most + 1)),
                lambda c: {(MODEL_SITE, DropBlocks): _drop(self.drop_order, base, int(c))},
            )
        if self.space.max_tokens is not None:
            ask("max_tokens", self.space.max_tokens, lambda c: {(MODEL_SITE, MaxTokens): self._cut(c)})
        for axis_name in AXES:
            shape = self.shape.after(decisions)
            ranks = {site: d.rank for site, d in decisions if isinstance(d, LowRank)}
            for rule in self.space.rules:
                if (axis := rule.axes().get(axis_name)) is not None:
                    for group, sites in enumerate(_groups(rule.match, axis_name, axis.tie, shape)):
                        name = _parameter(rule, axis_name, group, sites)
                        ask(name, axis.choices, _effect(axis_name, sites, ranks))
        plan = CompressionPlan(tuple(decisions))
        if self.space.reconstruct is not None and plan.reconstructible:
            # Last, since there must be something to make up for.
            ask("reconstruct", self.space.reconstruct, lambda c: {(MODEL_SITE, Recover): RECONSTRUCTED if c else None})
            plan = CompressionPlan(tuple(decisions))
        return plan


def bind(
    space: SearchSpace,
    shape: ModelShape,
    *,
    tokens: int,
    drop_order: DropOrder | None = None,
    most_tokens: int | None = None,
) -> BoundSpace:
    """Bind ``space`` to a model of ``shape`` and inputs of ``tokens`` tokens; by default the last blocks go first.

    Raises:
        ConfigError: if a pattern matches nothing, two rules decide the same, or a count exceeds the model's.
    """
    where = f"space {space.name}"
    sites = shape.sites()
    decided: set[tuple[str, str]] = set()
    labels: set[tuple[str, str]] = set()
    parameters: set[str] = set()
    for rule in space.rules:
        matched = [site for name, site in sites.items() if fnmatch.fnmatchcase(name, rule.match)]
        if not matched:
            raise ConfigError(f"{where}: pattern {rule.match!r} matches no site; the model has {', '.join(sites)}")
        for axis_name, axis in rule.axes().items():
            fitting = [site for site in matched if site.kind in _KINDS[axis_name]]
            if not fitting:
                raise ConfigError(
                    f"{where}: {axis_name} at {rule.match!r} matches no site that has them "
                    f"({', '.join(_KINDS[axis_name])})"
                )
            for site in fitting:
                if axis_name == "bits" and site.kind == "embedding" and any(isinstance(c, str) for c in axis.choices):
                    raise ConfigError(f"{where}: bits at {site.name}: nothing is multiplied there; say 4, not w4a8")
                if (site.name, axis_name) in decided:
                    raise ConfigError(f"{where}: {axis_name} at {site.name} is decided by two rules")
                decided.add((site.name, axis_name))
                _check_counts(where, axis_name, axis, site)
            label = (rule.name or fitting[0].kind, axis_name)
            if label in labels:
                raise ConfigError(f"{where}: two rules share the parameters {'.'.join(label)}; give them names")
            labels.add(label)
            # Those of a rule for sites of several kinds may be another one's, too.
            for group, tied in enumerate(_groups(rule.match, axis_name, axis.tie, shape)):
                name = _parameter(rule, axis_name, group, tied)
                if name in parameters:
                    raise ConfigError(f"{where}: two rules share the parameter {name}; give them names")
                parameters.add(name)
    students = students_of(space, shape)
    depths = {NO_STUDENT: len(shape.blocks), **{name: len(s.blocks) for name, s in students.items()}}
    order = drop_order or (lambda name: tuple(reversed(range(depths[name]))))
    return BoundSpace(space, shape, tokens, order, most_tokens)


def _parameter(rule: Rule, axis_name: str, group: int, sites: Sequence[Site]) -> str:
    """Return the name of what is chosen for some sites of a rule together."""
    return f"{rule.name or sites[0].kind}.{axis_name}.{group}"


def students_of(space: SearchSpace, shape: ModelShape) -> dict[str, Student]:
    """Return the student architectures of ``space`` in numbers of a model of ``shape``.

    Raises:
        ConfigError: if a student asks for more than the model has, or is the model itself.
    """
    depth = len(shape.blocks)
    found: dict[str, Student] = {}
    for name, spec in space.students.items():
        where = f"space {space.name}: students.{name}"
        if name == NO_STUDENT:
            raise ConfigError(f"{where}: the name {NO_STUDENT!r} stands for the uncompressed model")
        if isinstance(spec.blocks, tuple):
            blocks = spec.blocks
        else:
            # Of the depth that is run: of shared blocks fewer are stored.
            count = max(1, round(spec.blocks * depth) // spec.share)
            blocks = tuple(i * depth // count for i in range(count))
        if any(b >= depth for b in blocks):
            raise ConfigError(f"{where}.blocks: must be < {depth}, got {max(blocks)}")
        heads = min(shape.blocks[b].heads for b in blocks)
        neurons = min(shape.blocks[b].neurons for b in blocks)
        limits = {"heads": heads, "neurons": neurons, "hidden": shape.hidden, "share": depth // len(blocks)}
        for field, limit in limits.items():
            if isinstance(value := getattr(spec, field), int) and value > limit:
                raise ConfigError(f"{where}.{field}: must be <= {limit}, got {value}")
        if spec.activation == shape.activation:
            raise ConfigError(f"{where}.activation: {spec.activation} is what the model has; leave it out")
        hidden = kept(spec.hidden, shape.hidden, _CHANNEL_STEP)
        student = Student(
            blocks=blocks,
            heads=kept(spec.heads, heads, 1),
            neurons=kept(spec.neurons, neurons, _NEURON_STEP),
            epochs=spec.epochs,
            activation=spec.activation or "",
            hidden=hidden if hidden < shape.hidden else 0,
            share=spec.share,
        )
        if shape.of_student(student) == shape:
            raise ConfigError(f"{where}: is as large as the model itself")
        found[name] = student
    return found


def quantize_decision(choice: Value, site: Site, rank: int = 0) -> Quantize:
    """Return what bits mean at ``site``: integer arithmetic at 8 bits in linear layers, and where it is said (w4a8).

    Groups divide every input width at the site, that of the second factor (``rank``) included.
    """
    bits = bits_of(choice)
    integers = isinstance(choice, str) or (bits == 8 and site.kind != "embedding")
    group = _GROUP if bits < 8 else 0
    while group and any(width % group for width in (site.inner, site.outer, rank)):
        group //= 2
    return Quantize(weight_bits=bits, activation_bits=8 if integers else 16, group_size=group)


def _effect(axis_name: str, sites: Sequence[Site], ranks: Mapping[str, int]) -> Callable[[Value], Effect]:
    kind = _DECISION_OF[axis_name]
    return lambda choice: {(s.name, kind): _decide(axis_name, choice, s, ranks.get(s.name, 0)) for s in sites}


@lru_cache(maxsize=4096, typed=True)
def _decide(axis_name: str, choice: Value, site: Site, rank: int) -> Decision | None:
    """Turn a choice into the decision at ``site``, or None where it leaves the site as it is."""
    if axis_name == "bits":
        return quantize_decision(choice, site, rank)
    if axis_name == "rank":
        if isinstance(choice, str):
            return None
        limit = site.largest_saving_rank()
        saving = site.inner * site.outer / (site.inner + site.outer)
        rank = choice if isinstance(choice, int) else _rounded(int(choice * saving))
        # At a pruned width a rank can cease to save anything; the whole layer is then the smaller one.
        return LowRank(rank=rank) if rank <= limit else None
    if axis_name == "heads":
        heads = kept(choice, site.parts, 1)
        return PruneHeads(keep=heads) if heads < site.parts else None
    if axis_name == "vocabulary":
        rows = kept(choice, site.parts, TABLE_STEP)
        return TrimVocabulary(keep=rows) if rows < site.parts else None
    neurons = kept(choice, site.parts, _NEURON_STEP)
    return PruneNeurons(keep=neurons) if neurons < site.parts else None


def kept(choice: Value, parts: int, step: int) -> int:
    """Return how many of ``parts`` a choice keeps: a fraction in multiples of ``step``, or a count."""
    if isinstance(choice, int):
        return min(choice, parts)
    step = step if parts >= 2 * step else 1
    return min(parts, max(step, round(float(choice) * parts / step) * step))


def _rounded(rank: int) -> int:
    """Return ``rank`` down to a multiple of the largest power of two up to `_RANK_STEP` that fits in twice.

    An odd one would leave groups of one weight each, whose steps weigh more than the weights.
    """
    rank = max(1, rank)
    step = min(_RANK_STEP, 1 << max(0, rank.bit_length() - 2))
    return rank - rank % step


def _drop(order: DropOrder, base: str, count: int) -> DropBlocks | None:
    return DropBlocks(blocks=tuple(sorted(order(base)[:count]))) if count else None


@lru_cache(maxsize=1024)
def _groups(pattern: str, axis_name: str, tie: str | int, shape: ModelShape) -> Sequence[Sequence[Site]]:
    """Return the sites that a rule's pattern matches, those together that an axis decides as one."""
    matched = [
        site
        for name, site in shape.sites().items()
        if site.kind in _KINDS[axis_name] and fnmatch.fnmatchcase(name, pattern)
    ]
    wanted = {"all": 1, "none": len(matched)}.get(str(tie), tie)
    count = min(int(wanted), len(matched))
    # None where the block that a rule is for was dropped.
    ends = [group * len(matched) // count for group in range(count + 1)] if count else []
    return [matched[start:end] for start, end in itertools.pairwise(ends)]


def _check_counts(where: str, axis_name: str, axis: KeepAxis | BitsAxis | RankAxis, site: Site) -> None:
    limit = {"rank": min(site.inner, site.outer), "bits": None}.get(axis_name, site.parts)
    for choice in axis.choices:
        if limit is not None and isinstance(choice, int) and choice > limit:
            raise ConfigError(f"{where}: {axis_name} at {site.name}: must be <= {limit}, got {choice}")
