"""Pieces: what stands at one site after its decisions, as arrays that any runtime can put into a graph.

A piece depends on the model, the site and what is decided there, and on nothing else in the plan. It is therefore made
once, kept in the bank, and shared by all candidates that decide the same at that site. Ranges of activations are those
of the model that the piece was made from: what other sites do to them is not followed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from autocompress import machine
from autocompress.anatomy import columns_of
from autocompress.decisions import Decision, LowRank, PruneHeads, PruneNeurons, Quantize, TrimVocabulary
from autocompress.model import ROLES, EncoderModel
from autocompress.transforms import HANDLERS
from autocompress.transforms.importance import Importance
from autocompress.transforms.moments import Moments, same_in_the_mean
from autocompress.transforms.quantize import ActivationRange, Activations, Packed, packed
from autocompress.transforms.vocabulary import trimmed

_FILE = "piece.safetensors"


@dataclass(frozen=True)
class Factor:
    """One matrix product of a layer.

    Args:
        weight: ``out x in``.
        bias: ``out``, float32, or None.
        span: 8-bit grid of its input where the product is computed in integers, else None.
        index: of a table that was trimmed, the row that each token reads, ``vocabulary``, uint16 or int32.
    """

    weight: Packed
    bias: np.ndarray | None = None
    span: ActivationRange | None = None
    index: np.ndarray | None = None


Layer = tuple[Factor, ...]
"""The products that stand for one linear layer, one after the other: two where it was factorised. An embedding table
is a layer of one factor, ``rows x width``."""
Piece = tuple[Layer, ...]
"""The layers of a site, in the order of `Layout.linears`."""


SOURCES = (
    "pieces.py",
    *(
        f"transforms/{name}.py"
        for name in ("__init__", "moments", "importance", "prune", "factorize", "quantize", "vocabulary")
    ),
)
"""What pieces come of."""


@functools.cache
def code_version(sources: tuple[str, ...] = SOURCES) -> str:
    """Return a key of the code that makes pieces, or of other files of the package, so that a change makes new ones.

    What the code makes of this CPU is part of it.
    """
    digest = hashlib.sha256(b"7 bits" if machine.adds_in_16_bits() else b"")
    package = resources.files("autocompress")
    for name in sources:
        digest.update(package.joinpath(name).read_bytes())
    return digest.hexdigest()[:12]


def make_piece(
    model: EncoderModel,
    site: str,
    decisions: Sequence[Decision],
    scores: Importance,
    activations: Activations,
    trained: Mapping[str, Packed] = MappingProxyType({}),
) -> Piece:
    """Carry out ``decisions`` at ``site`` of ``model``, which is given back as it was.

    Args:
        model: the model that the plan starts from.
        site: its name in ``model``.
        decisions: of that site, in order of application.
        scores: importance of the model's parts.
        activations: of ``model`` on calibration rows.
        trained: weights that were trained in the numbers to be stored, by the path of the layer.
    """
    quantize = next((d for d in decisions if isinstance(d, Quantize)), None)
    if site == "embeddings":
        tables = [_array(model.module.get_parameter(f"{path}.weight")) for path in model.layout.embeddings]
        trim = next((d for d in decisions if isinstance(d, TrimVocabulary)), None)
        index = None
        if trim is not None:
            assert scores.tokens is not None, "trimming needs to know what is read"
            tables[0], index = trimmed(tables[0], trim, scores.tokens)
        stored = [packed(table, quantize, looked_up=True) for table in tables]
        return ((Factor(stored[0], index=index),), *((Factor(table),) for table in stored[1:]))
    columns = _columns(model, site, decisions, scores)
    own = {path: [name for name, _ in linear_modules(model, path)] for path in model.layout.linears(site)}
    with _carried_out(model, site, decisions, scores):
        read = _read_at(model, site, quantize, scores)
        return tuple(
            _layer(model, path, names, quantize, columns, activations, read.get(path), trained)
            for path, names in own.items()
        )


def reads_moments(site: str, decisions: Sequence[Decision]) -> bool:
    """Return whether some of ``decisions`` at ``site`` are carried out by the moments of what its layers read.

    From 8 bits on, rounding errors are too small for that.
    """
    return site.startswith("block.") and any(
        isinstance(d, LowRank) or (isinstance(d, Quantize) and d.weight_bits < 8) for d in decisions
    )


def _read_at(model: EncoderModel, site: str, quantize: Quantize | None, scores: Importance) -> dict[str, Moments]:
    """Return the moments of what the site's layers read, by path, where they are known and rounding goes by them."""
    if quantize is None or not reads_moments(site, [quantize]):
        return {}
    _, number, kind = site.split(".")
    block, shape = int(number), model.shape.blocks[int(number)]
    known = {model.layout.path(block, role): scores.read_by(block, role, shape) for role in ROLES[kind]}
    return {path: moments for path, moments in known.items() if moments is not None}


def _layer(
    model: EncoderModel,
    path: str,
    names: Sequence[str],
    quantize: Quantize | None,
    columns: Sequence[int] | None,
    activations: Activations,
    moments: Moments | None,
    trained: Mapping[str, Packed],
) -> Layer:
    """Return the layer at ``path``, whose products were called ``names`` when ``activations`` were observed."""
    integers = quantize is not None and quantize.activation_bits == 8
    factors: list[Factor] = []
    weight, read = np.zeros((0, 0)), np.zeros((0, 0))
    for name, module in linear_modules(model, path):
        if integers:
            # The second factor of a layer that is factorised here reads what the first one makes of its input.
            known = name if name in names else names[0]
            read = activations.read_by(known) if name in names or not factors else read @ weight.T
            if read.shape[1] != module.in_features:
                assert columns is not None, "only pruning narrows an input"
                read = read[:, columns]
        weight = _array(module.weight)
        stored, bias = _stored(module, quantize, moments, trained.get(name))
        factors.append(Factor(stored, bias, activations.span(read) if integers else None))
        moments = None if moments is None else moments.through(module.weight.detach())
    return tuple(factors)


