"""Compress the prepared classifier with ONNX Runtime's own tools; one folder per point.

Run it with the python of ONNX Runtime's own environment: ``python ort_points.py PREPARED --out OUT --seconds 900``.
The classifier is exported once and, where that works, fused with `onnxruntime.transformers.optimizer`. From both graphs
come dynamic 8 bits, static 8 bits, and `MatMulNBits` weights of 4 and 8 bits with the embeddings in or out, and the
embeddings at another width than the rest.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions
from points import CALIBRATION_ROWS, INPUTS, Points, Prepared, quiet

OPSET = 18
PRODUCTS = ("MatMul",)
PRODUCTS_AND_TABLES = ("MatMul", "Gather")
QUANT_AXES = (("MatMul", 0), ("Gather", 1))
FAST_INT8_ACTIVATIONS = 4
"""Value of ``accuracy_level`` that lets the 4-bit kernel compute on 8-bit activations."""
PLAIN_KINDS = ["MatMul", "Gemm", "Gather"]
FUSED_KINDS = ["MatMul", "Attention", "EmbedLayerNormalization"]
UNKNOWN_IS_FLOAT = {"DefaultTensorType": onnx.TensorProto.FLOAT}
"""What the quantisers' own error message asks for where types behind contributed operators are not inferred."""
HISTOGRAM_ROWS = 50
"""Calibration rows where histograms of all activations are held in memory."""
_FILE = "model.onnx"
_TRACED_TOKENS = 8


class _Logits(torch.nn.Module):
    """The classifier with positional inputs and the bare logits, which the tracing exporter needs."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Return ``batch x classes``."""
        logits: torch.Tensor = self.model(**dict(zip(INPUTS, tensors, strict=True))).logits
        return logits


class _Reader(CalibrationDataReader):
    """Gives calibration rows one by one: at their real lengths, or padded where a method wants equal shapes."""

    def __init__(self, feeds: list[dict[str, np.ndarray]], tokens: int | None = None) -> None:
        self._feeds = iter(feeds)
        self._tokens = tokens

    def get_next(self) -> dict[str, np.ndarray] | None:
        feed = next(self._feeds, None)
        if feed is None or self._tokens is None:
            return feed
        return {name: np.pad(array, ((0, 0), (0, self._tokens - array.shape[1]))) for name, array in feed.items()}


