"""What a network costs and what a machine can do: no run is faster than its roofline."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.defs import SchemaError, get_schema
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import InferenceError, infer_node_outputs

from engines.engine import EngineError, one_line

_VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}  # nothing moves
_MOVES = {"Cast", "Concat", "DepthToSpace", "Expand", "Gather", "Pad", "Slice", "SpaceToDepth", "Split", "Tile",
          "Transpose"}  # nothing is reckoned  # fmt: skip
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_SMALL = 1024  # elements; shapes, axes and scales are smaller, and their values decide the shapes that follow

# A try takes some milliseconds, so that one at least falls between two turns of a neighbour.
_TRIES = 20
_SIDE = 512  # of a matrix that one thread multiplies; with more threads all have as much to do
_COPIED = 256 << 20  # bytes; more than a cache holds


@dataclass(frozen=True, slots=True)
class Work:
    """What one run of a network costs."""

    flops: int
    """Floating point operations; a multiply-add is two, and what is no product is one for each element."""
    bytes: int
    """What must move at least: inputs, outputs and weights, once each."""
    layer_bytes: int
    """What a run moves that goes layer by layer: the inputs, outputs and weights of each."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a machine can do, as measured."""

    peak_flops: float
    """Float32 operations a second, of a large matrix product."""
    bandwidth: float
    """Bytes a second, read and written, of a large copy."""

    @classmethod
    def measure(cls, threads: int) -> Device:
        """Measure this machine's processor, in a process of its own: numpy takes its threads when it is loaded.

        Raises EngineError if that process fails.
        """
        limits = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        command = [sys.executable, "-m", "engines.roofline", "--threads", str(threads)]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env={**os.environ, **limits}, capture_output=True, text=True)
        if done.returncode:
            raise EngineError(f"this machine could not be measured: {(done.stderr.splitlines() or ['no reason'])[-1]}")
        return cls(**json.loads(done.stdout))

    def seconds(self, work: Work) -> float:
        """Return how long the work takes at least."""
        return max(work.flops / self.peak_flops, work.bytes / self.bandwidth)


