"""Low-rank factorisation: each linear layer of a site becomes two, by truncated singular value decomposition.

W (m x n) is replaced by (U sqrt(S)) (sqrt(S) V^T) cut after ``rank`` singular values, the best approximation of that
rank in the Frobenius norm (Eckart & Young 1936). Only ranks that store fewer weights than W are accepted.
"""

from __future__ import annotations

import torch
from torch import nn

from autocompress.anatomy import Site
from autocompress.errors import PlanError
from autocompress.model import EncoderModel
from autocompress.plan import LowRank
from autocompress.transforms.prune import Importance, linear


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
        for path in model.layout.linears(site.name):
            layer = model.module.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            if not torch.isfinite(layer.weight).all():
                raise PlanError(f"{site.name}: cannot be factorised, its weights are not finite (NaN or infinite)")
            model.replace(path, factorized(layer, decision.rank))


def factorized(layer: nn.Linear, rank: int) -> nn.Sequential:
    """Return two linear layers that together approximate ``layer`` at ``rank``."""
    weight = layer.weight.detach().double()
    tall = weight.shape[0] > weight.shape[1]
    wide = weight.T if tall else weight
    # The eigenvectors of W W^T are W's left singular vectors, at a fraction of the time of a full decomposition.
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    left = vectors[:, -rank:]
    root = squares[-rank:].clamp_min(1e-24).pow(0.25)
    outer, inner = left * root, (left.T @ wide) / root[:, None]
    if tall:
        outer, inner = inner.T, outer.T
    first = linear(inner.to(layer.weight.dtype), None)
    second = linear(outer.to(layer.weight.dtype), None if layer.bias is None else layer.bias.detach())
    return nn.Sequential(first, second)
