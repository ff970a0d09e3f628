import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from streamer import types, wire

ROOT = Path(__file__).parents[2]
NOON = datetime(2026, 11, 21, 12, 0, 0, 250000, tzinfo=UTC)
NUMBERING = {"stream": "box", "epoch": "20261121T120000000000Z", "seq": 7, "topic_seq": 3, "published_at": NOON}


def a_track(*, camera="hall", frame=12, angle_deg=0.0) -> types.Track:
    points = np.float32([[110, 100], [130, 100], [120, 112], [112, 122], [128, 122]])
    turn = cv2.getRotationMatrix2D((120, 110), angle_deg, 1)
    return types.Track(
        id=4,
        moment=types.Moment(camera, frame, 0.48, NOON, "file"),
        box=np.float32([100, 85, 140, 135]),
        landmarks=(points @ turn[:, :2].T + turn[:, 2]).astype(np.float32),
        score=0.87654,
    )


def a_crop(*, angle_deg=0.0, side=80) -> types.Crop:
    turn = cv2.getRotationMatrix2D((120, 110), -angle_deg, 1)
    turn[:, 2] += (side - 1) / 2 - np.array([120, 110])
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    return types.Crop(a_track(angle_deg=angle_deg), image, turn, a_quality())


def a_quality(**changes) -> types.Quality:
    numbers = {"face_height_px": 50, "eye_distance_px": 20, "sharpness": 0.4, "noise": 6.1, "blockiness": 0.2}
    return types.Quality(**(numbers | {"yaw": 0.1, "roll_deg": -3.0} | changes))


def an_identified(*, scale: int | None = 4, **crop) -> types.FaceIdentified:
    cut = a_crop(**crop)
    restoration = None
    if scale is not None:
        image = cv2.resize(cut.image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        restoration = types.Restoration(image, "sgen-small", "ab" * 32, scale, "onnxruntime-cpu", "fp32")
    route = types.Route("none" if scale is None else "sgen-small", "the face is small")
    return types.FaceIdentified(cut, route, restoration, None, "no embedder")


CAMERA_STATUS = types.CameraStatus("hall", "live", 24.987, 0.0402, {"stale": 2}, "", a_track().moment)
SYSTEM_STATUS = types.SystemStatus(
    state="ready",
    version="0.1.0",
    engines={"detect": {"model": "centerface", "plan": "0123456789ab"}},
    batch_sizes={"detect": {1: 5, 8: 2}},
    stage_seconds={"detect": 1.23456},
    counts={"frames": 9},
    face_sizes={24: 3, 100: 1},
    building={
        "restore": types.Building("bf16: comparing", 0.25, 12.345),
        "embed": types.Building("fp32: comparing", 0.0, None),
    },
)
EVENTS = {
    "face.appeared": types.FaceAppeared(a_track()),
    "face.identified": an_identified(),
    "face.left": types.FaceLeft(a_track()),
    "camera.status": CAMERA_STATUS,
    "system.status": SYSTEM_STATUS,
}


def encode(event: types.Event, **changes) -> list[bytes]:
    return wire.encode(event, **(NUMBERING | changes))


def header_of(event: types.Event, **changes) -> dict:
    return json.loads(encode(event, **changes)[1])


@pytest.mark.parametrize("kind", EVENTS)
def test_every_event_says_what_all_events_say(kind):
    header = header_of(EVENTS[kind])

    assert list(header)[:8] == ["schema", "kind", "id", "stream", "epoch", "seq", "topic_seq", "published_at"]
    assert header["schema"] == "streamer.event/1"
    assert header["kind"] == kind
    assert (header["stream"], header["seq"], header["topic_seq"]) == ("box", 7, 3)
    assert header["published_at"] == "2026-11-21T12:00:00.250000Z"


@pytest.mark.parametrize("kind", EVENTS)
def test_every_event_comes_back_as_it_was_sent(kind):
    parts = encode(EVENTS[kind])

    event = wire.decode(parts)

    assert event.topic == wire.topic_of(EVENTS[kind]) == parts[0].decode()
    assert json.loads(event.header.model_dump_json(by_alias=True)) == json.loads(parts[1])


def test_topics_are_of_the_camera_or_of_the_system():
    topics = {kind: wire.topic_of(event) for kind, event in EVENTS.items()}

    assert topics == {
        "face.appeared": "face/hall",
        "face.identified": "face/hall",
        "face.left": "face/hall",
        "camera.status": "status/hall",
        "system.status": "system",
    }


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("face.left", ["box", "20261121T120000000000Z", "hall", 4, 12, "face.left"]),
        ("camera.status", ["box", "20261121T120000000000Z", "hall", None, 3, "camera.status"]),
        ("system.status", ["box", "20261121T120000000000Z", None, None, 3, "system.status"]),
    ],
)
def test_the_id_can_be_made_again_from_the_header(kind, key):
    compact = json.dumps(key, separators=(",", ":"))

    assert header_of(EVENTS[kind])["id"] == hashlib.sha256(compact.encode()).hexdigest()[:32]


