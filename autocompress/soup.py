"""The average of the weights of several trainings that began alike, which runs at the cost of one.

Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time", section 2: a uniform soup averages all of them, a greedy one those that help on held rows (recipe 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

State = Mapping[str, torch.Tensor]
"""A module's tensors by name."""


def uniform(states: Sequence[State]) -> dict[str, torch.Tensor]:
    """Return the mean of each floating-point tensor over ``states``; others are the first one's."""
    first = states[0]
    return {
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }


def greedy(states: Sequence[State], loss_of: Callable[[State], float]) -> dict[str, torch.Tensor]:
    """Return the mean of the states that help each other.

    They are tried from the best to the worst, and one that raises the loss of the mean is left out.

    Args:
        states: of trainings that began alike.
        loss_of: returns the loss of a state on rows that none of them learnt from.
    """
    ordered = sorted(((loss_of(state), n) for n, state in enumerate(states)))
    least, best = ordered[0]
    kept = [states[best]]
    for _, n in ordered[1:]:
        loss = loss_of(uniform([*kept, states[n]]))
        if loss <= least:
            least, kept = loss, [*kept, states[n]]
    return uniform(kept)
