from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.card import read_network
from engines.unsplit import unsplit

PARTS, WIDTH = 4, 6
WEIGHTS = Path(__file__).resolve().parents[2] / "models/weights"
IMAGE = np.random.default_rng(1).uniform(-1, 1, (2, 3, 20, 12)).astype(np.float32)


def attention(*, half: bool = True, also: bool = False, one_by_one: bool = True) -> onnx.ModelProto:
    """One split attention, as torch exports it: parts, their mean, weights of it, the weighted parts' sum."""
    rng = np.random.default_rng(0)
    size = 1 if one_by_one else 3
    weights = {
        "split": rng.normal(0, 0.5, (PARTS * WIDTH, 3, 3, 3)),
        "weigh": rng.normal(0, 0.5, (PARTS * WIDTH, WIDTH, 1, 1)),
        "last": rng.normal(0, 0.5, (3, WIDTH, size, size)),
    }
    kind, end = (np.float16, ".fp16") if half else (np.float32, "")
    parts = [f"part{i}" for i in range(PARTS)]
    nodes = [helper.make_node("Cast", [f"{name}.fp16"], [name], to=TensorProto.FLOAT) for name in weights if half]
    nodes += [
        helper.make_node("Conv", ["image", "split"], ["whole"], pads=[1, 1, 1, 1]),
        helper.make_node("Split", ["whole"], parts, axis=1, num_outputs=PARTS, name="cut"),
        helper.make_node("Add", parts[:2], ["sum1"]),
        helper.make_node("Add", ["sum1", parts[2]], ["sum2"]),
        helper.make_node("Add", ["sum2", parts[3]], ["sum3"]),
        helper.make_node("ReduceMean", ["sum3", "plane"], ["mean"], keepdims=1),
        helper.make_node("Conv", ["mean", "weigh"], ["weights"]),
        helper.make_node("Reshape", ["weights", "shape"], ["apart"]),
    ]
    for i, part in enumerate(parts):
        nodes += [
            helper.make_node("Gather", ["apart", f"number{i}"], [f"weight{i}"], axis=1),
            helper.make_node("Mul", [part, f"weight{i}"], [f"weighted{i}"]),
        ]
    nodes += [
        helper.make_node("Add", ["weighted0", "weighted1"], ["all1"]),
        helper.make_node("Add", ["all1", "weighted2"], ["all2"]),
        helper.make_node("Add", ["all2", "weighted3"], ["all3"]),
        helper.make_node("Conv", ["all3", "last"], ["result"], pads=[size // 2] * 4),
    ]
    constants = {
        "plane": np.array([2, 3]), "shape": np.array([0, PARTS, WIDTH, 1, 1]),
        **{f"number{i}": np.array(i) for i in range(PARTS)},
        **{f"{name}{end}": array.astype(kind) for name, array in weights.items()},
    }  # fmt: skip
    value = helper.make_tensor_value_info
    outputs = [value("result", TensorProto.FLOAT, ["n", 3, "h", "w"])]
    outputs += [value("part0", TensorProto.FLOAT, ["n", WIDTH, "h", "w"])] if also else []
    graph = helper.make_graph(
        nodes, "tiny", [value("image", TensorProto.FLOAT, ["n", 3, "h", "w"])], outputs,
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model: onnx.ModelProto, image: np.ndarray = IMAGE) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"image": image})[0]
    return result


def counted(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("half", [True, False], ids=["stored in half", "stored in float"])
@pytest.mark.parametrize("one_by_one", [True, False], ids=["1x1", "3x3"])
def test_split_attention_gives_the_same_with_one_product_in_the_place_of_many(half, one_by_one):
    before = attention(half=half, one_by_one=one_by_one)

    after = unsplit(before)

    onnx.checker.check_model(after)
    assert np.abs(run(after) - run(before)).max() < 1e-5 * np.abs(run(before)).max()
    assert counted(before)["Mul"] == 4 and counted(after)["Mul"] == 1
    shapes = {v.name: [a.dim_value for a in v.type.tensor_type.shape.dim]
              for v in onnx.shape_inference.infer_shapes(after).graph.value_info}  # fmt: skip
    assert all(shapes[name][2:] == [1, 1] for node in after.graph.node if node.op_type in ("Split", "Add")
               for name in node.output)  # fmt: skip


def test_a_convolution_keeps_its_name_and_the_name_of_what_it_is_given():
    """By these its range for 8 bits is found."""

    def convolutions(model: onnx.ModelProto) -> list[tuple[str, str, str]]:
        return [(n.name, n.input[0], n.output[0]) for n in model.graph.node if n.op_type == "Conv"]

    assert convolutions(unsplit(attention())) == convolutions(attention())


def test_what_is_also_needed_elsewhere_stays_as_it_is():
    looked_at = attention(also=True)
    looked_at.graph.node.append(helper.make_node("Identity", ["part1"], ["spare"]))

    assert counted(unsplit(looked_at)) == counted(looked_at)


@pytest.mark.parametrize("axes", [[2], [1, 2, 3]])
def test_a_mean_over_anything_but_the_plane_stays_as_it_is(axes):
    other = attention()
    next(t for t in other.graph.initializer if t.name == "plane").CopyFrom(
        numpy_helper.from_array(np.array(axes), "plane")
    )

    assert counted(unsplit(other)) == counted(other)


def test_weights_that_differ_from_pixel_to_pixel_stay_as_they_are():
    other = attention()
    for node in other.graph.node:
        if node.op_type == "Mul":
            node.input[1] = "whole_sum"
    other.graph.node.insert(6, helper.make_node("Identity", ["part0"], ["whole_sum"]))

    assert counted(unsplit(other)) == counted(other)


@pytest.mark.parametrize("name", ["sisn-small", "sisn-x8"])
def test_every_split_attention_that_ships_is_rewritten_and_stays_exact(name):
    before = read_network(WEIGHTS / f"{name}.onnx")

    after = unsplit(before)

    attentions = counted(before)["Split"]
    assert attentions == counted(after)["Split"] >= 16
    assert counted(before)["Mul"] - counted(after)["Mul"] == 3 * attentions
    assert np.abs(run(after) - run(before)).max() < 1e-4
