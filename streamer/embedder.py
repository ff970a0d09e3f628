"""FaceEmbedder: faces in, unit embeddings out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.card import CardError
from engines.engine import Engine, EngineError
from streamer.geometry import align


class FaceEmbedder:
    """Embeds faces, each aligned by the five-point template of the network's card."""

    def __init__(self, engine: Engine) -> None:
        """Raise CardError for a network that embeds nothing."""
        card = engine.card
        if card.task != "embedding" or card.alignment is None or card.alignment_size is None:
            raise CardError(f"{card.name} is a network for {card.task}; an embedder needs one for embedding")
        self.engine = engine
        self._size = card.alignment_size
        self._template = np.array(card.alignment, np.float32)  # (5, 2)
        self._input, self._output = card.inputs[0].name, card.outputs[0].name
        self._mean = np.array(card.mean, np.float32).reshape(3, 1, 1)
        self._std = np.array(card.std, np.float32).reshape(3, 1, 1)
        free = isinstance(card.inputs[0].shape[0], str)
        self._batch = engine.max_batch if free else int(card.inputs[0].shape[0])

    def embed(self, faces: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """Return the unit embedding, (d,) float32, of each (image, landmarks in that image's pixels), in order.

        Raises EngineError, also where a network gives no direction.
        """
        aligned = [self._prepare(image, landmarks) for image, landmarks in faces]
        embeddings: list[np.ndarray] = []
        for start in range(0, len(aligned), self._batch):
            batch = np.stack(aligned[start : start + self._batch])
            out = self.engine.run(**{self._input: batch})[self._output].reshape(len(batch), -1)
            embeddings += [self._unit(row) for row in out]
        return embeddings

    def _prepare(self, image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        face = align(image, landmarks, self._template, self._size)
        if self.engine.card.color == "RGB":
            face = face[..., ::-1]
        return np.ascontiguousarray((face.transpose(2, 0, 1).astype(np.float32) - self._mean) / self._std)

    def _unit(self, row: np.ndarray) -> np.ndarray:
        length = float(np.linalg.norm(row))
        if not np.isfinite(length) or length == 0:
            raise EngineError(f"{self.engine.card.name} on {self.engine.backend} gave an embedding without direction")
        return (row / length).astype(np.float32)
