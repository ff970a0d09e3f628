"""EvidenceStore: what a match rested on, sealed beside the gallery for as long as the config says.

One file for each event: a magic line, the time at which it was kept, sealed, and all the rest, sealed. The time is
sealed for the event's id, the rest for the id and the time: neither opens under another file's name or beside another
file's time. So the age of a file is never taken from its name or from the file system, and it is read without
opening the rest.

A file is named by its event's id. The id is published, and the audit log beside the folder names it in clear too: a
keyed hash would hide nothing, and so what is asked for by id is found without the key.
"""

from __future__ import annotations

import base64
import fcntl
import json
import logging
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from streamer.audit import AuditLog, Detail, Entry
from streamer.geometry import scale_transform, transform_points
from streamer.types import Embeddings, FaceIdentified, Match, Quality, Route, Score
from streamer.vault import Vault, VaultError

logger = logging.getLogger(__name__)

MATCH = "match"
"""What the audit log calls one."""

_EVENT = re.compile(r"[0-9a-f]{32}")
_MAGIC = b"streamer.evidence/1\n"
_TIME = struct.Struct("<q")  # milliseconds since 1970
_SEALED_TIME = slice(len(_MAGIC), len(_MAGIC) + _TIME.size + 28)  # what a vault adds
_KEPT, _PART, _GONE = ".evidence", ".part", ".gone"
_DAY_S = 86_400.0


class EvidenceError(ValueError):
    """Evidence cannot be written, found or opened. The message is one line."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one match rested on. Nothing in it was drawn towards a guide."""

    event: str
    """Its id: 32 hex digits."""
    stream: str
    epoch: str
    """The box and the run that published it."""
    camera: str
    captured_at: datetime
    """UTC."""
    track: int
    crop: bytes
    """PNG, as the camera gave it."""
    landmarks: np.ndarray
    """(5, 2) float32 in pixels of the crop."""
    restored: bytes | None
    """PNG; None with route none."""
    restored_landmarks: np.ndarray | None
    """(5, 2) float32 in pixels of the restored crop."""
    quality: Quality
    route: Route
    restorer: str | None
    """Name of the network that restored."""
    restorer_sha256: str | None
    embeddings: Embeddings
    """Of this crop."""
    fused: np.ndarray
    """(d,) float32, of unit length: the track's, which the decision rested on."""
    crops: int
    """How many crops of the track are in it."""
    embedder: str
    embedder_sha256: str
    scores: Mapping[str, Score]
    """By id of the identities on the short list. A guided score is not kept."""
    match: Match
    gallery_version: int
    calibration_sha256: str | None

    @classmethod
    def of(
        cls,
        identified: FaceIdentified,
        *,
        event: str,
        stream: str,
        epoch: str,
        fused: np.ndarray,
        crops: int,
        embedder: str,
        embedder_sha256: str,
        gallery_version: int,
        calibration_sha256: str | None,
    ) -> Evidence:
        """Return the evidence of a face that was matched; the pictures are encoded here. The rest is as the fields."""
        assert identified.match is not None and identified.embeddings is not None
        crop, restoration = identified.crop, identified.restoration
        larger = None if restoration is None else scale_transform(np.eye(2, 3), restoration.scale)
        moment = crop.track.moment
        return cls(
            event, stream, epoch, moment.camera, moment.captured_at.astimezone(UTC), crop.track.id,
            _png(crop.image), crop.landmarks,
            None if restoration is None else _png(restoration.image),
            None if larger is None else transform_points(larger, crop.landmarks),
            crop.quality, identified.route,
            None if restoration is None else restoration.model,
            None if restoration is None else restoration.sha256,
            identified.embeddings, fused, crops, embedder, embedder_sha256,
            identified.scores or {}, identified.match, gallery_version, calibration_sha256,
        )  # fmt: skip


