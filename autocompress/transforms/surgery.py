"""Which heads and neurons are removed where the layers that read them are to make up for it.

What a layer returns changes by ``D x`` when its weights change by ``D``. To second order the loss then rises by half
the trace of ``S D C D^T``, where ``C`` is the covariance of what the layer reads and ``S`` the mean outer product of
the loss's slopes at what it returns: the curvature of Martens and Grosse 2015, "Optimizing Neural Networks with
Kronecker-factored Approximate Curvature", section 3. Optimal brain surgery removes the part whose removal, made up for
by all others as well as can be, costs the least, and goes on from the layer that has made up for it: Kurtic et al.
2023, "ZipLM: Inference-Aware Structured Pruning of Language Models", eq. 2-4, who leave ``S`` out.

All parts go in this order, whichever number is kept. Where nothing makes up for what is removed, each part is judged as
the others stay (`importance.py`).
"""

from __future__ import annotations

import torch

_AT_ONCE = 1 / 32
"""Share of the neurons left that go at once, each judged as if it went alone: one by one takes many times as long."""
_DAMPING = 0.1
"""Part of the slopes' mean square that is added to each: they are those of training rows, which the model knows."""


def order_of_removal(weight: torch.Tensor, gram: torch.Tensor, slopes: torch.Tensor, parts: int) -> torch.Tensor:
    """Return how late each part of what a layer reads is removed.

    Args:
        weight: ``out x in``.
        gram: covariance of what the layer reads, ``in x in``, float64, invertible.
        slopes: mean outer product of the loss's slopes at what it returns, ``out x out``.
        parts: in how many parts of equal width its inputs come; those of one channel go several at once.

    Returns:
        ``parts``, float64; the most important one has the largest.
    """
    size = weight.shape[1] // parts
    slopes = slopes.double()
    damping = _DAMPING * slopes.diagonal().mean().clamp_min(1e-30)
    root = torch.linalg.cholesky(slopes + damping * torch.eye(len(slopes), dtype=torch.float64))
    weight, inverse = root.T @ weight.double(), torch.cholesky_inverse(torch.linalg.cholesky(gram))
    left, order = torch.arange(parts), list[int]()
    while len(left):
        costs = _costs(weight, inverse, len(left))
        gone = costs.argsort(stable=True)[: max(1, int(_AT_ONCE * len(left))) if size == 1 else 1]
        order += left[gone].tolist()
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[gone] = False
        left = left[stays]
        going, staying = (gone[:, None] * size + torch.arange(size)).flatten(), stays.repeat_interleave(size)
        made_up = torch.linalg.solve(inverse[going][:, going], inverse[going][:, staying])
        weight = weight[:, staying] - weight[:, going] @ made_up
        inverse = inverse[staying][:, staying] - inverse[staying][:, going] @ made_up
    late = torch.empty(parts, dtype=torch.float64)
    late[order] = torch.arange(parts, dtype=torch.float64)
    return late


def _costs(weight: torch.Tensor, inverse: torch.Tensor, parts: int) -> torch.Tensor:
    """Return twice what removing each part costs, made up for by the others, ``parts``."""
    size = weight.shape[1] // parts
    if size == 1:
        return weight.square().sum(dim=0) / inverse.diagonal()
    each = torch.arange(parts)
    own = inverse.reshape(parts, size, parts, size)[each, :, each]
    read = weight.reshape(len(weight), parts, size).permute(1, 0, 2)
    found: torch.Tensor = (read @ torch.linalg.inv(own) * read).sum(dim=(1, 2))
    return found
