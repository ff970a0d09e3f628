from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import skimage.data
from insightface.data import get_image
from insightface.model_zoo.scrfd import SCRFD

from engines.card import CardError, NetworkCard, TensorSpec
from engines.engine import Engine
from engines.load import load_engine
from engines.store import Model, default_store
from streamer.detector import FaceDetector
from streamer.types import Detections

EYES = np.array(
    [
        [[86, 329], [130, 305]],
        [[290, 210], [325, 194]],
        [[494, 321], [547, 331]],
        [[762, 397], [804, 398]],
        [[914, 119], [948, 112]],
        [[1149, 326], [1195, 322]],
    ]
)
"""Of the six people in t1.jpg, by eye, from left to right."""
ASTRONAUT = np.array([175, 47, 274, 181])


class Recorder:
    """An engine that keeps the shapes of what it ran."""

    def __init__(self, engine: Engine, *, max_batch: int) -> None:
        self.card, self.sha256, self.backend = engine.card, engine.sha256, engine.backend
        self.precision, self.max_batch = engine.precision, max_batch
        self.shapes: list[tuple[int, ...]] = []
        self._engine = engine

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.shapes += [value.shape for value in inputs.values()]
        return self._engine.run(**inputs)

    def close(self) -> None:
        self._engine.close()


