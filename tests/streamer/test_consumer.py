"""The consumer of docs/consumer.md, as it is printed there, against a real publisher."""

import csv
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
import threading
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from skimage.transform import SimilarityTransform

from streamer import types
from streamer.publisher import EventPublisher

DOCS = Path(__file__).parents[2] / "docs"
SHARED = Path(__file__).parents[3] / "shared"
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def an_identified(
    image: np.ndarray, landmarks: np.ndarray, restored: np.ndarray | None = None, *, scale=1
) -> types.FaceIdentified:
    track = types.Track(1, types.Moment("hall", 0, 0.0, NOON, "file"), np.zeros(4), landmarks, 0.9)
    crop = types.Crop(track, image, np.eye(2, 3), types.Quality(20, 8, 0.5, 3, 0, 0, 0))
    if restored is None:
        return types.FaceIdentified(crop, types.Route("none", "large"), None, None, "no embedder")
    restoration = types.Restoration(restored, "sgen", "ab" * 32, scale, "onnxruntime-cpu", "fp32")
    return types.FaceIdentified(crop, types.Route("sgen", "small"), restoration, None, "no embedder")


def consume(events: list[types.Event], recogniser: Path) -> list[tuple[str, np.ndarray]]:
    """Publish `events` to the consumer; return the image's name and the embedding of each of its lines."""
    ended = types.SystemStatus("ended", "0.1.0", {}, {}, {}, {})
    with EventPublisher(
        "tcp://127.0.0.1:*", stream="box", epoch="e1", lossless=True, stop=threading.Event()
    ) as publisher:
        command = [sys.executable, "-W", "error", str(DOCS / "consumer.py"), publisher.endpoint, str(recogniser)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as consumer:
            publisher.wait_for_subscribers(1)
            for event in [*events, ended]:
                publisher.publish(event)
            output, _ = consumer.communicate(timeout=60)
    assert consumer.returncode == 0
    lines = [json.loads(line) for line in output.splitlines()]
    assert all(line[:2] == ["hall", 1] for line in lines)
    return [(name, np.array(embedding)) for _, _, name, embedding in lines]


@pytest.fixture
def recogniser(tmp_path) -> Path:
    """A network of 64x64 pixels whose embedding is the aligned face itself, averaged over 8x8 blocks."""
    face = helper.make_tensor_value_info("face", TensorProto.FLOAT, [1, 3, 64, 64])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 192])
    nodes = [
        helper.make_node("AveragePool", ["face"], ["blocks"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["blocks"], ["embedding"]),
    ]
    graph = helper.make_graph(nodes, "blocks", [face], [embedding])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    path = tmp_path / "blocks.onnx"
    onnx.save(model, path)
    return path


def a_drawing(*, side: int, angle_deg: float) -> tuple[np.ndarray, np.ndarray]:
    """A turned face of coloured dots at five landmarks, and the landmarks."""
    points = np.float64([[0.36, 0.4], [0.64, 0.4], [0.5, 0.55], [0.4, 0.68], [0.62, 0.68]]) * side
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), angle_deg, 1)
    points = points @ turn[:, :2].T + turn[:, 2]
    image = np.full((side, side, 3), 90, np.uint8)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    for (x, y), colour in zip(points, colours, strict=True):
        cv2.circle(image, (round(x * 16), round(y * 16)), round(side * 1.2), colour, -1, cv2.LINE_AA, 4)
    return image, points.astype(np.float32)


def test_the_document_prints_the_consumer_that_is_run_here():
    [printed] = re.findall(r"^```python\n(\"\"\".*?)^```", (DOCS / "consumer.md").read_text(), re.M | re.S)

    assert printed == (DOCS / "consumer.py").read_text()


def test_the_consumer_is_about_thirty_lines():
    lines = (DOCS / "consumer.py").read_text().splitlines()

    assert sum(bool(line.strip()) for line in lines) <= 36


