"""FaceRestorer: crops in, restored crops out, batched through an engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import cv2
import numpy as np

from engines.card import CardError, NetworkCard
from engines.engine import Engine, EngineError

_INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "cubic": cv2.INTER_CUBIC}


def largest_scale(card: NetworkCard, side: int, max_size: int) -> int:
    """Return the largest scale that keeps a crop of this side within `max_size`, or the smallest there is."""
    return max((scale for scale in card.scales if scale * side <= max_size), default=min(card.scales))


def input_side(card: NetworkCard, side: int, max_size: int) -> int:
    """Return the side in pixels that a crop of this side has when it is fed, before any padding."""
    return side if card.enlarge == "none" else side * largest_scale(card, side, max_size)


class FaceRestorer:
    """Restores crops of any size: enlarges, pads, runs, cuts back. Crops whose padded sizes agree share a batch."""

    def __init__(self, engine: Engine, *, max_size: int = 256, buckets: Sequence[int] | None = None) -> None:
        """Take `max_size`, the longest side of a result, and `buckets`, sides of the network's input, both in pixels.

        A crop is padded to the smallest bucket that holds it; where none does, or there are none, to the network's
        multiple. Raises CardError for a network that restores nothing, or whose multiple a bucket is not.
        """
        card = engine.card
        if card.task != "restoration" or not card.scales:
            raise CardError(f"{card.name} is a network for {card.task}; a restorer needs one for restoration")
        for bucket in buckets or ():
            if bucket < 1 or bucket % card.size_multiple:
                raise CardError(
                    f"restorer.buckets: {bucket} is no multiple of {card.size_multiple}, which {card.name} needs"
                )
        self.engine = engine
        self.max_size = max_size
        self.buckets = tuple(sorted(buckets or ()))
        self.pixels_own = 0
        """Pixels fed to the network that are the crops' own."""
        self.pixels_run = 0
        """Pixels fed to the network, with the padding."""
        self._input, self._output = card.inputs[0].name, card.outputs[0].name
        self._mean = np.array(card.mean, np.float32).reshape(3, 1, 1)
        self._std = np.array(card.std, np.float32).reshape(3, 1, 1)
        self._black, self._white = card.output_range or (0.0, 255.0)

    def scale(self, image: np.ndarray) -> int:
        """Return the largest scale that keeps the result within `max_size`, or the smallest there is."""
        return largest_scale(self.engine.card, max(image.shape[:2]), self.max_size)

    def restore(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, int]]:
        """Return each crop restored with its scale, in order: HWC uint8 BGR, exactly `scale` times as large.

        Raises EngineError, also where the network gives numbers that are no picture.
        """
        scales = [self.scale(image) for image in images]
        prepared = [self._prepare(image, scale) for image, scale in zip(images, scales, strict=True)]
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, array in enumerate(prepared):
            alike[array.shape].append(index)

        restored: list[np.ndarray | None] = [None] * len(images)
        for members in alike.values():
            for start in range(0, len(members), self.engine.max_batch):
                batch = members[start : start + self.engine.max_batch]
                for index, out in zip(batch, self._run([prepared[i] for i in batch]), strict=True):
                    height, width = images[index].shape[:2]
                    restored[index] = self._finish(out, height * scales[index], width * scales[index])
        return [(image, scale) for image, scale in zip(restored, scales, strict=True) if image is not None]

    def _prepare(self, image: np.ndarray, scale: int) -> np.ndarray:
        """(H, W, 3) uint8 BGR to (3, H', W') float32 as the network wants it."""
        card = self.engine.card
        if card.enlarge != "none" and scale != 1:
            size = (image.shape[1] * scale, image.shape[0] * scale)
            image = cv2.resize(image, size, interpolation=_INTERPOLATION[card.enlarge])
        image = self._padded(image)
        if card.color == "RGB":
            image = image[..., ::-1]
        return (image.transpose(2, 0, 1).astype(np.float32) - self._mean) / self._std

    def _padded(self, image: np.ndarray) -> np.ndarray:
        """Continue an image to the right and downwards by its reflection, as often as that takes."""
        height, width = image.shape[:2]
        bucket = next((side for side in self.buckets if side >= max(height, width)), None)
        multiple = self.engine.card.size_multiple
        bottom, right = (bucket - side if bucket else -side % multiple for side in (height, width))
        self.pixels_own += height * width
        self.pixels_run += (height + bottom) * (width + right)
        return cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REFLECT_101)

    def _run(self, batch: list[np.ndarray]) -> np.ndarray:
        out = self.engine.run(**{self._input: np.ascontiguousarray(np.stack(batch))})[self._output]
        if not np.isfinite(out).all():
            raise EngineError(f"{self.engine.card.name} on {self.engine.backend} gave numbers that are no picture")
        return out

    def _finish(self, out: np.ndarray, height: int, width: int) -> np.ndarray:
        """(3, H', W') float32 to (height, width, 3) uint8 BGR, the padding cut off."""
        pixels = (out[:, :height, :width] - self._black) * (255 / (self._white - self._black))
        image = np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        return np.ascontiguousarray(image[..., ::-1] if self.engine.card.color == "RGB" else image)
