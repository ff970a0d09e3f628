"""The event on the wire: its schema, how it is encoded and decoded. `python -m streamer.wire` prints the JSON Schema.

An event is a multipart message [topic, header, image...]: the header is one JSON object, the images are PNG or JPEG.
A newer app adds fields, and these models keep what they do not know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, assert_never

import cv2
import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import from_json

from streamer import types
from streamer.geometry import scale_transform, transform_points
from streamer.types import CameraState, Clock, SystemState

SCHEMA: Literal["streamer.event/1"] = "streamer.event/1"
SYSTEM_TOPIC = "system"

FaceKind = Literal["face.appeared", "face.identified", "face.left"]
ImageFormat = Literal["png", "jpeg"]
Point = tuple[float, float]
Landmarks = tuple[Point, Point, Point, Point, Point]
TransformRow = tuple[float, float, float]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

_JPEG_QUALITY = 95
_NOT_IDENTIFIED = "only face.identified carries scores"


class WireError(ValueError):
    """A message is not an event that this version can read; carries one line."""


class _Part(BaseModel):
    """Any part of a header: frozen, and open to the fields of a newer app."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, use_attribute_docstrings=True)


class Quality(_Part):
    """What the raw crop suffers from."""

    face_height_px: float
    """Height of the box in pixels of the frame."""
    eye_distance_px: float
    """Between the eyes, in pixels of the frame."""
    sharpness: float
    """0 (nothing but blur) to 1 (as sharp as its pixels allow)."""
    noise_grey_levels: float
    """Estimated sigma of the noise, in grey levels of 0..255."""
    blockiness_ratio: float
    """How much stronger steps are on the codec's 8x8 grid than off it, as a ratio less 1; about 0 without damage."""
    yaw_ratio: float
    """Turn of the head: 0 frontal, about 1 in profile; sign as the nose points in the picture."""
    roll_deg: float
    """Angle by which the face is turned in the frame."""


class Route(_Part):
    """Which restorer the crop went to."""

    restorer: str
    """Its name, or "none"."""
    reason: str
    """Why, in words."""


class GuidedBy(_Part):
    """The guide photo that a restoration was drawn towards."""

    identity: str
    """Whose photo it is."""
    photo: str
    """Which of the photos."""


class Restoration(_Part):
    """What made the restored image."""

    model: str
    """Name of the network."""
    sha256: Sha256
    """Of the network's file."""
    scale: int
    """How many times as large as the crop the restored image is."""
    backend: str
    """What ran it, such as onnxruntime-cpu."""
    precision: str
    """fp32 | bf16 | fp16 | int8."""
    guided_by: GuidedBy | None
    """Null for a blind restoration, as the one that decisions rest on always is."""


class Scores(_Part):
    """How alike the face and one identity are: cosine similarities, and a likelihood ratio as its log10."""

    raw: float
    """Of the crop as it came."""
    blind: float | None
    """Of the crop restored without a guide; null with route none."""
    fused: float
    """Of both combined, over the track's crops so far: what a decision rests on."""
    guided: float | None
    """Of a guided restoration: proves nothing, since that was drawn towards its guide; for display only."""
    llr: float | None
    """Log10 of the likelihood ratio of `fused`: 2 means, a hundred times as likely if it is this person as if it is a
    stranger. No more than the data bear out; null without a calibration."""
    llr_low: float | None
    """Lower end of its interval."""
    llr_high: float | None
    """Upper end of its interval."""


class RunnerUp(_Part):
    """The next identity."""

    identity: str
    """Its id."""
    similarity: float
    """Its fused score."""


class Match(_Part):
    """The identity decided for. Ids, no names: `streamer gallery show` and `streamer explain` tell whose."""

    identity: str
    """Its id."""
    photo: str | None = None
    """Id of the enrolled photo that carried it."""
    list: str
    """Id of the watch list that it is on."""
    similarity: float
    """Its fused score."""
    threshold: float | None = None
    """The list's: the least similarity of a match."""
    basis: Literal["fused"]
    """What the decision rests on: never a guided score."""
    expected_false_alarms_per_day: float | None
    """How often this camera, with its traffic, would see a stranger so alike to somebody on this list; null without a
    calibration."""
    runner_up: RunnerUp | None
    """Null where the gallery holds no other."""


def _is_none(value: object) -> bool:
    return value is None


