import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

import io  # noqa: E402
import tarfile  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from skimage.data import astronaut  # noqa: E402

from models.dataset import Clean, Face, FaceTensors, load_faces, load_names  # noqa: E402
from models.degradation import SGEN_SIZES  # noqa: E402

CPU = torch.device("cpu")
COLOURS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1]])  # RGB, of the five landmarks
POINTS = np.array([[0.39, 0.46], [0.61, 0.44], [0.5, 0.55], [0.42, 0.66], [0.6, 0.65]])  # in parts of the side
MIRRORED = [1, 0, 2, 4, 3]


def dotted(side: int, *, width: int | None = None) -> Face:
    """A face of nothing but five round dots at its landmarks, in the middle square of its image."""
    width, height = width or side, side
    least = min(width, height)
    corner = np.array([(width - least) / 2, (height - least) / 2])
    landmarks = POINTS * least + corner
    y, x = np.mgrid[0:height, 0:width]
    image = np.zeros((height, width, 3))
    for (px, py), colour in zip(landmarks, COLOURS, strict=True):
        image += 255 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (0.02 * least) ** 2))[..., None] * colour
    x1, y1 = corner + 0.25 * least
    box = (x1, y1, x1 + 0.5 * least, y1 + 0.55 * least)
    return Face("dots/0", "0", image.round().astype(np.uint8)[..., ::-1], box, landmarks.astype(np.float32))


