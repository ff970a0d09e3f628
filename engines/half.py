"""Makes a network's arithmetic fp16 or bf16, as a strongly typed graph: TensorRT 11 computes in the types it is given.

Not by `onnxruntime.transformers.float16`: between two nodes that are kept in fp32 it rounds to fp16, which would spoil
GFRNet's flow, it knows no bf16, and importing it puts its folder, with a package `models` in it, on the path.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.engine import EngineError

HalfPrecision = Literal["fp16", "bf16"]

_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT)


def half(network: onnx.ModelProto, precision: HalfPrecision, keep: Collection[str] = ()) -> onnx.ModelProto:
    """Return the network with arithmetic in `precision`; its inputs and outputs stay float32.

    Nodes named in `keep` (as `node_name` says) stay in fp32, and so does whatever a GridSample's grid is computed
    from: in fp16 a place in an image of 256 px is off by up to a sixteenth of a pixel. The network itself is left as it
    is. Raises EngineError if a name in `keep` is unknown, or for a network with branches or loops.
    """
    network = onnx.shape_inference.infer_shapes(folded(network))
    if unknown := set(keep) - {node_name(node) for node in network.graph.node}:
        raise EngineError(f"no node is named {', '.join(sorted(unknown))}: it cannot be kept in fp32")
    return _Halving(network, precision, set(keep) | _flow(network.graph)).done()


def folded(network: onnx.ModelProto) -> onnx.ModelProto:
    """Return the network with its constants, and its weights that are stored smaller and cast, as plain weights."""
    network = _copy(network)
    graph = network.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.from_array(_constant(node), node.output[0])
        elif (
            node.op_type == "Cast"
            and _is_float_weight(constants.get(node.input[0]))
            and _attribute(node, "to") in _FLOATS
        ):
            array = numpy_helper.to_array(constants[node.input[0]])
            dtype = helper.tensor_dtype_to_np_dtype(_attribute(node, "to"))
            constants[node.output[0]] = numpy_helper.from_array(array.astype(dtype), node.output[0])
        else:
            nodes.append(node)
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    _replace(graph.node, nodes)
    _replace(graph.initializer, [tensor for name, tensor in constants.items() if name in used])
    return network


def node_name(node: onnx.NodeProto) -> str:
    """Return a node's name; one that has none is called by its first output."""
    return node.name or node.output[0]


