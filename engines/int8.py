"""INT8 without calibration data: a network and the ranges of its card in, a quantised graph out.

The graph is the network with a QuantizeLinear and a DequantizeLinear before each convolution; OpenVINO and ONNX Runtime
make 8-bit arithmetic of that. `python -m engines.int8 IN OUT` writes one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, version_converter
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from engines.card import CardError, NetworkCard, read_card, read_network

CONVOLUTIONS = ("Conv", "ConvTranspose")
_LEAST_OPSET = 13  # the first whose DequantizeLinear knows a scale for each channel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", type=Path, help="ONNX whose card has ranges")
    parser.add_argument("out", type=Path)
    parser.add_argument("--reduce-range", action="store_true", help="for a processor without VNNI")
    arguments = parser.parse_args()
    try:
        network = read_network(arguments.network)
        made = quantised(network, read_card(arguments.network), reduce_range=arguments.reduce_range)
    except CardError as exc:
        parser.exit(2, f"{exc}\n")
    onnx.save(made, str(arguments.out))


def quantised(network: onnx.ModelProto, card: NetworkCard, *, reduce_range: bool = False) -> onnx.ModelProto:
    """Return the network with its convolutions in 8 bits, weights with a scale for each channel.

    `reduce_range` keeps weights to 7 bits: processors without VNNI add two products in 16 bits, which may overflow.
    Metadata, inputs and outputs stay. Raises CardError where the card has no ranges, or not those of this network.
    """
    if card.int8 is None:
        raise CardError(f"{card.name} has no INT8 ranges: `python -m models.ranges` measures them")
    prepared = plain(network)
    nodes = [node for node in prepared.graph.node if node.op_type in CONVOLUTIONS and node.name not in card.int8.skip]
    if missing := sorted({node.input[0] for node in nodes} - card.int8.ranges.keys()):
        raise CardError(f"{card.name}: its card has no INT8 range of {', '.join(missing)}: measure them anew")
    ranges = {name: (np.float32(low), np.float32(high)) for name, (low, high) in card.int8.ranges.items()}
    quantiser = QDQQuantizer(
        prepared,
        per_channel=True,
        reduce_range=reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=[node.name for node in nodes],
        nodes_to_exclude=[],
        op_types_to_quantize=CONVOLUTIONS,
        # Quantised before the next convolution, not after this one: a sum of two branches is then rounded once.
        extra_options={"OpTypesToExcludeOutputQuantization": CONVOLUTIONS},
    )
    quantiser.quantize_model()
    quantiser.model.topological_sort()
    made: onnx.ModelProto = quantiser.model.model
    del made.metadata_props[:]  # the quantiser adds its own
    made.metadata_props.extend(network.metadata_props)
    return made


def plain(network: onnx.ModelProto) -> onnx.ModelProto:
    """Return the network as it is quantised: float32 weights without a Cast, every node named, a recent opset."""
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    if next(entry.version for entry in copy.opset_import if not entry.domain) < _LEAST_OPSET:
        copy = version_converter.convert_version(copy, _LEAST_OPSET)
    _fold_casts(copy.graph)
    for node in copy.graph.node:
        node.name = node.name or node.output[0]
    return copy


def _fold_casts(graph: onnx.GraphProto) -> None:
    """Store as float32 the weights that lie in the file as fp16, each with a Cast."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Cast" and node.input[0] in stored]:
        half = stored[node.input[0]]
        array = numpy_helper.to_array(half).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        graph.initializer.remove(half)
        graph.node.remove(node)


if __name__ == "__main__":
    main()
