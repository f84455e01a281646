"""ONNX Runtime on CPU: the classifier becomes an ONNX file in which each site stands as the plan says.

A model is exported once per depth; a candidate is a copy of that graph in which each linear layer is replaced by its
piece (`onnx_writer.py`).
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autocompress.anatomy import ModelShape
from autocompress.config import TargetConfig
from autocompress.decisions import MaxTokens
from autocompress.errors import RuntimeBuildError, first_line
from autocompress.model import EncoderModel
from autocompress.pieces import Piece
from autocompress.plan import CompressionPlan
from autocompress.products import Product
from autocompress.runtimes.base import (
    TEMPLATE_INPUTS,
    Artifact,
    LogitsOnly,
    Runtime,
    Session,
    Template,
    example_inputs,
    products,
    stand_in_value,
)
from autocompress.runtimes.onnx_writer import CONTRIB, Writer, has_kernel
from autocompress.task import Batch
from autocompress.transforms.quantize import Packed

if TYPE_CHECKING:
    from pathlib import Path

_OPSET = 18
_STAND_IN_BYTES = 4096
"""Float initialisers from this size on are replaced in a stand-in."""


class ONNXSession(Session):
    """An inference session on the CPU provider."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = [port.name for port in session.get_inputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.asarray(self._session.run(None, {name: inputs[name] for name in self._names})[0], dtype=np.float32)

    def close(self) -> None:
        self._session = None


class ONNXRuntime(Runtime):
    """Builds and runs ONNX files."""

    name = "onnxruntime"
    # Protobuf's messages end at 2 GiB; the graph and its names take a little of that.
    most_parameters = (2**31 - 2**22) // 4
    # Earlier versions took the range of an input at each call, over all of it.
    arithmetic = "ranges of calibration"

    def check(self, plan: CompressionPlan, shape: ModelShape) -> None:
        """Accept every decision."""

    def convert(self, model: EncoderModel, example: Batch, folder: Path) -> None:
        import onnx

        graph, inputs = _convert(model, example)
        onnx.save(graph, str(folder / "model.onnx"))
        (folder / TEMPLATE_INPUTS).write_text(json.dumps(inputs), encoding="utf-8")

    def template(self, model: EncoderModel, folder: Path) -> Template:
        import onnx

        inputs = tuple(json.loads((folder / TEMPLATE_INPUTS).read_text(encoding="utf-8")))
        return Template(onnx.load(str(folder / "model.onnx")), inputs, products(model), model.layout, model.shape.runs)

    def version(self) -> str:
        import onnx
        import onnxruntime

        return f"{onnxruntime.__version__}, onnx {onnx.__version__}"

    def stitch(self, template: Template, pieces: Mapping[str, Piece], plan: CompressionPlan, folder: Path) -> Artifact:
        import onnx

        writer = Writer(template.graph.graph)
        for site, piece in pieces.items():
            for path, layer in zip(template.layout.linears(site), piece, strict=True):
                if site == "embeddings":
                    writer.table(path, layer[0], site)
                else:
                    writer.linear(template.products[path], layer, site, template.uses(site))
        for cut in plan.of_type(MaxTokens).values():
            writer.cut(cut.tokens)
        proto = onnx.ModelProto()
        for field in ("ir_version", "producer_name"):
            setattr(proto, field, getattr(template.graph, field))
        proto.opset_import.extend(template.graph.opset_import)
        if writer.contrib:
            proto.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
        writer.finish(proto.graph)
        onnx.save(proto, str(folder / "model.onnx"))
        artifact = Artifact(folder, self.name, ("model.onnx",), template.inputs, plan)
        artifact.save()
        return artifact

    def weight_bytes(self, product: Product) -> float:
        weights = product.outer * product.inner
        if product.bits == 8:
            return weights + (2 if product.kind == "embedding" else 4) * product.outer
        stored = weights * product.bits / 8
        if product.whole_steps:
            return stored + weights / product.group + 4 * product.outer
        return stored + (4 * weights / product.group if product.bits == 4 else 0)

    def rounded_together(self, weight: Packed) -> int:
        return (
            int(weight.values.shape[2]) if weight.bits == 4 and weight.multiples is None and has_kernel(weight) else 0
        )

    def load(self, artifact: Artifact, target: TargetConfig) -> ONNXSession:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A spinning thread burns the CPU time of whatever is timed next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(
                str(artifact.folder / artifact.files[0]), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # onnxruntime raises classes of its own that derive from nothing in common but Exception.
            line = first_line(error)
            raise RuntimeBuildError(f"{artifact.folder}: ONNX Runtime cannot load it ({line})") from None
        return ONNXSession(session)

    def settings(self, target: TargetConfig) -> dict[str, Any]:
        return {
            "intra_op_num_threads": target.threads,
            "inter_op_num_threads": 1,
            "provider": "CPUExecutionProvider",
            "precision": target.precision,
        }

    def stand_in(self, artifact: Artifact, folder: Path) -> Artifact:
        import onnx

        proto = onnx.load(str(artifact.folder / artifact.files[0]))
        graph = proto.graph
        large = [
            t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.raw_data) >= _STAND_IN_BYTES
        ]
        for number, tensor in enumerate(large):
            fill = onnx.numpy_helper.from_array(np.array([stand_in_value(number)], dtype=np.float32))
            shape = onnx.numpy_helper.from_array(np.array(tensor.dims, dtype=np.int64), f"{tensor.name}/shape")
            graph.initializer.append(shape)
            graph.initializer.remove(tensor)
            node = onnx.helper.make_node("ConstantOfShape", [shape.name], [tensor.name], value=fill)
            graph.node.insert(0, node)
        onnx.save(proto, str(folder / artifact.files[0]))
        copy = Artifact(folder, self.name, artifact.files, artifact.inputs, artifact.plan)
        copy.save()
        return copy


def _convert(model: EncoderModel, batch: Batch) -> tuple[Any, tuple[str, ...]]:
    """Export the module with dynamic batch and tokens; returns the ONNX model and its input names."""
    import onnx

    example = example_inputs(batch)
    wrapped = LogitsOnly(model.module, tuple(example)).eval()
    axes = {name: {0: "batch", 1: "tokens"} for name in example}
    content = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The tracing exporter is deprecated but much faster than the newer one.
        torch.onnx.export(
            wrapped,
            tuple(example.values()),
            content,  # type: ignore[arg-type]
            input_names=list(example),
            output_names=["logits"],
            dynamic_axes={**axes, "logits": {0: "batch"}},
            opset_version=_OPSET,
            dynamo=False,
        )
    graph = onnx.load_model_from_string(content.getvalue())
    _read_directly(graph.graph)
    return graph, tuple(example)


def _read_directly(graph: Any) -> None:
    """Let nodes read initialisers themselves, of which the exporter hands equal ones on by ``Identity``."""
    known = {tensor.name for tensor in graph.initializer}
    handed_on = [node for node in graph.node if node.op_type == "Identity" and node.input[0] in known]
    origin = {node.output[0]: node.input[0] for node in handed_on}
    for node in handed_on:
        graph.node.remove(node)
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = origin.get(name, name)
