from datetime import UTC, datetime

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.data import astronaut

from streamer.geometry import crop_transform, cut_crop, upright_landmarks
from streamer.selector import CropSelector
from streamer.types import Frame, Moment, Track

PHOTO = astronaut()[60:195, 155:290, ::-1]
"""The astronaut's face and a little more, 135 px wide and high."""


def sight(pts, height_px=40.0, *, track=1, camera="entrance", blur=0.0, yaw=0.0):
    """Return a frame with one face, and its track."""
    image = np.full((240, 320, 3), 90, np.uint8)
    side = round(height_px * 1.08)
    face = cv2.resize(PHOTO, (side, side), interpolation=cv2.INTER_AREA)
    image[40 : 40 + side, 60 : 60 + side] = face
    image = cv2.GaussianBlur(image, (0, 0), blur) if blur else image
    centre = np.array([60 + side / 2, 40 + side / 2])
    half = np.array([0.42, 0.5]) * height_px
    box = np.concatenate([centre - half, centre + half]).astype(np.float32)
    landmarks = upright_landmarks(box)
    landmarks[2, 0] += yaw * height_px
    moment = Moment(camera, round(pts * 25), pts, datetime(2026, 1, 1, tzinfo=UTC), "file")
    return Frame(moment, image, 0.0), Track(track, moment, box, landmarks, 0.9)


def select(selector, *args, **kwargs):
    frame, track = sight(*args, **kwargs)
    return selector.select(frame, [track])


def test_a_track_gives_a_crop_at_first_sight_cut_upright_with_its_quality():
    frame, track = sight(0.0)

    [crop] = CropSelector().select(frame, [track])

    expected, transform = cut_crop(frame.image, track.box, track.landmarks)
    assert crop.track is track
    assert (crop.image == expected).all()
    assert (crop.transform == transform).all()
    assert crop.image.shape == (64, 64, 3)
    assert crop.quality.face_height_px == pytest.approx(40)
    assert crop.landmarks[0, 1] == pytest.approx(crop.landmarks[1, 1], abs=0.1)


def test_a_crop_is_a_copy_of_its_frame():
    frame, track = sight(0.0)

    [crop] = CropSelector().select(frame, [track])
    frame.image[:] = 0

    assert crop.image.max() > 100


def test_the_same_face_again_gives_nothing_until_retry_s_have_passed_in_the_stream():
    selector = CropSelector(retry_s=1.0)

    sent = [round(pts, 2) for pts in np.arange(100, 103.2, 0.125) if select(selector, float(pts))]

    assert sent == [100, 101, 102, 103]


def test_a_larger_face_is_sent_when_it_is_larger_by_the_margin():
    selector = CropSelector(margin=0.15, retry_s=100)
    select(selector, 0.0, 50.0)

    assert not select(selector, 0.1, 52.0)
    assert select(selector, 0.2, 75.0)
    assert not select(selector, 0.3, 50.0)


def test_what_is_clearly_better_than_all_that_was_sent_goes_out_though_one_nearly_as_good_waits():
    selector = CropSelector(margin=0.2, retry_s=100)
    select(selector, 0.0, 60.0)

    assert not select(selector, 0.1, 68.0)
    assert select(selector, 0.2, 72.0)


def test_a_face_far_larger_than_any_embedder_needs_gains_nothing_by_growing():
    selector = CropSelector(retry_s=100)
    select(selector, 0.0, 130.0)

    assert not select(selector, 0.1, 180.0)


def test_a_sharp_view_is_sent_after_a_blurred_one_and_not_the_other_way_round():
    after_blur, after_sharp = CropSelector(retry_s=100), CropSelector(retry_s=100)
    select(after_blur, 0.0, blur=3.0)
    select(after_sharp, 0.0)

    assert select(after_blur, 0.1)
    assert not select(after_sharp, 0.1, blur=3.0)


def test_a_frontal_view_is_sent_after_a_profile_and_not_the_other_way_round():
    after_profile, after_frontal = CropSelector(retry_s=100), CropSelector(retry_s=100)
    select(after_profile, 0.0, yaw=0.25)
    select(after_frontal, 0.0)

    assert select(after_profile, 0.1)
    assert not select(after_frontal, 0.1, yaw=0.25)


def test_a_retry_sends_the_best_crop_since_the_last_one():
    selector = CropSelector(retry_s=1.0)
    views = [(0.0, 0.0), (0.3, 3.0), (0.6, 1.0), (0.9, 2.0), (1.2, 3.0)]

    sent = [crop.track.moment.pts for pts, blur in views for crop in select(selector, pts, blur=blur)]

    assert sent == [0.0, 0.6]


def test_a_retry_that_is_worse_does_not_lower_the_bar():
    selector = CropSelector(retry_s=1.0)
    select(selector, 0.0, 80.0)

    assert select(selector, 1.0, 40.0)
    assert not select(selector, 1.1, 60.0)


def test_a_face_below_the_least_size_is_never_sent():
    selector = CropSelector(min_size_px=20)

    assert not any(select(selector, float(pts), 19.5) for pts in range(5))
    assert select(selector, 5.0, 20.5)


def test_a_forgotten_track_is_at_first_sight_again_and_an_unknown_one_is_no_matter():
    selector = CropSelector()
    select(selector, 0.0)

    selector.forget("entrance", 1)
    selector.forget("entrance", 99)

    assert select(selector, 0.1)


def test_tracks_of_one_id_on_two_cameras_are_two():
    selector = CropSelector()

    assert select(selector, 0.0, camera="entrance")
    assert select(selector, 0.1, camera="exit")
    selector.forget("exit", 1)
    assert not select(selector, 0.2, camera="entrance")


def test_each_track_of_a_frame_is_judged_by_itself():
    selector = CropSelector()
    frame, first = sight(0.0)
    second = Track(2, first.moment, first.box + 3, first.landmarks + 3, 0.9)
    selector.select(frame, [first])

    assert [crop.track.id for crop in selector.select(frame, [first, second])] == [2]


views = st.tuples(st.integers(1, 3), st.floats(8, 120), st.sampled_from([0.0, 1.0, 3.0]), st.floats(-0.3, 0.3))


@settings(deadline=None, max_examples=25)
@given(st.lists(views, max_size=40))
def test_the_same_stream_gives_the_same_crops_twice(stream):
    runs = []
    for _ in range(2):
        selector = CropSelector()
        runs.append(
            [
                (crop.track.id, crop.track.moment, crop.image.tobytes(), crop.quality)
                for i, (track, height, blur, yaw) in enumerate(stream)
                for crop in select(selector, i * 0.2, height, track=track, blur=blur, yaw=yaw)
            ]
        )

    assert runs[0] == runs[1]


def test_a_turned_face_is_sent_upright():
    frame, track = sight(0.0)
    centre = (track.box[:2] + track.box[2:]) / 2
    turn = np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    tilted = Track(1, track.moment, track.box, ((track.landmarks - centre) @ turn.T + centre).astype(np.float32), 0.9)

    [crop] = CropSelector().select(frame, [tilted])

    assert crop.quality.roll_deg == pytest.approx(np.degrees(0.4), abs=0.1)
    assert crop.landmarks[0, 1] == pytest.approx(crop.landmarks[1, 1], abs=0.1)
    assert len(crop.image) == crop_transform(tilted.box, tilted.landmarks)[1]
