"""NIQE (Mittal, Soundararajan and Bovik, IEEE SPL 2013): how far a picture's statistics are from those of sharp ones.

No truth is needed. The paper fits its model to 125 photographs of landscapes in patches of 96 px; ours is fitted to the
sharp faces that it is given, in patches small enough for restored faces. So its figures compare only among themselves,
never with published ones. Less is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

_SHARP = 0.75  # of its sharpest patch's sharpness a pristine picture's patch must have more
_STEPS = ((0, 1), (1, 0), (1, 1), (1, -1))  # rows and columns from a pixel to its neighbours
_FEATURES = 36
_TINY = 1e-12  # what is flat has no deviation to divide by
_SHAPES = np.arange(0.2, 10, 0.001)
_GAMMA = np.vectorize(math.gamma)
_RATIOS = _GAMMA(2 / _SHAPES) ** 2 / (_GAMMA(1 / _SHAPES) * _GAMMA(3 / _SHAPES))  # rises with the shape


class Niqe:
    """A multivariate Gaussian of the features of sharp pictures' patches, and any picture's distance from it.

    Pictures are (H, W, 3) uint8 BGR and hold two patches at least.
    """

    def __init__(self, pristine: Sequence[np.ndarray], *, patch: int = 32) -> None:
        """`patch` is even, in pixels. Raises ValueError where the pictures have too few sharp patches to fit to."""
        self.patch = patch
        found = [features[sharpness > _SHARP * sharpness.max()] for features, sharpness in map(self._seen, pristine)]
        patches = np.concatenate(found) if found else np.empty((0, _FEATURES))
        if len(patches) <= _FEATURES:
            raise ValueError(
                f"NIQE has {len(patches)} sharp patches of {patch} px: too few to fit {_FEATURES} features"
            )
        self.mean, self.covariance = patches.mean(axis=0), np.cov(patches, rowvar=False)

    def __call__(self, image: np.ndarray) -> float:
        """Return the distance of the picture's patches, all of them, from the sharp ones (the paper's equation 10)."""
        features, _ = self._seen(image)
        away = features.mean(axis=0) - self.mean
        between = np.linalg.pinv((self.covariance + np.cov(features, rowvar=False)) / 2, hermitian=True)
        return math.sqrt(max(0.0, float(away @ between @ away)))

    def _seen(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the features (n, 36) of the picture's patches, and their sharpness (n,). Raises ValueError."""
        rows, columns = (side // self.patch for side in image.shape[:2])
        if rows * columns < 2:
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise ValueError(f"a picture of {size} does not hold two patches of {self.patch} px, which NIQE wants")
        luma = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[: rows * self.patch, : columns * self.patch].astype(np.float32)
        half = Image.fromarray(luma).resize((luma.shape[1] // 2, luma.shape[0] // 2), Image.Resampling.BICUBIC)
        normalised, deviation = mscn(luma)
        coarse, _ = mscn(np.asarray(half))
        features = [_features(_patches(normalised, self.patch)), _features(_patches(coarse, self.patch // 2))]
        return np.hstack(features), _patches(deviation, self.patch).mean(axis=(1, 2))


def mscn(luma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture's mean-subtracted, contrast-normalised coefficients, and its local deviation (equations 1 to 3).

    `luma` is (H, W) of 0..255; so are both, float64. The window is a Gaussian of 7x7 and sigma 7/6.
    """
    luma = luma.astype(np.float64)
    mean, square = (
        cv2.GaussianBlur(each, (7, 7), 7 / 6, borderType=cv2.BORDER_REPLICATE) for each in (luma, luma * luma)
    )
    deviation = np.sqrt(np.abs(square - mean * mean))
    return (luma - mean) / (deviation + 1), deviation


def fit_aggd(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit an asymmetric generalised Gaussian to each row of samples (n, m), by moments (equations 5 to 7).

    Return shape, left and right scale, (n,) each. The shape is 2 for a Gaussian, 1 for a Laplacian, 0.2 to 10 in all; a
    scale is sqrt(2) times a Gaussian's deviation.
    """
    square = samples * samples
    below, above = samples < 0, samples > 0
    left, right = (
        np.sqrt((square * side).sum(axis=1) / np.maximum(side.sum(axis=1), 1) + _TINY) for side in (below, above)
    )
    lopsided = left / right
    ratio = (np.abs(samples).mean(axis=1) ** 2 + _TINY) / (square.mean(axis=1) + _TINY)
    ratio *= (lopsided**3 + 1) * (lopsided + 1) / (lopsided**2 + 1) ** 2
    shape = np.interp(ratio, _RATIOS, _SHAPES)
    scale = np.sqrt(_GAMMA(1 / shape) / _GAMMA(3 / shape))
    return shape, left * scale, right * scale


def _features(patches: np.ndarray) -> np.ndarray:
    """Return the features (n, 18) of one size: shape and mean scale of the coefficients; shape, mean and both scales of
    the products of neighbours in four directions. A patch's last pixels neighbour its first."""
    shape, left, right = fit_aggd(patches.reshape(len(patches), -1))
    found = [shape, (left + right) / 2]
    for step in _STEPS:
        products = patches * np.roll(patches, step, axis=(1, 2))
        shape, left, right = fit_aggd(products.reshape(len(patches), -1))
        found += [shape, (right - left) * _GAMMA(2 / shape) / _GAMMA(1 / shape), left, right]
    return np.stack(found, axis=1)


def _patches(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W) to (n, side, side), row by row."""
    rows, columns = (length // side for length in image.shape)
    return image.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)
