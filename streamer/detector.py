"""Finds faces: images in; boxes, five landmarks and scores out.

An image is laid on a canvas, a network looks at the canvas, and the decoder of its family turns the outputs into
candidates: Detections in pixels of the canvas, many of one face. Back in the frame, the best of each face stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import cv2
import numpy as np
from insightface.model_zoo.scrfd import SCRFD

from engines.card import CardError, NetworkCard
from engines.engine import Engine
from streamer.types import Detections

_CELL = 32
"""Sides of a canvas are multiples of the coarsest cell that the networks look at."""
_MOST_ENLARGED = 2
"""A small image is enlarged so many times at most: small faces gain, large or badly compressed ones would be lost."""
_SAME_FACE = 0.4
"""Boxes with a greater IoU are of one face."""
_MOST_LARGER = 2
"""No side of a face is so many times as long as the frame's longer one: what a network says then is nonsense."""


class FaceDetector:
    """Finds faces with a network of the family that its card names."""

    def __init__(self, engine: Engine, *, size: int = 960, threshold: float | None = None) -> None:
        """`size` is the longer side of the canvas; a network of fixed size has its own.

        `threshold` stands in for the card's. Raises CardError where the network is no detector of a known family, or
        has no threshold; ValueError where `size` is no multiple of 32.
        """
        if size <= 0 or size % _CELL:
            raise ValueError(f"detector size is {size}; it must be a multiple of {_CELL}")
        card = engine.card
        _check(card)
        self.threshold = _threshold(card, threshold)
        """Least score of a face that begins a track."""
        self.weak_threshold = min(card.weak_threshold or self.threshold, self.threshold)
        """Least score of a face that `detect` returns."""
        self.engine = engine
        self._decode = _decoder(card)
        self._size = size
        self._fixed_canvas = _fixed_canvas(card)
        self._max_batch = _max_batch(engine)

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Return the faces of each image, best first, in its own pixels: all from `weak_threshold` up.

        Images of one aspect run together, up to the engine's largest batch. Boxes are not clipped: that of a face at
        the edge reaches beyond it. Raises EngineError.
        """
        canvases = [self._canvas(image) for image in images]
        found = [Detections.none()] * len(images)
        for places in _batches(canvases, self._max_batch):
            for place, outputs in zip(places, self._run([canvases[place] for place in places]), strict=True):
                canvas = canvases[place]
                with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is dropped
                    candidates = canvas.to_frame(self._decode(outputs, canvas.shape, self.weak_threshold))
                found[place] = _best(candidates)
        return found

    def _canvas(self, image: np.ndarray) -> _Canvas:
        return _Canvas.under(image, self._fixed_canvas or _free_canvas(image, self._size))

    def _run(self, canvases: list[_Canvas]) -> list[list[np.ndarray]]:
        """Return the outputs for each canvas, in the card's order; the batch axis stays."""
        card = self.engine.card
        results = self.engine.run(**{card.inputs[0].name: _blob(canvases, card)})
        outputs = [results[spec.name] for spec in card.outputs]
        if len(canvases) == 1:
            return [outputs]
        return [[output[i : i + 1] for output in outputs] for i in range(len(canvases))]


@dataclass(frozen=True, slots=True)
class _Canvas:
    """What a network looks at: a frame's image from the top left corner on; the rest is black."""

    image: np.ndarray
    scale: np.ndarray
    """(2,) along x and y; they differ by less than a pixel makes."""
    frame_size: np.ndarray
    """(2,) width and height."""

    @classmethod
    def under(cls, image: np.ndarray, shape: tuple[int, int]) -> _Canvas:
        """Lay an image on a canvas of this height and width, as large as fits."""
        height, width = image.shape[:2]
        ratio = min(shape[0] / height, shape[1] / width, _MOST_ENLARGED)
        size = max(1, round(width * ratio)), max(1, round(height * ratio))
        # Averaging is slow, and gains where a bilinear pixel would pass others over.
        how = cv2.INTER_AREA if ratio < 0.5 else cv2.INTER_LINEAR
        canvas = np.zeros((*shape, 3), np.uint8)
        canvas[: size[1], : size[0]] = cv2.resize(image, size, interpolation=how)
        frame_size = np.array([width, height])
        return cls(canvas, np.array(size) / frame_size, frame_size)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.image.shape[:2]
        return height, width

    def to_frame(self, candidates: Detections) -> Detections:
        """Return those that are boxes in the frame at all and not absurdly large, in its pixels."""
        corners = self._to_frame(candidates.boxes.reshape(-1, 2, 2))
        landmarks = self._to_frame(candidates.landmarks)
        first, last = corners[:, 0], corners[:, 1]
        finite = np.isfinite(corners).all((1, 2)) & np.isfinite(landmarks).all((1, 2))
        inside = (first < last).all(1) & (last > 0).all(1) & (first < self.frame_size - 1).all(1)
        sized = (last - first <= _MOST_LARGER * self.frame_size.max()).all(1)
        apart = np.ptp(landmarks, axis=1).any(1)  # no turn is known of five points that coincide
        found = Detections(corners.reshape(-1, 4), landmarks, candidates.scores.astype(np.float32))
        return found[finite & inside & sized & apart]

    def _to_frame(self, points: np.ndarray) -> np.ndarray:
        # The networks count from the corner of the first pixel, we from its centre.
        centred: np.ndarray = points / self.scale - 0.5
        return centred.astype(np.float32)


