import math

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.data import astronaut

from streamer.geometry import (
    UPRIGHT,
    align,
    crop_transform,
    cut_crop,
    iou,
    roll_deg,
    scale_transform,
    similarity,
    transform_points,
    upright_landmarks,
)

FACE = np.array([170, 65, 275, 190], np.float32)
"""The box of the astronaut's face."""


def photo():
    return astronaut()[..., ::-1].copy()


def turned(points, degrees, centre):
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return ((points - centre) @ turn.T + centre).astype(np.float32)


def face(x, y, width, height, degrees=0.0):
    """Return a box about x, y and the landmarks of a face in it, turned clockwise."""
    box = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2], np.float32)
    return box, turned(upright_landmarks(box), degrees, np.array([x, y]))


coordinates = st.floats(-60, 700)
sides = st.floats(8, 300)
faces = st.builds(face, coordinates, coordinates, sides, sides, st.floats(-44, 44))


def test_iou_is_one_with_itself_none_apart_and_a_third_when_half_is_shared():
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]], np.float32)

    shares = iou(boxes, boxes)

    assert shares == pytest.approx(np.array([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]]))


def test_iou_of_no_boxes_and_of_empty_boxes_is_nothing():
    box = np.array([[0, 0, 10, 10]], np.float32)

    assert iou(np.empty((0, 4), np.float32), box).shape == (0, 1)
    assert iou(np.array([[3, 3, 3, 3]], np.float32), np.array([[3, 3, 3, 3]], np.float32)) == 0


@given(st.floats(0.05, 20), st.floats(-180, 180), st.floats(-500, 500), st.floats(-500, 500))
def test_similarity_finds_the_scale_turn_and_shift_that_were_applied(scale, degrees, x, y):
    points = UPRIGHT * 100
    moved = scale * turned(points, degrees, np.zeros(2)).astype(np.float64) + (x, y)

    found = similarity(points, moved)

    assert points @ found[:, :2].T + found[:, 2] == pytest.approx(moved, abs=1e-2)
    assert found.dtype == np.float64


def test_similarity_never_mirrors():
    found = similarity(UPRIGHT, UPRIGHT * (-1, 1))

    assert np.linalg.det(found[:, :2]) >= 0


def test_similarity_from_points_that_coincide_is_refused():
    with pytest.raises(ValueError, match="coincide"):
        similarity(np.ones((5, 2)), UPRIGHT)


@given(st.floats(-180, 180))
def test_roll_is_the_clockwise_turn_and_changes_sign_in_a_mirror(degrees):
    _, landmarks = face(100, 100, 60, 80, degrees)
    mirrored = (landmarks * (-1, 1))[[1, 0, 2, 4, 3]]

    assert math.cos(math.radians(roll_deg(landmarks) - degrees)) == pytest.approx(1, abs=1e-6)
    assert math.cos(math.radians(roll_deg(mirrored) + degrees)) == pytest.approx(1, abs=1e-6)


@given(faces)
def test_a_crop_is_a_square_of_1_6_times_the_larger_side_at_the_frames_own_scale(found):
    box, landmarks = found

    transform, side = crop_transform(box, landmarks)

    assert side == pytest.approx(1.6 * max(box[2] - box[0], box[3] - box[1]), abs=0.51)
    assert transform[:, :2] @ transform[:, :2].T == pytest.approx(np.eye(2))
    assert np.linalg.det(transform[:, :2]) == pytest.approx(1)