class Image(_Part):
    """One image of the message."""

    name: Literal["crop", "restored", "guided", "guide"]
    """crop: as the camera gave it; restored: without a guide; guided: drawn towards a guide; guide: that photo."""
    part: int = Field(ge=2)
    """Index in the multipart message."""
    format: ImageFormat
    """Of the bytes."""
    width: int
    """In pixels."""
    height: int
    """In pixels."""
    sha256: Sha256
    """Of the bytes."""
    transform: tuple[TransformRow, TransformRow] | None
    """Takes pixels of the frame to pixels of this image; centres lie at whole numbers. Null for `guide`."""
    landmarks: Landmarks | None
    """Left eye, right eye, nose, mouth left, mouth right, in the image's own pixels."""
    for_recognition: bool
    """True for `crop` and `restored` alone. Never recognise from another."""
    model: str | None = Field(None, exclude_if=_is_none)
    """Of `guided` alone: the network that made it."""
    model_sha256: Sha256 | None = Field(None, exclude_if=_is_none)
    """Of `guided` alone: of the network's file."""
    guided_by: GuidedBy | None = Field(None, exclude_if=_is_none)
    """Of `guided` alone: its guide."""

    @model_validator(mode="after")
    def _only_honest_images_are_for_recognition(self) -> Image:
        if self.for_recognition != (self.name in ("crop", "restored")):
            raise ValueError(f"for_recognition is {str(self.for_recognition).lower()} for {self.name}")
        return self


class Header(_Part):
    """What every event says of itself."""

    schema_name: Literal["streamer.event/1"] = Field(alias="schema")
    """Its major version: fields are added within it, never changed or removed."""
    kind: str
    """What happened."""
    id: str = Field(pattern="^[0-9a-f]{32}$")
    """First 32 hex digits of sha256 of the compact JSON array [stream, epoch, camera, track, frame, kind], UTF-8.

    A status has its topic_seq in the place of frame; null stands where there is no camera or track."""
    stream: str
    """The box that published it."""
    epoch: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")
    """The run that published it; sorts by time."""
    seq: int = Field(ge=0)
    """Gapless over all topics of the epoch, from 0."""
    topic_seq: int = Field(ge=0)
    """Gapless within the topic and epoch, from 0: what a filtering consumer judges gaps by."""
    published_at: AwareDatetime
    """RFC 3339, UTC."""

    @property
    def topic(self) -> str:
        """The first part of its message."""
        return SYSTEM_TOPIC