def _stored(
    layer: nn.Linear, quantize: Quantize | None, moments: Moments | None, trained: Packed | None
) -> tuple[Packed, np.ndarray | None]:
    """Return weight and bias of a layer as they are stored, given the moments of its input where they are known."""
    weight, bias = _array(layer.weight), None if layer.bias is None else _array(layer.bias)
    if trained is not None:
        return trained, bias
    if quantize is None or moments is None:
        return packed(weight, quantize), bias
    found = packed(weight, quantize, gram=moments.gram(centred=bias is not None).numpy())
    kept = same_in_the_mean(layer, torch.from_numpy(found.restored()), moments)
    return found, None if kept is None else _array(kept)


@dataclass(frozen=True)
class StandIn:
    """A layer of the original shape that acts as another one does.

    Args:
        weight: ``out x in``.
        bias: ``out``, or None where it is the original's.
    """

    weight: np.ndarray
    bias: np.ndarray | None = None


def stand_ins(model: EncoderModel, site: str, decision: Decision, scores: Importance) -> dict[str, StandIn]:
    """Return, by path, layers of the original shape that act as the site's layers do after a structural decision.

    Only for judging decisions before anything is built: a score comes from a built artefact. What is pruned is zero in
    the layer that reads it.
    """
    columns = _columns(model, site, [decision], scores)
    if columns is not None:
        path = model.layout.linears(site)[-1]
        weight = _array(model.module.get_parameter(f"{path}.weight"))
        kept = np.zeros_like(weight)
        kept[:, columns] = weight[:, columns]
        return {path: StandIn(kept)}
    with _carried_out(model, site, [decision], scores):
        found = {}
        for path in model.layout.linears(site):
            (_, first), (_, second) = linear_modules(model, path)
            bias = None if second.bias is None else _array(second.bias)
            found[path] = StandIn(_array(second.weight) @ _array(first.weight), bias)
        return found


def unpacked(model: EncoderModel, site: str, piece: Piece) -> dict[str, StandIn]:
    """Return, by path, layers of the original shape with the weights of a piece that changes no shape."""
    paths = [name for path in model.layout.linears(site) for name in _names(model, site, path)]
    factors = [factor for layer in piece for factor in layer]
    found = {}
    for path, factor in zip(paths, factors, strict=True):
        rows = factor.weight.restored()
        found[path] = StandIn(rows if factor.index is None else rows[factor.index], factor.bias)
    return found


def _names(model: EncoderModel, site: str, path: str) -> list[str]:
    return [path] if site == "embeddings" else [name for name, _ in linear_modules(model, path)]


def linear_modules(model: EncoderModel, path: str) -> list[tuple[str, nn.Linear]]:
    """Return the linear layer at ``path`` with its own path, or both factors where it was factorised."""
    return [
        (f"{path}.{name}" if name else path, layer)
        for name, layer in model.module.get_submodule(path).named_modules()
        if isinstance(layer, nn.Linear)
    ]


def save_piece(piece: Piece, folder: Path) -> None:
    """Write ``piece`` into ``folder``."""
    tensors: dict[str, np.ndarray] = {}
    for i, layer in enumerate(piece):
        for j, factor in enumerate(layer):
            tensors |= {f"{i}.{j}.{name}": part for name, part in factor.weight.tensors().items()}
            if factor.bias is not None:
                tensors[f"{i}.{j}.bias"] = factor.bias
            if factor.span is not None:
                tensors[f"{i}.{j}.span"] = np.array([factor.span.low, factor.span.high])
            if factor.index is not None:
                tensors[f"{i}.{j}.index"] = factor.index
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / _FILE)


def read_piece(folder: Path) -> Piece:
    """Read what `save_piece` wrote."""
    factors: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for name, tensor in load_file(folder / _FILE).items():
        layer, factor, part = name.split(".", maxsplit=2)
        factors.setdefault((int(layer), int(factor)), {})[part] = tensor
    layers: dict[int, list[Factor]] = {}
    for (number, _), parts in sorted(factors.items()):
        span = ActivationRange(*(float(end) for end in parts["span"])) if "span" in parts else None
        read = Factor(Packed.of(parts), parts.get("bias"), span, parts.get("index"))
        layers.setdefault(number, []).append(read)
    return tuple(tuple(layer) for layer in layers.values())


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().float().numpy())


def _columns(model: EncoderModel, site: str, decisions: Sequence[Decision], scores: Importance) -> list[int] | None:
    """Return which channels of the site's inner width are kept, or None for all."""
    for decision in decisions:
        if isinstance(decision, (PruneHeads, PruneNeurons)):
            block = int(site.split(".")[1])
            if isinstance(decision, PruneNeurons):
                return scores.best_neurons(block, decision.keep)
            return columns_of(scores.best_heads(block, decision.keep), model.shape.blocks[block].head_size)
    return None


@contextmanager
def _carried_out(model: EncoderModel, site: str, decisions: Sequence[Decision], scores: Importance) -> Iterator[None]:
    """Apply the structural decisions of one site, and put the layers back in the end."""
    shape = model.shape
    layers = {path: model.module.get_submodule(path) for path in model.layout.linears(site)}
    try:
        for decision in decisions:
            if type(decision) in HANDLERS:
                HANDLERS[type(decision)].apply(model, model.shape.sites()[site], decision, scores)
        yield
    finally:
        for path, layer in layers.items():
            model.replace(path, layer)
        model.shape = shape
