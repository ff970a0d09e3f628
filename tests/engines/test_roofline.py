import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.engine import EngineError
from engines.roofline import Device, Work, count
from engines.store import default_store

FLOAT = 4
"""Bytes of a float32."""


def network(nodes, inputs, outputs, weights):
    """Make a network; inputs and outputs are names, whose shapes are free, weights arrays by name."""
    graph = helper.make_graph(
        nodes,
        "counted by hand",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "c", "h", "w"]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def test_a_convolution_costs_two_for_each_tap_of_each_output():
    conv = helper.make_node("Conv", ["image", "weight"], ["result"], strides=[2, 2], pads=[1, 1, 1, 1])

    work = count(network([conv], ["image"], ["result"], {"weight": zeros(8, 3, 3, 3)}), {"image": (2, 3, 16, 12)})

    moved = FLOAT * (2 * 3 * 16 * 12 + 2 * 8 * 8 * 6 + 8 * 3 * 3 * 3)
    assert work == Work(flops=2 * (2 * 8 * 8 * 6) * (3 * 3 * 3), bytes=moved, layer_bytes=moved)


def test_a_group_sees_only_its_own_channels():
    conv = helper.make_node("Conv", ["image", "weight"], ["result"], group=4)

    work = count(network([conv], ["image"], ["result"], {"weight": zeros(8, 2, 1, 1)}), {"image": (1, 8, 5, 5)})

    assert work.flops == 2 * (8 * 5 * 5) * 2


def test_a_deconvolution_costs_two_for_each_tap_of_each_input():
    up = helper.make_node("ConvTranspose", ["image", "weight"], ["result"], strides=[2, 2], pads=[1, 1, 1, 1])

    work = count(network([up], ["image"], ["result"], {"weight": zeros(6, 5, 4, 4)}), {"image": (1, 6, 10, 7)})

    assert work.flops == 2 * (6 * 10 * 7) * (5 * 4 * 4)
    assert work.bytes == FLOAT * (6 * 10 * 7 + 5 * 20 * 14 + 6 * 5 * 4 * 4)


def test_matrix_products_cost_two_for_each_element_they_sum():
    nodes = [
        helper.make_node("MatMul", ["image", "square"], ["product"]),
        helper.make_node("Flatten", ["product"], ["row"], axis=3),
        helper.make_node("Gemm", ["row", "tall"], ["result"], transA=1),
    ]
    weights = {"square": zeros(4, 6), "tall": zeros(2 * 3 * 5, 7)}

    work = count(network(nodes, ["image"], ["result"], weights), {"image": (2, 3, 5, 4)})

    assert work.flops == 2 * (2 * 3 * 5 * 6) * 4 + 2 * (6 * 7) * (2 * 3 * 5)


def test_other_arithmetic_costs_one_for_each_element_and_moving_them_costs_none():
    nodes = [
        helper.make_node("Relu", ["image"], ["positive"]),
        helper.make_node("Concat", ["positive", "image"], ["both"], axis=1),
        helper.make_node("GlobalAveragePool", ["both"], ["result"]),
    ]

    work = count(network(nodes, ["image"], ["result"], {}), {"image": (1, 3, 4, 4)})

    assert work.flops == 48 + 96
    assert work.bytes == FLOAT * (48 + 6)
    assert work.layer_bytes == FLOAT * ((48 + 48) + (48 + 48 + 96) + (96 + 6))


def test_what_rests_on_weights_alone_is_free_and_a_weight_that_is_cast_counts_as_it_is_used():
    nodes = [
        helper.make_node("Cast", ["weight.fp16"], ["weight"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["image", "weight"], ["result"]),
    ]
    half = {"weight.fp16": zeros(512, 3, 1, 1, dtype=np.float16)}

    work = count(network(nodes, ["image"], ["result"], half), {"image": (1, 3, 2, 2)})

    moved = FLOAT * (3 * 2 * 2 + 512 * 2 * 2 + 512 * 3)
    assert work == Work(flops=2 * (512 * 2 * 2) * 3, bytes=moved, layer_bytes=moved)


def test_a_weight_that_two_layers_share_must_move_once_and_moves_twice_layer_by_layer():
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["between"]),
        helper.make_node("Conv", ["between", "weight"], ["result"]),
    ]

    work = count(network(nodes, ["image"], ["result"], {"weight": zeros(3, 3, 1, 1)}), {"image": (1, 3, 8, 8)})

    assert work.bytes == FLOAT * (2 * 192 + 9)
    assert work.layer_bytes == FLOAT * (4 * 192 + 2 * 9)


def test_shapes_that_are_reckoned_in_the_network_are_followed():
    nodes = [
        helper.make_node("Shape", ["image"], ["height"], start=2, end=3),
        helper.make_node("Div", ["height", "two"], ["half"]),
        helper.make_node("Concat", ["zero", "zero", "half", "two", "minus"], ["shape"], axis=0),
        helper.make_node("Reshape", ["image", "shape"], ["folded"]),
        helper.make_node("Sigmoid", ["folded"], ["result"]),
    ]
    numbers = {name: np.array([value], np.int64) for name, value in {"two": 2, "zero": 0, "minus": -1}.items()}

    work = count(network(nodes, ["image"], ["result"], numbers), {"image": (2, 3, 16, 12)})

    assert work.flops == 2 * 3 * 16 * 12


# Products alone, by PyTorch's FlopCounterMode on the same networks in torch: the rest is a few in a hundred.
@pytest.mark.parametrize(
    ("name", "size", "products"),
    [
        ("sgen-small", (208, 176), 2_236_309_504),
        ("sisn-small", (52, 44), 1_309_160_448),
        ("sisn-x8", (26, 22), 374_887_680),
    ],
)
def test_what_ships_costs_what_pytorch_counts(name, size, products):
    shipped = onnx.load(default_store(offline=True).find(name).path)

    one, eight = (count(shipped, {"image": (batch, 3, *size)}) for batch in (1, 8))

    assert products < one.flops < 1.08 * products
    assert eight.flops == 8 * one.flops
    assert one.bytes < eight.bytes < 8 * one.bytes, "weights move once"


def test_an_input_without_a_shape_is_named():
    relu = helper.make_node("Relu", ["image"], ["result"])

    with pytest.raises(EngineError, match="image"):
        count(network([relu], ["image"], ["result"], {}), {})


@pytest.mark.parametrize(("kind", "domain"), [("Guess", ""), ("Guess", "elsewhere"), ("NonZero", "")])
def test_a_layer_whose_shape_cannot_be_known_is_named(kind, domain):
    nodes = [
        helper.make_node(kind, ["image"], ["found"], domain=domain),
        helper.make_node("Identity", ["found"], ["same"]),
        helper.make_node("Neg", ["same"], ["result"]),
    ]

    with pytest.raises(EngineError, match=r"Guess|found"):
        count(network(nodes, ["image"], ["result"], {}), {"image": (1, 3, 4, 4)})


def test_a_run_takes_as_long_as_the_slower_of_its_operations_and_its_bytes():
    device = Device(peak_flops=1000, bandwidth=100)

    assert device.seconds(Work(flops=2000, bytes=100, layer_bytes=900)) == 2
    assert device.seconds(Work(flops=2000, bytes=500, layer_bytes=900)) == 5


def test_a_processor_is_measured():
    device = Device.measure(threads=1)

    assert math.isfinite(device.peak_flops) and device.peak_flops > device.bandwidth > 0


def test_a_measurement_that_fails_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.executable", str(Path("/bin/false")))

    with pytest.raises(EngineError, match="could not be measured: no reason"):
        Device.measure(threads=1)
