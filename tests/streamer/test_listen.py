import json
import logging
from dataclasses import replace
from datetime import UTC, datetime

import cv2
import numpy as np
import pytest

from streamer import types, wire
from streamer.listen import describe, readable, save_side_by_side, to_json_line

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def received(event: types.Event, **added) -> wire.WireEvent:
    parts = wire.encode(event, stream="box", epoch="e1", seq=7, topic_seq=3, published_at=NOON)
    parts[1] = json.dumps(json.loads(parts[1]) | added).encode()
    return wire.decode(parts)


def a_track() -> types.Track:
    return types.Track(4, types.Moment("hall", 12, 0.48, NOON, "file"), np.zeros(4), np.zeros((5, 2)), 0.9)


def a_face(*, scale: int | None = 4) -> types.FaceIdentified:
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    crop = types.Crop(a_track(), image, np.eye(2, 3), types.Quality(23.4, 8, 0.5, 3, 0, 0, 0))
    if scale is None:
        return types.FaceIdentified(crop, types.Route("none", "the face is large"), None, None, "no embedder")
    restored = image[::-1].repeat(scale, 0).repeat(scale, 1)
    restoration = types.Restoration(restored, "sgen-small", "ab" * 32, scale, "onnxruntime-cpu", "fp32")
    return types.FaceIdentified(crop, types.Route("sgen-small", "the face is small"), restoration, None, "no embedder")


def test_the_saved_picture_is_the_enlarged_crop_beside_the_restored_image(tmp_path):
    event = received(a_face())

    path = save_side_by_side(event, tmp_path / "faces")

    picture = cv2.imread(str(path))
    crop, restored = event.images["crop"], event.images["restored"]
    assert np.array_equal(picture[:, :80], cv2.resize(crop, (80, 80), interpolation=cv2.INTER_CUBIC))
    assert np.array_equal(picture[:, 80:], restored)
    assert path == tmp_path / "faces" / "e1_hall_0004_000012.png"


def test_with_route_none_the_saved_picture_is_the_crop(tmp_path):
    event = received(a_face(scale=None))

    assert np.array_equal(cv2.imread(str(save_side_by_side(event, tmp_path))), event.images["crop"])


def test_an_event_without_a_crop_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"face\.left carries no crop"):
        save_side_by_side(received(types.FaceLeft(a_track())), tmp_path)


def test_the_json_line_is_the_header_with_what_a_newer_app_has_added():
    line = to_json_line(received(a_face(), liveness=0.9))

    assert "\n" not in line
    assert json.loads(line)["kind"] == "face.identified"
    assert json.loads(line)["liveness"] == 0.9


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (types.FaceAppeared(a_track()), "12:00:00 hall track 4 appeared"),
        (types.FaceLeft(a_track()), "12:00:00 hall track 4 left"),
        (
            a_face(),
            "12:00:00 hall track 4 identified: 23 px, restored by sgen-small x4 (the face is small)",
        ),
        (a_face(scale=None), "12:00:00 hall track 4 identified: 23 px, not restored (the face is large)"),
        (
            types.CameraStatus("hall", "live", 24.96, 0.04, {"stale": 3}),
            "12:00:00 hall is live: 25.0 fps, stale dropped 3",
        ),
        (types.CameraStatus("hall", "lost", 0, None, {}, "refused"), "12:00:00 hall is lost: refused"),
        (types.CameraStatus("hall", "ended", 0, None, {}), "12:00:00 hall is ended"),
        (
            types.SystemStatus("ended", "1", {}, {}, {}, {"frames": 5, "faces": 2}),
            "12:00:00 box is ended: frames 5, faces 2",
        ),
    ],
)
def test_an_event_is_one_line_for_people(event, line):
    assert describe(received(event)) == line


def test_who_was_recognised_is_in_the_line():
    match = {"identity": "ann", "list": "staff", "similarity": 0.523, "basis": "fused"}
    match |= {"expected_false_alarms_per_day": None, "runner_up": None}

    assert describe(received(a_face(), match=match)).endswith("(the face is small); MATCH ann by list staff: 0.52")
    match["expected_false_alarms_per_day"] = 0.03
    assert describe(received(a_face(), match=match)).endswith("0.52, 0.03 false alarms a day to expect")


def test_who_comes_near_a_match_is_in_the_line_and_is_no_match():
    scores = {"ann": types.Score(0.3, 0.4, 0.41), "bob": types.Score(0.3, 0.4, 0.4)}

    assert describe(received(replace(a_face(), scores=scores))).endswith("; near: ann 0.41, bob 0.40")
    assert describe(received(replace(a_face(), scores={}))).endswith("(the face is small)")


def test_what_was_drawn_by_a_photo_is_saved_apart_beside_that_photo(tmp_path):
    drawn, guide = (np.full((256, 256, 3), grey, np.uint8) for grey in (50, 200))
    points = np.zeros((5, 2))
    picture = types.GuidedPicture(drawn, np.eye(2, 3), points, guide, points, "ann", "p1", "gfrnet-small", "ab" * 32)
    event = received(replace(a_face(), guided=picture))

    path = save_side_by_side(event, tmp_path)

    assert cv2.imread(str(path)).shape == (80, 160, 3), "crop and restored alone"
    apart = cv2.imread(str(path.with_suffix(".drawn.png")))
    assert (apart[:, :256] == 200).all() and (apart[:, 256:] == 50).all()


def test_a_message_that_cannot_be_read_is_told_and_passed_over(caplog):
    class Subscriber:
        def __init__(self) -> None:
            self.messages = [[b"weather", b"rain"], wire.encode(
                types.FaceLeft(a_track()), stream="box", epoch="e1", seq=7, topic_seq=3, published_at=NOON
            )]  # fmt: skip

        def __iter__(self):
            return self

        def __next__(self) -> wire.WireEvent:
            if not self.messages:
                raise StopIteration
            return wire.decode(self.messages.pop(0))

    with caplog.at_level(logging.WARNING):
        kinds = [event.header.kind for event in readable(Subscriber())]

    assert kinds == ["face.left"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not JSON" in caplog.text
