"""Plans made from predictions: the least predicted loss of quality at given prices of size and latency.

With prices instead of budgets (Lagrange multipliers, as in Shoham and Gersho 1988, "Efficient bit allocation for an
arbitrary set of quantizers") each decision can be chosen by itself: parameter by parameter, again and again, until
none changes. Every pair of prices gives a point at the lower hull of what the predictions hold possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autocompress.binding import NO_STUDENT, BoundSpace
from autocompress.predict import Predictor
from autocompress.space import Value

_PRICES = (0.1, 0.03, 0.3, 1.0)
"""What the whole reference's size and latency cost together, in units of the guide; what usually pays first."""
_SHARES = (0.5, 0.9, 0.1)
"""Part of the price that is on latency; the rest is on size."""
_SWEEPS = 4


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
