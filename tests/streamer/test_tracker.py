from datetime import UTC, datetime
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamer.geometry import upright_landmarks
from streamer.tracker import FaceTracker
from streamer.types import Detections, Moment

SHARED = Path(__file__).parents[3] / "shared"
KINDS = ["bytetrack", "cbiou"]

pytestmark = pytest.mark.filterwarnings("error")


def moment(pts, frame=0):
    return Moment("entrance", frame, pts, datetime(2026, 1, 1, tzinfo=UTC), "file")


def detections(*faces):
    """Return faces given as x, y, score, 40 px wide and 50 high."""
    if not faces:
        return Detections.none()
    boxes = np.array([[x, y, x + 40, y + 50] for x, y, _ in faces], np.float32)
    scores = np.array([score for *_, score in faces], np.float32)
    return Detections(boxes, np.stack([upright_landmarks(box) for box in boxes]), scores)


def tracker(kind="bytetrack", **settings):
    return FaceTracker(threshold=0.5, weak_threshold=0.4, kind=kind, **settings)


def follow(tracker, frames, *, fps=25.0, start=0.0):
    return [tracker.update(moment(start + i / fps, i), detections(*faces)) for i, faces in enumerate(frames)]


def ids(tracks):
    return [track.id for track in tracks]


@pytest.mark.parametrize("kind", KINDS)
def test_a_face_appears_once_is_seen_in_each_frame_and_leaves_once(kind):
    walker = tracker(kind)

    updates = follow(walker, [[(10 + 2 * i, 20, 0.9)] for i in range(30)])
    left = walker.finish()

    assert [ids(update.appeared) for update in updates if update.appeared] == [[1]]
    assert [ids(update.tracks) for update in updates[1:]] == [[1]] * 29
    assert not any(update.left for update in updates)
    assert ids(left) == [1]
    assert left[0].moment.frame == 29
    assert left[0].box[0] == 10 + 2 * 29
    assert walker.finish() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_face_seen_in_one_frame_alone_is_no_track(kind):
    walker = tracker(kind)

    updates = follow(walker, [[(10, 20, 0.9)], *[[]] * 60])

    assert not any(update.tracks or update.appeared or update.left for update in updates)
    assert walker.finish() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fps", [5, 12, 30, 60])
def test_a_track_ends_when_unseen_for_lost_after_seconds_whatever_the_frame_rate(kind, fps):
    walker = tracker(kind, lost_after=1.0)

    updates = follow(walker, [[(10, 20, 0.9)]] * 4 + [[]] * (2 * fps), fps=fps)

    ends = [(i, update.left) for i, update in enumerate(updates) if update.left]
    [(frame, [track])] = ends
    assert track.moment.frame == 3
    assert 1.0 <= (frame - 3) / fps + 1e-9 <= 1.0 + 2 / fps


@pytest.mark.parametrize("kind", KINDS)
def test_a_face_that_comes_back_in_time_keeps_its_id(kind):
    walker = tracker(kind)

    updates = follow(walker, [[(10, 20, 0.9)]] * 5 + [[]] * 20 + [[(12, 20, 0.9)]] * 5)

    assert ids(updates[-1].tracks) == [1]
    assert not any(update.left for update in updates)


@pytest.mark.parametrize("kind", KINDS)
def test_weak_detections_keep_a_track_alive_and_begin_none(kind):
    walker = tracker(kind)

    updates = follow(walker, [[(10, 20, 0.9), (300, 20, 0.45)]] * 3 + [[(10, 20, 0.42), (300, 20, 0.45)]] * 60)

    assert [ids(update.tracks) for update in updates[1:]] == [[1]] * 62
    assert updates[-1].tracks[0].score == pytest.approx(0.42)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_weaker_than_weak_is_not_seen(kind):
    walker = tracker(kind)

    updates = follow(walker, [[(10, 20, 0.9)]] * 3 + [[(10, 20, 0.39)]] * 60)

    assert not any(update.tracks for update in updates[3:])
    assert sum(len(update.left) for update in updates) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_back_in_time_begins_a_new_tracker_at_once(kind):
    walker = tracker(kind)
    follow(walker, [[(10, 20, 0.9), (200, 20, 0.9)]] * 5, start=3600)

    updates = follow(walker, [[(10, 20, 0.9), (200, 20, 0.9)]] * 3, start=10)

    assert [ids(update.left) for update in updates] == [[1, 2], [], []]
    assert [ids(update.appeared) for update in updates] == [[], [3, 4], []]