def _free_canvas(image: np.ndarray, size: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    longer = max(height, width)
    wanted = min(size, longer * _MOST_ENLARGED)
    return _whole_cells(height * wanted / longer), _whole_cells(width * wanted / longer)


def _whole_cells(side: float) -> int:
    return int(np.ceil(side / _CELL)) * _CELL


def _batches(canvases: list[_Canvas], limit: int) -> Iterator[list[int]]:
    """Yield the places of canvases of one shape, `limit` at most."""
    by_shape: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for place, canvas in enumerate(canvases):
        by_shape[canvas.shape].append(place)
    for places in by_shape.values():
        for start in range(0, len(places), limit):
            yield places[start : start + limit]


def _blob(canvases: list[_Canvas], card: NetworkCard) -> np.ndarray:
    images = [canvas.image for canvas in canvases]
    blob: np.ndarray = cv2.dnn.blobFromImages(images, swapRB=card.color == "RGB")  # (n, 3, height, width)
    if any(card.mean):
        blob -= np.array(card.mean, np.float32)[:, None, None]
    if card.std != (1.0, 1.0, 1.0):
        blob /= np.array(card.std, np.float32)[:, None, None]
    return blob


def _best(candidates: Detections) -> Detections:
    """Return the best candidate of each face, best first."""
    firsts, lasts = np.hsplit(candidates.boxes, 2)
    rectangles = np.hstack([firsts, lasts - firsts])  # x, y, width, height
    kept = cv2.dnn.NMSBoxes(rectangles.tolist(), candidates.scores.tolist(), 0.0, _SAME_FACE)
    return candidates[np.array(kept, int)]


# What the card says.

_OUTPUTS = {"centerface": (4,), "scrfd": (9, 15), "yunet": (12,)}
"""How many outputs the families have; SCRFD with three or five levels."""


def _check(card: NetworkCard) -> None:
    if card.task != "detection" or card.family is None:
        raise CardError(f"{card.name} finds no faces: its card says task {card.task}, family {card.family or 'none'}")
    wanted = _OUTPUTS[card.family]
    if len(card.outputs) not in wanted:
        numbers = " or ".join(map(str, wanted))
        raise CardError(f"{card.name} has {len(card.outputs)} outputs; {card.family} with landmarks has {numbers}")
    if not _takes_images(card):
        shapes = ", ".join(str(spec.shape) for spec in card.inputs)
        raise CardError(f"{card.name} takes {shapes}; a detector takes (n, 3, height, width), n free or 1")


def _takes_images(card: NetworkCard) -> bool:
    if len(card.inputs) != 1 or len(card.inputs[0].shape) != 4:
        return False
    batch, channels, _, _ = card.inputs[0].shape
    return channels == 3 and (batch == 1 or isinstance(batch, str))


def _threshold(card: NetworkCard, configured: float | None) -> float:
    threshold = card.threshold if configured is None else configured
    if threshold is None:
        raise CardError(f"the card of {card.name} has no threshold; set detector.threshold in the config")
    return threshold


def _fixed_canvas(card: NetworkCard) -> tuple[int, int] | None:
    """Return the height and width that the network fixes, None where they are free."""
    _, _, height, width = card.inputs[0].shape
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _max_batch(engine: Engine) -> int:
    """Return how many canvases run together: one where the outputs have no axis that would tell them apart."""
    apart = all(len(spec.shape) > 2 for spec in engine.card.outputs)
    return engine.max_batch if apart else 1


# The decoders.

Decoder = Callable[[list[np.ndarray], tuple[int, int], float], Detections]
"""From the outputs for one canvas, its height and width and the least score to candidates."""


def _decoder(card: NetworkCard) -> Decoder:
    if card.family == "scrfd":
        return _ScrfdDecoder(len(card.outputs))
    return _decode_centerface if card.family == "centerface" else _decode_yunet


def _decode_centerface(outputs: list[np.ndarray], shape: tuple[int, int], least: float) -> Detections:
    """Decode maps over cells of 4 pixels.

    Score; logarithm of height and width in cells; y and x of the centre from the cell's own, in cells; y and x of the
    landmarks from the box's first corner, as shares of its height and width.
    """
    heat, scale, offset, points = (output[0] for output in outputs)
    rows, columns = np.nonzero(heat[0] >= least)
    sizes = np.exp(scale[::-1, rows, columns].T) * 4  # (n, 2) width, height
    cells = np.stack([columns, rows], axis=1)
    firsts = (cells + 0.5 + offset[::-1, rows, columns].T) * 4 - sizes / 2
    shares = points[:, rows, columns].T.reshape(-1, 5, 2)[:, :, ::-1]
    landmarks = firsts[:, None] + shares * sizes[:, None]
    return Detections(np.hstack([firsts, firsts + sizes]), landmarks, heat[0, rows, columns])


def _decode_yunet(outputs: list[np.ndarray], shape: tuple[int, int], least: float) -> Detections:
    """Decode three levels, of 8, 16 and 32 pixels a cell: for each class, then object, box and landmarks."""
    levels = zip((8, 16, 32), *(outputs[start : start + 3] for start in (0, 3, 6, 9)), strict=True)
    width = shape[1]
    return _joined([_decode_yunet_level(width, cell, *maps, least=least) for cell, *maps in levels])


def _decode_yunet_level(
    width: int,
    cell: int,
    classes: np.ndarray,
    objects: np.ndarray,
    boxes: np.ndarray,
    points: np.ndarray,
    *,
    least: float,
) -> Detections:
    scores = np.sqrt(classes[0, :, 0].clip(0, 1) * objects[0, :, 0].clip(0, 1))
    chosen = np.flatnonzero(scores >= least)
    rows, columns = np.divmod(chosen, width // cell)
    cells = np.stack([columns, rows], axis=1)
    centres = (cells + boxes[0, chosen, :2]) * cell
    halves = np.exp(boxes[0, chosen, 2:]) * cell / 2
    landmarks = (cells[:, None] + points[0, chosen].reshape(-1, 5, 2)) * cell
    return Detections(np.hstack([centres - halves, centres + halves]), landmarks, scores[chosen])


class _ScrfdDecoder:
    """insightface's own decoding, of outputs that an engine gave."""

    def __init__(self, count: int) -> None:
        self._session = _OutputsSession(count)
        self._scrfd = _Scrfd(session=self._session)

    def __call__(self, outputs: list[np.ndarray], shape: tuple[int, int], least: float) -> Detections:
        self._session.outputs = [output.reshape(-1, output.shape[-1]) for output in outputs]
        blank = np.broadcast_to(np.uint8(0), (*shape, 3))
        levels = zip(*self._scrfd.forward(blank, least), strict=True)
        return _joined([Detections(boxes, landmarks, scores[:, 0]) for scores, boxes, landmarks in levels])


class _Scrfd(SCRFD):  # type: ignore[misc]  # insightface carries no types
    def _prepare_input_blob(self, img: np.ndarray, input_size: tuple[int, int]) -> np.ndarray:
        """Convert nothing: the engine has run."""
        return np.broadcast_to(np.float32(0), (1, 3, *img.shape[:2]))


class _OutputsSession:
    """As much of an ONNX Runtime session as SCRFD asks for; it gives the outputs that were put in."""

    def __init__(self, count: int) -> None:
        self.outputs: list[np.ndarray] = []
        self._count = count

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="image", shape=("n", 3, "height", "width"))]

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=str(i), shape=("anchors", "values")) for i in range(self._count)]

    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self.outputs


def _joined(parts: list[Detections]) -> Detections:
    return Detections(
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.landmarks for part in parts]),
        np.concatenate([part.scores for part in parts]),
    )