class FaceHeader(Header):
    """A face in a frame of a camera."""

    kind: FaceKind
    """A track began, a crop of it was identified, or it ended (then all is as it was last seen)."""
    camera: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")
    """Its name."""
    captured_at: AwareDatetime
    """When the frame was taken: RFC 3339, UTC."""
    clock: Clock
    """Where `captured_at` comes from: the camera's RTCP reports, the frame's arrival, or the file's own date."""
    pts_s: float
    """Seconds in the camera's stream."""
    frame: int
    """Index among the frames decoded from this camera in this epoch."""
    track: int
    """Unique per camera and epoch."""
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels of the full frame."""
    landmarks: Landmarks
    """Left eye, right eye, nose, mouth left, mouth right, as the picture shows them, in pixels of the full frame."""
    score: float = Field(ge=0, le=1)
    """How sure the detector is."""
    quality: Quality | None
    """Null but for face.identified."""
    route: Route | None
    """Null but for face.identified."""
    restoration: Restoration | None
    """Null with route none, and but for face.identified."""
    scores: dict[str, Scores] | None
    """By id of the identities that the face is near, the most alike first; empty where there are none, null where
    nothing was searched."""
    scores_absent: str | None
    """Why `scores` is null."""
    match: Match | None
    """Null where nobody was recognised."""
    images: tuple[Image, ...]
    """What the parts from 2 on hold; empty but for face.identified. Route none has no `restored`: take `crop`."""

    @property
    def topic(self) -> str:
        return f"face/{self.camera}"


class CameraStatusHeader(Header):
    """How a camera does: on every change and every 5 s."""

    kind: Literal["camera.status"]
    """What this is."""
    camera: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")
    """Its name."""
    captured_at: AwareDatetime | None
    """When its last frame was taken; null before the first."""
    clock: Clock | None
    """Where `captured_at` comes from; null before the first frame."""
    pts_s: float | None
    """Of its last frame, seconds in the stream."""
    frame: int | None
    """Index of its last frame."""
    state: CameraState
    """Lost is tried again for ever; ended is the end of a file."""
    fps: float
    """Frames decoded a second, lately."""
    frame_age_s: float | None
    """Seconds since its last frame was decoded; null before the first."""
    drops: dict[str, int]
    """Frames and crops that were let go since the start, by reason."""
    detail: str
    """One sentence for the operator, or empty."""

    @property
    def topic(self) -> str:
        return f"status/{self.camera}"


class Building(_Part):
    """A plan that is being built while another engine serves."""

    step: str
    """What is being done, such as "int8: compiling"."""
    share: float = Field(ge=0, le=1)
    """How much of it is done."""
    eta_s: float | None
    """Seconds that it will still take; null where nobody can tell."""


class SystemStatusHeader(Header):
    """How the whole box does: on every change and every 5 s. After `ended` nothing follows in this epoch."""

    # what has a default is always sent, and missing only in the events of an older app
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)

    kind: Literal["system.status"]
    """What this is."""
    state: SystemState
    """Where the app is between start and end."""
    version: str
    """Of the app."""
    engines: dict[str, dict[str, str]]
    """By stage: model, sha256, backend, precision, license; where a plan runs, `plan`: first 12 digits of its key."""
    batch_sizes: dict[str, dict[int, int]]
    """By stage: how many batches of each size since the start."""
    stage_seconds: dict[str, float]
    """By stage: seconds spent in it since the start."""
    counts: dict[str, int]
    """Frames, faces, restored, published, drops since the start."""
    face_sizes: dict[int, int] = {}
    """How many crops of each side, in their own pixels, were restored since the start."""
    building: dict[str, Building] = {}
    """By stage: the plan that is being built for it, which takes over when it is done."""


AnyHeader = Annotated[FaceHeader | CameraStatusHeader | SystemStatusHeader, Field(discriminator="kind")]
_HEADERS: TypeAdapter[FaceHeader | CameraStatusHeader | SystemStatusHeader] = TypeAdapter(AnyHeader)


@dataclass(frozen=True, slots=True)
class WireEvent:
    """An event as a consumer gets it."""

    header: FaceHeader | CameraStatusHeader | SystemStatusHeader
    images: Mapping[str, np.ndarray]
    """HWC uint8 BGR, by the name in `header.images`."""

    @property
    def topic(self) -> str:
        """face/<camera>, status/<camera> or system."""
        return self.header.topic


def topic_of(event: types.Event) -> str:
    """Return the topic that `event` is published under."""
    match event:
        case types.FaceAppeared() | types.FaceLeft():
            return f"face/{event.track.moment.camera}"
        case types.FaceIdentified():
            return f"face/{event.crop.track.moment.camera}"
        case types.CameraStatus():
            return f"status/{event.camera}"
        case types.SystemStatus():
            return SYSTEM_TOPIC
        case _:
            assert_never(event)


def encode(
    event: types.Event,
    *,
    stream: str,
    epoch: str,
    seq: int,
    topic_seq: int,
    published_at: datetime,
    image_format: ImageFormat = "png",
) -> list[bytes]:
    """Return the parts of the message: topic, header, images.

    The same event, numbers and times give the same bytes. Raises ValidationError on what the schema does not allow,
    such as a number that is not finite.
    """
    body, images = _body(event, image_format)
    header = _HEADERS.validate_python(
        {
            "schema": SCHEMA,
            "id": _id(body, stream, epoch, topic_seq),
            "stream": stream,
            "epoch": epoch,
            "seq": seq,
            "topic_seq": topic_seq,
            "published_at": published_at.astimezone(UTC),
            **body,
        }
    )
    return [header.topic.encode(), header.model_dump_json(by_alias=True).encode(), *images]


def decode(parts: Sequence[bytes]) -> WireEvent:
    """Return the event of a message. Raises WireError on a message that is corrupt or of another schema."""
    if len(parts) < 2:
        raise WireError(f"a message of {len(parts)} parts is no event: it has a topic, a header and images")
    header = _decode_header(parts[1])
    if header.topic.encode() != parts[0]:
        raise WireError(f"the topic {parts[0][:100]!r} does not fit the header's, {header.topic}")
    entries = header.images if isinstance(header, FaceHeader) else ()
    images: dict[str, np.ndarray] = {entry.name: _decode_image(entry, parts) for entry in entries}
    return WireEvent(header, images)


def json_schema() -> str:
    """Return the JSON Schema of the header, as text."""
    schema = _HEADERS.json_schema(by_alias=True, mode="serialization")
    top = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"Header of a {SCHEMA} message"}
    return json.dumps(top | schema, indent=2) + "\n"


def _body(event: types.Event, image_format: ImageFormat) -> tuple[dict[str, Any], list[bytes]]:
    """Return the header's fields but those that every event has, and the encoded images."""
    match event:
        case types.FaceAppeared():
            return _unidentified("face.appeared", event.track), []
        case types.FaceLeft():
            return _unidentified("face.left", event.track), []
        case types.FaceIdentified():
            return _identified(event, image_format)
        case types.CameraStatus():
            return _camera_status(event), []
        case types.SystemStatus():
            return _system_status(event), []
        case _:
            assert_never(event)


