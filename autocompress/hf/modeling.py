"""The model class that transformers makes of an exported folder, and how one is written.

``config.json`` holds the uncompressed model's configuration and, by path, what stands where it is otherwise: layers of
other sizes, factors, stored numbers. The class makes the uncompressed architecture with as many blocks as are stored,
and puts these in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from autocompress.decisions import MaxTokens
from autocompress.errors import ExportError, ModelError
from autocompress.hf.config import FORMAT, CompressedConfig
from autocompress.hf.packed import PackedEmbedding, PackedLinear, Stored
from autocompress.model import EncoderModel
from autocompress.pieces import Piece
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.runtimes import Runtime
from autocompress.transforms.student import Repeated

_ASKED_FOR = ("output_attentions", "output_hidden_states")


class CompressedForSequenceClassification(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A compressed classifier; takes what the uncompressed one takes."""

    config_class = CompressedConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: CompressedConfig) -> None:
        super().__init__(config)
        if config.format_version != FORMAT:
            raise ModelError(
                f"config.json: format_version must be {FORMAT}, got {config.format_version!r}; install the version of "
                "autocompress that wrote it"
            )
        self.model = _made(config.base, config.structure)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        # What is not in the file, such as positions counted from 0, is the uncompressed model's matter.
        self.model._init_weights(module)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput | tuple[torch.Tensor, ...]:
        """Return logits, ``batch x classes``, the loss where there are labels, and what ``options`` ask for."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        given = {name: _first(value, self.config.structure["tokens"]) for name, value in inputs.items()}
        asked = {name: options[name] for name in _ASKED_FOR if options.get(name)}
        made = self.model(**given, **asked)
        loss = None if labels is None else nn.functional.cross_entropy(made.logits, labels)
        found = SequenceClassifierOutput(loss, made.logits, made.hidden_states, made.attentions)
        return found if options.get("return_dict", True) is not False else found.to_tuple()


def _first(value: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """Return the first ``tokens`` of each row, or with 0 all of them."""
    if value is None or not tokens:
        return value
    if torch.compiler.is_exporting():
        # Of one length, since a program cannot take the smaller of two: attention is masked where nothing was.
        value = nn.functional.pad(value, (0, tokens))
    return value[:, :tokens]


AutoModelForSequenceClassification.register(CompressedConfig, CompressedForSequenceClassification, exist_ok=True)


def packed_model(model: EncoderModel, pieces: Mapping[str, Piece], runtime: Runtime) -> nn.Module:
    """Put ``pieces`` (by site) into the module of ``model``, which is changed, and return it.

    Args:
        model: what the pieces are for, with the blocks that are kept.
        pieces: what stands at each site that is decided.
        runtime: that scored the candidate; its arithmetic is followed.
    """
    for site, piece in pieces.items():
        for path, layer in zip(model.layout.linears(site), piece, strict=True):
            made: list[nn.Module] = []
            for factor in layer:
                if site == "embeddings":
                    holder: PackedLinear | PackedEmbedding = PackedEmbedding(Stored.of(factor, table=True))
                else:
                    columns = runtime.rounded_together(factor.weight)
                    holder = PackedLinear(Stored.of(factor, anew=str(columns) if columns else ""))
                holder.fill(factor)
                made.append(holder)
            model.replace(path, made[0] if len(made) == 1 else nn.Sequential(*made))
    return model.module


def structure_of(module: nn.Module, fresh: nn.Module, plan: CompressionPlan) -> dict[str, Any]:
    """Return what makes ``fresh`` into ``module``, but for its numbers.

    Returns:
        ``runs``, times that each block is run; ``blocks``, path of their list; ``tokens``, at which texts are cut, or
        0; ``layers``, by path, a kind of layer and its sizes.
    """
    lists = {path: m for path, m in module.named_modules() if isinstance(m, nn.ModuleList)}
    repeated = {path: m[0].times for path, m in lists.items() if len(m) and isinstance(m[0], Repeated)}
    [(blocks, runs)] = repeated.items() or [("", 1)]
    _repeat(fresh, blocks, runs)
    known = dict(fresh.named_modules())
    layers: dict[str, Any] = {}
    for path, layer in module.named_modules():
        there = known.get(path)
        if (said := _said(layer)) is None or (there is not None and _said(there) == said):
            continue
        if any(path.startswith(f"{outer}.") for outer in layers):
            continue  # a factor, which its layer tells
        layers[path] = said
    cut = plan.of_type(MaxTokens).get(MODEL_SITE)
    return {"runs": runs, "blocks": blocks, "tokens": 0 if cut is None else cut.tokens, "layers": layers}


def _said(layer: nn.Module) -> list[Any] | None:
    """Return kind and sizes of a layer that compression may change, else None."""
    if isinstance(layer, PackedLinear | PackedEmbedding):
        return ["packed" if isinstance(layer, PackedLinear) else "table", layer.stored.to_dict()]
    if isinstance(layer, nn.Sequential):
        inner = [_said(factor) for factor in layer]
        return ["factors", inner] if all(inner) else None
    if isinstance(layer, nn.Linear):
        return ["linear", [layer.in_features, layer.out_features, layer.bias is not None]]
    if isinstance(layer, nn.Embedding):
        return ["embedding", [layer.num_embeddings, layer.embedding_dim, layer.padding_idx]]
    if isinstance(layer, nn.LayerNorm):
        return ["norm", [layer.normalized_shape[0], layer.eps]]
    if isinstance(layer, nn.ReLU):
        return ["relu", []]
    return None


def _layer(said: list[Any]) -> nn.Module:
    """Return the layer that `_said` tells, without its numbers."""
    kind, sizes = said
    if kind == "factors":
        return nn.Sequential(*(_layer(inner) for inner in sizes))
    if kind in ("packed", "table"):
        return (PackedLinear if kind == "packed" else PackedEmbedding)(Stored(**sizes))
    if kind == "linear":
        return nn.Linear(sizes[0], sizes[1], bias=sizes[2])
    if kind == "embedding":
        return nn.Embedding(sizes[0], sizes[1], padding_idx=sizes[2])
    if kind == "norm":
        return nn.LayerNorm(sizes[0], eps=sizes[1])
    if kind == "relu":
        return nn.ReLU()
    raise ModelError(f"config.json: structure: unknown kind of layer {kind!r}")


def _repeat(module: nn.Module, path: str, runs: int) -> None:
    if runs > 1:
        blocks = module.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        _put(module, path, nn.ModuleList([Repeated(block, runs) for block in blocks]))


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)


def _fresh(base: Mapping[str, Any]) -> nn.Module:
    """Return a model of the configuration ``base``, with weights that mean nothing."""
    config = AutoConfig.for_model(**base)
    # From a configuration alone: nothing is fetched or run.
    made = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
        config, trust_remote_code=False
    )
    assert isinstance(made, nn.Module)
    return made


def _made(base: Mapping[str, Any], structure: Mapping[str, Any]) -> nn.Module:
    try:
        module = _fresh(base)
        _repeat(module, structure["blocks"], structure["runs"])
        for path, said in structure["layers"].items():
            _put(module, path, _layer(said))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"config.json: does not describe a compressed model ({error})") from None
    return module


def compressed_model(
    model: EncoderModel, pieces: Mapping[str, Piece], plan: CompressionPlan, source: Path, runtime: Runtime
) -> CompressedForSequenceClassification:
    """Return the model that is read back from an exported folder.

    Args:
        model: what the pieces are for, with the blocks that are kept; it is changed.
        pieces: what stands at each site that is decided.
        plan: what is done.
        source: folder of the uncompressed classifier.
        runtime: that scored the candidate.

    Raises:
        ExportError: if what was made has other weights than what would be read back.
    """
    base = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layers = next(name for name in ("num_hidden_layers", "n_layers") if name in base)
    base[layers] = len(model.block_list())
    for name in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        base.pop(name, None)
    if base.get("sinusoidal_pos_embds"):  # DistilBERT's: a table to begin with, as large as the uncompressed one
        base["sinusoidal_pos_embds"] = False
    module = packed_model(model, pieces, runtime)
    kept: Any = model.module.config
    base |= {"id2label": kept.id2label, "label2id": kept.label2id}
    config = CompressedConfig(
        base=base,
        structure=structure_of(module, _fresh(base), plan),
        plan=json.loads(plan.to_json()),
        architectures=["CompressedForSequenceClassification"],
        id2label=kept.id2label,
        label2id=kept.label2id,
    )
    made = CompressedForSequenceClassification(config)
    try:
        made.model.load_state_dict(module.state_dict())
    except RuntimeError as error:
        raise ExportError(f"export: what is read back would not be what was written ({error})") from None
    made.eval()  # type: ignore[no-untyped-call]
    return made
