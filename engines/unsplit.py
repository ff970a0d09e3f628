"""Takes a split feature together again where what follows is linear: the same result by less traffic in memory.

Split attention cuts a feature into parts, sums them for their mean, weighs each and sums them once more for a
convolution. The mean of a sum is the sum of the means, and a convolution of a sum is one convolution of all parts with
its weights repeated: so nothing large has to be split or summed. OpenVINO spends half of `sisn-small`'s time in INT8 on
just that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper, shape_inference


def unsplit(network: onnx.ModelProto) -> onnx.ModelProto:
    """Return the network with every such place rewritten; names of convolutions and of their inputs and outputs stay.

    Results differ by the order of sums alone. What is not quite of this shape stays as it is.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    if not any(node.op_type == "Split" for node in copy.graph.node):
        return copy
    graph = _Graph(copy)
    for node in [node for node in copy.graph.node if node.op_type == "Split"]:
        _rewrite(graph, node)
    return copy


class _Graph:
    """A graph, and who is given what."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        stored = {tensor.name: tensor for tensor in self.graph.initializer}
        cast = {
            n.output[0]: stored[n.input[0]] for n in self.graph.node if n.op_type == "Cast" and n.input[0] in stored
        }
        self.constants = stored | cast
        """Weights that are stored in half, each with a Cast, count as constants too."""
        self.outputs = {value.name for value in self.graph.output}
        inferred = shape_inference.infer_shapes(model).graph
        self.shapes = {
            value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in (*inferred.value_info, *inferred.input)
        }

    def takers(self, name: str) -> list[NodeProto]:
        return [node for node in self.graph.node if name in node.input]

    def taker(self, name: str, operator: str) -> NodeProto | None:
        """Return who alone is given this, if it is such an operator."""
        takers = self.takers(name)
        alone = len(takers) == 1 and takers[0].op_type == operator and name not in self.outputs
        return takers[0] if alone else None

    def total(self, parts: Sequence[str]) -> tuple[str, list[NodeProto]] | None:
        """Return the sum of exactly these, and the additions that make it."""
        left, additions = list(parts), list[NodeProto]()
        while len(left) > 1:
            found = next((n for n in self.graph.node if n.op_type == "Add" and set(n.input) <= set(left)), None)
            if found is None or found.input[0] == found.input[1]:
                return None
            left = [name for name in left if name not in found.input] + [found.output[0]]
            additions.append(found)
            if len(left) > 1 and self.taker(found.output[0], "Add") is None:
                return None
        return left[0], additions


def _rewrite(graph: _Graph, split: NodeProto) -> None:
    """Rewrite what is between a Split along the channels, the mean of its parts and the convolution of their weighted
    sum."""
    whole, parts = split.input[0], list(split.output)
    channels = graph.shapes.get(whole, [0, 0])
    if len(channels) != 4 or channels[1] % len(parts) or _attribute(split, "axis") != 1 or len(split.input) > 1:
        return
    weighing = [[node for node in graph.takers(part) if node.op_type == "Mul"] for part in parts]
    if any(len(graph.takers(part)) != 2 or len(muls) != 1 for part, muls in zip(parts, weighing, strict=True)):
        return
    muls = [found[0] for found in weighing]
    factors = [next((name for name in mul.input if name != part), "") for mul, part in zip(muls, parts, strict=True)]
    width = channels[1] // len(parts)
    if any(graph.shapes.get(factor, [])[1:] != [width, 1, 1] for factor in factors):
        return
    plain, weighted = graph.total(parts), graph.total([mul.output[0] for mul in muls])
    if plain is None or weighted is None:
        return
    mean, convolution = graph.taker(plain[0], "ReduceMean"), graph.taker(weighted[0], "Conv")
    if mean is None or convolution is None or not _of_the_plane(graph, mean):
        return
    kernel = graph.constants.get(convolution.input[1])
    if kernel is None or kernel.dims[1] != width:
        return

    nodes, name = graph.graph.node, split.name or parts[0]
    means = f"{name}.means"
    plain[1][-1].output[0] = mean.output[0]
    split.input[0] = means
    mean.input[0], mean.output[0] = whole, means
    repeated = numpy_helper.to_array(kernel)
    repeated = np.tile(repeated.astype(np.float32), (1, len(parts)) + (1,) * (repeated.ndim - 2))
    convolution.input[1] = f"{convolution.input[1]}.repeated"
    graph.graph.initializer.append(numpy_helper.from_array(repeated, convolution.input[1]))
    joined = [
        helper.make_node("Concat", factors, [f"{name}.factors"], name=f"{name}.factors", axis=1),
        helper.make_node("Mul", [whole, f"{name}.factors"], [weighted[0]], name=f"{name}.weighted"),
    ]
    for node in (mean, *muls, *weighted[1]):
        nodes.remove(node)
    nodes.insert(list(nodes).index(split), mean)
    place = list(nodes).index(convolution)
    for node in reversed(joined):
        nodes.insert(place, node)
    del graph.graph.value_info[:]


def _of_the_plane(graph: _Graph, mean: NodeProto) -> bool:
    """Return whether a mean is over height and width, and keeps them as axes of 1."""
    if len(mean.input) > 1:
        constant = graph.constants.get(mean.input[1])
        axes = None if constant is None else numpy_helper.to_array(constant).tolist()
    else:
        axes = _attribute(mean, "axes")
    return (
        axes is not None and sorted(axis % 4 for axis in axes) == [2, 3] and _attribute(mean, "keepdims") in (1, None)
    )


def _attribute(node: NodeProto, name: str) -> object:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), None)
