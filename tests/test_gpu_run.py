"""`tests/gpu/run` where there is no GPU: nothing is lost by what is missing, and the report says what is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.card import CARD_KEY, NetworkCard, TensorSpec
from engines.trt import gpu_found

RUN = Path(__file__).with_name("gpu") / "run"

pytestmark = pytest.mark.skipif(gpu_found(), reason="there is a GPU here: tests/gpu/run itself tells")


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A guided restorer that adds its two inputs after a convolution."""
    image = {"layout": "NCHW", "shape": ("n", 3, "h", "w")}
    card = NetworkCard(
        name="tiny", task="guided-restoration", result_size=16, license="public domain",
        inputs=tuple(TensorSpec(name=name, **image) for name in ("image", "guide")),
        outputs=(TensorSpec(name="restored", **image),),
    )  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["seen"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["seen", "guide"], ["restored"]),
    ]
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in card.inputs],
        [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in card.outputs],
        [numpy_helper.from_array(np.ones((3, 3, 3, 3), np.float32), "weight")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    model.metadata_props.add(key=CARD_KEY, value=card.model_dump_json())
    onnx.save(model, tmp_path / "tiny.onnx")
    return tmp_path / "tiny.onnx"


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which PyTorch cannot be found."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')\n")
    return os.environ | {"PYTHONPATH": str(tmp_path / "hidden"), "OMP_NUM_THREADS": "1"}


def run(*arguments: object, env: dict[str, str] | None = None) -> tuple[int, str]:
    command = [sys.executable, str(RUN), *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    return done.returncode, done.stderr


def test_without_a_gpu_nothing_is_run_or_written(tmp_path: Path) -> None:
    code, said = run("--out", tmp_path / "gpu.md")

    assert (code, said.count("\n")) == (2, 1) and "no NVIDIA GPU" in said
    assert not (tmp_path / "gpu.md").exists()


def test_a_rehearsal_measures_what_it_can_and_names_all_that_it_could_not(
    network: Path, without_torch: dict[str, str], tmp_path: Path
) -> None:
    short = ["--no-tests", "--batches", "1,3", "--rounds", "1", "--seconds", "0.01"]
    parts = ["--parts", "peak,work,onnxruntime-cuda,tensorrt", "--networks", network]

    code, _ = run("--rehearse", "--out", tmp_path / "gpu.md", *short, *parts, env=without_torch)

    report = (tmp_path / "gpu.md").read_text()
    measured, missing = report.split("## Not run")
    assert code == 0
    assert "A rehearsal on the CPU" in measured and "### tiny, 0.00 GFLOP a face" in measured
    (row,) = [line for line in measured.splitlines() if line.startswith("| onnxruntime-cpu | fp32 |")]
    assert all(float(cell.replace(",", "")) > 0 for cell in row.split("|")[3:5])
    assert "What the device can do: torch is not installed" in missing
    assert "TensorRT of tiny: " in missing
    assert "PyTorch eager, PyTorch with CUDA graphs, NVDEC: left out" in missing


def test_a_part_that_breaks_off_costs_itself_alone_and_is_told(network: Path, tmp_path: Path) -> None:
    network.with_name("broken.onnx").write_bytes(b"no network")
    both = ["--networks", network.with_name("broken.onnx"), network]

    code, _ = run("--rehearse", "--out", tmp_path / "gpu.md", "--no-tests", "--parts", "work", *both)

    report = (tmp_path / "gpu.md").read_text()
    assert code == 1
    assert "**broken off:** What the networks cost of broken: it ended with exit code 1: " in report
    assert "### tiny, 0.00 GFLOP a face" in report
