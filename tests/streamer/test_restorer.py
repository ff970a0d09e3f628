"""FaceRestorer over a network whose answer is known, and over the one that ships."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.data import astronaut

from engines.card import CardError, NetworkCard, TensorSpec
from engines.engine import Engine, EngineError
from engines.load import load_engine
from engines.store import default_store
from streamer.restorer import FaceRestorer

FACE = np.ascontiguousarray(astronaut()[0:208, 120:328, ::-1])


class Identity:
    """An engine that gives its input back; it stands for a perfect network, so that what is around it shows."""

    backend, precision, sha256, max_batch = "test", "fp32", "0" * 64, 4

    def __init__(self, **changes: object) -> None:
        free = TensorSpec(name="image", layout="NCHW", shape=("n", 3, "h", "w"))
        fields: dict[str, object] = {
            "name": "identity", "task": "restoration", "inputs": (free,), "outputs": (free,), "color": "RGB",
            "mean": (127.5,) * 3, "std": (127.5,) * 3, "output_range": (-1, 1), "scales": (4, 2, 1),
            "enlarge": "cubic", "size_multiple": 16, "license": "none", **changes,
        }  # fmt: skip
        self.card = NetworkCard.model_validate(fields)
        self.shapes: list[tuple[int, ...]] = []
        self.spoil = False

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.shapes.append(inputs["image"].shape)
        return {"image": inputs["image"] * (np.nan if self.spoil else 1)}

    def close(self) -> None:
        pass


def face(side: int) -> np.ndarray:
    return cv2.resize(FACE, (side, side), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize(
    ("side", "scale"), [(10, 4), (24, 4), (64, 4), (65, 2), (128, 2), (129, 1), (256, 1), (300, 1)]
)
def test_the_scale_is_the_largest_that_keeps_within_max_size(side, scale):
    restorer = FaceRestorer(Identity(), max_size=256)

    ((restored, chosen),) = restorer.restore([face(side)])

    assert chosen == scale
    assert restored.shape == (scale * side, scale * side, 3)


@pytest.mark.parametrize("color", ["RGB", "BGR"])
def test_around_a_perfect_network_nothing_is_lost(color):
    image = face(200)

    ((restored, scale),) = FaceRestorer(Identity(color=color)).restore([image])

    assert scale == 1
    assert np.array_equal(restored, image)


def test_crops_of_any_size_and_aspect_come_back_in_order():
    restorer = FaceRestorer(Identity())
    images = [face(side) for side in (20, 31, 20, 50)] + [face(40)[:25]]

    restored = restorer.restore(images)

    for image, (result, scale) in zip(images, restored, strict=True):
        expected = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        assert np.array_equal(result, expected)


def test_crops_of_one_padded_size_share_batches_of_at_most_max_batch():
    engine = Identity()

    FaceRestorer(engine).restore([face(side) for side in (20, 19, 18, 17, 20, 30)])  # 20..17 x4 all pad to 80

    assert sorted(engine.shapes) == [(1, 3, 80, 80), (1, 3, 128, 128), (4, 3, 80, 80)]


def test_with_buckets_crops_of_several_sizes_share_batches():
    engine = Identity()
    restorer = FaceRestorer(engine, max_size=128, buckets=[96, 144])

    restorer.restore([face(side) for side in (20, 22, 24)])  # x4: 80, 88 and 96
    restorer.restore([face(100), face(40)[:, :20], face(30), face(150)])  # x1: 100; x2: 80x40; x4: 120; none holds 150

    assert engine.shapes == [(3, 3, 96, 96), (2, 3, 144, 144), (1, 3, 96, 96), (1, 3, 160, 160)]


def test_what_padding_costs_is_counted():
    restorer = FaceRestorer(Identity(), buckets=[96])

    restorer.restore([face(20), face(24)[:10], face(60)])  # x4: 80x80, 96x40 and 240x240

    assert restorer.pixels_own == 80 * 80 + 96 * 40 + 240 * 240
    assert restorer.pixels_run == 96 * 96 + 96 * 96 + 240 * 240


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), max_size=9),
    buckets=st.lists(st.integers(1, 20).map(lambda each: 16 * each), max_size=4, unique=True),
)
def test_whatever_the_sizes_and_buckets_every_crop_comes_back_in_its_place(sizes, buckets):
    images = [np.ascontiguousarray(FACE[:height, -width:]) for height, width in sizes]

    restored = FaceRestorer(Identity(), buckets=buckets).restore(images)

    expected = FaceRestorer(Identity()).restore(images)
    assert len(restored) == len(images)
    for (result, scale), (alone, alone_scale) in zip(restored, expected, strict=True):
        assert scale == alone_scale
        assert np.array_equal(result, alone)


def test_a_bucket_continues_the_picture_however_much_larger_it_is():
    engine = Identity(enlarge="none", scales=(1,), size_multiple=1)
    seen = []
    engine.run = lambda **inputs: seen.append(inputs["image"]) or {"image": inputs["image"]}

    FaceRestorer(engine, buckets=[40]).restore([face(12), face(1)])

    row = [*range(12), *range(10, 0, -1)]  # there and back again
    there = [row[column % 22] for column in range(40)]
    assert np.array_equal(seen[0][0], seen[0][0][:, there][:, :, there])
    assert (seen[0][1] == seen[0][1][:, :1, :1]).all()


@pytest.mark.parametrize("bucket", [100, 0, -16])
def test_a_bucket_that_the_network_cannot_take_is_refused(bucket):
    with pytest.raises(CardError, match=rf"^restorer.buckets: {bucket} is no multiple of 16, which identity needs$"):
        FaceRestorer(Identity(), buckets=[64, bucket])


def test_numbers_that_are_no_picture_are_an_error():
    engine = Identity()
    engine.spoil = True

    with pytest.raises(EngineError, match="no picture"):
        FaceRestorer(engine).restore([face(20)])


def test_a_network_that_restores_nothing_is_refused():
    with pytest.raises(CardError, match="for detection"):
        FaceRestorer(Identity(task="detection", scales=()))


@pytest.fixture(scope="module")
def shipped() -> Engine:
    return load_engine(default_store(offline=True).find("sgen-small"), backend="onnxruntime")


def test_the_shipped_network_takes_noise_out_of_a_face_better_than_bicubic(shipped):
    clean = face(160)
    low = cv2.resize(clean, (40, 40), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    low += np.random.default_rng(0).normal(0, 30, low.shape)
    low = np.clip(np.rint(low), 0, 255).astype(np.uint8)

    ((restored, scale),) = FaceRestorer(shipped).restore([low])

    def error(image: np.ndarray) -> float:
        return float(np.mean((image.astype(float) - clean) ** 2))

    assert scale == 4
    assert error(restored) < 0.8 * error(cv2.resize(low, (160, 160), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize(
    ("name", "buckets", "inside_db", "whole_db"),
    [("sgen-small", [128, 192, 256], 45, 41), ("sisn-small", [32, 48, 64], 46, 40)],
)
def test_a_bucket_changes_a_face_little_and_least_away_from_the_padding(name, buckets, inside_db, whole_db):
    engine = load_engine(default_store(offline=True).find(name), backend="onnxruntime", threads=1)
    images = [face(side) for side in (24, 33, 40)]
    restored = FaceRestorer(engine, buckets=buckets).restore(images)

    for image, (result, scale) in zip(images, restored, strict=True):
        ((alone, _),) = FaceRestorer(engine).restore([image])

        inside = 4 * len(image) - 16
        assert scale == 4
        assert cv2.PSNR(result[:inside, :inside], alone[:inside, :inside]) >= inside_db
        assert cv2.PSNR(result, alone) >= whole_db


def test_a_face_is_restored_the_same_alone_and_in_any_place_of_a_batch(shipped):
    restorer = FaceRestorer(shipped)
    image = face(40)

    ((alone, _),) = restorer.restore([image])
    among = restorer.restore([face(38), image, face(39), image])

    for place in (1, 3):
        assert np.abs(among[place][0].astype(int) - alone).max() <= 1
