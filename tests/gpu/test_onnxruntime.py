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
    side = model.card.result_size or 32
    faces = np.random.default_rng(0).uniform(-1, 1, (len(model.card.inputs), 2, 3, side, side)).astype(np.float32)
    feed = {spec.name: face for spec, face in zip(model.card.inputs, faces, strict=True)}

    given = OnnxEngine(model, provider="cuda").run(**feed)["restored"]

    np.testing.assert_allclose(given, OnnxEngine(model).run(**feed)["restored"], atol=5e-3)
