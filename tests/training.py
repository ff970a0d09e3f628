"""What the tests of trainings share: a kill, a comparison of states, and tiny networks as ONNX."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn


class Killed(Exception):
    pass


@contextmanager
def killed_before(batches: type[Any], step: int) -> Iterator[None]:
    """A training in here dies when it asks these batches for the one of this step."""
    original = batches.__getitem__

    def breaking(self: Any, asked: int) -> Any:
        if asked == step:
            raise Killed
        return original(self, asked)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batches, "__getitem__", breaking)
        with pytest.raises(Killed):
            yield


def equal(a: Any, b: Any) -> bool:
    """Say whether two states are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def save_onnx(path: Path, nodes: list[onnx.NodeProto], inputs: Sequence[str] = ("image",), **constants: object) -> Path:
    """Write an ONNX of these nodes, whose last gives the result; inputs are pictures of any size."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, "h", "w"]) for name in inputs],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def write_faces(tar: Path, photos: Mapping[str, np.ndarray], places: str) -> None:
    """Write photos, by `IDENTITY/NAME`, as a tar with its CSV; all have one box and landmarks, as in the CSV."""
    names = [f"{part}_{axis}" for part in ("le", "re", "nose", "lm", "rm") for axis in "xy"]
    lines = [",".join(["file", "identity", "face_x1", "face_y1", "face_x2", "face_y2", *names])]
    with tarfile.open(tar, "w") as file:
        for name, image in photos.items():
            content = cv2.imencode(".png", np.ascontiguousarray(image))[1].tobytes()
            member = tarfile.TarInfo(f"{name}.png")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
            lines.append(f"{member.name},{name.split('/')[0]},{places}")
    tar.with_suffix(".csv").write_text("\n".join(lines) + "\n")


class Together(nn.Module):
    """Several networks as one, so that torch's exporter, which takes seconds, begins but once."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.config: Any = max((network.config for network in networks), key=lambda config: config.multiple)

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([network(image).flatten(1) for network in self.networks], dim=1)