def test_a_face_carries_its_place_in_frame_and_time():
    header = header_of(EVENTS["face.appeared"])

    assert header["box"] == [100, 85, 140, 135]
    assert header["landmarks"][2] == [120, 112]
    assert (header["track"], header["score"], header["frame"], header["pts_s"]) == (4, 0.8765, 12, 0.48)
    assert (header["captured_at"], header["clock"]) == ("2026-11-21T12:00:00.250000Z", "file")


def test_an_unidentified_face_has_every_field_of_a_face_and_no_images():
    header, *images = encode(EVENTS["face.left"])[1:]
    fields = json.loads(header)

    assert images == []
    assert set(fields) == set(header_of(EVENTS["face.identified"]))
    assert fields["images"] == []
    assert fields["scores"] is None and fields["scores_absent"]


def test_times_go_out_in_utc_wherever_the_box_stands():
    tokyo = NOON.astimezone(timezone(timedelta(hours=9)))

    assert header_of(SYSTEM_STATUS, published_at=tokyo)["published_at"] == "2026-11-21T12:00:00.250000Z"


def test_without_scores_the_event_says_why():
    header = header_of(an_identified())

    assert (header["scores"], header["scores_absent"], header["match"]) == (None, "no embedder", None)


def test_images_are_the_crop_and_the_restored_one_with_the_hash_of_their_bytes():
    parts = encode(an_identified(scale=2))

    entries = json.loads(parts[1])["images"]

    assert [entry["name"] for entry in entries] == ["crop", "restored"]
    assert [entry["part"] for entry in entries] == [2, 3]
    assert [(entry["width"], entry["height"]) for entry in entries] == [(80, 80), (160, 160)]
    assert [entry["sha256"] for entry in entries] == [hashlib.sha256(part).hexdigest() for part in parts[2:]]
    assert all(entry["for_recognition"] for entry in entries)
    assert not {"model", "model_sha256", "guided_by"} & set(entries[1])


def test_png_images_come_back_bit_for_bit():
    event = an_identified()

    images = wire.decode(encode(event)).images

    assert np.array_equal(images["crop"], event.crop.image)
    assert np.array_equal(images["restored"], event.restoration.image)


def test_jpeg_is_sent_where_it_is_asked_for():
    smooth = cv2.GaussianBlur(a_crop().image, (0, 0), 5)
    event = types.FaceIdentified(
        types.Crop(a_track(), smooth, a_crop().transform, a_quality()), types.Route("none", "large"), None, None, "none"
    )

    parts = encode(event, image_format="jpeg")

    assert parts[2].startswith(b"\xff\xd8")
    assert json.loads(parts[1])["images"][0]["format"] == "jpeg"
    assert cv2.PSNR(wire.decode(parts).images["crop"], smooth) > 40


def test_route_none_sends_the_crop_alone():
    header = header_of(an_identified(scale=None))

    assert header["restoration"] is None
    assert header["route"]["restorer"] == "none"
    assert [entry["name"] for entry in header["images"]] == ["crop"]


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("angle_deg", [0, 30])
def test_transform_and_landmarks_fit_the_pixels_of_each_image(scale, angle_deg):
    """A frame with five bright dots is cut and enlarged; the dots lie where the header says, in both images."""
    track = a_track(angle_deg=angle_deg)
    frame = np.zeros((240, 320, 3), np.uint8)
    for x, y in track.landmarks:
        cv2.circle(frame, (round(float(x) * 16), round(float(y) * 16)), 2 * 16, (255, 255, 255), -1, cv2.LINE_AA, 4)
    cut = a_crop(angle_deg=angle_deg)
    image = cv2.warpAffine(frame, cut.transform, (80, 80))
    restored = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    restoration = types.Restoration(restored, "x", "ab" * 32, scale, "b", "fp32")
    crop = types.Crop(track, image, cut.transform, a_quality())
    event = types.FaceIdentified(crop, types.Route("x", "y"), restoration, None, "no embedder")

    received = wire.decode(encode(event))

    for entry in received.header.images:
        matrix = np.array(entry.transform)
        from_frame = track.landmarks @ matrix[:, :2].T + matrix[:, 2]
        assert np.abs(from_frame - entry.landmarks).max() < 0.02
        for x, y in entry.landmarks:
            centre = _centre_of_light(received.images[entry.name], x, y, radius=4 * entry.width / 80)
            assert np.hypot(centre[0] - x, centre[1] - y) < 0.15 * entry.width / 80


