"""One contract, over every backend that runs on a CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.card import CARD_KEY, NetworkCard, TensorSpec
from engines.engine import Engine, EngineError
from engines.load import load_engine
from engines.ort import OnnxEngine, cuda_offered
from engines.ov import OpenVinoEngine, openvino_installed
from engines.store import Model

needs_openvino = pytest.mark.skipif(not openvino_installed(), reason="needs the extra openvino")
BACKENDS = [
    pytest.param(OnnxEngine, "onnxruntime-cpu", id="onnxruntime"),
    pytest.param(OpenVinoEngine, "openvino-cpu", id="openvino", marks=needs_openvino),
]
MODELS = Path(__file__).parents[2] / "../shared/models"


@pytest.fixture
def model(make_network: Callable[..., Path], card: NetworkCard) -> Model:
    return Model.read(make_network(card=card))


def pictures(n: int, height: int = 20, width: int = 12) -> np.ndarray:
    return np.random.default_rng(n).random((n, 3, height, width), dtype=np.float32)


def expected(model: Model, images: np.ndarray) -> dict[str, np.ndarray]:
    """Compute what the tiny network gives, in plain numpy."""
    weight = onnx.numpy_helper.to_array(onnx.load(model.path).graph.initializer[0])
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    result = np.maximum(np.einsum("nchwij,ocij->nohw", windows, weight), 0)
    return {"result": result, "mean": result.mean((2, 3), keepdims=True)}


@pytest.mark.parametrize(("engine_class", "backend"), BACKENDS)
def test_an_engine_says_what_it_runs_and_how(engine_class: type[OnnxEngine], backend: str, model: Model) -> None:
    engine = engine_class(model, threads=1, max_batch=8)

    assert engine.card is model.card
    assert (engine.sha256, engine.backend, engine.precision, engine.max_batch) == (model.sha256, backend, "fp32", 8)


@pytest.mark.parametrize(("engine_class", "backend"), BACKENDS)
def test_outputs_are_right_at_every_batch_and_size(engine_class: type[OnnxEngine], backend: str, model: Model) -> None:
    engine = engine_class(model, threads=1)

    for images in (pictures(1), pictures(5), pictures(2, 33, 47), pictures(1)):
        outputs = engine.run(image=images)

        assert outputs.keys() == {"result", "mean"}
        for name, value in expected(model, images).items():
            np.testing.assert_allclose(outputs[name], value, atol=1e-4)


@pytest.mark.parametrize(("engine_class", "backend"), BACKENDS)
def test_a_later_run_leaves_earlier_outputs_alone(engine_class: type[OnnxEngine], backend: str, model: Model) -> None:
    engine = engine_class(model, threads=1)

    first = engine.run(image=pictures(2))["result"]
    kept = first.copy()
    engine.run(image=-pictures(2))

    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(("engine_class", "backend"), BACKENDS)
def test_views_are_taken_as_they_look(engine_class: type[OnnxEngine], backend: str, model: Model) -> None:
    engine = engine_class(model, threads=1)
    turned = pictures(2).transpose(0, 1, 3, 2)[:, ::-1]
    turned.flags.writeable = False

    outputs = engine.run(image=turned)

    np.testing.assert_allclose(outputs["result"], expected(model, turned)["result"], atol=1e-4)


@pytest.mark.parametrize(("engine_class", "backend"), BACKENDS)
@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ({}, "takes image, not nothing"),
        ({"picture": pictures(1)}, "takes image, not picture"),
        ({"image": pictures(1), "guide": pictures(1)}, "takes image, not guide, image"),
        ({"image": pictures(1).astype(np.float64)}, "image must be float32, not float64"),
        ({"image": pictures(1)[0]}, "image must have 4 axes"),
        ({"image": np.zeros((1, 4, 8, 8), np.float32)}, "tiny failed in "),
    ],
)
def test_a_wrong_feed_is_refused_in_one_line_and_the_engine_runs_on(
    engine_class: type[OnnxEngine], backend: str, model: Model, inputs: dict[str, np.ndarray], complaint: str
) -> None:
    engine = engine_class(model, threads=1)

    with pytest.raises(EngineError, match=complaint) as raised:
        engine.run(**inputs)

    assert "\n" not in str(raised.value)
    assert engine.run(image=pictures(1))["result"].shape == (1, 3, 20, 12)


@pytest.mark.parametrize(("engine_class", "backend"), BACKENDS)
def test_a_closed_engine_does_not_run(engine_class: type[OnnxEngine], backend: str, model: Model) -> None:
    engine = engine_class(model, threads=1)

    engine.close()
    engine.close()

    with pytest.raises(EngineError, match="tiny: the engine is closed"):
        engine.run(image=pictures(1))


@pytest.mark.parametrize(("engine_class", "backend"), BACKENDS)
@pytest.mark.parametrize("damage", ["text", "truncated", "gone"])
def test_a_file_that_cannot_be_loaded_is_named_in_one_line(
    engine_class: type[OnnxEngine], backend: str, model: Model, damage: str
) -> None:
    content = {"text": b"not a network\n", "truncated": model.path.read_bytes()[:-40], "gone": b""}[damage]
    model.path.write_bytes(content)
    if damage == "gone":
        model.path.unlink()

    with pytest.raises(EngineError, match=r"tiny\.onnx cannot be loaded by ") as raised:
        engine_class(model)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("engine_class", "backend"), BACKENDS)
def test_a_network_of_fixed_batch_says_so(
    engine_class: type[OnnxEngine], backend: str, make_network: Callable[..., Path], card: NetworkCard
) -> None:
    fixed = card.inputs[0].model_copy(update={"shape": (1, 3, 32, 32)})
    path = make_network(card=card.model_copy(update={"inputs": (fixed,)}), shape=(1, 3, 32, 32))

    assert engine_class(Model.read(path), threads=1, max_batch=64).max_batch == 1


@needs_openvino
def test_bf16_is_used_only_where_the_processor_has_it(model: Model) -> None:
    import openvino

    has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    assert OpenVinoEngine(model, precision="auto").precision == ("bf16" if has_bf16 else "fp32")
    if has_bf16:
        assert OpenVinoEngine(model, precision="bf16").precision == "bf16"
    else:
        with pytest.raises(EngineError, match="this processor has no bf16"):
            OpenVinoEngine(model, precision="bf16")


@pytest.mark.skipif(cuda_offered(), reason="this ONNX Runtime has CUDA")
def test_cuda_without_its_build_of_onnx_runtime_says_what_to_install(model: Model) -> None:
    with pytest.raises(EngineError, match="install onnxruntime-gpu"):
        OnnxEngine(model, provider="cuda")


@pytest.mark.skipif(cuda_offered(), reason="CUDA comes first where ONNX Runtime has it")
def test_the_backend_is_openvino_where_it_is_installed_unless_another_is_named(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    if openvino_installed():
        assert load_engine(model).backend == "openvino-cpu"
        assert load_engine(model, backend="openvino").backend == "openvino-cpu"
    assert load_engine(model, backend="onnxruntime").backend == "onnxruntime-cpu"

    monkeypatch.setattr("engines.load.openvino_installed", lambda: False)
    assert load_engine(model).backend == "onnxruntime-cpu"


def test_openvino_by_name_without_the_package_says_what_to_install(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.ov.openvino_installed", lambda: False)

    with pytest.raises(EngineError, match=r"pip install 'streamer\[openvino\]'"):
        load_engine(model, backend="openvino")


@needs_openvino
def test_a_network_that_one_backend_cannot_load_goes_to_the_next_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine: Engine = load_engine(Model.read(_only_for_onnxruntime(tmp_path)))

    assert engine.backend.startswith("onnxruntime")
    assert "cannot be loaded by OpenVINO" in caplog.text
    np.testing.assert_allclose(engine.run(matrix=np.diag(np.float32([2, 4])))["inverse"], np.diag([0.5, 0.25]))


def test_loading_a_network_imports_no_torch_and_no_openvino_unless_it_is_used(model: Model) -> None:
    code = (
        "import sys; from pathlib import Path; from engines.load import load_engine; from engines.store import Model; "
        "load_engine(Model.read(Path(sys.argv[1])), backend='onnxruntime'); "
        "print(sorted({'torch', 'openvino', 'tensorrt', 'models'} & set(sys.modules)))"
    )

    ran = subprocess.run([sys.executable, "-c", code, model.path], capture_output=True, text=True, check=True)

    assert ran.stdout == "[]\n"


@needs_openvino
@pytest.mark.skipif(not MODELS.is_dir(), reason="needs foreign weights in ../shared/models")
@pytest.mark.parametrize("name", ["face-reidentification-retail-0095", "yunet_n_dynamic", "RealESRGAN_General_x4_v3"])
def test_backends_agree_on_real_networks(name: str) -> None:
    model = Model.read(MODELS / f"{name}.onnx")
    spec = model.card.inputs[0]
    shape = [size if isinstance(size, int) else {"n": 2, "h": 32, "w": 64}[size] for size in spec.shape]
    mean, std = (np.array(value, np.float32)[:, None, None] for value in (model.card.mean, model.card.std))
    images = (np.random.default_rng(0).random(shape, dtype=np.float32) * 255 - mean) / std

    ort, ov = (load_engine(model, backend=name, threads=1) for name in ("onnxruntime", "openvino"))
    first, second = ort.run(**{spec.name: images}), ov.run(**{spec.name: images})

    assert first.keys() == second.keys() == {output.name for output in model.card.outputs}
    for output in first:
        np.testing.assert_allclose(first[output], second[output], atol=1e-4)


def _only_for_onnxruntime(folder: Path) -> Path:
    """Write a network with an operator that ONNX Runtime alone has."""
    tensor = TensorSpec(name="matrix", layout="HW", shape=("h", "h"))
    card = NetworkCard(
        name="contributed",
        task="quality",
        inputs=(tensor,),
        outputs=(tensor.model_copy(update={"name": "inverse"}),),
        license="public domain",
    )
    graph = helper.make_graph(
        [helper.make_node("Inverse", ["matrix"], ["inverse"], domain="com.microsoft")],
        "contributed",
        [helper.make_tensor_value_info("matrix", TensorProto.FLOAT, ("h", "h"))],
        [helper.make_tensor_value_info("inverse", TensorProto.FLOAT, ("h", "h"))],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    network = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    network.metadata_props.add(key=CARD_KEY, value=card.model_dump_json())
    onnx.save(network, folder / "contributed.onnx")
    return folder / "contributed.onnx"
