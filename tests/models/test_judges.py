import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from skimage.data import astronaut

pytest.importorskip("PIL", reason="the extra train is not installed")

from engines.ort import OnnxEngine
from engines.store import Model
from models.dataset import load_faces
from models.judges import (
    KNOWN_EMBEDDERS,
    FaceDetector,
    FaceEmbedder,
    Lpips,
    OnnxRestorer,
    Preparation,
    bicubic,
    interval,
    mps,
    psnr,
    real_esrgan,
    scaled_landmarks,
    similarity,
    ssim,
)
from streamer.geometry import align
from streamer.restorer import FaceRestorer

ROOT = Path(__file__).parents[2]
SGEN_SMALL = ROOT / "models/weights/sgen-small.onnx"
EYES = np.array([[97.0, 105], [151, 103], [126, 133], [106, 164], [148, 162]])  # of `face`, by hand
CARD = {
    "name": "tiny", "color": "RGB", "mean": [127.5] * 3, "std": [127.5] * 3, "output_range": [-1, 1],
    "scales": [4, 2, 1], "enlarge": "nearest", "size_multiple": 1, "trained_on": "nothing",
}  # fmt: skip


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(astronaut()[0:224, 112:336, ::-1]), (256, 256))


def network(path: Path, nodes: list[onnx.NodeProto], *, card: dict | None = None, **constants: np.ndarray) -> Path:
    """An ONNX of these nodes from `image` to `out`."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if card:
        model.metadata_props.append(onnx.StringStringEntryProto(key="streamer.card", value=json.dumps(card)))
    onnx.save(model, str(path))
    return path


def restorer(folder: Path, *nodes: onnx.NodeProto, constants: dict[str, np.ndarray] | None = None, **card: object):
    """A restorer of these nodes, by default one that gives back what it gets."""
    same = [helper.make_node("Identity", ["image"], ["out"])]
    return OnnxRestorer(network(folder / "tiny.onnx", [*nodes] or same, card=CARD | card, **(constants or {})))


def embedder(folder: Path, *nodes: onnx.NodeProto, color: str = "BGR", side: int = 32) -> FaceEmbedder:
    """By default the embedding is the aligned face's pixels."""
    flat = [helper.make_node("Flatten", ["image"], ["out"])]
    template = np.array(KNOWN_EMBEDDERS["face-reidentification-retail-0095"].template) / 128 * side
    preparation = Preparation.model_validate({"side": side, "template": template.tolist(), "color": color})
    return FaceEmbedder(network(folder / "tiny.onnx", [*nodes] or flat), preparation)


def test_psnr_of_a_known_error():
    truth = np.full((8, 8, 3), 100, np.uint8)

    assert psnr(truth + 1, truth) == pytest.approx(20 * np.log10(255))
    assert psnr(truth + 10, truth) == pytest.approx(20 * np.log10(255) - 20)


def test_psnr_does_not_wrap_where_bytes_would_and_is_infinite_without_an_error():
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)

    assert psnr(black, white) == psnr(white, black) == pytest.approx(0)
    assert psnr(black, black) == float("inf")


def test_ssim_is_one_for_the_truth_and_falls_with_noise(face):
    rng = np.random.default_rng(0)
    noisy = [np.clip(face + rng.normal(0, sigma, face.shape), 0, 255).astype(np.uint8) for sigma in (5, 30)]

    assert ssim(face, face) == pytest.approx(1)
    assert 0.95 > ssim(noisy[0], face) > ssim(noisy[1], face) > 0


def test_ssim_is_that_of_its_definition_on_luma(face):
    dim = np.clip(face * 0.7 + 20, 0, 255).astype(np.uint8)
    x, y = (cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.float64) for image in (dim, face))

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (11, 11), 1.5)[5:-5, 5:-5]

    a, b, c1, c2 = mean(x), mean(y), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    spread = mean(x * x) - a * a + mean(y * y) - b * b
    by_hand = (2 * a * b + c1) * (2 * (mean(x * y) - a * b) + c2) / ((a * a + b * b + c1) * (spread + c2))
    assert ssim(dim, face) == pytest.approx(by_hand.mean(), abs=1e-6)


def test_mps_is_half_for_nothing_alike_and_nothing_felt_and_one_for_the_truth():
    assert mps(1, 0) == 1
    assert mps(0.6, 0.4) == pytest.approx(0.6)
    assert mps(0, 1) == 0


