"""What plans are tuned for and proven on: the faces of two photographs that packages carry, as the stages feed them.

The stage itself prepares them: `Recorder` stands in its engine's place and keeps what it is fed with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np

from engines.card import NetworkCard, TensorSpec
from engines.engine import EngineError
from engines.load import Proof
from engines.ort import OnnxEngine
from engines.parity import Sample
from engines.plan import Bucket, Shape
from engines.store import Model
from streamer.demo_clip import PEOPLE, PhotoMissing, read_photo
from streamer.detector import FaceDetector
from streamer.embedder import FaceEmbedder
from streamer.geometry import cut_crop, upright_landmarks
from streamer.guided import Guide, GuidedRestorer
from streamer.restorer import FaceRestorer, input_side

_CROP_SIDES = (20, 40, 64, 120)
"""Of the faces that a restorer is proven on, in pixels, as far as their results are not too large."""
_INPUT_SIDES = (64, 96, 128, 160, 192, 256)
"""Of results, in pixels: what a restorer's plans are tuned for where the config names no buckets."""


class Recorder(OnnxEngine):
    """An engine that keeps what it is fed with, item by item."""

    def __init__(self, model: Model) -> None:
        super().__init__(model, threads=1)
        self.fed: list[Sample] = []

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Keep the inputs; return the outputs by name. Raises EngineError."""
        for item in range(len(next(iter(inputs.values())))):
            self.fed.append({name: value[item : item + 1].copy() for name, value in inputs.items()})
        return super().run(**inputs)


def faces(side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the crop of each face, (side, side, 3) uint8 BGR, with its landmarks, (5, 2), in the crop's pixels."""
    made = []
    for person in PEOPLE.values():
        box = np.array(person.face, np.float32)
        crop, transform = cut_crop(_photo(person.photo), box, upright_landmarks(box))
        landmarks = upright_landmarks(box) @ transform[:, :2].T + transform[:, 2]
        scale = side / len(crop)
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        made.append((cv2.resize(crop, (side, side), interpolation=how), (landmarks + 0.5) * scale - 0.5))
    return made


def restorer_proof(model: Model, *, max_size: int, sides: Sequence[int] | None, max_batch: int) -> Proof:
    """Return what a restorer's plans are tuned for and proven on; `sides` are the buckets, of the network's input."""
    wanted = tuple(sides or input_sides(model.card, max_size))
    return Proof(partial(_square_buckets, model, wanted, max_batch), partial(_restorer_samples, model, max_size, sides))


def guided_proof(model: Model, *, max_batch: int) -> Proof:
    """Return what a guided restorer's plans are tuned for and proven on: the one size of its results."""
    sides = (model.card.result_size or 0,)
    return Proof(partial(_square_buckets, model, sides, max_batch), partial(_guided_samples, model))


def detector_proof(model: Model, *, size: int, max_batch: int) -> Proof:
    """Return what a detector's plans are tuned for and proven on, its canvas `size` pixels long."""
    return Proof(partial(_canvas_buckets, model, size, max_batch), partial(_detector_samples, model, size))


def embedder_proof(model: Model, *, max_batch: int) -> Proof:
    """Return what an embedder's plans are tuned for and proven on."""
    sides = (model.card.alignment_size or 0,)
    return Proof(partial(_square_buckets, model, sides, max_batch), partial(_embedder_samples, model))


def input_sides(card: NetworkCard, max_size: int) -> list[int]:
    """Return the sides of the network's input that a plan is tuned for where none are configured."""
    scale = 1 if card.enlarge != "none" else min(card.scales)
    multiple = card.size_multiple
    sides = {-(-min(side, max_size) // scale // multiple) * multiple for side in (*_INPUT_SIDES, max_size)}
    return sorted(side for side in sides if side)


def _square_buckets(model: Model, sides: Sequence[int], max_batch: int) -> list[Bucket]:
    return [_bucket(model, (side, side), (side, side), (side, side), max_batch) for side in sides]


def _canvas_buckets(model: Model, size: int, max_batch: int) -> list[Bucket]:
    usual = (-(-size * 9 // 16 // 32) * 32, size)
    return [_bucket(model, (32, 32), usual, (size, size), max_batch)]


def _bucket(
    model: Model, least: tuple[int, int], usual: tuple[int, int], most: tuple[int, int], max_batch: int
) -> Bucket:
    """Return the range of shapes, the same for every input, as far as the network leaves them free."""
    batch = (1, min(8, max_batch), max_batch)
    shapes = [(n, 3, *sides) for n, sides in zip(batch, (least, usual, most), strict=True)]

    def own(spec: TensorSpec) -> tuple[Shape, Shape, Shape]:
        low, typical, high = (
            tuple(fixed if isinstance(fixed, int) else side for fixed, side in zip(spec.shape, shape, strict=True))
            for shape in shapes
        )
        return low, typical, high

    return Bucket({spec.name: own(spec) for spec in model.card.inputs})


def _restorer_samples(model: Model, max_size: int, sides: Sequence[int] | None) -> list[Sample]:
    def restore(engine: Recorder) -> None:
        restorer = FaceRestorer(engine, max_size=max_size, buckets=sides)
        for side in _crop_sides(model.card, max_size, sides):
            restorer.restore([crop for crop, _ in faces(side)])

    return _recorded(model, restore)


def _crop_sides(card: NetworkCard, max_size: int, sides: Sequence[int] | None) -> list[int]:
    """Return sides of crops whose results are not too large; with buckets, some that fill each of them."""
    possible = [side for side in range(2, max_size + 1) if min(card.scales) * side <= max_size]
    if sides is None:
        return [side for side in _CROP_SIDES if side in possible] or possible[-1:]
    fed = {side: input_side(card, side, max_size) for side in possible}
    fitting = ([side for side in possible if fed[side] <= bucket] for bucket in sides)
    return sorted({max(choice, key=fed.__getitem__) for choice in fitting if choice})


def _guided_samples(model: Model) -> list[Sample]:
    """Each face in one of the sizes that crops have, guided by itself as in a mirror: the pose is another."""

    def restore(engine: Recorder) -> None:
        restorer = GuidedRestorer(engine)
        for number, large in enumerate(faces(restorer.side)):
            crop, landmarks = faces(_CROP_SIDES[number % len(_CROP_SIDES)])[number]
            restorer.restore(crop, landmarks, [_mirrored(*large)])

    return _recorded(model, restore)


def _mirrored(image: np.ndarray, landmarks: np.ndarray) -> Guide:
    turned = landmarks[[1, 0, 2, 4, 3]] * (-1, 1) + (image.shape[1] - 1, 0)
    return Guide("mirrored", np.ascontiguousarray(image[:, ::-1]), turned)


def _detector_samples(model: Model, size: int) -> list[Sample]:
    photos = [_photo(name) for name in ("group", "astronaut")]
    return _recorded(model, lambda engine: FaceDetector(engine, size=size).detect(photos))


def _embedder_samples(model: Model) -> list[Sample]:
    return _recorded(model, lambda engine: FaceEmbedder(engine).embed(faces(160)))


def _photo(name: str) -> np.ndarray:
    try:
        return read_photo(name).astype(np.uint8)
    except PhotoMissing as exc:
        raise EngineError(f"there is nothing to prove a plan on: {exc}") from exc


def _recorded(model: Model, use: Callable[[Recorder], object]) -> list[Sample]:
    engine = Recorder(model)
    use(engine)
    engine.close()
    return engine.fed
