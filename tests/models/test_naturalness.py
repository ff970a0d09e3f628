import math

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

pytest.importorskip("PIL", reason="the extra train is not installed")

from models.naturalness import Niqe, fit_aggd, mscn

PHOTO = np.ascontiguousarray(astronaut()[..., ::-1])


def tiles(image: np.ndarray) -> list[np.ndarray]:
    return [image[y : y + 64, x : x + 64] for y in range(0, 512, 64) for x in range(0, image.shape[1], 64)]


@pytest.fixture(scope="module")
def niqe() -> Niqe:
    """Fitted to the left half of a photograph."""
    return Niqe(tiles(PHOTO[:, :256]))


@pytest.fixture(scope="module")
def sharp() -> np.ndarray:
    """The other half."""
    return PHOTO[:, 256:]


def test_quality_falls_with_blur(niqe, sharp):
    found = [niqe(sharp), *(niqe(cv2.GaussianBlur(sharp, (0, 0), sigma)) for sigma in (1, 2, 4))]

    assert found == sorted(found) and found[-1] > 2 * found[0]


def test_quality_falls_with_noise(niqe, sharp):
    noise = np.random.default_rng(0).normal(0, 1, sharp.shape)
    found = [niqe(np.clip(sharp + sigma * noise, 0, 255).astype(np.uint8)) for sigma in (0, 10, 40)]

    assert found == sorted(found) and found[-1] > 1.5 * found[0]


def test_a_picture_is_nearest_to_what_the_model_was_fitted_to(niqe, sharp):
    assert niqe(PHOTO[:, :256]) < niqe(sharp)


@pytest.mark.parametrize(("power", "shape"), [(2, 2.0), (1, 1.0)])
def test_the_fit_finds_the_shape_and_scale_that_samples_were_drawn_with(power, shape):
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 3, (2, 200_000)) if power == 2 else rng.laplace(0, 3, (2, 200_000))
    scale = 3 * math.sqrt(2) if power == 2 else 3  # a Gaussian's is sqrt(2) times its deviation

    found, left, right = fit_aggd(samples)

    assert found == pytest.approx([shape, shape], rel=0.02)
    assert left == pytest.approx([scale, scale], rel=0.02) and right == pytest.approx([scale, scale], rel=0.02)


def test_the_fit_tells_the_wider_side():
    halves = np.abs(np.random.default_rng(0).normal(0, 1, (1, 100_000)))
    halves[:, ::2] *= -3

    _, left, right = fit_aggd(halves)

    assert left / right == pytest.approx([3], rel=0.02)


def test_coefficients_know_no_brightness_and_hardly_any_contrast():
    luma = cv2.cvtColor(PHOTO, cv2.COLOR_BGR2GRAY)[:128, 192:320].astype(np.float64)

    (plain, deviation), (bright, _), (strong, doubled) = (mscn(each) for each in (luma, luma + 20, 2 * luma))

    assert bright == pytest.approx(plain, abs=1e-6)
    assert doubled == pytest.approx(2 * deviation, abs=1e-4)
    assert np.abs(strong - plain).mean() < 0.25 * np.abs(plain).mean()


def test_a_flat_picture_has_a_finite_distance(niqe):
    assert niqe(np.full((64, 64, 3), 128, np.uint8)) > niqe(PHOTO[:, :256])


def test_too_few_patches_are_told():
    with pytest.raises(ValueError, match="to fit 36 features"):
        Niqe([PHOTO[:64, :64]])
    with pytest.raises(ValueError, match="0 sharp patches"):
        Niqe([])


def test_a_picture_that_holds_no_two_patches_is_told(niqe):
    with pytest.raises(ValueError, match="48x63 does not hold two patches of 32 px"):
        niqe(np.zeros((63, 48, 3), np.uint8))
