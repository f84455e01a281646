"""ONNX Runtime on CPU: the classifier becomes an ONNX file in which each site is quantised as the plan says.

8 bits become ``DynamicQuantizeMatMul`` (the activation range is taken anew at each call), 4 bits ``MatMulNBits``, an
embedding ``Gather`` on int8 or ``GatherBlockQuantized``; all are operators that the CPU provider has kernels for. A
decision that finds no node is an error instead of being skipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autocompress.anatomy import ModelShape
from autocompress.config import TargetConfig
from autocompress.errors import PlanError, RuntimeBuildError
from autocompress.model import EncoderModel
from autocompress.plan import CompressionPlan, Quantize
from autocompress.runtimes.base import (
    Artifact,
    LogitsOnly,
    Runtime,
    Session,
    example_inputs,
    linear_paths,
    stand_in_value,
)
from autocompress.task import Batch
from autocompress.transforms.quantize import per_channel, per_group

if TYPE_CHECKING:
    from pathlib import Path

_OPSET = 18
_CONTRIB = "com.microsoft"
_SMALLEST_GROUP = 16
_STAND_IN_BYTES = 4096
"""Float initialisers from this size on are replaced in a stand-in."""


class ONNXSession(Session):
    """An inference session on the CPU provider."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = [port.name for port in session.get_inputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.asarray(self._session.run(None, {name: inputs[name] for name in self._names})[0], dtype=np.float32)


class ONNXRuntime(Runtime):
    """Builds and runs ONNX files."""

    name = "onnxruntime"
    # Ranges of activations are taken over a whole call, so that a row's neighbours change its logits.
    batch_invariant = False

    def check(self, plan: CompressionPlan, shape: ModelShape) -> None:
        """Refuse 4-bit groups that the kernels do not have."""
        for site, decision in plan.of_type(Quantize).items():
            group = decision.group_size
            if decision.weight_bits == 4 and (group < _SMALLEST_GROUP or group & (group - 1)):
                raise PlanError(
                    f"{site}: onnxruntime stores 4 bits in groups of a power of two >= {_SMALLEST_GROUP}, got {group}"
                )

    def build(self, model: EncoderModel, plan: CompressionPlan, calibration: Sequence[Batch], folder: Path) -> Artifact:
        import onnx

        file = folder / "model.onnx"
        inputs = _convert(model, calibration[0], file)
        proto = onnx.load(str(file))
        quantize = plan.of_type(Quantize)
        if quantize:
            writer = _Writer(proto.graph)
            for site, decision in quantize.items():
                if site == "embeddings":
                    for path in model.layout.embeddings:
                        writer.table(path, decision, site)
                else:
                    for path in linear_paths(model, site):
                        writer.linear(path, decision, site)
            writer.finish()
            proto.opset_import.append(onnx.helper.make_opsetid(_CONTRIB, 1))
            onnx.save(proto, str(file))
        artifact = Artifact(folder, self.name, (file.name,), inputs, plan)
        artifact.save()
        return artifact

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
            line = str(error).strip().splitlines()[0]
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


def _convert(model: EncoderModel, batch: Batch, file: Path) -> tuple[str, ...]:
    """Export the module with dynamic batch and tokens; returns the input names."""
    example = example_inputs(batch)
    wrapped = LogitsOnly(model.module, tuple(example)).eval()
    axes = {name: {0: "batch", 1: "tokens"} for name in example}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The tracing exporter is deprecated but takes a tenth of the newer one's time, which counts per candidate.
        torch.onnx.export(
            wrapped,
            tuple(example.values()),
            str(file),
            input_names=list(example),
            output_names=["logits"],
            dynamic_axes={**axes, "logits": {0: "batch"}},
            opset_version=_OPSET,
            dynamo=False,
        )
    return tuple(example)


