"""Plans drawn from a space, and how what is said of them is compared."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from autocompress.binding import BoundSpace
from autocompress.plan import CompressionPlan


def random_plans(space: BoundSpace, count: int, seed: int) -> list[CompressionPlan]:
    rng = random.Random(seed)
    found: dict[str, CompressionPlan] = {}
    while len(found) < count:
        plan = space.decode(lambda _, choices: rng.choice(choices))
        found.setdefault(plan.plan_id, plan)
    return list(found.values())


def ranks(values: Sequence[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)
