"""OpenVINO on CPU: the classifier becomes an IR in which each site is quantised as the plan says.

A model is converted once per depth; a candidate is a copy of that graph in which each linear layer is replaced by its
piece: narrower, factorised, or in integers with their scales in the form that the CPU plugin executes without
unpacking, at 8 bits with a quantised input. Compared with converting and quantising each candidate this takes a
fraction of the time, mixes bit widths per site in one pass, and a piece that finds no node is an error instead of
being skipped.
"""

from __future__ import annotations

import json
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autocompress import machine
from autocompress.anatomy import ModelShape
from autocompress.config import TargetConfig
from autocompress.decisions import MaxTokens
from autocompress.errors import RuntimeBuildError
from autocompress.model import EncoderModel
from autocompress.pieces import Factor, Layer, Piece
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
    joined,
    products,
    stand_in_value,
)
from autocompress.task import Batch
from autocompress.transforms.quantize import ActivationRange, Packed

_ROUNDED_TOGETHER = 32
"""Columns that the plugin rounds together, by default, before it multiplies them by 4 bits in groups of a multiple."""
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


_ONE_AT_A_TIME = threading.Lock()


@cache
def _core() -> Any:
    # On CPUs with AVX512, what a core starts with gives this thread a stack for signals and takes it away when its last
    # model goes. Of two, the one that goes first can leave the thread a stack that is no longer there, and the next
    # signal, such as Ctrl-C, ends the process. So there is one, and it stays.
    return _openvino().Core()


class OpenVINOSession(Session):
    """A compiled IR with one inference request."""

    def __init__(self, compiled: Any) -> None:
        self._names = [port.get_any_name() for port in compiled.inputs]
        self._request = compiled.create_infer_request()

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        result = self._request.infer([inputs[name] for name in self._names], share_inputs=True)
        return np.array(result[0], dtype=np.float32)

    def close(self) -> None:
        self._request = None


class OpenVINORuntime(Runtime):
    """Builds and runs OpenVINO IRs."""

    name = "openvino"

    def check(self, plan: CompressionPlan, shape: ModelShape) -> None:
        """Accept every decision."""

    def convert(self, model: EncoderModel, example: Batch, folder: Path) -> None:
        graph, inputs = _convert(model, example)
        _free_widths(graph, model.layout.blocks)
        _openvino().save_model(graph, folder / "model.xml", compress_to_fp16=False)
        (folder / TEMPLATE_INPUTS).write_text(json.dumps(inputs), encoding="utf-8")

    def template(self, model: EncoderModel, folder: Path) -> Template:
        inputs = tuple(json.loads((folder / TEMPLATE_INPUTS).read_text(encoding="utf-8")))
        graph = _openvino().Core().read_model(folder / "model.xml")
        return Template(graph, inputs, products(model), model.layout, model.shape.runs)

    def version(self) -> str:
        return str(_openvino().__version__)

    def stitch(self, template: Template, pieces: Mapping[str, Piece], plan: CompressionPlan, folder: Path) -> Artifact:
        graph = template.graph.clone()
        writer = _Writer(graph)
        for site, piece in pieces.items():
            for path, layer in zip(template.layout.linears(site), piece, strict=True):
                if site == "embeddings":
                    writer.table(path, layer[0], site)
                else:
                    writer.linear(template.products[path], layer, site, template.uses(site))
        for cut in plan.of_type(MaxTokens).values():
            writer.cut(cut.tokens)
        try:
            graph.validate_nodes_and_infer_types()
        except RuntimeError as error:
            line = str(error).strip().splitlines()[-1]
            raise RuntimeBuildError(f"the stitched graph is not consistent ({line})") from None
        # The converter's names are long, and those of new nodes count up through the process: files of one plan would
        # differ in size. Inputs and outputs are known by their tensors' names.
        for number, node in enumerate(graph.get_ordered_ops()):
            node.set_friendly_name(f"n{number}")
        _openvino().save_model(graph, folder / "model.xml", compress_to_fp16=False)
        artifact = Artifact(folder, self.name, ("model.xml", "model.bin"), template.inputs, plan)
        artifact.save()
        return artifact

    def weight_bytes(self, product: Product) -> float:
        weights = product.outer * product.inner
        if product.bits == 8:
            return weights + (2 if product.kind == "embedding" else 4) * product.outer
        stored = weights * product.bits / 8
        if product.whole_steps:
            return stored + weights / product.group + 4 * product.outer
        return stored + (2 * weights / product.group if product.bits == 4 else 0)

    def rounded_together(self, weight: Packed) -> int:
        narrow = weight.bits == 4 and weight.multiples is None and weight.values.shape[2] % _ROUNDED_TOGETHER == 0
        return _ROUNDED_TOGETHER if narrow and machine.has_vnni() else 0

    def load(self, artifact: Artifact, target: TargetConfig) -> OpenVINOSession:
        with _ONE_AT_A_TIME:
            core = _core()
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


