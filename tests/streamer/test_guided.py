"""Guided restoration: which guide is taken, what goes into the network and what comes out of it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from skimage.data import astronaut

from engines.card import CARD_KEY, CardError, NetworkCard, TensorSpec
from engines.ort import OnnxEngine
from engines.store import Model, default_store
from streamer.geometry import UPRIGHT
from streamer.guided import Guide, GuidedRestorer, best_by_pose, fused, pose_distance

PHOTO = np.ascontiguousarray(astronaut()[..., ::-1])
CROP = PHOTO[28:228, 122:322]


def card(**changes: object) -> NetworkCard:
    image = {"layout": "NCHW", "shape": ("n", 3, 64, 64)}
    outputs = [TensorSpec(name=name, **image) for name in ("restored", "warped")]
    outputs.append(TensorSpec(name="mask", layout="NCHW", shape=("n", 1, 64, 64)))
    known = {
        "name": "gfrnet", "task": "guided-restoration", "scales": (), "result_size": 64, "license": "public domain",
        "mean": (127.5,) * 3, "std": (127.5,) * 3, "output_range": (-1.0, 1.0), "outputs": tuple(outputs),
        "inputs": tuple(TensorSpec(name=name, **image) for name in ("image", "guide")),
    }  # fmt: skip
    return NetworkCard.model_validate({**known, **changes})


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A network whose result is the mean of crop and guide, whose warped guide is the guide, whose mask its red."""
    nodes = [
        helper.make_node("Add", ["image", "guide"], ["sum"]),
        helper.make_node("Mul", ["sum", "half"], ["restored"]),
        helper.make_node("Identity", ["guide"], ["warped"]),
        helper.make_node("Slice", ["guide", "zero", "one", "one"], ["red"]),
        helper.make_node("Mul", ["red", "half"], ["small"]),
        helper.make_node("Add", ["small", "half"], ["mask"]),
    ]
    constants = {"half": np.float32(0.5), "zero": np.array([0]), "one": np.array([1])}
    told = card()
    make = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "guided",
        [make(spec.name, TensorProto.FLOAT, spec.shape) for spec in told.inputs],
        [make(spec.name, TensorProto.FLOAT, spec.shape) for spec in told.outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    model.metadata_props.add(key=CARD_KEY, value=told.model_dump_json())
    path = tmp_path / "models/gfrnet.onnx"
    path.parent.mkdir()
    onnx.save(model, path)
    return path


@pytest.fixture
def restorer(network: Path) -> GuidedRestorer:
    return GuidedRestorer(OnnxEngine(Model.read(network), threads=1))


def guide(
    colour: tuple[int, int, int], *, landmarks: np.ndarray | None = None, size: tuple[int, int] = (64, 64)
) -> Guide:
    image = np.full((*size, 3), colour, np.uint8)
    return Guide(f"{colour}.png", image, UPRIGHT * 40 + 32 if landmarks is None else landmarks)


def turned(yaw_deg: float) -> np.ndarray:
    """Landmarks of a head of this yaw: the nose stands out, all else lies in a plane."""
    depth = np.array([0, 0, 0.35, 0.05, 0.05])
    turn = np.radians(yaw_deg)
    points = np.stack([UPRIGHT[:, 0] * np.cos(turn) + depth * np.sin(turn), UPRIGHT[:, 1]], axis=1)
    return np.asarray(40 * points + 32, np.float32)


def test_crop_and_guide_both_reach_the_network_as_large_as_its_result(restorer):
    crop = np.full((20, 20, 3), (200, 100, 0), np.uint8)

    (face,) = restorer.restore(crop, UPRIGHT, [guide((0, 100, 200))])

    assert face.restored.shape == (64, 64, 3)
    assert np.abs(face.restored.astype(int) - (100, 100, 100)).max() <= 1
    assert np.abs(face.warped.astype(int) - (0, 100, 200)).max() <= 1
    assert face.mask == pytest.approx(np.full((64, 64), 200 / 255), abs=0.01)


@pytest.mark.parametrize("enlarged", [0.4, 1.0, 2.5], ids=["small guide", "as large", "large guide"])
def test_where_the_card_asks_for_it_the_guide_is_laid_onto_the_crop_by_landmarks(restorer, enlarged):
    landmarks = UPRIGHT * 100 + (100, 90)
    askew = cv2.getRotationMatrix2D((100, 100), 25, 0.8 * enlarged)
    askew[:, 2] += (enlarged - 1) * 100 + 7
    side = round(200 * enlarged)
    image = cv2.warpAffine(CROP, askew, (side, side), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
    photo = Guide("askew.png", image, landmarks @ askew[:, :2].T + askew[:, 2])

    (as_it_is,) = restorer.restore(CROP, landmarks, [photo])
    restorer.engine.card = restorer.engine.card.model_copy(update={"guide_laid": True})
    (laid,) = restorer.restore(CROP, landmarks, [photo])

    wanted, middle = cv2.resize(CROP, (64, 64), interpolation=cv2.INTER_AREA).astype(int), slice(16, 48)
    off = [np.abs(face.warped - wanted)[middle, middle].mean() for face in (as_it_is, laid)]
    assert off[0] > 20
    assert off[1] < 6


def test_a_crop_of_any_aspect_keeps_it(restorer):
    (face,) = restorer.restore(CROP[:, :100], UPRIGHT, [guide((9, 9, 9))])

    assert face.restored.shape == face.warped.shape == (64, 32, 3)
    assert face.mask.shape == (64, 32)
    wanted = cv2.resize(CROP[:, :100], (32, 64), interpolation=cv2.INTER_AREA).astype(float) / 2 + 4.5
    assert np.abs(face.restored - wanted).max() <= 1


def test_the_guide_of_the_nearest_pose_is_taken_whoever_it_shows():
    guides = [guide((index, 0, 0), landmarks=turned(yaw)) for index, yaw in enumerate((-40, -5, 25, 60))]

    assert [best_by_pose(turned(yaw), guides).image[0, 0, 0] for yaw in (-50, 0, 20, 55)] == [0, 1, 2, 3]


def test_pose_does_not_see_place_size_or_roll():
    roll = np.array([[np.cos(0.3), np.sin(0.3)], [-np.sin(0.3), np.cos(0.3)]])
    moved = turned(20) @ roll * 3 + 100

    assert pose_distance(moved, turned(20)) == pytest.approx(0, abs=1e-5)
    assert pose_distance(moved, turned(0)) > 0.05


def test_several_guides_are_mixed_by_how_far_the_network_looked_at_each(restorer):
    crop = np.full((64, 64, 3), 100, np.uint8)
    faces = restorer.restore(crop, UPRIGHT, [guide((0, 0, 255)), guide((200, 0, 0))])  # masks 1 and 0

    assert np.abs(fused(faces).astype(int) - faces[0].restored).max() <= 1
    assert np.abs(faces[1].restored.astype(int) - faces[0].restored).max() > 50


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task": "restoration"}, "is a network for restoration; --guide needs one for guided-restoration"),
        ({"result_size": None}, "does not say the size of its result"),
    ],
)
def test_a_network_that_takes_no_guide_is_refused(network, changes, told):
    model = Model.read(network)

    with pytest.raises(CardError, match=told):
        GuidedRestorer(OnnxEngine(Model(model.path, model.sha256, card(**changes)), threads=1))


