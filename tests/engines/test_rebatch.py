"""Networks exported for one image run many at once, or are left as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.card import NetworkCard, TensorSpec
from engines.engine import Engine, ModelError
from engines.ort import OnnxEngine
from engines.ov import OpenVinoEngine, openvino_installed
from engines.rebatch import exact, rebatch, rebatched
from engines.store import Model

BACKENDS = [
    pytest.param(OnnxEngine, id="onnxruntime"),
    pytest.param(
        OpenVinoEngine,
        id="openvino",
        marks=pytest.mark.skipif(not openvino_installed(), reason="needs the extra openvino"),
    ),
]
CONVOLUTION = [helper.make_node("Conv", ["image", "weight"], ["maps"], pads=[1, 1, 1, 1])]
Make = Callable[..., Model]


def node(kind: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a network for one image of 8x8: a convolution to two `maps`, then `nodes` to `result`."""

    def make(
        nodes: Sequence[onnx.NodeProto], result: tuple[int | str, ...], *, batch: int | str = 1, **constants: object
    ) -> Model:
        random = np.random.default_rng(0)
        weights = {"weight": random.normal(size=(2, 3, 3, 3)).astype(np.float32)}
        weights |= {name: np.array(value) for name, value in constants.items()}
        graph = helper.make_graph(
            [*CONVOLUTION, *nodes],
            "tiny",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, (batch, 3, 8, 8))],
            [helper.make_tensor_value_info("result", TensorProto.FLOAT, result)],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        )
        network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        path = tmp_path / "tiny.onnx"
        onnx.save(onnx.shape_inference.infer_shapes(network), path)
        card = NetworkCard(
            name="tiny",
            task="embedding",
            inputs=(TensorSpec(name="image", layout="NCHW", shape=(batch, 3, 8, 8)),),
            outputs=(TensorSpec(name="result", layout="", shape=result),),
            license="public domain",
        )
        path.with_suffix(".json").write_text(card.model_dump_json())
        return Model.read(path)

    return make


RESHAPED = [node("Reshape", "maps shape", "flat"), node("MatMul", "flat matrix", "result")]
MATRIX = np.random.default_rng(1).normal(size=(128, 5)).astype(np.float32)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).random((count, 3, 8, 8), np.float32) * 255


def one_by_one(engine: Engine, batch: np.ndarray) -> np.ndarray:
    return np.concatenate([engine.run(image=batch[i : i + 1])["result"] for i in range(len(batch))])


