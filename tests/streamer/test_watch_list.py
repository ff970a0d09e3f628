"""A watch list in a whole run: enrolled by the command, matched in a film, audited, and deaf to guides."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from media import write_video
from portraits import ASTRONAUT, portrait, write_embedder

from engines.store import default_store
from streamer import wire
from streamer.assembly import Networks, load_stages, make_cameras, make_pipeline, wanted
from streamer.audit import AuditLog
from streamer.camera import Camera
from streamer.client import EventSubscriber
from streamer.config import StreamerConfig, load_config
from streamer.metrics import Metrics
from streamer.types import Frame
from streamer.vault import KEY_FILE_VARIABLE, KEY_VARIABLE, load_key

PASSAGE = 10
"""Frames of one passage, and of the empty scene after it; ten a second, and a track is lost after half a second."""


def passage(face: np.ndarray) -> list[np.ndarray]:
    """A person crosses the picture, and it is empty."""
    scene = np.full((240, 448, 3), 110, np.uint8)
    height = 120
    small = cv2.resize(face, (round(face.shape[1] * height / face.shape[0]), height), interpolation=cv2.INTER_AREA)
    frames = []
    for number in range(PASSAGE):
        frame, left = scene.copy(), 20 + 25 * number
        frame[60 : 60 + height, left : left + small.shape[1]] = small
        frames.append(frame)
    return frames + [scene] * PASSAGE


@pytest.fixture(scope="module")
def people() -> list[np.ndarray]:
    return [ASTRONAUT[:300, 80:360], portrait("centre"), portrait("left"), portrait("right")]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    detector = Networks(default_store(), threads=1).detector("centerface", size=480)
    return write_embedder(tmp_path_factory.mktemp("networks") / "tiny.onnx", detector)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where gallery, key and films lie."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "keys" / "gallery.key"))
    return tmp_path


@pytest.fixture
def enrol(home: Path, embedder: Path, streamer: Callable[..., tuple[int, str, str]]) -> Callable[..., None]:
    """Enrol somebody by the command line, and put them on the list."""

    def add(name: str, *photos: np.ndarray) -> None:
        paths = []
        for number, photo in enumerate(photos):
            paths.append(home / f"{name}{number}.png")
            assert cv2.imwrite(str(paths[-1]), photo)
        first = not (home / "gallery").exists()
        terms = ("--purpose", "a test", "--legal-basis", "none", "--threshold", "0.8") if first else ()
        code, _, errors = streamer(
            "enrol", name, *paths, "--gallery", home / "gallery", "--embedder", embedder, "--list", "wanted", "--force",
            *terms,
        )  # fmt: skip
        assert code == 0, errors

    return add


def configure(home: Path, film: Path, **gallery: object) -> StreamerConfig:
    settings = {"folder": str(home / "gallery"), **gallery}
    path = home / "camera.yaml"
    path.write_text(
        json.dumps(
            {
                "stream": "box", "cameras": [{"name": "door", "url": str(film)}],
                "detector": {"size": 448}, "tracker": {"lost_after": 0.5},
                "gallery": settings, "engine": {"backend": "onnxruntime", "threads": 1},
                "publish": {"endpoint": f"ipc://{home}/events", "wait_for": 1},
            }
        )
    )  # fmt: skip
    return load_config(path, {})


class GatedCamera(Camera):
    """Waits before the second passage until a gate opens."""

    gate: Callable[[], bool] = staticmethod(lambda: True)

    def frames(self, *given: object, **named: object) -> Iterator[Frame]:
        for number, frame in enumerate(super().frames(*given, **named)):
            ends = time.monotonic() + 60
            while number == 2 * PASSAGE and not self.gate() and time.monotonic() < ends:
                time.sleep(0.02)
            yield frame


def play(
    config: StreamerConfig, *, gate: Callable[[list[wire.WireEvent]], bool] = lambda received: True
) -> tuple[list[wire.WireEvent], Metrics]:
    """Run the film to its end; its second passage begins when `gate` says so of what was received."""
    stop, metrics = threading.Event(), Metrics()
    stages = load_stages(config, Networks(default_store(offline=True), backend="onnxruntime", threads=1))
    (camera,) = make_cameras(config, stop)
    gated = GatedCamera(camera.name, str(config.cameras[0].url.get_secret_value()), stop=stop)
    received: list[wire.WireEvent] = []
    gated.gate = lambda: gate(received)
    pipeline = make_pipeline(config, [gated], stages, metrics=metrics, stop=stop)

    def listen() -> None:
        with EventSubscriber(config.publish.endpoint, timeout_s=60) as events:
            for event in events:
                received.append(event)

    listener = threading.Thread(target=listen)
    listener.start()
    pipeline.run()
    listener.join(60)
    stages.close()
    return received, metrics


def faces(received: list[wire.WireEvent]) -> list[wire.WireEvent]:
    return [event for event in received if event.header.kind == "face.identified"]


def test_who_is_on_the_list_is_matched_and_each_match_is_in_the_audit_log(home, enrol, people):
    enrol("Ada", people[0])
    film = write_video(home / "film.mp4", [*passage(people[0]), *passage(people[1])], rate=10)

    received, _ = play(configure(home, film))

    matched = [event for event in faces(received) if event.header.match]
    others = [event for event in faces(received) if not event.header.match]
    assert matched and others
    assert {event.header.track for event in matched}.isdisjoint(event.header.track for event in others)
    log = AuditLog(home / "gallery" / "audit.jsonl", load_key())
    assert log.verify() == []
    logged = [entry for entry in log.entries() if entry.what == "match"]
    assert [entry.subjects[0] for entry in logged] == [event.header.id for event in matched]
    kept = sorted(path.stem for path in (home / "gallery" / "evidence").iterdir())
    assert kept == sorted(event.header.id for event in matched)


def test_guides_change_no_decision_route_or_score_but_guided(home, enrol, people):
    """ARCHITECTURE, honest scores: two of the four who pass are enrolled, the others pass beside their guides."""
    enrol("Ada", people[0])
    enrol("Bob", people[1])
    film = write_video(home / "film.mp4", [frame for face in people for frame in passage(face)], rate=10)
    near = {"short_list_margin": 1.9}  # whoever passes is near somebody: impostors are drawn by photos of others

    with_guides, metrics = play(configure(home, film, **near))
    without, _ = play(configure(home, film, **near, guided="none"))

    assert metrics.counts()["guided"] == len(faces(with_guides)) >= 4
    assert len({event.header.track for event in faces(with_guides)}) == 4
    for drawn, plain in zip(faces(with_guides), faces(without), strict=True):
        told, bare = (event.header.model_dump(mode="json") for event in (drawn, plain))
        own = [image for image in told["images"] if image["name"] not in ("guided", "guide")]
        for header, drawn_to in ((told, 1), (bare, 0)):
            scores = [scores.pop("guided") for scores in header["scores"].values()]
            assert len([each for each in scores if each is not None]) == drawn_to
        same = [
            "camera", "track", "frame", "box", "landmarks", "score", "quality", "route", "restoration", "scores",
            "scores_absent", "match",
        ]  # fmt: skip
        assert {name: told[name] for name in same} == {name: bare[name] for name in same}
        assert own == bare["images"]


def test_a_guided_picture_is_marked_as_drawn_and_not_for_recognition(home, enrol, people):
    enrol("Ada", people[0])
    film = write_video(home / "film.mp4", passage(people[0]), rate=10)

    received, _ = play(configure(home, film))

    (event, *_) = faces(received)
    entries = {image.name: image for image in event.header.images}
    (identity,) = event.header.scores
    assert list(entries) == ["crop", "restored", "guided", "guide"]
    assert [entry.for_recognition for entry in entries.values()] == [True, True, False, False]
    assert entries["guided"].guided_by.identity == identity == event.header.match.identity
    assert entries["guided"].model == "gfrnet-small"
    assert entries["guide"].transform is None and entries["guide"].model is None
    assert event.header.restoration.guided_by is None


def test_who_is_enrolled_during_a_run_is_matched_at_the_next_passage_and_no_frame_is_lost(home, enrol, people):
    enrol("Bob", people[1])
    film = write_video(home / "film.mp4", [*passage(people[0]), *passage(people[0])], rate=10)
    enrolled = threading.Event()

    def gate(received: list[wire.WireEvent]) -> bool:
        if not enrolled.is_set() and any(event.header.kind == "face.left" for event in received):
            enrol("Ada", people[0])
            enrolled.set()
        return enrolled.is_set()

    received, metrics = play(configure(home, film), gate=gate)

    _, second = sorted({event.header.track for event in faces(received)})
    matched = {event.header.track for event in faces(received) if event.header.match}
    assert matched == {second}
    assert metrics.counts()["frames"] == metrics.counts()["detected"] == 4 * PASSAGE
    assert metrics.counts()["drops"] == 0


def test_where_the_audit_log_cannot_be_written_no_match_goes_out(home, enrol, people, caplog):
    enrol("Ada", people[0])
    film = write_video(home / "film.mp4", passage(people[0]), rate=10)
    log = home / "gallery" / "audit.jsonl"
    log.write_bytes(log.read_bytes() + b"somebody else's line\n")

    received, metrics = play(configure(home, film))

    assert faces(received) and not any(event.header.match for event in faces(received))
    assert metrics.counts()["matches_withheld"] > 0
    assert "a match is withheld" in caplog.text


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"embedder": {"model": "nowhere.onnx"}}, "nowhere.onnx"),
        ({"gallery": {"folder": "nowhere"}}, "no gallery in"),
        ({"gallery": {"folder": "gallery", "calibration": "none.json"}}, "none.json: No such file"),
    ],
)
def test_a_search_that_cannot_be_is_one_line_and_exit_code_2(home, enrol, people, streamer, change, line):
    enrol("Ada", people[0])
    film = write_video(home / "film.mp4", passage(people[0]), rate=10)
    path = home / "camera.yaml"
    configure(home, film)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    for command in ("run", "check"):
        code, _, errors = streamer(command, path)
        assert code == 2
        assert line in errors and "Traceback" not in errors


def test_check_says_who_is_looked_for(home, enrol, people, streamer):
    enrol("Ada", people[0])
    film = write_video(home / "film.mp4", passage(people[0]), rate=10)
    configure(home, film)

    code, out, errors = streamer("check", home / "camera.yaml")

    assert code == 0, errors
    assert "1 person with 1 photo, 1 list in force" in out
    assert "guided-restoration: gfrnet-small" in out


def test_the_plans_of_a_config_are_those_of_its_gallery_too(home, enrol, people):
    enrol("Ada", people[0])
    film = write_video(home / "film.mp4", passage(people[0]), rate=10)
    networks = Networks(default_store(offline=True), backend="onnxruntime", threads=1)

    names = [each.model.card.name for each in wanted(configure(home, film), networks)]

    assert names == ["centerface", "sgen-small", "tiny", "gfrnet-small"]