@given(faces)
def test_the_centre_of_the_box_is_the_centre_of_the_crop(found):
    box, landmarks = found

    transform, side = crop_transform(box, landmarks)

    centre = transform_points(transform, np.array([[(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]]))
    assert centre == pytest.approx(np.full((1, 2), (side - 1) / 2), abs=0.501)
    if transform[0, 1] != 0:
        assert centre == pytest.approx(np.full((1, 2), (side - 1) / 2), abs=1e-3)


@given(faces)
def test_the_eyes_of_a_turned_face_are_level_in_its_crop(found):
    box, landmarks = found

    transform, _ = crop_transform(box, landmarks)

    left_eye, right_eye, nose, mouth, _ = transform_points(transform, landmarks)
    assert left_eye[1] == pytest.approx(right_eye[1], abs=0.5)
    assert left_eye[0] < right_eye[0]
    assert left_eye[1] < nose[1] < mouth[1]


@given(st.floats(46, 180), st.sampled_from([-1, 1]))
def test_a_face_turned_beyond_45_degrees_is_cut_as_it_stands(degrees, sign):
    box, landmarks = face(100, 100, 60, 80, sign * degrees)

    transform, _ = crop_transform(box, landmarks)

    assert (transform[:, :2] == np.eye(2)).all()


@given(st.floats(-60, 180), st.floats(-60, 150), st.floats(8, 80), st.floats(8, 80))
def test_an_upright_crop_holds_the_frames_own_pixels_and_its_edge_beyond(x, y, width, height):
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    box, landmarks = face(x, y, width, height)

    crop, transform = cut_crop(image, box, landmarks)

    left, top = -transform[:, 2]
    side = len(crop)
    reach = 200
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    expected = padded[int(top) + reach : int(top) + reach + side, int(left) + reach : int(left) + reach + side]
    assert crop.shape == (side, side, 3)
    assert (crop == expected).all()


@pytest.mark.parametrize("degrees", [-30, -8, 12, 40])
def test_a_turned_head_is_cut_upright_and_not_mirrored(degrees):
    image = photo()
    centre = np.array([(FACE[0] + FACE[2]) / 2, (FACE[1] + FACE[3]) / 2], np.float64)
    upright, _ = cut_crop(image, FACE, upright_landmarks(FACE))
    turn = cv2.getRotationMatrix2D(centre, -degrees, 1)
    tilted = cv2.warpAffine(image, turn, image.shape[1::-1], flags=cv2.INTER_LANCZOS4)

    crop, transform = cut_crop(tilted, FACE, turned(upright_landmarks(FACE), degrees, centre))

    inner = slice(30, -30)
    assert cv2.PSNR(crop[inner, inner], upright[inner, inner]) > 30
    assert cv2.PSNR(crop[inner, inner], upright[inner, inner][:, ::-1]) < 20
    landmarks = transform_points(transform, turned(upright_landmarks(FACE), degrees, centre))
    expected = transform_points(crop_transform(FACE, upright_landmarks(FACE))[0], upright_landmarks(FACE))
    assert landmarks == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize("degrees", [0, 20])
def test_a_crop_beyond_the_frame_replicates_its_edge_and_is_a_copy(degrees):
    image = np.full((50, 50, 3), 200, np.uint8)
    image[:, :2] = (10, 20, 30)

    crop, _ = cut_crop(image, *face(0, 25, 40, 40, degrees))

    assert (crop[len(crop) // 2, :10] == (10, 20, 30)).all()
    crop[:] = 0
    assert image.max() == 200


def test_a_scaled_transform_leads_to_the_same_spot_of_the_enlarged_image():
    image = np.zeros((20, 20, 3), np.uint8)
    image[7, 12] = 255
    scaled = cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    transform = np.array([[1.0, 0, 3], [0, 1, -2]])  # the dot comes from 9, 9

    rows, columns = np.nonzero(scaled[..., 0])

    spot = transform_points(scale_transform(transform, 4), np.array([[9.0, 9.0]]))
    assert spot == pytest.approx(np.array([[columns.mean(), rows.mean()]]))


@given(faces, st.sampled_from([1, 2, 4, 8]))
def test_scaling_takes_x_to_s_x_and_half_of_s_less_one(found, scale):
    box, landmarks = found
    transform, _ = crop_transform(box, landmarks)

    before, after = (
        transform_points(transform, landmarks),
        transform_points(scale_transform(transform, scale), landmarks),
    )

    assert after == pytest.approx(scale * before + (scale - 1) / 2, abs=1e-2)


@pytest.mark.parametrize("scale", [0.2, 0.45, 0.7, 1.0, 3.0])
def test_an_aligned_face_has_its_landmarks_on_the_template(scale):
    template = UPRIGHT * 70 + 55.5
    side = round(112 / scale)
    landmarks = transform_points(scale_transform(np.eye(2, 3), 1 / scale), turned(template, 10, np.array([50, 60])))
    rows, columns = np.mgrid[:side, :side]
    spots = sum(np.exp(-((columns - x) ** 2 + (rows - y) ** 2) * scale**2 / 8) for x, y in landmarks)

    aligned = align(np.repeat(np.uint8(255 * spots)[..., None], 3, axis=2), landmarks, template, 112)

    assert aligned.shape == (112, 112, 3)
    for x, y in template:
        left, top = round(x) - 5, round(y) - 5
        spot = aligned[top : top + 11, left : left + 11, 0].astype(np.float64)
        rows, columns = np.mgrid[top : top + 11, left : left + 11]
        assert (columns * spot).sum() / spot.sum() == pytest.approx(x, abs=0.5)
        assert (rows * spot).sum() / spot.sum() == pytest.approx(y, abs=0.5)


def test_an_image_that_shrinks_much_is_averaged_and_does_not_alias():
    noise = np.random.default_rng(0).integers(0, 256, (672, 672, 3)).astype(np.uint8)
    template = UPRIGHT * 70 + 55.5
    landmarks = transform_points(scale_transform(np.eye(2, 3), 6), template)

    aligned = align(noise, landmarks, template, 112)

    assert aligned.std() < 1.5 * noise.std() / 6