class Recital:
    """A CenterFace that says the same of every picture: faces in cells that a test chose."""

    def __init__(self, card: NetworkCard, faces: dict[tuple[int, int], tuple[float, float]], score: float) -> None:
        self.card, self.max_batch = card, 1
        self.sha256, self.backend, self.precision = "", "none", "fp32"
        self._faces, self._score = faces, score

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        (image,) = inputs.values()
        maps = [np.zeros((1, n, image.shape[2] // 4, image.shape[3] // 4), np.float32) for n in (1, 2, 2, 10)]
        for (row, column), (width, height) in self._faces.items():
            maps[0][0, 0, row, column] = self._score
            maps[1][0, :, row, column] = np.log(height / 4), np.log(width / 4)
            maps[3][0, :, row, column] = 0.3, 0.2, 0.3, 0.8, 0.5, 0.5, 0.8, 0.3, 0.8, 0.7
        return dict(zip([spec.name for spec in self.card.outputs], maps, strict=True))

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def centerface() -> Iterator[Engine]:
    yield from loaded(default_store().find("centerface"))


@pytest.fixture(scope="module", params=["yunet_n_dynamic", "face_detection_yunet_2023mar", "scrfd_2.5g_kps"])
def foreign(request: pytest.FixtureRequest, shared: Path) -> Iterator[Engine]:
    """The other families, with free canvases and with fixed ones."""
    yield from loaded(Model.read(shared / "models" / f"{request.param}.onnx"))


@pytest.fixture
def six() -> np.ndarray:
    return get_image("t1").copy()


@pytest.fixture
def astronaut() -> np.ndarray:
    return np.ascontiguousarray(skimage.data.astronaut()[:, :, ::-1])


def loaded(model: Model) -> Iterator[Engine]:
    engine = load_engine(model, backend="onnxruntime", threads=1)
    yield engine
    engine.close()


def detect(engine: Engine, image: np.ndarray, size: int = 640) -> Detections:
    (found,) = FaceDetector(engine, size=size).detect([image])
    return found


def from_left(detections: Detections) -> Detections:
    return detections[np.argsort(detections.boxes[:, 0])]


def ious(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of boxes, pair by pair."""
    overlap = (np.minimum(some, others)[:, 2:] - np.maximum(some, others)[:, :2]).clip(0).prod(1)
    return overlap / ((some[:, 2:] - some[:, :2]).prod(1) + (others[:, 2:] - others[:, :2]).prod(1) - overlap)


def assert_alike(found: Detections, expected: Detections, *, scale: float = 1.0) -> None:
    """Assert that the same faces were found in a picture `scale` times as large."""
    assert len(found) == len(expected)
    boxes = (from_left(found).boxes + 0.5) / scale - 0.5
    assert (ious(boxes, from_left(expected).boxes) > 0.8).all()


def assert_six_with_their_eyes(found: Detections) -> None:
    found = from_left(found)
    assert len(found) == 6
    eyes, first, last = found.landmarks[:, :2], found.boxes[:, None, :2], found.boxes[:, None, 2:]
    distances = np.linalg.norm(EYES[:, 1] - EYES[:, 0], axis=1)
    assert (np.linalg.norm(eyes - EYES, axis=2) < distances[:, None] / 3).all()
    assert ((first < eyes) & (eyes < last)).all()


# Every family.


def test_centerface_finds_six_people_and_their_eyes(centerface: Engine, six: np.ndarray) -> None:
    assert_six_with_their_eyes(detect(centerface, six, size=960))


def test_the_other_families_find_them_too(foreign: Engine, six: np.ndarray) -> None:
    assert_six_with_their_eyes(detect(foreign, six, size=960))


def test_landmarks_are_in_one_order_left_as_the_picture_shows_it(centerface: Engine, six: np.ndarray) -> None:
    left_eye, right_eye, nose, mouth_left, mouth_right = detect(centerface, six).landmarks.swapaxes(0, 1)

    assert (left_eye[:, 0] < right_eye[:, 0]).all()
    assert (mouth_left[:, 0] < mouth_right[:, 0]).all()
    assert (np.maximum(left_eye, right_eye)[:, 1] < nose[:, 1]).all()
    assert (nose[:, 1] < np.maximum(mouth_left, mouth_right)[:, 1]).all()


def test_the_families_agree_on_the_landmarks(centerface: Engine, foreign: Engine, six: np.ndarray) -> None:
    ours, theirs = (from_left(detect(engine, six)).landmarks for engine in (centerface, foreign))

    eye_distances = np.linalg.norm(EYES[:, 1] - EYES[:, 0], axis=1)
    assert np.median(np.linalg.norm(ours - theirs, axis=2) / eye_distances[:, None]) < 0.15


def test_what_is_found_has_the_types_that_flow(centerface: Engine, astronaut: np.ndarray) -> None:
    found = detect(centerface, astronaut)

    assert [(part.shape, part.dtype.name) for part in (found.boxes, found.landmarks, found.scores)] == [
        ((1, 4), "float32"),
        ((1, 5, 2), "float32"),
        ((1,), "float32"),
    ]
    assert ious(found.boxes, ASTRONAUT[None])[0] > 0.7


def test_scrfd_decodes_as_insightface_itself_does(shared: Path, six: np.ndarray) -> None:
    path = shared / "models" / "scrfd_500m_kps.onnx"
    square = np.zeros((640, 640, 3), np.uint8)
    square[:443] = cv2.resize(six, (640, 443), interpolation=cv2.INTER_AREA)
    boxes, landmarks = SCRFD(str(path)).detect(square)

    for engine in loaded(Model.read(path)):
        found = detect(engine, square)

    # It counts from the corner of the first pixel.
    assert found.boxes == pytest.approx(boxes[:, :4] - 0.5, abs=0.01)
    assert found.landmarks == pytest.approx(landmarks - 0.5, abs=0.01)
    assert found.scores == pytest.approx(boxes[:, 4], abs=1e-4)


def test_scrfd_as_in_insightface_packs_runs_at_any_size(shared: Path, tmp_path: Path, six: np.ndarray) -> None:
    path = like_a_pack(shared / "models" / "scrfd_500m_kps.onnx", tmp_path / "det_500m.onnx")

    for engine in loaded(Model.read(path, family="scrfd")):
        detector = FaceDetector(engine, size=960)
        for found in detector.detect([six, six]):
            assert_six_with_their_eyes(found)


def like_a_pack(path: Path, target: Path) -> Path:
    """Write the network with all axes of its input free and outputs that have no batch axis."""
    network = onnx.load(path)
    batch, _, height, width = network.graph.input[0].type.tensor_type.shape.dim
    batch.dim_param, height.dim_param, width.dim_param = "?", "?", "?"
    for output in network.graph.output:
        name, output.name = output.name, f"{output.name}_flat"
        network.graph.node.append(onnx.helper.make_node("Squeeze", [name], [output.name], axes=[0]))
        output.type.tensor_type.shape.dim[1].dim_param = "?"
        del output.type.tensor_type.shape.dim[0]
    onnx.save(network, target)
    return target


# The canvas.


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.7])
def test_a_picture_shrunk_or_enlarged_has_the_same_faces(centerface: Engine, six: np.ndarray, scale: float) -> None:
    other = cv2.resize(six, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)

    found = detect(centerface, other)

    assert_alike(found, detect(centerface, six), scale=scale)


@pytest.mark.parametrize(("right", "below"), [(1000, 0), (0, 1000), (7, 3)], ids=["wide", "tall", "odd"])
def test_a_frame_of_any_aspect_is_not_distorted(centerface: Engine, six: np.ndarray, right: int, below: int) -> None:
    frame = cv2.copyMakeBorder(six, 0, below, 0, right, cv2.BORDER_CONSTANT)

    found = detect(centerface, frame)

    assert_alike(found, detect(centerface, six))


def test_faces_keep_their_place_on_a_fixed_canvas(foreign: Engine, six: np.ndarray) -> None:
    tall = cv2.copyMakeBorder(six, 700, 0, 0, 0, cv2.BORDER_CONSTANT)

    found = detect(foreign, tall)

    expected = detect(foreign, six)
    assert_alike(Detections(found.boxes - [0, 700, 0, 700], found.landmarks, found.scores), expected)


def test_a_small_image_is_enlarged_so_that_small_faces_are_found(centerface: Engine, astronaut: np.ndarray) -> None:
    distant = cv2.resize(astronaut, (60, 60), interpolation=cv2.INTER_AREA)

    found = detect(centerface, distant)

    assert len(found) == 1
    assert ious(found.boxes, ASTRONAUT[None] * 60 / 512)[0] > 0.6


def test_a_small_image_that_a_face_fills_is_not_enlarged_beyond_what_is_found(
    centerface: Engine, astronaut: np.ndarray
) -> None:
    portrait = astronaut[30:190, 150:300]

    found = detect(centerface, portrait, size=1280)

    assert len(found) == 1
    assert ious(found.boxes, ASTRONAUT[None] - [150, 30, 150, 30])[0] > 0.8


def test_a_face_at_the_edge_has_a_box_that_reaches_beyond_the_frame(centerface: Engine, six: np.ndarray) -> None:
    cut = from_left(detect(centerface, six[:, 85:]))

    assert len(cut) == 6
    assert cut.boxes[0, 0] < -1


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (2, 31)])
def test_an_image_too_small_for_a_face_has_none(centerface: Engine, shape: tuple[int, int]) -> None:
    assert len(detect(centerface, np.full((*shape, 3), 128, np.uint8))) == 0


def test_a_grey_picture_has_the_same_faces(centerface: Engine, six: np.ndarray) -> None:
    grey = cv2.cvtColor(cv2.cvtColor(six, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)

    assert_alike(detect(centerface, grey), detect(centerface, six))


def test_the_canvas_is_as_long_as_said_and_whole_cells_high(centerface: Engine, six: np.ndarray) -> None:
    recorder = Recorder(centerface, max_batch=1)

    detect(recorder, six, size=320)

    assert recorder.shapes == [(1, 3, 224, 320)]


# Batches.


def test_a_batch_finds_what_each_image_has_by_itself(
    centerface: Engine, six: np.ndarray, astronaut: np.ndarray
) -> None:
    detector = FaceDetector(centerface, size=640)
    images = [six, astronaut, six[:, ::-1].copy(), np.zeros_like(six), np.rot90(astronaut, 2).copy()]

    together = detector.detect(images)

    for found, image in zip(together, images, strict=True):
        (alone,) = detector.detect([image])
        assert found.boxes == pytest.approx(alone.boxes, abs=0.01)
        assert found.landmarks == pytest.approx(alone.landmarks, abs=0.01)
        assert found.scores == pytest.approx(alone.scores, abs=1e-4)


def test_images_of_one_aspect_run_together_up_to_the_largest_batch(
    centerface: Engine, six: np.ndarray, astronaut: np.ndarray
) -> None:
    recorder = Recorder(centerface, max_batch=2)

    FaceDetector(recorder, size=320).detect([six, astronaut, six, six])

    assert sorted(recorder.shapes) == [(1, 3, 224, 320), (1, 3, 320, 320), (2, 3, 224, 320)]


def test_a_network_of_fixed_size_takes_its_own_canvas_one_by_one(shared: Path, six: np.ndarray) -> None:
    for engine in loaded(Model.read(shared / "models" / "face_detection_yunet_2023mar.onnx")):
        recorder = Recorder(engine, max_batch=engine.max_batch)
        FaceDetector(recorder, size=960).detect([six, six])

    assert recorder.shapes == [(1, 3, 640, 640)] * 2


def test_no_images_have_no_faces(centerface: Engine) -> None:
    assert FaceDetector(centerface).detect([]) == []


# What is kept.


def test_faces_below_the_threshold_are_returned_down_to_the_weak_one(centerface: Engine, six: np.ndarray) -> None:
    small = cv2.resize(six, None, fx=0.1, fy=0.1, interpolation=cv2.INTER_AREA)
    blurred = cv2.GaussianBlur(small, (0, 0), 1.6)
    detector = FaceDetector(centerface)

    (found,) = detector.detect([blurred])

    assert (detector.threshold, detector.weak_threshold) == (0.5, 0.4)
    assert ((found.scores >= 0.4) & (found.scores < 0.5)).any()
    assert (found.scores >= 0.4).all()
    assert (np.diff(found.scores) <= 0).all()


def test_a_configured_threshold_below_the_weak_one_lowers_both(centerface: Engine) -> None:
    low, high = FaceDetector(centerface, threshold=0.3), FaceDetector(centerface, threshold=0.7)

    assert (low.threshold, low.weak_threshold) == (0.3, 0.3)
    assert (high.threshold, high.weak_threshold) == (0.7, 0.4)


def test_the_first_pixel_has_its_centre_at_zero(centerface: Engine) -> None:
    engine = Recital(centerface.card, {(10, 20): (24.0, 32.0)}, 0.9)

    found = detect(engine, np.zeros((320, 640, 3), np.uint8), size=320)

    # Cell (10, 20) has its centre at x 82, y 42, counted from the canvas's corner; the frame is twice as large.
    assert found.boxes[0] == pytest.approx([139.5, 51.5, 187.5, 115.5])
    assert found.landmarks[0, 0] == pytest.approx([139.5 + 0.2 * 48, 51.5 + 0.3 * 64])


def test_boxes_that_are_none_are_dropped(centerface: Engine) -> None:
    faces = {
        (10, 20): (24.0, 32.0),
        (20, 20): (np.inf, 32.0),
        (30, 20): (np.nan, 32.0),
        (20, 60): (np.exp(-200.0), 32.0),
        (39, 20): (16.0, 16.0),  # in the black below the image
    }

    found = detect(Recital(centerface.card, faces, 0.9), np.zeros((290, 640, 3), np.uint8), size=320)

    assert len(found) == 1


def test_boxes_of_more_than_twice_the_frame_are_dropped(centerface: Engine) -> None:
    faces = {(10, 20): (1e5, 32.0), (60, 20): (32.0, 1300.0), (40, 40): (480.0, 480.0)}

    found = detect(Recital(centerface.card, faces, 0.9), np.zeros((320, 320, 3), np.uint8), size=320)

    assert found.boxes[:, 2:] - found.boxes[:, :2] == pytest.approx(np.array([[480.0, 480.0]]))


def test_scores_that_are_no_numbers_are_no_faces(centerface: Engine, six: np.ndarray) -> None:
    assert len(detect(Recital(centerface.card, {(10, 20): (24.0, 32.0)}, np.nan), six)) == 0


# What is refused.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "embedding"}, "centerface finds no faces: its card says task embedding, family centerface"),
        ({"family": None}, "centerface finds no faces: its card says task detection, family none"),
        ({"family": "yunet"}, "centerface has 4 outputs; yunet with landmarks has 12"),
        ({"threshold": None}, "the card of centerface has no threshold; set detector.threshold in the config"),
        (
            {"inputs": (TensorSpec(name="x", layout="NC", shape=("n", 3)),)},
            "centerface takes ('n', 3); a detector takes",
        ),
        (
            {"inputs": (TensorSpec(name="x", layout="NCHW", shape=(8, 3, 640, 640)),)},
            "centerface takes (8, 3, 640, 640); a detector takes",
        ),
    ],
)
def test_a_card_that_does_not_fit_is_refused_with_what_is_wrong(
    centerface: Engine, change: dict[str, object], said: str
) -> None:
    engine = Recital(centerface.card.model_copy(update=change), {}, 0)

    with pytest.raises(CardError) as refused:
        FaceDetector(engine)

    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("size", [0, -32, 650])
def test_a_size_that_the_networks_cannot_take_is_refused(centerface: Engine, size: int) -> None:
    with pytest.raises(ValueError, match=f"detector size is {size}; it must be a multiple of 32"):
        FaceDetector(centerface, size=size)