class _Writer:
    """Replaces nodes of an ONNX graph by quantised ones."""

    def __init__(self, graph: Any) -> None:
        import onnx

        self._onnx = onnx
        self._graph = graph
        self._tensors = {t.name: t for t in graph.initializer}
        self._nodes = {node.name: node for node in graph.node}
        self._replaced: dict[str, list[Any]] = {}

    def linear(self, path: str, decision: Quantize, site: str) -> None:
        """Quantise the product of the linear layer at ``path``."""
        scope = _scope(path)
        node = self._nodes.get(f"{scope}/MatMul") or self._nodes.get(f"{scope}/Gemm")
        if node is None or node.input[1] not in self._tensors:
            raise RuntimeBuildError(f"{site}: not carried out: the exported graph has no product at {scope}")
        stored = self._onnx.numpy_helper.to_array(self._tensors[node.input[1]])
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        weight = np.ascontiguousarray(stored if transposed else stored.T, dtype=np.float32)
        # A Gemm is a product and its bias; the bias stays a node of its own.
        product = f"{node.name}/product" if len(node.input) > 2 else node.output[0]
        nodes = self._product(node.input[0], weight, decision, node.name, product)
        if len(node.input) > 2:
            nodes.append(self._make("Add", [product, node.input[2]], node.output[0]))
        self._replaced[node.name] = nodes

    def _product(self, source: str, weight: np.ndarray, decision: Quantize, name: str, output: str) -> list[Any]:
        if decision.weight_bits == 8:
            found = per_channel(weight)
            values = self._constant(f"{name}/weight", np.ascontiguousarray(found.values.T))
            scales = self._constant(f"{name}/scale", found.scales[:, 0])
            return [self._make("DynamicQuantizeMatMul", [source, values, scales], output, contrib=True)]
        if decision.weight_bits == 16:
            half = self._constant(f"{name}/weight", np.ascontiguousarray(weight.T).astype(np.float16))
            cast = self._make("Cast", [half], f"{half}/f32", to=self._onnx.TensorProto.FLOAT)
            return [cast, self._make("MatMul", [source, cast.output[0]], output)]
        grouped = per_group(weight, decision.group_size)
        unsigned = (grouped.values + 8).astype(np.uint8)
        packed = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
        values = self._constant(f"{name}/weight", packed)
        scales = self._constant(f"{name}/scale", grouped.scales.reshape(-1))
        attributes = {
            "K": weight.shape[1],
            "N": weight.shape[0],
            "bits": 4,
            "block_size": decision.group_size,
            # Level 4 lets the kernel compute on 8-bit activations, which is what makes it faster than unpacking.
            "accuracy_level": 4,
        }
        return [self._make("MatMulNBits", [source, values, scales], output, contrib=True, **attributes)]

    def table(self, path: str, decision: Quantize, site: str) -> None:
        """Quantise the embedding table at ``path``."""
        node = self._nodes.get(f"{_scope(path)}/Gather")
        if node is None or node.input[0] not in self._tensors:
            raise RuntimeBuildError(f"{site}: not carried out: the exported graph has no look-up at {_scope(path)}")
        weight = np.asarray(self._onnx.numpy_helper.to_array(self._tensors[node.input[0]]), dtype=np.float32)
        rows, output, name = node.input[1], node.output[0], node.name
        if decision.weight_bits == 4:
            grouped = per_group(weight, decision.group_size)
            flat = grouped.values.reshape(weight.shape)
            unsigned = (flat + 8).astype(np.uint8)
            packed = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
            values = self._constant(f"{name}/table", packed)
            scales = self._constant(f"{name}/scale", grouped.scales[..., 0])
            attributes = {"bits": 4, "block_size": decision.group_size, "gather_axis": 0, "quantize_axis": 1}
            nodes = [self._make("GatherBlockQuantized", [values, rows, scales], output, contrib=True, **attributes)]
        elif decision.weight_bits == 8:
            found = per_channel(weight)
            values = self._constant(f"{name}/table", found.values)
            scales = self._constant(f"{name}/scale", found.scales)
            nodes = [
                self._make("Gather", [values, rows], f"{name}/int8"),
                self._make("Cast", [f"{name}/int8"], f"{name}/f32", to=self._onnx.TensorProto.FLOAT),
                self._make("Gather", [scales, rows], f"{name}/row_scale"),
                self._make("Mul", [f"{name}/f32", f"{name}/row_scale"], output),
            ]
        else:
            half = self._constant(f"{name}/table", weight.astype(np.float16))
            nodes = [
                self._make("Gather", [half, rows], f"{name}/f16"),
                self._make("Cast", [f"{name}/f16"], output, to=self._onnx.TensorProto.FLOAT),
            ]
        self._replaced[name] = nodes

    def finish(self) -> None:
        """Put the new nodes in place of the old ones, and leave out initialisers that nothing reads any more."""
        nodes = [new for old in self._graph.node for new in self._replaced.get(old.name, [old])]
        kept = [self._onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self._graph.node[:]
        self._graph.node.extend(kept)
        read = {name for node in self._graph.node for name in node.input}
        for tensor in [t for t in self._graph.initializer if t.name not in read]:
            self._graph.initializer.remove(tensor)

    def _constant(self, name: str, value: np.ndarray) -> str:
        self._graph.initializer.append(self._onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _make(self, kind: str, inputs: list[str], output: str, *, contrib: bool = False, **attributes: int) -> Any:
        domain = _CONTRIB if contrib else ""
        node = self._onnx.helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", domain=domain)
        node.attribute.extend(self._onnx.helper.make_attribute(name, value) for name, value in attributes.items())
        return node


def _scope(path: str) -> str:
    """Return the exporter's name of a module: a list's number joins its name, a sequence's follows it."""
    parts: list[str] = ["m"]
    names = path.split(".")
    for position, part in enumerate(names):
        if not part.isdigit():
            parts.append(part)
        elif position == len(names) - 1:
            parts.append(f"{parts[-1]}.{part}")
        else:
            parts[-1] = f"{parts[-1]}.{part}"
    return "/" + "/".join(parts)
