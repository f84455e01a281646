"""Weights are fitted so that a pruned model carries on, block by block, what it did before.

A block adds to what runs through the model twice: after its attention and after its FFN. The layer that adds is given,
from the first block to the last, the weights and the bias with which the sum comes nearest to what it was at that
place, by least squares over the tokens of calibration rows, for the inputs that it gets from what has been fitted
before it. It thus makes up for what was removed in front of it, and for what earlier blocks could not make up for: He
et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", eq. 3 and section 3.2 ("residual"); Kwon et
al. 2022, "A Fast Post-Training Pruning Framework for Transformers", section 4.3, fit a mask by the same criterion.

What stood at those places before is the same for all that a model is pruned to, so it is taken once (`sums_in`).

Nothing is trained: there are no gradients, and one solution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from autocompress import slot
from autocompress.errors import ModelError
from autocompress.model import Autocast, EncoderModel
from autocompress.task import Batch
from autocompress.transforms.moments import Moments, Spread

RIDGE = 0.1
"""Pull towards the weights as they are, in mean variances of what a layer reads."""
_ADDING = ("output", "ffn_out")
"""Roles of the layers that add to what runs through the model, in the order of their use."""
_STARTING = ("query", "ffn_in")
"""Roles of the layers that read what runs through the model; what they read others read, too."""
_LEADING_TO = {"output": ("query", "key", "value"), "ffn_out": ("ffn_in",)}
"""Roles of the layers of which comes what these read."""

Hook = Callable[[nn.Module, tuple[torch.Tensor, ...]], None]
"""Is called before a module with what it reads."""
Wanted = Callable[[int, str], torch.Tensor]
"""Returns what stood in the whole model where the layer of a block and a role had added, ``tokens x channels``."""


def reconstruct(
    model: EncoderModel,
    wanted: Wanted,
    counterparts: Sequence[tuple[int, int]],
    batches: Sequence[Batch],
    *,
    since: int = 0,
    autocast: Autocast = nullcontext,
) -> list[dict[str, Moments]]:
    """Fit the layers of ``model`` that add to what runs through it; of two factors, the second.

    Args:
        model: what was pruned; changed in place.
        wanted: of what it was before, for the same rows.
        counterparts: for each block of the model, the first and the last block of the whole one that it stands for.
        batches: calibration rows.
        since: the first block where the model is not what it was; before, nothing is missing.
        autocast: entered for each run of the model and for products over the tokens of a batch, as where half precision
            is faster; sums over batches are taken in double.

    Returns:
        The moments of what the layers of the model read in the end, as `take_moments` would take them of ``batches``;
        none of the blocks before ``since``.

    Raises:
        ModelError: if a block does not normalise what it added up.
    """
    rows = _Rows(model, batches, autocast)
    for _ in range(since):
        rows.next_block()
    found: list[dict[str, Moments]] = [{} for _ in range(since)]
    for number, its in enumerate(counterparts[since:], since):
        spreads = {role: Spread() for role in _STARTING}
        for role, block in zip(_ADDING, its, strict=True):
            module = model.module.get_submodule(model.layout.path(number, role))
            sums = _Sums(_last_linear(module))
            spreads[role] = sums.read if module is sums.layer else Spread()
            for seen, target in zip(rows.seen(role), torch.split(wanted(block, role), rows.tokens), strict=True):
                with slot.working(), autocast():
                    sums.count(seen.read, target - seen.after)
                    if seen.entering is not None:
                        spreads[role].add(seen.entering)
            with slot.working():
                sums.fit()
        rows.next_block(spreads)
        found.append({role: spread.moments() for role, spread in spreads.items()})
    return found


def sums_in(
    whole: EncoderModel, batches: Sequence[Batch], *, autocast: Autocast = nullcontext
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield for each block what stands where its layers have added, ``tokens x channels`` by role, padding left out.

    Raises:
        ModelError: if a block does not normalise what it added up.
    """
    rows = _Rows(whole, batches, autocast)
    for _ in whole.shape.blocks:
        yield rows.next_block()


def save_sums(found: Iterator[dict[str, torch.Tensor]], folder: Path) -> None:
    """Write what `sums_in` yields into ``folder``, in bfloat16: many tokens go into what is fitted to it."""
    for number, by_role in enumerate(found):
        save_file({role: value.bfloat16() for role, value in by_role.items()}, folder / f"{number}.safetensors")