def _id(body: Mapping[str, Any], stream: str, epoch: str, topic_seq: int) -> str:
    place = body["frame"] if "track" in body else topic_seq
    return event_id(stream, epoch, body.get("camera"), body.get("track"), place, body["kind"])


def event_id(stream: str, epoch: str, camera: str | None, track: int | None, place: int, kind: str) -> str:
    """Return an event's id, as `Header.id` says; `place` is a face's frame, or a status's topic_seq."""
    text = json.dumps([stream, epoch, camera, track, place, kind], separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _unidentified(kind: FaceKind, track: types.Track) -> dict[str, Any]:
    absent = dict.fromkeys(("quality", "route", "restoration", "scores", "match"))
    return _track(kind, track) | absent | {"scores_absent": _NOT_IDENTIFIED, "images": ()}


def _identified(event: types.FaceIdentified, image_format: ImageFormat) -> tuple[dict[str, Any], list[bytes]]:
    pictures = _pictures(event)
    encoded = [_encode_image(picture.image, image_format) for picture in pictures]
    body = _track("face.identified", event.crop.track) | {
        "quality": _quality(event.crop.quality),
        "route": {"restorer": event.route.restorer, "reason": event.route.reason},
        "restoration": _restoration(event.restoration),
        "scores": None if event.scores is None else {who: _score(each) for who, each in event.scores.items()},
        "scores_absent": event.scores_absent or None,
        "match": _match(event.match),
        "images": [
            _image(picture, part, data, image_format)
            for part, (picture, data) in enumerate(zip(pictures, encoded, strict=True), start=2)
        ],
    }
    return body, encoded


def _score(score: types.Score) -> dict[str, float | None]:
    return {name: _short(getattr(score, name)) for name in Scores.model_fields}


def _match(match: types.Match | None) -> dict[str, Any] | None:
    if match is None:
        return None
    alarms, runner_up = match.expected_false_alarms_per_day, match.runner_up
    return {
        "identity": match.identity,
        "photo": match.photo,
        "list": match.list,
        "similarity": _short(match.similarity),
        "threshold": _short(match.threshold),
        "basis": "fused",
        "expected_false_alarms_per_day": None if alarms is None else float(f"{alarms:.2g}"),
        "runner_up": runner_up and {"identity": runner_up[0], "similarity": _short(runner_up[1])},
    }


def _short(figure: float | None) -> float | None:
    return None if figure is None else round(float(figure), 4)


def _track(kind: FaceKind, track: types.Track) -> dict[str, Any]:
    return {
        "kind": kind,
        "camera": track.moment.camera,
        **_moment(track.moment),
        "track": track.id,
        "box": _rounded(track.box, 2),
        "landmarks": _rounded(track.landmarks, 2),
        "score": round(float(track.score), 4),
    }


def _moment(moment: types.Moment) -> dict[str, Any]:
    return {
        "captured_at": moment.captured_at.astimezone(UTC),
        "clock": moment.clock,
        "pts_s": round(float(moment.pts), 6),
        "frame": moment.frame,
    }


def _quality(quality: types.Quality) -> dict[str, float]:
    return {
        "face_height_px": round(float(quality.face_height_px), 2),
        "eye_distance_px": round(float(quality.eye_distance_px), 2),
        "sharpness": round(float(quality.sharpness), 4),
        "noise_grey_levels": round(float(quality.noise), 3),
        "blockiness_ratio": round(float(quality.blockiness), 4),
        "yaw_ratio": round(float(quality.yaw), 4),
        "roll_deg": round(float(quality.roll_deg), 2),
    }


def _restoration(restoration: types.Restoration | None) -> dict[str, Any] | None:
    if restoration is None:
        return None
    return {
        "model": restoration.model,
        "sha256": restoration.sha256,
        "scale": restoration.scale,
        "backend": restoration.backend,
        "precision": restoration.precision,
        "guided_by": None,
    }


def _camera_status(status: types.CameraStatus) -> dict[str, Any]:
    nothing_yet = dict.fromkeys(("captured_at", "clock", "pts_s", "frame"))
    return {
        "kind": "camera.status",
        "camera": status.camera,
        **(nothing_yet if status.moment is None else _moment(status.moment)),
        "state": status.state,
        "fps": round(float(status.fps), 2),
        "frame_age_s": None if status.frame_age_s is None else round(float(status.frame_age_s), 3),
        "drops": dict(status.drops),
        "detail": status.detail,
    }


def _system_status(status: types.SystemStatus) -> dict[str, Any]:
    return {
        "kind": "system.status",
        "state": status.state,
        "version": status.version,
        "engines": {stage: dict(engine) for stage, engine in status.engines.items()},
        "batch_sizes": {stage: dict(sizes) for stage, sizes in status.batch_sizes.items()},
        "stage_seconds": {stage: round(float(seconds), 3) for stage, seconds in status.stage_seconds.items()},
        "counts": dict(status.counts),
        "face_sizes": dict(status.face_sizes),
        "building": {stage: _building(building) for stage, building in status.building.items()},
    }


def _building(building: types.Building) -> dict[str, Any]:
    eta_s = None if building.eta_s is None else round(float(building.eta_s), 1)
    return {"step": building.step, "share": round(float(building.share), 4), "eta_s": eta_s}


@dataclass(frozen=True, slots=True)
class _Picture:
    """An image that goes with an event."""

    name: Literal["crop", "restored", "guided", "guide"]
    image: np.ndarray
    transform: np.ndarray | None
    """(2, 3): frame pixels to image pixels; None for what is not of the frame."""
    landmarks: np.ndarray
    """(5, 2), in the image's own pixels."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What else its entry says."""


def _pictures(event: types.FaceIdentified) -> list[_Picture]:
    crop, guided = _Picture("crop", event.crop.image, event.crop.transform, event.crop.landmarks), event.guided
    pictures = [crop]
    if event.restoration is not None:
        pictures.append(_enlarged(crop, event.restoration))
    if guided is not None:
        guided_by = {"identity": guided.identity, "photo": guided.photo}
        told = {"model": guided.model, "model_sha256": guided.sha256, "guided_by": guided_by}
        pictures.append(_Picture("guided", guided.image, guided.transform, guided.landmarks, told))
        pictures.append(_Picture("guide", guided.guide, None, guided.guide_landmarks))
    return pictures


def _enlarged(crop: _Picture, restoration: types.Restoration) -> _Picture:
    assert crop.transform is not None
    larger = scale_transform(np.eye(2, 3), restoration.scale)
    transform = scale_transform(crop.transform, restoration.scale)
    return _Picture("restored", restoration.image, transform, transform_points(larger, crop.landmarks))


def _image(picture: _Picture, part: int, data: bytes, image_format: ImageFormat) -> dict[str, Any]:
    height, width = picture.image.shape[:2]
    return {
        "name": picture.name,
        "part": part,
        "format": image_format,
        "width": width,
        "height": height,
        "sha256": hashlib.sha256(data).hexdigest(),
        "transform": None if picture.transform is None else _rounded(picture.transform, 6),
        "landmarks": _rounded(picture.landmarks, 2),
        "for_recognition": picture.name in ("crop", "restored"),
        **picture.told,
    }


def _encode_image(image: np.ndarray, image_format: ImageFormat) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if image_format == "jpeg" else []
    encoded, data = cv2.imencode(f".{image_format}", image, options)
    if not encoded:
        raise ValueError(f"an image of shape {image.shape} and type {image.dtype} cannot be written as {image_format}")
    return data.tobytes()


def _rounded(array: np.ndarray, digits: int) -> Any:
    return np.round(np.asarray(array, np.float64), digits).tolist()


def _decode_header(data: bytes) -> FaceHeader | CameraStatusHeader | SystemStatusHeader:
    try:
        fields = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise WireError(f"the header is not JSON: {error}") from error
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if schema != SCHEMA:
        raise WireError(f"the header's schema is {schema!r}; this version reads {SCHEMA!r}")
    try:
        return _HEADERS.validate_python(fields)
    except ValidationError as error:
        raise WireError(f"the header does not fit {SCHEMA}: {_first_mistake(error)}") from error


def _first_mistake(error: ValidationError) -> str:
    mistake = error.errors(include_input=False)[0]
    place = ".".join(str(step) for step in mistake["loc"])
    return f"{place}: {mistake['msg']}" if place else mistake["msg"]


def _decode_image(entry: Image, parts: Sequence[bytes]) -> np.ndarray:
    if entry.part >= len(parts):
        raise WireError(f"{entry.name} is said to be part {entry.part} of a message of {len(parts)} parts")
    data = parts[entry.part]
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise WireError(f"{entry.name}'s bytes do not fit their sha256")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_BGR)
    except cv2.error as error:
        raise WireError(f"{entry.name} cannot be decoded") from error
    if image is None or image.shape != (entry.height, entry.width, 3):
        raise WireError(f"{entry.name} is no {entry.width}x{entry.height} {entry.format} image")
    return image


if __name__ == "__main__":
    print(json_schema(), end="")
