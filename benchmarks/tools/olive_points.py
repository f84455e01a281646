"""Let Microsoft Olive search its ONNX passes for the prepared classifier; one folder per candidate that it scored.

Run it with the python of Olive's own environment: ``python olive_points.py PREPARED --out OUT --seconds 900``. Olive's
search chooses, jointly, the fusion, the quantisation of the products and that of the embeddings, with the parameters
that the passes declare as searchable, and scores accuracy, latency and size of each candidate. Its sampler is the
random one: with alternatives for a pass, the one on Optuna does not work in olive-ai 0.13.0 (see README.md).
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import olive_user
import onnx
from olive.engine.footprint import FootprintNode
from olive.workflows import run as olive_run
from points import CALIBRATION_ROWS, INPUTS, POINT_FILE, Points, Prepared, quiet

OPSET = 18
SAMPLES = 1000
"""More than any budget allows: Olive's default would end the search early."""
OVERTIME = 300
"""Seconds that the candidate in work may take after the budget is spent."""
TABLES = tuple(f"/bert/embeddings/{kind}_embeddings/Gather" for kind in ("word", "token_type", "position"))
_NOWHERE = ["no such node"]
_RTN, _FAST = "OnnxBlockWiseRtnQuantization", 4
_UNKNOWN_IS_FLOAT = {"DefaultTensorType": onnx.TensorProto.FLOAT}


def block_wise(bits: int, block: int, nodes: list[str] | None = None) -> dict[str, Any]:
    """Return the pass that quantises weights block by block, of the named nodes or of all products and look-ups."""
    return {"type": _RTN, "bits": bits, "block_size": block, "accuracy_level": _FAST, "nodes_to_include": nodes or []}


def passes(heads: int, hidden: int) -> dict[str, list[dict[str, Any]]]:
    """Return the steps, each with its alternatives; a step that may be left out has one that finds no node."""
    fusion = {"type": "OrtTransformersOptimization", "model_type": "bert", "opt_level": 0}
    fusion |= {"num_heads": heads, "hidden_size": hidden}
    left_out = block_wise(4, 64, _NOWHERE)
    dynamic = {"type": "OnnxDynamicQuantization", "extra_options": dict(_UNKNOWN_IS_FLOAT)}
    static = {"type": "OnnxStaticQuantization", "data_config": "calibration", "calibrate_method": "MinMax"}
    static |= {"quant_format": "QDQ", "extra_options": dict(_UNKNOWN_IS_FLOAT)}
    # Signed activations are slow on these processors; left to the sampler, half of its draws would have them.
    static |= {"precision": "int8", "activation_type": "uint8"}
    return {
        "convert": [{"type": "OnnxConversion", "target_opset": OPSET}],
        "fuse": [
            left_out,
            {**fusion, "optimization_options": {"enable_embed_layer_norm": True}},
            {**fusion, "optimization_options": {"enable_embed_layer_norm": False}},
        ],
        "products": [
            left_out,
            dynamic,
            {**dynamic, "op_types_to_quantize": ["MatMul", "Attention"]},
            static,
            {**static, "op_types_to_quantize": ["MatMul", "Attention"]},
            *(block_wise(bits, block) for bits in (4, 8) for block in (32, 64, 128)),
            {"type": "OnnxHqqQuantization", "block_size": 64, "axis": 1, "accuracy_level": _FAST},
            {"type": "OnnxKQuantQuantization", "bits": 4, "block_size": 32, "accuracy_level": _FAST},
        ],
        "tables": [left_out, block_wise(4, 64, list(TABLES)), block_wise(8, 64, list(TABLES))],
    }


