"""Boxes, similarity transforms and the squares cut round faces.

Pixel centres lie at whole numbers. A transform is (2, 3) float64 and takes points (x, y, 1) of one image to another's.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

UPRIGHT = np.array([[-0.1554, -0.1075], [0.1554, -0.1075], [0.0, 0.0702], [-0.1287, 0.2514], [0.1287, 0.2514]])
"""The upright five-point template: ArcFace's, made symmetric, from the centre of a box in units of its larger side."""

CROP_FACTOR = 1.6
MOST_TURN_DEG = 45.0


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each of `boxes` (n, 4) with each of `others` (m, 4), as (n, m)."""
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    opposite = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod(np.clip(opposite - corner, 0, None), axis=2)  # (n, m)
    union = _areas(boxes)[:, None] + _areas(others)[None, :] - shared
    return np.asarray(np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the least-squares similarity that takes the points `source` (n, 2) to `target` (n, 2), never a mirroring.

    Raises ValueError if all points of `source` coincide.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    p, q = source - source.mean(0), target - target.mean(0)
    spread = np.sum(p * p)
    if spread == 0:
        raise ValueError("there is no similarity from points that coincide")

    cos = np.sum(p * q) / spread
    sin = np.sum(p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]) / spread
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.column_stack([turn, target.mean(0) - turn @ source.mean(0)])


def transform_points(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return `points` (n, 2) where `transform` takes them, as float32."""
    return np.asarray(points @ transform[:, :2].T + transform[:, 2], np.float32)


def scale_transform(transform: np.ndarray, scale: float) -> np.ndarray:
    """Return `transform` followed by an enlargement of the image it leads to: x goes on to scale·x + (scale - 1)/2."""
    scaled = scale * transform
    scaled[:, 2] += (scale - 1) / 2
    return np.asarray(scaled, np.float64)


def roll_deg(landmarks: np.ndarray) -> float:
    """Return the angle by which a face is turned in the picture, in degrees, positive clockwise.

    All five points are fitted: the line through the eyes alone misleads on faces seen from above.
    """
    turn = similarity(UPRIGHT, landmarks)
    return math.degrees(math.atan2(turn[1, 0], turn[0, 0]))


def upright_landmarks(box: np.ndarray) -> np.ndarray:
    """Return where the landmarks of an upright, frontal face lie in its box: for crops that come without any."""
    return np.asarray(_centre(box) + UPRIGHT * _larger_side(box), np.float32)


def crop_transform(box: np.ndarray, landmarks: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the transform from frame to crop and the crop's side: ARCHITECTURE, crops.

    A turn that would move no pixel of the crop by more than half is not made, and what is not turned is moved by whole
    pixels: such crops are the frame's own pixels, which no interpolation has touched.
    """
    side = max(2, round(CROP_FACTOR * _larger_side(box)))
    middle = (side - 1) / 2
    angle = math.radians(roll_deg(landmarks))
    if abs(angle) > math.radians(MOST_TURN_DEG) or abs(angle) * math.sqrt(2) * middle <= 0.5:
        corner = np.floor(_centre(box) - middle + 0.5)
        return np.column_stack([np.eye(2), -corner]), side

    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    return np.column_stack([turn, middle - turn @ _centre(box)]), side


def cut_crop(image: np.ndarray, box: np.ndarray, landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the crop, a copy, and the transform that leads to it. Beyond the frame the edge is replicated."""
    transform, side = crop_transform(box, landmarks)
    if transform[0, 1] == 0:
        rows = np.clip(np.arange(side) - int(transform[1, 2]), 0, image.shape[0] - 1)
        columns = np.clip(np.arange(side) - int(transform[0, 2]), 0, image.shape[1] - 1)
        return image[np.ix_(rows, columns)], transform

    crop = cv2.warpAffine(image, transform, (side, side), flags=cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE)
    return crop, transform


def align(image: np.ndarray, landmarks: np.ndarray, template: np.ndarray, size: int) -> np.ndarray:
    """Return the square image of `size` in which `landmarks` lie as near as can be to `template` (5, 2).

    An image that shrinks to less than half is first shrunk by area, so that nothing in it aliases.
    """
    scale = float(np.linalg.norm(similarity(landmarks, template)[:, 0]))
    if scale < 0.5:
        image, landmarks = _shrink(image, landmarks, scale)
    transform = similarity(landmarks, template)
    return cv2.warpAffine(image, transform, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _shrink(image: np.ndarray, landmarks: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    height, width = image.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    ratio = np.array(size) / (width, height)  # not quite `scale`: sides are whole
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), (landmarks + 0.5) * ratio - 0.5


def _centre(box: np.ndarray) -> np.ndarray:
    return np.asarray((box[:2].astype(np.float64) + box[2:]) / 2)


def _larger_side(box: np.ndarray) -> float:
    return float(max(box[2] - box[0], box[3] - box[1]))


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.asarray(np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1))
