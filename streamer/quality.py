"""What a face suffers from, measured on the camera's own pixels.

Nothing is measured on a turned crop: turning mixes neighbours, which hides noise and moves the codec's grid.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from streamer.geometry import CROP_FACTOR, roll_deg
from streamer.types import Quality

_LEAST_SIDE = 8  # pixels of a patch below which there is nothing to measure

_LAPLACIANS = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)  # blind to slopes; noise passes sixfold
_FLATTEST = 0.4
_ENOUGH_SIDE = 100  # pixels of a patch beyond which some are passed over: the estimate gains nothing by them
_SATURATED = 16

_GRID = 8
_LARGEST_STEP = 20.0  # grey levels: a window's frame that lies on the grid by chance counts no more than a block's edge

_NOSE_DEPTH = 0.9  # how far the nose stands out of the plane of the eyes, in halves of their distance


def measure_quality(image: np.ndarray, box: np.ndarray, landmarks: np.ndarray) -> Quality:
    """Return the quality of the face at `box` of `image`, a whole frame as its decoder gave it, or a crop by itself.

    `blockiness` takes the codec's grid to begin at the image's corner, as it does in a frame that nobody resized. Where
    codecs smooth the edges of their blocks (H.264, HEVC) little of it is left, and damage shows in `sharpness` instead.
    """
    patch, corner = _window(image, _crop_box(box))
    measurable = min(patch.shape[:2]) >= _LEAST_SIDE
    return Quality(
        face_height_px=float(box[3] - box[1]),
        eye_distance_px=float(np.linalg.norm(landmarks[1] - landmarks[0])),
        sharpness=measure_sharpness(image, box),
        noise=_noise(patch) if measurable else 0.0,
        blockiness=_blockiness(patch, corner) if measurable else 0.0,
        yaw=measure_yaw(landmarks),
        roll_deg=roll_deg(landmarks),
    )


def measure_sharpness(image: np.ndarray, box: np.ndarray) -> float:
    """Return how sharp the face at `box` is: 0 for nothing but blur, 1 for as sharp as its pixels allow.

    It is told by how fast pixels grow unlike over 1 to 2 pixels against over 2 to 4. Differences of their squares are
    free of white noise. Their ratio is 1/4 for what is smooth, for sharp faces 1/2 and, as measured, 7 / height more.
    """
    face, _ = _window(image, box)
    if min(face.shape[:2]) < _LEAST_SIDE:
        return 0.0
    grey = cv2.cvtColor(face, cv2.COLOR_BGR2GRAY).astype(np.float32)
    unlike = [_unlikeness(grey, distance) for distance in (1, 2, 4)]
    near, far = unlike[1] - unlike[0], unlike[2] - unlike[1]
    if near <= 0:
        return 0.0
    if far <= 0:
        return 1.0
    return float(np.clip((near / far - 0.25) / (0.25 + 7 / float(box[3] - box[1])), 0, 1))


def measure_yaw(landmarks: np.ndarray) -> float:
    """Return the sine of the head's turn: 0 frontal, 1 where the nose points along the picture to the right, -1 left.

    It is told by how far the nose lies off the line from between the eyes to between the mouth's corners.
    """
    left_eye, right_eye, nose, mouth_left, mouth_right = landmarks.astype(np.float64)
    eyes, mouth = (left_eye + right_eye) / 2, (mouth_left + mouth_right) / 2
    down = mouth - eyes
    length = math.hypot(*down)
    if length == 0:
        return 0.0
    right = np.array([down[1], -down[0]]) / length
    aside = float((nose - eyes) @ right)
    half_width = abs(float((right_eye - left_eye) @ right)) / 2
    away = math.hypot(aside, _NOSE_DEPTH * half_width)
    return aside / away if away else 0.0


def _crop_box(box: np.ndarray) -> np.ndarray:
    half = CROP_FACTOR * float(np.max(box[2:] - box[:2])) / 2
    centre = (box[:2] + box[2:]) / 2
    return np.concatenate([centre - half, centre + half])


def _window(image: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Return a view of the part of the image that lies in the box, and its corner x, y."""
    height, width = image.shape[:2]
    left, top, right, bottom = (int(side) for side in np.clip(np.rint(box), 0, (width, height, width, height)))
    return image[top:bottom, left:right], (left, top)


def _unlikeness(grey: np.ndarray, distance: int) -> float:
    across = np.mean(np.square(grey[:, distance:] - grey[:, :-distance]))
    down = np.mean(np.square(grey[distance:] - grey[:-distance]))
    return float(across + down) / 2


def _noise(patch: np.ndarray) -> float:
    """Estimate the noise where the picture is flattest and neither black nor white."""
    pixels = slice(1, -1, 1 + min(patch.shape[:2]) // _ENOUGH_SIDE)
    grey = cv2.cvtColor(patch, cv2.COLOR_BGR2GRAY).astype(np.float32)
    smooth = cv2.GaussianBlur(grey, (0, 0), 1.5)
    slope = (np.abs(cv2.Sobel(smooth, -1, 1, 0)) + np.abs(cv2.Sobel(smooth, -1, 0, 1)))[pixels, pixels]
    residual = cv2.filter2D(patch.astype(np.float32), -1, _LAPLACIANS)[pixels, pixels]  # (h, w, 3)
    inside = np.abs(smooth - 127.5)[pixels, pixels] < 127.5 - _SATURATED
    if inside.mean() > 0.1:
        residual, slope = residual[inside], slope[inside]
    flat = slope <= np.quantile(slope, _FLATTEST)
    return float(np.median(np.abs(residual[flat]))) / 0.6745 / 6


def _blockiness(patch: np.ndarray, corner: tuple[int, int]) -> float:
    grey = cv2.cvtColor(patch, cv2.COLOR_BGR2GRAY).astype(np.float32)
    columns, rows = _breaks(grey), _breaks(grey.T)
    on_column, on_row = (_on_grid(len(breaks.T), start) for breaks, start in zip((columns, rows), corner, strict=True))
    on = np.concatenate([columns[:, on_column].ravel(), rows[:, on_row].ravel()])
    off = np.concatenate([columns[:, ~on_column].ravel(), rows[:, ~on_row].ravel()])
    if not on.size or not off.any():
        return 0.0
    return float(on.mean() / off.mean()) - 1


def _breaks(grey: np.ndarray) -> np.ndarray:
    """Return how much each step along a line differs from the mean of those beside it: a slope has no breaks."""
    steps = np.diff(grey, axis=1)
    return np.asarray(np.minimum(np.abs(steps[:, 1:-1] - (steps[:, :-2] + steps[:, 2:]) / 2), _LARGEST_STEP))


def _on_grid(count: int, start: int) -> np.ndarray:
    """Tell which breaks of a line that begins at `start` lie between two blocks: break i is between i + 1 and i + 2."""
    return np.asarray((np.arange(count) + start + 2) % _GRID == 0)