def test_it_embeds_the_face_aligned_whichever_way_and_size_it_came(recogniser):
    drawings = [a_drawing(side=side, angle_deg=angle) for side, angle in [(100, 0), (100, 25), (160, -30)]]
    upright, turned, large = consume([an_identified(*drawing) for drawing in drawings], recogniser)

    assert upright[1] @ turned[1] > 0.995
    assert upright[1] @ large[1] > 0.995
    assert np.linalg.norm(upright[1]) == pytest.approx(1, abs=1e-3)
    mirrored = upright[1].reshape(3, 8, 8)[:, :, ::-1].ravel()
    assert upright[1] @ mirrored < 0.98  # the dots matter


def test_its_alignment_is_the_least_squares_similarity_to_the_template(recogniser):
    image, landmarks = a_drawing(side=100, angle_deg=25)
    template = np.float32(
        [[0.31557, 0.46157], [0.68262, 0.46157], [0.50026, 0.64051], [0.34947, 0.82469], [0.65344, 0.82469]]
    )
    similarity = SimilarityTransform.from_estimate(landmarks.astype(float), template * 64.0)
    aligned = cv2.warpAffine(image, similarity.params[:2], (64, 64)).astype(float)
    blocks = aligned.reshape(8, 8, 8, 8, 3).mean((1, 3)).transpose(2, 0, 1).ravel()

    [(_, embedding)] = consume([an_identified(image, landmarks)], recogniser)

    assert embedding @ blocks / np.linalg.norm(blocks) > 0.99999


def test_it_takes_the_restored_image_with_its_landmarks_and_else_the_crop(recogniser):
    image, landmarks = a_drawing(side=40, angle_deg=15)
    restored = cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    events = [an_identified(image, landmarks), an_identified(image, landmarks, restored, scale=4)]

    [(first, of_crop), (second, of_restored)] = consume(events, recogniser)

    assert (first, second) == ("crop", "restored")
    assert of_crop @ of_restored > 0.998


def test_it_passes_over_events_without_images_and_ends_with_the_app(recogniser):
    track = an_identified(*a_drawing(side=40, angle_deg=0)).crop.track

    assert consume([types.FaceAppeared(track), types.FaceLeft(track)], recogniser) == []


def test_a_real_recogniser_tells_real_people_apart():
    recogniser = SHARED / "models" / "face-reidentification-retail-0095.onnx"
    faces = SHARED / "data" / "lfw_test.tar"
    if not recogniser.exists() or not faces.exists():
        pytest.skip("needs face-reidentification-retail-0095.onnx and lfw_test.tar in ../shared")
    people = list(itertools.islice(_people_of_two_photos(), 8))
    events = [_half_as_large_and_restored(*photo) for photos in people for photo in photos]

    received = consume(events, recogniser)

    assert {name for name, _ in received} == {"restored"}
    embeddings = np.array([embedding for _, embedding in received]).reshape(8, 2, -1)
    similarities = embeddings[:, 0] @ embeddings[:, 1].T
    same, other = np.diag(similarities), similarities[~np.eye(8, dtype=bool)]
    assert same.mean() > 0.55
    assert other.mean() < 0.2
    assert (same > 0.41).sum() >= 7  # its threshold at a false accept rate of 0.1 %
    assert (other > 0.41).sum() <= 1


def _people_of_two_photos():
    """Yield people of ../shared's LFW part: two (image, landmarks) each."""
    with (
        (SHARED / "data" / "lfw_test.csv").open() as table,
        tarfile.open(SHARED / "data" / "lfw_test.tar") as photos,
    ):
        for _, rows in itertools.groupby(csv.DictReader(table), key=lambda row: row["identity"]):
            pair = list(itertools.islice(rows, 2))
            if len(pair) == 2:
                yield [(_photo(photos, row["file"]), _landmarks(row)) for row in pair]


def _photo(photos: tarfile.TarFile, name: str) -> np.ndarray:
    data = io.BufferedReader(photos.extractfile(name)).read()
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def _landmarks(row: dict[str, str]) -> np.ndarray:
    return np.float32([[float(row[f"{point}_{axis}"]) for axis in "xy"] for point in ("le", "re", "nose", "lm", "rm")])


def _half_as_large_and_restored(image: np.ndarray, landmarks: np.ndarray) -> types.FaceIdentified:
    """An event whose restored image is the photo, and whose crop is half as large."""
    crop = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return an_identified(crop, landmarks / 2 - 0.25, image, scale=2)