class EvidenceStore:
    """The evidence of a gallery's matches, in a folder. May be shared between threads and processes."""

    def __init__(
        self,
        folder: Path,
        vault: Vault,
        *,
        keep_days: float,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """The folder, GALLERY/evidence, is made when it is first written to; `keep_days` is what `prune` goes by."""
        self.folder = folder
        self._vault = vault
        self._keep_days = keep_days
        self._clock = clock
        self._strange = 0

    def keep(self, evidence: Evidence) -> None:
        """Write evidence, whole or not at all; it is on the disk when this returns. Raises EvidenceError."""
        path = self._path(evidence.event)
        kept_at = _TIME.pack(round(self._clock().timestamp() * 1000))
        sealed_time = self._vault.seal(kept_at, _about_time(evidence.event))
        content = _MAGIC + sealed_time + self._vault.seal(_pack(evidence), _about(evidence.event, kept_at))
        part = path.with_suffix(_PART)
        with _told(self.folder):
            self._make_folder()
            with self._locked(fcntl.LOCK_SH) as opened:
                try:
                    _write(part, content)
                    os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)
                os.fsync(opened)

    def read(self, event: str) -> Evidence:
        """Return the evidence of an event. Raises EvidenceError where there is none, or it is not what was kept."""
        path = self._path(event)
        with _told(path):
            content = path.read_bytes()
        try:
            kept_at = self._open_time(event, content)
            return _unpack(self._vault.open(content[_SEALED_TIME.stop :], _about(event, kept_at)))
        except VaultError as exc:
            raise EvidenceError(f"{path}: {exc}") from exc
        except (ValueError, KeyError, TypeError) as exc:
            raise EvidenceError(f"{path} is of another streamer: this one cannot read it") from exc

    def find(self, beginning: str) -> list[str]:
        """Return the ids of the events that there is evidence of and that begin so. Raises EvidenceError."""
        with _told(self.folder):
            ids = sorted(path.stem for path in self._files(_KEPT))
        return [each for each in ids if each.startswith(beginning)]

    def prune(self, now: datetime) -> int:
        """Remove what was kept more than `keep_days` before `now`; return how many. Raises EvidenceError.

        What is removed is overwritten first. So is what a killed process left half written. What does not open with
        this key stays, as its age is not known, and is told in the log.
        """
        removed = strange = 0
        with _told(self.folder):
            for path in self._files(_KEPT):
                with suppress(FileNotFoundError):  # another process was faster
                    kept_at = self._kept_at(path)
                    strange += kept_at is None
                    if kept_at is not None and (now - kept_at).total_seconds() > self._keep_days * _DAY_S:
                        os.replace(path, path.with_suffix(_GONE))
                        removed += 1
            if self._files(_PART):
                with self._locked(fcntl.LOCK_EX):  # nobody is writing: what is here is left over
                    for path in self._files(_PART):
                        os.replace(path, path.with_suffix(_GONE))
            for path in self._files(_GONE):
                with suppress(FileNotFoundError):
                    _shred(path)
        if strange and strange != self._strange:
            logger.warning("%s: %d files do not open with this key and stay", self.folder, strange)
        self._strange = strange
        return removed

    def _path(self, event: str) -> Path:
        if not _EVENT.fullmatch(event):
            raise EvidenceError(f"an event's id has 32 hex digits; {event!r} has not")
        return self.folder / f"{event}{_KEPT}"

    def _files(self, suffix: str) -> list[Path]:
        return [path for path in self.folder.glob(f"*{suffix}") if _EVENT.fullmatch(path.stem)]

    def _kept_at(self, path: Path) -> datetime | None:
        with path.open("rb") as file:
            head = file.read(_SEALED_TIME.stop)
        try:
            (milliseconds,) = _TIME.unpack(self._open_time(path.stem, head))
            return datetime.fromtimestamp(milliseconds / 1000, UTC)
        except ValueError:
            return None

    def _open_time(self, event: str, content: bytes) -> bytes:
        """Return the time at which it was kept, as it is packed. Raises VaultError."""
        if not content.startswith(_MAGIC):
            raise VaultError("no evidence, or changed since")
        return self._vault.open(content[_SEALED_TIME], _about_time(event))

    def _make_folder(self) -> None:
        with suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
            _sync(self.folder.parent)

    @contextmanager
    def _locked(self, kind: int) -> Iterator[int]:
        """Lock the folder itself; the kernel lets go of it however the process ends."""
        opened = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(opened, kind)
            yield opened
        finally:
            os.close(opened)


