"""Trimming the vocabulary: few rows of the table of tokens are stored, and every token reads one of them.

Rows are alike if one in place of the other changes the loss little. To second order that is their distance in the
metric of the empirical Fisher information of what the table returns, averaged over tokens: with g the slope of the loss
there, the expectation of (g . (a - b))^2. Two words of one meaning lie near each other in it, and so do two that do not
matter to the task. A token whose row is not stored reads the nearest one that is. The tokenizer stays as it is, so that
a text has as many tokens as before; a smaller one would break words into more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from autocompress.anatomy import Site
from autocompress.decisions import TrimVocabulary
from autocompress.errors import PlanError

_DIRECTIONS = 128
"""Directions that rows are compared in, those in which they matter most: what more bring is within the noise."""
_PLAIN = 0.1
"""Weight of the plain distance beside the metric's: the slopes of few rows know little of most directions."""
_ROWS = 512
"""Rows that are compared with all others at once."""


@dataclass(frozen=True)
class TokenUse:
    """What the task's texts make of the table of tokens.

    Args:
        order: all tokens, ``vocabulary``, int64; those whose rows are most worth keeping come first.
        slopes: ``width x width``, float64: the mean of g g^T for slopes g of the loss at what the table returned.
        needed: how many of the first have to stay.
    """

    order: torch.Tensor
    slopes: torch.Tensor
    needed: int = 1

    @classmethod
    def of(cls, table: torch.Tensor, counts: torch.Tensor, slopes: torch.Tensor) -> TokenUse:
        """Rank tokens by what would be lost if they read the row of the nearest among those that are more frequent.

        Args:
            table: ``vocabulary x width``.
            counts: how often the texts have each token, ``vocabulary``, float64; infinite for what has to stay.
            slopes: ``width x width``, float64.
        """
        by_count = torch.argsort(counts, descending=True, stable=True)
        seen = by_count[: int((counts > 0).sum())]
        lost = counts[seen] * _to_nearest_before(_places(table[seen], slopes))
        worth = torch.where(counts[seen].isinf(), torch.inf, lost)
        ranked = seen[torch.argsort(worth, descending=True, stable=True)]
        return cls(torch.cat([ranked, by_count[len(seen) :]]), slopes, max(1, int(counts.isinf().sum())))


def check_rows(site: Site, decision: TrimVocabulary) -> None:
    """Refuse to keep rows that are not there, or all of them.

    Raises:
        PlanError: naming the site and how many there are.
    """
    if site.kind != "embedding":
        raise PlanError(f"{site.name}: only embeddings have a vocabulary, not this {site.kind} site")
    if decision.keep >= site.parts:
        raise PlanError(f"{site.name}: TrimVocabulary.keep must be < {site.parts}, got {decision.keep}")


def check_needed(decision: TrimVocabulary, needed: int) -> None:
    """Refuse to let special tokens go, of which there are ``needed``.

    Raises:
        PlanError: saying how many there are.
    """
    if decision.keep < needed:
        raise PlanError(
            f"embeddings: TrimVocabulary.keep must be >= {needed}, which are special tokens, got {decision.keep}"
        )


def trimmed(table: np.ndarray, decision: TrimVocabulary, use: TokenUse) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that are kept and the position among them that each token reads.

    Args:
        table: ``vocabulary x width``, float32.
        decision: how many are kept.
        use: what the task's texts make of the table.

    Returns:
        ``keep x width``, and ``vocabulary``, uint16 or int32.

    Raises:
        PlanError: if special tokens would have to go.
    """
    check_needed(decision, use.needed)
    kept = use.order[: decision.keep].sort().values
    places = _places(torch.from_numpy(table), use.slopes)
    there = places[kept]
    parts = (places[start : start + _ROWS] for start in range(0, len(places), _ROWS))
    # Squared distances less what is the same for all that are compared.
    lengths = there.square().sum(dim=1)
    index = torch.cat([torch.addmm(lengths, some, there.T, alpha=-2).argmin(dim=1) for some in parts])
    index[kept] = torch.arange(len(kept))  # equal rows may stand for each other
    return table[kept.numpy()], index.numpy().astype(np.uint16 if decision.index_bits == 16 else np.int32)


def _places(table: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Return points, ``rows x directions``, whose plain distances are those of the rows of ``table`` in the metric."""
    width = len(slopes)
    average = float(slopes.trace()) / width
    if not 0 < average < float("inf"):  # slopes say nothing, as in a model that was never trained
        slopes, average = torch.zeros_like(slopes), 1.0
    strengths, directions = torch.linalg.eigh(slopes + _PLAIN * average * torch.eye(width, dtype=slopes.dtype))
    basis = (directions * strengths.sqrt())[:, -_DIRECTIONS:]
    found: torch.Tensor = table.float() @ basis.float()
    return found


def _to_nearest_before(places: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of each point to the nearest of those before it; infinite for the first.

    Points are ``points x directions``, distances ``points``, float64.
    """
    found = []
    for start in range(0, len(places), _ROWS):
        some, before = places[start : start + _ROWS], places[: start + _ROWS]
        distances = _squared_distances(some, before)
        later = torch.arange(len(before)) >= torch.arange(start, start + len(some))[:, None]
        found.append(distances.masked_fill(later, torch.inf).min(dim=1).values)
    return torch.cat(found).double() if found else torch.zeros(0, dtype=torch.float64)


def _squared_distances(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return ``some x others``."""
    squares = some.square().sum(dim=1)[:, None] + others.square().sum(dim=1)
    found: torch.Tensor = (squares - 2 * some @ others.T).clamp(min=0)
    return found