def read_sums(folder: Path, block: int, role: str) -> torch.Tensor:
    """Read of what `save_sums` wrote those of one layer."""
    with safe_open(folder / f"{block}.safetensors", framework="pt") as opened:
        found: torch.Tensor = opened.get_tensor(role)
    return found.float()


class _Sums:
    """What least squares need to know of a layer's inputs and of what is missing behind it.

    Args:
        layer: to be fitted.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.read = Spread()
        self.missing = torch.zeros(layer.out_features, dtype=torch.float64)
        self.mixed = torch.zeros(layer.in_features, layer.out_features, dtype=torch.float64)

    def count(self, read: torch.Tensor, missing: torch.Tensor) -> None:
        """Take in tokens, ``tokens x inner`` and ``tokens x outer``."""
        self.missing += missing.sum(dim=0)
        self.mixed += self.read.add(read).T @ missing

    def fit(self) -> None:
        """Change the weights so that the least is missing in squares, and the bias so that nothing is in the mean."""
        read, missing, tokens = self.read.mean(), self.missing / self.read.tokens, self.read.tokens
        about, square = self.read.about.double(), self.read.covariance()
        bias: torch.Tensor | None = self.layer.bias
        # Both about the mean of what is read if a bias makes up for it, else about nothing.
        if bias is not None:
            mixed = self.mixed / tokens - torch.outer(read - about, missing)
        else:
            square, mixed = square + torch.outer(read, read), self.mixed / tokens + torch.outer(about, missing)
        pull = RIDGE * square.diagonal().mean().clamp_min(1e-12)
        root = torch.linalg.cholesky(square + pull * torch.eye(len(square), dtype=torch.float64))
        change = torch.cholesky_solve(mixed, root).T
        with torch.no_grad():
            self.layer.weight += change
            if bias is not None:
                bias += missing - change @ read


class _Stop(Exception):
    """Ends a run of a block where what comes after it is of no interest."""


@dataclass(frozen=True)
class _Seen:
    """What a layer reads, and what comes of adding its output, of the tokens of a batch, ``tokens x channels``."""

    read: torch.Tensor
    after: torch.Tensor
    entering: torch.Tensor | None = None
    """What the first of two factors reads, where ``read`` is what the second one does."""


class _Rows:
    """Calibration rows on their way through a model, which is run block by block.

    Args:
        model: to be run.
        batches: the rows.
        autocast: entered for each run.
    """

    def __init__(self, model: EncoderModel, batches: Sequence[Batch], autocast: Autocast) -> None:
        self.model = model
        self.autocast = autocast
        self.blocks = list(model.block_list())
        self.masks = [batch.attention_mask.bool() for batch in batches]
        self.tokens = [int(mask.sum()) for mask in self.masks]
        """Without padding, by batch."""
        self.block = 0
        self.read: dict[str, list[torch.Tensor]] = {}
        """What layers of this block read, by role and batch, as far as it was seen."""
        self.inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        """What the block that is up next is called with, by batch."""
        handle = self.blocks[0].register_forward_pre_hook(self._note_inputs, with_kwargs=True)
        try:
            for batch in batches:
                with slot.working(), self._running(), suppress(_Stop):
                    model.module(**batch.inputs())
        finally:
            handle.remove()

    def _note_inputs(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.inputs.append((inputs, named))
        raise _Stop

    def next_block(self, spreads: Mapping[str, Spread] = MappingProxyType({})) -> dict[str, torch.Tensor]:
        """Run this block and go on to the next; returns what stands where layers have added, by role.

        ``spreads`` takes in what layers read, by role, of those at which a block's parts start.
        """
        starting = [role for role in _STARTING if role in spreads]
        found: dict[str, list[torch.Tensor]] = {role: [] for role in _ADDING}
        with self._noted(_ADDING, stop=False) as seen, ExitStack() as after:
            for role in starting:
                after.callback(self._module(role).register_forward_pre_hook(self._noting(role, seen)).remove)
            for number in range(len(self.inputs)):
                with slot.working():
                    end = self._run(number)
                    for role in starting:
                        [entering] = seen.pop(role)
                        spreads[role].add(self._without_padding(number, entering))
                    inputs, named = self.inputs[number]
                    self.inputs[number] = ((end, *inputs[1:]), named)
                    for role in _ADDING:
                        found[role].append(self._of_tokens(number, seen, role, end).after)
        self.block += 1
        self.read.clear()
        return {role: torch.cat(values) for role, values in found.items()}

    def seen(self, role: str) -> Iterator[_Seen]:
        """Yield for each batch what the layer of a role in this block sees; what it reads is not computed again."""
        read: list[torch.Tensor] = []
        with self._noted((role,), stop=True) as seen:
            for number in range(len(self.inputs)):
                end: torch.Tensor | None = None
                with slot.working():
                    with suppress(_Stop):
                        end = self._run(number)
                    read += seen.get(role, [])[:1]
                    of_batch = self._of_tokens(number, seen, role, end)
                yield of_batch
        self.read[role] = read

    def _module(self, role: str) -> nn.Module:
        return self.model.module.get_submodule(self.model.layout.path(self.block, role))

    def _without_padding(self, number: int, value: torch.Tensor) -> torch.Tensor:
        return value[self.masks[number]].float()

    def _run(self, number: int) -> torch.Tensor:
        """Return what this block makes of a batch."""
        inputs, named = self.inputs[number]
        with self._running(), self._spared(number):
            found = self.blocks[self.block](*inputs, **named)
        return found if isinstance(found, torch.Tensor) else found[0]

    @contextmanager
    def _running(self) -> Iterator[None]:
        with torch.no_grad(), self.autocast():
            yield

    @contextmanager
    def _spared(self, number: int) -> Iterator[None]:
        """Let layers of this block read what they were seen to read of a batch, and none compute it."""
        with ExitStack() as after:
            for role, read in self.read.items():
                for module in map(self._module, _LEADING_TO[role]):
                    module.forward = _Nothing(_last_linear(module).out_features)
                    after.callback(delattr, module, "forward")
                layer = _last_linear(self._module(role))
                handle = layer.register_forward_pre_hook(lambda _, __, known=read[number]: (known,))
                after.callback(handle.remove)
            yield

    @staticmethod
    def _noting(name: str, seen: dict[str, list[torch.Tensor]]) -> Hook:
        """Return a hook that puts under ``name`` what a module reads."""

        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = [inputs[0]]

        return hook

    def _of_tokens(
        self, number: int, seen: dict[str, list[torch.Tensor]], role: str, end: torch.Tensor | None
    ) -> _Seen:
        """Return what was noted, without padding; ``end`` is what the block returns, unless it was stopped before."""
        noted = seen.pop(role, [])
        if len(noted) == 1 and role == _ADDING[-1] and end is not None:
            noted.append(end)  # where each block begins by normalising, the last sum is what it returns
        if len(noted) < 2:
            raise ModelError(f"model: {role} of block {self.block}: nothing normalises what it adds to")
        noted += seen.pop(_entering(role), [])
        return _Seen(*(self._without_padding(number, value) for value in noted))

    @contextmanager
    def _noted(self, roles: Sequence[str], *, stop: bool) -> Iterator[dict[str, list[torch.Tensor]]]:
        """Note of each run of this block what layers read and what they add up to, which is what is normalised next.

        With ``stop`` that ends the run.
        """
        seen: dict[str, list[torch.Tensor]] = {}
        waiting: list[str] = []

        def adding(role: str) -> Hook:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                seen[role] = [inputs[0]]
                waiting[:] = [role]

            return hook

        def normalising(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            # What waits may be of the batch before, in a block that normalises nothing at its end.
            noted = seen.get(waiting.pop()) if waiting else None
            if noted is not None:
                noted.append(inputs[0])
                if stop:
                    raise _Stop

        block, modules = self.blocks[self.block], {role: self._module(role) for role in roles}
        handles = [_last_linear(module).register_forward_pre_hook(adding(role)) for role, module in modules.items()]
        handles += [m.register_forward_pre_hook(normalising) for m in block.modules() if isinstance(m, nn.LayerNorm)]
        handles += [
            module.register_forward_pre_hook(self._noting(_entering(role), seen))
            for role, module in modules.items()
            if isinstance(module, nn.Sequential)
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class _Nothing:
    """Stands for a layer whose output nobody needs."""

    width: int

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return value.new_zeros(*value.shape[:-1], self.width)


def _entering(role: str) -> str:
    return f"{role}, first factor"


def _last_linear(module: nn.Module) -> nn.Linear:
    found = module[-1] if isinstance(module, nn.Sequential) else module
    assert isinstance(found, nn.Linear), "a layer, or two factors of one"
    return found
