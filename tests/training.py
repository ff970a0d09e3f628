"""What the tests of trainings share: a kill, a comparison of states, and tiny networks as ONNX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper


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