def found(image: torch.Tensor) -> np.ndarray:
    """Where the dots (5, 2) lie in an image (3, h, w), by their colours."""
    channels = (image / 255).double().numpy()
    y, x = np.mgrid[0 : image.shape[1], 0 : image.shape[2]]
    places = []
    for colour in COLOURS:
        weight = np.prod([c if lit else 1 - c for c, lit in zip(channels, colour, strict=True)], axis=0)
        weight = np.where(weight > 0.3 * weight.max(), weight, 0)
        places.append([(weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()])
    return np.array(places)


def furthest(clean: Clean) -> tuple[float, list[bool]]:
    """How far the landmarks lie from the dots, in pixels, and which faces are mirrored."""
    far, mirrored = [], []
    for image, landmarks in zip(clean.images, clean.landmarks.numpy(), strict=True):
        dots = found(image)
        errors = [np.abs(points - landmarks).max() for points in (dots, dots[MIRRORED])]
        far.append(min(errors))
        mirrored.append(errors[1] < errors[0])
    return max(far), mirrored


@pytest.mark.parametrize(
    "face", [dotted(256), dotted(210), dotted(150), dotted(300, width=420), dotted(420, width=300)]
)
@pytest.mark.parametrize("side", [96, 144])
def test_landmarks_stay_on_the_face_through_crop_turn_and_mirror(face, side):
    tensors = FaceTensors([face], CPU)

    clean = tensors.crops(np.random.default_rng(0), 24, side)

    far, mirrored = furthest(clean)
    assert clean.images.shape == (24, 3, side, side)
    assert far < 0.35
    assert any(mirrored) and not all(mirrored)


@pytest.mark.parametrize("size", SGEN_SIZES)
def test_landmarks_stay_on_the_face_in_portraits(size):
    tensors = FaceTensors([dotted(256), dotted(300, width=420)], CPU)

    clean = tensors.portraits(np.random.default_rng(0), 8, size)

    far, mirrored = furthest(clean)
    assert clean.images.shape == (8, 3, size[1], size[0])
    assert far < 0.35
    assert any(mirrored) and not all(mirrored)


def test_crops_are_framed_at_1_1_to_1_8_times_the_box_and_turned_and_shifted():
    face = dotted(256)
    crops = FaceTensors([face], CPU).crops(np.random.default_rng(0), 200, 128)
    points = crops.landmarks.numpy()

    between = points[:, 1] - points[:, 0]
    stored_between = face.landmarks[1] - face.landmarks[0]
    framings = 128 / (0.55 * 256) * np.linalg.norm(stored_between) / np.linalg.norm(between, axis=1)
    angles = np.degrees(np.arctan2(between[:, 1], between[:, 0]))

    assert 1.099 < framings.min() < 1.2
    assert 1.7 < framings.max() < 1.801
    assert 4 < angles.std() < 9
    assert points[:, 2].std(axis=0).min() > 1


def test_without_variation_a_crop_is_upright_and_framed_at_1_6():
    face = dotted(256)

    crops = FaceTensors([face], CPU).crops(np.random.default_rng(0), 2, 128, vary=False)

    scale = 128 / (1.6 * 0.55 * 256)
    centre = np.array([face.box[0] + face.box[2], face.box[1] + face.box[3]]) / 2
    assert np.abs(crops.landmarks.numpy() - ((face.landmarks - centre) * scale + 63.5)).max() < 1e-3
    assert furthest(crops) == (pytest.approx(0, abs=0.3), [False, False])


@pytest.mark.parametrize("side", [64, 128, 192, 256])
def test_a_face_is_enlarged_by_no_more_than_a_fifth_where_a_large_one_is_there(side):
    sizes = (256, 150)
    crops = FaceTensors([dotted(size) for size in sizes], CPU).crops(np.random.default_rng(1), 64, side)

    eyes = np.linalg.norm(crops.landmarks[:, 1].numpy() - crops.landmarks[:, 0].numpy(), axis=1)
    stored_eyes = np.linalg.norm(POINTS[1] - POINTS[0]) * (256 if side > 151 else 144)
    assert eyes.max() / stored_eyes < 1.21


def test_a_small_crop_is_not_aliased():
    stripes = np.tile(np.repeat(np.array([0, 255], np.uint8), 2), 64)  # as fine as only every fourth pixel can hold
    image = np.repeat(np.repeat(stripes[None], 256, 0)[..., None], 3, 2)
    faces = FaceTensors([Face("a/0", "a", image, (48, 48, 208, 208), POINTS.astype(np.float32) * 256)], CPU)

    (crop,) = faces.crops(np.random.default_rng(0), 1, 64, vary=False).images

    assert crop.std() < 3


@pytest.mark.parametrize("size", SGEN_SIZES)
def test_a_portrait_is_what_opencv_makes_of_the_centre_by_area(size):
    image = cv2.resize(astronaut()[0:224, 112:336, ::-1], (256, 256), interpolation=cv2.INTER_CUBIC)
    other = np.ascontiguousarray(image[::-1])
    faces = [
        Face(f"a/{i}", "a", each, (0, 0, 1, 1), np.zeros((5, 2), np.float32)) for i, each in enumerate((image, other))
    ]

    clean = FaceTensors(faces, CPU).portraits(np.random.default_rng(0), 2, size, vary=False)

    for made, each in zip(clean.images, (image, other), strict=True):
        expected = cv2.resize(each[:, 19:236], size, interpolation=cv2.INTER_AREA)
        assert np.abs(made.permute(1, 2, 0).numpy()[..., ::-1] - expected).max() <= 1


def grid(number: int, side: int = 256) -> Face:
    """A face whose every pixel tells its column, its row and the number of the face."""
    y, x = np.mgrid[0:side, 0:side]
    image = np.stack([np.full_like(x, number), y, x], axis=2).astype(np.uint8)  # BGR
    return Face(f"grid/{number}", str(number), image, (50, 50, 200, 200), (POINTS * side).astype(np.float32))


def test_patches_are_windows_of_the_face_each_from_its_own_place_in_all_eight_turns():
    tensors = FaceTensors([grid(0), grid(1), grid(2)], CPU)

    clean = tensors.patches(np.random.default_rng(0), 64, 32)

    places, turns = set(), set()
    for x, y, number in clean.images.int().numpy():
        corner = int(x.min()), int(y.min())
        window = np.stack(np.meshgrid(np.arange(32) + corner[0], np.arange(32) + corner[1], indexing="xy"))
        matching = [k for k, turned in enumerate(_turned(window)) if np.array_equal(turned, [x, y])]
        assert len(matching) == 1
        assert len(np.unique(number)) == 1
        places.add((*corner, number[0, 0]))
        turns.update(matching)
    assert len(places) > 60
    assert turns == set(range(8))
    assert torch.isnan(clean.landmarks).all()


def _turned(window: np.ndarray) -> Sequence[np.ndarray]:
    flat = [window, window[:, :, ::-1], window[:, ::-1], window[:, ::-1, ::-1]]
    return [*flat, *(each.transpose(0, 2, 1) for each in flat)]


def test_without_variation_patches_are_the_centres_and_know_their_landmarks():
    clean = FaceTensors([grid(0), grid(1)], CPU).patches(np.random.default_rng(0), 2, 100, vary=False)

    assert torch.equal(clean.images[:, 0, 0], torch.arange(78.0, 178).expand(2, 100))
    assert torch.equal(clean.images[:, 1, :, 0], torch.arange(78.0, 178).expand(2, 100))
    assert clean.images[:, 2].amax(dim=(1, 2)).tolist() == [0, 1]
    assert np.allclose(clean.landmarks.numpy(), POINTS * 256 - 78, atol=1e-3)


def test_windows_larger_than_the_faces_are_refused():
    with pytest.raises(ValueError, match="windows of 256 px do not fit into faces of 200 px"):
        FaceTensors([dotted(210)], CPU).patches(np.random.default_rng(0), 1, 256)


def test_a_face_is_kept_at_the_largest_side_that_it_reaches():
    tensors = FaceTensors([dotted(side) for side in (500, 256, 255, 200, 199, 144, 143)], CPU)

    assert [(group.side, len(group)) for group in tensors.groups] == [(256, 2), (200, 2), (144, 2)]
    assert (len(tensors), tensors.side) == (6, 256)


def test_faces_that_are_all_too_small_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^the largest of 2 faces has 143 px, 144 px are needed$"):
        FaceTensors([dotted(143), dotted(143, width=200)], CPU)

    with pytest.raises(ValueError, match=r"^the largest of 0 faces"):
        FaceTensors([], CPU)


@pytest.mark.parametrize("draw", [
    lambda faces, rng: faces.portraits(rng, 4, (96, 128)),
    lambda faces, rng: faces.patches(rng, 4, 64),
    lambda faces, rng: faces.crops(rng, 4, 96),
], ids=["portraits", "patches", "crops"])  # fmt: skip
def test_the_same_draws_give_the_same_faces(draw):
    tensors = FaceTensors([grid(k) for k in range(9)], CPU)

    first, again, other = (draw(tensors, np.random.default_rng(seed)) for seed in (3, 3, 4))

    assert torch.equal(first.images, again.images)
    assert torch.equal(first.landmarks.nan_to_num(-1), again.landmarks.nan_to_num(-1))
    assert not torch.equal(first.images, other.images)


# Loading


def folder(path: Path, **images: np.ndarray) -> Path:
    for name, image in images.items():
        file = path / f"{name.replace('__', '/')}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), image)
    return path


def test_a_user_s_folder_may_hold_images_that_are_not_square(tmp_path):
    wide, tall = (dotted(200, width=300).image, dotted(300, width=200).image)
    faces = load_faces(folder(tmp_path / "own", anna__1=wide, anna__2=tall, berta=wide))

    assert [(face.name, face.identity) for face in faces] == [
        ("own/anna/1.png", "anna"), ("own/anna/2.png", "anna"), ("own/berta.png", "berta")
    ]  # fmt: skip
    for face in faces:
        x1, y1, x2, y2 = face.box
        height, width = face.image.shape[:2]
        assert ((x1 + x2) / 2, (y1 + y2) / 2) == (width / 2, height / 2)
        assert x2 - x1 == y2 - y1 == pytest.approx(300 / 1.6)
        assert np.isnan(face.landmarks).all()

    crops = FaceTensors(faces, CPU).crops(np.random.default_rng(0), 3, 96, vary=False)
    # the middle of the image is that of the crop, where half of the distance from nose to the middle is the same
    scale = 96 / 300
    expected = (POINTS - 0.5) * 200 * scale + 47.5
    for image in crops.images:
        assert np.abs(found(image) - expected).max() < 0.6


def archive(path: Path, rows: Sequence[dict[str, object]], images: dict[str, bytes]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(columns), *(",".join(str(row.get(name, "")) for name in columns) for row in rows)]
    path.with_suffix(".csv").write_text("\n".join(lines) + "\n")
    with tarfile.open(path, "w") as tar:
        for name, content in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def row(name: str, **other: object) -> dict[str, object]:
    points = {
        f"{p}_{axis}": 10 * i + j for i, p in enumerate(("le", "re", "nose", "lm", "rm")) for j, axis in enumerate("xy")
    }
    return {"file": name, "face_x1": 1, "face_y1": 2, "face_x2": 3.5, "face_y2": 4, **points, **other}


PNG = cv2.imencode(".png", np.full((160, 160, 3), 90, np.uint8))[1].tobytes()


def test_a_tar_gives_the_faces_of_its_table_without_utkface_and_what_is_excluded(tmp_path):
    names = ("a/1.png", "a/2.png", "b/1.png", "u/1.png", "stranger.png")
    rows = [row(name, identity=name[0], source="UTKFace" if name[0] == "u" else "celeba") for name in names[:4]]
    tar = archive(tmp_path / "faces_own.tar", rows, dict.fromkeys(names, PNG))
    (tmp_path / "list.txt").write_text("# faces that nothing trains on\n\nfaces_own a/2.png\nother b/1.png\n")

    faces = load_faces(tar, exclude=load_names(tmp_path / "list.txt"))

    assert [(face.name, face.identity) for face in faces] == [("faces_own/a/1.png", "a"), ("faces_own/b/1.png", "b")]
    assert faces[0].box == (1, 2, 3.5, 4)
    assert faces[0].landmarks.tolist() == [[0, 1], [10, 11], [20, 21], [30, 31], [40, 41]]
    assert faces[0].image.shape == (160, 160, 3)


def test_names_on_a_list_may_hold_blanks(tmp_path):
    (tmp_path / "list.txt").write_text("own Anna Maria/1 b.png\n")

    assert load_names(tmp_path / "list.txt") == {"own/Anna Maria/1 b.png"}


def test_what_cannot_be_loaded_is_named_in_one_line(tmp_path):
    broken = folder(tmp_path / "broken", a=np.zeros((9, 9, 3), np.uint8))
    (broken / "b.jpg").write_bytes(b"no image")
    no_image = archive(tmp_path / "no_image.tar", [row("a.png")], {"a.png": b"no image"})
    no_column = archive(tmp_path / "no_column.tar", [{"file": "a.png"}], {"a.png": PNG})
    no_tar = archive(tmp_path / "no_tar.tar", [row("a.png")], {})
    no_tar.write_bytes(b"no tar" * 200)
    no_table = archive(tmp_path / "no_table.tar", [row("a.png")], {"a.png": PNG})
    no_table.with_suffix(".csv").unlink()

    for source, error, told in (
        (tmp_path / "nowhere", FileNotFoundError, "nowhere does not exist"),
        (no_table, FileNotFoundError, "no_table.csv"),
        (broken, ValueError, "b.jpg is no image"),
        (no_image, ValueError, "no_image.tar: a.png is no image"),
        (no_column, ValueError, "no_column.csv has no column 'face_x1'"),
        (no_tar, ValueError, "no_tar.tar is no tar, or not a whole one"),
    ):
        with pytest.raises(error) as caught:
            load_faces(source)

        assert told in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_real_faces_lie_where_their_table_says(shared):
    if not (shared / "data/faces_val.tar").exists():
        pytest.skip("shared/data/faces_val.tar is absent")
    excluded = load_names(shared / "data/calibration.txt")

    faces = load_faces(shared / "data/faces_val.tar", exclude=excluded)

    assert len(faces) == 314
    for face in faces:
        assert (face.landmarks > 0).all() and (face.landmarks < face.image.shape[0]).all()
    crops = FaceTensors(faces, CPU).crops(np.random.default_rng(0), 64, 128)
    inside = (crops.landmarks > 0) & (crops.landmarks < 127)
    assert inside.float().mean() > 0.98
