"""Load a sequence classifier safely and find its anatomy by structure.

An encoder is understood if it has one list of equal blocks, each with exactly six linear layers: query, key, value and
attention output (hidden x hidden), then the two of the FFN. That holds for BERT, RoBERTa, DistilBERT, MiniLM and
ELECTRA under whatever names. What is found is proven on a copy before it is used: removing a head and a neuron must
give the same output as silencing them. Everything else is refused.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autocompress.anatomy import BlockShape, ModelShape
from autocompress.errors import ModelError, first_line
from autocompress.origins import VOCABULARIES

ROLES = {"attention": ("query", "key", "value", "output"), "ffn": ("ffn_in", "ffn_out")}
"""Roles of the linear layers of a block, by the kind of their site, in the order of their use."""
_ROLES = (*ROLES["attention"], *ROLES["ffn"])


@dataclass(frozen=True)
class Layout:
    """Where the parts of an encoder stand, as module paths.

    Args:
        blocks: path of the list of blocks.
        roles: paths within a block by role: query, key, value, output, ffn_in, ffn_out.
        embeddings: paths of all embedding tables, that of tokens first.
        head: paths of all linear layers outside the blocks.
    """

    blocks: str
    roles: dict[str, str]
    embeddings: tuple[str, ...]
    head: tuple[str, ...]

    def linears(self, site: str) -> tuple[str, ...]:
        """Return the module paths of a site's linear layers (embedding tables for ``embeddings``)."""
        if site == "embeddings":
            return self.embeddings
        if site == "head":
            return self.head
        _, number, kind = site.split(".")
        return tuple(self.path(int(number), role) for role in ROLES[kind])

    def path(self, block: int, role: str) -> str:
        return f"{self.blocks}.{block}.{self.roles[role]}"


Autocast = Callable[[], AbstractContextManager[object]]
"""Returns the context in which a model is run."""


@dataclass
class EncoderModel:
    """A classifier with its anatomy. Transforms change ``module`` and ``shape`` together.

    Args:
        module: takes ``input_ids`` and ``attention_mask`` (``batch x tokens``), returns ``logits``
            (``batch x classes``).
        layout: module paths.
        shape: current sizes.
        base: content key of the weights that it started from, for caches.
    """

    module: nn.Module
    layout: Layout
    shape: ModelShape
    base: str

    def linear(self, block: int, role: str) -> nn.Linear:
        layer = self.module.get_submodule(self.layout.path(block, role))
        assert isinstance(layer, nn.Linear), f"{self.layout.path(block, role)} is not linear"
        return layer

    def replace(self, path: str, layer: nn.Module) -> None:
        """Put ``layer`` in place of the module at ``path``."""
        parent, _, name = path.rpartition(".")
        setattr(self.module.get_submodule(parent), name, layer)

    def block_list(self) -> nn.ModuleList:
        blocks = self.module.get_submodule(self.layout.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def most_tokens(self) -> int | None:
        """How many tokens it reads at once, or None where it has no table of their places."""
        tables = [m for path, m in self.module.named_modules() if isinstance(m, nn.Embedding) and "position" in path]
        # RoBERTa's places begin after the number that stands for padding.
        firsts = [0 if table.padding_idx is None else table.padding_idx + 1 for table in tables]
        return min((table.num_embeddings - first for table, first in zip(tables, firsts, strict=True)), default=None)

    def clone(self) -> EncoderModel:
        return EncoderModel(copy.deepcopy(self.module), self.layout, self.shape, self.base)


def check_files(folder: Path) -> None:
    """Refuse what could run code or cannot be read, before anything is loaded from ``folder``.

    Raises:
        ModelError: for missing or pickled weights, remote code, or a broken safetensors file.
    """
    config_file = folder / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model: {config_file}: missing; a model folder holds config.json and safetensors") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {config_file}: not readable as JSON ({first_line(error)})") from None
    if not isinstance(config, dict):
        raise ModelError(f"model: {config_file}: must hold an object, got {type(config).__name__}")
    if config.get("auto_map"):
        raise ModelError(f"model: {folder}: needs remote code (auto_map in config.json), which is never run")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt")])
        if pickled:
            raise ModelError(
                f"model: {pickled[0]}: pickled weights can run code and are not read; where you trust them, load the "
                "folder once with AutoModelForSequenceClassification if its head is trained, else with AutoModel, and "
                "save_pretrained(new_folder) that and AutoTokenizer.from_pretrained(folder)"
            )
        raise ModelError(
            f"model: {folder}: holds no .safetensors file; weights of other formats are to be loaded where you trust "
            "them, and saved once with save_pretrained(new_folder), with their tokenizer"
        )
    from safetensors import SafetensorError, safe_open

    for file in weights:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model: {file}: truncated or not a safetensors file ({first_line(error)})") from None


