"""FaceEmbedder over a real recogniser where there is one, and over a tiny network everywhere."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from engines.card import CardError, NetworkCard, TensorSpec
from engines.engine import EngineError
from engines.load import load_engine
from engines.store import ModelStore
from streamer.embedder import FaceEmbedder
from streamer.geometry import UPRIGHT

FACE = np.ascontiguousarray(astronaut()[..., ::-1])
LANDMARKS = np.array([[206, 115], [247, 113], [230, 142], [209, 156], [249, 155]], np.float32)


class Means:
    """An engine whose embedding is the mean colour of the aligned face, so that alignment and order show."""

    backend, precision, sha256, max_batch = "test", "fp32", "0" * 64, 2

    def __init__(self, task: str = "embedding", zero: bool = False) -> None:
        self.zero, self.batches = zero, []
        self.card = NetworkCard.model_validate(
            {
                "name": "means", "task": task, "license": "none", "color": "BGR", "embedding_dim": 3,
                "inputs": [TensorSpec(name="face", layout="NCHW", shape=("n", 3, 32, 32))],
                "outputs": [TensorSpec(name="embedding", layout="NC", shape=("n", 3))],
                "alignment": (UPRIGHT * 24 + 15.5).tolist(), "alignment_size": 32,
            }
        )  # fmt: skip

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.batches.append(len(inputs["face"]))
        return {"embedding": inputs["face"].mean(axis=(2, 3)) * (0 if self.zero else 1)}

    def close(self) -> None:
        pass


def test_embeddings_are_unit_vectors_in_the_order_of_the_faces():
    engine = Means()
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    faces = [(np.full((80, 80, 3), colour, np.uint8), UPRIGHT * 50 + 40) for colour in colours]

    embeddings = FaceEmbedder(engine).embed(faces)

    assert [int(np.argmax(embedding)) for embedding in embeddings] == [0, 1, 2]
    assert np.allclose([np.linalg.norm(embedding) for embedding in embeddings], 1)
    assert engine.batches == [2, 1]


def test_an_embedding_without_direction_is_an_error():
    with pytest.raises(EngineError, match="without direction"):
        FaceEmbedder(Means(zero=True)).embed([(FACE, LANDMARKS)])


def test_a_network_that_embeds_nothing_is_refused():
    with pytest.raises(CardError, match="for restoration"):
        FaceEmbedder(Means(task="restoration"))


def test_a_real_recogniser_knows_a_face_again_at_another_size_and_turned(shared):
    model = ModelStore([shared / "models"], shared / "none").find("face-reidentification-retail-0095")
    embedder = FaceEmbedder(load_engine(model, backend="onnxruntime"))
    turn = cv2.getRotationMatrix2D((228, 130), 20, 0.7)
    turned = cv2.warpAffine(FACE, turn, (512, 512))
    moved = LANDMARKS @ turn[:, :2].T + turn[:, 2]

    one, again, other = embedder.embed([(FACE, LANDMARKS), (turned, moved), (FACE, LANDMARKS + np.array([120, 160]))])

    assert one @ again > 0.8
    assert one @ other < 0.4
