import csv
import tarfile
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from skimage.data import astronaut

from streamer.geometry import UPRIGHT, upright_landmarks
from streamer.quality import measure_quality, measure_yaw

SHARED = Path(__file__).parents[3] / "shared"

FACE = np.array([170, 65, 275, 190], np.float32)
"""The box of the astronaut's face."""


def photo(height_px):
    """Return the astronaut with a face of this height, and its box."""
    scale = height_px / 125
    image = cv2.resize(astronaut()[..., ::-1], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return image, FACE * np.float32(scale)


def noisy(image, sigma):
    noise = np.random.default_rng(1).normal(0, sigma, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def blurred(image, sigma):
    return cv2.GaussianBlur(image, (0, 0), sigma)


def jpeg(image, quality):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def measure(image, box):
    return measure_quality(image, box, upright_landmarks(box))


@pytest.mark.parametrize("height_px", [24, 48, 96])
@pytest.mark.parametrize("sigma", [5, 10, 20, 30])
def test_the_noise_added_is_the_noise_measured(height_px, sigma):
    image, box = photo(height_px)

    assert measure(noisy(image, sigma), box).noise == pytest.approx(sigma, rel=0.2, abs=2)


@pytest.mark.parametrize("height_px", [24, 48, 96])
def test_a_clean_face_has_next_to_no_noise(height_px):
    assert measure(*photo(height_px)).noise < 3


def test_noise_is_not_overlooked_beside_a_burnt_out_window():
    image, box = photo(96)
    image[:, :165] = 255

    assert measure(noisy(image, 15), box).noise == pytest.approx(15, rel=0.25)


def test_noise_that_hits_all_channels_alike_counts_the_same():
    image, box = photo(96)
    noise = np.random.default_rng(1).normal(0, 12, image.shape[:2])[..., None]

    assert measure(np.clip(np.rint(image + noise), 0, 255).astype(np.uint8), box).noise == pytest.approx(12, rel=0.2)


@pytest.mark.parametrize("height_px", [24, 48, 96])
def test_sharpness_falls_with_every_step_of_blur(height_px):
    image, box = photo(height_px)

    steps = [measure(image, box).sharpness, *(measure(blurred(image, s), box).sharpness for s in (0.7, 1.2, 2, 4))]

    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 0.7
    assert steps[-1] < 0.2


def test_the_same_blur_counts_nearly_the_same_at_any_size():
    found = [measure(blurred(image, 1.2), box).sharpness for image, box in map(photo, (24, 40, 64, 96))]

    assert max(found) - min(found) < 0.2


@pytest.mark.parametrize("sigma", [10, 20])
def test_noise_does_not_pass_for_sharpness(sigma):
    image, box = photo(96)

    soft = measure(noisy(blurred(image, 2), sigma), box).sharpness

    assert soft == pytest.approx(measure(blurred(image, 2), box).sharpness, abs=0.12)


@pytest.mark.parametrize("height_px", [24, 48, 96])
def test_blockiness_grows_as_jpeg_gets_worse_and_is_none_before(height_px):
    image, box = photo(height_px)

    steps = [measure(image, box).blockiness, *(measure(jpeg(image, q), box).blockiness for q in (80, 50, 20))]

    assert abs(steps[0]) < 0.12
    assert steps == sorted(steps)
    assert steps[-1] > 0.4


def test_blocks_are_looked_for_on_the_frames_grid_wherever_the_face_is():
    image, box = photo(96)
    damaged = jpeg(image, 40)

    shifted = measure(damaged[3:, 5:], box - np.array([5, 3, 5, 3]))
    framed = measure(cv2.copyMakeBorder(damaged, 8, 0, 16, 0, cv2.BORDER_CONSTANT), box + np.array([16, 8, 16, 8]))

    assert shifted.blockiness < 0.1
    assert framed.blockiness == pytest.approx(measure(damaged, box).blockiness, abs=1e-6)
    assert framed.blockiness > 0.4


def test_a_starved_video_is_blockier_and_softer_than_a_good_one(tmp_path):
    image, box = photo(80)
    frame = np.ascontiguousarray(image[:192, :256])

    good, starved = (measure(encode(tmp_path / f"{crf}.mp4", frame, crf), box) for crf in (12, 38))

    assert abs(good.blockiness) < 0.1
    assert starved.blockiness > good.blockiness + 0.08
    assert starved.sharpness < good.sharpness


def encode(path, image, crf):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", 25, options={"crf": str(crf)})
        stream.thread_count = 1  # what x264 writes depends on the number of its threads
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
        frames = [av.VideoFrame.from_ndarray(np.roll(image, i, axis=1), format="bgr24") for i in (4, 3, 2, 1, 0)]
        container.mux([packet for frame in [*frames, None] for packet in stream.encode(frame)])
    with av.open(str(path)) as container:
        *_, last = container.decode(video=0)
        return last.to_ndarray(format="bgr24")


@given(st.floats(-80, 80), st.floats(-40, 40), st.floats(10, 200))
def test_yaw_follows_the_turning_head_however_it_is_tilted_and_sized(yaw_deg, roll, size):
    yaw, roll = np.radians(yaw_deg), np.radians(roll)
    depth = np.array([0, 0, 0.9 * 0.1554, 0, 0])  # of the nose, before the plane of the other points
    seen = np.column_stack([UPRIGHT[:, 0] * np.cos(yaw) + depth * np.sin(yaw), UPRIGHT[:, 1]])
    tilt = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])

    assert measure_yaw(size * seen @ tilt.T + 50) == pytest.approx(np.sin(yaw), abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=5, max_size=5))