def export(prepared: Prepared, file: Path) -> None:
    """Export with the tracing exporter, batch and tokens dynamic."""
    ids = torch.ones((2, _TRACED_TOKENS), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, _TRACED_TOKENS // 2 :] = 0
    axes: dict[str, dict[int, str]] = {name: {0: "batch", 1: "tokens"} for name in INPUTS}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            # The transformers optimizer knows attention in this form only.
            _Logits(prepared.model("eager")).eval(),
            (ids, mask),
            str(file),
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_axes={**axes, "logits": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )


def optimize(prepared: Prepared, source: Path, file: Path, *, tables: bool) -> None:
    """Fuse attention, layer norms, GELU and, if ``tables``, the embeddings with the transformers optimizer.

    Raises:
        RuntimeError: if nothing was fused, or the fused graph gives other logits than the source.
    """
    config = prepared.model().config
    wanted_fusions = FusionOptions("bert")
    wanted_fusions.enable_embed_layer_norm = tables
    fused = optimizer.optimize_model(
        str(source),
        "bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        optimization_options=wanted_fusions,
        opt_level=0,
    )
    counts = {kind: count for kind, count in fused.get_fused_operator_statistics().items() if count}
    if not counts:
        raise RuntimeError("the optimizer fused nothing")
    fused.save_model_to_file(str(file))
    feed = prepared.rows("train", 1).feeds()[0]
    found, wanted = (onnxruntime.InferenceSession(str(f)).run(None, feed)[0] for f in (file, source))
    if not np.allclose(found, wanted, atol=1e-2):
        raise RuntimeError(f"the fused graph gives other logits: {found} instead of {wanted}")
    print(f"fused: {counts}", flush=True)


def nbits(source: Path, file: Path, **settings: Any) -> None:
    """Replace constant products (and look-ups) by their block-wise quantised operators."""
    chosen = dict(settings)
    kind = chosen.pop("algorithm", "default")
    tables = "Gather" in chosen["op_types_to_quantize"]
    chosen["quant_axes"] = QUANT_AXES if tables else QUANT_AXES[:1]
    if kind == "hqq":
        config: Any = HQQWeightOnlyQuantConfig(**chosen)
    else:
        config = DefaultWeightOnlyQuantConfig(**chosen, accuracy_level=FAST_INT8_ACTIVATIONS)
    quantizer = MatMulNBitsQuantizer(onnx.load(str(source)), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(file))


def dynamic_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and settings of `quantize_dynamic`."""
    for channels, reduce in product((False, True), repeat=2):
        name = "dynamic" + ("-channels" if channels else "") + ("-reduced" if reduce else "")
        yield name, {"per_channel": channels, "reduce_range": reduce, "weight_type": QuantType.QInt8}
    yield "dynamic-uint8", {"per_channel": False, "reduce_range": False, "weight_type": QuantType.QUInt8}


def static_settings(*, fused: bool) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield name, calibration rows and settings of `quantize_static`."""
    base: dict[str, Any] = {
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "calibrate_method": CalibrationMethod.MinMax,
    }
    if not fused:
        yield "static", CALIBRATION_ROWS, base
        yield "static-channels", CALIBRATION_ROWS, {**base, "per_channel": True}
    # Behind fused operators the ranges of the head's inputs are not found.
    few = {"op_types_to_quantize": FUSED_KINDS if fused else PLAIN_KINDS}
    yield "static-products", CALIBRATION_ROWS, {**base, **few}
    yield "static-products-channels", CALIBRATION_ROWS, {**base, **few, "per_channel": True}
    signed = {"activation_type": QuantType.QInt8, "extra_options": {"ActivationSymmetric": True}}
    yield "static-products-channels-symmetric", CALIBRATION_ROWS, {**base, **few, "per_channel": True, **signed}
    yield (
        "static-products-channels-percentile",
        HISTOGRAM_ROWS,
        {**base, **few, "per_channel": True, "calibrate_method": CalibrationMethod.Percentile},
    )


def nbits_settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and settings of `nbits`."""
    for bits, block, kinds in product((4, 8), (32, 64, 128), (PRODUCTS, PRODUCTS_AND_TABLES)):
        if bits == 8 and kinds is PRODUCTS_AND_TABLES:
            continue  # "Gather only supports 4 bits quantization"
        name = f"nbits{bits}-block{block}" + ("-tables" if kinds is PRODUCTS_AND_TABLES else "")
        yield name, {"bits": bits, "block_size": block, "is_symmetric": True, "op_types_to_quantize": kinds}
    yield (
        "nbits4-block64-tables-asym",
        {"bits": 4, "block_size": 64, "is_symmetric": False, "op_types_to_quantize": PRODUCTS_AND_TABLES},
    )
    yield (
        "nbits4-block64-hqq",
        {"bits": 4, "block_size": 64, "op_types_to_quantize": PRODUCTS, "algorithm": "hqq"},
    )


def make_all(points: Points, prepared: Prepared) -> None:
    """Make every point from the exported graph and, where they could be had, the fused ones."""
    out = points.out
    feeds = prepared.rows("train", CALIBRATION_ROWS).feeds()
    plain = out / "fp32" / _FILE
    points.make("fp32", lambda to: export(prepared, to / _FILE), {"opset": OPSET})
    bases = {"": plain}
    # The quantiser of 4-bit tables does not know the fused embeddings, and that of products not the fused attention.
    for name, tables in (("fused", True), ("fused-but-tables", False)):
        settings: dict[str, Any] = {"model_type": "bert", "opt_level": 0, "enable_embed_layer_norm": tables}
        if points.make(name, lambda to, t=tables: optimize(prepared, plain, to / _FILE, tables=t), settings):
            bases[f"{name}-"] = out / name / _FILE
    for prefix, base in bases.items():
        for name, settings in dynamic_settings():
            points.make(prefix + name, lambda to, b=base, s=settings: dynamic(b, to / _FILE, **s), settings)
        # Widths may differ: tables at 4 bits below products at 8, and the other way round.
        if prefix != "fused-":
            mixed: dict[str, Any] = {"tables": 4, "block_size": 64, "per_channel": True}
            points.make(prefix + "dynamic-channels-tables4", lambda to, b=base: _tables4(b, to), mixed)
    for name, settings in nbits_settings():
        points.make(name, lambda to, s=settings: nbits(plain, to / _FILE, **s), settings)
    for bits, block in product((4, 8), (32, 64)):
        mixed = {"products": bits, "block_size": block, "tables": 8}
        points.make(f"nbits{bits}-block{block}-tables8", lambda to, m=mixed: _tables8(plain, to, m), mixed)
    for prefix, base in bases.items():
        for name, rows, settings in static_settings(fused=prefix != ""):

            def static(to: Path, base: Path = base, rows: int = rows, settings: dict[str, Any] = settings) -> None:
                ready = to / "ready.onnx"
                quant_pre_process(base, ready, skip_symbolic_shape=True)
                histograms = settings["calibrate_method"] != CalibrationMethod.MinMax
                reader = _Reader(feeds[:rows], prepared.meta["max_tokens"] if histograms else None)
                more = {**UNKNOWN_IS_FLOAT, **settings.get("extra_options", {})}
                quantize_static(ready, to / _FILE, reader, **{**settings, "extra_options": more})
                ready.unlink()

            points.make(prefix + name, static, {**settings, "rows": rows})


def dynamic(source: Path, file: Path, **settings: Any) -> None:
    """Quantise weights to 8 bits and activations at each call."""
    quantize_dynamic(source, file, extra_options=dict(UNKNOWN_IS_FLOAT), **settings)


def _tables4(base: Path, to: Path) -> None:
    half = to / "half.onnx"
    dynamic(base, half, op_types_to_quantize=["MatMul", "Attention"], per_channel=True)
    nbits(half, to / _FILE, bits=4, block_size=64, is_symmetric=True, op_types_to_quantize=("Gather",))
    half.unlink()


def _tables8(base: Path, to: Path, settings: dict[str, Any]) -> None:
    half = to / "half.onnx"
    dynamic(base, half, op_types_to_quantize=["Gather"])
    bits, block = settings["products"], settings["block_size"]
    nbits(half, to / _FILE, bits=bits, block_size=block, is_symmetric=True, op_types_to_quantize=PRODUCTS)
    half.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800, help="wall-clock budget")
    options = parser.parse_args()
    quiet()
    logging.getLogger().setLevel(logging.ERROR)
    packages = ("onnxruntime", "onnx", "onnx-ir", "torch", "transformers", "numpy")
    make_all(Points(options.out, "onnxruntime", packages, options.seconds), Prepared(options.prepared))


if __name__ == "__main__":
    main()
