"""What flows from the cameras to the events. Read this first.

Images are (H, W, 3) uint8 BGR. Boxes are x1, y1, x2, y2 and landmarks five x, y (left eye, right eye, nose, mouth left,
mouth right: left as the picture shows it), both in pixels of the full frame, whose centres lie at whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import numpy as np

Clock = Literal["rtcp", "arrival", "file"]
CameraState = Literal["connecting", "live", "stalled", "lost", "ended"]
SystemState = Literal["starting", "ready", "stopping", "ended"]


@dataclass(frozen=True, slots=True)
class Moment:
    """When and where a frame was seen."""

    camera: str
    frame: int
    """Index of the frame among those decoded from this camera in this epoch, from 0."""
    pts: float
    """Seconds in the stream: for arithmetic inside the stream."""
    captured_at: datetime
    """UTC: for people and events."""
    clock: Clock
    """Where `captured_at` comes from."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded picture of one camera."""

    moment: Moment
    image: np.ndarray
    decoded_at: float
    """`time.monotonic()` when it was decoded: its age is judged by this."""


@dataclass(frozen=True, slots=True)
class Detections:
    """The faces of one frame, as parallel arrays."""

    boxes: np.ndarray
    """(n, 4) float32."""
    landmarks: np.ndarray
    """(n, 5, 2) float32."""
    scores: np.ndarray
    """(n,) float32 in 0..1."""

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, choice: np.ndarray) -> Detections:
        """Return those chosen by a mask or by indices."""
        return Detections(self.boxes[choice], self.landmarks[choice], self.scores[choice])

    @classmethod
    def none(cls) -> Detections:
        """Return no detections."""
        return cls(np.empty((0, 4), np.float32), np.empty((0, 5, 2), np.float32), np.empty(0, np.float32))


@dataclass(frozen=True, slots=True)
class Track:
    """One face followed through one camera, as it is in one frame."""

    id: int
    """Unique per camera and epoch, from 1."""
    moment: Moment
    box: np.ndarray
    """(4,) float32."""
    landmarks: np.ndarray
    """(5, 2) float32."""
    score: float


@dataclass(frozen=True, slots=True)
class Quality:
    """What a crop suffers from. All is measured on the frame's own pixels, nothing on a restoration."""

    face_height_px: float
    """Height of the detector's box in pixels of the frame."""
    eye_distance_px: float
    sharpness: float
    """0 (nothing but blur) to 1 (as sharp as its pixels allow)."""
    noise: float
    """Estimated sigma of the noise of each colour channel, in grey levels."""
    blockiness: float
    """How much stronger steps are on the 8x8 grid than off it, as a ratio less 1; about 0 without a codec's damage."""
    yaw: float
    """Sine of the head's turn, from its landmarks: 0 frontal, 1 in profile, positive where the nose points right."""
    roll_deg: float
    """Angle by which the face is turned in the frame, in degrees."""


@dataclass(frozen=True, slots=True)
class Crop:
    """The square cut round a face, upright, at the frame's own scale (ARCHITECTURE, crops). A copy, never a view."""

    track: Track
    image: np.ndarray
    transform: np.ndarray
    """(2, 3) float64: frame pixels to crop pixels."""
    quality: Quality

    @property
    def landmarks(self) -> np.ndarray:
        """(5, 2) float32 in the crop's own pixels."""
        points = self.track.landmarks @ self.transform[:, :2].T + self.transform[:, 2]
        return np.asarray(points, np.float32)


@dataclass(frozen=True, slots=True)
class Route:
    """Which restorer a crop goes to, and why."""

    restorer: str
    """A restorer's name, or "none"."""
    reason: str


@dataclass(frozen=True, slots=True)
class Restoration:
    """What a restorer made of a crop: the same square, `scale` times as large."""

    image: np.ndarray
    model: str
    sha256: str
    scale: int
    backend: str
    precision: str


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Unit embeddings of one face, (d,) float32 each."""

    raw: np.ndarray
    blind: np.ndarray | None
    """Of the restoration; None with route none."""


# Events, in the order in which they happen to a face, then those of cameras and of the whole box.


@dataclass(frozen=True, slots=True)
class FaceAppeared:
    """A track begins."""

    track: Track


@dataclass(frozen=True, slots=True)
class FaceIdentified:
    """A crop was restored, and embedded where there is an embedder."""

    crop: Crop
    route: Route
    restoration: Restoration | None
    embeddings: Embeddings | None
    scores_absent: str
    """A sentence that says why there are no scores."""


@dataclass(frozen=True, slots=True)
class FaceLeft:
    """A track ended; `track` is as it was last seen."""

    track: Track


@dataclass(frozen=True, slots=True)
class CameraStatus:
    """How a camera does."""

    camera: str
    state: CameraState
    fps: float
    frame_age_s: float | None
    """Seconds since its last frame was decoded, None before the first."""
    drops: Mapping[str, int]
    """Frames and crops that were let go, by reason."""
    detail: str = ""
    """One sentence for the operator, without secrets."""
    moment: Moment | None = None
    """Of its last frame, None before the first."""


@dataclass(frozen=True, slots=True)
class Building:
    """A plan that is being built beside the running app."""

    step: str
    """What is being done, such as "int8: compiling"."""
    share: float
    """How much of it is done, 0..1."""
    eta_s: float | None
    """Seconds that it will still take, None where nobody can tell."""


@dataclass(frozen=True, slots=True)
class SystemStatus:
    """How the whole box does."""

    state: SystemState
    version: str
    engines: Mapping[str, Mapping[str, str]]
    """By stage: model, sha256, backend, precision, license; where a plan runs, `plan`: first 12 digits of its key."""
    batch_sizes: Mapping[str, Mapping[int, int]]
    """By stage: how many batches of each size."""
    stage_seconds: Mapping[str, float]
    """By stage: seconds spent in it since the start."""
    counts: Mapping[str, int]
    """Frames, faces, restored, published, drops."""
    face_sizes: Mapping[int, int] = field(default_factory=dict)
    """How many crops of each side, in their own pixels, were restored."""
    building: Mapping[str, Building] = field(default_factory=dict)
    """By stage: the plan that is being built for it."""


Event = FaceAppeared | FaceIdentified | FaceLeft | CameraStatus | SystemStatus
