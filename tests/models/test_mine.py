import csv
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from media import walk, write_video

pytest.importorskip("torch", reason="the extra train is not installed")
pytest.importorskip("PIL", reason="the extra train is not installed")

from models.mine import LandmarkDetector, MineError, footage, main, mine
from models.train_scgan import load_low

CLIPS = ("classroom_480x270.mp4", "Corridor.avi", "carphone/0.png")


@pytest.fixture(scope="module")
def yunet(shared: Path) -> Path:
    path = shared / "models/face_detection_yunet_2023mar.onnx"
    if not path.exists():
        pytest.skip("YuNet does not lie in ../shared/models")
    return path


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """A person before a wall, (256, 448, 3); the face is about 50 px high."""
    return walk(1)[0]


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "faces.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_face_of_a_picture_is_cut_out_at_its_native_size_with_box_and_landmarks(yunet, scene, tmp_path):
    cv2.imwrite(str(tmp_path / "photo.png"), scene)

    found = mine([tmp_path / "photo.png"], tmp_path / "out", LandmarkDetector(yunet), least=30, most=80, every=1)

    (row,) = rows(tmp_path / "out")
    assert (found, row["file"]) == (1, "photo/000000_000.png")
    crop = cv2.imread(str(tmp_path / "out" / row["file"]))
    assert cv2.matchTemplate(scene, crop, cv2.TM_SQDIFF).min() == 0  # every pixel as it was
    box = np.array([float(row[f"face_{end}"]) for end in ("x1", "y1", "x2", "y2")])
    sides = box[2:] - box[:2]
    assert crop.shape[:2] == (round(1.6 * sides.max()),) * 2
    assert (box[:2] + box[2:]) / 2 == pytest.approx(np.full(2, len(crop) / 2), abs=1)
    points = np.array([[float(row[f"{part}_{axis}"]) for axis in "xy"] for part in ("le", "re", "nose", "lm", "rm")])
    assert np.all(points > box[:2]) and np.all(points < box[2:])
    assert points[0, 0] < points[2, 0] < points[1, 0] and points[3, 0] < points[4, 0]
    assert points[:2, 1].max() < points[2, 1] < points[3:, 1].min()


def test_a_place_gives_one_crop_in_a_stretch_of_time_and_that_is_the_sharpest(yunet, scene, tmp_path):
    blurred = cv2.GaussianBlur(scene, (0, 0), 1.5)
    path = write_video(tmp_path / "shop.mp4", [blurred] * 5 + [scene] * 45)  # 2 s

    mine([path], tmp_path / "out", LandmarkDetector(yunet), least=30, most=80, every=1)

    frames = [int(Path(row["file"]).stem.partition("_")[0]) for row in rows(tmp_path / "out")]
    assert len(frames) == 2
    assert 5 <= frames[0] < 25 <= frames[1] < 50
    assert len(load_low(tmp_path / "out")) == 2


def test_faces_too_small_for_the_detector_are_found_on_enlarged_pictures(yunet, scene, tmp_path):
    small = cv2.resize(scene, None, fx=0.22, fy=0.22, interpolation=cv2.INTER_AREA)  # a face of about 11 px
    wall = np.full((180, 240, 3), 120, np.uint8)
    wall[60 : 60 + small.shape[0], 60 : 60 + small.shape[1]] = small
    cv2.imwrite(str(tmp_path / "crowd.png"), wall)

    found = mine(
        [tmp_path / "crowd.png"], tmp_path / "out", LandmarkDetector(yunet, least=8), least=8, most=16, every=1
    )

    (row,) = rows(tmp_path / "out")
    assert found == 1
    assert 13 <= cv2.imread(str(tmp_path / "out" / row["file"])).shape[0] <= 26


@pytest.mark.parametrize(("least", "most"), [(8, 30), (80, 200)])
def test_faces_of_other_heights_are_left(yunet, scene, tmp_path, least, most):
    cv2.imwrite(str(tmp_path / "photo.png"), scene)

    assert (
        mine([tmp_path / "photo.png"], tmp_path / "out", LandmarkDetector(yunet), least=least, most=most, every=1) == 0
    )


def test_a_face_whose_crop_would_reach_beyond_the_picture_is_left(yunet, scene, tmp_path):
    detector = LandmarkDetector(yunet)
    top, bottom = detector.find(scene)[0][0, [1, 3]].astype(int)
    low = scene[top - 6 : bottom + 6]
    cv2.imwrite(str(tmp_path / "edge.png"), low)

    assert len(detector.find(low)[0]) == 1
    assert mine([tmp_path / "edge.png"], tmp_path / "out", detector, least=8, most=200, every=1) == 0


def test_what_was_mined_before_is_not_mixed_with_what_is_mined_now(yunet, scene, tmp_path):
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), scene)
    detector = LandmarkDetector(yunet)
    mine([tmp_path / "a.png"], tmp_path / "out", detector, least=30, most=80, every=1)

    mine([tmp_path / "b.png"], tmp_path / "out", detector, least=30, most=80, every=1)

    assert [row["file"][0] for row in rows(tmp_path / "out")] == ["a", "b"]
    with pytest.raises(MineError, match=r"out/a exists: a\.png has been mined"):
        mine([tmp_path / "a.png"], tmp_path / "out", detector, least=30, most=80, every=1)


def test_of_a_folder_only_what_lies_in_it_directly_is_footage(tmp_path):
    (tmp_path / "photos/lq").mkdir(parents=True)
    for name in ("b.mp4", "a.JPG", "annotations.json", "lq/c.png"):
        (tmp_path / "photos" / name).touch()

    assert [path.name for path in footage([tmp_path / "photos"])] == ["a.JPG", "b.mp4"]


@pytest.mark.parametrize("clip", CLIPS)
def test_nothing_is_mined_from_the_clips_that_judge(tmp_path, clip, monkeypatch, capsys):
    path = tmp_path / "videos" / clip
    path.parent.mkdir(parents=True)
    path.touch()
    for source in (path, path.parent):
        told = run(monkeypatch, capsys, tmp_path, str(source))
        assert "is kept to judge restorers by, nothing is mined from it" in told
    assert not (tmp_path / "out").exists()


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, *given: str) -> str:
    """Mine into `folder`/out, which fails by exit code 2 and one line; return that."""
    monkeypatch.setattr(sys, "argv", ["mine", "--out", str(folder / "out"), "--detector", "no.onnx", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert (ended.value.code, told.count("\n")) == (2, 1)
    return told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["nowhere.mp4"], "nowhere.mp4 does not exist"),
        (["empty"], "empty: no videos, no pictures"),
        (["a.png", "a.mp4"], "would both be mined into a: rename one"),
        (["--least", "9", "--most", "8", "a.png"], "--least 9, --most 8: that is no range"),
        (["--every", "0", "a.png"], "--every 0: "),
        (["a.png"], "no.onnx does not exist: --detector wants YuNet"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, given, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.png", "a.mp4"):
        (tmp_path / name).touch()

    assert told in run(monkeypatch, capsys, tmp_path, *given)


@pytest.mark.parametrize(("name", "told"), [("broken.png", "is no picture"), ("broken.mp4", "Invalid data")])
def test_footage_that_cannot_be_read_is_told_by_its_name(yunet, tmp_path, name, told):
    (tmp_path / name).write_bytes(b"broken")

    with pytest.raises(MineError, match=rf"{name}.*{told}") as said:
        mine([tmp_path / name], tmp_path / "out", LandmarkDetector(yunet), least=8, most=80, every=1)

    assert "\n" not in str(said.value)
