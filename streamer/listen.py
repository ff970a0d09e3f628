"""How a received event is shown: one line for people, one for programs, and a picture of what a restoration did."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from streamer.wire import CameraStatusHeader, FaceHeader, SystemStatusHeader, WireError, WireEvent

logger = logging.getLogger(__name__)


def readable(events: Iterator[WireEvent]) -> Iterator[WireEvent]:
    """Yield the events; what cannot be read is told and passed over."""
    while True:
        try:
            yield next(events)
        except StopIteration:
            return
        except WireError as exc:
            logger.warning("passed over what cannot be read: %s", exc)


def describe(event: WireEvent) -> str:
    """Return one line for people."""
    match event.header:
        case FaceHeader() as face:
            return f"{face.captured_at:%H:%M:%S} {face.camera} track {face.track} {_what_happened(face)}"
        case CameraStatusHeader() as camera:
            return f"{camera.published_at:%H:%M:%S} {camera.camera} is {camera.state}{_how_it_does(camera)}"
        case SystemStatusHeader() as system:
            counts = ", ".join(f"{name} {count}" for name, count in system.counts.items())
            return f"{system.published_at:%H:%M:%S} {system.stream} is {system.state}" + (
                f": {counts}" if counts else ""
            )


def to_json_line(event: WireEvent) -> str:
    """Return the header as one line of JSON, with whatever a newer app has added."""
    return event.header.model_dump_json(by_alias=True)


def save_side_by_side(event: WireEvent, folder: Path) -> Path:
    """Write crop and restored image beside each other, the crop brought to the same size, as one PNG.

    With route none it is the crop alone. What was drawn by an enrolled photo goes into a file of its own, *.drawn.png,
    beside that photo. Returns the path; raises ValueError where the event carries no crop.
    """
    header = event.header
    if not isinstance(header, FaceHeader) or "crop" not in event.images:
        raise ValueError(f"{header.kind} carries no crop")
    path = folder / f"{header.epoch}_{header.camera}_{header.track:04d}_{header.frame:06d}.png"
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, _side_by_side(event.images["crop"], event.images.get("restored")))
    if "guided" in event.images:
        _write(path.with_suffix(".drawn.png"), _side_by_side(event.images["guide"], event.images["guided"]))
    return path


def _write(path: Path, image: np.ndarray) -> None:
    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())


def _side_by_side(crop: np.ndarray, restored: np.ndarray | None) -> np.ndarray:
    if restored is None:
        return crop
    height, width = restored.shape[:2]
    return np.hstack([cv2.resize(crop, (width, height), interpolation=cv2.INTER_CUBIC), restored])


def _what_happened(face: FaceHeader) -> str:
    if face.quality is None or face.route is None:
        return face.kind.removeprefix("face.")
    restoration = face.restoration
    route = "not restored" if restoration is None else f"restored by {restoration.model} x{restoration.scale}"
    return f"identified: {face.quality.face_height_px:.0f} px, {route} ({face.route.reason}){_who_it_may_be(face)}"


def _who_it_may_be(face: FaceHeader) -> str:
    """Return the match with what it rests on, or who comes near one."""
    if face.match is not None:
        match, alarms = face.match, face.match.expected_false_alarms_per_day
        rare = "" if alarms is None else f", {alarms:g} false alarms a day to expect"
        return f"; MATCH {match.identity} by list {match.list}: {match.similarity:.2f}{rare}"
    near = [f"{who} {score.fused:.2f}" for who, score in (face.scores or {}).items()]
    return f"; near: {', '.join(near)}" if near else ""


def _how_it_does(camera: CameraStatusHeader) -> str:
    parts = [f"{camera.fps:.1f} fps"] if camera.state == "live" else []
    parts += [f"{reason} dropped {count}" for reason, count in camera.drops.items() if count]
    parts += [camera.detail] if camera.detail else []
    return ": " + ", ".join(parts) if parts else ""
