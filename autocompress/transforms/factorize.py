"""Low-rank factorisation: each linear layer of a site becomes two, by truncated singular value decomposition.

W (m x n) is replaced by (U sqrt(S)) (sqrt(S) V^T) cut after ``rank`` singular values, the best approximation of that
rank in the Frobenius norm (Eckart & Young 1936). Where the moments of its input are known, W L is decomposed in W's
place, with L L^T their Cholesky decomposition, and L^-1 multiplied to the right: that is the best approximation of what
the layer returns (Wang et al. 2024, "SVD-LLM", section 3.1). Only ranks that store fewer weights than W are accepted.
"""

from __future__ import annotations

import torch
from torch import nn

from autocompress.anatomy import Site
from autocompress.decisions import LowRank
from autocompress.errors import PlanError
from autocompress.model import ROLES, EncoderModel
from autocompress.transforms.importance import Importance
from autocompress.transforms.moments import Moments, same_in_the_mean
from autocompress.transforms.prune import linear


class Factorization:
    """Carry out `LowRank`."""

    def check(self, site: Site, decision: LowRank) -> None:
        if site.kind not in ("attention", "ffn"):
            raise PlanError(f"{site.name}: a rank belongs to attention and ffn sites, not to {site.kind}")
        limit = site.largest_saving_rank()
        if decision.rank > limit:
            raise PlanError(
                f"{site.name}: rank must be <= {limit} to save anything at {site.inner} x {site.outer}, got "
                f"{decision.rank}"
            )

    def apply(self, model: EncoderModel, site: Site, decision: LowRank, scores: Importance) -> None:
        block = int(site.name.split(".")[1])
        for role in ROLES[site.kind]:
            layer = model.linear(block, role)
            if not torch.isfinite(layer.weight).all():
                raise PlanError(f"{site.name}: cannot be factorised, its weights are not finite (NaN or infinite)")
            read = scores.read_by(block, role, model.shape.blocks[block])
            model.replace(model.layout.path(block, role), factorized(layer, decision.rank, read))


def factorized(layer: nn.Linear, rank: int, read: Moments | None = None) -> nn.Sequential:
    """Return two linear layers that together approximate ``layer`` at ``rank``.

    Args:
        layer: to be approximated.
        rank: at most the smaller of its widths.
        read: moments of its input; what it returns is then approximated instead of its weights.
    """
    weight = layer.weight.detach().double()
    bias: torch.Tensor | None = layer.bias
    if read is None:
        outer, inner = _truncated(weight, rank)
    else:
        root = torch.linalg.cholesky(read.gram(centred=layer.bias is not None))
        outer, inner = _truncated(weight @ root, rank)
        inner = torch.linalg.solve_triangular(root, inner, upper=False, left=False)
        bias = same_in_the_mean(layer, outer @ inner, read)
    bias = None if bias is None else bias.detach()
    return nn.Sequential(linear(inner.to(layer.weight.dtype), None), linear(outer.to(layer.weight.dtype), bias))


def _truncated(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``out x rank`` and ``rank x in``, whose product is the best approximation of ``weight`` (float64)."""
    tall = weight.shape[0] > weight.shape[1]
    wide = weight.T if tall else weight
    # The eigenvectors of W W^T are W's left singular vectors, at a fraction of the time of a full decomposition.
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    left = vectors[:, -rank:]
    root = squares[-rank:].clamp_min(1e-24).pow(0.25)
    outer, inner = left * root, (left.T @ wide) / root[:, None]
    return (inner.T, outer.T) if tall else (outer, inner)