@pytest.mark.parametrize("engine_class", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_rebatched_network_makes_of_many_what_it_makes_of_each(
    make: Make, tmp_path: Path, engine_class: type[OnnxEngine], count: int
) -> None:
    model = make(RESHAPED, (1, 5), shape=[1, -1], matrix=MATRIX)
    batch = images(count)

    free = rebatch(model, tmp_path / "cache")

    assert free is not None
    result = engine_class(free, threads=1).run(image=batch)["result"]
    assert np.allclose(result, one_by_one(OnnxEngine(model, threads=1), batch), rtol=1e-4, atol=1e-2)
    assert len({row.tobytes() for row in result}) == count, "the images make a difference"


def test_a_rebatched_network_is_the_same_model_with_a_free_axis(make: Make, tmp_path: Path) -> None:
    model = make(RESHAPED, (1, 5), shape=[1, -1], matrix=MATRIX)

    free = rebatch(model, tmp_path / "cache")

    assert free is not None
    assert free.sha256 == model.sha256
    assert free.path == tmp_path / "cache" / f"{model.sha256}.onnx"
    assert free.card.inputs[0].shape == ("n", 3, 8, 8)
    assert free.card.outputs[0].shape == ("n", 5)
    assert Model.read(free.path).card == free.card, "the file says so itself"
    assert OnnxEngine(free, threads=1, max_batch=16).max_batch == 16
    assert OnnxEngine(model, threads=1, max_batch=16).max_batch == 1


KEEPS = {
    "its last Reshape to an image": (
        [node("Reshape", "maps shape", "result")], (1, 2, 64), {"shape": [1, 2, -1]},
    ),
    "a Reshape that may have sides of 0": (
        [node("Reshape", "maps shape", "result", allowzero=1)], (1, 128), {"shape": [1, 128]},
    ),
    "a constant that is a node": (
        [node("Constant", "", "shape", value=numpy_helper.from_array(np.array([1, 128]))),
         node("Reshape", "maps shape", "result")], (1, 128), {},
    ),
    "a shape that two Reshapes share, one of weights alone": (
        [node("Reshape", "bias shape", "row"), node("Reshape", "maps shape", "flat"),
         node("Add", "flat row", "result")],
        (1, 128), {"shape": [1, 128], "bias": np.arange(128, dtype=np.float32)},
    ),
    "a shape that is computed": (
        [node("Shape", "maps", "size", start=0, end=1), node("Concat", "size rest", "shape", axis=0),
         node("Reshape", "maps shape", "result")], (1, 128), {"rest": [-1]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEEPS)
def test_a_network_is_rebatched_with(case: str, make: Make, tmp_path: Path) -> None:
    nodes, result, constants = KEEPS[case]
    model = make(nodes, result, **constants)

    free = rebatch(model, tmp_path / "cache")

    assert free is not None
    assert exact(OnnxEngine(model, threads=1), OnnxEngine(free, threads=1))


MIXES = {
    "measures the range of the whole batch": (
        [node("DynamicQuantizeLinear", "maps", "bytes step zero"),
         node("Cast", "bytes", "result", to=TensorProto.FLOAT)],
        (1, 2, 8, 8), {},
    ),
    "takes the mean of the whole batch": (
        [node("ReduceMean", "maps all", "mean", keepdims=1), node("Sub", "maps mean", "result")],
        (1, 2, 8, 8), {"all": [0, 1, 2, 3]},
    ),
    "lays batch and anchors into one axis, as SCRFD is published": (
        [node("Transpose", "maps", "last", perm=[2, 3, 0, 1]), node("Reshape", "last shape", "result")],
        (64, 2), {"shape": [-1, 2]},
    ),
    "lays the batch into the second axis": (
        [node("Transpose", "maps", "last", perm=[1, 0, 2, 3]), node("Reshape", "last shape", "result")],
        (1, 2, 64), {"shape": [1, 2, -1]},
    ),
    "gives the first item alone": ([node("Gather", "maps first", "result")], (1, 2, 8, 8), {"first": [0]}),
    "enlarges to a size with a batch of 1": (
        [node("Resize", "maps none none size", "result")], (1, 2, 16, 16),
        {"none": np.float32([]), "size": [1, 2, 16, 16]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXES)
def test_a_network_is_left_as_it_is_that(case: str, make: Make, tmp_path: Path) -> None:
    nodes, result, constants = MIXES[case]
    model = make(nodes, result, **constants)

    assert rebatch(model, tmp_path / "cache") is None
    assert not list((tmp_path / "cache").glob("**/*.onnx")), "nothing is left that could be taken for it"


def test_a_network_whose_batch_is_free_or_fixed_at_two_is_left_as_it_is(make: Make, tmp_path: Path) -> None:
    for batch in ("n", 2):
        model = make([node("Relu", "maps", "result")], (batch, 2, 8, 8), batch=batch)

        assert rebatch(model, tmp_path / "cache") is None


def test_a_network_with_weights_outside_its_file_is_left_as_it_is(make: Make, tmp_path: Path) -> None:
    model = make([node("Relu", "maps", "result")], (1, 2, 8, 8))
    network = onnx.load(model.path)
    assert rebatched(network, model.card) is not None

    onnx.external_data_helper.convert_model_to_external_data(network, location="weights.bin", size_threshold=0)
    onnx.save(network, tmp_path / "apart.onnx")

    assert rebatched(onnx.load(tmp_path / "apart.onnx", load_external_data=False), model.card) is None


def test_one_engine_shows_whether_it_keeps_its_batch_apart(make: Make) -> None:
    apart = OnnxEngine(make([node("Relu", "maps", "result")], ("n", 2, 8, 8), batch="n"), threads=1)
    assert exact(apart, apart)

    nodes, _, constants = MIXES["takes the mean of the whole batch"]
    mixing = OnnxEngine(make(nodes, ("n", 2, 8, 8), batch="n", **constants), threads=1)
    assert not exact(mixing, mixing)


def test_a_file_is_made_once_and_made_anew_where_it_is_not_what_was_made(make: Make, tmp_path: Path) -> None:
    model = make(RESHAPED, (1, 5), shape=[1, -1], matrix=MATRIX)
    free = rebatch(model, tmp_path / "cache")
    assert free is not None
    made = free.path.read_bytes()
    first = free.path.stat()

    assert rebatch(model, tmp_path / "cache") == free
    assert free.path.stat().st_ino == first.st_ino

    for foreign in (made[: len(made) // 2], made[:-1] + b"\0", b"", model.path.read_bytes()):
        free.path.write_bytes(foreign)
        assert rebatch(model, tmp_path / "cache") == free
        assert free.path.read_bytes() == made
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [free.path.name]


def test_a_folder_that_cannot_be_written_is_told_in_a_line(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ModelError, match=r"cannot be written: File exists$"):
        rebatch(make(RESHAPED, (1, 5), shape=[1, -1], matrix=MATRIX), tmp_path / "file")


@pytest.mark.parametrize("name", ["face-reidentification-retail-0095", "scrfd_500m_kps"])
def test_a_published_network_for_one_image_runs_many(name: str, shared: Path, tmp_path: Path) -> None:
    model = Model.read(shared / "models" / f"{name}.onnx")

    free = rebatch(model, tmp_path)

    assert free is not None
    assert {spec.shape[0] for spec in (*free.card.inputs, *free.card.outputs)} == {"n"}
    again = OnnxEngine(free, threads=1)
    assert exact(again, again)


def test_a_published_network_that_quantises_by_the_whole_batch_is_found_out(shared: Path) -> None:
    engine = OnnxEngine(Model.read(shared / "models" / "offlineid_mobilefacenet_int8.onnx"), threads=1)

    assert not exact(engine, engine)
