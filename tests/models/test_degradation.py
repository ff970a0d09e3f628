import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from models.degradation import CameraDamage, camera_degrade, draw_damage, h264, jpeg, sgen_degrade

FACE = np.ascontiguousarray(astronaut()[0:208, 130:306, ::-1])  # 176x208
CLEAN = CameraDamage(0, 0, 0, 0, False, cv2.INTER_AREA, None, None)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_sgens_noise_has_the_sigma_asked_for():
    grey = np.full((800, 800, 3), 128, np.uint8)

    low = sgen_degrade(grey, np.random.default_rng(0), sigma=30)

    assert low.shape == (200, 200, 3)
    assert low.std() == pytest.approx(30, rel=0.02)


def test_uniform_noise_only_adds():
    grey = np.full((400, 400, 3), 100, np.uint8)

    low = sgen_degrade(grey, np.random.default_rng(0), sigma=30, kind="uniform")

    assert low.min() >= 100
    assert low.max() <= 130


def test_without_noise_sgens_low_side_is_opencvs_cubic():
    low = sgen_degrade(FACE, np.random.default_rng(0), sigma=0)

    assert np.array_equal(low, cv2.resize(FACE, (44, 52), interpolation=cv2.INTER_CUBIC))


def test_the_same_seed_does_the_same_damage():
    for seed in range(8):
        damaged = []
        for _ in range(2):
            rng = np.random.default_rng(seed)
            damaged.append(np.stack(camera_degrade([FACE, FACE[::-1]], rng, draw_damage(rng), factor=2)))

        assert np.array_equal(*damaged)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_an_undamaged_face_is_only_shrunk(factor):
    (low,) = camera_degrade([FACE], np.random.default_rng(0), CLEAN, factor=factor)

    expected = cv2.resize(FACE, (176 // factor, 208 // factor), interpolation=cv2.INTER_AREA)
    assert np.array_equal(low, expected)


def test_stronger_codecs_do_more_damage_and_keep_the_place():
    by_crf = [psnr(h264([FACE] * 3, np.random.default_rng(0), crf=crf)[2], FACE) for crf in (18, 28, 38)]
    by_quality = [psnr(jpeg(FACE, quality), FACE) for quality in (95, 60, 30)]

    assert by_crf == sorted(by_crf, reverse=True)
    assert by_crf[0] > 33
    assert by_quality == sorted(by_quality, reverse=True)


def test_motion_blurs_along_its_angle_only():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::8] = 255  # upright lines
    along = CameraDamage(0, 6, 90, 0, False, cv2.INTER_AREA, None, None)
    across = CameraDamage(0, 6, 0, 0, False, cv2.INTER_AREA, None, None)

    (kept,) = camera_degrade([stripes], np.random.default_rng(0), along, factor=1)
    (smeared,) = camera_degrade([stripes], np.random.default_rng(0), across, factor=1)

    assert kept[16:48].std() > 2 * smeared[16:48].std()