def _free_widths(graph: Any, blocks: str) -> None:
    """Let reshapes within the blocks infer the number of heads, which the converter has written into them.

    They read ``0 0 heads size``, ``0 heads 0 size`` and ``0 0 width``, where 0 copies a dimension.
    """
    ov = _openvino()
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Reshape" or not node.get_friendly_name().startswith(f"{_scope(blocks)}."):
            continue
        source = node.input_value(1).get_node()
        shape = np.array(source.data) if source.get_type_name() == "Constant" else np.array([-1])
        if (shape >= 0).all():
            shape[np.flatnonzero(shape)[0]] = -1
            node.input(1).replace_source_output(ov.opset13.constant(shape).output(0))
    graph.validate_nodes_and_infer_types()


class _Writer:
    """Puts pieces into a graph."""

    def __init__(self, graph: Any) -> None:
        self._ov = _openvino()
        self._op = self._ov.opset13
        self._graph = graph
        self._nodes = {node.get_friendly_name(): node for node in graph.get_ordered_ops()}
        self._quantized_inputs: dict[str, Any] = {}

    def linear(self, paths: Sequence[str], layer: Layer, site: str, uses: int) -> None:
        """Replace the linear layer whose products stand at ``paths`` by those of ``layer``, which its uses share."""
        weights = [self._stored(factor.weight) for factor in layer]
        for use in range(uses):
            # The converter numbers what a module does from its second use on.
            self._use(paths, layer, weights, site, f"_{use}" if use else "")

    def _use(self, paths: Sequence[str], layer: Layer, weights: Sequence[Any], site: str, suffix: str) -> None:
        first = self._node(f"{_scope(paths[0])}/aten::linear/MatMul{suffix}", site)
        product = self._node(f"{_scope(paths[-1])}/aten::linear/MatMul{suffix}", site)
        last = self._nodes.get(f"{_scope(paths[-1])}/aten::linear/Add{suffix}", product)
        source, rank = first.input_value(0), len(last.get_output_partial_shape(0))
        readers = last.output(0).get_target_inputs()
        # Until the whole graph is validated, the source has the width that it had before the layers below it shrank.
        entry = self._op.parameter([*[-1] * (rank - 1), layer[0].weight.shape[1]])
        output = entry.output(0)
        for position, factor in enumerate(layer):
            if factor.span is not None:
                output = self._quantized(output, factor.span, source if position == 0 else output)
            output = self._op.matmul(output, weights[position], False, True).output(0)
            if factor.bias is not None:
                bias = factor.bias.reshape((*[1] * (rank - 1), -1))
                output = self._op.add(output, self._op.constant(bias)).output(0)
        for reader in entry.output(0).get_target_inputs():
            reader.replace_source_output(source)
        output.get_node().set_friendly_name(last.get_friendly_name())
        for reader in readers:
            reader.replace_source_output(output)

    def table(self, path: str, factor: Factor, site: str) -> None:
        """Replace the embedding table at ``path``, ``rows x width``."""
        node, weight = self._node(f"{_scope(path)}/aten::embedding/Gather", site), factor.weight
        if factor.index is not None:
            axis = self._op.constant(np.array(0, dtype=np.int32))
            rows = self._op.gather(self._op.constant(factor.index), node.input_value(1), axis)
            node.input(1).replace_source_output(self._op.convert(rows, "i32").output(0))
        if weight.bits == 8:
            assert weight.scales is not None
            # Half-precision scales: rows are unpacked one by one, and twice the bytes would buy no accuracy.
            values = self._op.convert(self._op.constant(weight.values), "f16")
            scaled = self._op.multiply(values, self._op.constant(weight.scales.astype(np.float16)))
            stored = self._op.convert(scaled, "f32")
        else:
            stored = self._stored(weight)
        node.input(0).replace_source_output(stored.output(0))

    def cut(self, tokens: int) -> None:
        """Let all that reads the inputs read no more than their first ``tokens`` tokens."""
        start, stop, step, axis = (self._op.constant(np.array([n], dtype=np.int64)) for n in (0, tokens, 1, 1))
        for entry in self._graph.get_parameters():
            readers = entry.output(0).get_target_inputs()
            short = self._op.slice(entry, start, stop, step, axis)
            for reader in readers:
                reader.replace_source_output(short.output(0))

    def _node(self, name: str, site: str) -> Any:
        if name not in self._nodes:
            raise RuntimeBuildError(f"{site}: not carried out: the converted graph has no node {name}")
        return self._nodes[name]

    def _stored(self, weight: Packed) -> Any:
        """Return the nodes that unpack ``weight`` to float32, in the form that the CPU plugin recognises."""
        if weight.bits == 32:
            return self._op.constant(weight.values)
        if weight.bits == 16:
            return self._op.convert(self._op.constant(weight.values), "f32")
        assert weight.scales is not None
        if weight.bits == 8:
            values = self._op.convert(self._op.constant(weight.values), "f32")
            return self._op.multiply(values, self._op.constant(weight.scales))
        flat = self._op.constant(np.array(weight.shape, dtype=np.int64))
        values = self._narrow(weight)
        if weight.multiples is None:
            scaled = self._op.multiply(
                self._op.convert(values, "f16"), self._op.constant(weight.scales.astype(np.float16))
            )
            return self._op.convert(self._op.reshape(scaled, flat, False), "f32")
        # Nothing here depends on inputs. In 32 bits the plugin folds all of it into one matrix of 8-bit numbers when it
        # loads the file; products in 8 bits, and what looks like scales to it, it would leave as nodes. So multiples
        # are stored from 0 on, too, which they are brought back from by an addition.
        stored = self._op.constant(weight.multiples.view(np.uint8) ^ np.uint8(128))
        whole, raised = (self._op.convert(part, "i32") for part in (values, stored))
        if weight.bits < 4:
            whole = self._op.subtract(whole, self._op.constant(np.array(weight.zero, dtype=np.int32)))
        multiples = self._op.add(raised, self._op.constant(np.array(-128, dtype=np.int32)))
        whole = self._op.convert(self._op.reshape(self._op.multiply(whole, multiples), flat, False), "i8")
        return self._op.multiply(self._op.convert(whole, "f32"), self._op.constant(weight.scales[..., 0]))

    def _narrow(self, weight: Packed) -> Any:
        """Return the constant of values of 4, 3 or 2 bits, ``out x groups x group``; below 4 from 0 on."""
        types = self._ov.Type
        kind = {4: types.i4, 3: types.u3, 2: types.u2}[weight.bits]
        tensor = self._ov.Tensor(kind, self._ov.Shape(weight.values.shape))
        tensor.data[:] = _bytes_of(weight).view(tensor.data.dtype).reshape(tensor.data.shape)
        return self._op.constant(tensor)

    def _quantized(self, value: Any, span: ActivationRange, source: Any) -> Any:
        """Return ``value`` on the grid of ``span``; what stands for the same ``source`` is quantised once."""
        # Query, key and value read the same tensor: they share one quantised copy of it.
        key = f"{source.get_node().get_friendly_name()}:{source.get_index()}:{span.low}:{span.high}"
        if key not in self._quantized_inputs:
            low, high = (self._op.constant(np.array(end, dtype=np.float32)) for end in (span.low, span.high))
            self._quantized_inputs[key] = self._op.fake_quantize(value, low, high, low, high, 256)
        return self._quantized_inputs[key].output(0)


def _bytes_of(weight: Packed) -> np.ndarray:
    """Return values of 4, 3 or 2 bits as OpenVINO's types hold them, uint8; the last byte is filled up.

    Halves and quarters of a byte begin at its low end. Of eight values of 3 bits two bytes hold the lower two bits of
    each, beginning at the high end, and a third one the highest bits in the same order.
    """
    values = weight.values.reshape(-1)
    if weight.bits == 4:
        return joined(values.view(np.uint8) & 0x0F, (0, 4))
    values = weight.from_zero().reshape(-1)
    if weight.bits == 2:
        return joined(values, (0, 2, 4, 6))
    padded = np.pad(values, (0, -len(values) % 8))
    lower, upper = joined(padded & 3, (6, 4, 2, 0)), np.packbits(padded >> 2)
    return np.concatenate([lower.reshape(-1, 2), upper[:, None]], axis=1).reshape(-1)


def _scope(path: str) -> str:
    return f"__module.m.{path}"