class _Halving:
    """One pass over the nodes in their order, which casts a tensor where a node wants it in the other type."""

    def __init__(self, network: onnx.ModelProto, precision: HalfPrecision, keep: set[str]) -> None:
        self._network = network
        self._half = _TYPES[precision]
        self._suffix = precision
        self._keep = keep
        graph = network.graph
        values = [*graph.input, *graph.value_info, *graph.output]
        self._float32 = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._float32 |= {name for name, tensor in self._weights.items() if tensor.data_type == TensorProto.FLOAT}
        self._opset = next(entry.version for entry in network.opset_import if entry.domain in ("", "ai.onnx"))
        self._nodes: list[onnx.NodeProto] = []
        self._made: dict[tuple[str, int], str] = {}
        """Names that hold the tensor of a name of the network in a type, as far as there are any yet."""

    def done(self) -> onnx.ModelProto:
        graph = self._network.graph
        for name in (*(value.name for value in graph.input), *self._weights):
            self._made[name, TensorProto.FLOAT] = name
        for node in list(graph.node):
            self._add(node)
        for output in (value.name for value in graph.output if value.name in self._float32):
            if (output, TensorProto.FLOAT) not in self._made:
                self._cast(output, self._half, output, TensorProto.FLOAT)
        used = {name for node in self._nodes for name in node.input} | {value.name for value in graph.output}
        _replace(graph.node, self._nodes)
        _replace(graph.initializer, [tensor for name, tensor in self._weights.items() if name in used])
        del graph.value_info[:]
        return self._network

    def _add(self, node: onnx.NodeProto) -> None:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise EngineError(f"the network branches or loops ({node.op_type}): it cannot be made {self._suffix}")
        inputs, outputs = self._types(node)
        for index, name in enumerate(node.input):
            if name in self._float32:
                node.input[index] = self._as(name, inputs[index])
        for index, name in enumerate(node.output):
            if name in self._float32:
                node.output[index] = name if outputs[index] == TensorProto.FLOAT else f"{name}.{self._suffix}"
                self._made[name, outputs[index]] = node.output[index]
        self._nodes.append(node)

    def _types(self, node: onnx.NodeProto) -> tuple[Sequence[int], Sequence[int]]:
        """Return the type that each input and output has if it is a float: half where the operator allows it."""
        kept = [TensorProto.FLOAT] * len(node.input), [TensorProto.FLOAT] * len(node.output)
        if node_name(node) in self._keep or node.domain not in ("", "ai.onnx"):
            return kept
        schema = onnx.defs.get_schema(node.op_type, self._opset, "")
        inputs = [schema.inputs[min(index, len(schema.inputs) - 1)] for index in range(len(node.input))]
        outputs = [schema.outputs[min(index, len(schema.outputs) - 1)] for index in range(len(node.output))]
        # What only an attribute decides, such as a Cast's result, stays what it is.
        bound = {formal.type_str for formal in inputs}
        # bf16 came late to ONNX: TensorRT has it wherever there is fp16.
        halves = [self._half if "tensor(float16)" in formal.types else TensorProto.FLOAT for formal in inputs]
        results = [
            self._half if formal.type_str in bound and "tensor(float16)" in formal.types else TensorProto.FLOAT
            for formal in outputs
        ]
        return halves, results

    def _as(self, name: str, wanted: int) -> str:
        if (name, wanted) not in self._made:
            if name in self._weights:
                self._halve_weight(name)
            else:
                other = self._half if wanted == TensorProto.FLOAT else TensorProto.FLOAT
                suffix = "fp32" if wanted == TensorProto.FLOAT else self._suffix
                self._cast(name, other, name if self._is_free(name, wanted) else f"{name}.{suffix}", wanted)
        return self._made[name, wanted]

    def _is_free(self, name: str, wanted: int) -> bool:
        """Say whether the network's own name may hold the tensor as float32, as it does in an output."""
        return wanted == TensorProto.FLOAT and (name, TensorProto.FLOAT) not in self._made

    def _cast(self, name: str, given: int, result: str, wanted: int) -> None:
        cast = helper.make_node("Cast", [self._made[name, given]], [result], f"{result}.cast", to=wanted)
        self._nodes.append(cast)
        self._made[name, wanted] = result

    def _halve_weight(self, name: str) -> None:
        array = numpy_helper.to_array(self._weights[name])
        if self._half == TensorProto.FLOAT16:
            array = np.clip(array, -65504, 65504)  # an infinite one would make NaN
        halved = array.astype(helper.tensor_dtype_to_np_dtype(self._half))
        result = f"{name}.{self._suffix}"
        self._weights[result] = numpy_helper.from_array(halved, result)
        self._made[name, self._half] = result


def _flow(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the nodes that sample by a grid, and of all that a grid is computed from."""
    makers = {output: node for node in graph.node for output in node.output}
    samplers = [node for node in graph.node if node.op_type == "GridSample"]
    found = {node_name(node) for node in samplers}
    waiting = [node.input[1] for node in samplers]
    while waiting:
        node = makers.get(waiting.pop())
        if node and node_name(node) not in found:
            found.add(node_name(node))
            waiting += node.input
        elif node and node.op_type == "GridSample":
            waiting += node.input
    return found


def _constant(node: onnx.NodeProto) -> np.ndarray:
    value = helper.get_attribute_value(node.attribute[0])
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    if node.attribute[0].name in ("value_float", "value_floats"):
        return np.array(value, np.float32)
    if node.attribute[0].name in ("value_int", "value_ints"):
        return np.array(value, np.int64)
    raise EngineError(f"the constant {node_name(node)} is neither a tensor nor a number")


def _is_float_weight(tensor: TensorProto | None) -> bool:
    return tensor is not None and tensor.data_type in _FLOATS


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == name)


def _copy(network: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(network)
    return copied


def _replace(field: Any, items: Iterable[Any]) -> None:
    """Put these items in the place of those of a repeated field."""
    kept = list(items)
    del field[:]
    field.extend(kept)
