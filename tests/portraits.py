"""Photos of people that installed packages carry, and an embedder for them: tests of enrolment need no other files."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from skimage.data import astronaut

from engines.card import CARD_KEY
from streamer.detector import FaceDetector
from streamer.geometry import UPRIGHT, align
from streamer.photos import read_image

ASTRONAUT = np.ascontiguousarray(astronaut()[..., ::-1])
SIDE = 64


def group() -> np.ndarray:
    spec = find_spec("insightface")
    assert spec and spec.origin
    return read_image(Path(spec.origin).parent / "data/images/t1.jpg")


FACES = {
    "centre": (464, 262, 575, 415), "right": (1134, 274, 1228, 402), "left": (57, 270, 171, 395),
    "aside": (900, 55, 1014, 205), "behind": (747, 344, 846, 483),
}  # fmt: skip
"""Where people of insightface's group photo are."""


def portrait(who: str, room: float = 0.3) -> np.ndarray:
    """Return one person cut out of the group photo."""
    image, (left, top, right, bottom) = group(), FACES[who]
    more = int(room * (bottom - top))
    return image[max(0, top - more) : bottom + more, max(0, left - more) : right + more].copy()


def write_embedder(path: Path, detector: FaceDetector, cell: int = 4) -> Path:
    """Write an embedder that anybody has: cells of pixels of the aligned face less those of the mean face."""
    template = (UPRIGHT * 44 + (SIDE - 1) / 2).astype(np.float32)
    aligned = []
    for image in (ASTRONAUT, group()):
        found = detector.detect([image])[0]
        aligned += [align(image, points, template, SIDE) for points in found.landmarks[found.scores > 0.5]]
    mean = np.mean([_cells(face, cell) for face in aligned], axis=0, keepdims=True)
    nodes = [
        helper.make_node("AveragePool", ["face"], ["coarse"], kernel_shape=[cell, cell], strides=[cell, cell]),
        helper.make_node("Flatten", ["coarse"], ["pixels"]),
        helper.make_node("Sub", ["pixels", "mean"], ["embedding"]),
    ]
    dimension = mean.shape[1]
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info("face", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", dimension])],
        [numpy_helper.from_array(mean.astype(np.float32), "mean")],
    )  # fmt: skip
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    card = {
        "name": "tiny", "task": "embedding", "license": "none", "color": "BGR", "embedding_dim": dimension,
        "inputs": [{"name": "face", "layout": "NCHW", "shape": ["n", 3, SIDE, SIDE]}],
        "outputs": [{"name": "embedding", "layout": "NC", "shape": ["n", dimension]}],
        "alignment": template.tolist(), "alignment_size": SIDE,
    }  # fmt: skip
    network.metadata_props.add(key=CARD_KEY, value=json.dumps(card))
    onnx.save(network, path)
    return path


def _cells(face: np.ndarray, cell: int) -> np.ndarray:
    """Return what the embedder's first two layers make of an aligned face."""
    means = face.reshape(SIDE // cell, cell, SIDE // cell, cell, 3).mean(axis=(1, 3), dtype=np.float64)
    return means.transpose(2, 0, 1).ravel()
