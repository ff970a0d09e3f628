"""TensorRT without a GPU: RTX builds for other machines; what runs on a GPU is checked by its names alone."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines import trt as source
from engines.card import CARD_KEY, NetworkCard, TensorSpec
from engines.engine import EngineError
from engines.ov import openvino_installed
from engines.plan import Bucket
from engines.store import Model
from engines.trt import TensorRtCompiler, gpu_found, padded_batch

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install 'streamer[rtx]'"
)
needs_no_gpu = pytest.mark.skipif(gpu_found(), reason="there is a GPU here: tests/gpu/run checks what it does")
ROOT = Path(__file__).parents[2]
WEIGHTS = sorted((ROOT / "models/weights").glob("*.onnx"))
CAPABILITIES = ("8.6", "8.9")
BUCKETS = {"image": ((1, 3, 16, 16), (2, 3, 32, 32), (4, 3, 32, 32))}

FULL = "tensorrt_bindings"
LEAN = "tensorrt_lean_bindings"
WHEELS = {FULL: "tensorrt-cu13-bindings", LEAN: "tensorrt-lean-cu13-bindings"}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvinfer_lean")
EXPORTED = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins", "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion",
)  # fmt: skip

# What a variable of trt.py is in the bindings, and what only some of them have.
CLASSES = {
    "builder": "Builder", "config": "IBuilderConfig", "parser": "OnnxParser", "error": "ParserError",
    "profile": "IOptimizationProfile", "runtime": "Runtime", "engine": "ICudaEngine", "self._engine": "ICudaEngine",
    "settings": "IRuntimeConfig", "context": "IExecutionContext", "self._context": "IExecutionContext",
}  # fmt: skip
MODULE_VARIABLES = {"trt", "self._trt"}
BUILDING = {"Builder", "IBuilderConfig", "OnnxParser", "ParserError", "IOptimizationProfile"}
BUILDING_NAMES = {*BUILDING, "BuilderFlag", "MemoryPoolType", "ComputeCapability", "IProgressMonitor"}
RTX_ALONE = {
    ("", "ComputeCapability"), ("", "CudaGraphStrategy"), ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"), ("IRuntimeConfig", "set_runtime_cache"),
    ("IRuntimeConfig", "create_runtime_cache"), ("IRuntimeConfig", "cuda_graph_strategy"),
}  # fmt: skip


def used_names() -> dict[str, set[str]]:
    """Return the names that trt.py takes from the bindings, by class; "" for the module, "cuda" for cuda-python."""
    used = defaultdict(set)
    for node in ast.walk(ast.parse(Path(source.__file__).read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        if owner in MODULE_VARIABLES:
            used[""].add(node.attr)
        elif owner in CLASSES:
            used[CLASSES[owner]].add(node.attr)
        elif owner.rpartition(".")[0] in MODULE_VARIABLES:  # a member of an enumeration
            used[owner.rpartition(".")[2]].add(node.attr)
        elif owner in ("cuda", "_cuda()"):
            used["cuda"].add(node.attr)
    return used


def names_for(module: str) -> dict[str, list[str]]:
    """Return what of these the bindings must have: RTX has all, full TensorRT what is not RTX's, lean what runs."""
    wanted = {}
    for owner, names in used_names().items():
        if owner == "cuda" or (module == LEAN and owner in BUILDING_NAMES):
            continue
        if module != "tensorrt_rtx" and owner in ("CudaGraphStrategy", "ComputeCapability"):
            continue
        kept = {name for name in names if module == "tensorrt_rtx" or (owner, name) not in RTX_ALONE}
        wanted[owner] = sorted(kept - BUILDING_NAMES if module == LEAN and not owner else kept)
    return wanted


def missing(module: str, folder: Path, **environment: str) -> str:
    (folder / "names.json").write_text(json.dumps(names_for(module)))
    command = [sys.executable, str(Path(__file__).with_name("trt_names.py")), module, str(folder / "names.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def real_bindings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bindings of TensorRT 11, full and lean, beside libraries that are empty but for the names they ask for."""
    if not (compiler := shutil.which("gcc")):
        pytest.skip("needs gcc, for the libraries that TensorRT's bindings are linked to")
    folder = tmp_path_factory.mktemp("tensorrt11")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    wishes = [f"{package}>=11.4,<12" for package in WHEELS.values()]
    if subprocess.run([*fetch, *wishes], capture_output=True, timeout=120).returncode:
        pytest.skip("needs the package index, for TensorRT's bindings")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(folder)
    (folder / "empty.c").write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in EXPORTED))
    for name in LIBRARIES:
        library = f"lib{name}.so.11"
        linked = [compiler, "-shared", "-fPIC", "empty.c", "-o", library, f"-Wl,-soname,{library}"]
        subprocess.run(linked, cwd=folder, check=True)
    return folder


