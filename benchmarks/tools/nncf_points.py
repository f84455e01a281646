"""Compress the prepared classifier with NNCF for OpenVINO; one folder per point.

Run it with the python of NNCF's own environment: ``python nncf_points.py PREPARED --out OUT --seconds 900``. The
points are what NNCF's documentation offers after training: 8-bit weights and activations (`nncf.quantize`, with its
presets, and `nncf.quantize_with_accuracy_control`), weights only at 8 bits, and at 4 bits mixed with 8 (`ratio` of 4
bits; `all_layers` lets the embeddings and the head be among them), also with its data-aware methods.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import torch
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters
from points import CALIBRATION_ROWS, INPUTS, Points, Prepared, Rows, quiet

GROUP_SIZE = 64
OTHER_GROUPS = (32, 128, -1)
"""The last is a step for each channel."""
RATIOS = (1.0, 0.8, 0.6, 0.4, 0.2)
MAX_DROPS = (0.01, 0.002)
"""Allowed loss of accuracy for quantisation with accuracy control; the first is NNCF's default."""
_SPECS = 2
_TRACED_TOKENS = 8


def convert(prepared: Prepared) -> ov.Model:
    """Return the classifier as a graph with dynamic batch and tokens, int64 inputs by name, and logits."""
    ids = torch.ones((2, _TRACED_TOKENS), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, _TRACED_TOKENS // 2 :] = 0
    return ov.convert_model(prepared.model(), example_input=dict(zip(INPUTS, (ids, mask), strict=True)))


def accuracy_of(compiled: ov.CompiledModel, rows: list[dict[str, Any]]) -> float:
    """Return the share of right predictions."""
    request = compiled.create_infer_request()
    names = [port.get_any_name() for port in compiled.inputs]
    hits = [int(np.argmax(request.infer({n: row[n] for n in names})[0]) == row["label"]) for row in rows]
    return float(np.mean(hits))


def quantizations(calibration: nncf.Dataset, search: Rows) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield name, function from a graph to its quantised graph, and settings."""
    base: dict[str, Any] = {
        "model_type": nncf.ModelType.TRANSFORMER,
        "preset": nncf.QuantizationPreset.MIXED,
        "subset_size": CALIBRATION_ROWS,
    }
    without_smoothing = AdvancedQuantizationParameters(
        smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    )
    variants: dict[str, dict[str, Any]] = {
        "w8a8": {},
        "w8a8-performance": {"preset": nncf.QuantizationPreset.PERFORMANCE},
        "w8a8-accurate-bias": {"fast_bias_correction": False},
        "w8a8-no-smooth": {"advanced_parameters": without_smoothing},
    }
    for name, change in variants.items():
        settings = {**base, **change}
        yield name, lambda graph, s=settings: nncf.quantize(graph, calibration, **s), settings
    settings = {**base, "ignored_scope": nncf.IgnoredScope(types=["Gather"])}

    def small_tables(graph: ov.Model, settings: dict[str, Any] = settings) -> ov.Model:
        tables = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": GROUP_SIZE, "all_layers": True}
        return nncf.compress_weights(nncf.quantize(graph, calibration, **settings), **tables)

    yield "w8a8-tables4", small_tables, {**settings, "tables": 4}
    fast = {**settings, "preset": nncf.QuantizationPreset.PERFORMANCE}
    yield "w8a8-performance-tables4", lambda graph: small_tables(graph, fast), {**fast, "tables": 4}
    validation = [{**feed, "label": label} for feed, label in zip(search.feeds(), search.labels, strict=True)]
    for drop in MAX_DROPS:
        settings = {**base, "max_drop": drop}

        def controlled(graph: ov.Model, settings: dict[str, Any] = settings) -> ov.Model:
            return nncf.quantize_with_accuracy_control(
                graph,
                calibration_dataset=calibration,
                validation_dataset=nncf.Dataset(validation),
                validation_fn=lambda compiled, rows: accuracy_of(compiled, list(rows)),
                **settings,
            )

        yield f"w8a8-max-drop-{drop:g}", controlled, settings


def weight_settings() -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield name, settings of `nncf.compress_weights`, and whether it is given data."""
    modes = nncf.CompressWeightsMode
    yield "w8-asym", {"mode": modes.INT8_ASYM}, False
    yield "w8-sym", {"mode": modes.INT8_SYM}, False
    for everything in (False, True):
        suffix = "-all" if everything else ""
        for ratio in RATIOS:
            base: dict[str, Any] = {"ratio": ratio, "group_size": GROUP_SIZE, "all_layers": everything}
            yield f"w4-sym-{ratio:g}{suffix}", {"mode": modes.INT4_SYM, **base}, False
            yield f"w4-asym-{ratio:g}{suffix}", {"mode": modes.INT4_ASYM, **base}, False
        for ratio in RATIOS[:_SPECS]:
            aware: dict[str, Any] = {"ratio": ratio, "group_size": GROUP_SIZE, "all_layers": everything}
            aware |= {"mode": modes.INT4_SYM, "awq": True, "scale_estimation": True}
            yield f"w4-sym-{ratio:g}{suffix}-awq-scales", aware, True
        for group in OTHER_GROUPS:
            base = {"ratio": 1.0, "group_size": group, "all_layers": everything}
            yield f"w4-sym-group{group}{suffix}", {"mode": modes.INT4_SYM, **base}, False
            yield f"w4-asym-group{group}{suffix}", {"mode": modes.INT4_ASYM, **base}, False
    gptq = {"mode": modes.INT4_SYM, "ratio": 1.0, "group_size": GROUP_SIZE, "all_layers": True, "gptq": True}
    yield "w4-sym-1-all-gptq", gptq, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800, help="wall-clock budget")
    options = parser.parse_args()
    quiet()
    prepared = Prepared(options.prepared)
    points = Points(options.out, "nncf", ("nncf", "openvino", "torch", "transformers", "numpy"), options.seconds)
    feeds = prepared.rows("train", CALIBRATION_ROWS).feeds()
    calibration = nncf.Dataset(feeds)
    points.make(
        "fp32", lambda to: ov.save_model(convert(prepared), to / "model.xml", compress_to_fp16=False), {"bits": 32}
    )
    source = options.out / "fp32" / "model.xml"

    def read() -> ov.Model:
        # A fresh copy each time: NNCF changes the graph that it is given.
        return ov.Core().read_model(source)

    points.make("fp16", lambda to: ov.save_model(read(), to / "model.xml", compress_to_fp16=True), {"bits": 16})
    # The sweep is cheap and goes first, so that a small budget still covers what most users would try.
    for name, settings, aware in weight_settings():
        given = {**settings, "dataset": calibration, "subset_size": CALIBRATION_ROWS} if aware else settings

        def compress(to: Path, given: dict[str, Any] = given) -> None:
            ov.save_model(nncf.compress_weights(read(), **given), to / "model.xml", compress_to_fp16=False)

        points.make(name, compress, settings)
    for name, quantize, settings in quantizations(calibration, prepared.rows("search")):

        def build(to: Path, quantize: Any = quantize) -> None:
            ov.save_model(quantize(read()), to / "model.xml", compress_to_fp16=False)

        points.make(name, build, settings)


if __name__ == "__main__":
    main()
