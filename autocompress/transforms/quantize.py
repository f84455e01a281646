"""The arithmetic of quantisation, shared by the runtimes.

Weights are symmetric: per output channel at 8 bits, per group along the input at 4 bits, where the scale of each group
is the one of a few that leaves the smallest squared error. Activations at 8 bits use one asymmetric range per layer
input, the mean over calibration rows of each row's smallest and largest value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from autocompress.anatomy import Site
from autocompress.errors import PlanError
from autocompress.model import EncoderModel
from autocompress.plan import Quantize
from autocompress.task import Batch

_CLIPS = (1.0, 0.92, 0.84)
"""Shares of a group's largest magnitude that are tried as the end of the 4-bit grid."""


def check_groups(site: Site, decision: Quantize, rank: int) -> None:
    """Refuse groups that do not fill every input width at ``site``; ``rank`` is that of a second factor, or 0.

    Raises:
        PlanError: naming the width.
    """
    for width in (site.inner, site.outer, rank):
        if decision.group_size and width % decision.group_size:
            raise PlanError(f"{site.name}: group_size must divide the input width {width}, got {decision.group_size}")


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers and scales of one weight matrix: ``values * scales`` approximates it.

    Args:
        values: int8, ``out x in`` per channel, ``out x groups x group`` in groups.
        scales: float32, ``out x 1`` or ``out x groups x 1``.
    """

    values: np.ndarray
    scales: np.ndarray

    def restored(self) -> np.ndarray:
        """Return the approximation, ``out x in``, float32."""
        return np.asarray((self.values * self.scales).reshape(self.values.shape[0], -1))


def per_channel(weight: np.ndarray) -> QuantizedWeight:
    """Quantise ``weight`` (``out x in``) to 8 bits with one scale per output channel."""
    scales = np.abs(weight).max(axis=1, keepdims=True) / 127.0
    scales[scales == 0] = 1.0
    values = np.rint(weight / scales).astype(np.int8)
    return QuantizedWeight(values, scales.astype(np.float32))


def per_group(weight: np.ndarray, group_size: int) -> QuantizedWeight:
    """Quantise ``weight`` (``out x in``) to 4 bits, -8..7, with one scale per ``group_size`` inputs.

    Raises:
        PlanError: if the groups do not fill a row.
    """
    rows, width = weight.shape
    if width % group_size:
        raise PlanError(f"Quantize.group_size: must divide the input width {width}, got {group_size}")
    grouped = weight.reshape(rows, width // group_size, group_size).astype(np.float32)
    largest = np.abs(grouped).max(axis=2, keepdims=True)
    largest[largest == 0] = 7.0
    best_values, best_scales, best_error = None, None, None
    for clip in _CLIPS:
        scales = largest * np.float32(clip / 7.0)
        values = np.clip(np.rint(grouped / scales), -8, 7)
        error = np.square(values * scales - grouped).sum(axis=2, keepdims=True)
        if best_values is None:
            best_values, best_scales, best_error = values, scales, error
        else:
            better = error < best_error
            best_values = np.where(better, values, best_values)
            best_scales = np.where(better, scales, best_scales)
            best_error = np.where(better, error, best_error)
    assert best_values is not None and best_scales is not None
    return QuantizedWeight(best_values.astype(np.int8), best_scales.astype(np.float32))


@dataclass(frozen=True)
class ActivationRange:
    """Ends of an 8-bit asymmetric grid that holds zero exactly."""

    low: float
    high: float

    @classmethod
    def around(cls, low: float, high: float) -> ActivationRange:
        """Widen an observed range so that zero is one of its 256 steps."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / 255 or 1.0
        zero = round(-low / step)
        return cls(-zero * step, (255 - zero) * step)


def activation_ranges(model: EncoderModel, batches: Sequence[Batch]) -> dict[str, ActivationRange]:
    """Observe the input of every linear layer, padding left out.

    Returns:
        The range by module path.
    """
    lows: dict[str, list[float]] = {}
    highs: dict[str, list[float]] = {}
    mask = torch.zeros(0)

    def observe(path: str) -> object:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            value = inputs[0]
            low, high = value, value
            if value.ndim == 3 and value.shape[:2] == mask.shape:
                padding = (mask == 0)[..., None]
                low, high = value.masked_fill(padding, torch.inf), value.masked_fill(padding, -torch.inf)
            lows.setdefault(path, []).extend(low.flatten(1).amin(dim=1).tolist())
            highs.setdefault(path, []).extend(high.flatten(1).amax(dim=1).tolist())

        return hook

    handles = [
        layer.register_forward_pre_hook(observe(path))  # type: ignore[arg-type]
        for path, layer in model.module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.attention_mask
                model.module(**batch.inputs())
    finally:
        for handle in handles:
            handle.remove()
    return {path: ActivationRange.around(float(np.mean(lows[path])), float(np.mean(highs[path]))) for path in lows}
