"""First and second moments of what linear layers read, by which weights are fitted.

A layer that gets other weights returns something else on calibration rows; how much, in squares, depends on the rows
through the mean and the second moments of its input alone. They are taken once for each model, and tell in closed form
which factors of a given rank (`factorize.py`) and which 4-bit weights (`quantize.py`) change the least.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from autocompress import slot
from autocompress.model import Autocast, EncoderModel
from autocompress.task import Batch

_ROLES = ("query", "output", "ffn_in", "ffn_out")
AS_READ_BY = {"key": "query", "value": "query"}
"""Roles that read what another one reads, under whose name the moments are kept."""
_STRIPS = 4
"""Parts of the channels whose products with themselves and what follows are computed at once."""
_DAMPING = 0.01
"""Part of the mean variance that is added to each variance: channels can be constant, or more than the tokens."""


@dataclass(frozen=True)
class Moments:
    """Of a layer's input over the tokens of calibration rows, padding left out.

    Args:
        mean: ``channels``, float32.
        second: ``channels x channels``, float32: the mean outer product.
    """

    mean: torch.Tensor
    second: torch.Tensor

    def kept(self, columns: torch.Tensor) -> Moments:
        """Return those of some channels."""
        return Moments(self.mean[columns], self.second[columns][:, columns])

    def through(self, weight: torch.Tensor) -> Moments:
        """Return those of what a layer of ``weight`` (``out x channels``) and no bias returns."""
        return Moments(weight @ self.mean, weight @ self.second @ weight.T)

    def gram(self, *, centred: bool) -> torch.Tensor:
        """Return the covariance, where a bias takes up the mean, or the second moments as they are.

        Returns:
            ``channels x channels``, float64, damped so that it can be inverted.
        """
        found = self.second.double()
        if centred:
            found = found - torch.outer(self.mean.double(), self.mean.double())
        damping = _DAMPING * found.diagonal().mean().clamp_min(1e-12)
        return found + damping * torch.eye(len(found), dtype=found.dtype)


def outer_products(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of the outer products of ``rows``, ``rows x channels``, with themselves: exactly symmetric.

    One half is computed, and by torch, as all around it is: the threads of NumPy's BLAS would share the cores with
    torch's, which spin for a while when they have nothing to do.
    """
    channels = rows.shape[1]
    found = rows.new_empty(channels, channels)
    ends = [channels * part // _STRIPS for part in range(_STRIPS + 1)]
    with torch.autocast("cpu", enabled=False):  # where a model is run in half precision, sums would not stay definite
        for start, end in itertools.pairwise(ends):
            torch.mm(rows[:, start:end].T, rows[:, start:], out=found[start:end, start:])
            corner = found[start:end, start:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
            found[end:, start:end] = found[start:end, end:].T
    return found


class Spread:
    """Sums over the tokens of several batches about the mean of the first one.

    Squares of what lies far from nothing, less the square of its mean, leave few digits of single precision.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.about = self.first = self.second = torch.zeros(0)

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Take in a batch, ``tokens x channels``, float32; returns how far it is from the first one's mean."""
        if not self.tokens:
            channels = values.shape[1]
            self.about = values.mean(dim=0)
            self.first = torch.zeros(channels, dtype=torch.float64)
            self.second = torch.zeros(channels, channels, dtype=torch.float64)
        away = values - self.about
        self.tokens += len(away)
        self.first += away.sum(dim=0)
        self.second += outer_products(away)
        return away

    def mean(self) -> torch.Tensor:
        """Return the mean, ``channels``, float64."""
        return self.about.double() + self.first / self.tokens

    def covariance(self) -> torch.Tensor:
        """Return the covariance, ``channels x channels``, float64."""
        away = self.first / self.tokens
        return self.second / self.tokens - torch.outer(away, away)

    def moments(self) -> Moments:
        """Return the mean and the mean outer product."""
        mean = self.mean()
        return Moments(mean.float(), (self.covariance() + torch.outer(mean, mean)).float())


OfBlocks = Callable[[int, str], Moments]
"""Returns the moments of what a block's layer of a role reads."""


def same_in_the_mean(layer: nn.Linear, fitted: torch.Tensor, moments: Moments) -> torch.Tensor | None:
    """Return the bias with which other weights, ``out x in``, return the same in the mean as ``layer`` (None: none)."""
    bias: torch.Tensor | None = layer.bias
    if bias is None:
        return None
    moved = (layer.weight.detach().double() - fitted.double()) @ moments.mean.double()
    return (bias.detach().double() + moved).to(bias.dtype)


def take_moments(
    model: EncoderModel,
    batches: Sequence[Batch],
    *,
    sites: Container[str] | None = None,
    autocast: Autocast = nullcontext,
) -> list[dict[str, Moments]]:
    """Run ``batches`` and return, block by block, the moments by role; the model is left unchanged.

    Args:
        model: to be run.
        batches: rows to run it on.
        sites: of which moments are taken, by default of all.
        autocast: entered for each run.
    """
    found: dict[tuple[int, str], Spread] = {}
    mask = torch.zeros(0)

    def note(key: tuple[int, str]) -> object:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            value = inputs[0]
            tokens = (value[mask] if value.shape[:2] == mask.shape else value).flatten(0, -2)
            found.setdefault(key, Spread()).add(tokens.float())

        return hook

    blocks = range(len(model.shape.blocks))
    roles = {"attention": _ROLES[:2], "ffn": _ROLES[2:]}
    wanted = [
        (number, role)
        for number in blocks
        for kind, of_kind in roles.items()
        for role in of_kind
        if sites is None or f"block.{number}.{kind}" in sites
    ]
    handles = [
        model.module.get_submodule(model.layout.path(*key)).register_forward_pre_hook(
            note(key)  # type: ignore[arg-type]
        )
        for key in wanted
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.attention_mask.bool()
                with slot.working(), autocast():
                    model.module(**batch.inputs())
    finally:
        for handle in handles:
            handle.remove()
    return [{role: found[key].moments() for key in wanted if key[0] == n for role in key[1:]} for n in blocks]


def save_moments(found: Sequence[dict[str, Moments]], folder: Path) -> None:
    """Write moments into ``folder``."""
    tensors = {}
    for number, by_role in enumerate(found):
        for role, moments in by_role.items():
            tensors[f"{number}.{role}.mean"] = moments.mean
            tensors[f"{number}.{role}.second"] = moments.second.contiguous()
    save_file(tensors, folder / "moments.safetensors")


def read_moments(folder: Path, block: int, role: str) -> Moments:
    """Read of what `save_moments` wrote those of one layer's input."""
    with safe_open(folder / "moments.safetensors", framework="pt") as opened:
        return Moments(*(opened.get_tensor(f"{block}.{role}.{name}") for name in ("mean", "second")))
