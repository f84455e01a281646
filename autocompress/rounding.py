"""Training with weights rounded as they will be stored, so that a model comes to fit the grid that it is shipped on.

Each forward pass multiplies by the numbers that would be stored, and gradients go to the weights behind them as if
nothing had been rounded: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for
Conditional Computation", section 1; Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3. Grids are those of `transforms/quantize.py`, fitted anew now and then;
the numbers of the last pass are stored as they are. Activations are not rounded in training: their 8 bits cost little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from autocompress.decisions import Quantize
from autocompress.model import EncoderModel
from autocompress.pieces import linear_modules
from autocompress.plan import CompressionPlan
from autocompress.transforms.quantize import Packed, limits, packed

_FILE = "rounded.safetensors"


class _OnGrid(nn.Module):
    """Rounds a weight matrix, ``out x in``, to a grid that was fitted to it.

    Args:
        weight: the matrix.
        decision: how it is stored.
    """

    scales: torch.Tensor
    multiples: torch.Tensor

    def __init__(self, weight: torch.Tensor, decision: Quantize) -> None:
        super().__init__()
        self.decision = decision
        scales, multiples = self._fitted(weight)
        self.register_buffer("scales", scales)
        self.register_buffer("multiples", multiples)

    def _fitted(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = packed(weight.detach().numpy(), self.decision)
        assert found.scales is not None, "on a grid"
        scales = torch.from_numpy(found.scales).reshape(len(weight), -1, 1)
        multiples = torch.ones(1, 1, 1) if found.multiples is None else torch.from_numpy(found.multiples).float()
        return scales, multiples

    def refit(self, weight: torch.Tensor) -> None:
        for part, fitted in zip((self.scales, self.multiples), self._fitted(weight), strict=True):
            part.copy_(fitted)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            # In the order of `Packed.restored`, so that it is the same to the last bit.
            nearest = (self._values(weight) * self.multiples * self.scales).reshape(weight.shape)
        # The value of the first and the gradient of the second.
        return nearest + (weight - weight.detach())

    def stored(self, weight: torch.Tensor) -> Packed:
        """Return ``weight`` in the numbers that `forward` rounds it to."""
        values = self._values(weight.detach()).to(torch.int8).numpy()
        if self.decision.weight_bits == 8:
            return Packed(8, values.reshape(weight.shape), self.scales[:, 0].numpy().copy())
        multiples = self.multiples.to(torch.int8).numpy() if self.decision.whole_steps else None
        return Packed(self.decision.weight_bits, values, self.scales.numpy().copy(), multiples)

    def _values(self, weight: torch.Tensor) -> torch.Tensor:
        grouped = weight.reshape(len(weight), self._groups, -1)
        return (grouped / (self.multiples * self.scales)).round().clamp(*limits(self.decision))

    @property
    def _groups(self) -> int:
        return max(self.scales.shape[1], self.multiples.shape[1])


class Rounded:
    """The layers of a model whose weights are rounded while it is trained.

    Args:
        layers: by their paths.
        decisions: how each is stored.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], decisions: Mapping[str, Quantize]) -> None:
        self._layers = layers
        self.stored: dict[str, Packed] = {}
        for path, layer in layers.items():
            parametrize.register_parametrization(layer, "weight", _OnGrid(layer.weight, decisions[path]))

    def refit(self) -> None:
        """Fit the grids to the weights as they have become."""
        for grid, weight in self._grids().values():
            grid.refit(weight)

    def _grids(self) -> dict[str, tuple[_OnGrid, torch.Tensor]]:
        found = {}
        for path, layer in self._layers.items():
            weight: parametrize.ParametrizationList = layer.parametrizations.weight  # type: ignore[union-attr, assignment]
            grid = weight[0]
            assert isinstance(grid, _OnGrid)
            found[path] = (grid, weight.original)
        return found

    def end(self) -> None:
        """Give the layers the rounded weights for their own."""
        self.stored = {path: grid.stored(weight) for path, (grid, weight) in self._grids().items()}
        for layer in self._layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def save_packed(weights: Mapping[str, Packed], folder: Path) -> None:
    """Write weights that were trained in the numbers to be stored, by path, into ``folder``; none: no file."""
    tensors = {f"{path}/{name}": part for path, each in weights.items() for name, part in each.tensors().items()}
    if tensors:
        save_file(tensors, folder / _FILE)


def read_packed(folder: Path) -> dict[str, Packed]:
    """Read what `save_packed` wrote."""
    if not (folder / _FILE).exists():
        return {}
    by_path: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in load_file(folder / _FILE).items():
        path, _, part = name.partition("/")
        by_path.setdefault(path, {})[part] = tensor
    return {path: Packed.of(parts) for path, parts in by_path.items()}


@contextmanager
def rounded(
    model: EncoderModel, plan: CompressionPlan, tables: Mapping[str, np.ndarray] | None = None
) -> Iterator[Rounded]:
    """Let ``model`` compute with the weights of its linear layers as ``plan`` stores them while it is trained.

    In the end it has these weights, and `Rounded.stored` has them in the numbers that are to be stored, by path.

    Args:
        model: what the structural decisions of ``plan`` lead to.
        plan: decisions of 8 or fewer bits count.
        tables: embedding tables to compute with meanwhile, by path; the model's own come back in the end.
    """
    decisions, layers = {}, {}
    for site, decision in plan.narrow.items():
        for path in () if site == "embeddings" else model.layout.linears(site):
            for name, layer in linear_modules(model, path):
                decisions[name], layers[name] = decision, layer
    own = {path: model.module.get_parameter(f"{path}.weight") for path in tables or {}}
    kept = {path: parameter.detach().clone() for path, parameter in own.items()}
    found = Rounded(layers, decisions)
    with torch.no_grad():
        for path, table in (tables or {}).items():
            own[path].copy_(torch.from_numpy(table))
    try:
        yield found
    finally:
        with torch.no_grad():
            for path, parameter in own.items():
                parameter.copy_(kept[path])
        found.end()
