from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines import int8
from engines.card import CARD_KEY, CardError, Int8, NetworkCard
from engines.int8 import plain, quantised

IMAGE = np.random.default_rng(1).uniform(-1, 1, (2, 3, 16, 12)).astype(np.float32)
RANGES = {"image": (-1.0, 1.0), "hidden": (0.0, 6.0)}


def network(*, half: bool = True, opset: int = 18) -> onnx.ModelProto:
    """Two convolutions with a ReLU between, nodes without names; weights stored in half with a Cast, as ours are."""
    rng = np.random.default_rng(0)
    weights = {"first": rng.normal(0, 0.3, (8, 3, 3, 3)), "second": rng.normal(0, 0.3, (3, 8, 3, 3))}
    weights["first"] *= np.geomspace(0.01, 1, 8)[:, None, None, None]  # channels of very different size
    kind, end = (np.float16, ".fp16") if half else (np.float32, "")
    casts = [helper.make_node("Cast", [f"{name}.fp16"], [name], to=TensorProto.FLOAT) for name in weights if half]
    nodes = [
        helper.make_node("Conv", ["image", "first"], ["convolved"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["convolved"], ["hidden"]),
        helper.make_node("Conv", ["hidden", "second"], ["result"], pads=[1, 1, 1, 1]),
    ]
    shape = ["n", 3, "h", "w"]
    graph = helper.make_graph(
        [*casts, *nodes],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array.astype(kind), f"{name}{end}") for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def with_int8(card: NetworkCard, **changes: object) -> NetworkCard:
    fields = {"ranges": RANGES, **changes}
    return card.model_copy(update={"int8": Int8.model_validate(fields), "outputs": card.outputs[:1]})


def run(model: onnx.ModelProto) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"image": IMAGE})[0]
    return result


def run_openvino(model: onnx.ModelProto) -> np.ndarray:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
    result: np.ndarray = compiled(IMAGE)["result"]
    return result


def decibels(result: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(wanted**2) / np.mean((result - wanted) ** 2)))


@pytest.mark.parametrize("runs", [run, run_openvino])
@pytest.mark.parametrize("reduce_range", [False, True])
def test_the_quantised_network_gives_nearly_what_the_network_gives(
    card: NetworkCard, runs: Callable[[onnx.ModelProto], np.ndarray], reduce_range: bool
) -> None:
    made = quantised(network(), with_int8(card), reduce_range=reduce_range)

    # less without `reduce_range`: on a processor without VNNI sums of two products overflow
    assert decibels(runs(made), run(network())) > (30 if reduce_range else 20)


def test_its_weights_are_stored_in_8_bits_with_a_scale_for_each_channel(card: NetworkCard) -> None:
    made = quantised(network(), with_int8(card))

    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    assert {name: array.shape for name, array in stored.items() if array.dtype == np.int8 and array.ndim == 4} == {
        "first_quantized": (8, 3, 3, 3),
        "second_quantized": (3, 8, 3, 3),
    }
    assert np.ptp(np.log10(stored["first_scale"])) > 1.5
    onnx.checker.check_model(made)


def test_reduce_range_keeps_weights_to_7_bits(card: NetworkCard) -> None:
    def largest(reduce_range: bool) -> int:
        made = quantised(network(), with_int8(card), reduce_range=reduce_range)
        stored = next(tensor for tensor in made.graph.initializer if tensor.name == "first_quantized")
        return int(np.abs(numpy_helper.to_array(stored).astype(int)).max())

    assert (largest(False), largest(True)) == (127, 64)


def test_what_is_outside_the_range_is_clipped(card: NetworkCard) -> None:
    narrow = quantised(network(), with_int8(card, ranges={**RANGES, "hidden": (0.0, 0.01)}))

    assert np.abs(run(narrow)).max() < 0.3 * np.abs(run(network())).max()


def test_a_convolution_that_the_card_skips_stays_as_it_is_and_needs_no_range(card: NetworkCard) -> None:
    kept = with_int8(card, skip=["result"], ranges={"image": RANGES["image"]})

    made = quantised(network(), kept)

    convolutions = {node.output[0]: node for node in made.graph.node if node.op_type == "Conv"}
    assert convolutions["result"].input[0] == "hidden"
    assert convolutions["convolved"].input[0] != "image"
    assert decibels(run(made), run(network())) > decibels(run(quantised(network(), with_int8(card))), run(network()))


def test_a_network_of_an_old_opset_keeps_its_tensors_and_metadata(card: NetworkCard) -> None:
    old = network(half=False, opset=9)
    old.metadata_props.add(key="streamer.repaired_from", value="abc")

    made = quantised(old, with_int8(card), reduce_range=True)

    assert next(entry.version for entry in made.opset_import if not entry.domain) >= 13
    assert [(entry.key, entry.value) for entry in made.metadata_props] == [("streamer.repaired_from", "abc")]
    assert decibels(run(made), run(old)) > 30


def test_the_network_that_was_given_is_not_changed(card: NetworkCard) -> None:
    given = network()
    before = given.SerializeToString()

    quantised(given, with_int8(card))

    assert given.SerializeToString() == before


def test_folding_the_casts_changes_nothing() -> None:
    assert not [node for node in plain(network()).graph.node if node.op_type == "Cast"]
    assert np.array_equal(run(plain(network())), run(network()))


def test_a_card_without_ranges_is_refused_with_what_to_do(card: NetworkCard) -> None:
    with pytest.raises(CardError, match=r"tiny has no INT8 ranges: `python -m models\.ranges`"):
        quantised(network(), card)


def test_a_card_with_the_ranges_of_another_network_is_refused(card: NetworkCard) -> None:
    with pytest.raises(CardError, match="no INT8 range of hidden"):
        quantised(network(), with_int8(card, ranges={"image": RANGES["image"], "other": (0, 1)}))


def test_the_command_writes_what_the_function_makes_or_says_why_not_in_one_line(
    card: NetworkCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stated, silent, out = (tmp_path / name for name in ("stated.onnx", "silent.onnx", "out.onnx"))
    for path, its_card in ((stated, with_int8(card)), (silent, with_int8(card).model_copy(update={"int8": None}))):
        model = network()
        model.metadata_props.add(key=CARD_KEY, value=its_card.model_dump_json())
        onnx.save(model, path)

    monkeypatch.setattr(sys, "argv", ["int8", str(stated), str(out), "--reduce-range"])
    int8.main()
    assert np.array_equal(run(onnx.load(out)), run(quantised(network(), with_int8(card), reduce_range=True)))

    monkeypatch.setattr(sys, "argv", ["int8", str(silent), str(tmp_path / "none.onnx")])
    with pytest.raises(SystemExit) as ended:
        int8.main()
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert not (tmp_path / "none.onnx").exists()
