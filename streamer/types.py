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


@dataclass(frozen=True, slots=True)
class Score:
    """How alike a track's face and one enrolled identity are. Similarities are cosines; ratios are log10."""

    raw: float
    """Of the crop as it came."""
    blind: float | None
    """Of the crop restored without a guide; None with route none."""
    fused: float
    """Of both, over the track's crops so far: what a decision rests on."""
    guided: float | None = None
    """Of a guided restoration, which was drawn towards its guide: for display only, never for a decision."""
    llr: float | None = None
    """Log10 of the likelihood ratio of `fused`; None without a calibration."""
    llr_low: float | None = None
    llr_high: float | None = None
    """Its 95 % interval."""


@dataclass(frozen=True, slots=True)
class Match:
    """The identity decided for."""

    identity: str
    """Its id."""
    photo: str
    """Id of the photo that carried it."""
    list: str
    """Id of the watch list."""
    similarity: float
    """Its fused score."""
    threshold: float
    """The list's: the least similarity of a match."""
    expected_false_alarms_per_day: float | None
    """How often this camera would see a stranger this alike to somebody on the list; None without a calibration."""
    runner_up: tuple[str, float] | None
    """Id and fused score of the next identity; None where there is no other."""


@dataclass(frozen=True, slots=True)
class GuidedPicture:
    """A restoration drawn towards a guide: for the human eye. Nothing that recognises takes it."""

    image: np.ndarray
    transform: np.ndarray
    """(2, 3): frame pixels to image pixels."""
    landmarks: np.ndarray
    """(5, 2) in the image's own pixels."""
    guide: np.ndarray
    """(H, W, 3) uint8 BGR: the enrolled photo."""
    guide_landmarks: np.ndarray
    """(5, 2) in the guide's own pixels."""
    identity: str
    photo: str
    """Ids of whose photo it is and of the photo."""
    model: str
    sha256: str
    """Of the network that drew it, and of its file."""


@dataclass(frozen=True, slots=True)
class EventName:
    """What a face's event is called."""

    stream: str
    """The box."""
    epoch: str
    """The run."""
    id: str
    """32 hex digits."""


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
    """A sentence that says why there are no scores; empty where there are."""
    scores: Mapping[str, Score] | None = None
    """By id of the identities on the short list, the most alike first; None: nothing was searched."""
    match: Match | None = None
    guided: GuidedPicture | None = None


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
