import re
import subprocess
import sys
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from engines.engine import ModelError
from engines.store import default_store
from streamer import demo, demo_clip, demo_page, wire
from streamer.geometry import crop_transform, scale_transform, transform_points
from streamer.types import Crop, FaceAppeared, FaceIdentified, FaceLeft, Moment, Quality, Restoration, Route, Track

FRAME, SCALE = 60, 4
QUALITY = Quality(25.0, 9.0, 0.3, 8.0, 0.1, 0.0, 0.0)
UPRIGHT = np.array([[0.35, 0.4], [0.65, 0.4], [0.5, 0.6], [0.38, 0.78], [0.62, 0.78]])


@pytest.fixture
def short_clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(demo_clip, "FRAMES", 3)
    return tmp_path / "clip.mp4"


def test_the_camera_sees_the_same_at_every_call():
    first, again, other = (demo_clip.camera_frame(frame) for frame in (FRAME, FRAME, FRAME + 1))

    assert np.array_equal(first, again)
    assert not np.array_equal(first, other), "people move, and the noise is new in every frame"


def test_the_clip_is_h264_and_made_once(short_clip):
    made_first, made_again = demo_clip.make_clip(short_clip), demo_clip.make_clip(short_clip)

    with av.open(str(short_clip)) as container:
        stream = container.streams.video[0]
        frames = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert (made_first, made_again) == (True, False)
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert (stream.width, stream.height) == (demo_clip.WIDTH, demo_clip.HEIGHT)
    assert frames == [Fraction(index, demo_clip.FPS) for index in range(3)]


def test_a_clip_of_another_recipe_is_made_anew(short_clip):
    short_clip.write_bytes(b"no video at all")

    assert demo_clip.make_clip(short_clip)
    assert not demo_clip.make_clip(short_clip)


def test_seven_people_are_small_and_some_are_large_too():
    small, large = set(), set()
    for frame in range(demo_clip.FRAMES):
        for index, affine in demo_clip.people(frame).items():
            walk = demo_clip.WALKS[index]
            height = face_height(walk.person, affine)
            assert 14 <= height <= 41 or height >= 64
            (small if height < 64 else large).add(walk.person)

    assert small == set(demo_clip.PEOPLE)
    assert len(small) == 7
    assert len(large) >= 2


def test_people_move_by_parts_of_pixels_and_change_their_size():
    for index, walk in enumerate(demo_clip.WALKS):
        frame = round(np.mean(walk.seconds) * demo_clip.FPS)
        here, there = demo_clip.people(frame)[index], demo_clip.people(frame + 1)[index]
        centre = demo_clip.PEOPLE[walk.person].centre
        moved = transform_points(there, centre) - transform_points(here, centre)

        assert 0.1 < np.hypot(*moved) < 20
        assert face_height(walk.person, here) != face_height(walk.person, there)


