"""ONNX Runtime on CUDA, where its build has it, against ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.ort import OnnxEngine, cuda_offered
from engines.store import Model

WEIGHTS = sorted((Path(__file__).parents[2] / "models/weights").glob("*.onnx"))


@pytest.mark.skipif(not cuda_offered(), reason="this ONNX Runtime has no CUDA provider (onnxruntime-gpu has)")
@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_cuda_gives_what_the_cpu_gives(path: Path) -> None:
    model = Model.read(path)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 3, 32, 32)).astype(np.float32)

    given = OnnxEngine(model, provider="cuda").run(image=images)["restored"]

    np.testing.assert_allclose(given, OnnxEngine(model).run(image=images)["restored"], atol=5e-3)
