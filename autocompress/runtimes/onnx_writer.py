"""ONNX graphs in which each site stands as the plan says: `onnxruntime.py` has them written from the exported one.

8 bits become ``MatMulIntegerToFloat`` of an input that is quantised once for all that read it, 4 bits ``MatMulNBits``,
an embedding ``Gather`` on int8 or ``GatherBlockQuantized``; all are operators that the CPU provider has kernels for.
What these do not take, such as 3 bits or groups of 8, is stored as narrow and unpacked when the file is loaded. A
decision that finds no node is an error instead of being skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autocompress.errors import RuntimeBuildError
from autocompress.pieces import Factor, Layer
from autocompress.runtimes.base import joined
from autocompress.transforms.quantize import ActivationRange, Packed

CONTRIB = "com.microsoft"
"""Domain of the operators that ONNX Runtime has beyond the standard."""
_SMALLEST_GROUP = 16
"""Groups of 4 bits that have kernels are powers of two from here on."""


class Writer:
    """Puts pieces into a copy of an ONNX graph, which itself stays as it is."""

    def __init__(self, graph: Any) -> None:
        import onnx

        self._onnx = onnx
        self._graph = graph
        self._tensors = {t.name: t for t in graph.initializer}
        self._nodes = {node.name: node for node in graph.node}
        self._readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._replaced: dict[str, list[Any]] = {}
        self._added: dict[str, Any] = {}
        self._made: set[str] = set()
        self._after: dict[str, list[Any]] = {}
        self._first: list[Any] = []
        self._cut: dict[str, str] = {}
        self.contrib = False

    def linear(self, paths: Sequence[str], layer: Layer, site: str, uses: int) -> None:
        """Replace the linear layer whose products stand at ``paths`` by those of ``layer``, which its uses share."""
        for use in range(uses):
            # The exporter numbers a module from its second use on.
            scopes = [f"{_scope(path)}_{use}" if use else _scope(path) for path in paths]
            self._use(scopes, layer, f"{_scope(paths[0])}/shared" if uses > 1 else None, site)

    def _use(self, scopes: Sequence[str], layer: Layer, shared: str | None, site: str) -> None:
        old = [node for scope in scopes for node in self._product_and_bias(scope, site)]
        source = next(name for name in old[0].input if name not in self._tensors)
        name, output = old[0].name, old[-1].output[0]
        stored = shared or name
        nodes: list[Any] = []
        for position, factor in enumerate(layer):
            last = position == len(layer) - 1
            summed = output if last else f"{name}/{position}"
            product = summed if factor.bias is None else f"{name}/{position}/product"
            nodes += self._product(source, factor, f"{stored}/{position}", product)
            if factor.bias is not None:
                bias = self._constant(f"{stored}/{position}/bias", factor.bias)
                nodes.append(self._make("Add", [product, bias], summed))
            source = summed
        # Another use comes later, and reads what the first one unpacks.
        nodes = [node for node in nodes if node.output[0] not in self._made]
        self._made.update(node.output[0] for node in nodes)
        for node in old:
            self._replaced[node.name] = []
        # Where the last of the old nodes stood, all that the new ones read is there.
        self._replaced[old[-1].name] = nodes

    def _product_and_bias(self, scope: str, site: str) -> list[Any]:
        node = self._nodes.get(f"{scope}/MatMul") or self._nodes.get(f"{scope}/Gemm")
        if node is None or node.input[1] not in self._tensors:
            raise RuntimeBuildError(f"{site}: not carried out: the exported graph has no product at {scope}")
        readers = self._readers.get(node.output[0], [])
        if len(node.input) == 2 and len(readers) == 1 and readers[0].name == f"{scope}/Add":
            return [node, readers[0]]
        return [node]

    def _product(self, source: str, factor: Factor, name: str, output: str) -> list[Any]:
        weight = factor.weight
        if weight.bits == 32:
            values = self._constant(f"{name}/weight", weight.values.T)
            return [self._make("MatMul", [source, values], output)]
        if weight.bits == 16:
            half = self._constant(f"{name}/weight", weight.values.T)
            cast = self._make("Cast", [half], f"{half}/f32", to=self._onnx.TensorProto.FLOAT)
            return [cast, self._make("MatMul", [source, cast.output[0]], output)]
        assert weight.scales is not None
        if weight.bits == 8:
            values = self._constant(f"{name}/weight", weight.values.T)
            scales = self._constant(f"{name}/scale", weight.scales[:, 0])
            if factor.span is None:
                return [*self._scaled(values, scales, name), self._make("MatMul", [source, f"{name}/f32"], output)]
            return [self._of_integers(source, factor.span, values, scales, output)]
        if weight.multiples is not None:
            nodes = self._unpacked(weight, name)
            nodes.append(self._make("Transpose", [nodes[-1].output[0]], f"{name}/transposed", perm=[1, 0]))
            scales = self._constant(f"{name}/scale", weight.scales[:, 0, 0])
            values = nodes[-1].output[0]
            if factor.span is not None:
                return [*nodes, self._of_integers(source, factor.span, values, scales, output)]
            return [*nodes, *self._scaled(values, scales, name), self._make("MatMul", [source, f"{name}/f32"], output)]
        if not has_kernel(weight):
            nodes = self._unpacked(weight, name)
            nodes.append(self._make("Transpose", [nodes[-1].output[0]], f"{name}/transposed", perm=[1, 0]))
            return [*nodes, self._make("MatMul", [source, nodes[-1].output[0]], output)]
        unsigned = weight.from_zero()
        values = self._constant(f"{name}/weight", unsigned[..., 0::2] | (unsigned[..., 1::2] << 4))
        scales = self._constant(f"{name}/scale", weight.scales.reshape(-1))
        attributes = {
            "K": weight.shape[1],
            "N": weight.shape[0],
            "bits": 4,
            "block_size": weight.values.shape[2],
            # Level 4 lets the kernel compute on 8-bit activations, which is what makes it faster than unpacking.
            "accuracy_level": 4,
        }
        return [self._make("MatMulNBits", [source, values, scales], output, contrib=True, **attributes)]

    def _of_integers(self, source: str, span: ActivationRange, values: str, scales: str, output: str) -> Any:
        """Return the product of integers, ``in x out``, with ``source`` on the grid of ``span``."""
        grid: dict[str, np.ndarray] = {
            "step": np.array(span.step, dtype=np.float32),
            "zero": np.array(span.zero, dtype=np.uint8),
        }
        quantized = f"{source}/{span.step}/{span.zero}"
        step, zero = (self._constant(f"{quantized}/{name}", value) for name, value in grid.items())
        if quantized not in self._made:
            self._made.add(quantized)
            # Where it is computed: query, key and value read one tensor, and share its quantised copy.
            node = self._make("QuantizeLinear", [source, step, zero], quantized)
            self._after.setdefault(source, []).append(node)
        inputs = [quantized, values, step, scales, zero]
        return self._make("MatMulIntegerToFloat", inputs, output, contrib=True)

    def _scaled(self, values: str, scales: str, name: str) -> list[Any]:
        """Return nodes that turn integers, ``in x out``, into floats; constants, so it is done once at loading."""
        cast = self._make("Cast", [values], f"{name}/unscaled", to=self._onnx.TensorProto.FLOAT)
        return [cast, self._make("Mul", [f"{name}/unscaled", scales], f"{name}/f32")]

    def _unpacked(self, weight: Packed, name: str) -> list[Any]:
        """Return nodes of which the last one gives narrow values times their multiples, int8 ``out x in``.

        Where steps are no multiples of a unit it gives values times steps, in floats. The nodes read constants alone,
        so that the runtime computes them once, when it loads the file. A number of 3 bits has the lower two in one
        constant and the third in another.
        """
        types = self._onnx.TensorProto
        steps = weight.scales if weight.multiples is None else weight.multiples
        assert steps is not None
        values = weight.from_zero().reshape(-1)
        nodes = self._plane(values & 3, 2, f"{name}/low") if weight.bits == 3 else []
        nodes += self._plane(values >> 2, 1, f"{name}/high") if weight.bits == 3 else []
        if weight.bits == 3:
            up = self._constant(f"{name}/up", np.array(2, dtype=np.uint8))
            nodes.append(self._make("BitShift", [f"{name}/high", up], f"{name}/third", direction="LEFT"))
            nodes.append(self._make("BitwiseOr", [f"{name}/low", f"{name}/third"], f"{name}/values"))
        else:
            nodes += self._plane(values, weight.bits, f"{name}/values")
        shapes: dict[str, np.ndarray] = {
            "grouped": np.array(weight.values.shape, dtype=np.int64),
            "shape": np.array(weight.shape, dtype=np.int64),
            "zero": np.array(weight.zero, dtype=np.float32),
            "steps": steps,
        }
        of = {what: self._constant(f"{name}/{what}", value) for what, value in shapes.items()}
        nodes += [
            self._make("Reshape", [f"{name}/values", of["grouped"]], f"{name}/groups"),
            self._make("Cast", [f"{name}/groups"], f"{name}/float", to=types.FLOAT),
            self._make("Sub", [f"{name}/float", of["zero"]], f"{name}/signed"),
            self._make("Cast", [of["steps"]], f"{name}/steps/float", to=types.FLOAT),
            self._make("Mul", [f"{name}/signed", f"{name}/steps/float"], f"{name}/stepped"),
            self._make("Reshape", [f"{name}/stepped", of["shape"]], f"{name}/flat"),
        ]
        if weight.multiples is not None:
            nodes.append(self._make("Cast", [f"{name}/flat"], f"{name}/int8", to=types.INT8))
        return nodes

    def _plane(self, values: np.ndarray, bits: int, output: str) -> list[Any]:
        """Return nodes that unpack ``values`` (uint8, 1-D) of ``bits`` bits, the first one at the low end of a byte."""
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        parts = {
            "bytes": joined(values, shifts.tolist())[:, None],
            "shifts": shifts[None],
            "mask": np.array(2**bits - 1, dtype=np.uint8),
            "all": np.array([-1], dtype=np.int64),
            "start": np.array([0], dtype=np.int64),
            "stop": np.array([len(values)], dtype=np.int64),
        }
        of = {what: self._constant(f"{output}/{what}", value) for what, value in parts.items()}
        return [
            self._make("BitShift", [of["bytes"], of["shifts"]], f"{output}/shifted", direction="RIGHT"),
            self._make("BitwiseAnd", [f"{output}/shifted", of["mask"]], f"{output}/masked"),
            self._make("Reshape", [f"{output}/masked", of["all"]], f"{output}/padded"),
            self._make("Slice", [f"{output}/padded", of["start"], of["stop"]], output),
        ]

    def table(self, path: str, factor: Factor, site: str) -> None:
        """Replace the embedding table at ``path``, ``rows x width``."""
        node = self._nodes.get(f"{_scope(path)}/Gather")
        if node is None or node.input[0] not in self._tensors:
            raise RuntimeBuildError(f"{site}: not carried out: the exported graph has no look-up at {_scope(path)}")
        rows, output, name, weight = node.input[1], node.output[0], node.name, factor.weight
        nodes: list[Any] = []
        if factor.index is not None:
            index = self._constant(f"{name}/index", factor.index)
            nodes.append(self._make("Gather", [index, rows], f"{name}/row"))
            rows = f"{name}/row/i64"
            nodes.append(self._make("Cast", [f"{name}/row"], rows, to=self._onnx.TensorProto.INT64))
        if weight.bits == 4 and weight.multiples is None and not has_kernel(weight):
            nodes += self._unpacked(weight, f"{name}/table")
            nodes.append(self._make("Gather", [nodes[-1].output[0], rows], output))
        elif weight.bits == 4 and weight.multiples is None:
            assert weight.scales is not None
            unsigned = weight.from_zero().reshape(weight.shape)
            values = self._constant(f"{name}/table", unsigned[:, 0::2] | (unsigned[:, 1::2] << 4))
            scales = self._constant(f"{name}/scale", weight.scales[..., 0])
            attributes = {
                "bits": 4,
                "block_size": weight.values.shape[2],
                "gather_axis": 0,
                "quantize_axis": 1,
            }
            inputs = [values, rows, scales]
            nodes.append(self._make("GatherBlockQuantized", inputs, output, contrib=True, **attributes))
        elif weight.scales is not None:
            if weight.bits == 8:
                values = self._constant(f"{name}/table", weight.values)
            else:
                nodes += self._unpacked(weight, f"{name}/table")
                values = nodes[-1].output[0]
            half = weight.bits == 8  # as OpenVINO's: twice the bytes would buy no accuracy
            scales = self._constant(f"{name}/scale", weight.scales.reshape(-1, 1).astype("f2" if half else "f4"))
            row_scale = f"{name}/row_scale"
            nodes += [
                self._make("Gather", [values, rows], f"{name}/int8"),
                self._make("Cast", [f"{name}/int8"], f"{name}/f32", to=self._onnx.TensorProto.FLOAT),
                self._make("Gather", [scales, rows], f"{name}/half" if half else row_scale),
            ]
            if half:
                nodes.append(self._make("Cast", [f"{name}/half"], row_scale, to=self._onnx.TensorProto.FLOAT))
            nodes += [
                self._make("Mul", [f"{name}/f32", row_scale], output),
            ]
        else:
            values = self._constant(f"{name}/table", weight.values)
            nodes += [
                self._make("Gather", [values, rows], f"{name}/narrow"),
                self._make("Cast", [f"{name}/narrow"], output, to=self._onnx.TensorProto.FLOAT),
            ]
        self._replaced[name] = nodes

    def cut(self, tokens: int) -> None:
        """Let all that reads the inputs read no more than their first ``tokens`` tokens."""
        ends = {"start": 0, "stop": tokens, "axis": 1}
        names = [self._constant(f"cut/{name}", np.array([value], dtype=np.int64)) for name, value in ends.items()]
        for entry in self._graph.input:
            self._cut[entry.name] = f"{entry.name}/first"
            self._first.append(self._make("Slice", [entry.name, *names], self._cut[entry.name]))

    def finish(self, graph: Any) -> None:
        """Fill the empty ``graph``: new nodes in place of the old ones, and only the initialisers that are read."""
        graph.name = self._graph.name
        graph.input.extend(self._graph.input)
        graph.output.extend(self._graph.output)
        for old in self._graph.node:
            for new in self._replaced.get(old.name, [old]):
                graph.node.append(new)
                graph.node.extend(after for name in new.output for after in self._after.get(name, []))
        for node in graph.node:
            for position, name in enumerate(node.input):
                node.input[position] = self._cut.get(name, name)
        for position, node in enumerate(self._first):
            graph.node.insert(position, node)
        read = {name for node in graph.node for name in node.input}
        graph.initializer.extend(t for t in self._graph.initializer if t.name in read)
        graph.initializer.extend(self._added.values())
        _shorten(graph)

    def _constant(self, name: str, value: np.ndarray) -> str:
        if name not in self._added:  # another use of the layer has put it there
            self._added[name] = self._onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def _make(
        self, kind: str, inputs: list[str], output: str, *, contrib: bool = False, **attributes: int | str | list[int]
    ) -> Any:
        self.contrib |= contrib
        domain = CONTRIB if contrib else ""
        node = self._onnx.helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", domain=domain)
        node.attribute.extend(self._onnx.helper.make_attribute(name, value) for name, value in attributes.items())
        return node


def _shorten(graph: Any) -> None:
    """Number all tensors but inputs and outputs: the exporter's names take as many bytes as a small layer."""
    short = {port.name: port.name for ports in (graph.input, graph.output) for port in ports}
    names = [name for node in graph.node for name in (*node.input, *node.output) if name]
    for name in dict.fromkeys(names):
        short.setdefault(name, f"n{len(short)}")
    for node in graph.node:
        node.name = ""
        for ports in (node.input, node.output):
            for position, name in enumerate(ports):
                ports[position] = short.get(name, name)
    for tensor in graph.initializer:
        tensor.name = short[tensor.name]


def has_kernel(weight: Packed) -> bool:
    """Return whether there is a kernel for the groups of values of 4 bits."""
    group = int(weight.values.shape[2])
    return group >= _SMALLEST_GROUP and not group & (group - 1)


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