# At the command line


@pytest.fixture
def guided(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guided network is installed."""
    monkeypatch.setenv("STREAMER_MODELS", str(network.parent))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "woman.png"
    cv2.imwrite(str(path), cv2.resize(PHOTO, (256, 256), interpolation=cv2.INTER_AREA))
    return path


@pytest.mark.usefixtures("guided")
def test_a_photo_is_restored_by_a_guide_and_the_output_says_that_it_proves_nothing(streamer, tmp_path, photo):
    same = tmp_path / "enrolled.png"
    cv2.imwrite(str(same), PHOTO)

    code, out, _ = streamer("restore", photo, "--guide", same, "--parts", "--out", tmp_path / "out")

    assert code == 0
    assert "gfrnet (guided by enrolled.png: drawn towards it, so no proof of who it is)" in out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {f"woman.{kind}.png" for kind in ("restored", "face1.crop", "face1.restored", "face1.guide1")}
    parts = cv2.imread(str(tmp_path / "out/woman.face1.guide1.png"))
    assert parts.shape == (64, 5 * 64, 3)
    restored = cv2.imread(str(tmp_path / "out/woman.face1.restored.png"))
    assert np.array_equal(parts[:, -64:], restored)


@pytest.mark.usefixtures("guided")
def test_crops_take_crops_as_guides_and_all_of_them_with_fuse(streamer, tmp_path):
    for name, grey in (("crop", 100), ("dark", 0), ("light", 200)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((32, 32, 3), grey, np.uint8))
    guides = ["--guide", tmp_path / "dark.png", "--guide", tmp_path / "light.png"]

    code, out, _ = streamer("restore", tmp_path / "crop.png", *guides, "--crops", "--fuse", "--out", tmp_path / "out")

    assert (code, "guided by dark.png, light.png" in out) == (0, True)
    mixed = cv2.imread(str(tmp_path / "out/crop.png"))
    assert np.abs(mixed.astype(int) - 150).max() <= 2  # the dark one's mask is 0


@pytest.mark.usefixtures("guided")
def test_what_a_guide_cannot_be_is_refused_in_one_line_each(streamer, tmp_path, photo):
    wall, two = tmp_path / "wall.png", tmp_path / "two.png"
    cv2.imwrite(str(wall), np.full((200, 200, 3), 128, np.uint8))
    cv2.imwrite(str(two), cv2.hconcat([PHOTO, PHOTO]))

    def refused(*arguments: object) -> str:
        code, _, err = streamer("restore", *arguments, "--out", tmp_path / "out")
        assert (code, "Traceback" in err) == (2, False)
        return err

    assert "--guide" in refused(photo, "--guide", tmp_path / "none.png")
    assert "no face; a guide has one" in refused(photo, "--guide", wall)
    assert "2 faces; a guide has one" in refused(photo, "--guide", two)
    assert "2 faces, a guide is of one person" in refused(two, "--guide", photo)
    assert "--fuse wants a --guide" in refused(photo, "--fuse")
    assert "guided-restoration" in refused(photo, "--restorer", "gfrnet")
    assert "--guide needs one for guided-restoration" in refused(photo, "--guide", photo, "--restorer", "sgen-small")
    assert not list((tmp_path / "out").glob("*"))


def test_without_a_guided_network_the_names_that_are_known_are_told(streamer, photo, tmp_path, monkeypatch):
    monkeypatch.delenv("STREAMER_MODELS", raising=False)
    if "gfrnet" in {listing.name for listing in default_store(offline=True).list()}:
        pytest.skip("gfrnet ships by now")

    code, _, err = streamer("restore", photo, "--guide", photo, "--out", tmp_path / "out")

    assert code == 2
    assert "no model is named 'gfrnet'" in err
