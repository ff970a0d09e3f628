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

    images = np.random.default_rng(0).uniform(-1, 1, (4, 3, 32, 32)).astype(np.float32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    network = EagerNetwork(path).network.cuda().eval()

    with torch.inference_mode():
        given = network(torch.from_numpy(images).cuda()).cpu().numpy()

    wanted = OnnxEngine(Model.read(path)).run(image=images)["restored"]
    np.testing.assert_allclose(given, wanted, atol=5e-3)