def record_match(log: AuditLog, evidence: Evidence) -> Entry:
    """Write a match into the audit log: ids and figures, and by which networks; no name, no picture, no embedding.

    Its subjects are the ids of event, identity, photo and list. Raises AuditError.
    """
    match, score = evidence.match, evidence.scores.get(evidence.match.identity)
    details: dict[str, Detail | None] = {
        "camera": evidence.camera,
        "captured_at": evidence.captured_at.isoformat(timespec="milliseconds"),
        "track": evidence.track,
        "crops": evidence.crops,
        "similarity": match.similarity,
        "threshold": match.threshold,
        "expected_false_alarms_per_day": match.expected_false_alarms_per_day,
        "runner_up": match.runner_up and match.runner_up[0],
        "runner_up_similarity": match.runner_up and match.runner_up[1],
        **{name: getattr(score, name, None) for name in ("raw", "blind", "llr", "llr_low", "llr_high")},
        "restorer": evidence.restorer_sha256 and evidence.restorer_sha256[:12],
        "embedder": evidence.embedder_sha256[:12],
        "calibration": evidence.calibration_sha256 and evidence.calibration_sha256[:12],
        "gallery_version": evidence.gallery_version,
    }
    known = {name: _figure(value) for name, value in details.items() if value is not None}
    return log.append("streamer", MATCH, [evidence.event, match.identity, match.photo, match.list], known)


def _figure(value: Detail) -> Detail:
    return value if isinstance(value, str | int) else round(float(value), 6)


def _about_time(event: str) -> bytes:
    return f"evidence {event} kept at".encode()


def _about(event: str, kept_at: bytes) -> bytes:
    return f"evidence {event} {kept_at.hex()}".encode()


def _pack(evidence: Evidence) -> bytes:
    scores = {identity: replace(score, guided=None) for identity, score in evidence.scores.items()}
    return json.dumps(asdict(replace(evidence, scores=scores)), default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, datetime) else value.tolist()  # float32 is read back as it is


def _unpack(packed: bytes) -> Evidence:
    """Raise ValueError, KeyError or TypeError for what `_pack` of this version does not write."""
    fields = json.loads(packed)
    match, embeddings = fields["match"], fields["embeddings"]
    runner_up = match["runner_up"] and (match["runner_up"][0], match["runner_up"][1])
    restored = fields["restored"]
    made = {
        "captured_at": datetime.fromisoformat(fields["captured_at"]),
        "crop": base64.b64decode(fields["crop"]),
        "landmarks": _array(fields["landmarks"]),
        "restored": restored and base64.b64decode(restored),
        "restored_landmarks": _array(fields["restored_landmarks"]),
        "quality": Quality(**fields["quality"]),
        "route": Route(**fields["route"]),
        "embeddings": Embeddings(np.array(embeddings["raw"], np.float32), _array(embeddings["blind"])),
        "fused": _array(fields["fused"]),
        "scores": {identity: Score(**score) for identity, score in fields["scores"].items()},
        "match": Match(**{**match, "runner_up": runner_up}),
    }
    return Evidence(**{**fields, **made})


def _array(numbers: Any) -> np.ndarray | None:
    return None if numbers is None else np.array(numbers, np.float32)


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def _write(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _shred(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise EvidenceError(f"{exc.filename or folder}: {exc.strerror}") from exc