def test_the_interval_redraws_people_not_photographs():
    # of two people one is drawn twice in half of the draws: the mean is then 0 or 10
    assert interval([0.0, 0, 0, 0, 10], ["a", "a", "a", "a", "b"]) == (0, 10)


def test_the_interval_of_the_same_value_everywhere_is_that_value():
    assert interval(np.full(4, 2.5), ["a", "b", "b", "c"]) == (2.5, 2.5)


def test_the_interval_narrows_with_more_people():
    rng = np.random.default_rng(1)
    widths = []
    for people in (10, 1000):
        low, high = interval(rng.normal(0, 1, people), [str(i) for i in range(people)])
        widths.append(high - low)

    assert widths[1] == pytest.approx(2 * 1.96 / np.sqrt(1000), rel=0.15)
    assert widths[0] > 5 * widths[1]


@pytest.mark.parametrize("scale", [2, 4])
def test_bicubic_takes_a_point_where_scaled_landmarks_say(scale):
    image = np.zeros((9, 9, 3), np.uint8)
    image[3, 5] = 200

    enlarged = bicubic(image, scale).astype(float)[..., 0]

    y, x = np.mgrid[: 9 * scale, : 9 * scale]
    centre = np.array([[(x * enlarged).sum(), (y * enlarged).sum()]]) / enlarged.sum()
    assert centre == pytest.approx(scaled_landmarks(np.array([[5.0, 3.0]]), scale), abs=0.05)


def test_a_similarity_is_found_from_its_points_but_never_a_mirroring():
    angle, size, shift = 0.4, 1.7, (3.0, -8.0)
    turn = size * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    found = similarity(EYES, EYES @ turn.T + shift)
    mirrored = similarity(EYES, EYES * (-1, 1))

    assert found == pytest.approx(np.column_stack([turn, shift]))
    assert np.linalg.det(mirrored[:, :2]) > 0


@pytest.mark.parametrize("points", [np.ones((5, 2)), np.full((5, 2), np.nan)])
def test_landmarks_that_coincide_or_are_not_known_align_nothing(points):
    with pytest.raises(ValueError, match="coincide or are not known"):
        similarity(points, EYES)


def test_an_aligned_face_has_its_landmarks_on_the_template(tmp_path):
    judge = embedder(tmp_path, side=128)
    image = np.zeros((90, 90, 3), np.uint8)
    landmarks = np.array(judge.preparation.template) @ np.array([[0.5, 0.2], [-0.2, 0.5]]) + (25, 5)
    for x, y in landmarks.round().astype(int):
        cv2.circle(image, (int(x), int(y)), 1, (255, 255, 255), -1)

    aligned = judge.align(image, landmarks)

    assert aligned.shape == (128, 128, 3)
    count, _, _, centres = cv2.connectedComponentsWithStats((aligned[..., 0] > 127).astype(np.uint8))
    assert count == 6
    for point in judge.preparation.template:
        assert np.linalg.norm(centres[1:] - point, axis=1).min() < 1.5


def test_a_face_that_shrinks_to_a_fraction_does_not_alias(tmp_path):
    judge = embedder(tmp_path, side=32)
    stripes = np.tile(np.array([[0], [255]], np.uint8), (128, 256))[..., None].repeat(3, axis=2)

    aligned = judge.align(stripes, EYES)

    assert np.ptp(aligned[4:-4, 4:-4].astype(int)) < 60


def test_a_face_and_its_enlargement_embed_alike_only_with_landmarks_scaled_by_pixel_centres(tmp_path, face):
    judge = embedder(tmp_path)
    small, landmarks = cv2.resize(face, (64, 64), interpolation=cv2.INTER_AREA), scaled_landmarks(EYES, 0.25)
    large = bicubic(small, 4)

    own, right, wrong = judge.embed([small, large, large], [landmarks, scaled_landmarks(landmarks, 4), landmarks * 4])

    assert np.linalg.norm([own, right, wrong], axis=1) == pytest.approx(1)
    assert own @ right > own @ wrong
    assert own @ right > 0.99