def main() -> None:
    """Measure this process's threads; `Device.measure` runs it with numpy's threads set."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    threads = parser.parse_args().threads
    device = Device(_peak_flops(threads), _bandwidth(threads))
    sys.stdout.write(f"{json.dumps(asdict(device))}\n")


def count(network: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> Work:
    """Return what one run costs on inputs of these shapes, by name.

    What does not depend on the inputs' values is reckoned once, when a network is loaded, and costs nothing here: fp16
    weights that are cast count as float32. Raises EngineError if an input's shape is missing, or a shape cannot be
    followed through the network.
    """
    tensors = _Tensors(network, shapes)
    flops = layer_bytes = 0
    weights: set[str] = set()
    for node in network.graph.node:
        tensors.follow(node)
        if tensors.is_constant(node):
            continue
        weights |= {name for name in node.input if name in tensors.constants}
        if node.op_type not in _VIEWS:
            flops += _flops(node, tensors)
            layer_bytes += sum(tensors.size(name) for name in (*node.input, *node.output) if name)
    ends = [*tensors.inputs, *(output.name for output in network.graph.output)]
    return Work(flops, sum(tensors.size(name) for name in {*ends, *weights}), layer_bytes)


class _Tensors:
    """The tensors of a network as far as it has been followed."""

    def __init__(self, network: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._opsets = list(network.opset_import)
        self._versions = {opset.domain: opset.version for opset in self._opsets}
        self._ir_version = network.ir_version
        self._types: dict[str, TypeProto] = {}
        self._values: dict[str, np.ndarray] = {}
        self.constants: set[str] = set()
        for tensor in network.graph.initializer:
            self._types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            self.constants.add(tensor.name)
            if math.prod(tensor.dims) <= _SMALL:
                self._values[tensor.name] = numpy_helper.to_array(tensor)
        self.inputs = [each.name for each in network.graph.input if each.name not in self._types]
        if missing := [name for name in self.inputs if name not in shapes]:
            raise EngineError(f"the shape of the input {missing[0]} is missing")
        for each in network.graph.input:
            if each.name in self.inputs:
                elements = each.type.tensor_type.elem_type
                self._types[each.name] = helper.make_tensor_type_proto(elements, shapes[each.name])

    def follow(self, node: NodeProto) -> None:
        """Learn the shapes of the node's outputs, and their values where later shapes may rest on them."""
        names = [name for name in node.input if name]
        try:
            types = infer_node_outputs(
                get_schema(node.op_type, self._versions[node.domain], node.domain),
                node,
                {name: self._types[name] for name in names},
                {name: numpy_helper.from_array(self._values[name]) for name in names if name in self._values},
                opset_imports=self._opsets,
                ir_version=self._ir_version,
            )
        except (InferenceError, SchemaError, KeyError) as exc:
            raise EngineError(f"{node.op_type} {node.name} cannot be followed: {one_line(exc)}") from exc
        self._types.update(types)
        if node.op_type == "Shape":
            start, end = (_attribute(node, name) for name in ("start", "end"))
            self._values[node.output[0]] = np.array(self.shape(node.input[0])[start:end], np.int64)
        elif all(name in self._values for name in names):
            results: Any = ReferenceEvaluator(node).run(None, {name: self._values[name] for name in names})
            self._values.update(zip(node.output, results, strict=True))
        if self.is_constant(node):
            self.constants.update(node.output)

    def is_constant(self, node: NodeProto) -> bool:
        """Say whether the node's outputs rest on shapes and weights alone."""
        return node.op_type == "Shape" or all(name in self.constants for name in node.input if name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises EngineError if it could not be found."""
        found = self._types.get(name, TypeProto()).tensor_type
        if not found.HasField("shape") or not all(axis.HasField("dim_value") for axis in found.shape.dim):
            raise EngineError(f"the shape of {name} cannot be found")
        return tuple(axis.dim_value for axis in found.shape.dim)

    def elements(self, name: str) -> int:
        """Return how many there are in a tensor."""
        return math.prod(self.shape(name))

    def size(self, name: str) -> int:
        """Return a tensor's size in bytes."""
        return self.elements(name) * helper.tensor_dtype_to_np_dtype(self._types[name].tensor_type.elem_type).itemsize

    def is_float(self, name: str) -> bool:
        return self._types[name].tensor_type.elem_type in _FLOATS


def _flops(node: NodeProto, tensors: _Tensors) -> int:
    first, result = node.input[0], node.output[0]
    if node.op_type == "Conv":
        return 2 * tensors.elements(result) * math.prod(tensors.shape(node.input[1])[1:])
    if node.op_type == "ConvTranspose":
        return 2 * tensors.elements(first) * math.prod(tensors.shape(node.input[1])[1:])
    if node.op_type in ("MatMul", "Gemm"):
        axis = 0 if _attribute(node, "transA") else -1
        return 2 * tensors.elements(result) * tensors.shape(first)[axis]
    if node.op_type in _MOVES or not tensors.is_float(result):
        return 0
    return max(tensors.elements(name) for name in (*node.input, *node.output) if name)


def _attribute(node: NodeProto, name: str) -> int | None:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), None)


def _peak_flops(threads: int) -> float:
    side = _SIDE * math.ceil(math.sqrt(threads))
    square = np.ones((side, side), np.float32)
    return 2 * side**3 / min(_seconds(lambda: square @ square) for _ in range(_TRIES))


def _bandwidth(threads: int) -> float:
    source, target = np.full(_COPIED, 1, np.uint8), np.full(_COPIED, 0, np.uint8)
    parts = max(1, _TRIES // threads)
    taken = []
    with ThreadPoolExecutor(threads) as pool:
        for pair in 3 * list(zip(np.array_split(target, parts), np.array_split(source, parts), strict=True)):
            shares = [np.array_split(each, threads) for each in pair]
            taken.append(_seconds(lambda shares=shares: list(pool.map(np.copyto, *shares))))  # type: ignore[misc]
    return 2 * _COPIED / parts / min(taken)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