def test_yaw_of_any_landmarks_is_between_minus_one_and_one(points):
    assert -1 <= measure_yaw(np.array(points)) <= 1


def test_sizes_and_roll_are_those_of_the_frame():
    image, box = photo(96)
    landmarks = upright_landmarks(box)

    quality = measure_quality(image, box, landmarks)

    assert quality.face_height_px == pytest.approx(96, abs=0.1)
    assert quality.eye_distance_px == pytest.approx(landmarks[1, 0] - landmarks[0, 0])
    assert quality.roll_deg == pytest.approx(0, abs=1e-3)
    assert quality.yaw == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("box", [[-90, -90, -20, -20], [0, 0, 3, 3], [60, 60, 200, 200], [-500, -500, 900, 900]])
def test_a_face_at_the_edge_beyond_it_or_of_a_few_pixels_is_measured_all_the_same(box):
    image = np.zeros((64, 64, 3), np.uint8)

    quality = measure(image, np.array(box, np.float32))

    assert (quality.sharpness, quality.noise, quality.blockiness) == (0, 0, 0)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the faces of ../shared")
def test_on_real_faces_each_measure_ranks_its_own_degradation():
    faces = list(shared_faces(40))
    grids = {"noise": (0, 5, 10, 20, 30), "sharpness": (0.1, 0.7, 1.2, 2, 4), "blockiness": (95, 80, 60, 30)}
    degrade = {"noise": noisy, "sharpness": blurred, "blockiness": jpeg}

    for name, grid in grids.items():
        found = [
            (truth, getattr(measure(degrade[name](image, truth), box), name)) for truth in grid for image, box in faces
        ]
        assert abs(spearmanr(*np.transpose(found)).statistic) > 0.9, name


def shared_faces(count):
    with (SHARED / "data/faces_val.csv").open() as lines, tarfile.open(SHARED / "data/faces_val.tar") as tar:
        for row in list(csv.DictReader(lines))[::7][:count]:
            image = cv2.imdecode(np.frombuffer(tar.extractfile(row["file"]).read(), np.uint8), cv2.IMREAD_COLOR)
            box = np.array([float(row[f"face_{side}"]) for side in ("x1", "y1", "x2", "y2")], np.float32)
            scale = 64 / (box[3] - box[1])
            yield cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), box * scale


@pytest.mark.skipif(not SHARED.exists(), reason="needs the clips of ../shared")
def test_the_starved_carphone_is_told_from_the_pristine_one_in_every_frame():
    box = np.array([43, 28, 93, 91], np.float32)  # the man's face moves within it
    qualities = {}
    for name in ("pristine", "lowbitrate"):
        with av.open(str(SHARED / f"data/videos/carphone_qcif_{name}.mp4")) as container:
            frames = [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]
        qualities[name] = [measure(image, box) for image in frames[::10]]

    assert max(q.blockiness for q in qualities["pristine"]) < min(q.blockiness for q in qualities["lowbitrate"])
    assert min(q.sharpness for q in qualities["pristine"]) > max(q.sharpness for q in qualities["lowbitrate"])