@pytest.mark.parametrize("name", demo_clip.PEOPLE)
def test_the_truth_through_the_inverse_of_a_walk_is_the_photograph_itself(name):
    index = next(index for index, walk in enumerate(demo_clip.WALKS) if walk.person == name)
    left, top, right, bottom = demo_clip.PEOPLE[name].face
    to_photo = np.linalg.inv(np.vstack([demo_clip.people(FRAME)[index], [0, 0, 1]]))[:2]
    to_photo[:, 2] -= left, top

    truth = demo_clip.truth(FRAME, to_photo, (right - left, bottom - top))

    inside = np.s_[(bottom - top) // 4 : (bottom - top) * 3 // 4, (right - left) // 4 : (right - left) * 3 // 4]
    photo = photograph(name)[top:bottom, left:right]
    same = np.abs(truth[inside].astype(int) - photo[inside]) <= 1
    assert same.mean() > 0.97, "but for the soft edge of the cut, where a face is turned away"


def test_the_truth_of_a_restoration_is_that_of_its_crop_enlarged():
    transform, side = crop_transform(*placed("astronaut"))

    crop = demo_clip.truth(FRAME, transform, (side, side))
    enlarged = demo_clip.truth(FRAME, scale_transform(transform, SCALE), (SCALE * side, SCALE * side))

    shrunk = cv2.resize(enlarged, (side, side), interpolation=cv2.INTER_AREA)
    assert psnr(shrunk, crop) > 35
    assert psnr(np.roll(shrunk, 1, 1), crop) < 30, "a shift by one pixel would show"


def test_the_camera_damages_small_faces_and_spares_large_ones():
    last = demo_clip.FRAMES - 1
    seen = demo_clip.camera_frame(last)

    kept = {True: [], False: []}
    for index, affine in demo_clip.people(last).items():
        walk = demo_clip.WALKS[index]
        transform, side = crop_transform(*placed_by(walk.person, affine))
        crop = cv2.warpAffine(seen, transform, (side, side), flags=cv2.INTER_LANCZOS4)
        large = face_height(walk.person, affine) >= 64
        kept[large].append(psnr(crop, demo_clip.truth(last, transform, (side, side))))

    assert min(kept[True]) > max(kept[False]) + 5


def test_a_box_follows_the_person_whose_face_it_holds():
    index = next(index for index, walk in enumerate(demo_clip.WALKS) if walk.person == "left")
    box, landmarks = placed("left")
    face = header(FaceAppeared(track_of(1, FRAME, box, landmarks)))
    there, _ = placed_by("left", demo_clip.people(FRAME + 30)[index])

    assert demo.follow(face, FRAME + 30) == pytest.approx(there, abs=1.0)
    assert np.abs(there - box).max() > 5


def test_a_box_that_holds_nobody_stays_where_it_is():
    face = header(FaceAppeared(track_of(1, FRAME, np.array([5.0, 5, 25, 25]), UPRIGHT)))

    assert demo.follow(face, FRAME + 30) == pytest.approx([5, 5, 25, 25])


def test_each_restoration_is_judged_against_the_original_of_its_own_square():
    lives = demo.lives_of(heard(1, "left", gain=True))

    (sighting,) = lives[1].sightings
    assert sighting.original.shape == sighting.restored.shape
    assert sighting.psnr == float("inf"), "this restorer gave the truth itself"
    assert 15 < sighting.bicubic_psnr < 60


def test_a_turned_crop_is_judged_against_an_original_turned_alike():
    lives = demo.lives_of(heard(1, "laughing", gain=True, turn=0.4))

    assert lives[1].sightings[0].psnr == float("inf")


def test_the_page_has_a_row_for_each_track_and_needs_nothing_but_the_video():
    tracks = {1: ("left", True), 2: ("standing", True), 3: ("astronaut", None)}
    lives = demo.lives_of(event for track, (name, gain) in tracks.items() for event in heard(track, name, gain=gain))
    rows = demo.rows_of(lives)
    still = np.zeros((demo_clip.HEIGHT, demo_clip.WIDTH, 3), np.uint8)

    page = demo_page.page(rows, {FRAME: still}, summary="frames 3, <faces> 3")

    assert page.count("<article>") == 3
    assert all(f"Track {track} " in page for track in tracks)
    assert page.count("<figure") == 5 + 5 + 3, (
        "frame, crop, bicubic, restored, original; untouched: frame, crop, original"
    )
    assert "large &amp; clean" in page
    assert "&lt;faces&gt;" in page
    assert set(re.findall(r'(?:src|href)="([^"]{0,9})', page)) == {"demo.mp4", "data:imag"}
    assert not re.search(r"https?://", page)


def test_a_row_shows_its_largest_whole_face_and_the_mean_of_all():
    small, large, cut_off = (
        sighting_of(20, height=18),
        sighting_of(23.5, height=20),
        sighting_of(30, height=25, seen=0.8),
    )

    row = demo_page.Row(1, (small, large, cut_off))

    assert row.psnr == pytest.approx(24.5)
    assert row.shown is large


def test_what_lies_beyond_the_frame_is_not_judged():
    transform = np.array([[2.0, 0, 20], [0, 2, -30]])

    seen = demo_clip.within_frame(transform, (60, 40))

    assert not seen[:, :19].any()
    assert seen[:, 21:].all()


def test_the_video_shows_a_restored_face_from_its_event_on():
    lives = demo.lives_of(heard(1, "left", gain=True, ends=FRAME + 2))
    empty = np.zeros((demo_clip.HEIGHT, demo_clip.WIDTH, 3), np.uint8)

    frames = list(demo_page.inset_frames([empty] * (FRAME + 4), lives, demo.follow))

    strip = [int(frame[-200:, :250].max()) for frame in frames]
    assert {frame.shape for frame in frames} == {(*demo_page.VIDEO_SIZE[::-1], 3)}
    assert max(strip[:FRAME]) < 50, "nothing was heard yet"
    assert min(strip[FRAME : FRAME + 3]) > 100
    assert strip[FRAME + 3] < 50, "the track has left"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")

    assert demo.main(["--out", str(tmp_path / "taken" / "demo")]) == 1
    assert re.fullmatch(r"streamer\.demo: .*taken.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([(30, 25)] * 5, "5 tracks were restored and received; at least 6 should be"),
        ([(30, 25)] * 3 + [(20, 26)] * 3, "0.50 dB worse than bicubic"),
    ],
)
def test_too_few_or_too_poor_restorations_fail_the_demo(rows, complaint):
    with pytest.raises(demo.DemoFailed, match=complaint):
        demo.check([demo_page.Row(track, (sighting_of(*row),)) for track, row in enumerate(rows)])


