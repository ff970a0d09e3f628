"""Tiny networks, made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.card import CARD_KEY, NetworkCard, TensorSpec

Networks = Callable[..., Path]


@pytest.fixture
def card() -> NetworkCard:
    return NetworkCard(
        name="tiny",
        task="restoration",
        inputs=(TensorSpec(name="image", layout="NCHW", shape=("n", 3, "h", "w")),),
        outputs=(
            TensorSpec(name="result", layout="NCHW", shape=("n", 3, "h", "w")),
            TensorSpec(name="mean", layout="NCHW", shape=("n", 3, 1, 1)),
        ),
        scales=(1,),
        license="public domain",
    )


@pytest.fixture
def make_network(tmp_path: Path) -> Networks:
    """Write a convolution and its mean; `shape` is of the input."""

    def make(
        path: Path | str = "tiny.onnx",
        card: NetworkCard | None = None,
        shape: tuple[int | str, ...] = ("n", 3, "h", "w"),
        weights_as_inputs: bool = False,
    ) -> Path:
        path = tmp_path / path
        weight = np.random.default_rng(0).normal(size=(3, 3, 3, 3)).astype(np.float32)
        inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)]
        if weights_as_inputs:
            inputs.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, weight.shape))
        graph = helper.make_graph(
            [
                helper.make_node("Conv", ["image", "weight"], ["convolved"], pads=[1, 1, 1, 1]),
                helper.make_node("Relu", ["convolved"], ["result"]),
                helper.make_node("GlobalAveragePool", ["result"], ["mean"]),
            ],
            "tiny",
            inputs,
            [
                helper.make_tensor_value_info("result", TensorProto.FLOAT, shape),
                helper.make_tensor_value_info("mean", TensorProto.FLOAT, (shape[0], 3, 1, 1)),
            ],
            [numpy_helper.from_array(weight, "weight")],
        )
        network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        if card:
            network.metadata_props.add(key=CARD_KEY, value=card.model_dump_json())
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(network, path)
        return path

    return make