@pytest.mark.parametrize("kind", KINDS)
def test_a_leap_longer_than_lost_after_begins_a_new_tracker(kind):
    walker = tracker(kind, lost_after=1.5)
    follow(walker, [[(10, 20, 0.9)]] * 5)

    updates = follow(walker, [[(10, 20, 0.9)]] * 3, start=4 / 25 + 1.6)

    assert ids(updates[0].left) == [1]
    assert ids(updates[1].appeared) == [2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_leap_shorter_than_lost_after_is_bridged(kind):
    walker = tracker(kind, lost_after=1.5)
    follow(walker, [[(10, 20, 0.9)]] * 5)

    updates = follow(walker, [[(10, 20, 0.9)]] * 3, start=4 / 25 + 1.4)

    assert [ids(update.tracks) for update in updates] == [[1]] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_moment_that_comes_twice_is_followed(kind):
    walker = tracker(kind)

    updates = [walker.update(moment(pts), detections((10, 20, 0.9))) for pts in (0, 0, 0, 0.04, 0.04, 0.08)]

    assert [ids(update.tracks) for update in updates] == [[], [1], [1], [1], [1], [1]]


@pytest.mark.parametrize("kind", KINDS)
def test_two_faces_that_cross_keep_their_ids(kind):
    walker = tracker(kind)

    updates = follow(walker, [[(4 * i, 20, 0.9), (240 - 4 * i, 32, 0.8)] for i in range(60)])

    rightward = [track.id for update in updates[1:] for track in update.tracks if track.score > 0.85]
    leftward = [track.id for update in updates[1:] for track in update.tracks if track.score < 0.85]
    assert len(set(rightward)) == len(set(leftward)) == 1
    assert len(rightward) == len(leftward) == 59


@pytest.mark.parametrize("kind", KINDS)
def test_a_track_carries_its_own_landmarks_and_score_in_whatever_order_faces_are_found(kind):
    walker = tracker(kind)
    rng = np.random.default_rng(0)
    places = [(10, 0.95), (120, 0.9), (230, 0.6), (340, 0.55)]

    updates = follow(walker, [[(x, 20, score) for x, score in rng.permutation(places)] for _ in range(20)])

    for track in (track for update in updates for track in update.tracks):
        assert (track.landmarks == upright_landmarks(track.box)).all()
        assert track.score == pytest.approx(dict(places)[int(track.box[0])])


faces = st.tuples(st.sampled_from([0, 15, 30, 200, 215, 400]), st.sampled_from([0, 20, 300]), st.floats(0.3, 1))
steps = st.tuples(
    st.sampled_from([0.0, 0.04, 0.04, 0.04, 0.2, 1.2, 3.0, -5.0]),
    st.lists(faces, max_size=5, unique_by=lambda f: f[:2]),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(st.lists(steps, max_size=40))
def test_whatever_comes_ids_count_up_and_each_track_appears_once_is_seen_and_leaves_once(kind, stream):
    walker = tracker(kind, lost_after=1.0)
    appeared, last_seen, left, pts = [], {}, [], 100.0

    for i, (step, found) in enumerate(stream):
        pts += step
        update = walker.update(moment(pts, i), detections(*found))
        appeared += ids(update.appeared)
        assert set(ids(update.appeared)) <= set(ids(update.tracks)) <= set(appeared) - set(ids(left))
        assert len(set(ids(update.tracks))) == len(update.tracks)
        last_seen |= {track.id: track for track in update.tracks}
        left += update.left
        assert all(track is last_seen[track.id] for track in update.left)
        assert not set(ids(update.left)) & set(ids(update.tracks))
    left += walker.finish()

    assert appeared == list(range(1, len(appeared) + 1))
    assert sorted(ids(left)) == appeared
    assert all(track is last_seen[track.id] for track in left)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the clips and the detector of ../shared")
def test_three_people_in_a_corridor_are_three_tracks_from_first_to_last_frame():
    model = str(SHARED / "models/yunet_n_dynamic.onnx")
    walker = FaceTracker(threshold=0.6, weak_threshold=0.4)
    seen = {}

    with av.open(str(SHARED / "data/videos/corridor_three_walk_480x270.mp4")) as container:
        for i, frame in enumerate(container.decode(video=0)):
            image = frame.to_ndarray(format="bgr24")
            detector = cv2.FaceDetectorYN.create(model, "", image.shape[1::-1], 0.4, 0.45)
            rows = detector.detect(image)[1]
            boxes = np.column_stack([rows[:, :2], rows[:, :2] + rows[:, 2:4]])
            found = Detections(boxes, rows[:, 4:14].reshape(-1, 5, 2), rows[:, 14])
            for track in walker.update(moment(frame.time, i), found).tracks:
                seen.setdefault(track.id, []).append(i)

    assert sorted(seen) == [1, 2, 3]
    assert all(len(frames) >= 38 for frames in seen.values())