def shipped(name: str) -> Model:
    return Model.read(ROOT / f"models/weights/{name}.onnx")


def rtx(**options: object) -> TensorRtCompiler:
    return TensorRtCompiler("tensorrt-rtx", capabilities=CAPABILITIES, **options)


def refused(action: Callable[[], object], match: str) -> None:
    """Check that an action is refused in one line."""
    with pytest.raises(EngineError, match=match) as raised:
        action()
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


# Building


@needs_rtx
@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_a_shipped_network_builds_in_fp16_for_gpus_that_are_not_here(path: Path) -> None:
    model = Model.read(path)
    fixed = model.card.inputs[0].shape[3]  # an embedder's
    side = fixed if isinstance(fixed, int) else model.card.result_size
    shapes = tuple((n, 3, side, side) for n in (1, 2, 4)) if side else BUCKETS["image"]
    bucket = Bucket({spec.name: shapes for spec in model.card.inputs})

    plan = rtx(level=0).build(model, "fp16", [bucket], threads=1)

    assert len(plan) > path.stat().st_size / 2


@needs_rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_network_that_warps_its_second_input_builds_with_a_profile_of_both(
    tmp_path: Path, card: NetworkCard, precision: str
) -> None:
    shape = ("n", 3, 16, 16)
    guided = card.model_copy(update={
        "task": "guided-restoration", "result_size": 16,
        "inputs": tuple(TensorSpec(name=name, layout="NCHW", shape=shape) for name in ("image", "guide")),
        "outputs": (TensorSpec(name="restored", layout="NCHW", shape=shape),),
    })  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["flow"], pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["flow"], ["grid"], perm=[0, 2, 3, 1]),
        helper.make_node("GridSample", ["guide", "grid"], ["warped"], padding_mode="border", align_corners=1),
        helper.make_node("Add", ["image", "warped"], ["restored"]),
    ]
    graph = helper.make_graph(
        nodes, "guided",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("image", "guide")],
        [helper.make_tensor_value_info("restored", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.ones((2, 3, 3, 3), np.float32), "weight")],
    )  # fmt: skip
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    network.metadata_props.add(key=CARD_KEY, value=guided.model_dump_json())
    onnx.save(network, tmp_path / "guided.onnx")
    both = Bucket(dict.fromkeys(("image", "guide"), ((1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16))))

    assert rtx(level=0).build(Model.read(tmp_path / "guided.onnx"), precision, [both], threads=1)


@needs_rtx
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_sgen_builds_in_every_other_precision_with_a_profile_for_each_size(precision: str) -> None:
    larger = {"image": ((1, 3, 48, 48), (2, 3, 64, 64), (4, 3, 64, 64))}
    model = shipped("sgen-small")
    assert precision in rtx().precisions(model)

    assert rtx(level=0).build(model, precision, [Bucket(BUCKETS), Bucket(larger)], threads=1)


@needs_rtx
def test_half_the_bits_make_half_the_plan(make_network: Callable[..., Path], card: NetworkCard) -> None:
    sizes = {p: len(rtx().build(shipped("sgen-small"), p, [Bucket(BUCKETS)], threads=1)) for p in ("fp16", "fp32")}

    assert sizes["fp16"] < 0.6 * sizes["fp32"]


@needs_rtx
def test_building_tells_how_far_it_is(make_network: Callable[..., Path], card: NetworkCard) -> None:
    told: list[tuple[str, float]] = []
    model = Model.read(make_network(card=card))

    rtx(progress=lambda phase, share: told.append((phase, share))).build(model, "fp16", [Bucket(BUCKETS)], threads=1)

    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[0] == 0 and 0.5 < shares[-1] <= 1
    assert len({phase for phase, _ in told}) > 3


