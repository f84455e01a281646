"""Plans that a search starts with: uniform ones, and those made from predictions.

Uniform plans are what a careful person would try by hand. The others have the least predicted loss of quality at given
prices of size and latency. With prices instead of budgets (Lagrange multipliers, as in Shoham and Gersho 1988,
"Efficient bit allocation for an arbitrary set of quantizers") each decision can be chosen by itself: parameter by
parameter, again and again, until none changes. Every pair of prices gives a point at the lower hull of what the
predictions hold possible.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from autocompress.binding import NO_STUDENT, TABLE_STEP, BoundSpace, Effect, kept
from autocompress.predict import Predictor
from autocompress.space import Value, bits_of

_PRICES = (0.1, 0.03, 0.3, 1.0, 0.2)
"""What the whole reference's size and latency cost together, in units of the guide; what usually pays first."""
_SHARES = (0.5, 0.9, 0.1)
"""Part of the price that is on latency; the rest is on size."""
_SWEEPS = 4


def uniform_ladder(space: BoundSpace) -> Iterator[dict[str, Value]]:
    """Yield the parameters of plans that treat every block alike: each student, bits, width, rank, depth, vocabulary.

    Each length and some products, too. What needs no student comes first, as distilling one takes time, and is asked
    for only when its turn comes; among those the narrow ones, which are measured soonest, and last what needs the
    moments of what layers read: a front of several points is there within the first minute.
    """
    seen: set[str] = set()
    for recipe in _recipes(space):
        params = _params(space, recipe)
        plan_id = space.plan(params).plan_id
        if plan_id not in seen:
            seen.add(plan_id)
            yield params


def count_uniform(space: BoundSpace) -> int:
    """Return how many plans the ladder has."""
    return sum(1 for _ in uniform_ladder(space.without_order()))


def _recipes(space: BoundSpace) -> list[dict[str, Any]]:
    """Return what is the same in all blocks, by plan; what a recipe does not name stays at its most."""
    axes = {name: _levels(space, name) for name in ("heads", "neurons", "rank")}
    widths = sorted({*axes["heads"], *axes["neurons"]}, reverse=True)
    students, vocabularies, narrow = list(space.space.students), _vocabularies(space), _narrow(space)
    small = {"bits": 8, "embeddings": 4}
    found: list[dict[str, Any]] = [{"bits": 8, "embeddings": 8}]
    found += [{"width": w, **small} for w in reversed(widths)]
    found += [small, {"drop": 1, **small}]
    found += [{"vocabulary": v, "bits": 8, "embeddings": 8} for v in vocabularies]
    found += narrow
    if True in (space.space.reconstruct or ()):
        found += [{"width": w, "reconstruct": True, **small} for w in reversed(widths)]
    found += [{"rank": r, **small} for r in axes["rank"][:1]]
    found += [{"tokens": t, **small} for t in space.lengths()]
    found += [{"student": s, **small} for s in students]
    found += [{"student": s, "vocabulary": v, **(narrow or [small])[0]} for s in students for v in vocabularies]
    found += [{"student": s, **few} for s in students for few in narrow]
    found += [{"student": s, "width": w, **small} for s in students for w in widths[:1]]
    found += [{"student": s, "drop": 1, **small} for s in students]
    found += [{"rank": r, **small} for r in axes["rank"][1:]]
    most = space.space.drop_blocks.at_most if space.space.drop_blocks is not None else 0
    found += [{"drop": blocks, **small} for blocks in range(2, most + 1)]
    # 16 bits cost the most time and save size only.
    found += [{"student": s} for s in students] or [{}]
    if not any(rule.bits for rule in space.space.rules):
        found += [{"width": w} for w in widths] + [{"rank": r} for r in axes["rank"]] + [{"drop": 1}]
        found += [{"vocabulary": v} for v in vocabularies]
    return found


def _params(space: BoundSpace, recipe: Mapping[str, Any]) -> dict[str, Value]:
    params: dict[str, Value] = {}

    def pick(name: str, choices: Sequence[Value], effect: Callable[[Value], Effect]) -> Value:
        value: Value
        if name == "student":
            value = recipe.get("student", NO_STUDENT)
        elif name == "max_tokens":
            value = recipe.get("tokens", _most(choices))
        elif name == "reconstruct":
            value = recipe.get(name, False)
            value = value if value in choices else choices[0]
        elif "." not in name:  # drop_blocks; a rule's parameters have dots
            value = min(recipe.get("drop", 0), max(int(c) for c in choices))
        else:
            axis = name.rsplit(".", 2)[1]  # a rule's name may hold dots
            if axis == "bits":
                key = "embeddings" if any(site == "embeddings" for site, _ in effect(choices[0])) else "bits"
                value = _closest_bits(recipe.get(key, 16), choices)
            else:
                key = axis if axis in ("rank", "vocabulary") else "width"
                value = _closest(recipe.get(key, _most(choices)), choices, _whole(space, axis))
        params[name] = value
        return value

    space.walk(pick)
    return params