def fingerprint(folder: Path) -> str:
    """Return a content key of the model's configuration, weights and tokenizer files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".txt", ".model"):
            digest.update(file.name.encode())
            with file.open("rb") as opened:
                for chunk in iter(lambda: opened.read(1 << 20), b""):
                    digest.update(chunk)
    return digest.hexdigest()[:16]


def head_labels(folder: Path) -> tuple[str, ...] | None:
    """Return the class names of a folder's classification head, or None if it has no trained one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architectures = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        return None
    names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def load(folder: Path, *, labels: tuple[str, ...], seed: int = 0) -> EncoderModel:
    """Load a classifier over ``labels`` and prove its anatomy; a missing head is initialised from ``seed``.

    Args:
        folder: of the model.
        labels: names of the classes.
        seed: of a head that is made.

    Raises:
        ModelError: if the files are refused, the architecture is unknown, or the anatomy is not understood.
    """
    check_files(folder)
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(seed)
    try:
        # A folder, of which there is one revision.
        module, found = AutoModelForSequenceClassification.from_pretrained(  # nosec B615
            folder,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={name: i for i, name in enumerate(labels)},
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=head_labels(folder) is None,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"model: {folder}: does not load as a sequence classifier ({first_line(error)})") from None
    lacking = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if head_labels(folder) is None:
        # A new head is expected to be made; a pooler, where there is one, is part of it.
        encoder = f"{module.base_model_prefix}."
        lacking = [key for key in lacking if key.startswith(encoder) and ".pooler." not in key]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ModelError(f"model: {folder}: lacks weights that its config.json asks for: {lacking[0]}{more}")
    module.config.problem_type = "single_label_classification"
    return understand(module.eval(), base=fingerprint(folder))


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer that was saved with a model.

    Raises:
        ModelError: if there is none, or it needs remote code.
    """
    from transformers import AutoTokenizer

    # Without any of these transformers makes up a tokenizer that knows no words.
    if not any(file for name in VOCABULARIES for file in folder.glob(name)):
        raise ModelError(
            f"model: {folder}: its tokenizer does not load (it holds none of {', '.join(VOCABULARIES)}); save it there "
            "with AutoTokenizer.from_pretrained(NAME).save_pretrained(folder)"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)  # nosec B615
    except Exception as error:
        raise ModelError(f"model: {folder}: its tokenizer does not load ({first_line(error)})") from None


def understand(module: nn.Module, *, base: str) -> EncoderModel:
    """Find the anatomy of a classifier and prove it.

    Raises:
        ModelError: naming what was expected and what was found.
    """
    try:
        layout, shape = _find(module)
    except (AttributeError, NotImplementedError) as error:
        kind = type(module).__name__
        raise ModelError(f"model: {kind}: anatomy not understood: its configuration ({first_line(error)})") from None
    model = EncoderModel(module, layout, shape, base)
    _prove(model)
    return model


def _find(module: nn.Module) -> tuple[Layout, ModelShape]:
    kind = type(module).__name__
    lists = [(path, m) for path, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    candidates = [(path, m) for path, m in lists if len(_linears(m[0])) == len(_ROLES)]
    if len(candidates) != 1:
        found = ", ".join(f"{path} ({len(m)} x {len(_linears(m[0]))} linear layers)" for path, m in lists) or "none"
        raise ModelError(
            f"model: {kind}: anatomy not understood: expected one list of blocks with {len(_ROLES)} linear layers "
            f"each, found lists: {found}; BERT, RoBERTa, DistilBERT, MiniLM and ELECTRA encoders are understood"
        )
    path, blocks = candidates[0]
    config: Any = module.config
    if config.num_hidden_layers != len(blocks):
        raise ModelError(
            f"model: {kind}: anatomy not understood: {config.num_hidden_layers} layers are configured but {path} has "
            f"{len(blocks)} blocks; shared blocks are not supported"
        )
    roles = dict(zip(_ROLES, _linears(blocks[0]), strict=True))
    heads, shapes, hidden = int(config.num_attention_heads), [], int(config.hidden_size)
    for number, block in enumerate(blocks):
        if list(_linears(block)) != list(roles.values()):
            raise ModelError(f"model: {kind}: anatomy not understood: {path}.{number} differs from {path}.0")
        sizes = {role: tuple(block.get_parameter(f"{p}.weight").shape) for role, p in roles.items()}
        neurons = sizes["ffn_in"][0]
        square = all(sizes[role] == (hidden, hidden) for role in _ROLES[:4])
        if not square or sizes["ffn_in"] != (neurons, hidden) or sizes["ffn_out"] != (hidden, neurons):
            raise ModelError(
                f"model: {kind}: anatomy not understood: {path}.{number} has linear layers {sizes}, expected four of "
                f"({hidden}, {hidden}), then (neurons, {hidden}) and ({hidden}, neurons)"
            )
        shapes.append(BlockShape(heads, hidden // heads, neurons))
    inside = path + "."
    outside = [(p, m) for p, m in module.named_modules() if not p.startswith(inside)]
    head = tuple(p for p, m in outside if isinstance(m, nn.Linear))
    tokens: Any = module.get_input_embeddings()  # type: ignore[operator]
    tables = [(p, m) for p, m in outside if isinstance(m, nn.Embedding)]
    embeddings = tuple(p for p, m in sorted(tables, key=lambda table: table[1] is not tokens))
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation", None)
    shape = ModelShape(
        hidden,
        tuple(shapes),
        tokens.num_embeddings,
        activation=str(activation or ""),
        table_width=0 if tokens.embedding_dim == hidden else tokens.embedding_dim,
    )
    return Layout(path, roles, embeddings, head), shape


def _linears(block: nn.Module) -> list[str]:
    return [path for path, m in block.named_modules() if isinstance(m, nn.Linear)]


def _prove(model: EncoderModel) -> None:
    """Compare silenced with removed parts on a copy: equal logits show that the roles are what they seem."""
    from autocompress.transforms.prune import keep_heads, keep_neurons

    block, probe = model.shape.blocks[0], model.clone()
    if block.heads < 2 or block.neurons < 2:
        return
    size = block.head_size
    with torch.no_grad():
        probe.linear(0, "output").weight[:, :size] = 0
        probe.linear(0, "ffn_out").weight[:, :1] = 0
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.module.config.vocab_size)  # type: ignore[union-attr, arg-type]
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (2, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    kind = type(model.module).__name__
    with torch.no_grad():
        try:
            silenced = probe.module(input_ids=ids, attention_mask=mask).logits
        except Exception as error:
            raise ModelError(
                f"model: {kind}: anatomy not understood: it does not run on token ids and a mask ({first_line(error)})"
            ) from None
        try:
            keep_heads(probe, 0, list(range(1, block.heads)))
            keep_neurons(probe, 0, list(range(1, block.neurons)))
            removed = probe.module(input_ids=ids, attention_mask=mask).logits
        except Exception as error:
            raise ModelError(
                f"model: {kind}: anatomy not understood: a head cannot be removed ({first_line(error)})"
            ) from None
    if not torch.allclose(silenced, removed, atol=1e-4, rtol=1e-3):
        gap = (silenced - removed).abs().max().item()
        raise ModelError(f"model: {kind}: anatomy not understood: removing a head changes the logits by {gap:.2g}")