@needs_rtx
@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            ((8, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32)),
            "takes no profile of image 8×3×32×32 to 4×3×32×32: .*MIN<=OPT",
        ),
        (((1, 3, 32), (2, 3, 32), (4, 3, 32)), "cannot be built .* has 4 dimensions but profile 0 has 3"),
        (((1, 4, 32, 32), (2, 4, 32, 32), (4, 4, 32, 32)), "cannot be built .* axis 1, profile has min=4"),
    ],
)
def test_a_wrong_profile_is_named_with_what_is_wrong(
    make_network: Callable[..., Path], card: NetworkCard, sizes: tuple[tuple[int, ...], ...], said: str
) -> None:
    model = Model.read(make_network(card=card))

    refused(lambda: rtx().build(model, "fp16", [Bucket({"image": sizes})], threads=1), f"^tiny.*{said}")


@needs_rtx
def test_sizes_that_a_network_cannot_have_are_refused() -> None:
    odd = Bucket({"image": ((1, 3, 60, 60), (1, 3, 60, 60), (1, 3, 60, 60))})

    refused(lambda: rtx().build(shipped("sgen-small"), "fp16", [odd], threads=1), "1×3×60×60.*must be equal for concat")


@needs_rtx
def test_no_profile_at_all_is_refused(make_network: Callable[..., Path], card: NetworkCard) -> None:
    model = Model.read(make_network(card=card))

    refused(lambda: rtx().build(model, "fp16", [], threads=1), "for no sizes: .*no optimization profile")


@needs_rtx
def test_a_graph_of_mixed_types_is_refused_by_the_parser(make_network: Callable[..., Path], card: NetworkCard) -> None:
    path = make_network(card=card)
    network = onnx.load(path)
    weight = network.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    onnx.save(network, path)

    model = Model.read(path)

    refused(
        lambda: rtx().build(model, "fp32", [Bucket(BUCKETS)], threads=1), "^tiny in fp32 cannot be .* by TensorRT: "
    )


@needs_rtx
def test_an_operator_that_tensorrt_does_not_have_is_named(make_network: Callable[..., Path], card: NetworkCard) -> None:
    path = make_network(card=card)
    network = onnx.load(path)
    network.graph.node[1].op_type, network.graph.node[1].domain = "Unheard", "ours"
    network.opset_import.append(helper.make_opsetid("ours", 1))
    onnx.save(network, path)

    refused(lambda: rtx().build(Model.read(path), "fp32", [Bucket(BUCKETS)], threads=1), "cannot be read.*Unheard")


@needs_rtx
def test_a_gpu_that_rtx_does_not_know_and_a_precision_that_there_is_not_are_refused() -> None:
    model, bucket = shipped("sgen-small"), Bucket(BUCKETS)

    hopper = TensorRtCompiler("tensorrt-rtx", capabilities=["9.0"])
    refused(lambda: hopper.build(model, "fp16", [bucket], threads=1), "compute capability 9.0")
    refused(lambda: rtx().build(model, "int8", [bucket], threads=1), "fp16, bf16 or fp32, not in int8")
    refused(lambda: rtx().build(model, "fp16", [bucket], threads=1, keep=frozenset({"nose"})), "no node is named nose")


@needs_rtx
def test_a_plan_for_other_gpus_depends_on_them_and_on_the_version() -> None:
    import tensorrt_rtx

    facts = rtx().facts()

    assert facts["tensorrt"] == tensorrt_rtx.__version__
    assert facts["capability"] == "8.6,8.9"
    assert facts != rtx(level=1).facts() != rtx(workspace_mb=64).facts()


# Without a GPU, without TensorRT


@needs_rtx
@needs_no_gpu
@pytest.mark.parametrize("plan", [b"", b"not a plan", None], ids=["empty", "text", "good"])
def test_without_a_gpu_no_plan_is_loaded_whatever_it_is(
    make_network: Callable[..., Path], card: NetworkCard, plan: bytes | None
) -> None:
    model = Model.read(make_network(card=card))
    buckets = [Bucket(BUCKETS)]
    plan = rtx().build(model, "fp16", buckets, threads=1) if plan is None else plan

    refused(lambda: rtx().load(plan, model, "fp16", buckets, threads=1, max_batch=4), "finds no NVIDIA GPU")


