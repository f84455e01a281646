"""OpenVINO on CPU: the classifier becomes an IR in which each site is quantised as the plan says.

The quantised graph is written directly: a site's weights are replaced by integers with their scales, in the form that
the CPU plugin executes without unpacking, and at 8 bits its input is quantised with a range observed on calibration
rows. Compared with a general quantiser this takes a tenth of the time, mixes bit widths per site in one pass, and a
decision that finds no node is an error instead of being skipped.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autocompress.anatomy import ModelShape
from autocompress.config import TargetConfig
from autocompress.errors import RuntimeBuildError
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
from autocompress.transforms.quantize import ActivationRange, activation_ranges, per_channel, per_group

_STAND_IN_BYTES = 4096
"""Float constants from this size on are replaced in a stand-in."""


@contextmanager
def _without_telemetry() -> Iterator[None]:
    # OpenVINO's converter reports its use unless the telemetry package cannot be imported; it then takes a stub.
    name = "openvino_telemetry"
    absent = name not in sys.modules
    saved = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            del sys.modules[name]
        else:
            sys.modules[name] = saved  # type: ignore[assignment]


def _openvino() -> Any:
    with _without_telemetry():
        import openvino
        import openvino.tools.ovc
    return openvino


class OpenVINOSession(Session):
    """A compiled IR with one inference request."""

    def __init__(self, compiled: Any) -> None:
        self._names = [port.get_any_name() for port in compiled.inputs]
        self._request = compiled.create_infer_request()

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        result = self._request.infer([inputs[name] for name in self._names], share_inputs=True)
        return np.array(result[0], dtype=np.float32)


class OpenVINORuntime(Runtime):
    """Builds and runs OpenVINO IRs."""

    name = "openvino"
    batch_invariant = True

    def check(self, plan: CompressionPlan, shape: ModelShape) -> None:
        """Accept everything that a `Quantize` can say: 16, 8 (with 8-bit activations in linear layers) and 4 bits."""

    def build(self, model: EncoderModel, plan: CompressionPlan, calibration: Sequence[Batch], folder: Path) -> Artifact:
        quantize = plan.of_type(Quantize)
        graph, inputs = _convert(model, calibration[0])
        static = any(q.activation_bits == 8 for q in quantize.values())
        ranges = activation_ranges(model, calibration) if static else {}
        nodes = {node.get_friendly_name(): node for node in graph.get_ordered_ops()}
        writer = _Writer(ranges)
        for site, decision in quantize.items():
            if site == "embeddings":
                for path in model.layout.embeddings:
                    writer.table(_node(nodes, f"__module.m.{path}/aten::embedding/Gather", site), decision)
            else:
                for path in linear_paths(model, site):
                    node = _node(nodes, f"__module.m.{path}/aten::linear/MatMul", site)
                    writer.linear(node, decision, path)
        graph.validate_nodes_and_infer_types()
        ov = _openvino()
        ov.save_model(graph, folder / "model.xml", compress_to_fp16=False)
        artifact = Artifact(folder, self.name, ("model.xml", "model.bin"), inputs, plan)
        artifact.save()
        return artifact

    def load(self, artifact: Artifact, target: TargetConfig) -> OpenVINOSession:
        core = _openvino().Core()
        try:
            compiled = core.compile_model(artifact.folder / "model.xml", "CPU", self.settings(target))
        except RuntimeError as error:
            line = str(error).strip().splitlines()[-1]
            raise RuntimeBuildError(f"{artifact.folder}: OpenVINO cannot load it ({line})") from None
        return OpenVINOSession(compiled)

    def settings(self, target: TargetConfig) -> dict[str, Any]:
        return {
            "INFERENCE_NUM_THREADS": target.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": target.precision,
            # Pinned threads of two workers would share one core and leave another idle.
            "ENABLE_CPU_PINNING": False,
        }

    def stand_in(self, artifact: Artifact, folder: Path) -> Artifact:
        ov = _openvino()
        op = ov.opset13
        graph = ov.Core().read_model(artifact.folder / "model.xml")
        for number, node in enumerate(graph.get_ordered_ops()):
            large = node.get_type_name() == "Constant" and node.get_byte_size() >= _STAND_IN_BYTES
            if not large or node.get_element_type() != ov.Type.f32:
                continue
            shape = op.constant(np.array(list(node.shape), dtype=np.int64))
            filled = op.broadcast(op.constant(np.array(stand_in_value(number), dtype=np.float32)), shape)
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(filled.output(0))
        ov.save_model(graph, folder / "model.xml", compress_to_fp16=False)
        copy = Artifact(folder, self.name, artifact.files, artifact.inputs, artifact.plan)
        copy.save()
        return copy


def _convert(model: EncoderModel, batch: Batch) -> tuple[Any, tuple[str, ...]]:
    """Trace the module and convert it to a graph with dynamic batch and tokens."""
    ov = _openvino()
    example = example_inputs(batch)
    wrapped = LogitsOnly(model.module, tuple(example)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        # Tracing warns of the branches on masks that transformers takes in Python; both inputs kinds were traced.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            wrapped, tuple(example.values()), check_trace=False, strict=False
        )
        with _without_telemetry():
            dynamic = (ov.PartialShape([-1, -1]), ov.Type.i64)
            graph = ov.convert_model(traced, input=[dynamic] * len(example))
    for port, name in zip(graph.inputs, example, strict=True):
        port.get_tensor().set_names({name})
    graph.outputs[0].get_tensor().set_names({"logits"})
    return graph, tuple(example)


def _node(nodes: Mapping[str, Any], name: str, site: str) -> Any:
    if name not in nodes:
        raise RuntimeBuildError(f"{site}: not carried out: the converted graph has no node {name}")
    return nodes[name]


class _Writer:
    """Rewrites the weights and inputs of graph nodes."""

    def __init__(self, ranges: Mapping[str, ActivationRange]) -> None:
        self._ov = _openvino()
        self._op = self._ov.opset13
        self._ranges = ranges
        self._quantized_inputs: dict[str, Any] = {}

    def linear(self, node: Any, decision: Quantize, path: str) -> None:
        """Quantise a MatMul with weights ``out x in`` at its second input."""
        port = 1
        weight = _weight(node, port)
        if decision.weight_bits == 8:
            found = per_channel(weight)
            values = self._op.convert(self._op.constant(found.values), "f32")
            packed = self._op.multiply(values, self._op.constant(found.scales))
            if decision.activation_bits == 8:
                node.input(0).replace_source_output(self._quantized(node.input_value(0), self._ranges[path]))
        else:
            packed = self._packed(weight, decision)
        node.input(port).replace_source_output(packed.output(0))

    def table(self, node: Any, decision: Quantize) -> None:
        """Quantise a Gather with a table ``rows x width`` at its first input."""
        weight = _weight(node, 0)
        if decision.weight_bits == 8:
            found = per_channel(weight)
            values = self._op.convert(self._op.constant(found.values), "f16")
            scaled = self._op.multiply(values, self._op.constant(found.scales.astype(np.float16)))
            packed = self._op.convert(scaled, "f32")
        else:
            packed = self._packed(weight, decision)
        node.input(0).replace_source_output(packed.output(0))

    def _packed(self, weight: np.ndarray, decision: Quantize) -> Any:
        if decision.weight_bits == 16:
            return self._op.convert(self._op.constant(weight.astype(np.float16)), "f32")
        found = per_group(weight, decision.group_size)
        tensor = self._ov.Tensor(self._ov.Type.i4, self._ov.Shape(found.values.shape))
        nibbles = found.values.reshape(-1).view(np.uint8) & 0x0F
        tensor.data[:] = (nibbles[0::2] | (nibbles[1::2] << 4)).view(tensor.data.dtype).reshape(tensor.data.shape)
        values = self._op.convert(self._op.constant(tensor), "f16")
        scaled = self._op.multiply(values, self._op.constant(found.scales.astype(np.float16)))
        flat = self._op.reshape(scaled, self._op.constant(np.array(weight.shape, dtype=np.int64)), False)
        return self._op.convert(flat, "f32")

    def _quantized(self, source: Any, span: ActivationRange) -> Any:
        # Query, key and value read the same tensor: they share one quantised copy of it.
        key = f"{source.get_node().get_friendly_name()}:{source.get_index()}:{span.low}:{span.high}"
        if key not in self._quantized_inputs:
            low, high = (self._op.constant(np.array(end, dtype=np.float32)) for end in (span.low, span.high))
            self._quantized_inputs[key] = self._op.fake_quantize(source, low, high, low, high, 256)
        return self._quantized_inputs[key].output(0)


def _weight(node: Any, port: int) -> np.ndarray:
    source = node.input_value(port).get_node()
    while source.get_type_name() != "Constant":
        if source.get_type_name() != "Convert":
            raise RuntimeBuildError(f"{node.get_friendly_name()}: its weights are not a constant")
        source = source.input_value(0).get_node()
    return np.array(source.data, dtype=np.float32)
