"""fp16 and bf16 graphs, run by ONNX Runtime and by ONNX's own reference."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from skimage.data import astronaut
from skimage.transform import resize

from engines.engine import EngineError
from engines.half import folded, half, node_name

WEIGHTS = sorted((Path(__file__).parents[2] / "models/weights").glob("*.onnx"))
HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def face(height: int, width: int) -> np.ndarray:
    """Return the astronaut's face as a restorer takes it: (1, 3, height, width) in [-1, 1]."""
    picture = resize(astronaut()[0:224, 112:336], (height, width), anti_aliasing=True)
    return (picture.transpose(2, 0, 1)[None] * 2 - 1).astype(np.float32)


def faces(network: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return a face for each input of a shipped network, small, but of a size that all of them take."""
    names = [value.name for value in network.graph.input]
    fixed = network.graph.input[0].type.tensor_type.shape.dim[3].dim_value
    side = fixed or (16 if names == ["image"] else 64)  # a guide is halved six times
    return {name: np.ascontiguousarray(face(side, side)[..., :: 1 - 2 * place]) for place, name in enumerate(names)}


def warps(path: Path) -> bool:
    return any(node.op_type == "GridSample" for node in onnx.load(path).graph.node)


def run(network: onnx.ModelProto, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it takes longer than a run
    session = onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True))


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(4 / np.mean((first.astype(np.float64) - second) ** 2)))


def types_of(network: onnx.ModelProto) -> dict[str, int]:
    """Return the type of every tensor, as ONNX infers it; a graph whose types do not fit is an error."""
    inferred = onnx.shape_inference.infer_shapes(network, check_type=True, strict_mode=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    weights = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    return {value.name: value.type.tensor_type.elem_type for value in values} | weights


def in_fp32(network: onnx.ModelProto) -> set[str]:
    """Return the nodes that compute in float32: those that give it, but for casts."""
    types = types_of(network)
    nodes = [node for node in network.graph.node if node.op_type != "Cast"]
    return {node_name(node) for node in nodes if any(types.get(name) == TensorProto.FLOAT for name in node.output)}


def warping(nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    """Make a network that warps a picture by a flow, which it computes from the picture in two steps."""
    rng = np.random.default_rng(0)
    weights = {
        "narrow": rng.normal(0, 0.1, (4, 3, 3, 3)),
        "to_flow": rng.normal(0, 0.1, (2, 4, 1, 1)),
        "last": rng.normal(0, 0.2, (3, 3, 3, 3)),
        "scale": np.array(0.3),
    }
    graph = helper.make_graph(
        nodes
        or [
            helper.make_node("Conv", ["image", "narrow"], ["seen"], "see", pads=[1, 1, 1, 1]),
            helper.make_node("Conv", ["seen", "to_flow"], ["raw"], "flow"),
            helper.make_node("Mul", ["raw", "scale"], ["small"], "calm"),
            helper.make_node("Transpose", ["small"], ["grid"], "turn", perm=[0, 2, 3, 1]),
            helper.make_node("GridSample", ["image", "grid"], ["warped"], "warp", padding_mode="border"),
            helper.make_node("Mul", ["warped", "scale"], ["dim"], "dim"),
            helper.make_node("Conv", ["dim", "last"], ["restored"], "restore", pads=[1, 1, 1, 1]),
        ],
        "warping",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ("n", 3, "h", "w"))],
        [helper.make_tensor_value_info("restored", TensorProto.FLOAT, ("n", 3, "h", "w"))],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("path", [path for path in WEIGHTS if not warps(path)], ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", HALVES)
def test_no_float32_is_left_in_a_shipped_network_but_at_its_edges(path: Path, precision: str) -> None:
    halved = half(onnx.load(path), precision)

    types = Counter(tensor.data_type for tensor in halved.graph.initializer)
    scales = {node.input[2] for node in halved.graph.node if node.op_type == "Resize"}  # float32, says ONNX
    assert types[TensorProto.FLOAT] == len(scales)
    assert types[HALVES[precision]] > 30
    casts = [(list(node.input), list(node.output)) for node in halved.graph.node if node.op_type == "Cast"]
    (given,), (made,) = halved.graph.input, halved.graph.output
    assert casts == [([given.name], [f"{given.name}.{precision}"]), ([f"{made.name}.{precision}"], [made.name])]
    for value in (*halved.graph.input, *halved.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    if precision == "fp16":  # ONNX has no convolution in bf16 before opset 22; TensorRT does
        assert not in_fp32(halved)


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_a_shipped_network_in_fp16_is_near_what_it_was(path: Path) -> None:
    network = onnx.load(path)
    given = faces(network)

    made, exact = (next(iter(run(each, **given).values())) for each in (half(network, "fp16"), network))

    assert made.dtype == np.float32
    if made.ndim == 2:
        made, exact = (each / np.linalg.norm(each) for each in (made, exact))
    assert psnr(made, exact) > 60  # ONNX Runtime has no fp16 on a CPU: it rounds the weights, and computes in fp32


@pytest.mark.parametrize(("precision", "least"), [("fp16", 60), ("bf16", 40)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the reference's sigmoid computes both branches
def test_arithmetic_that_is_really_rounded_is_near_what_it_was(precision: str, least: float) -> None:
    network = onnx.load(next(path for path in WEIGHTS if path.stem == "sgen-small"))
    image = face(16, 16)

    rounded = ReferenceEvaluator(half(network, precision)).run(None, {"image": image})[0]

    assert least < psnr(rounded, run(network, image=image)["restored"]) < 100


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_folding_the_stored_weights_changes_no_result(path: Path) -> None:
    network = onnx.load(path)
    shown = faces(network)

    plain = folded(network)

    stored = {tensor.name for tensor in plain.graph.initializer}
    assert not [node for node in plain.graph.node if node.op_type == "Cast" and node.input[0] in stored]
    assert {tensor.data_type for tensor in plain.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
    # ONNX Runtime packs plain weights, and then adds up in another order
    given, exact = (next(iter(run(each, **shown).values())) for each in (plain, network))
    np.testing.assert_allclose(given, exact, atol=1e-5)


@pytest.mark.parametrize("precision", HALVES)
def test_what_a_flow_is_computed_from_stays_in_fp32(precision: str) -> None:
    halved = half(warping(), precision)

    nodes = {node.name: node for node in halved.graph.node}
    casts = {node.output[0]: node.input[0] for node in halved.graph.node if node.op_type == "Cast"}
    assert {"see", "flow", "calm", "turn", "warp"}.isdisjoint(
        name for name, node in nodes.items() if any(value.endswith(precision) for value in (*node.input, *node.output))
    )
    assert casts == {f"warped.{precision}": "warped", "restored": f"restored.{precision}"}
    assert nodes["calm"].input[1] == "scale" and nodes["dim"].input[1] == f"scale.{precision}"
    if precision == "fp16":
        assert in_fp32(halved) == {"see", "flow", "calm", "turn", "warp"}


def test_a_picture_is_warped_as_in_fp32() -> None:
    image = face(64, 64)
    network, halved = warping(), half(warping(), "fp16")
    for each in (network, halved):
        each.graph.output.append(helper.make_tensor_value_info("warped", TensorProto.FLOAT, None))

    np.testing.assert_array_equal(run(halved, image=image)["warped"], run(network, image=image)["warped"])


def test_named_nodes_stay_in_fp32_and_nothing_is_rounded_between_them() -> None:
    network = onnx.load(next(path for path in WEIGHTS if path.stem == "sgen-small"))
    convolution, *_ = [node for node in network.graph.node if node.op_type == "Conv"]
    after = next(node for node in network.graph.node if convolution.output[0] in node.input)

    halved = half(network, "fp16", keep=[convolution.name, after.name])

    assert in_fp32(halved) == {convolution.name, after.name}
    kept = {node.name: node for node in halved.graph.node}
    assert kept[convolution.name].output[0] in kept[after.name].input


def test_a_name_that_no_node_has_is_an_error() -> None:
    with pytest.raises(EngineError, match="no node is named nose: it cannot be kept in fp32"):
        half(warping(), "fp16", keep=["nose"])


def test_a_node_without_a_name_is_called_by_its_output() -> None:
    network = warping()
    for node in network.graph.node:
        node.name = ""

    assert "restored" in in_fp32(half(network, "fp16", keep=["restored"]))


def test_the_network_that_is_given_stays_as_it_is() -> None:
    network = warping()
    before = network.SerializeToString()

    half(network, "bf16")

    assert network.SerializeToString() == before


def test_an_output_that_is_used_within_the_network_too_is_given_out_in_float32() -> None:
    image = face(16, 16)
    nodes = [
        helper.make_node("Conv", ["image", "last"], ["restored"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["restored"], ["positive"], "after"),
    ]
    network = warping(nodes)
    network.graph.output.append(helper.make_tensor_value_info("positive", TensorProto.FLOAT, None))

    outputs = run(half(network, "fp16"), image=image)

    assert {name: value.dtype for name, value in outputs.items()} == {"restored": np.float32, "positive": np.float32}
    np.testing.assert_allclose(outputs["restored"], run(network, image=image)["restored"], atol=1e-2)
    np.testing.assert_array_equal(outputs["positive"], np.maximum(outputs["restored"], 0))


def test_constants_and_weights_beyond_fp16_become_the_largest_there_is() -> None:
    nodes = [
        helper.make_node("Constant", [], ["limit"], "limit", value_float=1e9),
        helper.make_node("Min", ["image", "limit"], ["restored"], "least"),
    ]

    halved = half(warping(nodes), "fp16")

    (limit,) = halved.graph.initializer
    assert numpy_helper.to_array(limit) == np.float16(65504)
    np.testing.assert_allclose(run(halved, image=face(8, 8))["restored"], face(8, 8), atol=1e-3)


def test_a_cast_from_whole_numbers_is_followed_by_one_to_fp16() -> None:
    nodes = [
        helper.make_node("Shape", ["image"], ["sizes"], "sizes"),
        helper.make_node("Cast", ["sizes"], ["numbers"], "numbers", to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["numbers"], ["side"], "side", keepdims=0),
        helper.make_node("Div", ["image", "side"], ["restored"], "divide"),
    ]

    halved = half(warping(nodes), "fp16")

    assert not in_fp32(halved)
    np.testing.assert_allclose(run(halved, image=face(16, 16))["restored"], face(16, 16) / 16, atol=1e-3)


def test_a_network_with_branches_is_refused() -> None:
    then = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["a"])],
        "then",
        [],
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["restored"], then_branch=then, else_branch=then),
    ]

    with pytest.raises(EngineError, match=r"branches or loops \(If\): it cannot be made fp16"):
        half(warping(nodes), "fp16")
