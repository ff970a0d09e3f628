"""What judges restored faces: pixels, perception, face recognisers and a detector; and the restorers under judgement.

Images are (H, W, 3) uint8 BGR, pixel centres at whole numbers, landmarks (5, 2) in the image's own pixels: left eye,
right eye, nose, left and right mouth corner. Networks run in ONNX Runtime on the CPU, on one thread if not told
otherwise. Whoever holds a judge may never train against it, or its verdict is worth nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf
from PIL import Image
from pydantic import BaseModel, ConfigDict
from skimage.metrics import structural_similarity

REDRAWS = 1000

_INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "cubic": cv2.INTER_CUBIC}
_REAL_ESRGAN = {
    "name": "Real-ESRGAN x4", "scales": [4], "enlarge": "none", "size_multiple": 1, "color": "RGB",
    "mean": [0, 0, 0], "std": [255, 255, 255], "output_range": [0, 1], "trained_on": "photographs of all kinds",
}  # fmt: skip


class Preparation(BaseModel):
    """How a face recogniser wants a face."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    side: int
    """Of its square input, in pixels."""
    template: tuple[tuple[float, float], ...]
    """Where it wants the five landmarks, in pixels of its input."""
    color: Literal["RGB", "BGR"]
    """Order of the colour channels."""
    mean: float = 0.0
    """Subtracted from pixels of 0..255."""
    std: float = 1.0
    """Divides after `mean`."""


ARCFACE_TEMPLATE = (
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041),
)  # fmt: skip
"""InsightFace's five points on 112x112."""
KNOWN_EMBEDDERS = {
    "face-reidentification-retail-0095": Preparation(
        side=128,
        template=(
            (40.3928, 59.0815), (87.3757, 59.0815), (64.0336, 81.9847), (44.7324, 105.5606), (83.6399, 105.5606),
        ),
        color="BGR",
    ),
    "offlineid_mobilefacenet_int8": Preparation(
        side=112, template=ARCFACE_TEMPLATE, color="RGB", mean=127.5, std=127.5
    ),
}  # fmt: skip
"""Foreign recognisers by their file's name without suffix. The second is non-commercial: a judge, nothing else."""


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Return the PSNR in dB over all pixels and the three colours of 8 bit; infinite if both are the same."""
    error = np.mean((image.astype(np.float64) - truth) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ssim(image: np.ndarray, truth: np.ndarray) -> float:
    """Return the SSIM of luma: Gaussian window 11x11 of sigma 1.5, K1 0.01, K2 0.03. Both sides are at least 11 px."""
    grey = [cv2.cvtColor(each, cv2.COLOR_BGR2GRAY) for each in (image, truth)]
    return float(
        structural_similarity(*grey, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
    )


def mps(ssim: float, lpips: float) -> float:
    """Return the mean perceptual score, (SSIM + 1 - LPIPS) / 2: more is better."""
    return 0.5 * (ssim + 1 - lpips)


def bicubic(image: np.ndarray, scale: int) -> np.ndarray:
    """Return the image `scale` times as large, by Pillow's bicubic (a = -0.5): the baseline of every table."""
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC))


def scaled_landmarks(landmarks: np.ndarray, scale: float) -> np.ndarray:
    """Return where landmarks lie in an image `scale` times as large: x goes to scale * x + (scale - 1) / 2."""
    return landmarks * scale + (scale - 1) / 2