def _centre_of_light(image, x, y, *, radius):
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    weight = image[..., 0] * (np.hypot(columns - x, rows - y) <= radius)
    return (columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum()


def test_the_same_event_gives_the_same_bytes():
    assert encode(an_identified()) == encode(an_identified())


def test_another_run_over_the_same_file_differs_in_epoch_time_and_id_alone():
    first = header_of(an_identified())
    second = header_of(an_identified(), epoch="later", published_at=NOON + timedelta(hours=1))

    assert {name for name in first if first[name] != second[name]} == {"epoch", "published_at", "id"}


def test_a_camera_without_a_frame_yet_has_nulls_for_it():
    header = header_of(types.CameraStatus("hall", "connecting", 0.0, None, {}))

    assert [header[name] for name in ("captured_at", "clock", "pts_s", "frame", "frame_age_s")] == [None] * 5
    assert (header["state"], header["drops"]) == ("connecting", {})


def test_batch_sizes_are_numbers_again_after_the_wire():
    assert wire.decode(encode(SYSTEM_STATUS)).header.batch_sizes == {"detect": {1: 5, 8: 2}}


def test_a_status_tells_the_sizes_of_faces_and_the_plans_that_are_being_built():
    header = header_of(SYSTEM_STATUS)

    assert header["face_sizes"] == {"24": 3, "100": 1}
    assert header["building"] == {
        "restore": {"step": "bf16: comparing", "share": 0.25, "eta_s": 12.3},
        "embed": {"step": "fp32: comparing", "share": 0.0, "eta_s": None},
    }
    assert wire.decode(encode(SYSTEM_STATUS)).header.face_sizes == {24: 3, 100: 1}


def test_a_status_of_an_older_app_is_read_and_its_entries_keep_their_types():
    fields = header_of(SYSTEM_STATUS)
    older = {name: value for name, value in fields.items() if name not in ("face_sizes", "building")}

    header = wire.decode([b"system", json.dumps(older).encode()]).header

    assert (header.face_sizes, header.building) == ({}, {})
    properties = json.loads(wire.json_schema())["$defs"]["SystemStatusHeader"]["properties"]
    assert properties["engines"]["additionalProperties"]["additionalProperties"] == {"type": "string"}


def test_a_number_that_is_not_finite_is_not_sent():
    crop = a_crop()
    broken = types.Crop(crop.track, crop.image, crop.transform, a_quality(yaw=float("nan")))

    with pytest.raises(ValidationError, match="yaw_ratio"):
        encode(types.FaceIdentified(broken, types.Route("none", "large"), None, None, "no embedder"))


def changed(parts: list[bytes], **fields) -> list[bytes]:
    return [parts[0], json.dumps(json.loads(parts[1]) | fields).encode(), *parts[2:]]


def test_a_newer_apps_additional_fields_are_accepted_and_kept():
    parts = changed(encode(an_identified()), liveness={"score": 0.9})

    header = wire.decode(parts).header

    assert json.loads(header.model_dump_json(by_alias=True))["liveness"] == {"score": 0.9}


def test_scores_and_a_match_are_read_as_specified():
    scores = {"raw": 0.4, "blind": 0.5, "fused": 0.52, "guided": None, "llr": 3.1, "llr_low": 2.0, "llr_high": 4.2}
    match = {"identity": "ann", "list": "staff", "similarity": 0.52, "basis": "fused"}
    match |= {"expected_false_alarms_per_day": 0.01, "runner_up": {"identity": "bob", "similarity": 0.2}}

    header = wire.decode(
        changed(encode(an_identified()), scores={"ann": scores}, scores_absent=None, match=match)
    ).header

    assert header.scores["ann"].fused == 0.52
    assert header.match.runner_up.identity == "bob"


def test_a_match_that_rests_on_a_guided_score_is_refused():
    match = {"identity": "ann", "list": "staff", "similarity": 0.9, "basis": "guided"}
    match |= {"expected_false_alarms_per_day": None, "runner_up": None}

    with pytest.raises(wire.WireError, match="basis"):
        wire.decode(changed(encode(an_identified()), match=match))


def test_a_guided_image_is_never_for_recognition():
    parts = encode(an_identified())
    images = json.loads(parts[1])["images"]
    guided = images[1] | {"name": "guided", "model": "gfrnet", "model_sha256": "cd" * 32}
    guided |= {"guided_by": {"identity": "ann", "photo": "1.jpg"}}

    honest = wire.decode(changed(parts, images=[images[0], guided | {"for_recognition": False}]))

    assert honest.header.images[1].guided_by.identity == "ann"
    with pytest.raises(wire.WireError, match="for_recognition is true for guided"):
        wire.decode(changed(parts, images=[images[0], guided]))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda parts: parts[:1], "a message of 1 parts is no event"),
        (lambda parts: [parts[0], b"\xff\xfe", *parts[2:]], "the header is not JSON"),
        (lambda parts: [parts[0], parts[1][:40], *parts[2:]], "the header is not JSON"),
        (lambda parts: [parts[0], b"[" * 100_000, *parts[2:]], "the header is not JSON"),
        (lambda parts: [parts[0], b"[1, 2]", *parts[2:]], "the header's schema is None"),
        (lambda parts: changed(parts, schema="streamer.event/2"), "this version reads 'streamer.event/1'"),
        (lambda parts: changed(parts, kind="face.vanished"), "face.vanished"),
        (lambda parts: changed(parts, seq=-1), "seq: "),
        (lambda parts: changed(parts, camera="../../etc"), "camera: "),
        (lambda parts: changed(parts, epoch="../x"), "epoch: "),
        (lambda parts: [b"face/hall2", *parts[1:]], "the topic b'face/hall2' does not fit"),
        (lambda parts: parts[:3], "restored is said to be part 3 of a message of 3 parts"),
        (lambda parts: [*parts[:2], parts[2][:-1] + b"x", parts[3]], "crop's bytes do not fit their sha256"),
    ],
)
def test_a_corrupt_message_is_refused_in_one_line(spoil, sentence):
    with pytest.raises(wire.WireError) as refusal:
        wire.decode(spoil(encode(an_identified())))

    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_bytes_that_are_no_image_are_refused_even_with_the_right_hash():
    parts = encode(an_identified(scale=None))
    entry = json.loads(parts[1])["images"][0] | {"sha256": hashlib.sha256(b"no image").hexdigest()}

    with pytest.raises(wire.WireError, match="crop is no 80x80 png image"):
        wire.decode([parts[0], changed(parts, images=[entry])[1], b"no image"])