def workflow(prepared: Prepared, work: Path, seconds: float) -> dict[str, Any]:
    """Return Olive's configuration of the search."""
    config = prepared.model().config
    script = str(Path(olive_user.__file__))
    folder = str(prepared.folder.absolute())
    axes = {name: {"0": "batch", "1": "tokens"} for name in INPUTS}
    threads = {"session_options": {"intra_op_num_threads": prepared.meta["threads"], "inter_op_num_threads": 1}}
    settings = {"inference_settings": {"onnx": threads}}

    def data(name: str, kind: str, **parameters: Any) -> dict[str, Any]:
        return {
            "name": name,
            "user_script": script,
            "load_dataset_config": {"type": kind, "params": {"prepared": folder, **parameters}},
            "post_process_data_config": {"type": "predicted_class"},
            "dataloader_config": {"type": "no_auto_batch_dataloader"},
        }

    classes = {"task": "multiclass", "num_classes": len(prepared.meta["labels"])}
    # Metrics of type custom cannot be used: olive-ai 0.13.0 fails to serialise them (backend None has no model_dump).
    metrics = [
        {
            "name": "accuracy",
            "type": "accuracy",
            "data_config": "search_rows",
            "user_config": settings,
            "sub_types": [
                {"name": "accuracy_score", "priority": 1, "higher_is_better": True, "metric_config": classes}
            ],
        },
        {
            "name": "latency",
            "type": "latency",
            "data_config": "timed_rows",
            "user_config": settings,
            "sub_types": [{"name": "p50", "priority": 2, "metric_config": {"warmup_num": 3, "repeat_test_num": 40}}],
        },
        {"name": "size", "type": "size_on_disk", "sub_types": [{"name": "bytes", "priority": 3}]},
    ]
    return {
        "input_model": {
            "type": "HfModel",
            "model_path": str(prepared.model_folder.absolute()),
            "task": "text-classification",
            # The transformers optimisation knows attention in this form only.
            "load_kwargs": {"attn_implementation": "eager"},
            "io_config": {
                "input_names": list(INPUTS),
                "input_shapes": [[2, 8]] * len(INPUTS),
                "input_types": ["int64"] * len(INPUTS),
                "output_names": ["logits"],
                "dynamic_axes": {**axes, "logits": {"0": "batch"}},
            },
        },
        "systems": {
            "here": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "data_configs": [
            data("calibration", "prepared_rows", split="train", rows=CALIBRATION_ROWS),
            data("search_rows", "prepared_rows", split="search"),
            data("timed_rows", "target_shape"),
        ],
        "evaluators": {"scorer": {"type": "OnnxEvaluator", "metrics": metrics}},
        "passes": passes(config.num_attention_heads, config.hidden_size),
        "engine": {
            "search_strategy": {
                "execution_order": "joint",
                "sampler": "random",
                "sampler_config": {"max_samples": SAMPLES, "seed": 0},
                "max_time": round(seconds),
            },
            "host": "here",
            "target": "here",
            "evaluator": "scorer",
            "evaluate_input_model": False,
            "cache_dir": str(work / "cache"),
            "output_dir": str(work / "out"),
            "log_severity_level": 2,
        },
    }


def mend_footprint() -> None:
    """Let Olive record a step that it takes from its cache a second time.

    olive-ai 0.13.0 then sets ``model_config`` on a node whose field is called ``model_config_data``, which ends every
    candidate of a search but the first with "FootprintNode object has no field".
    """

    def update(node: FootprintNode, **values: Any) -> None:
        for key, value in values.items():
            setattr(node, "model_config_data" if key == "model_config" else key, value)

    FootprintNode.update = update


def gather(points: Points, footprint: Path) -> None:
    """Copy every candidate that Olive scored; a node of its footprint names its parent, up to the input model."""
    found = json.loads(footprint.read_text(encoding="utf-8"))
    nodes: dict[str, Any] = found.get("nodes", found)
    for node in nodes.values():
        if model_of(node).get("is_pruned"):
            points.fail(node["model_id"], f"Olive's pass {node['from_pass']} failed: {node['pass_run_config']}")
    for number, node in enumerate(node for node in nodes.values() if scores_of(node)):
        steps: list[dict[str, Any]] = []
        seconds = 0.0
        step: dict[str, Any] | None = node
        while step is not None and step.get("from_pass"):
            chosen = (step.get("pass_run_config") or {}).get("config") or step.get("pass_run_config") or {}
            given = {
                key: value for key, value in chosen.items() if value not in (None, [], {}) and key != "data_config"
            }
            steps.insert(0, {"pass": step["from_pass"], **given})
            seconds += step["end_time"] - step["start_time"]
            step = nodes.get(step["parent_model_id"])
        config = model_of(node)["config"]
        source = Path(config["model_path"])
        if source.is_dir():
            source = source / (config.get("onnx_file_name") or "model.onnx")
        name = f"candidate-{number:03d}"
        folder = points.out / name
        folder.mkdir()
        for file in olive_user.files_of(source):
            shutil.copyfile(file, folder / file.name)
        points.record(
            name,
            {"steps": steps},
            seconds,
            olive={"scores": scores_of(node), "front": node.get("is_pareto_frontier", False)},
        )


def model_of(node: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a node's model; the key's name depends on how Olive was asked to write it."""
    return node.get("model_config") or node.get("model_config_data") or {}


def scores_of(node: dict[str, Any]) -> dict[str, float]:
    """Return Olive's scores of a node by name; none where it was not scored."""
    values = ((node.get("metrics") or {}).get("value")) or {}
    return {name: value["value"] for name, value in values.items()}


class Overtime(BaseException):
    """Olive's search does not end by itself; no `Exception`, which Olive would take for a candidate's."""


def stop(_signal: int, _frame: Any) -> None:
    """End a search that does not end by itself."""
    raise Overtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800, help="wall-clock budget of the search")
    options = parser.parse_args()
    quiet()
    logging.getLogger().setLevel(logging.ERROR)
    prepared = Prepared(options.prepared)
    packages = ("olive-ai", "onnxruntime", "onnx", "onnxscript", "optuna", "torch", "transformers", "numpy")
    points = Points(options.out, "olive", packages, options.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(round(options.seconds) + OVERTIME)
        mend_footprint()
        started = time.perf_counter()
        try:
            olive_run(workflow(prepared, work, options.seconds))
        except Overtime:  # what it has scored until then counts
            points.fail("search", f"ended {OVERTIME} s after its budget of {options.seconds:g} s was spent")
        signal.alarm(0)
        print(f"searched for {time.perf_counter() - started:.0f} s", flush=True)
        footprint = work / "out" / "footprint.json"
        if footprint.is_file():
            gather(points, footprint)
    print(f"{len(list(options.out.glob(f'*/{POINT_FILE}')))} candidates", flush=True)


if __name__ == "__main__":
    main()
