"""PyTorch on the GPU, rebuilt from the shipped ONNX: what engines are measured against must be the same network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.ort import OnnxEngine
from engines.store import Model

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

WEIGHTS = sorted((Path(__file__).parents[2] / "models/weights").glob("*.onnx"))


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_torch_gives_what_onnx_runtime_gives(path: Path) -> None:
    from models.eager import EagerNetwork

    model = Model.read(path)
    side = model.card.result_size or 32
    faces = np.random.default_rng(0).uniform(-1, 1, (len(model.card.inputs), 2, 3, side, side)).astype(np.float32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    network = EagerNetwork(path).network.cuda().eval()

    with torch.inference_mode():
        given = network(*torch.from_numpy(faces).cuda()).cpu().numpy()

    feed = {spec.name: face for spec, face in zip(model.card.inputs, faces, strict=True)}
    wanted = OnnxEngine(model).run(**feed)["restored"]
    np.testing.assert_allclose(given, wanted, atol=5e-3)
