"""Plans drawn from a space, and how what is said of them is compared."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from conftest import SPECIAL

from autocompress.binding import BoundSpace
from autocompress.plan import CompressionPlan
from autocompress.task import Batch


def random_plans(space: BoundSpace, count: int, seed: int) -> list[CompressionPlan]:
    rng = random.Random(seed)
    found: dict[str, CompressionPlan] = {}
    while len(found) < count:
        plan = space.decode(lambda _, choices: rng.choice(choices))
        found.setdefault(plan.plan_id, plan)
    return list(found.values())


def ranks(values: Sequence[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def counts_of(vocabulary: int, batches: Sequence[Batch]) -> torch.Tensor:
    """Return how often the batches have each token, as a workshop counts them."""
    read = torch.cat([batch.input_ids[batch.attention_mask.bool()] for batch in batches])
    found = torch.bincount(read, minlength=vocabulary).double()
    found[: len(SPECIAL)] = torch.inf
    return found