def test_enough_good_restorations_pass():
    demo.check([demo_page.Row(track, (sighting_of(30, 25),)) for track in range(6)])


def test_the_whole_demo_ends_well_with_the_promised_last_lines(tmp_path):
    _skip_without("centerface", "detection")
    _skip_without("sgen-small", "restoration")

    command = [sys.executable, "-m", "streamer.demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stderr
    *_, summary, where = done.stdout.splitlines()
    assert re.fullmatch(r"frames 120, faces \d+, restored \d+, published \d+, fps [\d.]+, drops 0", summary)
    assert where == f"look at {tmp_path / 'demo' / 'index.html'}"
    assert (tmp_path / "demo" / "index.html").read_text(encoding="utf-8").count("<article>") >= 8
    with av.open(str(tmp_path / "demo" / "demo.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 120


def _skip_without(model: str, task: str) -> None:
    try:
        default_store(offline=True).find(model, task=task)
    except ModelError as exc:
        pytest.skip(f"the demo needs {model}: {exc}")


def face_height(name: str, affine: np.ndarray) -> float:
    _, top, _, bottom = demo_clip.PEOPLE[name].face
    return float((bottom - top) * np.hypot(*affine[:, 0]))


def photograph(name: str) -> np.ndarray:
    import insightface
    import skimage

    if name == "astronaut":
        return cv2.imread(str(Path(skimage.__file__).parent / "data/astronaut.png"))
    return cv2.imread(str(Path(insightface.__file__).parent / "data/images/t1.jpg"))


def placed(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the box and landmarks of a person's face in the frame FRAME."""
    index = next(index for index, walk in enumerate(demo_clip.WALKS) if walk.person == name)
    return placed_by(name, demo_clip.people(FRAME)[index])


def placed_by(name: str, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    left, top, right, bottom = demo_clip.PEOPLE[name].face
    half = np.array([right - left, bottom - top]) / 2 * np.hypot(*affine[:, 0])
    centre = transform_points(affine, demo_clip.PEOPLE[name].centre)
    return np.concatenate([centre - half, centre + half]), centre + (UPRIGHT - 0.5) * 2 * half


def heard(
    track: int, name: str, *, gain: bool | None, ends: int = FRAME + 5, turn: float = 0.0
) -> list[wire.WireEvent]:
    """Return a track's events: with `gain` restored to the truth itself, without worse than it, None untouched."""
    box, landmarks = placed(name)
    centre = landmarks.mean(0)
    turning = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    landmarks = (landmarks - centre) @ turning.T + centre
    transform, side = crop_transform(box, landmarks)
    transform = np.round(transform, 6)
    image = cv2.GaussianBlur(demo_clip.truth(FRAME, transform, (side, side)), (0, 0), 1.0)
    begun, crop = track_of(track, FRAME, box, landmarks), None
    crop = Crop(begun, image, transform, QUALITY)
    restoration = None
    if gain is not None:
        truth = demo_clip.truth(FRAME, np.round(scale_transform(transform, SCALE), 6), (SCALE * side, SCALE * side))
        restoration = Restoration(truth, "sgen-small", "0" * 64, SCALE, "onnxruntime-cpu", "fp32")
    route = Route("none", "large & clean") if gain is None else Route("sgen-small", "small")
    events = (
        FaceAppeared(begun),
        FaceIdentified(crop, route, restoration, None, "no embedder is configured"),
        FaceLeft(track_of(track, ends, box, landmarks)),
    )
    return [received(event) for event in events]


def track_of(track: int, frame: int, box: np.ndarray, landmarks: np.ndarray) -> Track:
    moment = Moment("hall", frame, frame / demo_clip.FPS, datetime(2026, 1, 1, tzinfo=UTC), "file")
    return Track(track, moment, box.astype(np.float32), landmarks.astype(np.float32), 0.8)


def received(event: FaceAppeared | FaceIdentified | FaceLeft) -> wire.WireEvent:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return wire.decode(wire.encode(event, stream="box", epoch="e", seq=0, topic_seq=0, published_at=now))


def header(event: FaceAppeared) -> wire.FaceHeader:
    found = received(event).header
    assert isinstance(found, wire.FaceHeader)
    return found


def sighting_of(psnr: float, bicubic_psnr: float = 25.0, *, height: int = 20, seen: float = 1.0) -> demo_page.Sighting:
    image = np.zeros((8, 8, 3), np.uint8)
    face = header(FaceAppeared(track_of(1, 0, np.array([0.0, 0, 20, height]), UPRIGHT)))
    return demo_page.Sighting(face, image, image, image, seen, psnr, bicubic_psnr)


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((image.astype(float) - other) ** 2)))