coordinates = st.floats(-5000, 5000, width=32)


@settings(max_examples=60, deadline=None)
@given(
    image=hnp.arrays(np.uint8, st.tuples(st.integers(1, 24), st.integers(1, 24), st.just(3))),
    box=hnp.arrays(np.float32, 4, elements=coordinates),
    landmarks=hnp.arrays(np.float32, (5, 2), elements=coordinates),
    transform=hnp.arrays(np.float64, (2, 3), elements=st.floats(-5000, 5000)),
    score=st.floats(0, 1, width=32),
    pts=st.floats(0, 1e7),
    camera=st.from_regex("[A-Za-z0-9_-]{1,64}", fullmatch=True),
    stream=st.text(st.characters(codec="utf-8"), max_size=20),
    reason=st.text(st.characters(codec="utf-8"), max_size=20),
    seq=st.integers(0, 2**53),
)
def test_whatever_is_encoded_decodes_to_the_same(
    image, box, landmarks, transform, score, pts, camera, stream, reason, seq
):
    track = types.Track(1, types.Moment(camera, 0, pts, NOON, "arrival"), box, landmarks, score)
    crop = types.Crop(track, image, transform, a_quality())
    event = types.FaceIdentified(crop, types.Route("none", reason), None, None, "no embedder")

    received = wire.decode(encode(event, stream=stream, seq=seq))

    assert np.array_equal(received.images["crop"], image)
    assert np.allclose(received.header.box, box, atol=0.006)
    assert np.allclose(received.header.landmarks, landmarks, atol=0.006)
    assert np.allclose(received.header.images[0].transform, transform, atol=1e-6)
    assert (received.header.camera, received.header.stream, received.header.seq) == (camera, stream, seq)
    assert received.header.route.reason == reason


def test_the_json_schema_in_docs_is_current():
    printed = subprocess.run([sys.executable, "-m", "streamer.wire"], cwd=ROOT, capture_output=True, check=True).stdout

    assert (ROOT / "docs" / "event.schema.json").read_bytes() == printed, (
        "make it anew: python -m streamer.wire > docs/event.schema.json"
    )


@pytest.mark.parametrize("kind", EVENTS)
def test_the_json_schema_requires_just_what_the_app_always_sends(kind):
    definitions = json.loads(wire.json_schema())["$defs"]
    of_kind = {"camera.status": "CameraStatusHeader", "system.status": "SystemStatusHeader"}

    required = definitions[of_kind.get(kind, "FaceHeader")]["required"]

    assert set(required) == set(header_of(EVENTS[kind]))
