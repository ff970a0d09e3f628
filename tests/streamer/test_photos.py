"""Photos restored: what becomes of the faces, of all around them, and of the files that were there before."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from engines.store import default_store
from streamer.assembly import Networks, make_router
from streamer.geometry import cut_crop
from streamer.photos import PhotoError, PhotoStages, put_back, refuse_overwriting, restore_photo

PHOTO = np.ascontiguousarray(astronaut()[..., ::-1])
SMALL = cv2.resize(PHOTO, (160, 160), interpolation=cv2.INTER_AREA)
Files = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def stages() -> PhotoStages:
    networks = Networks(default_store(), threads=1)
    restorer = networks.restorer("sgen-small")
    return PhotoStages(networks.detector("centerface"), make_router(restorer, max_size=256), restorer)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    def touch(*names: str) -> list[Path]:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return [tmp_path / name for name in names]

    return touch


def turned(image: np.ndarray, degrees: float) -> np.ndarray:
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    return cv2.warpAffine(image, turn, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def square_in(photo: np.ndarray, transform: np.ndarray, side: int) -> np.ndarray:
    """Return where in the photo the crop lies, as a mask (height, width) of bool."""
    rows, columns = np.indices(photo.shape[:2])
    there = np.stack([columns, rows, np.ones_like(rows)], -1) @ transform.T
    return ((there > -1) & (there < side)).all(-1)


def likeness(some: np.ndarray, others: np.ndarray) -> float:
    return float(np.corrcoef(some.ravel(), others.ravel())[0, 1])


@pytest.mark.parametrize(("degrees", "upright"), [(7, True), (-25, False)])
def test_the_restored_face_lies_in_its_place_and_all_around_it_is_the_photo(stages, tmp_path, degrees, upright):
    photo = turned(SMALL, degrees)
    cv2.imwrite(str(tmp_path / "woman.png"), photo)
    (found,) = stages.detector.detect([photo])
    crop, transform = cut_crop(photo, found.boxes[0], found.landmarks[0])
    side = len(crop)

    (route,) = restore_photo(tmp_path / "woman.png", tmp_path, stages)

    assert route.restorer == "sgen-small"
    assert (transform[0, 1] == 0) == upright
    whole, restored = (cv2.imread(str(tmp_path / f"woman.{kind}.png")) for kind in ("restored", "face1.restored"))
    square = square_in(photo, transform, side)
    assert np.array_equal(whole[~square], photo[~square])
    middle = slice(side // 4, side - side // 4)
    there = cv2.warpAffine(whole, transform, (side, side), flags=cv2.INTER_CUBIC)[middle, middle].astype(float)
    wanted = cv2.resize(restored, (side, side), interpolation=cv2.INTER_AREA)[middle, middle].astype(float)
    before = crop[middle, middle].astype(float)
    assert likeness(there, wanted) > 0.98
    assert likeness(there - before, wanted - before) > 0.7


@pytest.mark.parametrize("corner", [(0, 0), (-30, -20), (110, 130), (70, 60), (500, 500), (-500, 30)])
def test_a_face_at_or_beyond_the_edge_is_put_back_as_far_as_it_is_in_the_photo(corner):
    photo = np.full((160, 160, 3), 100, np.uint8)
    transform = np.array([[1.0, 0, -corner[0]], [0, 1.0, -corner[1]]])

    whole = put_back(photo, np.full((100, 100, 3), 200, np.uint8), transform, 50)

    square = square_in(photo, transform, 50)
    middle = square_in(photo, transform - [[0, 0, 12], [0, 0, 12]], 26)
    assert (whole[~square] == 100).all()
    assert (whole[middle] == 200).all()
    assert (photo == 100).all()


def test_a_small_face_put_back_into_a_large_photo_costs_little_more_than_the_photo():
    photo = np.zeros((2000, 3000, 3), np.uint8)
    restored = np.full((80, 80, 3), 200, np.uint8)
    tracemalloc.start()
    try:
        put_back(photo, restored, np.array([[1.0, 0, -700], [0, 1.0, -900]]), 40)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 1.5 * photo.nbytes


@pytest.mark.parametrize(
    ("names", "crops"),
    [
        (["a.png"], True),
        (["b.jpg", "a.png"], True),
        (["a.png", "a.face1.crop.png"], False),
        (["a.jpg", "a.restored.png"], False),
        (["a.face1.png", "a.face1.restored.png"], False),
    ],
)
def test_results_that_would_overwrite_inputs_are_refused(files, tmp_path, names, crops):
    inputs = files(*names)

    with pytest.raises(PhotoError) as refused:
        refuse_overwriting(inputs, tmp_path / "sub" / "..", crops=crops)

    assert str(inputs[-1]) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_results_that_are_links_to_inputs_are_refused(files, tmp_path):
    inputs = files("in/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").symlink_to(inputs[0])

    with pytest.raises(PhotoError, match=r"in/a\.png"):
        refuse_overwriting(inputs, tmp_path / "out", crops=True)


@pytest.mark.parametrize(
    ("names", "crops", "out"),
    [
        (["a.jpg"], True, "."),
        (["a.png", "b.png"], False, "."),
        (["a.png", "c.restored.png"], False, "."),
        (["in/a.png", "out/b.png"], False, "out"),
        (["in/a.png"], True, "out"),
    ],
)
def test_results_beside_the_inputs_are_allowed(files, tmp_path, names, crops, out):
    refuse_overwriting(files(*names), tmp_path / out, crops=crops)