@pytest.mark.parametrize(("color", "blue_first"), [("BGR", True), ("RGB", False)])
def test_an_embedder_gets_its_channels_in_its_order(tmp_path, color, blue_first):
    mean = helper.make_node("ReduceMean", ["image", "axes"], ["out"], keepdims=0)
    path = network(tmp_path / "mean.onnx", [mean], axes=np.array([2, 3]))
    template = tuple(map(tuple, EYES / 8))
    judge = FaceEmbedder(path, Preparation(side=32, template=template, color=color))
    blue = np.zeros((256, 256, 3), np.uint8)
    blue[..., 0] = 200

    (found,) = judge.embed([blue], [EYES])

    assert found == pytest.approx([1, 0, 0] if blue_first else [0, 0, 1])


def test_an_embedding_without_direction_is_refused(tmp_path):
    judge = embedder(tmp_path)

    with pytest.raises(ValueError, match="no direction"):
        judge.embed([np.zeros((64, 64, 3), np.uint8)], [EYES / 4])


def test_a_recogniser_that_nobody_described_is_refused(tmp_path):
    path = network(tmp_path / "strange.onnx", [helper.make_node("Flatten", ["image"], ["out"])])

    with pytest.raises(ValueError, match="strange is not known; give its preparation"):
        FaceEmbedder(path)


def test_a_restorer_enlarges_as_its_card_says_and_keeps_the_colours(tmp_path, face):
    low = face[100:113, 90:121]

    nearest = restorer(tmp_path).restore(low, 4)
    cubic = restorer(tmp_path, enlarge="cubic").restore(low, 2)
    alike = restorer(tmp_path, color="BGR", mean=[0] * 3, std=[255] * 3, output_range=[0, 1]).restore(low, 1)

    assert np.array_equal(nearest, low.repeat(4, axis=0).repeat(4, axis=1))
    assert np.array_equal(cubic, cv2.resize(low, (62, 26), interpolation=cv2.INTER_CUBIC))
    assert np.array_equal(alike, low)


def test_a_restorer_works_on_red_green_blue_inside_and_clips(tmp_path):
    add = helper.make_node("Add", ["image", "more"], ["out"])
    more = {"more": np.array([1.0, 0, -3], np.float32).reshape(1, 3, 1, 1)}

    out = restorer(tmp_path, add, constants=more).restore(np.full((4, 4, 3), 100, np.uint8), 1)

    assert out[0, 0].tolist() == [0, 100, 228]  # blue, green, red; 1 is 127.5 grey levels


@pytest.mark.parametrize(("width", "first"), [(13, [9, 10, 11, 12, 11]), (2, [1, 0, 1, 0, 1]), (1, [0, 0, 0, 0, 0])])
def test_padding_reflects_as_often_as_it_must_and_is_cut_off(tmp_path, width, first):
    # a network that turns left and right shows what lay beyond the right edge
    turn = helper.make_node("Slice", ["image", "starts", "ends", "axes", "steps"], ["out"])
    places = {"starts": [-1], "ends": [-(10**6)], "axes": [3], "steps": [-1]}
    constants = {name: np.array(value, np.int64) for name, value in places.items()}
    ramp = np.arange(width, dtype=np.uint8)[None, :, None].repeat(3, axis=0).repeat(3, axis=2)

    out = restorer(tmp_path, turn, constants=constants, size_multiple=16).restore(ramp, 1)

    assert out.shape == ramp.shape
    assert out[0, :5, 0].tolist() == first[:width]


def test_a_restorer_that_enlarges_by_itself_gives_exactly_its_scale(tmp_path, face):
    resize = helper.make_node("Resize", ["image", "", "scales"], ["out"], mode="nearest", nearest_mode="floor",
                              coordinate_transformation_mode="asymmetric")  # fmt: skip
    four = np.array([1, 1, 4, 4], np.float32)
    low = face[90:113, 80:99]

    ours = restorer(tmp_path, resize, constants={"scales": four}, enlarge="none", scales=[4], size_multiple=8)
    rival = real_esrgan(network(tmp_path / "rival.onnx", [resize], scales=four))

    enlarged = low.repeat(4, axis=0).repeat(4, axis=1)
    assert np.array_equal(ours.restore(low), enlarged)
    assert np.array_equal(rival.restore(low), enlarged)


def test_the_products_scale_is_the_largest_that_fits_or_the_smallest_there_is(tmp_path):
    ours = restorer(tmp_path)
    sides = (20, 64, 65, 128, 129, 256, 300)

    assert [ours.product_scale(np.zeros((10, side, 3), np.uint8)) for side in sides] == [4, 4, 2, 2, 1, 1, 1]
    assert restorer(tmp_path, scales=[8]).product_scale(np.zeros((100, 100, 3), np.uint8)) == 8