def _narrow(space: BoundSpace) -> list[dict[str, Any]]:
    """Return the bits of layers below 8 with those of the tables, those for integer products first."""
    layers = [name for name in space.shape.sites() if name.startswith("block.")]
    axes = (r.bits for r in space.space.rules if r.bits is not None and fnmatch.filter(layers, r.match))
    found = {choice for axis in axes for choice in axis.choices if bits_of(choice) < 8}
    of_layers = sorted(found, key=lambda c: (isinstance(c, str), bits_of(c)), reverse=True)
    return [{"bits": choice, "embeddings": bits_of(choice)} for choice in of_layers]


def _vocabularies(space: BoundSpace) -> list[Value]:
    """Return every choice of a vocabulary but the one that keeps most, larger ones first."""
    axes = (rule.vocabulary for rule in space.space.rules if rule.vocabulary is not None)
    found = {c for axis in axes for c in axis.choices if c != _most(axis.choices)}
    return sorted(found, key=lambda c: kept(c, space.shape.vocabulary, TABLE_STEP), reverse=True)


def _levels(space: BoundSpace, axis_name: str) -> list[float]:
    """Return the shares that the space may keep of something, the largest first, without all of it."""
    axes = (axis for rule in space.space.rules if (axis := rule.axes().get(axis_name)) is not None)
    choices = {choice for axis in axes for choice in axis.choices if not isinstance(choice, str)}
    shares = {_share(choice, _whole(space, axis_name)) for choice in choices}
    return sorted((share for share in shares if share < 1), reverse=True)


def _whole(space: BoundSpace, axis_name: str) -> int:
    """Return how many there are of what an axis may give a number of."""
    shape, block = space.shape, space.shape.blocks[0]
    return {"heads": block.heads, "neurons": block.neurons, "rank": shape.hidden}.get(axis_name, shape.vocabulary)


def _share(choice: Value, whole: int) -> float:
    return choice / whole if isinstance(choice, int) else float(choice)


def _most(choices: Sequence[Value]) -> Value:
    """Return the choice that keeps most: all, or the largest."""
    whole = next((c for c in choices if isinstance(c, str) or (isinstance(c, float) and c == 1.0)), None)
    return whole if whole is not None else max(choices, key=float)


def _closest(value: Value, choices: Sequence[Value], whole: int) -> Value:
    if value in choices or isinstance(value, str):
        return value if value in choices else choices[0]
    numbers = [c for c in choices if not isinstance(c, str)]
    wanted = _share(value, whole)
    return min(numbers, key=lambda c: abs(_share(c, whole) - wanted)) if numbers else choices[0]


def _closest_bits(value: Value, choices: Sequence[Value]) -> Value:
    return value if value in choices else min(choices, key=lambda c: abs(bits_of(c) - bits_of(value)))


def sensitivity_ladder(space: BoundSpace, predictor: Predictor, reference_bytes: int) -> Iterator[dict[str, Value]]:
    """Yield the parameters of allocated plans, for each price and share one for each base.

    Args:
        space: the bound space.
        predictor: asked anew for each plan, so that what was learned in between counts.
        reference_bytes: size of the uncompressed model's artefact.
    """
    for price in _PRICES:
        for share in _SHARES:
            for base in (NO_STUDENT, *space.students):
                yield allocate(space, predictor, reference_bytes, base=base, price=price, share=share)


def allocate(
    space: BoundSpace, predictor: Predictor, reference_bytes: int, *, base: str, price: float, share: float
) -> dict[str, Value]:
    """Return the parameters with the least predicted cost plus price of size and latency.

    Args:
        space: the bound space.
        predictor: ready to predict.
        reference_bytes: size of the uncompressed model's artefact.
        base: ``full`` or a student's name.
        price: of the reference's size and latency together, in units of the predictor's guide.
        share: part of the price that is on latency.
    """
    params: dict[str, Value] = {"student": base} if space.students else {}
    choices: dict[str, Sequence[Value]] = {}

    def pay(trial: dict[str, Value]) -> float:
        def choose(name: str, offered: Sequence[Value]) -> Value:
            choices[name] = offered
            value = trial.get(name, offered[0])
            return value if value in offered else offered[0]

        plan = space.decode(choose)
        size = predictor.size_bytes(plan) / reference_bytes
        return predictor.cost(plan) + price * (share * predictor.latency(plan) + (1 - share) * size)

    best = pay(params)
    for _ in range(_SWEEPS):
        before = dict(params)
        for name in [n for n in choices if n != "student"]:
            for value in choices[name]:
                if value != params.get(name, choices[name][0]):
                    found = pay({**params, name: value})
                    if found < best:
                        best, params = found, {**params, name: value}
        if params == before:
            break
    # Names that another choice took out of the tree are left out.
    asked: dict[str, Value] = {}

    def note(name: str, offered: Sequence[Value]) -> Value:
        value = params.get(name, offered[0])
        asked[name] = value if value in offered else offered[0]
        return asked[name]

    space.decode(note)
    return asked
