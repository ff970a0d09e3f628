from datetime import UTC, datetime

import numpy as np
import pytest

from streamer.router import RestorerRouter
from streamer.types import Crop, Moment, Quality, Track


def crop(height: float = 20, *, noise: float = 0, blockiness: float = 0, sharpness: float = 0.8) -> Crop:
    side = round(1.6 * height)
    moment = Moment("camera", 0, 0.0, datetime.now(UTC), "file")
    track = Track(1, moment, np.zeros(4, np.float32), np.zeros((5, 2), np.float32), 0.9)
    quality = Quality(height, height / 3, sharpness, noise, blockiness, 0.0, 0.0)
    return Crop(track, np.zeros((side, side, 3), np.uint8), np.eye(2, 3), quality)


@pytest.mark.parametrize(
    ("given", "restorer", "reason"),
    [
        (crop(20), "sgen-small", "face 20 px"),
        (crop(63), "sgen-small", "face 63 px"),
        (crop(64), "none", "large and clean"),
        (crop(100, noise=12), "sgen-small", "noise 12.0"),
        (crop(100, blockiness=0.6), "sgen-small", "blockiness 0.60"),
        (crop(100, sharpness=0.2), "sgen-small", "sharpness 0.20"),
        (crop(170, noise=12), "none", "272 px, larger than max_size 256"),
    ],
)
def test_large_clean_faces_go_out_untouched_and_all_others_are_restored(given, restorer, reason):
    route = RestorerRouter("sgen-small", max_size=256).route(given)

    assert route.restorer == restorer
    assert reason in route.reason


def test_without_a_restorer_every_crop_goes_out_untouched():
    route = RestorerRouter("none", max_size=256).route(crop(20, noise=30))

    assert route.restorer == "none"


@pytest.mark.parametrize(("height", "restorer"), [(40, "sisn"), (41, "none")])
def test_a_crop_that_no_scale_keeps_within_max_size_goes_out_untouched(height, restorer):
    route = RestorerRouter("sisn", max_size=256, least_scale=4).route(crop(height, noise=12))

    assert route.restorer == restorer
    assert restorer == "sisn" or "66 px, 264 when restored, larger than max_size 256" in route.reason