def test_a_scale_that_the_card_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tiny does not restore ×3; its card says \[4, 2, 1\]"):
        restorer(tmp_path).restore(np.zeros((8, 8, 3), np.uint8), 3)


def test_a_restorer_without_a_card_is_refused(tmp_path):
    path = network(tmp_path / "bare.onnx", [helper.make_node("Identity", ["image"], ["out"])])

    with pytest.raises(ValueError, match=r"bare\.onnx has no card"):
        OnnxRestorer(path)


@pytest.mark.parametrize("side", [19, 40, 67, 150])
def test_a_judged_restoration_is_the_products(face, side):
    low = cv2.resize(face, (side, side - 3), interpolation=cv2.INTER_AREA)
    product = FaceRestorer(OnnxEngine(Model.read(SGEN_SMALL), threads=1))

    ((expected, scale),) = product.restore([low])

    judged = OnnxRestorer(SGEN_SMALL)
    assert judged.product_scale(low) == scale
    assert np.abs(judged.restore(low).astype(int) - expected).max() <= 1


def test_a_face_is_aligned_as_the_product_aligns_it(tmp_path, face):
    judge = embedder(tmp_path, side=32)
    small, landmarks = cv2.resize(face, (48, 48), interpolation=cv2.INTER_AREA), scaled_landmarks(EYES, 48 / 256)

    for image, points in ((face, EYES), (small, landmarks)):
        product = align(image, points, np.array(judge.preparation.template), 32)
        assert np.array_equal(judge.align(image, points), product)


def test_lpips_feeds_red_green_blue_between_minus_one_and_one(tmp_path):
    nodes = [
        helper.make_node("Sub", ["image", "other"], ["less"]),
        helper.make_node("Mul", ["less", "counted"], ["red"]),
        helper.make_node("ReduceMax", ["red"], ["out"]),
    ]
    path = network(tmp_path / "far.onnx", nodes, counted=np.array([1.0, 0, 0], np.float32).reshape(1, 3, 1, 1))
    model = onnx.load(str(path))
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", 3, "h", "w"]))
    onnx.save(model, str(path))
    black, red, blue = (np.full((64, 64, 3), colour, np.uint8) for colour in ((0, 0, 0), (0, 0, 255), (255, 0, 0)))

    distance = Lpips(path)

    assert distance(red, black) == pytest.approx(2)
    assert distance(blue, black) == pytest.approx(0)


def test_the_real_judges_know_a_face_from_noise_and_one_person_from_another(shared, face):
    models = shared / "models"
    faces = load_faces(shared / "data/faces_val.tar")
    first = faces[0].identity
    mates = [each for each in faces if each.identity == first][:2]
    others = list({each.identity: each for each in faces if each.identity != first}.values())[:6]
    noise = np.random.default_rng(0).integers(0, 256, face.shape, dtype=np.uint8)

    for name in KNOWN_EMBEDDERS:
        rows = FaceEmbedder(models / f"{name}.onnx").embed(
            [each.image for each in (*mates, *others)], [each.landmarks for each in (*mates, *others)]
        )
        assert rows[0] @ rows[1] > max(rows[2:] @ rows[0]) + 0.2

    detector = FaceDetector(models / "face_detection_yunet_2023mar.onnx")
    boxes, scores = detector.detect(face)
    assert len(boxes) == len(scores) == 1
    assert np.all(boxes[0, :2] < EYES.min(axis=0)) and np.all(boxes[0, 2:] > EYES.max(axis=0))
    assert detector.finds(face, EYES) and not detector.finds(face, EYES / 8) and not detector.finds(noise, EYES)

    blurred, worse = (cv2.GaussianBlur(face, (0, 0), sigma) for sigma in (1, 4))
    distance = Lpips(models / "alexnet_lpips_distance.onnx")
    assert distance(face, face) == pytest.approx(0, abs=1e-6)
    assert 0.02 < distance(blurred, face) < distance(worse, face) < 1


def test_a_network_that_is_missing_or_none_is_said_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        OnnxRestorer(tmp_path / "none.onnx")

    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(ValueError, match=r"text\.onnx cannot be loaded as ONNX: [^\n]+$"):
        OnnxRestorer(tmp_path / "text.onnx")