@needs_rtx
@needs_no_gpu
def test_building_for_this_machine_wants_its_gpu() -> None:
    here = TensorRtCompiler("tensorrt-rtx")

    refused(here.facts, "finds no NVIDIA GPU")
    refused(lambda: here.build(shipped("sgen-small"), "fp16", [Bucket(BUCKETS)], threads=1), "finds no NVIDIA GPU")


@needs_no_gpu
def test_full_tensorrt_is_not_touched_without_a_gpu() -> None:
    full = TensorRtCompiler("tensorrt")

    refused(full.facts, "finds no NVIDIA GPU")
    refused(lambda: full.build(shipped("sgen-small"), "fp16", [Bucket(BUCKETS)], threads=1), "finds no NVIDIA GPU")


def test_the_lean_runtime_says_where_plans_are_made() -> None:
    lean = TensorRtCompiler("tensorrt-lean")

    refused(
        lambda: lean.build(shipped("sgen-small"), "fp16", [Bucket(BUCKETS)], threads=1),
        "builds no plans: .* full TensorRT 11 .* streamer engines compile --portable",
    )


def test_what_does_not_go_together_is_refused_at_once() -> None:
    refused(lambda: TensorRtCompiler("tensorrt", capabilities=["8.6"]), "only TensorRT-RTX builds for GPUs of other")
    refused(lambda: TensorRtCompiler("tensorrt-rtx", portable=True), "portable ones with full TensorRT")


def test_without_tensorrt_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.trt.tensorrt_installed", lambda: None)

    refused(TensorRtCompiler, r"pip install 'streamer\[gpu\]'")


def test_looking_for_tensorrt_and_a_gpu_imports_neither() -> None:
    code = (
        "import sys; from engines.trt import *; tensorrt_installed(); gpu_found(); "
        "print([name for name in sys.modules if name.startswith(('tensorrt', 'cuda'))])"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("n", "least", "most", "batch"), [(1, 1, 64, 1), (3, 1, 64, 4), (33, 1, 64, 64), (33, 1, 48, 48), (1, 4, 8, 4)]
)
def test_a_batch_is_padded_to_a_power_of_two_within_the_plan(n: int, least: int, most: int, batch: int) -> None:
    assert padded_batch(n, least, most) == batch


# Names of what is not here


def test_the_names_that_are_looked_for_are_those_that_the_code_uses() -> None:
    used = used_names()

    assert {"execute_async_v3", "set_tensor_address", "set_input_shape"} <= used["IExecutionContext"]
    assert {"deserialize_cuda_engine", "engine_host_code_allowed"} <= used["Runtime"]
    assert {"Builder", "Runtime", "nptype", "ILogger", "IProgressMonitor"} <= used[""]
    assert {"VERSION_COMPATIBLE", "TF32"} == used["BuilderFlag"]
    assert {"cudaMalloc", "cudaMemcpyAsync", "cudaGraphLaunch", "cudaStreamBeginCapture"} <= used["cuda"]
    assert {(owner, name) for owner, names in used.items() for name in names} >= RTX_ALONE


@needs_rtx
def test_every_name_is_in_tensorrt_rtx(tmp_path: Path) -> None:
    assert missing("tensorrt_rtx", tmp_path) == ""


@pytest.mark.parametrize("module", WHEELS)
def test_every_name_is_in_the_real_bindings_of_tensorrt_11(real_bindings: Path, tmp_path: Path, module: str) -> None:
    beside = {"LD_LIBRARY_PATH": str(real_bindings), "PYTHONPATH": str(real_bindings)}

    assert missing(module, tmp_path, **beside) == ""


def test_a_name_that_is_not_there_would_be_found(real_bindings: Path, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps({"Runtime": ["deserialize_cuda_engine", "run"], "": ["ILoger"]}))
    command = [sys.executable, str(Path(__file__).with_name("trt_names.py")), LEAN, str(tmp_path / "names.json")]
    beside = os.environ | {"LD_LIBRARY_PATH": str(real_bindings), "PYTHONPATH": str(real_bindings)}

    done = subprocess.run(command, capture_output=True, text=True, check=True, env=beside)

    assert done.stdout.split() == ["Runtime.run", ".ILoger"]