def interval(values: Sequence[float] | np.ndarray, identities: Sequence[str]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `values` when the identities they belong to are redrawn."""
    names, places = np.unique(np.asarray(identities), return_inverse=True)
    sums = np.bincount(places, weights=np.asarray(values, np.float64))
    counts = np.bincount(places)
    draws = np.random.default_rng(0).integers(len(names), size=(REDRAWS, len(names)))
    low, high = np.percentile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), (2.5, 97.5))
    return float(low), float(high)


class Lpips:
    """LPIPS as ONNX, two images of RGB in [-1, 1] to a distance."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        self._session = open_session(path, threads)
        self._names = [value.name for value in self._session.get_inputs()]

    def __call__(self, image: np.ndarray, truth: np.ndarray) -> float:
        """Return the distance of two images of one size, at least 64 px: 0 where they are the same, less is better."""
        both = [as_planes(each[..., ::-1], 127.5, 127.5)[None] for each in (image, truth)]
        return float(np.ravel(self._session.run(None, dict(zip(self._names, both, strict=True)))[0])[0])


class FaceEmbedder:
    """A face recogniser as ONNX: aligns faces by its template and embeds them."""

    def __init__(self, path: Path, preparation: Preparation | None = None, *, threads: int = 1) -> None:
        """Without `preparation` the file is one of KNOWN_EMBEDDERS. Raises ValueError if it is none of them."""
        known = preparation or KNOWN_EMBEDDERS.get(path.stem)
        if known is None:
            raise ValueError(f"{path}: {path.stem} is not known; give its preparation, or one of {[*KNOWN_EMBEDDERS]}")
        self.preparation = known
        self._template = np.array(known.template, np.float64)
        self._session = open_session(path, threads)
        self._input = self._session.get_inputs()[0].name

    def embed(self, images: Sequence[np.ndarray], landmarks: Sequence[np.ndarray]) -> np.ndarray:
        """Return the unit embeddings, (n, d) float32, one face an image. Raises ValueError for what has no direction.

        Faces are run one by one, as some recognisers take no more, and a batch of an INT8 one would share its scale.
        """
        aligned = [self.align(image, points) for image, points in zip(images, landmarks, strict=True)]
        found = np.array([self._run(face) for face in aligned])
        lengths = np.linalg.norm(found, axis=-1, keepdims=True)
        if not np.all(np.isfinite(lengths) & (lengths > 0)):
            raise ValueError("an embedding has no direction")
        return found / lengths

    def align(self, image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """Return the face as the recogniser wants it, (side, side, 3) uint8 BGR, edges replicated.

        A face that shrinks to less than half is first shrunk by area, so that nothing in it aliases.
        """
        size = float(np.linalg.norm(similarity(landmarks, self._template)[:, 0]))
        if size < 0.5:
            height, width = image.shape[:2]
            small = max(1, round(width * size)), max(1, round(height * size))
            landmarks = (landmarks + 0.5) * (np.array(small) / (width, height)) - 0.5
            image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        side = self.preparation.side
        matrix = similarity(landmarks, self._template)
        return cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    def _run(self, face: np.ndarray) -> np.ndarray:
        ordered = face[..., ::-1] if self.preparation.color == "RGB" else face
        planes = as_planes(ordered, self.preparation.mean, self.preparation.std)
        return np.ravel(self._session.run(None, {self._input: planes[None]})[0])


class OnnxRestorer:
    """A restorer as ONNX with our card: crops in, exactly `scale` times as large out, as the product does it."""

    def __init__(self, path: Path, card: dict[str, Any] | None = None, *, threads: int = 1) -> None:
        """`card` stands in for the one in the file. Raises ValueError if there is neither."""
        self._session = open_session(path, threads)
        text = self._session.get_modelmeta().custom_metadata_map.get("streamer.card")
        if card is None and text is None:
            raise ValueError(f"{path} has no card: export it with models.export")
        self.card: dict[str, Any] = card or json.loads(text)
        self._input = self._session.get_inputs()[0].name

    def product_scale(self, image: np.ndarray, *, max_size: int = 256) -> int:
        """Return the largest scale that keeps the result within `max_size`, or the smallest there is."""
        side, scales = max(image.shape[:2]), self.card["scales"]
        return max((scale for scale in scales if scale * side <= max_size), default=min(scales))

    def restore(self, image: np.ndarray, scale: int | None = None) -> np.ndarray:
        """Return the image restored, `scale` times as large; without a scale at the product's.

        Raises ValueError for a scale that the card does not have.
        """
        if scale is None:
            scale = self.product_scale(image)
        if scale not in self.card["scales"]:
            raise ValueError(f"{self.card['name']} does not restore ×{scale}; its card says {self.card['scales']}")
        height, width = (side * scale for side in image.shape[:2])
        out = self._session.run(None, {self._input: self._prepare(image, scale)[None]})[0][0, :, :height, :width]
        black, white = self.card["output_range"]
        pixels = np.clip(np.rint((out - black) * (255 / (white - black))), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        return np.ascontiguousarray(pixels[..., ::-1] if self.card["color"] == "RGB" else pixels)

    def _prepare(self, image: np.ndarray, scale: int) -> np.ndarray:
        card = self.card
        if card["enlarge"] != "none" and scale != 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=_INTERPOLATION[card["enlarge"]])
        bottom, right = (-side % card["size_multiple"] for side in image.shape[:2])
        # an image that is too small to be reflected once is reflected again and again; one pixel is repeated
        image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REFLECT_101)
        return as_planes(image[..., ::-1] if card["color"] == "RGB" else image, card["mean"], card["std"])


def real_esrgan(path: Path, *, threads: int = 1) -> OnnxRestorer:
    """Return Real-ESRGAN x4, which has no card of ours: RGB of 0..1, four times as large by itself."""
    return OnnxRestorer(path, _REAL_ESRGAN, threads=threads)


class FaceDetector:
    """YuNet, for the share of restored faces that are still found."""

    def __init__(self, path: Path, *, threshold: float = 0.6) -> None:
        self._yunet = cv2.FaceDetectorYN.create(str(path), "", (320, 320), threshold, 0.3, 5000)

    def detect(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the faces' boxes (n, 4) float32, x1, y1, x2, y2 in pixels, and their scores (n,), the best first."""
        self._yunet.setInputSize((image.shape[1], image.shape[0]))
        found = self._yunet.detect(image)[1]
        if found is None:
            return np.empty((0, 4), np.float32), np.empty(0, np.float32)
        found = found[np.argsort(-found[:, 14], kind="stable")]
        return np.hstack([found[:, :2], found[:, :2] + found[:, 2:4]]), found[:, 14]

    def finds(self, image: np.ndarray, landmarks: np.ndarray) -> bool:
        """Say whether a face is found whose box holds the landmarks' centre: the face, and not a pattern beside it."""
        x, y = landmarks.mean(axis=0)
        boxes, _ = self.detect(image)
        inside = (boxes[:, 0] <= x) & (x <= boxes[:, 2]) & (boxes[:, 1] <= y) & (y <= boxes[:, 3])
        return bool(inside.any())


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the least-squares similarity (2, 3) that takes the points `source` (n, 2) to `target`, never a mirroring.

    Raises ValueError if all points of `source` coincide.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    p, q = source - source.mean(axis=0), target - target.mean(axis=0)
    spread = np.sum(p * p)
    if not spread > 0:
        raise ValueError("there is no similarity from points that coincide or are not known")
    cos = np.sum(p * q) / spread
    sin = np.sum(p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]) / spread
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.column_stack([turn, target.mean(axis=0) - turn @ source.mean(axis=0)])


def as_planes(image: np.ndarray, mean: float | Sequence[float], std: float | Sequence[float]) -> np.ndarray:
    """(H, W, 3) uint8 to (3, H, W) float32, less `mean`, over `std`."""
    values = (image.astype(np.float32) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Load an ONNX. Raises OSError, or ValueError in one line."""
    content = path.read_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except (InvalidProtobuf, InvalidGraph, Fail, InvalidArgument) as exc:
        raise ValueError(f"{path} cannot be loaded as ONNX: {' '.join(str(exc).split())}") from None