def test_every_name_is_in_cuda_python_and_errors_have_words() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python: pip install 'streamer[rtx]'")

    assert not {name for name in used_names()["cuda"] if not hasattr(runtime, name)}
    assert runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal is not None
    assert {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"} <= set(runtime.cudaMemcpyKind.__members__)


@needs_no_gpu
def test_what_cuda_refuses_is_told_in_its_own_words() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python: pip install 'streamer[rtx]'")

    refused(lambda: source._call(cuda.cudaMalloc, 16), "^CUDA: cudaMalloc failed: .*driver")
    refused(lambda: source._call(cuda.cudaStreamCreateWithFlags, cuda.cudaStreamNonBlocking), "cudaStreamCreate")


def test_a_buffer_is_seen_as_the_array_that_lies_in_it() -> None:
    memory = np.arange(24, dtype=np.float32)
    buffer = source._Buffer(0, memory.ctypes.data, memory.dtype)

    seen = buffer.view((2, 3, 2))
    seen[1] = 7

    np.testing.assert_array_equal(memory, [*range(6), *[7.0] * 6, *range(12, 24)])
    assert ctypes.sizeof(ctypes.c_uint8) * seen.nbytes == 48


# SGEN's deconvolutions


def deconvolved(images: np.ndarray, weight: np.ndarray, stride: int, pad: int, output_padding: int) -> np.ndarray:
    """Compute a deconvolution by hand: each pixel adds its kernel to the result, lengthened, then cut at `pad`."""
    n, _, height, width = images.shape
    _, channels, kernel, _ = weight.shape
    full = np.zeros((n, channels, (height - 1) * stride + kernel, (width - 1) * stride + kernel))
    full = np.pad(full, ((0, 0), (0, 0), (0, output_padding), (0, output_padding)))
    for y in range(height):
        for x in range(width):
            at = np.s_[:, :, y * stride : y * stride + kernel, x * stride : x * stride + kernel]
            full[at] += np.einsum("ni,iokl->nokl", images[:, :, y, x], weight)
    return full[:, :, pad : full.shape[2] - pad, pad : full.shape[3] - pad]


@pytest.mark.parametrize(("stride", "kernel"), [(2, 5), (4, 5), (8, 5)])  # as in the paper's SGEN
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_deconvolution_with_output_padding_gives_what_a_hand_computes(backend: str, stride: int, kernel: int) -> None:
    rng = np.random.default_rng(stride)
    images = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    weight = rng.normal(size=(3, 2, kernel, kernel)).astype(np.float32)
    pad, extra = kernel // 2, stride - 1
    node = helper.make_node(
        "ConvTranspose", ["image", "weight"], ["result"],
        strides=[stride] * 2, pads=[pad] * 4, output_padding=[extra] * 2,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "deconvolution",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ("n", 3, "h", "w"))],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, ("n", 2, "y", "x"))],
        [numpy_helper.from_array(weight, "weight")],
    )  # fmt: skip
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()

    if backend == "openvino":
        if not openvino_installed():
            pytest.skip("needs the extra openvino")
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        core = openvino.Core()
        result = core.compile_model(core.read_model(network), "CPU", settings)({"image": images})[0]
    else:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
        result = session.run(None, {"image": images})[0]

    assert result.shape == (2, 2, 4 * stride, 5 * stride)
    np.testing.assert_allclose(result, deconvolved(images, weight, stride, pad, extra), atol=1e-4)


@needs_rtx
@pytest.mark.parametrize("stride", [2, 8])
def test_a_deconvolution_with_output_padding_builds_at_the_size_that_it_has(
    tmp_path: Path, card: NetworkCard, stride: int
) -> None:
    import tensorrt_rtx

    weight = np.ones((3, 3, 5, 5), np.float32)
    node = helper.make_node(
        "ConvTranspose", ["image", "weight"], ["result"],
        strides=[stride] * 2, pads=[2] * 4, output_padding=[stride - 1] * 2,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "deconvolution",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight")],
    )  # fmt: skip
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    log = source._log("tensorrt-rtx")
    definition = tensorrt_rtx.Builder(log).create_network(0)
    parser = tensorrt_rtx.OnnxParser(definition, log)

    assert parser.parse(network.SerializeToString())

    assert tuple(definition.get_output(0).shape) == (1, 3, 8 * stride, 8 * stride)
